"""Two models on the same images: 95 % intervals by bootstrap, and thresholds chosen on a split.

A resample draws as many images as the split has, with replacement: a weight 0, 1, 2, ... for each.
Detections are matched once. Then every figure of a resample is one of

    sums over images, weighted        cgF1 and its factors, IoU, rates
    a ranking, weighted               AP: each detection counts as often as its image was drawn

Both models are read on the same resamples, so the interval of their difference is paired. Arrays
over resamples have the split as it is first; NaN is undefined, None in what is returned for JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sam3_lora.coco import CocoSplit, mask_iou
from sam3_lora.metrics import (
    IOU_50,
    IOU_75,
    IOU_THRESHOLDS,
    OBJECT_EPS,
    DetectionAccumulator,
    count_hits,
    f1,
    match_coco,
    matched_iou,
    pair_figures,
)

PERCENTILES = (2.5, 97.5)  # of the resamples: a 95 % interval
RECALLS = np.linspace(0, 1, 101)  # COCO's
CELLS_AT_ONCE = 4_000_000  # (resample, detection) pairs in one array: bounds memory, 32 MB each
FEW_OBJECTS = 5  # of a category; a threshold chosen on fewer is flagged
# Where the best F1 of a category is lower, no threshold helps, and a low one only lets noise in.
USEFUL_F1 = 0.1

Evaluated = tuple[dict[str, Any], list[dict[str, Any]]]  # summary and COCO results, of one model


def draw_weights(images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each resample draws each image.

    Args:
        images: of the split; a single one gives no resamples, whose spread would be 0.
        resamples: how many, 0 or more.
        seed: of the draw.

    Returns:
        float64 (1 + resamples, images); the first row is the split itself, all 1.
    """
    rng = np.random.default_rng(seed)
    size = resamples if images > 1 else 0
    drawn = rng.multinomial(images, np.full(images, 1 / images), size=size)
    return np.concatenate([np.ones((1, images)), drawn])


def interval(values: np.ndarray) -> dict[str, Any]:
    """A figure and its interval, from its values over resamples.

    Returns:
        "value", or None where it is undefined; "interval" [low, high], over the resamples where it
        is defined, or None without any.
    """
    if np.isnan(values[0]):
        return {"value": None, "interval": None}
    drawn = values[1:][~np.isnan(values[1:])]
    limits = np.percentile(drawn, PERCENTILES).tolist() if len(drawn) else None
    return {"value": float(values[0]), "interval": limits}


def compare_values(base: np.ndarray, adapter: np.ndarray) -> dict[str, Any]:
    """`interval` of a figure of two models, and of the second less the first."""
    values = {"base": base, "adapter": adapter, "difference": adapter - base}
    return {name: interval(value) for name, value in values.items()}


def compare_models(
    split: CocoSplit, base: Evaluated, adapter: Evaluated, most: int, weights: np.ndarray
) -> dict[str, Any]:
    """All figures of two models on a split, with intervals.

    Args:
        split: the ground truth.
        base, adapter: `DetectionAccumulator.summary` and all detections as COCO results.
        most: detections of an image that AP reads.
        weights: from `draw_weights`.

    Returns:
        "figures": name -> `compare_values`; "per_category", in the split's order: category_id,
        name, prompt, objects, and AP and AP50 as `compare_values`, on masks where there are any;
        "per_image", in the split's order: image_id, file_name, and F1 at IoU 0.5 and mean IoU of
        "base" and "adapter", F1 None where nothing is there and nothing is found.
    """
    (own, own_categories, own_images), (new, new_categories, new_images) = (
        _measure(split, *model, most, weights) for model in (base, adapter)
    )
    objects = Counter(a["category_id"] for _, a in _objects(split))
    return {
        "figures": {name: compare_values(own[name], new[name]) for name in own},
        "per_category": [
            {
                "category_id": category_id,
                "name": name,
                "prompt": split.phrase(category_id),
                "objects": objects[category_id],
                "AP": compare_values(a.mean(axis=0), b.mean(axis=0)),
                "AP50": compare_values(a[IOU_50], b[IOU_50]),
            }
            for (category_id, name), a, b in zip(
                split.categories.items(), own_categories, new_categories, strict=True
            )
        ],
        "per_image": [
            {"image_id": image["id"], "file_name": image["file_name"], "base": a, "adapter": b}
            for image, a, b in zip(split.images, own_images, new_images, strict=True)
        ],
    }


def _objects(split: CocoSplit) -> list[tuple[int, dict[str, Any]]]:
    """Each (image id, annotation) that is not a crowd."""
    images = (image["id"] for image in split.images)
    return [(i, a) for i in images for a in split.annotations[i] if not a["iscrowd"]]


def _measure(
    split: CocoSplit,
    summary: dict[str, Any],
    results: list[dict[str, Any]],
    most: int,
    weights: np.ndarray,
) -> tuple[dict[str, np.ndarray], np.ndarray, list[dict[str, Any]]]:
    """A model's figures (R,), AP of each category (K, 10, R), and what it makes of each image."""
    found = collect(split, results, summary["score_threshold"], most)
    figures, precision = {}, np.empty(0)
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        if summary[iou_type] is None:
            names = (f"{kind} AP", f"{kind} AP50", f"{kind} AP75")
            figures |= dict.fromkeys(names, np.full(len(weights), np.nan))
            continue
        matches = match_categories(split, found.results(most), iou_type)
        precision = np.array([average_precision(own, weights) for own in matches])
        cuts = {"AP": slice(None), "AP50": [IOU_50], "AP75": [IOU_75]}
        figures |= {f"{kind} {m}": _mean(precision[:, cut], (0, 1)) for m, cut in cuts.items()}
    sums = _count_images(found, split, summary["cgf1"]["iou_type"])
    figures |= _cgf1(sums, weights)
    for name, iou_type in (("mask IoU", "segm"), ("box IoU", "bbox")):
        figures[name] = np.full(len(weights), np.nan)
        if summary[name.lower().replace(" ", "_")] is not None:
            part = _count_images(found, split, iou_type)
            figures[name] = _rate(part["iou"], part["objects"], weights)
    fired, absent = found.count_absent(split).T
    figures["false positives on absent categories"] = _rate(fired, absent, weights)
    return figures, precision, _rate_images(sums)


def collect(
    split: CocoSplit, results: list[dict[str, Any]], score_threshold: float, most: int
) -> DetectionAccumulator:
    """An accumulator that holds these COCO results of a split."""
    rows: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in split.images}
    for row in results:
        rows[row["image_id"]].append(row)
    accumulator = DetectionAccumulator(score_threshold, most)
    for image_id, own in rows.items():
        boxes = np.array([row["bbox"] for row in own], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # xywh to xyxy
        detections = {
            "category_id": np.array([row["category_id"] for row in own], dtype=np.int64),
            "score": np.array([row["score"] for row in own], dtype=np.float64),
            "boxes_xyxy": boxes,
            "rles": None,
        }
        if all("segmentation" in row for row in own):
            detections["rles"] = [row["segmentation"] for row in own]
        accumulator.add_image(image_id, detections)
    return accumulator


def match_categories(
    split: CocoSplit, results: list[dict[str, Any]], iou_type: str
) -> list[dict[str, np.ndarray]]:
    """pycocotools' matches, of each category in the split's order.

    Returns:
        Of D detections, best first: "image" (D,), position in the split, "score" (D,), "hit" and
        "ignored" (10 IoUs, D) bool; and "objects" (images,), how many of each image count.
    """
    evaluation = match_coco(split, results, iou_type)
    position = {image["id"]: index for index, image in enumerate(split.images)}
    of_category: dict[int, list[dict[str, Any]]] = {c: [] for c in split.categories}
    for entry in evaluation.evalImgs:
        if entry is not None:
            of_category[entry["category_id"]].append(entry)
    matches = []
    for entries in of_category.values():
        objects = np.zeros(len(split.images))
        for entry in entries:
            objects[position[entry["image_id"]]] = np.sum(np.asarray(entry["gtIgnore"]) == 0)
        scores = np.concatenate([np.zeros(0), *(e["dtScores"] for e in entries)])
        order = np.argsort(-scores, kind="mergesort")
        images = [np.full(len(e["dtScores"]), position[e["image_id"]]) for e in entries]
        blank = np.zeros((len(IOU_THRESHOLDS), 0))
        hit, ignored = (
            np.concatenate([blank, *(e[key] for e in entries)], axis=1)[:, order] > 0
            for key in ("dtMatches", "dtIgnore")
        )
        image = np.concatenate([np.zeros(0, int), *images])[order]
        own = {"image": image, "score": scores[order], "objects": objects}
        matches.append({**own, "hit": hit & ~ignored, "ignored": ignored})
    return matches


def average_precision(matches: Mapping[str, np.ndarray], weights: np.ndarray) -> np.ndarray:
    """AP of one category at each IoU on every resample, by COCO's 101 recalls.

    Args:
        matches: of the category, from `match_categories`.
        weights: (R, images).

    Returns:
        float64 (10, R); NaN where a resample has no object of the category. Weights of 1 give
        pycocotools' figure; whole weights that of a split with each image so many times.
    """
    image, hits, ignored = matches["image"], matches["hit"], matches["ignored"]
    objects = weights @ matches["objects"]
    values = np.zeros((len(hits), len(weights)))
    step = max(1, CELLS_AT_ONCE // max(len(image), 1))
    for start in range(0, len(weights), step):
        rows = slice(start, start + step)
        counts = weights[rows][:, image]  # (r, D)
        below = objects[rows, None].clip(min=1)
        for k, (hit, skipped) in enumerate(zip(hits, ignored, strict=True)):
            if k == 0 or (skipped != ignored[k - 1]).any():
                found = np.cumsum(counts * ~skipped, axis=1)
            true = np.cumsum(counts[:, hit], axis=1)  # (r, hits): precision can only rise here
            precision = true / (found[:, hit] + np.spacing(1))
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            reached = np.searchsorted(RECALLS, true / below, side="right")
            values[k, rows] = (best * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
    values /= len(RECALLS)
    values[:, objects == 0] = np.nan
    return values


def _mean(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Mean over axes of what is defined, NaN where nothing is."""
    count = (~np.isnan(values)).sum(axis=axes)
    total = np.nansum(values, axis=axes)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _rate(hits: np.ndarray, asked: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted share (R,) of counts (images,), NaN without any."""
    hits, asked = weights @ hits, weights @ asked
    return np.divide(hits, asked, out=np.full(len(weights), np.nan), where=asked > 0)


def _count_images(
    found: DetectionAccumulator, split: CocoSplit, iou_type: str
) -> dict[str, np.ndarray]:
    """What cgF1 and IoU sum, of each image: (images,), "hits" (images, 10)."""
    ious = list(found.pair_ious(split, iou_type))
    shape = len(split.images), len(split.categories)
    detections, objects, hits = (x.reshape(*shape, *x.shape[1:]) for x in count_hits(ious))
    fired, positive = detections > 0, objects > 0
    counts = {
        "detections": detections,
        "objects": objects,
        "hits": hits,
        "iou": np.array([matched_iou(iou).sum() for iou in ious]).reshape(shape),
        "on_positive": detections * (fired & positive),
        "tp": fired & positive,
        "fp": fired & ~positive,
        "fn": ~fired & positive,
        "tn": ~fired & ~positive,
    }
    return {name: count.sum(axis=1) for name, count in counts.items()}


def _cgf1(sums: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """cgF1 and its factors (R,), by the formulas of `metrics.cgf1`."""
    total = {name: weights @ count for name, count in sums.items()}
    precision = total["hits"] / (total["on_positive"][:, None] + OBJECT_EPS)
    recall = total["hits"] / (total["objects"][:, None] + OBJECT_EPS)
    cells = [total[name] for name in ("tp", "fp", "fn", "tn")]
    positive = (total["tp"] + total["fn"]) > 0
    pm_f1 = np.where(positive, f1(precision, recall, OBJECT_EPS).mean(axis=1), np.nan)
    both = positive & ((total["fp"] + total["tn"]) > 0)
    mcc = np.where(both, pair_figures(*cells)["IL_MCC"], np.nan)
    return {"cgF1": pm_f1 * mcc, "pmF1": pm_f1, "IL_MCC": mcc}


def _rate_images(sums: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """F1 at IoU 0.5 and mean IoU of each image."""
    rows = []
    for hits, detections, objects, iou in zip(
        *(sums["hits"][:, IOU_50], sums["detections"], sums["objects"], sums["iou"]), strict=True
    ):
        total = detections + objects
        rows.append(
            {
                "F1": float(2 * hits / total) if total else None,
                "IoU": float(iou / objects) if objects else None,
            }
        )
    return rows


def rank_images(per_image: Sequence[Mapping[str, Any]], most: int) -> tuple[list[int], list[int]]:
    """The images that the adapter does best and worst on, by F1, then IoU.

    Args:
        per_image: of `compare_models`.
        most: images in each list.

    Returns:
        (best, worst first): image ids; none is in both, and none has an undefined F1.
    """
    known = [row for row in per_image if row["adapter"]["F1"] is not None]
    known.sort(key=lambda row: (row["adapter"]["F1"], row["adapter"]["IoU"] or 0.0), reverse=True)
    ids = [row["image_id"] for row in known]
    best = ids[: min(most, (len(ids) + 1) // 2)]
    return best, ids[len(best) :][::-1][:most]


def compare_words(
    split: CocoSplit,
    base: list[dict[str, Any]],
    adapter: list[dict[str, Any]],
    words: Sequence[str],
    score_threshold: float,
    weights: np.ndarray,
) -> dict[str, Any]:
    """How often words that should find nothing do, in two models.

    Args:
        split: the images, with the words among its categories.
        base, adapter: COCO results.
        words: which of the categories' names.
        score_threshold: lowest score that counts.
        weights: from `draw_weights`.

    Returns:
        "rate", share of (image, word) pairs with a detection, as `compare_values`; "words": word ->
        images in which "base" and "adapter" find it.
    """
    fired = [_count_words(split, model, words, score_threshold) > 0 for model in (base, adapter)]
    asked = np.full(len(split.images), len(words))
    rates = [_rate(own.sum(axis=1), asked, weights) for own in fired]
    images = zip(words, *(own.sum(axis=0).tolist() for own in fired), strict=True)
    shown = {word: {"base": a, "adapter": b} for word, a, b in images}
    return {"rate": compare_values(*rates), "words": shown}


def _count_words(
    split: CocoSplit, results: list[dict[str, Any]], words: Sequence[str], score_threshold: float
) -> np.ndarray:
    """Detections of score >= threshold (images, words)."""
    column = {c: words.index(name) for c, name in split.categories.items() if name in words}
    position = {image["id"]: index for index, image in enumerate(split.images)}
    counts = np.zeros((len(split.images), len(words)), dtype=np.int64)
    for row in results:
        if row["score"] >= score_threshold and row["category_id"] in column:
            counts[position[row["image_id"]], column[row["category_id"]]] += 1
    return counts


def compare_agreement(
    split: CocoSplit,
    base: list[dict[str, Any]],
    adapter: list[dict[str, Any]],
    words: Sequence[str],
    score_threshold: float,
    weights: np.ndarray,
) -> dict[str, Any]:
    """How much of what the base finds the adapter still finds; arguments as for `compare_words`.

    Returns:
        "kept", the share of the base's detections that the adapter has at mask IoU >= 0.5, one to
        one, as `interval`; counts "base", "found", "new" (the adapter's others); "words": word ->
        these counts, of the words that either finds.
    """
    ids = {c: name for c, name in split.categories.items() if name in words}
    masks: dict[tuple, tuple[list, list]] = {}
    for side, results in enumerate((base, adapter)):
        for row in results:
            if row["score"] >= score_threshold and row["category_id"] in ids:
                key = row["image_id"], ids[row["category_id"]]
                masks.setdefault(key, ([], []))[side].append(row["segmentation"])
    position = {image["id"]: index for index, image in enumerate(split.images)}
    of_image = np.zeros((len(split.images), 2))  # found, base
    counts: dict[str, Counter] = {word: Counter() for word in words}
    for (image_id, word), (theirs, ours) in masks.items():
        found = int((matched_iou(mask_iou(theirs, ours)) >= IOU_THRESHOLDS[IOU_50]).sum())
        of_image[position[image_id]] += found, len(theirs)
        counts[word].update(base=len(theirs), found=found, new=len(ours) - found)
    names = ("base", "found", "new")
    shown = {w: {n: count[n] for n in names} for w, count in counts.items() if count.total()}
    totals = {name: sum(count[name] for count in shown.values()) for name in names}
    return {"kept": interval(_rate(*of_image.T, weights)), **totals, "words": shown}


def calibrate(
    split: CocoSplit,
    results: list[dict[str, Any]],
    iou_type: str,
    default: float,
    stored: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Each category's threshold with the highest F1 at IoU 0.5, and what it changes.

    Args:
        split: the ground truth; what is found on images without the category counts as false.
        results: all detections as COCO results.
        iou_type: "segm" or "bbox".
        default: the threshold to compare with, and that of a category without an object, or
            whose F1 is below `USEFUL_F1` at every threshold.
        stored: category name -> threshold, to be measured instead of chosen.

    Returns:
        "iou", "iou_type", "default", "F1_before" and "F1_after" over all objects, and
        "per_category": name, objects, threshold, few (too few objects to trust it), F1_before,
        F1_after; None is undefined.
    """
    rows, totals = [], np.zeros((2, 3))
    every = match_categories(split, results, iou_type)
    for name, own in zip(split.categories.values(), every, strict=True):
        chosen = _best_threshold(own, default)
        threshold = chosen if stored is None else stored.get(name, default)
        counts = np.array([_counts_at(own, value) for value in (default, threshold)])
        totals += counts
        objects = int(own["objects"].sum())
        rows.append({"name": name, "objects": objects, "threshold": threshold})
        rows[-1] |= {"few": objects < FEW_OBJECTS, **_f1_of(counts)}
    measured = {"iou": float(IOU_THRESHOLDS[IOU_50]), "iou_type": iou_type, "default": default}
    return {**measured, **_f1_of(totals), "per_category": rows}


def _counts_at(matches: Mapping[str, np.ndarray], threshold: float) -> tuple[int, int, int]:
    """Hits, detections and objects at IoU 0.5 of what scores at least the threshold."""
    kept = (matches["score"] >= threshold) & ~matches["ignored"][IOU_50]
    return (kept & matches["hit"][IOU_50]).sum(), kept.sum(), matches["objects"].sum()


def _f1_of(counts: np.ndarray) -> dict[str, float | None]:
    """F1 before and after from (2, 3) counts; None without objects and detections."""
    pairs = zip(("F1_before", "F1_after"), counts.tolist(), strict=True)
    return {
        name: 2 * hits / (n + objects) if n + objects else None
        for name, (hits, n, objects) in pairs
    }


def _best_threshold(matches: Mapping[str, np.ndarray], default: float) -> float:
    """The threshold with the highest F1: between the last score kept and the next, since at the
    last one itself a little less on other images would be lost. After the last of all it is known
    down to the default alone that nothing follows: of a crowded image only the best are told."""
    hit, kept = matches["hit"][IOU_50], ~matches["ignored"][IOU_50]
    objects = matches["objects"].sum()
    if not objects or not hit.any():
        return default
    scores = matches["score"]
    values = 2 * np.cumsum(hit) / (np.cumsum(kept) + objects)
    values[:-1][scores[:-1] == scores[1:]] = -1  # equal scores are kept together
    last = int(np.argmax(values))
    if values[last] < USEFUL_F1:
        return default
    return float(np.append(scores, min(scores[-1], default))[last : last + 2].mean())


def format_thresholds(chosen: Mapping[str, Any]) -> str:
    """`calibrate`'s thresholds of the categories with objects, as a table."""
    rows = [row for row in chosen["per_category"] if row["objects"]]
    width = max((len(row["name"]) for row in rows), default=0)
    lines = [f"{'':<{width}}  objects  threshold  F1 at {chosen['default']:g}  F1 at threshold"]
    for row in rows:
        note = f"  fewer than {FEW_OBJECTS} objects" if row["few"] else ""
        figures = f"{row['threshold']:>9.3f}  {row['F1_before']:>9.3f}  {row['F1_after']:>15.3f}"
        lines.append(f"{row['name']:<{width}}  {row['objects']:>7}  {figures}{note}")
    return "\n".join(lines)
