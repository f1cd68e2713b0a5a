"""From the objects that a reader of annotations finds to the records of a `CocoSplit`.

A reader yields an `Item` for each image; an object is a class, its parts, and where it stands in
the file, for messages. A part is ("box" or "polygon", its points) or ("mask", (left, top, array)),
in pixels of the image. The object is the union of its parts, clipped to the image; a box alone has
no segmentation. A shape that encloses nothing has no parts, and its kind stands for the class.
"""

import base64
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from PIL import Image

from sam3_lora.coco import CocoSplit, decode_mask, encode_mask, mask_area
from sam3_lora.faults import clean_name
from sam3_lora.geometry import COORDINATE_LIMIT, POINT_LIMIT, is_flat, mask_box
from sam3_lora.images import (
    IMAGE_ERRORS,
    IMAGE_SUFFIXES,
    UNSAFE,
    DatasetError,
    image_size,
    listed,
    refuse_bomb,
)
from sam3_lora.layout import parse_json

logger = logging.getLogger(__name__)

RING_POINTS = 72  # of the polygon of an ellipse: 99.9 % of its area
TEXT_BYTES = XML_BYTES = 2**24  # of the annotations of one image
JSON_BYTES = 2**29  # a VIA file is a whole data set, LabelMe's hold an image
REDRAW = "draw it again or remove it"

Part = tuple[str, Any]
Found = tuple[str, list[Part], str]
# Annotation file, path of the image or None where it is absent, its name, its size if told.
Item = tuple[Path, Path | None, str, tuple[int, int] | None, list[Found]]
# Image path -> its size and its objects, records without an id.
Records = dict[Path, tuple[tuple[int, int], list[dict[str, Any]]]]


def problem(where: Path | str, expected: str, found: str, remedy: str) -> DatasetError:
    """Returns the error of what is wrong at a place."""
    return DatasetError(f"expected {expected}, found {found} ({where}); {remedy}")


def check_class(label: str, class_names: Collection[str], where: str) -> None:
    """Raises DatasetError unless an object's class is one of `--classes`."""
    if label not in class_names:
        expected = f"a class of {', '.join(class_names)}"
        raise problem(where, expected, repr(label), "add it to --classes or remove the object")


def assemble(
    source: Path,
    images_dir: Path,
    items: Iterable[Item],
    class_names: list[str] | None,
    expected: Iterable[Path] = (),
) -> CocoSplit:
    """Returns the split of what a reader finds.

    Args:
        source: Of the annotations, for messages.
        images_dir: Holds the images.
        items: In any order.
        class_names: The categories in order; None takes those of the objects, sorted.
        expected: Images that should be among the items.

    Returns:
        Images by path, their size that of the file. Absent images are skipped and counted in a
        warning; others count those whose annotation tells another size, and those not annotated.

    Raises:
        DatasetError: No image, an image annotated twice, an object of another class, no class.
    """
    records: Records = {}
    missing: list[tuple[str, int]] = []
    other_size, kinds = [], Counter()
    for file, path, name, told, found in items:
        objects = [item for item in found if item[1]]
        kinds.update(kind for kind, parts, _ in found if not parts)
        if path is None:
            missing.append((name, len(objects)))
            continue
        if path in records:
            raise problem(file, f"one annotation of {path}", "two", "keep one")
        size = image_size(path)
        if told and told != size:
            other_size.append(f"{name} is {size[0]} x {size[1]}, not {told[0]} x {told[1]}")
        records[path] = size, [_record(*item, size, class_names) for item in objects]
    report_missing(source, images_dir, len(records), missing)
    _warn("%d images differ in size from their annotation, check their objects: %s", other_size)
    bare = [str(path) for path in expected if path not in records]
    _warn("left out %d images without an annotation, which may hold objects: %s", bare)
    skipped = [f"{count} {kind}" for kind, count in sorted(kinds.items())]
    _warn("skipped shapes of %d kinds, which enclose nothing: %s", skipped)
    categories = _number_categories(source, records, class_names)
    return split_of(source, images_dir, records, categories)


def _number_categories(
    source: Path, records: Records, class_names: list[str] | None
) -> dict[int, str]:
    """Replaces the category's name of each record by its id; returns the categories."""
    objects = [item for _, row in records.values() for item in row]
    names = class_names or sorted({item["category_id"] for item in objects})
    if not names:
        raise problem(source, "objects", "none", "name the categories with --classes")
    ids = {name: number for number, name in enumerate(names, start=1)}
    for item in objects:
        item["category_id"] = ids[item["category_id"]]
    return {number: name for name, number in ids.items()}


def _record(
    label: str,
    parts: list[Part],
    where: str,
    size: tuple[int, int],
    class_names: list[str] | None,
) -> dict[str, Any]:
    """The record of an object, its category by name."""
    if class_names:
        check_class(label, class_names, where)
    return {"category_id": label} | geometry(parts, *size, where)


def _warn(message: str, names: list[str]) -> None:
    """Warns with the count of some names and the first of them, if there are any."""
    if names:
        logger.warning(message, len(names), listed(names))


def report_missing(
    source: Path, images_dir: Path, present: int, missing: list[tuple[str, int]]
) -> None:
    """Warns of absent images, (name, number of objects); refuses a source of which all are.

    Raises:
        DatasetError: None is present.
    """
    names = [name for name, _ in missing]
    if not present:
        found = f"none of {len(missing)}: {listed(names)}"
        wanted = {PurePosixPath(name).name for name in names}
        near = next((path for path in images_in(images_dir) if path.name in wanted), None)
        remedy = "put them there; check the path"
        if near:
            remedy = f"{near.name} is in {near.parent}: name that folder"
        raise problem(source, f"images in {images_dir}", found, remedy)
    if missing:
        message = "skipped %d of %d images, which are not in %s, and their %d objects: %s"
        objects, total = sum(count for _, count in missing), len(missing) + present
        logger.warning(message, len(missing), total, images_dir, objects, listed(names))


def split_of(
    source: Path, images_dir: Path, records: Records, categories: dict[int, str]
) -> CocoSplit:
    """Returns the split of records, images in the order of their paths, with ids from 1.

    Raises:
        DatasetError: A name that `read_coco` would refuse or read as another.
    """
    for name in filter(UNSAFE.search, categories.values()):
        raise problem(source, "class names of printable text", ascii(name), "rename the class")
    images: list[dict[str, Any]] = []
    annotations: dict[int, list[dict[str, Any]]] = {}
    next_id = 1
    for number, path in enumerate(sorted(records), start=1):
        (width, height), objects = records[path]
        file_name = path.relative_to(images_dir).as_posix()
        if clean_name(file_name) != file_name:
            found = ascii(file_name)
            raise problem(images_dir, "file names of printable text", found, "rename the file")
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        annotations[number] = [{"id": next_id + i} | item for i, item in enumerate(objects)]
        next_id += len(objects)
    return CocoSplit(source, images_dir, images, annotations, categories, prompts={})


def geometry(parts: list[Part], width: int, height: int, where: str) -> dict[str, Any]:
    """Returns the COCO fields of an object, clipped to its image.

    Args:
        parts: See the module.
        width: Of the image, pixels.
        height: Of the image, pixels.
        where: The object, for messages.

    Returns:
        `bbox`, `segmentation` (None for boxes, an RLE if a part is a mask, else polygons),
        `iscrowd` 0 and `area`.

    Raises:
        DatasetError: A part without area, an object outside the image.
    """
    polygons = []
    mask = np.zeros((height, width), bool) if any(kind == "mask" for kind, _ in parts) else None
    for kind, value in parts:
        if kind == "mask":
            left, top, crop = value
            window = mask[top : top + crop.shape[0], left : left + crop.shape[1]]
            window |= crop[: window.shape[0], : window.shape[1]]
            continue
        low, high = ([pick(p[axis] for p in value) for axis in (0, 1)] for pick in (min, max))
        if low[0] >= high[0] or low[1] >= high[1]:
            found = f"{low[0]:g}, {low[1]:g} to {high[0]:g}, {high[1]:g}"
            raise problem(where, "an object with width and height > 0", found, "remove it")
        polygons.append([float(v) for point in _clip(value, width, height) for v in point])
    polygons = [polygon for polygon in polygons if len(polygon) >= 6 and not is_flat(polygon)]
    segmentation: Any = polygons
    xs, ys = ([v for polygon in polygons for v in polygon[axis::2]] for axis in (0, 1))
    if mask is not None:
        mask |= decode_mask(polygons, height, width) if polygons else False
        segmentation = encode_mask(mask)
        edges = mask_box(segmentation, height, width) or []
        xs, ys = edges[0::2], edges[1::2]
    if not xs:
        remedy = "remove it, or annotate the image that is on disk"
        raise problem(where, f"an area inside the {width} x {height} image", "none", remedy)
    bbox = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    area = bbox[2] * bbox[3]
    if mask is not None:
        area = float(mask.sum())
    elif all(kind == "box" for kind, _ in parts):
        segmentation = None
    else:
        area = mask_area(polygons, height, width)
    return {"bbox": bbox, "segmentation": segmentation, "iscrowd": 0, "area": area}


def _clip(points: list, width: int, height: int) -> list:
    """A polygon's points, cut at one edge of the image after the other."""
    for axis, edge, sign in ((0, 0.0, 1), (0, width, -1), (1, 0.0, 1), (1, height, -1)):
        kept = []
        for a, b in zip(points[-1:] + points[:-1], points, strict=True):
            a_in, b_in = sign * (a[axis] - edge) >= 0, sign * (b[axis] - edge) >= 0
            if a_in != b_in:
                share = (edge - a[axis]) / (b[axis] - a[axis])
                cut = [a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])]
                cut[axis] = edge
                kept.append(cut)
            if b_in:
                kept.append(b)
        points = kept
    return points


def box(left: float, top: float, right: float, bottom: float) -> Part:
    """Returns the part of a box, by its corners in pixels."""
    return "box", [(left, top), (right, top), (right, bottom), (left, bottom)]


def mask(text: Any, left: int, top: int, right: int, bottom: int, where: str) -> Part:
    """Returns the part of a mask, a PNG in base64, by its corner pixels, which belong to it.

    Raises:
        DatasetError: Not such an image, or of another size.
    """
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
        refuse_bomb(image)
        fits = min(left, top) >= 0 and image.size == (right - left + 1, bottom - top + 1)
        pixels = np.asarray(image.convert("L")) > 0 if fits else None
    except (*IMAGE_ERRORS, TypeError) as error:
        raise problem(where, "a mask, a PNG in base64", str(error), REDRAW) from error
    if pixels is None:
        expected = f"a mask that fills {left}, {top} to {right}, {bottom}"
        raise problem(where, expected, "{} x {}".format(*image.size), REDRAW)
    return "mask", (left, top, pixels)


def polygon(points: list[tuple[float, float]], where: str) -> Part:
    """Returns the part of a polygon; raises DatasetError for fewer than 3 points, or too many."""
    if not 3 <= len(points) <= POINT_LIMIT:
        expected = f"a polygon of 3 to {POINT_LIMIT} points"
        raise problem(where, expected, str(len(points)), REDRAW)
    return "polygon", points


def ellipse(x: float, y: float, rx: float, ry: float, turn: float, where: str) -> Part:
    """Returns the part of an ellipse turned by radians; raises DatasetError for a radius <= 0."""
    if min(rx, ry) <= 0:
        raise problem(where, "a radius > 0", f"{min(rx, ry):g}", REDRAW)
    cos, sin = math.cos(turn), math.sin(turn)
    points = []
    for step in range(RING_POINTS):
        angle = 2 * math.pi * step / RING_POINTS
        u, v = rx * math.cos(angle), ry * math.sin(angle)
        points.append((x + u * cos - v * sin, y + u * sin + v * cos))
    return "polygon", points


def labelme_part(kind: Any, shape: dict[str, Any], where: str) -> Part:
    """Returns the part of a LabelMe shape; raises DatasetError for what is none."""
    raw = shape.get("points")
    if not isinstance(raw, list) or not all(isinstance(p, list) and len(p) == 2 for p in raw):
        raise problem(where, "points as [[x, y], ...]", str(raw)[:40], REDRAW)
    points = [(coordinate(x, "x", where), coordinate(y, "y", where)) for x, y in raw]
    if kind == "polygon":
        return polygon(points, where)
    if kind not in ("rectangle", "circle", "mask"):
        raise problem(where, "a polygon, rectangle, circle or mask", repr(kind), REDRAW)
    if len(points) != 2 and not (kind == "rectangle" and len(points) == 4):
        raise problem(where, f"a {kind} of 2 points", str(len(points)), REDRAW)
    (x, y), (x2, y2) = points[:2]
    if kind == "circle":
        radius = math.hypot(x2 - x, y2 - y)
        return ellipse(x, y, radius, radius, 0.0, where)
    if kind == "mask":
        return mask(shape.get("mask"), *map(round, (x, y, x2, y2)), where)
    xs, ys = zip(*points, strict=True)
    return box(min(xs), min(ys), max(xs), max(ys))


def via_parts(shape: dict[str, Any], where: str) -> list[Part]:
    """Returns the part of a VIA shape, none where it encloses nothing; raises DatasetError."""

    def numbers(*names: str) -> list[float]:
        return [coordinate(shape.get(name), name, where) for name in names]

    kind = shape.get("name")
    if kind == "point":
        return []
    if kind == "rect":
        x, y, width, height = numbers("x", "y", "width", "height")
        if min(width, height) <= 0:
            found = f"{width:g} x {height:g}"
            raise problem(where, "a rect with width and height > 0", found, REDRAW)
        return [box(x, y, x + width, y + height)]
    if kind == "circle":
        x, y, radius = numbers("cx", "cy", "r")
        return [ellipse(x, y, radius, radius, 0.0, where)]
    if kind == "ellipse":
        turn = coordinate(shape.get("theta", 0), "theta", where)
        return [ellipse(*numbers("cx", "cy", "rx", "ry"), turn, where)]
    if kind not in ("polygon", "polyline"):
        expected = "a rect, circle, ellipse, polygon, polyline or point"
        raise problem(where, expected, repr(kind), REDRAW)
    xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
    if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
        raise problem(where, "all_points_x and all_points_y of one length", "others", REDRAW)
    points = [
        (coordinate(x, "x", where), coordinate(y, "y", where)) for x, y in zip(xs, ys, strict=True)
    ]
    if kind == "polyline" and (len(points) < 4 or points[0] != points[-1]):
        return []
    return [polygon(points, where)]


def coordinate(value: Any, name: str, where: str) -> float:
    """Returns a number of pixels; raises DatasetError for none, text, NaN, what no image has."""
    remedy = "correct it or remove the object"
    if value is None:
        raise problem(where, name, "none", remedy)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= COORDINATE_LIMIT:
        found = repr(str(value)[:40])
        expected = f"{name} as a number, {COORDINATE_LIMIT:g} pixels at most"
        raise problem(where, expected, found, remedy)
    return number


def class_name(value: Any, where: str) -> str:
    """Returns the name of an object's class; raises DatasetError for none."""
    name = "" if value is None or isinstance(value, (bool, dict, list)) else str(value).strip()
    if not name:
        raise problem(where, "the name of a class", repr(value), "name the object or remove it")
    return name


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Returns the files of a folder and its sub-folders that end so, sorted.

    What is hidden is not: resource files of macOS (`._*`), copies in `.ipynb_checkpoints`.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes]
    return [path for path in paths if "/." not in f"/{path.relative_to(folder).as_posix()}"]


def images_in(folder: Path) -> list[Path]:
    """Returns the images of a folder, those of its sub-folders too, sorted."""
    return files_in(folder, IMAGE_SUFFIXES)


def by_stem(images: list[Path]) -> dict[Path, list[Path]]:
    """Returns images by their path without the suffix."""
    table: dict[Path, list[Path]] = {}
    for path in images:
        table.setdefault(path.with_suffix(""), []).append(path)
    return table


def image_of(by_stem: dict[Path, list[Path]], folder: Path, name: str, file: Path) -> Path | None:
    """Returns the image that an annotation file names, else the one with the file's own stem.

    Raises:
        DatasetError: Several images have the stem.
    """
    path = folder / name
    if path.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(path):  # else raises if too long
        return path
    paths = by_stem.get(folder / file.stem, [])
    if len(paths) > 1:
        found = listed([path.name for path in paths])
        raise problem(file, "one image", found, "keep one or name it in the annotation")
    return paths[0] if paths else None


def annotation_files(folder: Path, suffix: str, flag: str) -> list[Path]:
    """Returns the annotation files in a folder, sorted; raises DatasetError without any."""
    if not folder.is_dir():
        raise DatasetError(f"expected the folder {folder}, found none; check {flag}")
    files = files_in(folder, {suffix})
    if not files:
        raise DatasetError(f"expected {suffix} files in {folder}, found none; check {flag}")
    return files


def _read(file: Path, limit: int) -> bytes:
    """A file's bytes, unless it is too large to be one of annotations."""
    try:
        if file.exists() and not file.is_file():  # a pipe or a device may have no end
            raise problem(file, "a file of annotations", "something else", "move it away")
        size = file.stat().st_size
        if size > limit:
            expected = f"annotations of {limit >> 20} MB or less"
            raise problem(file, expected, f"{size >> 20} MB", "split the file")
        return file.read_bytes()
    except OSError as error:
        raise problem(file, "annotations", str(error.strerror), "check the path") from error


def read_text(file: Path) -> str:
    """Returns a text file's content; raises DatasetError for one absent, huge or not in UTF-8."""
    try:
        return _read(file, TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise problem(file, "text in UTF-8", str(error), "save it in that encoding") from error


def read_json(file: Path) -> Any:
    """Returns the content of a JSON file; raises DatasetError for one absent, broken or huge."""
    content = _read(file, JSON_BYTES)
    try:
        return parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise problem(file, "JSON", str(error), "export it again") from error


def read_xml(file: Path) -> ElementTree.Element:
    """Returns the root of an XML file.

    Raises:
        DatasetError: Broken, huge, or with a DOCTYPE, whose entities can grow without end.
    """

    def refuse(*_: Any) -> None:
        raise problem(file, "XML without a DOCTYPE", "one", "remove it, entities are not read")

    content = _read(file, XML_BYTES)
    guard = expat.ParserCreate()
    guard.StartDoctypeDeclHandler = refuse
    try:
        guard.Parse(content, True)
        return ElementTree.fromstring(content)
    except DatasetError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise problem(file, "XML", str(error), "export it again") from error
