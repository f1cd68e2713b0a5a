"""Prompts on a photo: texts and boxes in, detections of the photo's size out.

photo -> canvas -> one pass of the vision tower -> heads, a row for each text -> best detections
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sam3_lora import coco
from sam3_lora.dataset import place_on_canvas
from sam3_lora.evaluation import Detections, detect, join_detections
from sam3_lora.forward import Forward
from sam3_lora.model import image_size

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


@torch.no_grad()
def find(
    forward: Forward,
    photo: np.ndarray,
    prompts: Prompts,
    thresholds: Sequence[float],
    max_rows: int,
) -> tuple[Detections, float]:
    """Runs all prompts on one image, with one pass of the vision tower.

    Args:
        forward: the model.
        photo: uint8 (H, W, 3).
        prompts: texts and boxes.
        thresholds: the lowest score kept, of each text.
        max_rows: prompts in one pass of the heads.

    Returns:
        (detections as `join_detections`, best first; the best score, kept or not).
    """
    batch = make_batch(photo, prompts, image_size(forward.model))
    features = forward.encode(batch)
    count, size = len(prompts.texts), photo.shape[:2]
    parts = []
    for start in range(0, count, max_rows):
        ids = list(range(start + 1, min(start + max_rows, count) + 1))
        outputs = forward.predict(features, batch, slice(start, start + max_rows))
        # The best one stays whatever its score, to be named.
        parts.append(detect(outputs, list(range(len(ids))), ids, size, 1, min(thresholds)))
    found = join_detections(parts, 1, min(thresholds))
    kept = found["score"] >= np.asarray(thresholds)[found["category_id"] - 1]
    return take(found, np.flatnonzero(kept)), found["score"][0]


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
