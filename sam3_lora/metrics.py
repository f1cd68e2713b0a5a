"""Metrics of a split: COCO AP, cgF1, object IoU, false positives on absent prompts.

Every category is prompted on every image. One score serves all metrics,
`sigmoid(logit) * sigmoid(presence)`, but they read it differently:

    AP            no threshold: the ranking of an image's best 100 detections over all its prompts
    the others    every detection of score >= 0.5, however many, matched one to one (Hungarian,
                  highest total IoU)

A *pair* is (image, category): positive if the image has an object of the category, else
negative. cgF1 = pmF1 (how well positive pairs are detected) x IL_MCC (whether prompts fire on
the right images). Undefined figures are None, such as cgF1 without negative pairs.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from sam3_lora.coco import CocoSplit, mask_iou, to_rle

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
IOU_50, IOU_75 = 0, 5  # indices into IOU_THRESHOLDS
OBJECT_EPS = 1e-4  # cgf1_eval.py, in the denominators over objects
PAIR_EPS = 1e-6  # cgf1_eval.py, in the denominators over pairs
ALL_AREAS = [0.0, 1e10]  # pixels^2, COCOeval's range "all"

# Of one image: what `select_detections` returns, and "rles", a compressed mask of the image's size
# for each, or None.
Detections = dict[str, Any]


def select_detections(
    logits: Any,
    presence: Any,
    boxes_cxcywh: Any,
    category_ids: Any,
    original_size: tuple[int, int],
    max_detections: int,
    score_threshold: float,
) -> dict[str, np.ndarray]:
    """The detections of one image, over all its prompts, that some metric reads; without masks.

    Args:
        logits: (B, Q) of the last decoder layer, tensor or array; the B rows of one image.
        presence: (B,) presence logits.
        boxes_cxcywh: (B, Q, 4) in 0..1 of the model's canvas (the plainly resized image).
        category_ids: (B,) category of each row.
        original_size: (H, W) of the image, pixels.
        max_detections: so many of the highest scores are kept, whatever they are,
        score_threshold: and every one of at least this score.

    Returns:
        "row", "query", "category_id" (n,) int; "score" (n,) in 0..1, falling; "boxes_xyxy"
        (n, 4) pixels of the original image, not clipped, as upstream.

    Source: eval/postprocessors.py (score, scaling), eval/coco_writer.py (best over prompts).
    """
    scores = _sigmoid(_numpy(logits)) * _sigmoid(_numpy(presence))[:, None]  # (B, Q)
    best = rank_scores(scores.ravel(), max_detections, score_threshold)
    row, query = np.unravel_index(best, scores.shape)
    cx, cy, w, h = np.moveaxis(_numpy(boxes_cxcywh)[row, query], -1, 0)  # (n,) each
    boxes = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], axis=-1)
    return {
        "row": row,
        "query": query,
        "category_id": np.asarray(category_ids, dtype=np.int64)[row],
        "score": scores[row, query],
        "boxes_xyxy": boxes * np.tile(original_size[::-1], 2),
    }


def rank_scores(scores: np.ndarray, max_detections: int, score_threshold: float) -> np.ndarray:
    """Indices of the highest `max_detections` scores and of all >= the threshold, falling."""
    count = max(max_detections, int((scores >= score_threshold).sum()))
    return np.argsort(-scores, kind="stable")[:count]


def _numpy(values: Any) -> np.ndarray:
    """A tensor of any device and dtype, or an array, as float64."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function, exact for large negative logits too: they are ranked."""
    return np.exp(-np.logaddexp(0.0, -x))


def coco_results(image_id: int, found: Detections) -> list[dict]:
    """The detections of one image as COCO results.

    Returns:
        One dict a detection: image_id, category_id, bbox (xywh, pixels), score and, where there
        are masks, segmentation (compressed RLE).
    """
    results, rles = [], found["rles"]
    for i, (x1, y1, x2, y2) in enumerate(np.asarray(found["boxes_xyxy"]).tolist()):
        result = {
            "image_id": int(image_id),
            "category_id": int(found["category_id"][i]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(found["score"][i]),
        }
        results.append(result if rles is None else {**result, "segmentation": rles[i]})
    return results


def coco_ap(split: CocoSplit, results: list[dict], iou_type: str) -> dict[str, Any]:
    """COCO average precision by pycocotools, all areas.

    Args:
        split: the ground truth. Crowds are regions to ignore, as in pycocotools; for masks,
            so are the boxes of objects that have no mask.
        results: COCO results (see `coco_results`) on images of the split, possibly none; all of
            them count, so cut each image's to its best before.
        iou_type: "bbox", or "segm" where each result has a "segmentation".

    Returns:
        "AP" (mean over IoU 0.50 to 0.95), "AP50", "AP75", each in 0..1, or None with no
        object to find; "per_category", a list in the split's order of dicts {category_id,
        name, prompt, objects, AP, AP50}, where objects counts those that are not crowds.
    """
    precision = _precision(split, results, iou_type)
    columns = {category_id: k for k, category_id in enumerate(sorted(split.categories))}
    objects = Counter(a["category_id"] for _, a in _annotations(split) if not a["iscrowd"])
    per_category = [
        {
            "category_id": category_id,
            "name": name,
            "prompt": split.phrase(category_id),
            "objects": objects[category_id],
            "AP": _mean(precision[:, :, columns[category_id]]),
            "AP50": _mean(precision[IOU_50, :, columns[category_id]]),
        }
        for category_id, name in split.categories.items()
    ]
    totals = {"AP": precision, "AP50": precision[IOU_50], "AP75": precision[IOU_75]}
    return {**{name: _mean(p) for name, p in totals.items()}, "per_category": per_category}


def _annotations(split: CocoSplit) -> Iterator[tuple[dict, dict]]:
    """Each (image, annotation) of the split."""
    return ((image, a) for image in split.images for a in split.annotations[image["id"]])


def _precision(split: CocoSplit, results: list[dict], iou_type: str) -> np.ndarray:
    """COCOeval's precision (10 IoUs, 101 recalls, categories by id); -1 is undefined."""
    evaluation = match_coco(split, results, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    return evaluation.eval["precision"][..., 0, 0]


def match_coco(split: CocoSplit, results: list[dict], iou_type: str) -> COCOeval:
    """Matches COCO results to the objects, as for `coco_ap`; its `evalImgs` hold the matches."""
    truth = []
    for image, a in _annotations(split):
        entry = {**a, "image_id": image["id"]}
        if iou_type == "segm" and a["segmentation"]:
            entry["segmentation"] = to_rle(a["segmentation"], image["height"], image["width"])
        elif iou_type == "segm":
            x, y, w, h = a["bbox"]
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            entry["iscrowd"] = 1
        truth.append(entry)
    found = [{**r, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(_coco_index(split, truth), _coco_index(split, found), iou_type)
        evaluation.params.maxDets = [max(len(found), 1)]  # per image and category: no limit
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [ALL_AREAS], ["all"]
        evaluation.evaluate()
    return evaluation


def _coco_index(split: CocoSplit, annotations: list[dict]) -> COCO:
    """A pycocotools index in memory. Ids are counted from 1: COCOeval reads 0 as unmatched."""
    coco = COCO()
    coco.dataset = {
        "images": split.images,
        "categories": [{"id": i, "name": name} for i, name in split.categories.items()],
        "annotations": [{**a, "id": i} for i, a in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _mean(precision: np.ndarray) -> float | None:
    """Mean over what is defined, None where nothing is."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def box_iou(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> np.ndarray:
    """IoU (n, m) of boxes (n, 4) and (m, 4); 0 for boxes without area."""
    a, b = a_xyxy[:, None], b_xyxy[None]  # (n, 1, 4), (1, m, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = sides.clip(min=0).prod(axis=-1)  # (n, m)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).clip(min=0).prod(axis=-1) for x in (a, b))
    union = area_a + area_b - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def matched_iou(iou: np.ndarray) -> np.ndarray:
    """IoUs (min(n_dt, n_gt),) of the one-to-one matches with the highest total IoU."""
    return iou[linear_sum_assignment(-iou)]


def mean_object_iou(ious: Iterable[np.ndarray]) -> float | None:
    """Mean over the objects of all pairs (see `cgf1`) of the matched IoU, 0 where missed."""
    sums = np.array([(matched_iou(iou).sum(), iou.shape[1]) for iou in ious]).reshape(-1, 2)
    total, objects = sums.sum(axis=0).tolist()
    return total / objects if objects else None


def cgf1(ious: Iterable[np.ndarray]) -> dict[str, Any]:
    """cgF1 and its parts, with the official evaluator's names and formulas.

    Args:
        ious: one (n_dt, n_gt) matrix a pair, empty pairs (0, 0) included: IoU of its
            detections of score >= threshold with its objects.

    Returns:
        "cgF1", "precision", "recall", "F1", "positive_macro_F1", "positive_micro_F1",
        "positive_micro_precision": mean over IoU 0.50 to 0.95, and each with "@0.5" and
        "@0.75"; "pmF1", short for positive_micro_F1; "IL_precision", "IL_recall", "IL_F1",
        "IL_FPR", "IL_MCC" over pairs; "positive_pairs", "negative_pairs". None is undefined:
        cgF1 and IL_MCC without positive or without negative pairs, IL_FPR without negative
        pairs, all else without positive pairs.

    Source: facebookresearch/sam3 eval/cgf1_eval.py, `CGF1Eval`.
    """
    n_dt, n_gt, hits = count_hits(ious)
    both = (n_dt > 0) & (n_gt > 0)
    fired, positive = n_dt > 0, n_gt > 0
    cells = (fired & positive, fired & ~positive, ~fired & positive, ~fired & ~positive)
    pairs = pair_figures(*(float(cell.sum()) for cell in cells))
    precision = hits.sum(axis=0) / (n_dt.sum() + OBJECT_EPS)  # (10,)
    pm_precision = hits.sum(axis=0) / (n_dt[both].sum() + OBJECT_EPS)
    recall = hits.sum(axis=0) / (n_gt.sum() + OBJECT_EPS)
    pm_f1 = f1(pm_precision, recall, OBJECT_EPS)
    local = [hits[both] / (n[both, None] + OBJECT_EPS) for n in (n_dt, n_gt)]
    curves = {
        "cgF1": pm_f1 * pairs["IL_MCC"],
        "precision": precision,
        "recall": recall,
        "F1": f1(precision, recall, OBJECT_EPS),
        "positive_macro_F1": f1(*local, OBJECT_EPS).sum(axis=0) / max(both.sum(), 1),
        "positive_micro_F1": pm_f1,
        "positive_micro_precision": pm_precision,
    }
    figures = {"pmF1": float(pm_f1.mean()), **pairs}
    for at, where in (("", slice(None)), ("@0.5", IOU_50), ("@0.75", IOU_75)):
        figures |= {name + at: float(curve[where].mean()) for name, curve in curves.items()}
    positives, negatives = int((n_gt > 0).sum()), int((n_gt == 0).sum())
    undefined = set() if positives else set(figures) - {"IL_FPR"}
    if not negatives:
        undefined |= {"cgF1", "cgF1@0.5", "cgF1@0.75", "IL_MCC", "IL_FPR"}
    figures |= dict.fromkeys(undefined)
    return {**figures, "positive_pairs": positives, "negative_pairs": negatives}


def count_hits(ious: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of P pairs (see `cgf1`): detections (P,), objects (P,), matches at each IoU (P, 10)."""
    ious = list(ious)
    n_dt, n_gt = np.array([iou.shape for iou in ious], dtype=np.int64).reshape(-1, 2).T
    hits = np.array([(matched_iou(iou)[:, None] >= IOU_THRESHOLDS).sum(axis=0) for iou in ious])
    return n_dt, n_gt, hits.reshape(-1, len(IOU_THRESHOLDS))


def pair_figures(tp: Any, fp: Any, fn: Any, tn: Any) -> dict[str, Any]:
    """The IL ("image level") figures: whether prompts fire on the right images, from the numbers
    of pairs, floats or arrays of them."""
    precision, recall = tp / (tp + fp + PAIR_EPS), tp / (tp + fn + PAIR_EPS)
    scale = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    return {
        "IL_precision": precision,
        "IL_recall": recall,
        "IL_F1": f1(precision, recall, PAIR_EPS),
        "IL_FPR": fp / (fp + tn + PAIR_EPS),
        "IL_MCC": (tp * tn - fp * fn) / (scale + PAIR_EPS),
    }


def f1(precision: Any, recall: Any, eps: float) -> Any:
    """Harmonic mean, with the evaluator's eps in its denominator."""
    return 2 * precision * recall / (precision + recall + eps)


class DetectionAccumulator:
    """Collects the detections of a split, image by image, and sums them up."""

    def __init__(self, score_threshold: float, max_detections: int) -> None:
        """Takes the lowest score that counts as found, and how many of an image AP reads."""
        self.score_threshold = score_threshold
        self.max_detections = max_detections
        self._images: dict[int, Detections] = {}

    def add_image(self, image_id: int, found: Detections) -> None:
        """Adds an image, once, even when it has no detections.

        Args:
            image_id: id in the split.
            found: chosen by the same two limits; an image with detections and without masks leaves
                the split without mask metrics.

        Raises:
            ValueError: the image was added before, or the masks are not one a detection.
        """
        rles, expected = found["rles"], len(found["score"])
        if image_id in self._images:
            raise ValueError(f"image {image_id} was added before; add each image once")
        if rles is not None and len(rles) != expected:
            raise ValueError(f"image {image_id}: expected {expected} masks, found {len(rles)}")
        self._images[image_id] = found

    def results(self, most: int | None = None) -> list[dict]:
        """All detections, or the `most` best of each image, as COCO results."""
        rows = (coco_results(image_id, found) for image_id, found in self._images.items())
        return [r for own in rows for r in sorted(own, key=lambda r: -r["score"])[:most]]

    def summary(self, split: CocoSplit) -> dict[str, Any]:
        """All metrics of the split, over every image of it x every category.

        Args:
            split: the ground truth. To sum up fewer images, give a split whose `images`
                is cut: `dataclasses.replace(split, images=split.images[:n])`.

        Returns:
            "bbox" and "segm" (`coco_ap`; segm None without masks), "cgf1" (`cgf1` with
            "iou_type": "segm" if every object has a mask, else "bbox"), "mask_iou" and
            "box_iou" (`mean_object_iou`), "false_positive_rate" (share of pairs without any
            annotation that have a detection of score >= threshold), "score_threshold" and
            "counts". Undefined is None.

        Raises:
            ValueError: the images added are not those of the split, a detection's category
                is not in the split, or a mask has another size than its image.
        """
        self._check(split)
        objects = [a for _, a in _annotations(split) if not a["iscrowd"]]
        with_mask = sum(bool(a["segmentation"]) for a in objects)
        masks_made = all(
            found["rles"] is not None or not len(found["score"]) for found in self._images.values()
        )
        use_masks = bool(with_mask and masks_made)
        box_ious = list(self.pair_ious(split, "bbox"))
        mask_ious = list(self.pair_ious(split, "segm")) if use_masks else []
        cgf1_on_masks = use_masks and with_mask == len(objects)
        ranked = self.results(self.max_detections)
        fired, absent = self.count_absent(split).sum(axis=0).tolist()
        return {
            "bbox": coco_ap(split, ranked, "bbox"),
            "segm": coco_ap(split, ranked, "segm") if use_masks else None,
            "cgf1": {
                "iou_type": "segm" if cgf1_on_masks else "bbox",
                **cgf1(mask_ious if cgf1_on_masks else box_ious),
            },
            "mask_iou": mean_object_iou(mask_ious),
            "box_iou": mean_object_iou(box_ious),
            "false_positive_rate": fired / absent if absent else None,
            "score_threshold": self.score_threshold,
            "counts": {
                "images": len(split.images),
                "objects": len(objects),
                "objects_with_mask": with_mask,
                "detections": sum(len(iou) for iou in box_ious),
                "absent_pairs": absent,
                "false_positive_pairs": fired,
            },
        }

    def _check(self, split: CocoSplit) -> None:
        """Refuses what would make a metric silently wrong."""
        sizes = {image["id"]: [image["height"], image["width"]] for image in split.images}
        if differing := sizes.keys() ^ self._images.keys():
            raise ValueError(
                f"expected add_image for each of the split's {len(sizes)} images, found "
                f"{len(self._images)} (see id {min(differing)}); cut split.images to those added"
            )
        for image_id, found in self._images.items():
            if strangers := set(np.asarray(found["category_id"]).tolist()) - set(split.categories):
                raise ValueError(f"image {image_id}: no category {min(strangers)} in the split")
            for rle in found["rles"] or []:
                if list(rle["size"]) != sizes[image_id]:
                    wanted = f"expected a mask of (H, W) {sizes[image_id]}"
                    raise ValueError(f"image {image_id}: {wanted}, found {rle['size']}")

    def pair_ious(self, split: CocoSplit, iou_type: str) -> Iterator[np.ndarray]:
        """IoU matrix of each pair: detections >= threshold x objects (for masks, with one)."""
        for image in split.images:
            found = self._images[image["id"]]
            kept = np.flatnonzero(np.asarray(found["score"]) >= self.score_threshold)
            kept_categories = np.asarray(found["category_id"])[kept]
            objects = [a for a in split.annotations[image["id"]] if not a["iscrowd"]]
            if iou_type == "segm":
                objects = [a for a in objects if a["segmentation"]]
            for category_id in split.categories:
                dt = kept[kept_categories == category_id]
                gt = [a for a in objects if a["category_id"] == category_id]
                if not len(dt) or not gt:
                    yield np.zeros((len(dt), len(gt)))
                elif iou_type == "segm":
                    truth = [to_rle(a["segmentation"], image["height"], image["width"]) for a in gt]
                    yield mask_iou([found["rles"][i] for i in dt], truth)
                else:
                    corners = np.array([a["bbox"] for a in gt], dtype=np.float64)
                    corners[:, 2:] += corners[:, :2]  # xywh to xyxy
                    yield box_iou(np.asarray(found["boxes_xyxy"])[dt], corners)

    def count_absent(self, split: CocoSplit) -> np.ndarray:
        """Absent prompts that fired, and all absent prompts, of each image, (images, 2); a crowd
        makes a prompt present."""
        counts = []
        for image in split.images:
            found = self._images[image["id"]]
            kept = np.asarray(found["score"]) >= self.score_threshold
            fired = set(np.asarray(found["category_id"])[kept].tolist())
            present = {a["category_id"] for a in split.annotations[image["id"]]}
            absent = split.categories.keys() - present
            counts.append((len(absent & fired), len(absent)))
        return np.array(counts, dtype=np.int64).reshape(-1, 2)
