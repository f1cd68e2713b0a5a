"""Meta's SAM 3 training loss: terms and weights.

One row is one (image, prompt) pair; B rows, Q queries, G_b targets in row b, L decoder layers.
Every layer is matched and supervised by boxes, classification and presence, the last one by masks
too; the one-to-many branch repeats all but presence with weight 2. The total is

    sqrt(B) * sum over terms of weight * term

where every mean is taken over counts of the whole optimizer step (`count_targets`), so that a step
in k micro-batches has the gradient of the step in one.

What is decided (which rows have objects, masks, all of them) is read from the targets on the CPU:
a value read from a GPU would wait for it. The matchers alone do so, once.

Source: facebookresearch/sam3 @99d02f2, sam3/train/loss/{loss_fns,sam3_loss}.py, and the weights of
its roboflow_v100 fine-tuning configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from sam3_lora.matching import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    Matches,
    box_iou,
    match_queries,
    matches_to_device,
    to_device,
    to_xyxy,
)

# Weight of each term in the total (roboflow_v100_full_ft_100_images.yaml).
WEIGHTS = {
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_ce": 20.0,
    "presence_loss": 20.0,
    "loss_mask": 200.0,
    "loss_dice": 10.0,
    "loss_semantic_seg": 20.0,
    "loss_semantic_dice": 30.0,
}
ONE_TO_MANY_WEIGHT = 2.0
SEMANTIC_ALPHA = 0.6
# Target of a matched query: p^0.25 IoU^0.75, at least 0.01 (IABCE).
TARGET_ALPHA, TARGET_MIN = 0.25, 0.01
# The same from random weights: p says nothing yet, IoU^0.5 rises sooner.
SCRATCH_ALPHA = 0.5
# Point sampling of masks (PointRend): points, oversampling, share taken where masks are uncertain.
MASK_POINTS, POINT_OVERSAMPLE, POINT_IMPORTANCE = 12_544, 3, 0.75
# Masks compared at once: bounds memory, a dozen maps of each, 0.4 GB at 1008 pixels.
MASKS_AT_ONCE = 8

# All pairs of a branch on the device: layers, rows, queries and targets (M,), as in
# `matching.Matches`.
Match = tuple[torch.Tensor, ...]
Targets = list[dict[str, torch.Tensor]]


def count_targets(targets: Targets) -> dict[str, int]:
    """The counts that the loss of a step is divided by; add them up over its micro-batches.

    Args:
        targets: as for `compute_losses`.

    Returns:
        `targets`: objects; `masked_targets`: those with a mask; `rows`; `semantic_rows`: rows with
        objects of which the union of masks is known.
    """
    return {
        "targets": sum(len(t["boxes_cxcywh"]) for t in targets),
        "masked_targets": sum(int(t["has_mask"].numpy().sum()) for t in targets),
        "rows": len(targets),
        "semantic_rows": sum(_knows_union(t) for t in targets),
    }


def _knows_union(target: dict[str, torch.Tensor]) -> bool:
    """Whether a row has objects, a mask for each, and none of its prompt's was left out."""
    has_mask = target["has_mask"].numpy()
    return len(has_mask) > 0 and bool(has_mask.all()) and bool(target["complete"].numpy())


def compute_losses(
    outputs: dict[str, torch.Tensor],
    targets: Targets,
    counts: dict[str, int],
    pos_weight: float = 10.0,
    mask_loss: str = "full",
    weights: Mapping[str, float] = WEIGHTS,
    from_scratch: bool = False,
) -> dict[str, torch.Tensor]:
    """Every term of the loss for some rows, and their weighted total.

    Args:
        outputs: `logits` (L,B,Q), `boxes_cxcywh` (L,B,Q,4), `presence` (L,B); with masks
            `mask_embed` (B,Q,C), `pixel_embed` (B,C,h,w), `semantic` (B,h,w); with the one-to-many
            branch `o2m_logits`, `o2m_boxes_cxcywh`, `o2m_mask_embed`.
        targets: B dicts on the CPU, as `PromptDataset` gives.
        counts: `count_targets` summed over the whole optimizer step.
        pos_weight: weight of matched queries in the classification term.
        mask_loss: `full` compares at the targets' S pixels, `native` at the prediction's h pixels,
            `points` at 12,544 sampled points.
        weights: of the terms in the total; a term that is not named adds nothing.
        from_scratch: for a model that finds nothing yet, where Meta's recipe, made for a trained
            one, stays with empty masks: the one-to-many branch keeps the Hungarian match too, a
            matched query's goal is IoU^0.5, and classification is a mean over targets.

    Returns:
        Unweighted scalar terms, fp32: the last layer's under their plain names, the others' with
        `_aux_<layer>`, the one-to-many branch's with `_o2m`; `loss`, the total; `iou`, the mean IoU
        of the matched queries: of boxes without mask outputs, else of masks, if the step has any.
    """
    device = outputs["logits"].device
    sizes = [len(t["boxes_cxcywh"]) for t in targets]
    objects = to_device(torch.cat([t["boxes_cxcywh"] for t in targets]), device)
    keep = to_device(torch.tensor([float(size > 0) for size in sizes]), device)
    classify = partial(_classification, pos_weight=pos_weight, from_scratch=from_scratch)
    with torch.autocast(device.type, enabled=False):
        found = match_queries(outputs, objects, sizes, from_scratch)
        losses: dict[str, torch.Tensor] = {}
        for branch, match in matches_to_device(found, device).items():
            losses |= _query_terms(outputs, branch, match, objects, keep, counts, classify)
        if "mask_embed" in outputs:
            losses |= _all_mask_terms(outputs, targets, found, counts, mask_loss)
        losses["loss"] = total_loss(losses, counts, weights)
    return losses


def _query_terms(
    outputs: dict[str, torch.Tensor],
    branch: str,
    match: Match,
    objects: torch.Tensor,
    keep: torch.Tensor,
    counts: dict[str, int],
    classify: Callable[..., torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Box, classification and (but for the one-to-many branch) presence terms of every layer.

    All layers at once: on a GPU the number of operations is what these terms cost.
    """
    logits = outputs[branch + "logits"].float()  # (L,B,Q)
    predicted = outputs[branch + "boxes_cxcywh"].float()[match[:3]]  # (M,4)
    wanted = objects[match[3]]
    iou, giou = box_iou(to_xyxy(predicted), to_xyxy(wanted))
    pairs = torch.stack([(predicted - wanted).abs().sum(-1), 1 - giou, iou.detach()])
    of_layer = match[0][:, None] == torch.arange(len(logits), device=logits.device)  # (M,L)
    # A product sums in a fixed order, which index_add on a GPU does not.
    bbox, giou, mean_iou = pairs @ of_layer.float() / max(counts["targets"], 1)  # (L,) each
    ce = classify(logits, match[:3], iou, keep, counts)
    terms = {"loss_bbox": bbox, "loss_giou": giou, "loss_ce": ce}
    if not branch:
        terms["presence_loss"] = _presence(outputs["presence"].float(), keep, counts)
    suffixes = [f"_aux_{layer}" for layer in range(len(logits) - 1)] + [""]
    of_branch = "_o2m" if branch else ""
    named = {
        term + suffix + of_branch: value
        for term, values in terms.items()
        for suffix, value in zip(suffixes, values.unbind(), strict=True)
    }
    return named if branch or "mask_embed" in outputs else named | {"iou": mean_iou[-1]}


def total_loss(
    losses: dict[str, torch.Tensor],
    counts: dict[str, int],
    weights: Mapping[str, float] = WEIGHTS,
) -> torch.Tensor:
    """sqrt(B) times the weighted sum of the terms; B is the number of rows in the whole step."""
    scale = math.sqrt(max(counts["rows"], 1))
    shares = {}
    for name in losses:
        term = name.split("_aux_")[0].removesuffix("_o2m")
        if term in weights:
            shares[name] = scale * weights[term] * (ONE_TO_MANY_WEIGHT if "_o2m" in name else 1.0)
    terms = torch.stack([losses[name] for name in shares])
    return terms @ to_device(torch.tensor(list(shares.values())), terms.device)


def _classification(
    logits: torch.Tensor,
    pairs: tuple[torch.Tensor, ...],
    iou: torch.Tensor,
    keep: torch.Tensor,
    counts: dict[str, int],
    pos_weight: float,
    from_scratch: bool,
) -> torch.Tensor:
    """IoU-aware binary cross-entropy of each layer (L,), mean over all B x Q queries of the step.

    Pairs are layers, rows and queries, iou their boxes' (M,). Rows without an object add no loss
    here (presence is theirs) but stay in the mean.
    """
    p = logits.sigmoid()
    goal = p[pairs] ** TARGET_ALPHA * iou ** (1 - TARGET_ALPHA)
    number = max(counts["rows"], 1) * logits.shape[-1]
    if from_scratch:
        goal, number = iou**SCRATCH_ALPHA, max(counts["targets"], 1)
    # One goal a query, also where one query serves two objects of the one-to-many branch.
    target = torch.zeros_like(logits).index_put(pairs, goal.detach().clamp(min=TARGET_MIN))
    matched = pos_weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    unmatched = p**FOCAL_GAMMA * F.softplus(logits)  # p^2 BCE(x, 0)
    loss = torch.where(target > 0, matched, unmatched)
    return (loss * keep[:, None]).sum((1, 2)) / number


def _presence(presence: torch.Tensor, keep: torch.Tensor, counts: dict[str, int]) -> torch.Tensor:
    """Is the prompt in the image? Half the cross-entropy of each layer (L,), mean over rows."""
    goal = keep.expand_as(presence)
    loss = F.binary_cross_entropy_with_logits(presence, goal, reduction="none")
    return 0.5 * loss.sum(1) / max(counts["rows"], 1)


def _all_mask_terms(
    outputs: dict[str, torch.Tensor],
    targets: Targets,
    matches: Matches,
    counts: dict[str, int],
    mask_loss: str,
) -> dict[str, torch.Tensor]:
    """Terms of the last layer's masks in both branches, and of the semantic map."""
    device = outputs["semantic"].device
    # Once for all terms, and of the rows that have any.
    masks = [
        to_device(t["masks"], device) if t["has_mask"].numpy().any() else None for t in targets
    ]
    named = _semantic(outputs["semantic"].float(), targets, masks, counts)
    for branch, layers in matches.items():
        terms = _mask_terms(outputs, branch, targets, masks, layers[-1], counts, mask_loss)
        named |= {name + ("_o2m" if branch else ""): value for name, value in terms.items()}
    return named


def _mask_terms(
    outputs: dict[str, torch.Tensor],
    branch: str,
    targets: Targets,
    masks: list[torch.Tensor | None],
    match: np.ndarray,
    counts: dict[str, int],
    mask_loss: str,
) -> dict[str, torch.Tensor]:
    """Focal and dice loss of the matched masks, summed over the step's number of targets."""
    embed, pixels = outputs[branch + "mask_embed"], outputs["pixel_embed"]
    # A zero with a gradient: rows without an object still reach every adapter.
    zero = 0.0 * (embed.sum() + pixels[..., 0, 0].float().sum())
    sums = torch.stack([zero, zero, zero.detach()])
    # Indexing row by row would fill a gradient of the whole tensor with zeros for each of them.
    embed, pixels = embed.unbind(), pixels.unbind()
    has_mask = np.concatenate([t["has_mask"].numpy() for t in targets])
    rows, queries, index = match[:, has_mask[match[2]]]
    first = np.cumsum([0, *(len(t["has_mask"]) for t in targets)])  # of each row's targets
    pairs = to_device(torch.from_numpy(np.stack([queries, index - first[rows]])), zero.device)
    for row in np.unique(rows):
        start, stop = np.searchsorted(rows, [row, row + 1])
        for query, target in pairs[:, start:stop].split(MASKS_AT_ONCE, dim=1):
            own = embed[row][query].to(pixels[row].dtype)
            logits = torch.einsum("mc,chw->mhw", own, pixels[row]).float()
            found = MaskLosses.apply(logits, masks[row][target], mask_loss, FOCAL_ALPHA)
            sums = sums + torch.stack([value.sum() for value in found])
    focal, dice, iou = sums / max(counts["targets"], 1)
    terms = {"loss_mask": focal, "loss_dice": dice}
    if not branch and counts["masked_targets"]:
        terms["iou"] = iou.detach() * counts["targets"] / counts["masked_targets"]
    return terms


class MaskLosses(torch.autograd.Function):
    """Focal loss, dice loss and IoU (m,) of logits (m,h,w) with masks (m,S,S).

    The forward pass takes the gradients as well, each a map of h x w. Autograd would keep nine
    maps of S x S, 37 MB a mask at 1008 pixels, or make them twice.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, masks: torch.Tensor, mask_loss: str, alpha: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            resized, goal = _same_size(leaf, masks, mask_loss)
        flat = resized.detach()
        focal, dice, slopes = focal_and_dice(flat, goal, alpha)
        if ctx.needs_input_grad[0]:
            back = partial(torch.autograd.grad, resized, leaf, retain_graph=True)
            ctx.save_for_backward(*(back(slope)[0] for slope in slopes))
        drawn = flat if mask_loss == "full" else _upsample(logits, masks.shape[-2:]).flatten(1)
        iou = _mask_iou(drawn > 0, masks.flatten(1))
        ctx.mark_non_differentiable(iou)
        return focal, dice, iou

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, focal: torch.Tensor, dice: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        of_focal, of_dice = ctx.saved_tensors
        gradient = focal[:, None, None] * of_focal + dice[:, None, None] * of_dice
        return gradient, None, None, None


class KeptByMasks(MaskLosses):
    """What `MaskLosses` keeps, without its work: for a prediction of memory."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(torch.empty_like(logits), torch.empty_like(logits))
        focal, dice, iou = (logits.new_empty(len(logits)) for _ in range(3))
        ctx.mark_non_differentiable(iou)
        return focal, dice, iou


def focal_and_dice(
    logits: torch.Tensor, target: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Focal loss, gamma 2 (arXiv:1708.02002), mean over pixels, and dice loss, of masks.

        focal = mean of w e^2 BCE(x, t)     w = alpha t + (1 - alpha)(1 - t),  e = p + t - 2 p t
        dice = 1 - (2 sum(p t) + 1) / (sum p + sum t + 1)

    Args:
        logits: x (m,P) fp32, p = sigmoid(x).
        target: t (m,P) fp32, 0 to 1.
        alpha: weight of foreground pixels.

    Returns:
        The two losses, each (m,), and the gradient (m,P) of each by the logits.
    """
    # In place where a map has served: passes over S x S maps are what this costs.
    p = logits.sigmoid()
    slope = torch.addcmul(p, p, p, value=-1)  # dp/dx
    top = 2 * torch.linalg.vecdot(p, target)[:, None] + 1
    bottom = p.sum(-1, keepdim=True) + target.sum(-1, keepdim=True) + 1
    dice_slope = torch.addcmul(top / bottom**2, target, 2 / bottom, value=-1).mul_(slope)
    flip = 1 - 2 * target  # de/dp
    error = torch.addcmul(target, p, flip)
    ce = F.softplus(logits).addcmul_(logits, target, value=-1)
    weight = (target * (2 * alpha - 1)).add_(1 - alpha).mul_(error).div_(logits.shape[-1])
    focal_slope = flip.mul_(2 * ce).mul_(slope).addcmul_(error, p.sub_(target)).mul_(weight)
    focal = torch.linalg.vecdot(weight, ce.mul_(error))
    return focal, (1 - top / bottom)[:, 0], (focal_slope, dice_slope)


def _same_size(
    logits: torch.Tensor, masks: torch.Tensor, mask_loss: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted logits (m,h,w) and target masks (m,S,S) as two (m,P) fp32 at the same places."""
    if mask_loss == "full":
        return _upsample(logits, masks.shape[-2:]).flatten(1), masks.flatten(1).float()
    if mask_loss == "native":
        # Area averages: a thin object stays, as a fraction, where nearest sampling would lose it.
        goal = F.interpolate(masks[:, None].float(), size=logits.shape[-2:], mode="area")
        return logits.flatten(1), goal.flatten(1)
    points = _uncertain_points(logits)
    return _sample(logits, points), _sample(masks.float(), points)


def _upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of (m,h,w) in fp32."""
    # As channels of one image: backwards three times as fast on a CPU as m images.
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def _uncertain_points(logits: torch.Tensor) -> torch.Tensor:
    """Places (m,P,2) in 0 to 1: three quarters where the logit is nearest zero, the rest
    uniform."""
    count = len(logits)
    candidates = torch.rand(count, MASK_POINTS * POINT_OVERSAMPLE, 2, device=logits.device)
    certainty = _sample(logits, candidates).abs()
    important = int(MASK_POINTS * POINT_IMPORTANCE)
    index = certainty.topk(important, dim=1, largest=False).indices
    chosen = candidates.gather(1, index[..., None].expand(-1, -1, 2))
    uniform = torch.rand(count, MASK_POINTS - important, 2, device=logits.device)
    return torch.cat([chosen, uniform], dim=1)


def _sample(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values (m,P) of maps (m,h,w) at places (m,P,2) in 0 to 1, x before y."""
    grid = 2 * points[:, :, None] - 1
    return F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0, :, 0]


def _semantic(
    semantic: torch.Tensor,
    targets: Targets,
    masks: list[torch.Tensor | None],
    counts: dict[str, int],
) -> dict[str, torch.Tensor]:
    """Focal and dice loss of the semantic map against the union of masks, mean over positive
    rows."""
    focal = dice = 0.0 * semantic[:, 0, 0].sum()
    number = max(counts["semantic_rows"], 1)
    for prediction, target, own in zip(semantic.unbind(), targets, masks, strict=True):
        if not _knows_union(target):
            continue
        union = own.any(0, keepdim=True)
        terms = MaskLosses.apply(prediction[None], union, "full", SEMANTIC_ALPHA)
        focal = focal + terms[0].sum() / number
        dice = dice + terms[1].sum() / number
    return {"loss_semantic_seg": focal, "loss_semantic_dice": dice}


def _mask_iou(drawn: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """IoU (m,) of boolean masks (m,P)."""
    both = (drawn & masks).sum(1).float()
    return both / (drawn | masks).sum(1).clamp(min=1)
