"""A split as a whole: its counts, its faults, a contact sheet of its images, how to divide it."""

import logging
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3_lora.coco import CocoSplit, DatasetError, check_images, decode_mask, read_coco
from sam3_lora.drawing import SHEET_CELL, draw_overlay, draw_panel, draw_sheet, to_cell
from sam3_lora.faults import Fault, record_faults, refuse_fatal, set_faults
from sam3_lora.images import read_image
from sam3_lora.layout import find_split, load_json
from sam3_lora.packages import Finding
from sam3_lora.tables import EMPTY_LISTED

logger = logging.getLogger(__name__)

FAULTS_LISTED = 5  # of each kind
EXAMPLES, MAX_EXAMPLES = 12, 24  # pictures on a sheet; the more where the categories need them
PANEL_IMAGES = 4
# Images of a split whose files are opened before a run; of others it is seen that they are there.
MOST_OPENED = 2000
MOST_NAMED = 6  # prompts that are listed
HARMLESS = ("empty images",)  # kinds of faults that are no reason to change anything


def _count(split: CocoSplit) -> tuple[dict[str, int], Counter]:
    """How many a split holds of what, and the objects of each category by id."""
    objects = [item for items in split.annotations.values() for item in items]
    totals = {
        "images": len(split.images),
        "empty_images": sum(not items for items in split.annotations.values()),
        "objects": len(objects),
        "masks": sum(item["segmentation"] is not None for item in objects),
        "crowds": sum(item["iscrowd"] for item in objects),
    }
    return totals, Counter(item["category_id"] for item in objects)


def _count_levels(faults: list[Fault]) -> dict[str, int]:
    """How many faults are errors and how many warnings."""
    errors = sum(fault.level == "error" for fault in faults)
    return {"errors": errors, "warnings": len(faults) - errors}


def summary(split: CocoSplit) -> str:
    """Returns the counts of a split, a line for the whole and one for each category.

    Categories without an object share one line where there are many.
    """
    totals, count = _count(split)
    lines = [
        "images      {images} ({empty_images} without an object)".format(**totals),
        "objects     {objects} ({masks} with a mask, {crowds} crowds)".format(**totals),
        f"categories  {len(split.categories)}",
    ]
    absent = sum(category_id not in count for category_id in split.categories)
    for category_id, name in split.categories.items():
        if absent > EMPTY_LISTED and category_id not in count:
            continue
        phrase = split.phrase(category_id)
        prompt = "" if phrase == name else f'  prompted as "{phrase}"'
        lines.append(f"  {count[category_id]:7d}  {name}{prompt}")
    if absent > EMPTY_LISTED:
        lines.append(f"  {absent} categories without an object")
    return "\n".join(lines) + "\n"


def fault_report(faults: list[Fault]) -> str:
    """Returns the faults, errors first, the first few of each kind, and their total."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: fault.level):
        groups.setdefault((fault.level, fault.kind), []).append(fault)
    lines = []
    for (level, kind), group in groups.items():
        lines.append(f"{level}: {kind} ({len(group)})")
        lines.extend(f"  {fault}" for fault in group[:FAULTS_LISTED])
        if len(group) > FAULTS_LISTED:
            lines.append(f"  ... and {len(group) - FAULTS_LISTED} more")
    lines.append("errors {errors}, warnings {warnings}".format(**_count_levels(faults)))
    return "\n".join(lines) + "\n"


def json_report(file: Path, split: CocoSplit | None, faults: list[Fault]) -> dict[str, Any]:
    """Returns the counts (None of a split that cannot be read) and the faults of a split."""
    report = {"annotations_file": str(file), "counts": None, **_count_levels(faults)}
    if split is not None:
        totals, count = _count(split)
        named = {name: count[key] for key, name in split.categories.items()}
        report["counts"] = totals | {"categories": named}
    keys = ("level", "kind", "message", "image", "id", "remedy")
    rows = [{key: getattr(f, key) for key in keys} | {"file": str(f.file)} for f in faults]
    return report | {"faults": rows}


def choose_examples(kinds: Sequence[set], first: Sequence[int] = ()) -> list[int]:
    """Chooses images to show, so that every category is seen where that is possible.

    Args:
        kinds: the categories in each image.
        first: positions of those that come before the others, EXAMPLES of them at most.

    Returns:
        Positions, at most EXAMPLES, or MAX_EXAMPLES where the categories need them; the same each
        time.
    """
    order = random.Random(0).sample(range(len(kinds)), len(kinds))
    chosen = list(first[:EXAMPLES])
    unseen = set().union(*kinds).difference(*(kinds[position] for position in chosen))
    while unseen and len(chosen) < MAX_EXAMPLES:
        best = max(order, key=lambda position: len(kinds[position] & unseen))
        chosen.append(best)
        unseen -= kinds[best]
    rest = [position for position in order if position not in chosen]
    return chosen + rest[: max(0, EXAMPLES - len(chosen))]


def check_split(
    name: str, path: Path, most: int | None = None
) -> tuple[list[Finding], CocoSplit | None]:
    """Reads a split and sees that its images are there; opens a part of many.

    Args:
        name: of the check: `train` or `val`.
        path: as for `coco.read_split`.
        most: the first images that are used; None: all.

    Returns:
        (findings, the split, or None where training could not read it).
    """
    try:
        file, folder = find_split(path)
        payload = load_json(file)
        faults = [*record_faults(payload, file), *set_faults(payload, file)]
        refuse_fatal(faults)
        split = read_coco(file, folder, payload, checked=True)
        split = replace(split, images=split.images[:most])
        _check_images(split)
    except (DatasetError, OSError) as error:
        return [Finding("error", name, str(error))], None
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        if fault.kind not in HARMLESS:
            kinds.setdefault(fault.kind, []).append(fault)
    found = [Finding("ok", name, f"{path}: {_outline(split)}")]
    for kind, group in kinds.items():
        more = ""
        if len(group) > 1:
            command = f"prepare_data.py validate --data_dir {path.parent} --split {path.name}"
            more = f"; the other {len(group) - 1}: python {command}"
        found.append(Finding("warning", name, f"{kind}: {group[0]}{more}"))
    return found, split


def _check_images(split: CocoSplit) -> None:
    """Raises DatasetError where an image is absent, or one of those opened is not as annotated."""
    absent = [path for path in map(split.image_path, split.images) if not path.is_file()]
    if absent:
        raise DatasetError(
            f"{split.annotations_file}: expected {len(split.images)} images, found "
            f"{len(split.images) - len(absent)}; the first that is not there is {absent[0]}: put "
            "them there, or remove their rows"
        )
    every = -(-len(split.images) // MOST_OPENED)
    check_images(replace(split, images=split.images[:: max(every, 1)]))


def _outline(split: CocoSplit) -> str:
    """What is in a split, on one line."""
    # Of a validation split the first images alone may be used.
    used = {image["id"]: split.annotations[image["id"]] for image in split.images}
    totals, _ = _count(replace(split, annotations=used))
    masks, count = totals["masks"], totals["objects"]
    kind = {count: "all with masks", 0: "boxes only"}.get(masks, f"{masks:,} with masks")
    phrases = [f'"{split.phrase(key)}"' for key in split.categories]
    more = f" and {len(phrases) - MOST_NAMED} more" if len(phrases) > MOST_NAMED else ""
    empty = totals["empty_images"]
    without = f" ({empty:,} without an object)" if empty else ""
    return (
        f"{plural(totals['images'], 'image')}{without}, {plural(count, 'object')} ({kind}), "
        f"{plural(len(phrases), 'prompt')}: {', '.join(phrases[:MOST_NAMED])}{more}"
    )


def plural(count: int, noun: str) -> str:
    """Returns a count with its noun."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def preview(split: CocoSplit, faults: Sequence[Fault] = ()) -> np.ndarray:
    """Returns a contact sheet of a split: images with their objects, and counts by category.

    Images with faults come first, with the kinds of these. Images that cannot be read are left out,
    and told.
    """
    _, counts = _count(split)
    order = sorted(split.categories, key=lambda category_id: -counts[category_id])
    colors = {category_id: k for k, category_id in enumerate(order)}
    kinds = [{a["category_id"] for a in split.annotations[image["id"]]} for image in split.images]
    faulty = _kinds_of_faults(split, faults)
    pictures, captions = [], []
    for position in choose_examples(kinds, list(faulty)):
        image = split.images[position]
        try:
            photo = to_cell(read_image(split.image_path(image)), SHEET_CELL)
            items = split.annotations[image["id"]]
            pictures.append(draw_objects(photo, items, image, split, colors))
            kind = faulty.get(position)
            captions.append(f"{image['file_name']}: {kind}" if kind else image["file_name"])
        except DatasetError as error:
            logger.warning("left out of the preview: %s", error)
    bars = {split.phrase(key): (counts[key], colors[key]) for key in order if counts[key]}
    absent = [key for key in order if not counts[key]]
    if len(absent) > EMPTY_LISTED:
        bars[f"{len(absent)} without an object"] = (0, 0)
    else:
        bars |= {split.phrase(key): (0, 0) for key in absent}
    return draw_sheet(pictures, captions, bars)


def _kinds_of_faults(split: CocoSplit, faults: Sequence[Fault]) -> dict[int, str]:
    """Position of each image with faults -> their kinds; errors come first."""
    at: dict[str | Path, int] = {}
    for position, image in enumerate(split.images):
        at[image["file_name"]] = at[split.image_path(image)] = position
    kinds: dict[int, dict[str, None]] = {}
    for fault in sorted(faults, key=lambda fault: fault.level):
        if (fault.image or fault.file) in at:
            kinds.setdefault(at[fault.image or fault.file], {})[fault.kind] = None
    return {position: ", ".join(own) for position, own in kinds.items()}


def detections_panel(
    split: CocoSplit, results: list[dict[str, Any]], threshold: float
) -> np.ndarray:
    """Returns annotations beside detections, on PANEL_IMAGES images at most.

    Args:
        split: The images and their annotations. The same images are drawn each time: such that
            every category is seen where that is possible.
        results: COCO results on these images, each image's best first.
        threshold: The score from which a detection is drawn.
    """
    colors = {category_id: k for k, category_id in enumerate(split.categories)}
    kinds = [{a["category_id"] for a in split.annotations[image["id"]]} for image in split.images]
    images = [split.images[position] for position in choose_examples(kinds)[:PANEL_IMAGES]]
    found: dict[int, list] = {image["id"]: [] for image in images}
    for row in results:
        if row["score"] >= threshold and row["image_id"] in found:
            found[row["image_id"]].append(row)
    pictures = []
    for image in images:
        photo = to_cell(read_image(split.image_path(image)))
        columns = split.annotations[image["id"]], found[image["id"]]
        pictures.append([draw_objects(photo, items, image, split, colors) for items in columns])
    return draw_panel(pictures, ("annotation", f"found, score >= {threshold:g}"))


def draw_objects(
    photo: np.ndarray,
    items: list[dict[str, Any]],
    image: dict[str, Any],
    split: CocoSplit,
    colors: dict[int, int],
) -> np.ndarray:
    """A photo with masks, or boxes of objects without one.

    Of each category the largest object is named, of detections the first one with its score, and
    the number of all.

    Args:
        photo: uint8 (H, W, 3), scaled as it shall be shown.
        items: Annotations, or COCO results, on it.
        image: Its record, with the size that these are of.
        split: The one it is of.
        colors: Category -> index into drawing.PALETTE.
    """
    height, width = photo.shape[:2]
    items = sorted(items, key=lambda item: -item.get("area", 0))
    number = Counter(item["category_id"] for item in items)
    labels = []
    for item in items:
        count = number.pop(item["category_id"], 0)
        note = f" {item['score']:.2f}" if "score" in item else ""
        note += f" \N{MULTIPLICATION SIGN}{count}" if count > 1 else ""
        labels.append(split.phrase(item["category_id"]) + note if count else "")

    def mask_of(item: dict) -> np.ndarray:
        if item.get("segmentation") is None:
            return np.zeros((height, width), dtype=bool)
        mask = decode_mask(item["segmentation"], image["height"], image["width"])
        return np.asarray(Image.fromarray(mask).resize((width, height)))

    boxes = np.array([item["bbox"] for item in items], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes *= np.array([width / image["width"], height / image["height"]] * 2)
    return draw_overlay(
        photo,
        (mask_of(item) for item in items),
        boxes,
        labels,
        [colors[item["category_id"]] for item in items],
        outlined=[item.get("segmentation") is None for item in items],
    )


def divide_names(
    labels: Mapping[str, Collection[int]], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Divides names so that each label's share in a split is near the split's fraction.

    Iterative stratification: the names of the rarest label first, each to the split that lacks most
    of that label, of equal ones to that which lacks most names. Source: Sechidis, Tsoumakas and
    Vlahavas, On the Stratification of Multi-Label Data (2011), algorithm 1.

    Args:
        labels: Name -> its labels; their order does not matter.
        fractions: Split -> fraction of the names, above 0.
        seed: Of the order in which the names of a label are taken.

    Returns:
        Name -> split, for every name.
    """
    names = sorted(labels)
    random.Random(seed).shuffle(names)
    holders: dict[int | None, list[str]] = {}  # of each label; under None all names
    for name in names:
        for key in {None, *labels[name]}:
            holders.setdefault(key, []).append(name)
    left = {key: len(held) for key, held in holders.items()}
    lacks = {s: {key: f * number for key, number in left.items()} for s, f in fractions.items()}
    chosen: dict[str, str] = {}
    while left:
        rarest = min(left, key=lambda key: (key is None, left[key], key))
        for name in (name for name in holders[rarest] if name not in chosen):
            chosen[name] = max(fractions, key=lambda s: (lacks[s][rarest], lacks[s][None]))
            for key in {None, *labels[name]}:
                lacks[chosen[name]][key] -= 1
                left[key] -= 1
        del left[rarest]
    return chosen
