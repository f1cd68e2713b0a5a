"""Which query learns which target: Meta's two matchers, and the box arithmetic of the loss.

A GPU works ahead of Python until Python reads a value. The matchers do so once a forward:

    device   costs of every layer of both branches, for each target with its row's queries
       |     one copy, the only wait
    CPU      assignments
       |     one copy back, without a wait
    device   indices

B rows, Q queries, N targets in all rows, L decoder layers.

Source: facebookresearch/sam3 @99d02f2, sam3/train/matcher.py.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

# Hungarian matching cost (BinaryHungarianMatcherV2).
COST_BBOX, COST_CLASS, COST_GIOU = 5.0, 2.0, 2.0
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
# One-to-many matching: 0.3 p + 0.7 IoU among the best 4 queries of a target, and above 0.4.
O2M_ALPHA, O2M_THRESHOLD, O2M_TOPK = 0.3, 0.4, 4

# Matches of each layer, by the branch's prefix in the outputs: (3,M) int64, the rows, queries and
# targets of M pairs; rows ascend, a target is an index into all rows' targets.
Matches = dict[str, list[np.ndarray]]


@torch.no_grad()
def match_queries(
    outputs: dict[str, torch.Tensor],
    objects_cxcywh: torch.Tensor,
    sizes: list[int],
    from_scratch: bool = False,
) -> Matches:
    """Matches of every layer of both branches.

    One query for each target, of least cost 5 L1 + 2 focal classification - 2 GIoU; where a row has
    more targets than queries, the best Q targets. The one-to-many branch's last layer has up to 4
    queries for each target, the best by 0.3 p + 0.7 IoU, if that is above 0.4; one query may serve
    two targets.

    Args:
        outputs: `logits` (L,B,Q) and `boxes_cxcywh` (L,B,Q,4) in 0 to 1; with the one-to-many
            branch `o2m_logits` and `o2m_boxes_cxcywh`.
        objects_cxcywh: (N,4) on the same device, the targets of all rows.
        sizes: number of targets of each of the B rows.
        from_scratch: that last layer keeps its Hungarian match too.

    Returns:
        L matches for `""`, and for `o2m_` where there is that branch, on the CPU. Source:
        BinaryHungarianMatcherV2, BinaryOneToManyMatcher.
    """
    layers = len(outputs["logits"])
    branches = [branch for branch in ("", "o2m_") if branch + "logits" in outputs]
    row_of = np.arange(len(sizes)).repeat(sizes)  # (N,)
    index = to_device(torch.from_numpy(row_of), objects_cxcywh.device)
    logits, boxes = (
        torch.cat([outputs[branch + name] for branch in branches]).float()
        for name in ("logits", "boxes_cxcywh")
    )  # (L,B,Q) and (L,B,Q,4), or twice as many layers
    costs, score = _costs(logits, boxes, objects_cxcywh, index)
    # Above the fifth best, as Meta's quantile has it: of equal scores at the border none is chosen.
    best = min(O2M_TOPK + 1, score.shape[1])
    floor = score.topk(best, dim=1).values[:, -1:]
    chosen = (score > floor) & (score > O2M_THRESHOLD)
    *costs, chosen = _to_host(torch.cat([costs, chosen[None].to(costs)]))
    if len(branches) == 1:
        return {"": [_assign(cost, sizes) for cost in costs]}
    matches = [_assign(cost, sizes) for cost in (costs if from_scratch else costs[:-1])]
    target, query = np.nonzero(chosen)
    many = np.stack([row_of[target], query, target])
    if from_scratch:
        many = np.unique(np.concatenate([matches.pop(), many], axis=1), axis=1)
    return {"": matches[:layers], "o2m_": [*matches[layers:], many]}


def _costs(
    logits: torch.Tensor, boxes: torch.Tensor, objects: torch.Tensor, row_of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hungarian costs (L,N,Q), and the last layer's one-to-many score (N,Q).

    A target stands beside its row's queries, so that rows of different sizes need no padding.
    """
    p = logits.sigmoid()
    positive = -FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * F.logsigmoid(logits)
    negative = -(1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * F.logsigmoid(-logits)
    boxes, objects = boxes.index_select(1, row_of), objects[:, None]  # (L,N,Q,4), (N,1,4)
    iou, giou = box_iou(to_xyxy(boxes), to_xyxy(objects))
    cost = COST_BBOX * (boxes - objects).abs().sum(-1) - COST_GIOU * giou
    cost = cost + COST_CLASS * (positive - negative).index_select(1, row_of)
    score = O2M_ALPHA * p[-1].index_select(0, row_of) + (1 - O2M_ALPHA) * iou[-1]
    # A cost that is not a number would stop scipy; the loss itself reports it with its terms.
    return cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6), score


def _assign(cost: np.ndarray, sizes: list[int]) -> np.ndarray:
    """The assignment (3,M) of least cost (N,Q), row by row."""
    found, start = [], 0
    for row, size in enumerate(sizes):
        target, query = linear_sum_assignment(cost[start : start + size])
        found.append(np.stack([np.full_like(query, row), query, start + target]))
        start += size
    return np.concatenate(found, axis=1)


def _to_host(values: torch.Tensor) -> np.ndarray:
    """The one copy that waits for the device."""
    return values.cpu().numpy()


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that is not waited for: a GPU reads page-locked memory by itself."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def matches_to_device(
    matches: Matches, device: torch.device
) -> dict[str, tuple[torch.Tensor, ...]]:
    """Layers, rows, queries and targets (M,) of all pairs of each branch, in one copy."""
    tables = {
        branch: np.concatenate(
            [np.insert(t, 0, layer, axis=0) for layer, t in enumerate(layers)], 1
        )
        for branch, layers in matches.items()
    }
    packed = to_device(torch.from_numpy(np.concatenate(list(tables.values()), axis=1)), device)
    parts = packed.split([table.shape[1] for table in tables.values()], dim=1)
    return {branch: part.unbind() for branch, part in zip(matches, parts, strict=True)}


def to_xyxy(boxes_cxcywh: torch.Tensor) -> torch.Tensor:
    """(...,4) centre and size to corners."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def box_iou(a_xyxy: torch.Tensor, b_xyxy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU and generalised IoU of corner boxes (...,4) that broadcast."""
    a, b = a_xyxy, b_xyxy
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    # Not `prod`, of which the gradient looks for zeros and so waits for a GPU.
    intersection, hull_area = (d[..., 0] * d[..., 1] for d in (overlap.clamp(0), hull.clamp(0)))
    union = area_a + area_b - intersection
    # Padding boxes have no area; the smallest normal number keeps 0 / 0 away and changes nothing
    # else.
    tiny = torch.finfo(union.dtype).tiny
    iou = intersection / union.clamp(min=tiny)
    return iou, iou - (hull_area - union) / hull_area.clamp(min=tiny)
