"""Readers of annotation formats other than COCO; each returns a `CocoSplit` for `write_splits`.

YOLO labels are one text file an image, one object a line, in fractions of the image's sides:

    class cx cy w h                      5 numbers: a box
    class x1 y1 x2 y2 x3 y3 ...          7 or more, an odd count: a polygon

and one number more is a confidence, which is dropped. A label file that is empty or absent is an
image without an object, a negative.
"""

import logging
import math
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from sam3_lora.coco import IMAGE_SUFFIXES, CocoSplit, DatasetError, image_size, mask_area

logger = logging.getLogger(__name__)

# Fractions may pass 0 and 1 by this much, rounding of the tools; they are clipped.
FRACTION_TOLERANCE = 0.01
BOX_NUMBERS = 5  # class cx cy w h
POLYGON_NUMBERS = 7  # class and three points


def read_yolo(yolo_dir: Path, split: str, class_names: list[str] | None = None) -> CocoSplit:
    """Reads one split of a YOLO data set, boxes and polygons.

    Args:
        yolo_dir: Holds `images/<split>` and `labels/<split>`, or `<split>/images` and
            `<split>/labels`, or `images` and `labels` for a set of one split; else its data.yaml
            says where the images are.
        split: `train`, `val` (found as `valid` too) or `test`.
        class_names: Name of class 0, 1, ...; None takes the names of data.yaml.

    Returns:
        Every image, with or without objects. A category's id is its class plus 1. A box has no
        segmentation; a polygon's box is that of its points.

    Raises:
        DatasetError: No images or labels, no names, names that differ from those of data.yaml, a
            line that is not a label. It names the file and the line.
    """
    yolo_dir = Path(yolo_dir)
    description_file, description = _read_data_yaml(yolo_dir)
    names = _class_names(description, description_file, class_names, yolo_dir)
    images_dir, labels_dir = _yolo_folders(yolo_dir, split, description)
    paths = [path for path in sorted(images_dir.rglob("*")) if _is_image(path)]
    label_files = {
        path: (labels_dir / path.relative_to(images_dir)).with_suffix(".txt") for path in paths
    }
    _check_labels(label_files, images_dir, labels_dir)
    images: list[dict[str, Any]] = []
    annotations: dict[int, list[dict[str, Any]]] = {}
    next_id = 1
    for number, (path, label_file) in enumerate(label_files.items(), start=1):
        width, height = image_size(path)
        file_name = path.relative_to(images_dir).as_posix()
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        objects = _read_labels(label_file, names, width, height) if label_file.is_file() else []
        annotations[number] = [{"id": next_id + i} | item for i, item in enumerate(objects)]
        next_id += len(objects)
    return CocoSplit(
        annotations_file=description_file or labels_dir,
        images_dir=images_dir,
        images=images,
        annotations=annotations,
        categories={class_index + 1: name for class_index, name in names.items()},
        prompts={},
    )


def _is_image(path: Path) -> bool:
    """Whether a path is an image file, macOS resource files (`._*`) not being any."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _read_data_yaml(yolo_dir: Path) -> tuple[Path | None, dict[str, Any]]:
    """The data set's description, `data.yaml` or the only YAML with names; (None, {}) without."""
    if not yolo_dir.is_dir():
        raise DatasetError(f"expected the YOLO folder {yolo_dir}, found none; check --yolo_dir")
    found = {}
    for path in sorted([*yolo_dir.glob("*.yaml"), *yolo_dir.glob("*.yml")]):
        if path.name.startswith("._"):
            continue
        try:
            # The user's file, not one of our configs, which only config.py reads.
            content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise DatasetError(f"expected YAML in {path}, found {reason}; correct it") from error
        if isinstance(content, dict) and "names" in content:
            found[path] = content
    chosen = [path for path in found if path.stem == "data"] or list(found)
    if len(chosen) > 1:
        listed = ", ".join(path.name for path in chosen)
        raise DatasetError(f"expected one data.yaml in {yolo_dir}, found {listed}; keep one")
    return (chosen[0], found[chosen[0]]) if chosen else (None, {})


def _class_names(
    description: dict[str, Any], file: Path | None, given: list[str] | None, yolo_dir: Path
) -> dict[int, str]:
    """Class index -> name, from data.yaml or --classes, which must agree where both exist."""
    wanted = dict(enumerate(given)) if given else {}
    if file is None:
        if not wanted:
            found = f"expected class names for {yolo_dir}, found no data.yaml with names"
            raise DatasetError(f'{found}; pass --classes "first,second"')
        return wanted
    names = description["names"]
    if not isinstance(names, (list, dict)) or not names:
        found = f"expected names in {file}, found {names!r}"
        raise DatasetError(f"{found}; write a list of class names")
    table = {}
    for key, name in (dict(enumerate(names)) if isinstance(names, list) else names).items():
        if not str(key).isdecimal() or isinstance(name, bool) or not str(name or "").strip():
            found = f"expected names in {file} as class: name, found {key!r}: {name!r}"
            raise DatasetError(f"{found}; write a list, or 0: name, with quotes round yes and no")
        table[int(key)] = str(name).strip()
    if wanted and wanted != table:
        found = f"found {list(wanted.values())} and {table}"
        raise DatasetError(
            f"expected --classes to agree with {file}, {found}; leave --classes out "
            "(--prompts changes what a class is prompted with)"
        )
    return table


def _yolo_folders(yolo_dir: Path, split: str, description: dict) -> tuple[Path, Path]:
    """The folders of a split's images and labels, in the layouts that `read_yolo` lists."""
    twins = {"val": ("val", "valid"), "valid": ("valid", "val")}.get(split, (split,))
    pairs = []
    for name in twins:
        pairs.append((yolo_dir / "images" / name, yolo_dir / "labels" / name))
        pairs.append((yolo_dir / name / "images", yolo_dir / name / "labels"))
    for name in twins:
        pairs.extend(_described_folders(yolo_dir, description.get(name), description.get("path")))
    flat = yolo_dir / "images"
    if flat.is_dir() and not any(child.is_dir() for child in flat.iterdir()):
        pairs.append((flat, yolo_dir / "labels"))
    for images_dir, labels_dir in pairs:
        if images_dir.is_dir() and any(_is_image(path) for path in images_dir.rglob("*")):
            return images_dir, labels_dir
    looked = ", ".join(
        dict.fromkeys(str(images_dir) for images_dir, _ in pairs if images_dir != flat)
    )
    looked += f", or {flat} without folders in it, with {yolo_dir / 'labels'}"
    found = f"expected images of split {split!r} in one of {looked}, found none"
    raise DatasetError(f"{found}; check --yolo_dir and --split")


def _described_folders(yolo_dir: Path, entry: Any, root: Any) -> list[tuple[Path, Path]]:
    """Where data.yaml's `train: ../train/images` may lie: such paths are often off by a folder."""
    if not isinstance(entry, str):
        return []
    parts = [part for part in PureWindowsPath(entry).parts if part not in (".", "..")]
    tails = [Path(*parts[start:]) for start in range(len(parts))]
    roots = [yolo_dir / root] if isinstance(root, str) else []
    pairs = []
    for images_dir in [Path(entry), *(base / t for base in [*roots, yolo_dir] for t in tails)]:
        # The labels are where the last `images` of the path reads `labels`.
        names = list(images_dir.parts)
        if "images" in names:
            names[len(names) - 1 - names[::-1].index("images")] = "labels"
            pairs.append((images_dir, Path(*names)))
    return pairs


def _check_labels(label_files: dict[Path, Path], images_dir: Path, labels_dir: Path) -> None:
    """Refuses a split none of whose images has a label file; reports labels without an image."""
    found = {path for path in labels_dir.rglob("*.txt") if not path.name.startswith(".")}
    if not any(path in found for path in label_files.values()):
        message = f"expected label files in {labels_dir}, one .txt an image of {images_dir}"
        raise DatasetError(f"{message}, found none for {len(label_files)} images; check --yolo_dir")
    orphans = sorted(found - set(label_files.values()) - {labels_dir / "classes.txt"})
    if orphans:
        listed = ", ".join(path.name for path in orphans[:5]) + ", ..." * (len(orphans) > 5)
        logger.warning("skipped %d label files without an image: %s", len(orphans), listed)


def _read_labels(file: Path, names: dict[int, str], width: int, height: int) -> list[dict]:
    """The objects of one label file, without ids."""
    objects = []
    for line_number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip():
            objects.append(_read_label(line, f"{file}:{line_number}", names, width, height))
    return objects


def _read_label(line: str, where: str, names: dict[int, str], width: int, height: int) -> dict:
    """The object of one line of a label file."""
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        numbers = []
    if len(numbers) < BOX_NUMBERS or not all(map(math.isfinite, numbers)):
        found = f"expected a label, class cx cy w h or class x1 y1 x2 y2 x3 y3, found {line[:60]!r}"
        raise DatasetError(f"{found} ({where}); correct the line")
    class_index, fractions = numbers[0], numbers[1:]
    if class_index not in names:
        found = f"expected a class of {sorted(names)}, found {class_index:g}"
        raise DatasetError(f"{found} ({where}); add its name to data.yaml or --classes")
    if len(numbers) >= POLYGON_NUMBERS - 1 and len(numbers) % 2 == 0:
        fractions = fractions[:-1]  # a confidence
    if min(fractions) < -FRACTION_TOLERANCE or max(fractions) > 1 + FRACTION_TOLERANCE:
        worst = max(fractions, key=lambda value: abs(value - 0.5))
        found = f"expected fractions of the image's sides, 0 to 1, found {worst:g}"
        raise DatasetError(f"{found} ({where}); divide pixels by the width or height")
    item = _object(fractions, width, height)
    if min(item["bbox"][2:]) <= 0:
        found = f"expected an object with width and height > 0, found {line[:60]!r}"
        raise DatasetError(f"{found} ({where}); remove the line")
    return {"category_id": int(class_index) + 1} | item


def _object(fractions: list[float], width: int, height: int) -> dict[str, Any]:
    """The geometry of a box (4 fractions) or a polygon, clipped to the image."""
    is_box = len(fractions) == BOX_NUMBERS - 1
    xs, ys = fractions[0::2], fractions[1::2]
    if is_box:
        cx, cy, w, h = fractions
        xs, ys = [cx - w / 2, cx + w / 2], [cy - h / 2, cy + h / 2]
    xs = [min(max(x, 0.0), 1.0) * width for x in xs]
    ys = [min(max(y, 0.0), 1.0) * height for y in ys]
    polygon = [[value for point in zip(xs, ys, strict=True) for value in point]]
    # A box of negative size must not come out turned over: its first corner is left as it is.
    left, top = (xs[0], ys[0]) if is_box else (min(xs), min(ys))
    right, bottom = (xs[1], ys[1]) if is_box else (max(xs), max(ys))
    bbox = [left, top, right - left, bottom - top]
    return {
        "bbox": bbox,
        "segmentation": None if is_box else polygon,
        "iscrowd": 0,
        "area": bbox[2] * bbox[3] if is_box else mask_area(polygon, height, width),
    }
