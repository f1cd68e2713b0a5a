"""A folder in which a documented command finds what it names: annotated photos in every format,
adapters, runs, videos. What a command writes is left for those after it."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from test_exchange import meta_tensors
from test_labelling import (
    HEIGHT,
    WIDTH,
    labelme_shape,
    via_region,
    voc_object,
    write_labelme,
    write_via,
    write_voc,
)
from test_video import write_clip

import train_sam3_lora
from sam3_lora.checkpoint import ADAPTER_FILE, checkpoints
from sam3_lora.config import Config, load_config
from sam3_lora.model import PUBLISHED, load_model

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["person", "car", "dog"]
STEMS = [str(number) for number in range(1, 11)]
PHOTO_SIZE = (480, 360)  # of a photo to predict on: the guide's box fits in
SPLITS = ("train", "val", "test")
ANNOTATIONS = ("annotations.json", "_annotations.coco.json")
# What makes a documented command small; one that sets a flag itself keeps its value.
SMALL = {
    "train_sam3_lora.py": {"--device": "cpu", "--num_workers": "0", "--max_steps": "1"},
    "evaluate_sam3_lora.py": {"--device": "cpu", "--num_workers": "0"},
    "inference.py": {"--device": "cpu"},
}
Flags = dict[str, list[str]]


def flags_of(words: list[str]) -> Flags:
    """The values of each flag of a command."""
    found: Flags = {}
    name = ""
    for word in words:
        name = word if word.startswith("--") else name
        found.setdefault(name, [])
        found[name] += [word] * (word != name)
    return found


def boxes_of(number: int, classes: list[str]) -> list[tuple[str, list[int]]]:
    """The objects of a photo: class and box (x, y, width, height); the first class is in all."""
    boxes = [[4 + number, 6, 20, 24], [30 + number, 30, 18, 20], [52, 2 + number, 20, 16]]
    return [(classes[i * number % len(classes)], box) for i, box in enumerate(boxes)]


def classes_of(flags: Flags) -> list[str]:
    """The classes that a command names, or those of every source here."""
    if "--prompts" in flags:
        return list(json.loads(flags["--prompts"][0]))
    if "--classes" not in flags:
        return CLASSES
    text = flags["--classes"][0]
    return list(json.loads(text)) if text.startswith("{") else text.split(",")


def write_photo(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """A photo of noise; of its name, so that no two are one photo twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def turn_photo(path: Path) -> None:
    """Makes a photo another one of the same size."""
    turned = Image.open(path).transpose(Image.Transpose.ROTATE_180)
    path.unlink()  # it may be a link to that of another split
    turned.save(path)


def write_photos(folder: Path, flags: Flags) -> None:
    """The photos of the sources, with the names that a pattern of `masks` asks for."""
    pattern = flags.get("--pattern", [""])[0]
    form = pattern.split(":")[0] if ":" in pattern else "{stem}"
    for stem in STEMS:
        write_photo(folder / f"{form.format(stem=stem)}.jpg")


def write_coco(path: Path, flags: Flags) -> None:
    """A COCO file of the photos, polygons and all."""
    classes = classes_of(flags)
    images, annotations = [], []
    for number, stem in enumerate(STEMS, 1):
        record = {"id": number, "file_name": f"{stem}.jpg", "width": WIDTH, "height": HEIGHT}
        images.append(record)
        for name, (x, y, width, height) in boxes_of(number, classes):
            right, bottom = x + width, y + height
            record = {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0}
            record |= {"category_id": classes.index(name) + 1, "bbox": [x, y, width, height]}
            record["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
            annotations.append(record | {"area": width * height})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_masks(folder: Path, flags: Flags) -> None:
    """A mask a photo, a value an object: 1, 2, ..., or the values that a command names."""
    names = classes_of(flags)
    values = [int(name) if name.isdigit() else i for i, name in enumerate(names, 1)]
    values = values if values[1:] else [1, 2]  # of one class, two objects
    form = flags.get("--pattern", ["{stem}"])[0].split(":")[-1]
    for number, stem in enumerate(STEMS, 1):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        for i, (_, (x, y, width, height)) in enumerate(boxes_of(number, names)):
            value = values[i % len(values)]
            mask[y : y + height, x : x + width] = value
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save((folder / form.format(stem=stem)).with_suffix(".png"))


def write_yolo(folder: Path, flags: Flags) -> None:
    """images/ and labels/ with a folder a split."""
    classes = classes_of(flags)
    for split in SPLITS:
        labels = folder / "labels" / split
        labels.mkdir(parents=True)
        for number, stem in enumerate(STEMS, 1):
            write_photo(folder / "images" / split / f"{stem}.jpg")
            rows = [
                f"{classes.index(name)} {(x + width / 2) / WIDTH} {(y + height / 2) / HEIGHT} "
                f"{width / WIDTH} {height / HEIGHT}"
                for name, (x, y, width, height) in boxes_of(number, classes)
            ]
            (labels / f"{stem}.txt").write_text("\n".join(rows))
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(classes))
    (folder / "data.yaml").write_text(f"names:\n{names}")


def write_voc_folder(folder: Path, flags: Flags) -> None:
    """Annotations/, JPEGImages/ and the lists of the splits."""
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split in SPLITS:
        (lists / f"{split}.txt").write_text("\n".join(STEMS))
    for number, stem in enumerate(STEMS, 1):
        write_photo(folder / "JPEGImages" / f"{stem}.jpg")
        rows = boxes_of(number, classes_of(flags))
        objects = [voc_object(n, x + 1, y + 1, x + w, y + h) for n, (x, y, w, h) in rows]
        write_voc(folder / "Annotations", stem, "".join(objects), f"{stem}.jpg")


def write_labelled(folder: Path, flags: Flags) -> None:
    """LabelMe's JSON files beside their photos."""
    for number, stem in enumerate(STEMS, 1):
        write_photo(folder / f"{stem}.jpg")
        shapes = [labelme_shape(*item) for item in boxes_of(number, classes_of(flags))]
        write_labelme(folder, f"{stem}.jpg", shapes)


def write_via_file(path: Path, flags: Flags) -> None:
    """A project of VIA over the photos."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        f"{stem}.jpg": [via_region(*item) for item in boxes_of(number, classes_of(flags))]
        for number, stem in enumerate(STEMS, 1)
    }
    write_via(path.parent, rows).rename(path)


def write_split(folder: Path) -> None:
    """An annotated split in this project's layout, where there is none."""
    if not any((folder / name).is_file() for name in ANNOTATIONS):
        shutil.rmtree(folder, ignore_errors=True)
        write_photos(folder / "images", {})
        write_coco(folder / "annotations.json", {})


def beside(data: Path, split: str) -> Path:
    """The folder of a split; valid/ where a data folder has that in place of val/."""
    other = data / "valid"
    return other if split == "val" and other.is_dir() else data / split


# Files and folders that a conversion reads: made anew for each, as it names its own classes.
SOURCES: dict[str, Callable[[Path, Flags], None]] = {
    "--images_dir": write_photos,
    "--coco_json": write_coco,
    "--masks_dir": write_masks,
    "--yolo_dir": write_yolo,
    "--voc_dir": write_voc_folder,
    "--labelme_dir": write_labelled,
    "--via_json": write_via_file,
}


class Workspace:
    """The folder that commands run in, and what they may name in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("configs", "demo"):
            (folder / name).symlink_to(ROOT / name)
        # What commands that name a run begin from: one step of the balanced preset.
        self.run = folder / "a_run"
        write_split(folder / "data" / "train")
        write_split(folder / "data" / "val")
        words = ["--config", str(folder / "configs" / "base_config.yaml"), "--output_dir"]
        words += [str(self.run), "--train_data_path", str(folder / "data" / "train")]
        small = [word for pair in SMALL["train_sam3_lora.py"].items() for word in pair]
        assert train_sam3_lora.main([*words, *small]) == 0

    def provide(self, words: list[str]) -> list[str]:
        """Makes what a command names and none before it made; returns the flags to add to it."""
        script, flags = words[1], flags_of(words[2:])
        if script == "prepare_data.py":
            self._sources(words[2], flags)
            return []
        makers = {
            "--lora_weights": self._adapter,
            "--init_lora_weights": self._adapter,
            "--config": self._config,
            "--source": self._source,
            "--image": partial(write_photos_or_one, size=PHOTO_SIZE),
            "--video": write_video,
            "--model_name": self._base,
            "--data_dir": self._data,
            "--probe_dir": self._data,
            "--train_data_path": write_split,
            "--val_data_path": write_split,
        }
        if script == "evaluate_sam3_lora.py":
            flags.setdefault("--data_dir", ["data"])
        for flag, make in makers.items():
            for value in flags.get(flag, []):
                make(self.folder / re.sub(r"^\w+=", "", value))
        small = dict(SMALL.get(script, {}))
        if script == "train_sam3_lora.py":
            config = self._training(flags)
            saved = checkpoints(self.folder / config.output.output_dir)
            if "--resume" in flags and saved:
                small["--max_steps"] = str(int(saved[-1].name.split("-")[1]) + 1)
        missing = [(flag, value) for flag, value in small.items() if flag not in flags]
        return [word for pair in missing for word in pair]

    def _sources(self, command: str, flags: Flags) -> None:
        """What a subcommand of prepare_data.py reads; the split that it writes makes way."""
        for flag, write in SOURCES.items():
            for value in flags.get(flag, []):
                write_anew = self.folder / value
                if write_anew.is_dir() and flag != "--masks_dir":
                    shutil.rmtree(write_anew)
                write(write_anew, flags)
        data = self.folder / flags.get("--data_dir", ["data"])[0]
        if command == "split":
            write_split(data)
        elif command == "validate":
            folder = data / flags.get("--split", ["train"])[0]
            write_split(folder)
            if "--fix" in flags:  # of photos that other splits have none would be left
                shutil.rmtree(self.folder / flags["--fix"][0], ignore_errors=True)
                turn_photo(min(folder.rglob("*.jpg")))
        if command not in ("create", "validate"):
            output = self.folder / flags.get("--output_dir", ["data"])[0]
            several = command in ("split", "demo")
            for split in SPLITS if several else flags.get("--split", ["train"]):
                shutil.rmtree(output / split, ignore_errors=True)

    def _training(self, flags: Flags) -> Config:
        """The configuration of a training command, whose data it makes."""
        config = load_config(self.folder / flags["--config"][0], {})
        train = self.folder / flags.get("--train_data_path", [config.training.train_data_path])[0]
        write_split(train)
        if config.training.val_data_path is None:
            write_split(beside(train.parent, "val"))
        return config

    def _adapter(self, path: Path) -> None:
        if not path.exists():
            best = self.run / "best_model"
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix:
                shutil.copy(best / ADAPTER_FILE, path)
            else:
                shutil.copytree(best, path)

    def _config(self, path: Path) -> None:
        if not path.exists():  # that of a run: the run itself, which goes on
            run = path.parent
            shutil.copytree(self.run, run)
            text = path.read_text(encoding="utf-8")
            name = run.relative_to(self.folder).as_posix()
            path.write_text(text.replace(str(self.run), name), encoding="utf-8")

    def _source(self, path: Path) -> None:
        if not path.exists() and path.suffix:
            model, _ = load_model(PUBLISHED)
            torch.save(meta_tensors(model), path)

    def _base(self, path: Path) -> None:
        if path.relative_to(self.folder).as_posix() != PUBLISHED and not path.exists():
            raise FileNotFoundError(f"{path}: no command here may name a base of its own")

    def _data(self, path: Path) -> None:
        for split in SPLITS:
            write_split(beside(path, split))


def write_photos_or_one(path: Path, size: tuple[int, int]) -> None:
    """A photo, or a folder of two, where there is none."""
    if not path.exists():
        for photo in [path] if path.suffix else [path / "1.jpg", path / "2.jpg"]:
            write_photo(photo, size)


def write_video(path: Path) -> None:
    """A clip of four frames, as a file or a folder, where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            write_clip(path, 4)
        else:
            for number in range(4):
                write_photo(path / f"{number}.jpg")
