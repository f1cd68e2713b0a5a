"""Reads masks that are image files, beside the photos they belong to, into COCO records.

    kind      a mask file holds                        an object is            classes
    index     a class a value; 0 is none, 255 void     a connected part        names, {"7": "road"}
    colour    a class a colour; black is none          a connected part        {"road": "#804080"}
    instance  an object a value or colour; 0 is none   a value                 one name
    object    one object; 0 is none                    a file                  names

A mask belongs to the photo as it is shown, after its EXIF rotation, and has its size. A pattern
says what its path is, for `{stem}.jpg` in the same sub-folder: `{stem}`, or such as
`{stem}_mask.png`, or that of both, `img{stem}:mask{stem}`. Of kind `object`, names begin so and end
with a number or a class: `{stem}_0.png`, `{stem}_car_0.png`, `{stem}/car_0.png`.
"""

import difflib
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from scipy import ndimage

from sam3_lora.coco import CocoSplit, DatasetError, encode_mask
from sam3_lora.images import IMAGE_SUFFIXES, image_size, listed, open_image
from sam3_lora.shapes import images_in, split_of

logger = logging.getLogger(__name__)

KINDS = ("index", "colour", "instance", "object")
SPECK = 4  # pixels; a connected part of fewer is most often the slip of a brush or of a resize
# Share of `instance` objects in parts that do not touch, above which their values are taken for
# classes: 38 of 46 in masks of street scenes, none of 190 in label maps of nuclei.
SCATTERED = 0.5
EIGHT_NEIGHBOURS = np.ones((3, 3))
VOID = 255  # of index masks, as in Pascal VOC and Cityscapes
WORKERS = min(8, os.cpu_count() or 1)  # each takes 0.4 GB for a mask of 12 megapixels
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP")
COLOUR_MODES = ("RGB", "RGBA")
SMALL_MODES = ("1", "L", "P", "LA", "PA")  # PIL's modes of up to 8 bits a value
LARGE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
MAX_OBJECTS = 10_000  # in a label map; more is a photo taken for one
VALUES_LISTED = 12


def read_masks(
    images_dir: Path,
    masks_dir: Path,
    classes: list[str] | dict[str, Any] | None = None,
    kind: str | None = None,
    *,
    whole: bool = False,
    min_pixels: int = 1,
    pattern: str = "{stem}",
    void: Sequence[str] | None = None,
) -> CocoSplit:
    """Reads images and their masks; sub-folders are kept.

    Args:
        images_dir: Holds the photos. One without a mask is left out, with a warning.
        masks_dir: Holds the masks, PNG, TIFF or BMP.
        classes: See above. Names alone are of the values 1, 2, ... of kind `index`, or from 0 if
            the first is "background", which is no class. A colour may be `[r, g, b]`.
        kind: One of `KINDS`; None where `classes` leave no doubt.
        whole: Whether all pixels of a class are one object (`index`, `colour`).
        min_pixels: Connected parts of fewer are left out, with a warning (`index`, `colour`).
        pattern: See above.
        void: Values or `#rrggbb` without a class; None is 255 for `index`, none for the others.

    Returns:
        Objects as compressed RLE, by value (`object`: by file name), parts from the top down.

    Raises:
        DatasetError: Nothing pairs, or something in two ways; a mask of another size, or whose
            pixels are no values; values without a name; no object at all.
    """
    images_dir, masks_dir, kind = Path(images_dir), Path(masks_dir), kind or _guessed_kind(classes)
    _check_parts(kind, whole, min_pixels)
    table, categories, ignored = _classes(classes, void, kind)
    names = list(categories.values()) if kind == "object" else None
    pairs = _pairs(images_dir, masks_dir, pattern, names)
    records, rest = {}, Counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        least = 0 if whole else min_pixels
        read = partial(_read_photo, images_dir, kind, table, ignored, least)
        results = zip(pairs, pool.map(read, pairs.items()), strict=True)
        for file_name, (size, objects, left) in results:
            records[images_dir / file_name] = size, objects
            rest += left
    total = sum(len(objects) for _, objects in records.values())
    _report(rest, total, masks_dir, kind, ignored)
    return split_of(masks_dir, images_dir, records, categories)


def _read_photo(
    images_dir: Path,
    kind: str,
    table: dict[int, int],
    ignored: set[int],
    least: int,
    pair: tuple[str, list[tuple[Path, int]]],
) -> tuple[tuple[int, int], list[dict], Counter]:
    """The size of a photo, its objects without ids, and what `_report` tells of its masks."""
    photo, objects, rest = images_dir / pair[0], [], Counter()
    size = image_size(photo)
    for path, category_id in pair[1]:
        values = _read_values(path, kind, size, photo)
        if kind in ("index", "colour"):
            objects += _class_parts(values, table, ignored, least, rest)
        else:
            objects += _value_objects(values, category_id, ignored, path, kind, rest)
    return size, objects, rest


def _guessed_kind(classes: list[str] | dict[str, Any] | None) -> str:
    """The kind that the classes alone settle."""
    if isinstance(classes, dict):
        words = [word for entry in classes.items() for word in entry]
        colours = any(isinstance(word, list) or str(word).startswith("#") for word in words)
        return "colour" if colours else "index"
    if classes and len(classes) > 1:
        return "index"
    found = "no classes" if not classes else f"one class, {classes[0]!r}, which fits each of them"
    raise DatasetError(
        f"expected --kind index (a value a class), colour (a colour a class), instance (a value "
        f"an object) or object (a file an object), found none and {found}; pass --kind"
    )


def _check_parts(kind: str, whole: bool, min_pixels: int) -> None:
    """Refuses flags of connected parts where there are none, and a size that no part has."""
    if min_pixels < 1:
        found = f"expected --min_pixels of 1 or more, found {min_pixels}"
        raise DatasetError(f"{found}; --whole makes all pixels of a class one object")
    for flag, given in (("--whole", whole), ("--min_pixels", min_pixels > 1)):
        if given and kind not in ("index", "colour"):
            found = f"expected {flag} with --kind index or colour, found it with {kind}"
            raise DatasetError(f"{found}; leave it out")
    if whole and min_pixels > 1:
        raise DatasetError("expected --whole or --min_pixels, found both; leave one out")


def _classes(
    classes: list[str] | dict[str, Any] | None, void: Sequence[str] | None, kind: str
) -> tuple[dict[int, int], dict[int, str], set[int]]:
    """Value -> category id; category id -> name; the values that are no class."""
    if void is None:
        void = [str(VOID)] if kind == "index" else []
    ignored = {_value(text) for text in void}
    if None in ignored:
        found = f"expected --void as values or colours, found {','.join(void)!r}"
        raise DatasetError(f'{found}; write --void "255" or --void "#e0e0c0"')
    if kind in ("instance", "object"):
        if not isinstance(classes, list) or (kind == "instance" and len(classes) != 1):
            count = "one name" if kind == "instance" else "names"
            found = f"expected --classes as {count} for --kind {kind}, found {classes!r}"
            raise DatasetError(f'{found}; write --classes "cell"')
        return {}, dict(enumerate(classes, start=1)), ignored
    named = _named_values(classes, kind)
    background = {value for value, name in named.items() if _is_background(name)}
    named = {value: name for value, name in named.items() if value not in background}
    ids = {name: number for number, name in enumerate(dict.fromkeys(named.values()), start=1)}
    categories = {number: name for name, number in ids.items()}
    table = {value: ids[name] for value, name in named.items()}
    return table, categories, (ignored | background) - set(named)


def _named_values(classes: list[str] | dict[str, Any] | None, kind: str) -> dict[int, str]:
    """Value, or colour as a number, -> name."""
    if isinstance(classes, list):
        if kind == "colour":
            found = f"expected a colour for each class, found the names {listed(classes)}"
            raise DatasetError(f'{found}; write --classes \'{{"{classes[0]}": "#ff0000"}}\'')
        return dict(enumerate(classes, start=0 if _is_background(classes[0]) else 1))
    named: dict[int, str] = {}
    for key, entry in (classes or {}).items():
        # Either way round: tables of both kinds are about.
        name, value = (key, _value(entry)) if _value(key) is None else (entry, _value(key))
        if value is None or not isinstance(name, str) or not name.strip():
            form = '{"road": "#804080"}' if kind == "colour" else '{"7": "road"}'
            found = f"expected --classes as {form} for --kind {kind}, found {key!r}: {entry!r}"
            raise DatasetError(f"{found}; correct it")
        if value in named:
            found = f"expected a value of its own for each class, found {_shown(value, kind)}"
            raise DatasetError(f"{found} for {named[value]!r} and {name!r}; correct --classes")
        named[value] = name.strip()
    return named


def _is_background(name: str) -> bool:
    """Whether a name stands for no class; lists of classes often begin so, for value 0."""
    return name.strip("_ ").lower() == "background"


def _value(raw: Any) -> int | None:
    """The number of 7, "7", "#rrggbb" or [r, g, b] (0xrrggbb); None for anything else."""
    bytes_only = isinstance(raw, list) and all(type(c) is int and 0 <= c <= 255 for c in raw)
    if bytes_only and len(raw) == 3:
        return raw[0] << 16 | raw[1] << 8 | raw[2]
    found = re.fullmatch(r"(\d{1,10})|#([0-9a-fA-F]{6})", str(raw))
    return found and (int(found[1]) if found[1] else int(found[2], 16))


def _shown(value: int, kind: str) -> str:
    """A value as `--classes` and `--void` write it."""
    return f"#{value:06x}" if kind == "colour" else str(value)


def _files(folder: Path, flag: str) -> list[str]:
    """The image files in a folder and its sub-folders, sorted."""
    if not folder.is_dir():
        raise DatasetError(f"expected a folder at {flag} {folder}, found none; check the path")
    found = [path.relative_to(folder).as_posix() for path in images_in(folder)]
    if not found:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise DatasetError(f"expected files {kinds} in {folder}, found none; check {flag}")
    return found


def _rule(text: str) -> tuple[re.Pattern, str]:
    """A pattern as an expression for paths without their suffix, and the suffix if it has one."""
    suffix = PurePosixPath(text).suffix.lower()
    suffix = suffix if suffix in IMAGE_SUFFIXES else ""
    first, *more = map(re.escape, text[: len(text) - len(suffix)].split("{stem}"))
    if not more:
        found = f"expected --pattern with {{stem}} in each path, found {text!r}"
        raise DatasetError(f'{found}; write --pattern "{{stem}}_mask.png"')
    return re.compile(f"(?P<folder>.*/)?{first}(?P<stem>[^/]+){'(?P=stem)'.join(more)}"), suffix


def _keys(name: str, rule: tuple[re.Pattern, str], open_end: bool) -> list[tuple[tuple, str]]:
    """The (folder, stem) that a file may belong to, shortest first, and how its name goes on."""
    body = str(PurePosixPath(name).with_suffix(""))
    if rule[1] and PurePosixPath(name).suffix.lower() != rule[1]:
        return []
    ends = [found.start() for found in re.finditer("[_/-]", body)] if open_end else []
    matches = [(rule[0].fullmatch(body, 0, end), body[end:]) for end in [*ends, len(body)]]
    return [(found.group("folder", "stem"), added) for found, added in matches if found]


def _pairs(
    images_dir: Path, masks_dir: Path, pattern: str, names: list[str] | None
) -> dict[str, list[tuple[Path, int]]]:
    """Photo -> its mask files and their category ids; `names` are of kind `object` only."""
    image_text, _, mask_text = pattern.rpartition(":")
    rule, files = _rule(mask_text), _files(masks_dir, "--masks_dir")
    keys = {name: _keys(name, rule, open_end=names is not None) for name in files}
    if images_dir.resolve() == masks_dir.resolve():  # what is no mask is a photo
        keys = {name: found for name, found in keys.items() if found}
    photos = _files(images_dir, "--images_dir")
    masks = {(masks_dir / name).resolve() for name in keys}
    photos = [photo for photo in photos if (images_dir / photo).resolve() not in masks]
    photo_of = _photos_by_key(photos, _rule(image_text or "{stem}"), images_dir)
    pairs: dict[str, list[tuple[Path, int]]] = {}
    orphans = []
    for name, found in keys.items():
        owners = [(photo_of[key], added) for key, added in found if key in photo_of]
        if not owners:
            orphans.append(name)
            continue
        photo, category_id = _owner(name, owners, names) if names else (owners[0][0], 1)
        if not names and photo in pairs:
            found = f"expected one mask for {photo}, found {pairs[photo][0][0].name} and {name}"
            raise DatasetError(f'{found}; name one, as with --pattern "{{stem}}.png"')
        pairs.setdefault(photo, []).append((masks_dir / name, category_id))
    if not pairs:
        raise DatasetError(_no_pair(photos, files, images_dir, masks_dir, pattern))
    bare = [photo for photo in photos if photo not in pairs]
    for what, left in (("images without a mask", bare), ("masks without an image", orphans)):
        if left:
            logger.warning("skipped %d %s: %s", len(left), what, listed(left))
    return {photo: pairs[photo] for photo in photos if photo in pairs}


def _photos_by_key(photos: list[str], rule: tuple, images_dir: Path) -> dict[tuple, str]:
    """(folder, stem) -> photo, of those that the pattern names."""
    remedy = 'tell them apart with --pattern "{stem}.jpg:{stem}.png"'
    if not photos:
        found = f"expected photos in {images_dir}, found that each file is taken for a mask"
        raise DatasetError(f"{found}; {remedy}")
    photo_of: dict[tuple, str] = {}
    for photo in photos:
        for key, _ in _keys(photo, rule, open_end=False):
            if key in photo_of:
                found = f"expected one image for a mask, found {photo_of[key]} and {photo}"
                raise DatasetError(f"{found} in {images_dir}; keep one, or {remedy}")
            photo_of[key] = photo
    return photo_of


def _owner(name: str, owners: list[tuple[str, str]], names: list[str]) -> tuple[str, int]:
    """The photo and the category id of the file of one object."""
    words = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    form = re.compile(rf"\d*|(?:\d+[_-])?(?P<name>{words})(?:[_-]?\d+)?")
    read = [(photo, added, form.fullmatch(added[1:].replace("/", "_"))) for photo, added in owners]
    fitting = [entry for entry in read if entry[2]]
    if len(fitting) > 1:
        found = f"found {name} for {' and for '.join(photo for photo, *_ in fitting)}"
        raise DatasetError(f"expected each mask to be of one image, {found}; use a folder an image")
    photo, added, found = (fitting or read)[-1]
    if found and found["name"]:
        return photo, names.index(found["name"]) + 1
    # In a folder of its image, and with one class, a file may have any name.
    if len(names) > 1 or not (found or added.startswith("/")):
        wanted = "a class" if len(names) > 1 else "a number or the class"
        found = f"expected {wanted} of {', '.join(names)} after {photo}'s name, found {name}"
        raise DatasetError(f"{found}; rename the file or correct --classes")
    return photo, 1


def _no_pair(photos: list, files: list, images_dir: Path, masks_dir: Path, pattern: str) -> str:
    """The message where no mask has an image: the nearest names, and the pattern they suggest."""
    stem = PurePosixPath(photos[0]).stem
    others = [name for name in files[:1000] if name != photos[0]] or files
    near = difflib.get_close_matches(stem, others, n=1, cutoff=0)[0]
    guess = near.replace(stem, "{stem}", 1) if stem in near else "img{stem}:mask{stem}"
    return (
        f"expected masks in {masks_dir} named after the images in {images_dir} by --pattern "
        f"{pattern!r}, found none for {len(photos)} images and {len(files)} masks, such as "
        f'{photos[0]} and {near}; pass --pattern, such as "{guess}", or --kind object '
        "for files of one object"
    )


def _read_values(path: Path, kind: str, size: tuple[int, int], photo: Path) -> np.ndarray:
    """The value of each pixel (height, width), whole numbers; a colour is 0xrrggbb."""
    with open_image(path, "a mask") as image:
        pages, mode, lossy = getattr(image, "n_frames", 1), image.mode, image.format
        if kind == "colour" and mode in SMALL_MODES:
            image = image.convert("RGBA")  # straight to RGB, PIL warns of transparency
        pixels = np.asarray(image)
    if pages > 1:
        found = f"expected a mask of one page, found {pages} in {path}"
        remedy = "save each slice of a 3-D stack and of its image as a file, or move both away"
        raise DatasetError(f"{found}; {remedy}")
    if lossy in LOSSY_FORMATS:
        found = f"expected masks as PNG or TIFF, found {path}, whose {lossy} compression"
        raise DatasetError(f"{found} changes values; export the masks as PNG")
    grey = SMALL_MODES if kind == "colour" else SMALL_MODES + LARGE_MODES
    if mode not in grey + COLOUR_MODES:
        found = f"expected a mask of whole numbers or colours, found PIL mode {mode} in {path}"
        raise DatasetError(f"{found}; save 8-bit or, for --kind instance, 16-bit PNG")
    if pixels.shape[:2] != size[::-1]:
        wanted, found = (f"{width}x{height}" for width, height in (size, pixels.shape[1::-1]))
        hint = "export it at the image's size"
        if pixels.shape[:2] == size:
            hint = "turn it as the image is shown, after its EXIF rotation"
        raise DatasetError(
            f"expected a mask of {wanted} as {photo}, found {found} in {path}; {hint}"
        )
    return _as_values(pixels, kind, path)


def _as_values(pixels: np.ndarray, kind: str, path: Path) -> np.ndarray:
    """Pixels of one channel, with alpha, or of colours, as one number each."""
    if pixels.ndim == 3 and pixels.shape[2] > 2:
        red, green, blue = np.moveaxis(pixels[..., :3].astype(np.int32), 2, 0)
        if kind != "index":
            return red << 16 | green << 8 | blue
        if (red != green).any() or (red != blue).any():
            found = f"expected one value a pixel for --kind index, found colours in {path}"
            raise DatasetError(f'{found}; pass --kind colour and --classes {{"name": "#rrggbb"}}')
        return red  # grey that was saved as a colour image
    values = pixels[..., 0] if pixels.ndim == 3 else pixels
    if values.min() < 0:
        found = f"expected values from 0, found {values.min()} in {path}"
        raise DatasetError(f"{found}; write 0 where there is no object")
    return values


def _class_parts(
    values: np.ndarray, table: dict[int, int], ignored: set[int], least: int, rest: Counter
) -> list[dict]:
    """The objects of a mask of classes, whole classes for `least` 0; counts the rest in `rest`."""
    objects = []
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        if int(value) in table:
            pixels = values == value
            labels = pixels.astype(np.int32)
            if least:
                labels = ndimage.label(pixels, EIGHT_NEIGHBOURS)[0]
            sizes = np.bincount(labels.ravel())
            kept = sizes >= least
            rest["left out"] += int((~kept[1:]).sum())
            rest["specks"] += int((sizes[1:] < SPECK).sum()) if least else 0
            objects += _records(labels, kept & (np.arange(kept.size) > 0), table[int(value)])
        elif value != 0 and int(value) not in ignored:
            rest[int(value)] += int(count)
    return objects


def _value_objects(
    values: np.ndarray, category_id: int, ignored: set[int], path: Path, kind: str, rest: Counter
) -> list[dict]:
    """The objects of a mask of which each value, or (`object`) the only one, is an object."""
    found, labels = np.unique(values, return_inverse=True)
    kept = ~np.isin(found, [0, *ignored])
    limit = 1 if kind == "object" else MAX_OBJECTS
    if kept.sum() > limit:
        wanted = "0 and one other value" if kind == "object" else f"up to {limit} values"
        remedy = "pass --kind instance if each value is an object"
        if kind == "instance":
            remedy = "check that --masks_dir holds label maps, not photos"
        raise DatasetError(f"expected {wanted} in a mask, found {kept.sum()} in {path}; {remedy}")
    labels = labels.reshape(values.shape)
    if kind == "instance":
        boxes = ndimage.find_objects(labels + 1)
        rest["scattered"] += sum(
            ndimage.label(labels[boxes[label]] == label, EIGHT_NEIGHBOURS)[1] > 1
            for label in np.flatnonzero(kept)
        )
    return _records(labels, kept, category_id)


def _records(labels: np.ndarray, kept: np.ndarray, category_id: int) -> list[dict]:
    """The objects of a label map (height, width) as records without ids; `kept` by label."""
    labels = (np.cumsum(kept) * kept).astype(np.int32)[labels]
    canvas = np.zeros(labels.shape, np.uint8, order="F")  # one for all objects
    records = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        canvas[box] = labels[box] == number
        y, x = box
        sides = [x.start, y.start, x.stop - x.start, y.stop - y.start]
        records.append(
            {
                "category_id": category_id,
                "bbox": [float(side) for side in sides],
                "segmentation": encode_mask(canvas),
                "iscrowd": 0,
                "area": float(canvas[box].sum()),
            }
        )
        canvas[box] = 0
    return records


def _report(rest: Counter, total: int, masks_dir: Path, kind: str, ignored: set[int]) -> None:
    """Raises where values have no name, or where there is no object; warns of small parts, and of
    objects that look like classes."""
    left_out, specks, scattered = (rest.pop(key, 0) for key in ("left out", "specks", "scattered"))
    if rest:
        values = [f"{_shown(v, kind)} ({rest[v]} pixels)" for v in sorted(rest)[:VALUES_LISTED]]
        more = ", ..." if len(rest) > VALUES_LISTED else ""
        first = _shown(min(rest), kind)
        example = f'{{"name": "{first}"}}' if kind == "colour" else f'{{"{first}": "name"}}'
        void = ",".join(_shown(v, kind) for v in sorted(ignored | {min(rest)}))
        raise DatasetError(
            f"expected a name for each value in {masks_dir}, found none for {len(rest)}: "
            f"{', '.join(values)}{more}; name them, --classes '{example}', or leave them out, "
            f'--void "{void}"; if each value is an object, pass --kind instance'
        )
    if scattered > SCATTERED * total:
        message = "%d of %d objects lie in parts that do not touch; if a value is a class, "
        logger.warning(message + "pass --kind index", scattered, total)
    if left_out:
        logger.warning("left out %d parts of classes, under --min_pixels", left_out)
    elif specks:
        message = "%d parts of classes have under %d pixels; --min_pixels %d leaves such out"
        logger.warning(message, specks, SPECK, SPECK)
    if not total:
        void = "".join(f", {_shown(v, kind)} (void)" for v in sorted(ignored))
        found = f"expected objects in {masks_dir}, found only 0{void}"
        remedy = "check --masks_dir"
        if VOID in ignored:
            remedy += f', or name {VOID} if it is the class, --classes \'{{"{VOID}": "name"}}\''
        raise DatasetError(f"{found}; {remedy}")
