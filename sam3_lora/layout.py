"""Where the files of a split are, what their JSON is, and what is laid out in another way."""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sam3_lora.geometry import shown
from sam3_lora.images import IMAGE_SUFFIXES, DatasetError, listed

SPLIT_LAYOUTS = (("annotations.json", "images"), ("_annotations.coco.json", "."))
SNIFFED = 65536  # characters of a JSON file that tell which tool wrote it
LEAST_FLAGS = 6  # of keypoints in a split, from which they are told from coordinates
EDGE_ROUNDING = 0.01  # of an image's side, by which a box may pass it
# A key of JSON labels -> the command of prepare_data.py that reads them, and its flag.
READERS = {
    '"shapes"': "labelme --labelme_dir",
    '"regions"': "via --via_json",
    '"images"': "coco --coco_json",
    '"annotations"': "coco --coco_json",
}


def split_dir(data_dir: Path, split: str) -> Path:
    """Returns a split's folder; of `val` and `valid` that which holds annotations.

    The folder need not exist; its name is then `val`, never `valid`.
    """
    names = (split, "valid" if split == "val" else "val") if split in ("val", "valid") else (split,)
    folders = [Path(data_dir) / name for name in names]
    annotated = [folder for folder in folders if annotation_file(folder)]
    existing = [folder for folder in folders if folder.is_dir()]
    return (annotated or existing or [Path(data_dir) / ("val" if "val" in names else split)])[0]


def sibling_val(train_path: Path) -> Path | None:
    """Returns the annotated `val` or `valid` folder beside a training split, or None."""
    folder = split_dir(Path(train_path).parent, "val")
    same = folder.resolve() == Path(train_path).resolve()
    return folder if annotation_file(folder) and not same else None


def find_split(path: Path) -> tuple[Path, Path]:
    """Returns a split folder's annotation file and images folder.

    Raises:
        DatasetError: Neither layout is there; the message names both, and what to do.
    """
    path = Path(path)
    for name, images in SPLIT_LAYOUTS:
        if (path / name).is_file() and (path / images).is_dir():
            return path / name, path / images
    wanted = "annotations.json with images/ or _annotations.coco.json with the images beside it"
    found = "a file" if path.exists() else "no such folder"
    found = contents(path) if path.is_dir() else found
    raise DatasetError(f"expected {wanted} in {path}, found {found}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    """What to do about a path that is no split."""
    parent = path.parent
    if not path.exists() and annotation_file(parent):
        return f"{parent} is a split itself: --data_dir is the folder above the split"
    if not path.exists():
        beside = {p.name: p for p in _children(parent) if annotation_file(p)}
        if close := difflib.get_close_matches(path.name, beside, n=1):
            return f"did you mean {beside[close[0]]}?"
        if beside:
            return f"{parent} has {', '.join(sorted(beside))}: name one of them"
        if source := _other_format(parent):
            return f"convert it first: python prepare_data.py {source}"
        return (
            "correct the path, or convert your data to it as data/README.md shows; for a first try "
            f"`python prepare_data.py demo --output_dir {parent / 'demo'}` draws a data set"
        )
    if annotation_file(parent):
        return f"name its folder {parent}"
    if inside := [str(child) for child in _children(path) if annotation_file(child)]:
        return f"name one split: {' or '.join(inside)}"
    folder = path if path.is_dir() else parent
    if annotation_file(path) and not _holds(path, *IMAGE_SUFFIXES):
        return f"put its images into {path / 'images'}"
    if source := _other_format(folder):
        return f"convert it first: python prepare_data.py {source}"
    return "convert it with prepare_data.py: data/README.md shows how for each format"


def _other_format(folder: Path) -> str | None:
    """The arguments of prepare_data.py for a folder that looks like another format's, if any."""
    if (folder.parent / "data.yaml").is_file() and not (folder / "data.yaml").is_file():
        folder = folder.parent
    if (folder / "data.yaml").is_file() or _holds(folder / "labels", ".txt"):
        return f"yolo --yolo_dir {folder}"
    if _holds(folder, ".xml") or _holds(folder / "Annotations", ".xml"):
        return f"voc --voc_dir {folder}"
    for file in sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json")]):
        if (reader := _reader(file)) is not None:
            is_labelme = reader.startswith("labelme")
            return reader if is_labelme else f"{reader} --images_dir {_photos(folder)}"
    names = ("masks", "mask", "SegmentationClass", "labels", "annotations")
    for masks in (folder / name for name in names):
        if _holds(masks, ".png"):
            return f"masks --images_dir {_photos(folder)} --masks_dir {masks}"
    return None


def _reader(file: Path) -> str | None:
    """The arguments of prepare_data.py that read a JSON file of labels, if it looks like any."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(SNIFFED)
    command = next((command for key, command in READERS.items() if key in text), None)
    named = file.parent if command == READERS['"shapes"'] else file
    return command and f"{command} {named}"


def other_reader(file: Path, own: str, remedy: str) -> str:
    """Returns the command that reads a JSON file which `own` cannot; a remedy where none does."""
    reader = _reader(file)
    if reader is None or reader.split()[0] == own:
        return remedy
    return f"read it with `python prepare_data.py {reader}`"


def are_keypoints(lines: Iterable[str]) -> bool:
    """Returns whether lines of YOLO labels are boxes with keypoints, class cx cy w h (x y v) ...

    They are where all are of one length, with a box inside the image, and each v is 0, 1 or 2: so
    many coordinates of polygons are not. Of one keypoint, v may be a triangle's confidence, unless
    it is 2. Keypoints without v cannot be told from a polygon.
    """
    length, flags = 0, Counter()
    for words in filter(None, map(str.split, lines)):
        length = length or len(words)
        if len(words) != length or length < 8 or (length - 5) % 3:
            return False
        try:
            cx, cy, w, h, *points = map(float, words[1:])
        except ValueError:
            return False
        beyond = max(abs(cx - 0.5) + w / 2, abs(cy - 0.5) + h / 2) - 0.5
        if not (min(w, h) > 0 and beyond < EDGE_ROUNDING and {0, 1, 2}.issuperset(points[2::3])):
            return False
        flags.update(points[2::3])
    return flags[2] > 0 or (flags.total() >= LEAST_FLAGS and length > 8)


def _photos(folder: Path) -> Path:
    """The folder of images in one, else itself."""
    names = ("images", "JPEGImages", "train2017", "train")
    return next((folder / n for n in names if _holds(folder / n, *IMAGE_SUFFIXES)), folder)


def _holds(folder: Path, *suffixes: str) -> bool:
    """Whether a folder, or one in it, holds a file of these suffixes."""
    files = (p for child in _children(folder) for p in (child, *_children(child)))
    return any(p.suffix.lower() in suffixes for p in files)


def _children(folder: Path) -> Iterator[Path]:
    """What is in a folder, by name; nothing where it is none."""
    return iter(sorted(folder.iterdir()) if folder.is_dir() else [])


def annotation_file(folder: Path) -> Path | None:
    """The annotation file of a split folder, if it has one."""
    return next((folder / n for n, _ in SPLIT_LAYOUTS if (folder / n).is_file()), None)


def contents(path: Path) -> str:
    """The first names in a folder, for a message."""
    return listed(sorted(child.name for child in path.iterdir())) or "an empty folder"


def load_json(file: Path) -> dict[str, Any]:
    """Returns a COCO file's content, of which only the outline is checked.

    Raises:
        DatasetError: No such file, broken JSON, or not lists of images, annotations, categories.
    """
    try:
        if file.exists() and not file.is_file():  # a pipe or a device may have no end
            raise OSError(0, "a folder or a device")
        payload = parse_json(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        found = f"expected a COCO file at {file}, found {error.strerror}"
        raise DatasetError(f"{found}; check the path") from error
    except ValueError as error:
        message = f"expected JSON in {file}, found {error}; export the annotations again"
        raise DatasetError(message) from error
    for key in ("images", "annotations", "categories"):
        rows = payload.get(key) if isinstance(payload, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            is_table = isinstance(payload, dict)
            found = shown(sorted(payload)) if is_table else type(payload).__name__
            remedy = "export the annotations as COCO (object detection or instances)"
            message = f'expected a list of objects under "{key}" in {file}, found {found}'
            raise DatasetError(f"{message}; {other_reader(file, 'coco', remedy)}")
    return payload


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text; ValueError for a broken one, one nested too deep, or a key
    twice, of which Python would read the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {shown(twice)} twice in one object")
        return table

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("values nested too deep") from error
