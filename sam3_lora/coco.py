"""Reads and writes COCO annotations; turns polygons and RLE into masks.

A split is a folder: `annotations.json` with `images/` (what `prepare_data.py` writes), or a
Roboflow export, `_annotations.coco.json` with the images beside it. Reading is strict: what
training could not use raises `DatasetError`, by the checks of `faults.py`. Boxes are xywh in
pixels of the image as shown, that is after its EXIF rotation.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from filecmp import cmp
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from sam3_lora import processes
from sam3_lora.faults import (
    clean_name,
    file_faults,
    find_position,
    id_key,
    kept_categories,
    phrase_of,
    positions_by_id,
    record_faults,
    refuse_fatal,
)
from sam3_lora.geometry import mask_problem, segmentation_of
from sam3_lora.images import DatasetError
from sam3_lora.layout import contents, find_split, load_json, sibling_val, split_dir

logger = logging.getLogger(__name__)

# Kinds of errors that reading survives and that nothing later in a run would tell of.
TOLD_ON_READING = ("box in fractions", "duplicate file")

ENDS = ("new", "old")  # of the folders beside a split while it is written
NO_CONTENT = (".gitkeep", ".DS_Store", "Thumbs.db", "desktop.ini")  # of git and of file managers


@dataclass(frozen=True)
class CocoSplit:
    """One split, with every id an int from 1.

    Attributes:
        images: `id, file_name, width, height`, in file order; `source_id` where the id is new.
        annotations: Image id -> its objects in file order, for every image: `id, category_id,
            bbox` (xywh, pixels), `segmentation` (polygons, RLE, or None: a box only), `iscrowd`
            (0 or 1), `area` (pixels), and `source_id` where the id is new.
        categories: Category id -> name, in file order.
        prompts: Category name -> phrase, for the names that are not prompted as they are.
    """

    annotations_file: Path
    images_dir: Path
    images: list[dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    categories: dict[int, str]
    prompts: dict[str, str]

    def image_path(self, image: Mapping[str, Any]) -> Path:
        """Returns where the file of an entry of `images` is."""
        return self.images_dir / image["file_name"]

    def phrase(self, category_id: int) -> str:
        """Returns a category's prompt: its `prompts` entry, or its name with _ and - as spaces."""
        return phrase_of(self.categories[category_id], self.prompts)


def read_split(path: Path) -> CocoSplit:
    """Reads a split folder; see `find_split` and `read_coco`."""
    return read_coco(*find_split(path))


def read_splits(
    train_path: Path, val_path: Path | None = None, most_val: int | None = None
) -> tuple[CocoSplit, CocoSplit | None]:
    """The training split and the validation split, if there is one, with their images checked.

    Args:
        train_path, val_path: as for `read_split`; None takes val/ or valid/ beside the first.
        most_val: the first images of the validation split that are used; None: all.
    """
    train_split = read_split(train_path)
    check_images(train_split)
    val_path = val_path or sibling_val(train_path)
    if val_path is None:
        return train_split, None
    val_split = read_split(val_path)
    val_split = replace(val_split, images=val_split.images[:most_val])
    check_images(val_split)
    return train_split, val_split


def read_coco(
    annotations_file: Path,
    images_dir: Path,
    payload: dict[str, Any] | None = None,
    checked: bool = False,
) -> CocoSplit:
    """Reads a COCO file, or its content if that is given, without opening an image.

    Ids that are not unique ints from 1 are numbered from 1 in file order. A category with id 0
    that no annotation uses is a Roboflow root and is dropped. A box or area that is missing is
    taken from the mask. A box outside the image or without area is kept: `find_faults` names it.
    `checked` says that `find_faults` has just found nothing fatal: the checks are not made again.

    Raises:
        DatasetError: Broken JSON, no images or categories, a missing key, an unknown id, a box or
            a mask that cannot be used, a file name that leaves the folder.
    """
    annotations_file, images_dir = Path(annotations_file), Path(images_dir)
    payload = load_json(annotations_file) if payload is None else payload
    faults = () if checked else record_faults(payload, annotations_file)
    wrong = [fault for fault in faults if fault.fatal or fault.kind in TOLD_ON_READING]
    refuse_fatal(wrong)
    if wrong:
        message = "%s has %d errors, which validate lists, the first: %s"
        logger.warning(message, annotations_file, len(wrong), wrong[0])
    category_rows = kept_categories(payload)
    category_ids, category_at = _numbers(category_rows), positions_by_id(category_rows)
    image_at = positions_by_id(payload["images"])
    images = _images(payload["images"])
    annotations: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    rows = payload["annotations"]
    for row, number in zip(rows, _numbers(rows), strict=True):
        image = images[find_position(image_at, row["image_id"])]
        category_id = category_ids[find_position(category_at, row["category_id"])]
        annotations[image["id"]].append(_annotation(row, number, category_id, image))
        row.clear()  # a million rows beside their records would not fit the memory
    names = [row["name"] for row in category_rows]
    return CocoSplit(
        annotations_file=annotations_file,
        images_dir=images_dir,
        images=images,
        annotations=annotations,
        categories=dict(zip(category_ids, names, strict=True)),
        prompts={k: v for k, v in (payload.get("prompts") or {}).items() if k in names},
    )


def _images(rows: list[dict]) -> list[dict[str, Any]]:
    """The records of image rows that have passed `_image_faults`."""
    return [
        {
            "id": number,
            "file_name": clean_name(row["file_name"]),
            "width": int(row["width"]),
            "height": int(row["height"]),
        }
        | _source(row, number)
        for row, number in zip(rows, _numbers(rows), strict=True)
    ]


def _annotation(row: dict, number: int, category_id: int, image: dict) -> dict[str, Any]:
    """The record of an annotation that has passed `annotation_problems`."""
    segmentation = segmentation_of(row)
    size = image["height"], image["width"]
    bbox, area = row.get("bbox"), row.get("area")
    if bbox is None:
        bbox = mask_utils.toBbox(to_rle(segmentation, *size)).tolist()
    if area is None:
        area = mask_area(segmentation, *size) if segmentation is not None else bbox[2] * bbox[3]
    return {
        "id": number,
        "category_id": category_id,
        "bbox": [float(value) for value in bbox],
        "segmentation": segmentation,
        "iscrowd": int(row.get("iscrowd") or 0),
        "area": float(area),
    } | _source(row, number)


def _source(row: dict, number: int) -> dict[str, Any]:
    """The id that `number` stands for, unless it is the same."""
    source = id_key(row.get("source_id", row.get("id")))
    return {} if source in (None, number) else {"source_id": source}


def _numbers(rows: list[dict]) -> list[int]:
    """The rows' ids if they are unique ints from 1, else 1, 2, ... in file order."""
    keys = [id_key(row.get("id")) for row in rows]
    keep = all(isinstance(k, int) and k >= 1 for k in keys) and len(set(keys)) == len(keys)
    return keys if keep else list(range(1, len(rows) + 1))


def to_rle(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    """Returns polygons or an RLE as a compressed RLE, the union of several parts.

    Args:
        segmentation: Polygons `[[x, y, ...], ...]` in pixels, or an RLE, compressed or not.
        height: Of the image, pixels.
        width: Of the image, pixels.

    Returns:
        `{"size": [height, width], "counts": str}`, clipped to the image.

    Raises:
        DatasetError: Too few points, an RLE of another size, runs that do not add up.
    """
    problem = mask_problem(segmentation, height, width)
    if problem:
        raise DatasetError(f"{problem}; prepare_data.py validate names the annotation")
    rle = segmentation
    if isinstance(segmentation, list):
        rle = mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = mask_utils.frPyObjects(segmentation, height, width)
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [height, width], "counts": text}


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Returns the mask (height, width), bool, of polygons or an RLE; see `to_rle`."""
    return mask_utils.decode(to_rle(segmentation, height, width)).astype(bool)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Returns the compressed RLE of a mask (height, width); `decode_mask` gives it back."""
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def mask_area(segmentation: list | dict, height: int, width: int) -> float:
    """Returns the area in pixels of polygons or an RLE; see `to_rle`."""
    return float(mask_utils.area(to_rle(segmentation, height, width)))


def mask_iou(a: Sequence[dict], b: Sequence[dict]) -> np.ndarray:
    """Returns the IoU, float64 (len(a), len(b)), of each pair of compressed RLEs."""
    if not a or not b:
        return np.zeros((len(a), len(b)))
    return np.asarray(mask_utils.iou(list(a), list(b), [0] * len(b)))


def check_images(split: CocoSplit) -> None:
    """Looks at every image's header, so that a fault shows before a run and not in its middle.

    Raises:
        DatasetError: Images are missing, are no images, or have another size than the file says.
    """

    with ThreadPoolExecutor() as pool:
        checks = pool.map(
            lambda image: list(file_faults(image, split.image_path(image), decode=False)),
            split.images,
        )
        faults = [fault for found in checks for fault in found]
    if faults:
        more = f"; and {len(faults) - 1} more images" if len(faults) > 1 else ""
        message = f"{split.annotations_file}: {faults[0]}{more}"
        raise DatasetError(f"{message}; `python prepare_data.py validate` lists them all")


def write_splits(
    output_dir: Path,
    splits: Mapping[str, CocoSplit],
    *,
    overwrite: bool = False,
    link: bool = False,
) -> list[Path]:
    """Writes `output_dir/<split>` of each: annotations.json and the images, all or nothing.

    A split that already holds just that is left as it is. What a killed run left beside the splits
    is removed. Annotations are numbered 1, 2, ... image by image.

    Args:
        output_dir: The data folder.
        splits: `train`, `val` or `test` -> records.
        overwrite: Whether splits that hold files are replaced.
        link: Whether images are hard links; they are copies where the file system refuses.

    Returns:
        The folders of the splits, in their order.

    Raises:
        DatasetError: A split holds other files or its own source, or is a link; a source image is
            absent, or a link to a file outside its folder. Nothing is changed.
    """
    _clear_leftovers(Path(output_dir))
    targets = {split_dir(output_dir, name): records for name, records in splits.items()}
    todo = {t: r for t, r in targets.items() if not _is_there(t, r, overwrite)}
    sources = {target: _sources(records) for target, records in todo.items()}
    # Beside the target, so that os.replace stays within one file system.
    new, old = ({t: t.parent / f".{t.name}.{os.getpid()}.{end}" for t in todo} for end in ENDS)
    swapped = []
    try:
        for target, records in todo.items():
            link = _fill(new[target], records, sources[target], link)
        for target in todo:
            if target.exists():
                os.replace(target, old[target])
            os.replace(new[target], target)
            swapped.append(target)
    finally:
        for target in swapped if len(swapped) < len(todo) else ():
            os.replace(target, new[target])
        _clear_leftovers(Path(output_dir))
    return list(targets)


def _clear_leftovers(output_dir: Path) -> None:
    """Removes what this and killed runs built beside the splits; puts back what they moved away."""
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = re.fullmatch(rf"\.(\w+)\.(\d{{1,9}})\.({'|'.join(ENDS)})", path.name)
        if match and not _is_running(int(match[2])):
            if match[3] == "old" and not (output_dir / match[1]).exists():
                os.replace(path, output_dir / match[1])
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    """Whether another process has this id; on Windows always, where os.kill would interrupt it."""
    try:
        if pid != os.getpid() and os.name != "nt":
            os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return pid != os.getpid()


def _is_there(target: Path, split: CocoSplit, overwrite: bool) -> bool:
    """Whether `target` holds just what would be written; raises where writing would lose files."""
    if split.images_dir.resolve().is_relative_to(target.resolve()):
        message = f"expected the source images outside {target}, found them in {split.images_dir}"
        remedy = "name another folder to write to: the split is written as a whole"
        raise DatasetError(f"{message}; {remedy}")
    if target.is_file() or target.is_symlink():
        found = "a link" if target.is_symlink() else "a file"
        raise DatasetError(f"expected a folder at {target}, found {found}; move it")
    found = {path for path in target.rglob("*") if path.name not in NO_CONTENT and path.is_file()}
    if overwrite or not found:
        return False
    file = target / "annotations.json"
    images = {target / "images" / name: source for name, source in _sources(split).items()}
    if found == {file, *images}:
        with file.open(encoding="utf-8", errors="replace", newline="") as stream:
            same = all(stream.read(len(text)) == text for text in _json_text(split))
            same = same and not stream.read(1)
        if same and all(os.path.samefile(a, b) or cmp(a, b, False) for a, b in images.items()):
            logger.info("%s is already there, with the same content", target)
            return True
    message = f"expected {target} to be absent, empty or of this source, found {contents(target)}"
    raise DatasetError(f"{message}; pass --overwrite to replace it or write elsewhere")


def _sources(split: CocoSplit) -> dict[str, Path]:
    """Name -> file of the images, links followed; raises where one is not in the images folder."""
    root = split.images_dir.resolve()
    sources = {image["file_name"]: split.image_path(image).resolve() for image in split.images}
    for name, source in sources.items():
        if not source.is_relative_to(root) or not source.is_file():
            found = "none" if source.is_relative_to(root) else f"a link to {source}"
            message = f"expected an image file at {split.images_dir / name}, found {found}"
            raise DatasetError(f"{message}; put the file itself there")
    return sources


def _fill(folder: Path, split: CocoSplit, sources: dict[str, Path], link: bool) -> bool:
    """Makes a split's folder: the images, then annotations.json; returns whether linking works."""
    (folder / "images").mkdir(parents=True)
    for name, source in processes.progress(sources.items(), "images"):
        copy = folder / "images" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            (os.link if link else shutil.copyfile)(source, copy)
        except OSError as error:
            if not link:
                raise
            logger.warning("copied, not linked: no hard link of %s (%s)", source, error.strerror)
            link = False
            shutil.copyfile(source, copy)
    with (folder / "annotations.json").open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(_json_text(split))
        stream.flush()
        os.fsync(stream.fileno())
    return link


def _json_text(split: CocoSplit) -> Iterator[str]:
    """The pieces of annotations.json, a row a line: the whole as one text would fill the memory."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    keys = (image["id"] for image in split.images)
    objects = enumerate(((key, item) for key in keys for item in split.annotations[key]), start=1)
    tables = {
        "images": split.images,
        "annotations": (
            item | {"id": number, "image_id": key, "segmentation": item["segmentation"] or []}
            for number, (key, item) in objects
        ),
        "categories": ({"id": key, "name": name} for key, name in split.categories.items()),
    }
    for key, rows in tables.items():
        yield f'{"{" if key == "images" else ","}\n"{key}": ['
        for position, row in enumerate(rows):
            yield f"{',' if position else ''}\n{encode(row)}"
        yield "\n]"
    yield f',\n"prompts": {encode(split.prompts)}\n}}\n'
