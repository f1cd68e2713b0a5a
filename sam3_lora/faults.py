"""What can be wrong with a COCO file and its images; `coco.py` reads what passes these checks.

One generator of `Fault` per kind of record. Reading stops at a fault marked fatal; `validate`
lists them all. The readers of single fields live here too, so that what is checked is what is read.
"""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from sam3_lora import processes
from sam3_lora.geometry import (
    COORDINATE_LIMIT,
    PIXEL_LIMIT,
    annotation_problems,
    in_fractions,
    is_finite,
    shown,
)
from sam3_lora.images import IMAGE_ERRORS, IMAGE_SUFFIXES, UNSAFE, DatasetError, image_size
from sam3_lora.layout import find_split, load_json

QUERY_LIMIT = 200  # objects that the model finds of one prompt in an image
TOKEN_LIMIT = 32  # of a prompt, its start and end included; Meta's text encoder cuts the rest
ID_WANTED = "a whole number under 2^63 or a printable text"
IMBALANCE = 10  # objects of the largest category for one of the smallest; above, a warning
ID_LIMIT = 2**63  # ids are kept as 64-bit integers
SHARED = "photo in two splits"  # a kind of faults
NAME_BYTES = 255  # of a file or folder; more cannot be on a disk


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a split: an "error", or a "warning" that training survives.

    `kind` groups faults alike; `id` is such as "annotation 7", `image` the file name of its photo
    where `file` is not the photo itself; `fatal` ones stop `read_coco`.
    """

    level: str
    kind: str
    message: str
    file: Path
    id: str | None
    remedy: str
    fatal: bool = False
    image: str | None = None

    def __str__(self) -> str:
        where = ", ".join(str(part) for part in (self.file, self.image, self.id) if part)
        return f"{self.message} ({where}); {self.remedy}"


def _least_tokens(phrase: str) -> int:
    """A lower bound of a prompt's length in CLIP's tokens: its words, digits, signs and 2 ends."""
    return 2 + len(re.findall(r"[^\W\d_]+|\d|[^\w\s]+|_+", phrase))


def find_faults(
    annotations_file: Path,
    images_dir: Path,
    count_tokens: Callable[[str], int] | None = None,
) -> list[Fault]:
    """Lists what is wrong with a COCO file and its images; decodes every image.

    Args:
        annotations_file: COCO.
        images_dir: Where its images are.
        count_tokens: The length of a prompt in tokens, start and end included; None estimates it.

    Returns:
        Errors and warnings in the order found. No error means that `read_coco` succeeds, that
        every image can be read with the size the file gives, and that every object is inside it.
    """
    file, images_dir = Path(annotations_file), Path(images_dir)
    try:
        payload = load_json(file)
    except DatasetError as error:
        return [Fault("error", "file", str(error), file, None, "nothing else was checked", True)]
    return [
        *record_faults(payload, file, thorough=True),
        *set_faults(payload, file, count_tokens),
        *_disk_faults(payload, images_dir, file),
        *_copy_faults(payload, images_dir, file.parent),
    ]


def refuse_fatal(faults: Iterable[Fault]) -> None:
    """Raises DatasetError for the first fault that reading cannot survive, if there is one."""
    if fatal := [fault for fault in faults if fault.fatal]:
        more = f" ({len(fatal) - 1} more: prepare_data.py validate lists them)"
        raise DatasetError(f"{fatal[0]}{more if len(fatal) > 1 else ''}")


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
        text = " ".join(phrase.split()) if isinstance(phrase, str) else ""
        if not text or UNSAFE.search(text):
            found = f"expected a phrase for {name!r} in prompts, found {shown(phrase)}"
            raise DatasetError(f"{found}; write printable words")


def record_faults(payload: dict[str, Any], file: Path, thorough: bool = False) -> Iterator[Fault]:
    """Yields the faults of a loaded COCO file that show without opening an image.

    `thorough` looks at the shapes of masks too, which takes longer and yields no fatal fault.
    """
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
    used_images, used_categories, suspects = set(), set(), []
    for row in processes.progress(payload["annotations"], "annotations"):
        image = find_position(image_at, row.get("image_id"))
        category = find_position(category_at, row.get("category_id"))
        used_images.add(image)
        used_categories.add(category)
        where = file, f"annotation {_id_text(row)}"
        name = None if image is None else clean_name(payload["images"][image].get("file_name"))
        if row.get("id") is not None and id_key(row["id"]) is None:
            message = f"expected an annotation id, {ID_WANTED}, found {shown(row['id'])}"
            yield _fatal("bad id", message, *where, "remove the key: it is then numbered", name)
        for key, position in (("image_id", image), ("category_id", category)):
            if position is None:
                message = f"expected {key} to be an id in the file, found {shown(row.get(key))}"
                remedy = "add it or remove the annotation"
                yield _fatal(f"unknown {key}", message, *where, remedy, name)
        if image is not None:
            annotated = row, payload["images"][image]
            suspects.extend([(row, name)] if in_fractions(*annotated) else [])
            for level, kind, message, remedy in annotation_problems(*annotated, thorough):
                fatal = level == "fatal"
                level = "error" if fatal else level
                yield Fault(level, kind, message, *where, remedy, fatal, name)
    if suspects:
        row, name = suspects[0]
        first = f"the first is {row['bbox']} of annotation {_id_text(row)}"
        message = "looks like fractions of the image; COCO boxes are pixels: "
        message += f"{len(suspects)} of {len(payload['annotations'])} boxes, {first}"
        remedy = "multiply x and width by the image's width, y and height by its height"
        yield Fault("error", "box in fractions", message, file, None, remedy, image=name)
    yield from _unused(payload, file, used_images, used_categories)


def _unused(payload: dict, file: Path, images: set, categories: set) -> Iterator[Fault]:
    """Warnings: categories and images (by position) that no annotation names."""
    for position, row in enumerate(kept_categories(payload)):
        if position not in categories:
            message = f"category {row.get('name')!r} has no object"
            remedy = "it is trained as absent everywhere; remove it if it is not wanted"
            where = file, f"category {row.get('id')}"
            yield Fault("warning", "unused category", message, *where, remedy)
    if empty := sum(position not in images for position in range(len(payload["images"]))):
        message = f"{empty} of {len(payload['images'])} images have no object"
        yield Fault("warning", "empty images", message, file, None, "they are kept as negatives")


def set_faults(
    payload: dict[str, Any], file: Path, count_tokens: Callable[[str], int] | None = None
) -> Iterator[Fault]:
    """Yields warnings about a loaded COCO file as a whole; see `find_faults`."""
    yield from _count_faults(payload, file)
    yield from _prompt_faults(payload, file, count_tokens or _least_tokens)
    names = {clean_name(row.get("file_name")) for row in payload["images"]} - {None}
    for name, count in Counter(name.casefold() for name in names).items():
        if count > 1:
            message = f"{count} file names differ in capitals only, such as {shown(name)}"
            remedy = "they are one file on Windows and macOS: rename all but one"
            yield Fault("warning", "names alike", message, file, None, remedy)


def _count_faults(payload: dict, file: Path) -> Iterator[Fault]:
    """Warnings about numbers of objects: crowded images, categories out of balance."""
    rows, images = kept_categories(payload), payload["images"]
    image_at, category_at = positions_by_id(images), positions_by_id(rows)
    pairs: Counter = Counter()
    for row in payload["annotations"]:
        image = find_position(image_at, row.get("image_id"))
        pairs[image, find_position(category_at, row.get("category_id"))] += 1
    objects: Counter = Counter()
    for (image, category), count in pairs.items():
        if image is None or category is None:
            continue
        objects[category] += count
        if count > QUERY_LIMIT:
            message = f"{count} objects of {shown(rows[category].get('name'))}, "
            message += f"the model finds at most {QUERY_LIMIT} of one prompt in an image"
            where, remedy = f"image {_id_text(images[image])}", "train with --over_queries tile"
            name = clean_name(images[image].get("file_name"))
            yield Fault("warning", "crowded image", message, file, where, remedy, image=name)
    if not objects:
        return
    (most, high), (least, low) = objects.most_common()[0], objects.most_common()[-1]
    if high > IMBALANCE * low:
        names = [shown(rows[position].get("name")) for position in (most, least)]
        message = f"{names[0]} has {high} objects, {names[1]} has {low}"
        remedy = "the rare ones are learned last: add images of them"
        yield Fault("warning", "imbalance", message, file, None, remedy)


def _prompt_faults(payload: dict, file: Path, count_tokens: Callable) -> Iterator[Fault]:
    """Warnings about prompts that are longer than the model reads."""
    given = payload.get("prompts")
    pairs = given.items() if isinstance(given, dict) else ()
    prompts = {name: phrase for name, phrase in pairs if isinstance(phrase, str)}
    how = "at least " if count_tokens is _least_tokens else ""
    for row in kept_categories(payload):
        name = row.get("name")
        phrase = phrase_of(name, prompts) if isinstance(name, str) else ""
        tokens = count_tokens(phrase)
        if tokens > TOKEN_LIMIT:
            message = f"the prompt {shown(phrase)} has {how}{tokens} tokens"
            remedy = f"the model reads {TOKEN_LIMIT}, start and end included: shorten it"
            where = file, f"category {_id_text(row)}"
            yield Fault("warning", "long prompt", message, *where, remedy)


def _fatal(
    kind: str, message: str, file: Path, row_id: str | None, remedy: str, image: str | None = None
) -> Fault:
    """An error that reading cannot survive."""
    return Fault("error", kind, message, file, row_id, remedy, True, image)


def _id_faults(rows: list[dict], what: str, file: Path) -> Iterator[Fault]:
    """Missing and repeated ids of images or categories."""
    seen = Counter(id_key(row.get("id")) for row in rows)
    for key, count in seen.items():
        if key is None:
            message = f"expected every {what} to have an id, {ID_WANTED}, found {count} without"
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
        if not isinstance(name, str) or not phrase_of(name, prompts) or UNSAFE.search(name):
            message = f"expected a category name of printable text, found {shown(name)}"
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
    where = file, f"image {_id_text(row)}"
    name = clean_name(row.get("file_name"))
    if name is None:
        found = shown(row.get("file_name"))
        message = f"expected a plain file_name inside the images folder, found {found}"
        yield _fatal("file_name", message, *where, "make it relative to the images folder")
    elif name in first_seen:
        message = f"expected one image a file, found {name!r} also as image {first_seen[name]}"
        yield Fault("error", "duplicate file", message, *where, "merge their annotations")
    else:
        first_seen[name] = row.get("id")
    for key in ("width", "height"):
        if not is_finite(row.get(key)) or not 1 <= row[key] <= COORDINATE_LIMIT:
            limit = f"1 to {COORDINATE_LIMIT:.0f}"
            message = f"expected {key} in pixels, {limit}, found {shown(row.get(key))}"
            yield _fatal("missing key", message, *where, f"write the image's {key}", name)
            return
    if row["width"] * row["height"] > PIXEL_LIMIT:
        message = f"expected at most {PIXEL_LIMIT} pixels, found {row['width']} x {row['height']}"
        yield _fatal("huge image", message, *where, "cut it into tiles", name)


def _disk_faults(payload: dict, images_dir: Path, file: Path) -> Iterator[Fault]:
    """Faults that show in the images folder: absent files, other sizes, links out of it, junk."""
    if not images_dir.is_dir():
        message = f"expected the images folder {images_dir}, found none"
        yield Fault("error", "no images folder", message, file, None, "check the path")
        return
    names = [(row, clean_name(row.get("file_name"))) for row in payload["images"]]
    rows = [(row, images_dir / name) for row, name in names if name is not None]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda pair: list(file_faults(*pair)), rows)
        for faults in processes.progress(found, "images", len(rows)):
            yield from faults
    listed, root = {path for _, path in rows}, images_dir.resolve()
    for path in sorted(listed):
        if not path.resolve().is_relative_to(root):
            message = f"expected a file in the images folder, found a link to {path.resolve()}"
            yield Fault("error", "link outside", message, path, None, "put the file in its place")
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


def _copy_faults(payload: dict, images_dir: Path, folder: Path) -> Iterator[Fault]:
    """The same photo twice in a split, or in another beside it too."""
    names = {clean_name(row.get("file_name")) for row in payload["images"]} - {None}
    here = {images_dir / name for name in names}
    others = {
        path: folder.parent / name
        for name in {"train", "val", "valid", "test"} - {folder.name}
        for path in (folder.parent / name).rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path not in here
    }
    sizes: dict[int, list[Path]] = {}
    for path in filter(Path.is_file, (*sorted(here), *sorted(others))):
        sizes.setdefault(path.stat().st_size, []).append(path)
    used: dict[Path, set[Path]] = {}  # by another split; read only where a file of it is the same
    for paths in sizes.values():
        contents: dict[bytes, list[Path]] = {}
        for path in paths if len(paths) > 1 and paths[0] in here else ():
            with path.open("rb") as stream:
                contents.setdefault(hashlib.file_digest(stream, "sha1").digest(), []).append(path)
        for same in contents.values():
            own = [path for path in same if path in here]
            for path in own[1:]:
                message = f"expected each photo once, found the same file as {path}"
                remedy = "keep one, with all its objects"
                yield Fault("warning", "photo twice", message, own[0], None, remedy)
            theirs = [path for path in same if path in others and own]
            for split in {others[path] for path in theirs} - used.keys():
                used[split] = _photos(split, others)
            theirs = [path for path in theirs if path in used[others[path]]]
            for path in own if theirs else ():
                message = f"expected each photo once, found the same file as {theirs[0]}"
                remedy = "keep one: what was trained on tests nothing; --fix DIR takes train's out"
                yield Fault("warning", SHARED, message, path, None, remedy)


def _photos(folder: Path, found: Iterable[Path]) -> set[Path]:
    """The image files that a split names; those found where that cannot be read."""
    try:
        file, images_dir = find_split(folder)
        names = {clean_name(row.get("file_name")) for row in load_json(file)["images"]} - {None}
    except DatasetError:
        return set(found)
    return {images_dir / name for name in names}


def file_faults(row: dict, path: Path, decode: bool = True) -> Iterator[Fault]:
    """Yields the fault of an image's file: absent, unreadable, cut short, of another size.

    Without `decode` its header alone is read, which does not tell of one cut short.
    """
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
    if decode and (damage := _damage(path)):
        remedy = "replace the file or remove its row"
        yield Fault("error", "unreadable image", f"cannot be read: {damage}", *where, remedy)
        return
    wanted = row.get("width"), row.get("height")
    if found != wanted:
        sizes = [f"{width} x {height}" for width, height in (wanted, found)]
        message = f"expected {sizes[0]} pixels as annotated, found {sizes[1]}"
        remedy = "annotate the file that is on disk"
        if found == wanted[::-1]:
            remedy += "; if it is rotated by its EXIF tag, annotate it as shown"
        yield Fault("error", "image size", message, *where, remedy)


def _damage(path: Path) -> str | None:
    """What keeps an image's pixels from being read."""
    try:
        with Image.open(path) as image:
            image.load()
    except IMAGE_ERRORS as error:
        return "truncated" if "truncated" in str(error) else str(error)
    return None


def _id_text(row: dict) -> str:
    """A row's id as a message names it."""
    key = id_key(row.get("id"))
    return key if isinstance(key, str) else shown(row.get("id"))


def id_key(raw: Any) -> int | str | None:
    """Returns an id as it is compared: 1.0 is 1; None for all but 64-bit integers and
    printable text."""
    if isinstance(raw, float) and raw.is_integer():
        raw = int(raw)
    if isinstance(raw, int):
        return None if isinstance(raw, bool) or abs(raw) >= ID_LIMIT else raw
    return raw if isinstance(raw, str) and not UNSAFE.search(raw) else None


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
    if not isinstance(raw, str) or UNSAFE.search(raw) or re.match(r"[A-Za-z]:", raw):
        return None
    name = PurePosixPath(raw.replace("\\", "/"))
    if max((len(part.encode()) for part in name.parts), default=0) > NAME_BYTES:
        return None
    return None if not name.name or name.is_absolute() or ".." in name.parts else str(name)
