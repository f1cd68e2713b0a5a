"""What a user asks for on the command line: texts, example boxes, routes over adapters, thresholds.

The `parse_*` functions are types of argparse's flags.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3_lora.config import ConfigError, shorten
from sam3_lora.forward import VISUAL_PROMPT
from sam3_lora.geometry import shown
from sam3_lora.images import UNSAFE
from sam3_lora.prediction import Prompts
from sam3_lora.tiles import LEAST_SHARE

log = logging.getLogger(__name__)

DEFAULT_THRESHOLD = 0.5  # of the score
# The largest weight of an adapter in a blend; minus it is the smallest.
MAX_WEIGHT = 10
# Digits of a count: more is a slip.
MAX_DIGITS = 9


def parse_boxes(text: str) -> list[list[float]]:
    """The value of --bboxes as boxes_xyxy."""
    form = "expected '[[x1, y1, x2, y2], ...]' in pixels, found"
    numbers = ",".join(text.replace(",", " ").split())
    boxes = _parse_list(text if "[" in text else f"[{numbers}]", form)
    if _is_box(boxes):
        raise argparse.ArgumentTypeError(
            f"{form} one box without its brackets; did you mean '[{_show_box(boxes)}]'?"
        )
    for box in boxes:
        if not _is_box(box):
            raise argparse.ArgumentTypeError(f"{form} the box {json.dumps(box)[:60]}")
        if not (box[0] < box[2] and box[1] < box[3]):
            raise argparse.ArgumentTypeError(
                f"expected two corners, x1 < x2 and y1 < y2, found the box {_show_box(box)}"
            )
    return boxes


def _is_box(value: Any) -> bool:
    """Whether a JSON value is a list of four finite numbers."""
    numbers = isinstance(value, list) and all(type(v) is float and math.isfinite(v) for v in value)
    return numbers and len(value) == 4


def parse_labels(text: str) -> list[int]:
    """The value of --bbox_labels."""
    form = "expected '[1, 0, ...]', 1 for a positive box and 0 for a negative one, found"
    labels = _parse_list(text, form)
    if any(type(label) is not float or label not in (0, 1) for label in labels):
        raise argparse.ArgumentTypeError(f"{form} {text[:60]!r}")
    return [int(label) for label in labels]


def _parse_list(text: str, form: str) -> list[Any]:
    """A JSON list that is not empty, its numbers as floats."""
    try:
        values = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or not values:
        raise argparse.ArgumentTypeError(f"{form} {text[:60]!r}")
    return values


def parse_route(value: str) -> tuple[str, dict[str, float]]:
    """A value of --route: a prompt, and the weight of each adapter by name."""
    text, _, blend = value.rpartition("=")
    text, shares = " ".join(text.split()), blend.split(",")
    if len(shares) == 1 and ":" not in blend:
        shares = [f"{blend}:1"]
    pairs = [share.partition(":") for share in shares]
    try:
        weights = {name.strip(): float(weight) for name, _, weight in pairs}
    except ValueError:
        weights = {}
    usable = all(name and abs(weight) <= MAX_WEIGHT for name, weight in weights.items())
    if not text or not usable or len(weights) < len(shares):
        raise argparse.ArgumentTypeError(
            "expected 'TEXT=NAME' or 'TEXT=NAME:0.7,NAME2:0.3', each name once and weights from "
            f"-{MAX_WEIGHT} to {MAX_WEIGHT}, found {value[:60]!r}"
        )
    return text, weights


def parse_share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


def parse_tile(text: str) -> float:
    """The value of --tile: a share of a photo's side, less than all of it."""
    value = parse_share(text)
    if not LEAST_SHARE <= value < 1:
        expected = f"expected a number from {LEAST_SHARE} to less than 1, such as 0.5"
        raise argparse.ArgumentTypeError(f"{expected}, found {text!r}")
    return value


def add_tile_flag(group: argparse._ActionsContainer) -> None:
    """Adds --tile to a group of flags of a script that runs a trained model."""
    group.add_argument(
        "--tile",
        type=parse_tile,
        metavar="SHARE",
        help="for large or crowded photos: also run overlapping tiles of each, whose sides are at "
        "most this share of the photo's, and merge what is found; 0.6 makes 2 x 2 tiles, 0.5 3 x "
        "3, 0.25 5 x 5, and each takes the time of a photo (default: the whole photo alone)",
    )


def parse_count(text: str, least: int = 1) -> int:
    """A whole number from `least` up."""
    if not text.isdecimal() or len(text) > MAX_DIGITS or int(text) < least:
        found = repr(shorten(text))
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, found {found}")
    return int(text)


def parse_split(text: str) -> str:
    """The name of a split: of a folder in the data folder, and part of an output folder's name."""
    if text in ("", ".", "..") or Path(text).name != text:
        found = repr(shorten(text))
        raise argparse.ArgumentTypeError(f"expected train, val, test or a like name, found {found}")
    return text


def _show_box(box: Sequence[float]) -> str:
    """A box for a message."""
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def read_prompts(args: argparse.Namespace) -> Prompts:
    """The prompts of the command line, checked against each other."""
    texts = list(dict.fromkeys(" ".join(text.split()) for text in args.text_prompt))
    labels = args.bbox_labels or [1] * len(args.bboxes)
    if "" in texts:
        raise ConfigError("--text_prompt: expected words, found an empty text")
    if unsafe := [text for text in texts if UNSAFE.search(text)]:
        raise ConfigError(
            f"--text_prompt: expected printable words, found {shown(unsafe[0])}; write UTF-8"
        )
    if len(labels) != len(args.bboxes):
        raise ConfigError(
            f"--bbox_labels: expected one for each box of --bboxes ({len(args.bboxes)}), found "
            f"{len(labels)}"
        )
    if not texts and not labels:
        raise ConfigError(
            "expected --text_prompt or --bboxes, found neither; say what to find, such as "
            "--text_prompt \"red car\", or box an example with --bboxes '[[x1, y1, x2, y2]]'"
        )
    if args.tile and labels:
        raise ConfigError(
            "--tile: expected --text_prompt alone, found --bboxes, which most tiles do not show; "
            "name the objects with --text_prompt, or leave out --tile"
        )
    if not any(labels) and (args.only_boxed or not texts):
        flag = "--only_boxed" if args.only_boxed else "--bbox_labels"
        raise ConfigError(f"{flag}: expected a positive box in --bboxes, found none; add one")
    return Prompts(texts or [VISUAL_PROMPT], args.bboxes, labels)


def read_routes(routes: list[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The values of --route by prompt; ConfigError for two of one prompt."""
    texts = Counter(text for text, _ in routes)
    twice = [text for text, count in texts.items() if count > 1]
    if twice:
        raise ConfigError(f"--route: expected one for each prompt, found more for {twice[0]!r}")
    return dict(routes)


def box_problems(path: Path, width: int, height: int, boxes_xyxy: list[list[float]]) -> list[str]:
    """What is wrong with boxes on an image of that size."""
    if boxes_xyxy and np.max(boxes_xyxy) <= 1 and max(width, height) > 2:
        box = _show_box(boxes_xyxy[0])
        wanted = f"pixels are expected, of {path} ({width} x {height})"
        return [f"--bboxes: {box} looks like fractions; {wanted}"]
    wanted = f"--bboxes: expected boxes inside {path} ({width} x {height} pixels)"
    outside = [b for b in boxes_xyxy if min(b) < 0 or b[2] > width or b[3] > height]
    form = "a box is two corners, x1, y1, x2, y2, not a corner with width and height"
    return [f"{wanted}, found {_show_box(box)}; {form}" for box in outside]


def choose_thresholds(
    threshold: float | None,
    texts: list[str],
    blends: list[dict[str, float]],
    adapters: dict[str, dict[str, Any]],
) -> list[float]:
    """The lowest score kept of each text: --threshold, else that of its category in the adapter
    that answers it alone: a blend's scores are others."""
    if threshold is not None:
        return [threshold] * len(texts)
    chosen, shown = [], []
    for text, weights in zip(texts, blends, strict=True):
        own = adapters[next(iter(weights))] if list(weights.values()) == [1] else {}
        by_name = own.get("thresholds", {})
        # The words that they were chosen with, where the file tells.
        phrases = own.get("calibration", {}).get("prompts", own.get("categories", {}))
        stored = by_name | {phrases[name]: by_name[name] for name in by_name if name in phrases}
        chosen.append(stored.get(text, DEFAULT_THRESHOLD))
        shown.append(f"{text} {chosen[-1]:.3f}" + (" (stored)" if text in stored else ""))
    if any(text.endswith("(stored)") for text in shown):
        log.info("thresholds: %s", ", ".join(shown))
    return chosen


def count_words(
    texts: Sequence[str],
    counts: Mapping[int, int],
    thresholds: Sequence[float],
    best: tuple[int, float],
) -> str:
    """How many of each prompt an image has, for a line, and the best score.

    Args:
        texts, thresholds, best: as for `prediction.find`.
        counts: category_id -> detections.
    """
    parts = [f"{shorten(text)} {counts.get(i, 0)}" for i, text in enumerate(texts, start=1)]
    row, score = best
    if score >= thresholds[row]:
        return ", ".join([*parts, f"best score {score:.3f}"])
    parts[row] += f" (best score {score:.3f}, below {thresholds[row]:.3g})"
    return ", ".join(parts)
