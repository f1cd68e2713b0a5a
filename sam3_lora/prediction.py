"""Prompts on a photo: texts and boxes in, detections of the photo's size out.

photo -> canvas -> one pass of the vision tower -> heads, a row for each text -> best detections

and the same for each tile of a photo, where it is cut into tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sam3_lora import coco
from sam3_lora.dataset import place_on_canvas
from sam3_lora.evaluation import Detections, detect_more, join_detections
from sam3_lora.forward import Forward
from sam3_lora.metrics import DetectionAccumulator
from sam3_lora.model import image_size
from sam3_lora.tiles import merge_views, view_windows

# The share of a detection's box inside a positive box prompt from which `keep_boxed` keeps it.
BOXED_SHARE = 0.5


@dataclass(frozen=True)
class Prompts:
    """What every image is asked: a row for each text; the boxes (pixels as shown) go with all."""

    texts: list[str]
    boxes_xyxy: list[list[float]]
    labels: list[int]  # one a box: 1 positive, 0 negative


def make_batch(photo: np.ndarray, prompts: Prompts, side: int) -> dict[str, Any]:
    """One image (H, W, 3) on a canvas of `side` pixels, and its R rows, as `Forward` takes them."""
    height, width = photo.shape[:2]
    count = len(prompts.texts)
    pixels = torch.from_numpy(photo).permute(2, 0, 1)
    batch = {
        "images": place_on_canvas(pixels, side)[None],
        "texts": prompts.texts,
        "image_index": torch.zeros(count, dtype=torch.long),
    }
    if prompts.labels:
        corners = torch.tensor(prompts.boxes_xyxy) / torch.tensor([width, height] * 2)  # (N,4)
        low, high = corners[:, :2], corners[:, 2:]
        boxes = torch.cat([(low + high) / 2, high - low], dim=1)
        batch["box_prompts_cxcywh"] = boxes.expand(count, -1, -1)
        batch["box_prompt_labels"] = torch.tensor(prompts.labels).expand(count, -1)
    return batch


def find(
    forward: Forward,
    photo: np.ndarray,
    prompts: Prompts,
    thresholds: Sequence[float],
    max_rows: int,
    tile: float | None = None,
) -> tuple[Detections, float]:
    """Runs all prompts on one image, with one pass of the vision tower for each of its views.

    Args:
        forward: the model.
        photo: uint8 (H, W, 3).
        prompts: texts and boxes; with tiles, no boxes.
        thresholds: the lowest score kept, of each text.
        max_rows: prompts in one pass of the heads.
        tile: as for `search`.

    Returns:
        (detections as `join_detections`, best first; the best score, kept or not).
    """
    # The best one stays whatever its score, to be named.
    found = search(forward, photo, prompts, max_rows, 1, min(thresholds), tile)
    kept = found["score"] >= np.asarray(thresholds)[found["category_id"] - 1]
    return take(found, np.flatnonzero(kept)), found["score"][0]


@torch.no_grad()
def search(
    forward: Forward,
    photo: np.ndarray,
    prompts: Prompts,
    max_rows: int,
    max_detections: int,
    score_threshold: float,
    tile: float | None = None,
) -> Detections:
    """The detections of all prompts on one image (H, W, 3); `category_id` 1 is the first text.

    Args:
        forward, photo, prompts, max_rows: as for `find`.
        max_detections: so many of the best are kept, over all prompts,
        score_threshold: and every one of at least this score.
        tile: None takes the photo as it is; else it is also cut into tiles whose sides are at most
            this share of its own, see `tiles.view_windows`, and what its views show is merged.

    Returns:
        As `evaluation.join_detections`.
    """
    limits = max_detections, score_threshold
    if tile is None:
        return _search_view(forward, photo, prompts, max_rows, *limits)
    if prompts.labels:
        # An example is read from the view that it is in; most tiles do not show it.
        raise ValueError("expected no box prompts with tiles, found some")
    height, width = photo.shape[:2]
    views = []
    for window in view_windows(width, height, tile):
        left, top, right, bottom = window
        # No object of the best so many is worse than that in a view: each holds it once at most.
        seen = _search_view(forward, photo[top:bottom, left:right], prompts, max_rows, *limits)
        views.append((window, seen))
    return join_detections([merge_views(views, width, height)], *limits)


def _search_view(
    forward: Forward, photo: np.ndarray, prompts: Prompts, max_rows: int, *limits: float
) -> Detections:
    """`search` on one view."""
    batch = make_batch(photo, prompts, image_size(forward.model))
    features = forward.encode(batch)
    count, size = len(prompts.texts), photo.shape[:2]
    found = None
    for start in range(0, count, max_rows):
        ids = list(range(start + 1, min(start + max_rows, count) + 1))
        outputs = forward.predict(features, batch, slice(start, start + max_rows))
        found = detect_more(found, outputs, list(range(len(ids))), ids, size, *limits)
    return found


def evaluate_tiles(
    forward: Forward,
    split: coco.CocoSplit,
    images: Iterable[dict[str, Any]],
    tile: float | None,
    *,
    max_rows: int,
    max_detections: int,
    score_threshold: float,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of a split whose photos are searched in tiles; arguments as for `search` but:

    Args:
        split: the ground truth.
        images: all of `split.images`.

    Returns:
        (summary, results) as of `evaluation.evaluate_split`, with `tile`; no tile has targets, so
        there are no `losses`.
    """
    limits = max_detections, score_threshold
    accumulator = DetectionAccumulator(score_threshold, max_detections)
    categories = np.array(list(split.categories))
    prompts = Prompts([split.phrase(category) for category in split.categories], [], [])
    for image in images:
        photo = coco.read_image(split.image_path(image))
        found = search(forward, photo, prompts, max_rows, *limits, tile)
        found["category_id"] = categories[found["category_id"] - 1]
        accumulator.add_image(image["id"], found, found["rles"])
    summary = {**accumulator.summary(split), "losses": {}, "tile": tile}
    return summary, accumulator.results()


def keep_boxed(found: Detections, boxes_xyxy: np.ndarray) -> Detections:
    """The detections of whose box at least `BOXED_SHARE` lies in one of the given boxes (m, 4)."""
    own = found["boxes_xyxy"][:, None]  # (n,1,4)
    low = np.maximum(own[..., :2], boxes_xyxy[:, :2])
    high = np.minimum(own[..., 2:], boxes_xyxy[:, 2:])
    shared = (high - low).clip(min=0).prod(axis=-1)  # (n,m)
    areas = (own[..., 2:] - own[..., :2]).prod(axis=-1)  # (n,1)
    boxed = (shared > 0) & (shared >= BOXED_SHARE * areas)
    return take(found, np.flatnonzero(boxed.any(axis=1)))


def suppress(found: Detections, limit: float) -> Detections:
    """The detections whose mask has an IoU of at most `limit` with each better one kept of the
    same prompt."""
    kept: list[int] = []
    for i, prompt in enumerate(found["category_id"]):
        better = [found["rles"][j] for j in kept if found["category_id"][j] == prompt]
        if not (coco.mask_iou([found["rles"][i]], better) > limit).any():
            kept.append(i)
    return take(found, kept)


def take(found: Detections, indices: Sequence[int]) -> Detections:
    """Some of the detections."""
    index = np.asarray(indices, dtype=int)
    chosen = {name: found[name][index] for name in ("category_id", "score", "boxes_xyxy")}
    return {**chosen, "rles": [found["rles"][i] for i in index]}
