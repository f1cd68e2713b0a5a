"""Mends a split, into a copy: what can be put right without a guess.

What would be a guess is left as it is, for `validate` to name: boxes in fractions, prompts that two
categories share, a size of which only one of image and annotations can be right. A photo of two
splits is dropped from `train` alone, so that what an evaluation counts stays what it was.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_lora.coco import DatasetError, read_coco, write_splits
from sam3_lora.faults import (
    SHARED,
    Fault,
    clean_name,
    find_position,
    id_key,
    kept_categories,
    positions_by_id,
)
from sam3_lora.geometry import (
    BOX_TOLERANCE,
    annotation_problems,
    is_box,
    is_finite,
    is_flat,
    mask_box,
    segmentation_of,
)
from sam3_lora.images import image_size, listed
from sam3_lora.layout import load_json

UNUSABLE = ("missing image", "unreadable image", "link outside")  # kinds of faults


def mend_split(
    annotations_file: Path,
    images_dir: Path,
    faults: Sequence[Fault],
    output_dir: Path,
    split: str,
) -> tuple[Path, dict[str, int]]:
    """Writes a mended copy of a split; the split itself is only read.

    Args:
        annotations_file: COCO.
        images_dir: Where its images are.
        faults: Of the split, as `find_faults` lists them.
        output_dir: The data folder of the copy.
        split: `train`, `val` or `test`.

    Returns:
        The folder written, and what was done: words -> how often.

    Raises:
        DatasetError: The copy could not be read, for a fault that cannot be mended, or the folder
            holds files; nothing is written.
    """
    payload, done = load_json(annotations_file), Counter()
    image_at = positions_by_id(payload["images"])
    homes = _mend_images(payload, images_dir, faults, split == "train", done)
    _mend_annotations(payload, image_at, homes, done)
    _mend_sizes(payload, images_dir, faults, done)
    payload["annotations"] = [row for row in payload["annotations"] if _mend_shape(row, done)]
    for row in payload["annotations"]:
        del row["image"]
    done["junk files left out"] = sum(fault.kind == "junk file" for fault in faults)
    try:
        mended = read_coco(annotations_file, images_dir, payload)
    except DatasetError as error:
        raise DatasetError(f"cannot be mended, nothing was written: {error}") from error
    (folder,) = write_splits(output_dir, {split: mended})
    return folder, {words: count for words, count in done.items() if count}


def _mend_images(
    payload: dict[str, Any],
    images_dir: Path,
    faults: Sequence[Fault],
    is_train: bool,
    done: Counter,
) -> list[dict | None]:
    """Drops unusable images and those of another split, merges rows of one file; returns each old
    row's new one, or None."""
    unusable = {fault.file for fault in faults if fault.kind in UNUSABLE}
    shared = {fault.file: None for fault in faults if fault.kind == SHARED}
    kept: dict[str, dict] = {}
    homes: list[dict | None] = []
    for row in payload["images"]:
        name = clean_name(row.get("file_name"))
        if name is None or images_dir / name in unusable:
            done["images dropped: missing, unreadable or outside the folder"] += 1
            homes.append(None)
            continue
        if is_train and images_dir / name in shared:
            homes.append(None)
            continue
        done["image rows merged with that of the same file"] += name in kept
        homes.append(kept.setdefault(name, row))
    payload["images"] = list(kept.values())
    what = "dropped that val or test has too" if is_train else "kept that another split has too"
    names = [path.relative_to(images_dir).as_posix() for path in shared]
    done[f"images {what}: {listed(names)}"] = len(names)
    if is_train and shared and not kept:
        found = f"expected images that val or test lacks, found none of {len(homes)}"
        remedy = "divide one of the splits with `prepare_data.py split`"
        raise DatasetError(f"cannot be mended, nothing was written: {found}; {remedy}")
    return homes


def _mend_annotations(
    payload: dict[str, Any], image_at: dict, homes: list[dict | None], done: Counter
) -> None:
    """Drops annotations of no image or category; gives each its image's row, as `image`."""
    category_at = positions_by_id(kept_categories(payload))
    kept = []
    for row in payload["annotations"]:
        position = find_position(image_at, row.get("image_id"))
        if position is None:
            done["objects dropped: unknown image_id"] += 1
        elif homes[position] is None:
            done["objects dropped with their image"] += 1
        elif find_position(category_at, row.get("category_id")) is None:
            done["objects dropped: unknown category_id"] += 1
        else:
            kept.append(row | {"image": homes[position], "image_id": homes[position].get("id")})
    keys = [id_key(row.get("id")) for row in kept]
    if None in keys or len(set(keys)) < len(keys):
        done["objects numbered anew"] = len(kept)
        kept = [row | {"id": number} for number, row in enumerate(kept, start=1)]
    payload["annotations"] = kept


def _mend_sizes(
    payload: dict[str, Any], images_dir: Path, faults: Sequence[Fault], done: Counter
) -> None:
    """Sets the size of images to that of their files, where all their objects lie inside."""
    wrong = {fault.file for fault in faults if fault.kind == "image size"}
    objects: dict[int, list[dict]] = {}
    for row in payload["annotations"] if wrong else ():
        objects.setdefault(id(row["image"]), []).append(row)
    for image in payload["images"]:
        path = images_dir / clean_name(image["file_name"])
        if path not in wrong:
            continue
        size = image_size(path)
        # Of a photo that EXIF turns, objects that fit may still be turned.
        turned = size[::-1] == (image.get("width"), image.get("height"))
        if not turned and all(_fits(row, *size) for row in objects.get(id(image), ())):
            image["width"], image["height"] = size
            done["image sizes taken from the file"] += 1


def _fits(row: dict, width: int, height: int) -> bool:
    """Whether an annotation lies inside an image of this size."""
    image = {"width": width, "height": height}
    if {"box outside", "RLE"} & {kind for _, kind, _, _ in annotation_problems(row, image)}:
        return False
    parts = segmentation_of(row)
    limits = width + BOX_TOLERANCE, height + BOX_TOLERANCE
    return not isinstance(parts, list) or all(
        max(part[axis::2]) <= limits[axis]
        for part in parts
        if isinstance(part, list) and set(map(type, part)) <= {int, float} and len(part) > 1
        for axis in (0, 1)
    )


def _mend_shape(row: dict, done: Counter) -> bool:
    """Mends an annotation's mask, box and area, in place; whether there is anything left of it."""
    image = row["image"]
    if not all(is_finite(image.get(key)) and image[key] >= 1 for key in ("width", "height")):
        return True  # reading will name the image
    kinds = {kind for _, kind, _, _ in annotation_problems(row, image, thorough=True)}
    if kinds & {"polygon", "RLE"}:
        if not is_box(row.get("bbox")):
            done["objects dropped: no usable mask or box"] += 1
            return False
        row["segmentation"] = []
        done["masks dropped that cannot be read, their box kept"] += 1
    if "flat polygon" in kinds:
        row["segmentation"] = [part for part in segmentation_of(row) if not is_flat(part)]
        done["masks without their parts of no area"] += 1
    if kinds & {"polygon", "RLE", "flat polygon", "not a number"}:
        row.pop("area", None)
        done["areas computed anew"] += 1
    if "empty mask" in kinds:
        done["objects dropped: a mask of no area"] += 1
        return False
    if not kinds & {"bbox", "empty box", "box outside", "box off mask"}:
        return True
    segmentation = segmentation_of(row)
    if segmentation is not None and kinds & {"bbox", "empty box", "box off mask"}:
        x1, y1, x2, y2 = mask_box(segmentation, int(image["height"]), int(image["width"]))
        done["boxes taken from the mask"] += 1
    else:
        x, y, width, height = row["bbox"] if is_box(row.get("bbox")) else (0, 0, 0, 0)
        x1, y1 = max(0, x), max(0, y)
        x2, y2 = min(image["width"], x + width), min(image["height"], y + height)
        if x2 <= x1 or y2 <= y1:
            done["objects dropped: a box of no area inside the image"] += 1
            return False
        done["boxes clipped to the image"] += 1
    row["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    row.pop("area", None)  # without a mask it was that of the box before
    return True
