"""What can be wrong with a COCO file and its images; `coco.py` reads what passes these checks.

One generator of `Fault` per kind of record. Reading stops at a fault marked fatal; `validate`
lists them all. The readers of single fields live here too, so that what is checked is what is read.
"""

import difflib
import json
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
# Pixels a box may pass the image's edge: annotation tools round corners to whole pixels.
BOX_TOLERANCE = 1.0
# Pixels. pycocotools allocates in proportion to an edge's length: 1e9 would exhaust the memory.
COORDINATE_LIMIT = 1e5
FRACTION_SIDE = 2  # pixels; on a larger image, a box of numbers up to 1 is in fractions of it
# Characters of one number in a compressed RLE, 5 bits each: more cannot be a run of an image.
RLE_NUMBER_LENGTH = 8
# PIL's plugins raise these on broken files, SyntaxError and struct.error included.
IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
EXIF_SWAPS_SIDES = (5, 6, 7, 8)  # values of the EXIF tag Orientation that turn by 90 degrees


class DatasetError(ValueError):
    """Data that cannot be used: what was expected, what was found, what to do."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a split: an "error", or a "warning" that training survives.

    `kind` groups faults alike; `id` is such as "annotation 7"; `fatal` ones stop `read_coco`.
    """

    level: str
    kind: str
    message: str
    file: Path
    id: str | None
    remedy: str
    fatal: bool = False

    def __str__(self) -> str:
        where = f"{self.file}, {self.id}" if self.id else f"{self.file}"
        return f"{self.message} ({where}); {self.remedy}"


def find_faults(annotations_file: Path, images_dir: Path) -> list[Fault]:
    """Lists what is wrong with a COCO file and its images; decodes every image.

    Returns:
        Errors and warnings in the order found. No error means that `read_coco` succeeds, that
        every image can be read with the size the file gives, and that every object is inside it.
    """
    file, images_dir = Path(annotations_file), Path(images_dir)
    try:
        payload = load_json(file)
    except DatasetError as error:
        return [Fault("error", "file", str(error), file, None, "nothing else was checked", True)]
    return [*record_faults(payload, file), *_disk_faults(payload, images_dir, file)]


def progress(rows: Iterable, what: str, total: int | None = None) -> Iterable:
    """Returns the rows under a progress bar: none off a terminal, nor for less than a second."""
    off = not sys.stderr.isatty()
    return tqdm(rows, what, total, delay=1, leave=False, disable=off)


def check_prompts(prompts: Any, names: Iterable[str]) -> None:
    """Raises DatasetError unless `prompts` maps names of categories to phrases."""
    names = sorted(set(names))
    if not isinstance(prompts, Mapping):
        message = f'expected prompts {{"category": "phrase"}}, found {type(prompts).__name__}'
        raise DatasetError(f"{message}; write a JSON object")
    for name, phrase in prompts.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1) or names[:5]
            found = f"expected a category's name in prompts, found {name!r}"
            raise DatasetError(f"{found}; did you mean {' or '.join(map(repr, near))}?")
        if not isinstance(phrase, str) or not phrase.strip():
            raise DatasetError(f"expected a phrase for {name!r} in prompts, found {phrase!r}")


def record_faults(payload: dict[str, Any], file: Path) -> Iterator[Fault]:
    """Yields the faults of a loaded COCO file that show without opening an image."""
    if not payload["images"]:
        yield _fatal("no images", "expected at least one image, found 0", file, None, "add images")
    yield from _category_faults(payload, file)
    yield from _id_faults(payload["images"], "image", file)
    first_seen: dict[str, Any] = {}
    for row in payload["images"]:
        yield from _image_faults(row, file, first_seen)
    for key, count in Counter(id_key(row.get("id")) for row in payload["annotations"]).items():
        if key is not None and count > 1:
            message = f"expected unique annotation ids, found {key!r} {count} times"
            remedy = "number the annotations anew (prepare_data.py coco does)"
            yield Fault("error", "duplicate id", message, file, f"annotation {key}", remedy)
    image_at = positions_by_id(payload["images"])
    category_at = positions_by_id(kept_categories(payload))
    used_images, used_categories = set(), set()
    for row in progress(payload["annotations"], "annotations"):
        image = find_position(image_at, row.get("image_id"))
        category = find_position(category_at, row.get("category_id"))
        used_images.add(image)
        used_categories.add(category)
        where = file, f"annotation {row.get('id')}"
        for key, position in (("image_id", image), ("category_id", category)):
            if position is None:
                message = f"expected {key} to be an id in the file, found {row.get(key)!r}"
                yield _fatal(f"unknown {key}", message, *where, "add it or remove the annotation")
        if image is not None:
            yield from _annotation_faults(row, payload["images"][image], *where)
    yield from _fraction_faults(payload, image_at, file)
    yield from _unused(payload, file, used_images, used_categories)


def _unused(payload: dict, file: Path, images: set, categories: set) -> Iterator[Fault]:
    """Warnings: categories and images (by position) that no annotation names."""
    for position, row in enumerate(kept_categories(payload)):
        if position not in categories:
            message = f"category {row.get('name')!r} has no object"
            remedy = "it is trained as absent everywhere; remove it if it is not wanted"
            yield Fault(
                "warning", "unused category", message, file, f"category {row.get('id')}", remedy
            )
    empty = sum(position not in images for position in range(len(payload["images"])))
    if empty:
        message = f"{empty} of {len(payload['images'])} images have no object"
        yield Fault("warning", "empty images", message, file, None, "they are kept as negatives")


def _fatal(kind: str, message: str, file: Path, row_id: str | None, remedy: str) -> Fault:
    """An error that reading cannot survive."""
    return Fault("error", kind, message, file, row_id, remedy, fatal=True)


def _id_faults(rows: list[dict], what: str, file: Path) -> Iterator[Fault]:
    """Missing and repeated ids of images or categories."""
    seen = Counter(id_key(row.get("id")) for row in rows)
    for key, count in seen.items():
        if key is None:
            message = f"expected every {what} to have an id, a number or a text, found {count} not"
            yield _fatal("missing key", message, file, None, f"number each {what}")
        elif count > 1:
            message = f"expected unique {what} ids, found {key!r} {count} times"
            yield _fatal("duplicate id", message, file, f"{what} {key}", f"number each {what}")


def _category_faults(payload: dict, file: Path) -> Iterator[Fault]:
    """Faults of the category table and of the prompts that go with it."""
    if not payload["categories"]:
        message = "expected at least one category, found none"
        yield _fatal("no category", message, file, None, 'fill "categories" with id and name')
    yield from _id_faults(payload["categories"], "category", file)
    prompts = payload.get("prompts") or {}
    try:
        names = [str(row.get("name")) for row in payload["categories"]]
        check_prompts(prompts, names)
    except DatasetError as error:
        prompts = {}
        yield _fatal("prompts", str(error), file, None, 'correct "prompts" in the file')
    first_named: dict[str, str] = {}
    for row in kept_categories(payload):
        name, where = row.get("name"), (file, f"category {row.get('id')}")
        if not isinstance(name, str) or not name.strip():
            message = f"expected a category name, found {name!r}"
            yield _fatal("missing key", message, *where, "name it: the name is the prompt")
            continue
        phrase = phrase_of(name, prompts).lower()  # the tokenizer lower-cases
        if phrase in first_named:
            found = f"found {phrase!r} for {first_named[phrase]!r} and for {name!r}"
            message = f"expected a prompt of its own for each category, {found}"
            remedy = "one text would be there and not there in an image: merge the categories, or "
            remedy += "tell them apart by name or with `prepare_data.py coco --prompts`"
            yield Fault("error", "same prompt", message, *where, remedy)
        first_named.setdefault(phrase, name)


def _image_faults(row: dict, file: Path, first_seen: dict[str, Any]) -> Iterator[Fault]:
    """Faults of one image row."""
    where = file, f"image {row.get('id')}"
    name = clean_name(row.get("file_name"))
    if name is None:
        message = f"expected a file_name inside the images folder, found {row.get('file_name')!r}"
        yield _fatal("file_name", message, *where, "make it relative to the images folder")
    elif name in first_seen:
        message = f"expected one image a file, found {name!r} also as image {first_seen[name]}"
        yield Fault("error", "duplicate file", message, *where, "merge their annotations")
    else:
        first_seen[name] = row.get("id")
    for key in ("width", "height"):
        if not _finite(row.get(key)) or not 1 <= row[key] <= COORDINATE_LIMIT:
            limit = f"1 to {COORDINATE_LIMIT:.0f}"
            message = f"expected {key} in pixels, {limit}, found {row.get(key)!r}"
            yield _fatal("missing key", message, *where, f"write the image's {key}")


def _annotation_faults(row: dict, image: dict, file: Path, row_id: str) -> Iterator[Fault]:
    """Faults of one annotation, with its image's row."""
    bbox, segmentation = row.get("bbox"), segmentation_of(row)
    if bbox is not None or segmentation is None:
        yield from _box_faults(bbox, image, file, row_id)
    if row.get("area") is not None and not _finite(row["area"]):
        message = f"expected a finite area, found {row['area']!r}"
        yield _fatal("not a number", message, file, row_id, "remove the key: it is then computed")
    if row.get("iscrowd") not in (0, 1, None):
        message = f"expected iscrowd to be 0 or 1, found {row['iscrowd']!r}"
        yield _fatal("iscrowd", message, file, row_id, "write 0 for a single object")
    sides = image.get("height"), image.get("width")
    if segmentation is not None and all(map(_finite, sides)):
        problem = mask_problem(segmentation, int(sides[0]), int(sides[1]))
        if problem:
            kind = "polygon" if isinstance(segmentation, list) else "RLE"
            remedy = 'draw it again, or set "segmentation" to [] to use the box alone'
            yield _fatal(kind, problem, file, row_id, remedy)


def _box_faults(bbox: Any, image: dict, file: Path, row_id: str) -> Iterator[Fault]:
    """Faults of one box, with its image's row."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_finite, bbox)):
        message = f"expected bbox [x, y, width, height] of finite numbers, found {bbox!r}"
        yield _fatal("bbox", message, file, row_id, "write the box or remove the annotation")
        return
    x, y, width, height = bbox
    if width <= 0 or height <= 0:
        message = f"expected a box with width and height > 0, found {bbox}"
        yield Fault("error", "empty box", message, file, row_id, "remove the annotation")
    sides = image.get("width"), image.get("height")
    if not all(map(_finite, sides)):
        return
    beyond = max(-x, -y, x + width - sides[0], y + height - sides[1])
    apart = x >= sides[0] or y >= sides[1] or x + width <= 0 or y + height <= 0
    if beyond > BOX_TOLERANCE or (apart and min(width, height) > 0):
        message = (
            f"expected a box inside the {sides[0]} x {sides[1]} image, found {bbox}, "
            f"{beyond:g} px beyond its edge"
        )
        remedy = "clip it, and check that its units are pixels and its form x, y, width, height"
        yield Fault("error", "box outside", message, file, row_id, remedy)


def _fraction_faults(payload: dict, image_at: dict, file: Path) -> Iterator[Fault]:
    """One fault for all boxes that look normalised, as those of YOLO are."""
    suspects = []
    for row in payload["annotations"]:
        bbox, position = row.get("bbox"), find_position(image_at, row.get("image_id"))
        if position is None or not isinstance(bbox, list) or len(bbox) != 4:
            continue
        sides = [payload["images"][position].get(key) for key in ("width", "height")]
        if not all(map(_finite, [*bbox, *sides])) or min(sides) <= FRACTION_SIDE:
            continue
        if max(map(abs, bbox)) <= 1 and min(bbox[2:]) > 0:
            suspects.append(row)
    if suspects:
        first = f"the first is {suspects[0]['bbox']} of annotation {suspects[0].get('id')}"
        message = "looks like fractions of the image; COCO boxes are pixels: "
        message += f"{len(suspects)} of {len(payload['annotations'])} boxes, {first}"
        remedy = "multiply x and width by the image's width, y and height by its height"
        yield Fault("error", "box in fractions", message, file, None, remedy)


def _disk_faults(payload: dict, images_dir: Path, file: Path) -> Iterator[Fault]:
    """Faults that show in the images folder: absent files, other sizes, junk."""
    if not images_dir.is_dir():
        message = f"expected the images folder {images_dir}, found none"
        yield Fault("error", "no images folder", message, file, None, "check the path")
        return
    names = [(row, clean_name(row.get("file_name"))) for row in payload["images"]]
    rows = [(row, images_dir / name) for row, name in names if name is not None]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda pair: list(_file_faults(*pair)), rows)
        for faults in progress(found, "images", len(rows)):
            yield from faults
    listed = {path for _, path in rows}
    unlisted = 0
    for path in sorted(images_dir.rglob("*")):
        if path.name.startswith("._"):
            message = "expected images only, found a macOS resource file"
            yield Fault("error", "junk file", message, path, None, "delete the ._* files")
        elif path.suffix.lower() in IMAGE_SUFFIXES and path not in listed:
            unlisted += 1
    if unlisted:
        message = f"{unlisted} image files in {images_dir} are not in the annotation file"
        yield Fault("warning", "unlisted images", message, file, None, "they are not used")


def _file_faults(row: dict, path: Path) -> Iterator[Fault]:
    """Faults of one image's file: absent, unreadable, cut short, of another size."""
    where = path, f"image {row.get('id')}"
    if not path.is_file():
        message = "expected an image file, found none"
        yield Fault("error", "missing image", message, *where, "add it or remove its row")
        return
    try:
        found = image_size(path)
    except DatasetError as error:
        yield Fault("error", "unreadable image", str(error), *where, "remove its row")
        return
    try:
        with Image.open(path) as image:
            image.load()
    except IMAGE_ERRORS as error:
        reason = "truncated" if "truncated" in str(error) else error
        remedy = "replace the file or remove its row"
        yield Fault("error", "unreadable image", f"cannot be read: {reason}", *where, remedy)
        return
    wanted = row.get("width"), row.get("height")
    if found != wanted:
        sizes = [f"{width} x {height}" for width, height in (wanted, found)]
        message = f"expected {sizes[0]} pixels as annotated, found {sizes[1]}"
        remedy = "annotate the file that is on disk"
        if found == wanted[::-1]:
            remedy += "; if it is rotated by its EXIF tag, annotate it as shown"
        yield Fault("error", "image size", message, *where, remedy)


def _finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold; JSON allows NaN and any whole number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def load_json(file: Path) -> dict[str, Any]:
    """Returns a COCO file's content, of which only the outline is checked.

    Raises:
        DatasetError: No such file, broken JSON, or not lists of images, annotations, categories.
    """
    try:
        payload = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"expected a COCO file at {file}, found {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        message = f"expected JSON in {file}, found {error}; export the annotations again"
        raise DatasetError(message) from error
    for key in ("images", "annotations", "categories"):
        rows = payload.get(key) if isinstance(payload, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            found = sorted(payload)[:8] if isinstance(payload, dict) else type(payload).__name__
            raise DatasetError(
                f'expected a list of objects under "{key}" in {file}, found {found}; '
                "export the annotations as COCO (object detection or instances)"
            )
    return payload


def segmentation_of(row: Mapping[str, Any]) -> Any:
    """Returns an annotation's polygons without empty parts, or its RLE; None for a box alone."""
    value = row.get("segmentation")
    if isinstance(value, list) and value and not any(isinstance(v, (list, dict)) for v in value):
        return [value]
    if isinstance(value, list):
        value = [part for part in value if part != []]
    return None if value in (None, [], {}) else value


def id_key(raw: Any) -> int | str | None:
    """Returns an id as it is compared: 1.0 is 1; None for all but whole numbers and text."""
    if isinstance(raw, float) and raw.is_integer():
        return int(raw)
    return raw if isinstance(raw, (int, str)) and not isinstance(raw, bool) else None


def positions_by_id(rows: list[dict]) -> dict[Any, int]:
    """Returns id -> position in `rows`; also as text, for annotations that write 1 as "1"."""
    table: dict[Any, int] = {}
    for position, row in enumerate(rows):
        table.setdefault(id_key(row.get("id")), position)
    for position, row in enumerate(rows):
        table.setdefault(("text", str(id_key(row.get("id")))), position)
    return table


def find_position(positions: dict[Any, int], raw: Any) -> int | None:
    """Returns the position of an id, or None."""
    key = id_key(raw)
    return None if key is None else positions.get(key, positions.get(("text", str(key))))


def kept_categories(payload: dict) -> list[dict]:
    """Returns the category rows but for an unused one with id 0, the root of a Roboflow export."""
    used = {str(id_key(row.get("category_id"))) for row in payload["annotations"]}
    rows = payload["categories"]
    return [row for row in rows if str(id_key(row.get("id"))) != "0" or "0" in used] or rows


def phrase_of(name: str, prompts: Mapping[str, str]) -> str:
    """Returns a category's prompt: its entry in `prompts`, or its name with _ and - as spaces."""
    phrase = prompts.get(name) or name.replace("_", " ").replace("-", " ")
    return " ".join(phrase.split())


def clean_name(raw: Any) -> str | None:
    """Returns a file name with forward slashes, or None unless it stays inside its folder."""
    if not isinstance(raw, str) or "\0" in raw or re.match(r"[A-Za-z]:", raw):
        return None
    name = PurePosixPath(raw.replace("\\", "/"))
    return None if not name.name or name.is_absolute() or ".." in name.parts else str(name)


def image_size(path: Path) -> tuple[int, int]:
    """Returns (width, height) in pixels as shown, after EXIF rotation; reads the header only.

    Raises:
        DatasetError: Not an image that PIL reads.
    """
    try:
        with Image.open(path) as image:
            # The base class's getexif: that of PNG would decode the whole image first.
            turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
            return image.size[::-1] if turn in EXIF_SWAPS_SIDES else image.size
    except IMAGE_ERRORS as error:
        message = f"expected an image that PIL reads, found {path} ({error})"
        raise DatasetError(f"{message}; replace the file") from error


def mask_problem(segmentation: Any, height: int, width: int) -> str | None:
    """Returns what makes polygons or an RLE unusable on an image of this size, or None.

    Beyond good messages this guards pycocotools, which reads 4 numbers as a box, and outside
    its memory where an RLE's runs do not add up to height * width.
    """
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, height, width)
    if not isinstance(segmentation, list):
        return f"expected polygons or an RLE, found {type(segmentation).__name__}"
    for part in segmentation:
        if not isinstance(part, list) or not set(map(type, part)) <= {int, float}:
            return f"expected polygons as lists of numbers, found {str(part)[:60]}"
        if len(part) < 6 or len(part) % 2:
            return f"expected polygons of x, y pairs, 3 points or more, found {len(part)} numbers"
        beyond = [value for value in part if not abs(value) <= COORDINATE_LIMIT]  # NaN included
        if beyond:
            return f"expected finite coordinates in pixels, found {str(beyond[0])[:20]}"
    return None


def _rle_problem(rle: dict, height: int, width: int) -> str | None:
    """What makes an RLE unusable."""
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        return f"expected an RLE of the image's size [{height}, {width}], found {size}"
    runs = _runs(counts)
    if runs is None:
        return f"expected RLE counts, whole numbers from 0 or COCO text, found {str(counts)[:40]}"
    if sum(runs) != height * width:
        return f"expected RLE runs that sum to {height} x {width}, found {sum(runs)}"
    return None


def _runs(counts: Any) -> list[int] | None:
    """The runs of an RLE, or None where they are none. Source: rleFrString in cocoapi maskApi.c."""
    if isinstance(counts, list):
        fine = all(isinstance(run, int) and not isinstance(run, bool) for run in counts)
        return counts if fine and min(counts, default=0) >= 0 else None
    if isinstance(counts, str) and counts.isascii():
        counts = counts.encode("ascii")
    if not isinstance(counts, bytes):
        return None
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 0x20 == 0)
    if digits.size == 0 or digits.min() < 0 or digits.max() > 63 or ends.size == 0:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if ends[-1] != digits.size - 1 or lengths.max() > RLE_NUMBER_LENGTH:
        return None
    place = np.arange(digits.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 0x1F) << (5 * place), starts)
    runs -= np.where(digits[ends] & 0x10, np.int64(1) << (5 * lengths), 0)
    # From the fourth on, a number is the difference to the run two before.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist() if runs.min() >= 0 else None
