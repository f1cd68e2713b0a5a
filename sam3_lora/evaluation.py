"""Outputs of the model to detections with masks, and a split to its metrics.

rows of an image -> best detections over all prompts -> masks of those alone -> RLE

Also what the scripts that run a trained model share: which base, and loading it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lora_layers import merge_lora
from sam3_lora import checkpoint, engine, processes
from sam3_lora.coco import CocoSplit, encode_mask
from sam3_lora.forward import Forward, predict_masks
from sam3_lora.metrics import DetectionAccumulator, Detections, rank_scores, select_detections
from sam3_lora.model import cast_towers, choose_device, compute_dtype, load_model

log = logging.getLogger(__name__)

# Masks drawn at once at the photo's size: bounds memory, 8 x 12 megapixels in fp32 are 400 MB.
MASKS_AT_ONCE = 8


def resolve_model(
    configured: Mapping[str, str], flags: Mapping[str, Any], adapter: Mapping[str, Any]
) -> tuple[str, str]:
    """Base model and geometry_cls: those of the flags, else the adapter's, else the config's.

    Args:
        configured: `name` and `geometry_cls` of the `model` section, flags included.
        flags: parsed flags; of interest are `config`, `model_name` and `model_geometry_cls`.
        adapter: `checkpoint.read_adapter`'s content, empty without an adapter.

    Returns:
        (name, geometry_cls); where the adapter was trained with others, a warning says so.
    """
    resolved = []
    for key, own_key in (("name", "base_model"), ("geometry_cls", "geometry_cls")):
        value, own = configured[key], adapter.get(own_key)
        if own and flags.get(f"model_{key}") is None:
            if flags.get("config") and value != own:
                log.warning("model_%s: %s of the adapter, not %s of the config", key, own, value)
            value = own
        elif own and value != own:
            log.warning("--model_%s is %s, the adapter was trained with %s", key, value, own)
        resolved.append(value)
    return resolved[0], resolved[1]


def load_forward(
    model_name: str,
    geometry_cls: str,
    device: str,
    mixed_precision: str,
    weights: Path | None = None,
    adapter: dict[str, Any] | None = None,
) -> Forward:
    """A base model, with an adapter where one is given, ready for inference.

    In fp32 the adapter is merged. Below, a tower's rounded weights would swallow a small update, so
    it stays beside them in fp32, as in training.

    Args:
        model_name, geometry_cls: as `resolve_model` gives.
        device: of `hardware.device`.
        mixed_precision: of `hardware.mixed_precision`.
        weights: the adapter's file or folder, for messages; None runs the base model.
        adapter: `checkpoint.read_adapter`'s content for `weights`.

    Raises:
        ModelError: the base or the device cannot be had.
        AdapterError: the adapter does not fit the base.
    """
    where = choose_device(device)
    dtype = compute_dtype(mixed_precision, where)
    model, tokenizer = load_model(model_name)
    if weights:
        checkpoint.load_adapter(weights, model, adapter)
        if dtype == torch.float32:
            merge_lora(model)
    # Before the freeze: it leaves what requires gradients, LoRA's weights, in fp32.
    cast_towers(model, dtype)
    model.requires_grad_(False).to(where).eval()
    return Forward(model, tokenizer, geometry_cls, dtype)


def detect(
    outputs: dict[str, torch.Tensor],
    rows: list[int],
    category_ids: list[int],
    original_size: tuple[int, int],
    max_detections: int,
    score_threshold: float,
    floor: float = 0.0,
) -> Detections:
    """The detections of one image from the outputs for some of its rows.

    Args:
        outputs: of `Forward.predict`.
        rows: which of the outputs' rows are this image's.
        category_ids: category of each of these rows.
        original_size: (H, W) of the photo, pixels.
        max_detections, score_threshold: as for `metrics.select_detections`.
        floor: no mask is drawn, and no detection returned, below this score.

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
        score_threshold,
    )
    kept = found["score"] >= floor
    found = {name: values[kept] for name, values in found.items()}
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


def detect_more(
    earlier: Detections | None,
    outputs: dict[str, torch.Tensor],
    rows: list[int],
    category_ids: list[int],
    original_size: tuple[int, int],
    max_detections: int,
    score_threshold: float,
) -> Detections:
    """The detections of an image's earlier rows, if any, joined with those of some more; arguments
    as for `detect`, result as of `join_detections`."""
    floor = 0.0
    if earlier and len(earlier["score"]) >= max_detections:
        # Below, a detection is neither found nor among the best: it needs no mask.
        floor = min(score_threshold, earlier["score"][max_detections - 1])
    limits = max_detections, score_threshold
    new = detect(outputs, rows, category_ids, original_size, *limits, floor)
    return join_detections([earlier, new] if earlier else [new], *limits)


def join_detections(
    parts: list[Detections], max_detections: int, score_threshold: float
) -> Detections:
    """The detections of an image whose rows came in several parts, best first; limits as for
    `metrics.select_detections`."""
    scores = np.concatenate([p["score"] for p in parts])
    order = rank_scores(scores, max_detections, score_threshold)
    names = ("category_id", "score", "boxes_xyxy")
    joined: Detections = {n: np.concatenate([p[n] for p in parts])[order] for n in names}
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
    """Metrics and mean losses of a split.

    Several processes evaluate a part each, and all return what all have found.

    Args:
        forward, criterion, count, max_rows: as for `engine.evaluate`; the model is in eval mode.
        batches: of a `PromptDataset` with `train=False`: every category on every image of `split`,
            or on this process's part of them.
        split: the ground truth.
        max_detections: so many of an image, over all its prompts, AP reads.
        score_threshold: of the other metrics, which read every detection of at least this score.

    Returns:
        (summary, results): `DetectionAccumulator.summary` with `losses`, the images' mean of every
        loss term, and `iou` of the queries matched to objects, None without any; all detections as
        COCO results.

    Raises:
        LossError: a loss is not finite.
    """
    found: dict[int, Detections] = {}
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, int] = defaultdict(int)
    # Point sampling draws random numbers: those of training go on as if nothing had been evaluated.
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(gpus):
        for chunk in engine.evaluate(forward, criterion, count, batches, max_rows):
            _add_chunk(found, chunk, max_detections, score_threshold)
            _add_losses(sums, weights, chunk)
    sums, weights = processes.total(sums), processes.total(weights)
    # Without any object there is no IoU.
    means = {name: value / weights[name] if weights[name] else None for name, value in sums.items()}
    summary, results = summarize(found, split, max_detections, score_threshold)
    return {**summary, "losses": means}, results


def _add_losses(sums: dict[str, float], weights: dict[str, int], chunk: dict[str, Any]) -> None:
    """Adds a chunk of `engine.evaluate` to the sums of loss terms and what these are divided by."""
    for name, value in chunk["losses"].items():
        # A term is a mean over its batch: of objects for the IoU, else of the batch's rows.
        kind = "masked_targets" if "loss_mask" in chunk["losses"] else "targets"
        objects = chunk["counts"][kind]
        weight = objects if name == "iou" else len(chunk["batch"]["image_ids"])
        sums[name] += value * weight
        if chunk["rows"].start == 0:
            weights[name] += weight


def summarize(
    found: dict[int, Detections], split: CocoSplit, max_detections: int, score_threshold: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of a split, and all detections as COCO results.

    Args:
        found: of each image, by its id; of several processes, those of this one's part.
        split: the ground truth.
        max_detections, score_threshold: as for `evaluate_split`.
    """
    by_image = {image_id: own for part in processes.gather(found) for image_id, own in part.items()}
    accumulator = DetectionAccumulator(score_threshold, max_detections)
    for image_id in (image["id"] for image in split.images if image["id"] in by_image):
        accumulator.add_image(image_id, by_image[image_id])
    return accumulator.summary(split), accumulator.results()


def _add_chunk(
    found: dict[int, Detections], chunk: dict[str, Any], max_detections: int, score_threshold: float
) -> None:
    """Adds a chunk of `engine.evaluate` to its images' detections so far, by image id."""
    batch, rows = chunk["batch"], chunk["rows"]
    categories, images = batch["category_ids"][rows], batch["image_index"][rows].tolist()
    limits = max_detections, score_threshold
    for position in dict.fromkeys(images):
        own = [row for row, image in enumerate(images) if image == position]
        size, image_id = batch["original_sizes"][position], batch["image_ids"][position]
        own_categories = [categories[row] for row in own]
        earlier = found.get(image_id)
        found[image_id] = detect_more(earlier, chunk["outputs"], own, own_categories, size, *limits)


def validation_figures(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures that the log keeps of a validation, on masks where there are any; an evaluation
    in tiles has no `loss` and no `iou`."""
    geometry = summary["segm"] or summary["bbox"]
    return {
        **{name: summary["losses"][name] for name in ("loss", "iou") if summary["losses"]},
        "ap": geometry["AP"],
        "ap50": geometry["AP50"],
        "cgf1": summary["cgf1"]["cgF1"],
        "false_positive_rate": summary["false_positive_rate"],
    }


def rank(figures: dict[str, Any], metric: str) -> list[float]:
    """What tells the better of two `validation_figures`: the larger list, by one of them first.

    Early figures tie at 0 or are undefined; the lower loss decides then.
    """
    chosen = -figures["loss"] if metric == "loss" else figures[metric]
    return [-1.0 if chosen is None else chosen, -figures["loss"]]


def describe(figures: dict[str, Any]) -> str:
    """Named figures on one line, without those that are undefined."""
    # IoU of the query matched to each object, whatever its score: not evaluation's IoUs.
    names = {"iou": "matched IoU"}
    parts = (f"{names.get(k, k)} {v:.4g}" for k, v in figures.items() if v is not None)
    return ", ".join(parts)
