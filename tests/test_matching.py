"""Boxes, focal and dice loss against the libraries, and the two matchers."""

import itertools
import math

import pytest
import torch
from torchvision.ops import generalized_box_iou
from torchvision.ops import sigmoid_focal_loss as library_focal

from sam3_lora.losses import (
    dice_loss,
    hungarian_match,
    one_to_many_match,
    pairwise_giou,
    sigmoid_focal,
    to_xyxy,
)


def test_box_corners():
    boxes = torch.tensor([[[0.5, 0.25, 0.5, 0.25], [0.0, 0.0, 0.0, 0.0]]])
    expected = torch.tensor([[[0.25, 0.125, 0.75, 0.375], [0.0, 0.0, 0.0, 0.0]]])
    assert torch.equal(to_xyxy(boxes), expected)


def test_giou_equals_the_librarys():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 40, 4, generator=generator)
    b = torch.rand(3, 25, 4, generator=generator)
    iou, giou = pairwise_giou(a, b)
    for batch in range(3):
        expected = generalized_box_iou(to_xyxy(a[batch]), to_xyxy(b[batch]))
        torch.testing.assert_close(giou[batch], expected, rtol=1e-5, atol=1e-6)
    assert float(giou.min()) < -0.3 and float(giou.max()) > 0.3
    same, same_giou = pairwise_giou(a[0], a[0])
    torch.testing.assert_close(same.diagonal(), torch.ones(40))
    torch.testing.assert_close(same_giou.diagonal(), torch.ones(40))
    apart = torch.tensor([[0.1, 0.1, 0.2, 0.2]]), torch.tensor([[0.9, 0.9, 0.2, 0.2]])
    iou, giou = pairwise_giou(*apart)
    assert float(iou) == 0
    assert float(giou) == pytest.approx(-(1 - 2 * 0.04), abs=1e-6)  # a hull of side 1


def test_giou_of_boxes_without_area_is_finite():
    points = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).requires_grad_()
    iou, giou = pairwise_giou(points, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    assert float(iou) == 0 and math.isfinite(float(giou))
    giou.sum().backward()
    assert torch.isfinite(points.grad).all()


@pytest.mark.parametrize("alpha", [0.25, 0.6])
def test_focal_equals_the_librarys(alpha):
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(5, 100, generator=generator)
    target = torch.rand(5, 100, generator=generator)
    for goal in (target, (target > 0.5).float()):
        torch.testing.assert_close(
            sigmoid_focal(logits, goal, alpha), library_focal(logits, goal, alpha=alpha, gamma=2.0)
        )


def test_dice():
    logits = torch.tensor([[20.0, 20.0, -20.0, -20.0], [-20.0] * 4])
    target = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(dice_loss(logits, target), torch.tensor([1 - 3 / 5, 0.0]))


def matching_cost(logits, boxes, target):
    """The cost as the recipe states it, element by element."""
    cost = torch.zeros(len(logits), len(target), dtype=torch.float64)
    giou = generalized_box_iou(to_xyxy(boxes), to_xyxy(target))
    for q, g in itertools.product(range(len(logits)), range(len(target))):
        p = float(logits[q].double().sigmoid())
        positive = -0.25 * (1 - p) ** 2 * math.log(p)
        negative = -0.75 * p**2 * math.log(1 - p)
        l1 = float((boxes[q] - target[g]).abs().sum())
        cost[q, g] = 5 * l1 + 2 * (positive - negative) - 2 * float(giou[q, g])
    return cost


@pytest.mark.parametrize("seed", range(6))
def test_hungarian_is_the_best_of_all_assignments(seed):
    sizes = [3, 0, 1, 2]
    generator = torch.Generator().manual_seed(seed)
    targets = [{"boxes_cxcywh": 0.1 + 0.5 * torch.rand(g, 4, generator=generator)} for g in sizes]
    logits = torch.randn(3, 4, 5, generator=generator)
    boxes = 0.1 + 0.5 * torch.rand(3, 4, 5, 4, generator=generator)
    for layer, (rows, queries, objects) in enumerate(hungarian_match(logits, boxes, targets)):
        assert rows.tolist() == sorted(rows.tolist())
        assert sorted(objects.tolist()) == list(range(6))
        for row, size in enumerate(sizes):
            mine = rows == row
            # Rows are padded to the longest with boxes without size: none of them is a target.
            local = objects[mine] - sum(sizes[:row])
            assert sorted(local.tolist()) == list(range(size))
            assert len(set(queries[mine].tolist())) == size
            wanted = targets[row]["boxes_cxcywh"]
            cost = matching_cost(logits[layer, row], boxes[layer, row], wanted)
            best = min(
                sum(float(cost[q, g]) for g, q in enumerate(chosen))
                for chosen in itertools.permutations(range(5), size)
            )
            assert float(cost[queries[mine], local].sum()) == pytest.approx(best, abs=1e-5)


def test_one_query_can_serve_two_targets_of_one_to_many():
    target = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.42, 0.4], [0.1, 0.1, 0.1, 0.1]])
    targets = [{"boxes_cxcywh": torch.tensor([[0.3, 0.3, 0.2, 0.2]])}, {"boxes_cxcywh": target}]
    logits = torch.full((2, 8), -8.0)
    boxes = torch.full((2, 8, 4), 0.9)
    boxes[1, 3] = torch.tensor([0.5, 0.5, 0.41, 0.4])
    boxes[1, 5] = torch.tensor([0.8, 0.5, 0.41, 0.4])
    rows, queries, objects = one_to_many_match(logits, boxes, targets)
    # Query 5 is among the best 4 of both, and below 0.4; the third target has no query at all.
    assert (rows.tolist(), queries.tolist(), objects.tolist()) == ([1, 1], [3, 3], [1, 2])
