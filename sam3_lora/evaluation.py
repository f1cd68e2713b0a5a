"""Outputs of the model to detections with masks, and a split to its metrics.

rows of an image -> best detections over all prompts -> masks of those alone -> RLE
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lora_layers import AdapterError, merge_lora
from sam3_lora import checkpoint, engine
from sam3_lora.coco import CocoSplit, encode_mask
from sam3_lora.forward import Forward, predict_masks
from sam3_lora.metrics import DetectionAccumulator, select_detections
from sam3_lora.model import cast_towers, choose_device, compute_dtype, load_model

# Masks drawn at once at the photo's size: bounds memory, 8 x 12 megapixels in fp32 are 400 MB.
MASKS_AT_ONCE = 8

Detections = dict[str, Any]


def load_forward(
    weights: Path | None,
    model_name: str | None,
    geometry_cls: str | None,
    device: str,
    mixed_precision: str,
) -> tuple[Forward, dict[str, Any]]:
    """A base model, with an adapter merged into it where one is given, ready for inference.

    Args:
        weights: adapter file, or its folder; None runs the base model.
        model_name: base model; None takes the one the adapter was trained on.
        geometry_cls: `meta` or `hf`; None takes the adapter's, or `meta` without one.
        device: of `hardware.device`.
        mixed_precision: of `hardware.mixed_precision`.

    Returns:
        (forward, adapter): `checkpoint.read_adapter`'s content, empty for the base model.

    Raises:
        ModelError: the base or the device cannot be had.
        AdapterError: the adapter cannot be read or does not fit the base.
    """
    adapter = checkpoint.read_adapter(weights) if weights else {}
    where = choose_device(device)
    name = model_name or adapter.get("base_model")
    if name is None:
        raise AdapterError(
            "expected an adapter or a base model; give --lora_weights or --model_name"
        )
    model, tokenizer = load_model(name)
    if weights:
        checkpoint.load_adapter(weights, model)
        merge_lora(model)
    dtype = compute_dtype(mixed_precision, where)
    cast_towers(model.requires_grad_(False), dtype)
    geometry_cls = geometry_cls or adapter.get("geometry_cls", "meta")
    return Forward(model.to(where).eval(), tokenizer, geometry_cls, dtype), adapter


def detect(
    outputs: dict[str, torch.Tensor],
    rows: list[int],
    category_ids: list[int],
    original_size: tuple[int, int],
    max_detections: int,
    score_threshold: float = 0.0,
) -> Detections:
    """The detections of one image from the outputs for some of its rows.

    Args:
        outputs: of `Forward.predict`.
        rows: which of the outputs' rows are this image's.
        category_ids: category of each of these rows.
        original_size: (H, W) of the photo, pixels.
        max_detections: the most kept, best scores first, over all the rows.
        score_threshold: the lowest score kept.

    Returns:
        As `metrics.select_detections`, `row` counting the given rows; and `rles`, a mask of the
        photo's size for each, or None where the outputs hold no masks.
    """
    found = select_detections(
        outputs["logits"][-1, rows],
        outputs["presence"][-1, rows],
        outputs["boxes_cxcywh"][-1, rows],
        category_ids,
        original_size,
        max_detections,
    )
    kept = found["score"] >= score_threshold
    found = {k: v if k == "absent_scores" else v[kept] for k, v in found.items()}
    found["rles"] = None
    if "pixel_embed" in outputs:
        found["rles"] = _draw(outputs, rows, found, original_size)
    return found


def _draw(
    outputs: dict[str, torch.Tensor], rows: list[int], found: Detections, size: tuple[int, int]
) -> list[dict[str, Any]]:
    """RLE masks of detections: logits resized to the photo, cut at 0 (as Meta;
    eval/postprocessors)."""
    rles: list[dict[str, Any] | None] = [None] * len(found["row"])
    for row in np.unique(found["row"]):
        wanted = np.flatnonzero(found["row"] == row)
        for part in np.split(wanted, range(MASKS_AT_ONCE, len(wanted), MASKS_AT_ONCE)):
            queries = torch.as_tensor(found["query"][part], device=outputs["pixel_embed"].device)
            logits = predict_masks(outputs, rows[row], queries)[:, None]
            masks = F.interpolate(logits, size=size, mode="bilinear", align_corners=False) > 0
            for index, mask in zip(part, masks[:, 0].cpu().numpy(), strict=True):
                rles[index] = encode_mask(mask)
    return rles


def join_detections(parts: list[Detections], max_detections: int) -> Detections:
    """The best detections of an image whose rows came in several parts."""
    order = np.argsort(-np.concatenate([p["score"] for p in parts]), kind="stable")
    order = order[:max_detections]
    names = ("category_id", "score", "boxes_xyxy")
    joined: Detections = {n: np.concatenate([p[n] for p in parts])[order] for n in names}
    joined["absent_scores"] = np.concatenate([p["absent_scores"] for p in parts])
    joined["rles"] = None
    if parts[0]["rles"] is not None:
        rles = [rle for p in parts for rle in p["rles"]]
        joined["rles"] = [rles[i] for i in order]
    return joined


def evaluate_split(
    forward: Any,
    criterion: engine.Criterion,
    count: engine.Count,
    batches: Iterable[dict[str, Any]],
    split: CocoSplit,
    *,
    max_rows: int,
    max_detections: int,
    score_threshold: float,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics and mean losses of a split, or of those of its images that the batches hold.

    Args:
        forward, criterion, count, max_rows: as for `engine.evaluate`; the model is in eval mode.
        batches: of a `PromptDataset` with `train=False`: every category on every image.
        split: the ground truth.
        max_detections: the most an image keeps, over all its prompts.
        score_threshold: of the metrics that need one.

    Returns:
        (summary, results): `DetectionAccumulator.summary` with `losses`, the images' mean of every
        loss term, and `iou` of the queries matched to objects; all detections as COCO results.
    """
    accumulator = DetectionAccumulator(score_threshold, max_detections)
    parts: dict[int, list[Detections]] = defaultdict(list)
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, int] = defaultdict(int)
    for chunk in engine.evaluate(forward, criterion, count, batches, max_rows):
        for image_id, found in _detect_chunk(chunk, max_detections):
            parts[image_id].append(found)
        for name, value in chunk["losses"].items():
            # A term is a mean over its batch: of objects for the IoU, else of the batch's rows.
            objects = chunk["counts"]["masked_targets"] or chunk["counts"]["targets"]
            weight = objects if name == "iou" else len(chunk["batch"]["image_ids"])
            sums[name] += value * weight
            if chunk["rows"].start == 0:
                weights[name] += weight
    for image_id, found_parts in parts.items():
        found = join_detections(found_parts, max_detections)
        accumulator.add_image(image_id, found, found.pop("rles"))
    seen = replace(split, images=[image for image in split.images if image["id"] in parts])
    means = {name: value / max(weights[name], 1) for name, value in sums.items()}
    return {**accumulator.summary(seen), "losses": means}, accumulator.results()


def _detect_chunk(chunk: dict[str, Any], max_detections: int) -> Iterator[tuple[int, Detections]]:
    """Yields (image id, detections) of each image that has rows in a chunk of `engine.evaluate`."""
    batch, rows = chunk["batch"], chunk["rows"]
    categories, images = batch["category_ids"][rows], batch["image_index"][rows].tolist()
    for position in dict.fromkeys(images):
        own = [row for row, image in enumerate(images) if image == position]
        size = batch["original_sizes"][position]
        own_categories = [categories[row] for row in own]
        found = detect(chunk["outputs"], own, own_categories, size, max_detections)
        yield batch["image_ids"][position], found
