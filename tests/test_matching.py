"""Boxes, focal and dice loss against the libraries, and the two matchers."""

import itertools
import math

import pytest
import torch
from torchvision.ops import generalized_box_iou
from torchvision.ops import sigmoid_focal_loss as library_focal

from sam3_lora.losses import compute_losses, count_targets, focal_and_dice
from sam3_lora.matching import box_iou, match_queries, to_xyxy


def test_box_corners():
    boxes = torch.tensor([[[0.5, 0.25, 0.5, 0.25], [0.0, 0.0, 0.0, 0.0]]])
    expected = torch.tensor([[[0.25, 0.125, 0.75, 0.375], [0.0, 0.0, 0.0, 0.0]]])
    assert torch.equal(to_xyxy(boxes), expected)


def pairwise_iou(a_cxcywh, b_cxcywh):
    """IoU and generalised IoU of every pair."""
    return box_iou(to_xyxy(a_cxcywh)[..., :, None, :], to_xyxy(b_cxcywh)[..., None, :, :])


def test_giou_equals_the_librarys():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 40, 4, generator=generator)
    b = torch.rand(3, 25, 4, generator=generator)
    iou, giou = pairwise_iou(a, b)
    for batch in range(3):
        expected = generalized_box_iou(to_xyxy(a[batch]), to_xyxy(b[batch]))
        torch.testing.assert_close(giou[batch], expected, rtol=1e-5, atol=1e-6)
    assert float(giou.min()) < -0.3 and float(giou.max()) > 0.3
    same, same_giou = pairwise_iou(a[0], a[0])
    torch.testing.assert_close(same.diagonal(), torch.ones(40))
    torch.testing.assert_close(same_giou.diagonal(), torch.ones(40))
    apart = torch.tensor([[0.1, 0.1, 0.2, 0.2]]), torch.tensor([[0.9, 0.9, 0.2, 0.2]])
    iou, giou = pairwise_iou(*apart)
    assert float(iou) == 0
    assert float(giou) == pytest.approx(-(1 - 2 * 0.04), abs=1e-6)  # a hull of side 1


def test_giou_of_boxes_without_area_is_finite():
    points = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).requires_grad_()
    iou, giou = pairwise_iou(points, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    assert float(iou) == 0 and math.isfinite(float(giou))
    giou.sum().backward()
    assert torch.isfinite(points.grad).all()


@pytest.mark.parametrize("alpha", [0.25, 0.6])
@pytest.mark.parametrize("fractions", [True, False])
def test_focal_and_dice_and_their_gradients(alpha, fractions):
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(5, 100, generator=generator)).requires_grad_()
    goal = torch.rand(5, 100, generator=generator)
    goal = goal if fractions else (goal > 0.5).float()
    p = logits.sigmoid()
    # The library's, and the dice loss as it is written.
    wanted = (
        library_focal(logits, goal, alpha=alpha, gamma=2.0).mean(-1),
        1 - (2 * (p * goal).sum(-1) + 1) / (p.sum(-1) + goal.sum(-1) + 1),
    )
    *found, slopes = focal_and_dice(logits.detach(), goal, alpha)
    for value, loss, slope in zip(found, wanted, slopes, strict=True):
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(
            slope, torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]
        )


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
    objects = torch.cat([t["boxes_cxcywh"] for t in targets])
    matches = match_queries({"logits": logits, "boxes_cxcywh": boxes}, objects, sizes)
    for layer, (rows, queries, objects) in enumerate(matches[""]):
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
    objects = torch.cat([torch.tensor([[0.3, 0.3, 0.2, 0.2]]), target])
    logits = torch.full((1, 2, 8), -8.0)
    boxes = torch.full((1, 2, 8, 4), 0.9)
    boxes[0, 1, 3] = torch.tensor([0.5, 0.5, 0.41, 0.4])
    boxes[0, 1, 5] = torch.tensor([0.8, 0.5, 0.41, 0.4])
    shape = {"logits": logits, "boxes_cxcywh": boxes}
    outputs = {**shape, **{"o2m_" + k: v for k, v in shape.items()}}
    rows, queries, objects = match_queries(outputs, objects, [1, 3])["o2m_"][-1]
    # Query 5 is among the best 4 of both, and below 0.4; the third target has no query at all.
    assert (rows.tolist(), queries.tolist(), objects.tolist()) == ([1, 1], [3, 3], [1, 2])


def two_rows():
    """Outputs of one layer for a row with one object and one without; query 0 lies on the object,
    query 1 half on it, the others apart."""
    boxes = torch.tensor(
        [[0.5, 0.5, 0.4, 0.4], [0.5, 0.6, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]]
    )
    shape = {"boxes_cxcywh": boxes.expand(1, 2, 4, 4), "logits": torch.zeros(1, 2, 4)}
    outputs = {**shape, **{"o2m_" + k: v for k, v in shape.items()}, "presence": torch.zeros(1, 2)}
    targets = [
        {"boxes_cxcywh": boxes[:count], "has_mask": torch.zeros(count, dtype=torch.bool)}
        for count in (1, 0)
    ]
    return outputs, targets


def test_from_scratch_classification_is_a_mean_over_targets_with_the_root_of_iou_as_goal():
    outputs, targets = two_rows()
    outputs["logits"] = torch.tensor([[[2.0, -1.0, 0.5, 0.0]] * 2])
    outputs["boxes_cxcywh"] = outputs["boxes_cxcywh"].clone()
    outputs["boxes_cxcywh"][0, 0, 0, 2] = 0.2  # half the object: IoU 0.5
    counts = count_targets(targets)
    losses = compute_losses(outputs, targets, counts, pos_weight=3.0, from_scratch=True)
    x, p = outputs["logits"][0, 0], outputs["logits"][0, 0].sigmoid()
    matched = match_queries(outputs, targets[0]["boxes_cxcywh"], [1, 0])[""][0][1]
    iou = pairwise_iou(outputs["boxes_cxcywh"][0, 0], targets[0]["boxes_cxcywh"])[0][:, 0]
    goal = iou[matched].sqrt()
    expected = 3 * torch.nn.functional.binary_cross_entropy_with_logits(x[matched], goal)
    rest = [q for q in range(4) if q not in matched]
    expected = expected + (p[rest] ** 2 * torch.nn.functional.softplus(x[rest])).sum()
    torch.testing.assert_close(losses["loss_ce"], expected)


def test_from_scratch_one_to_many_keeps_the_hungarian_match_of_an_object_that_no_query_overlaps():
    outputs, targets = two_rows()
    outputs["o2m_boxes_cxcywh"] = torch.full((1, 2, 4, 4), 0.05)  # all far from the object
    counts = count_targets(targets)
    meta = compute_losses(outputs, targets, counts)
    scratch = compute_losses(outputs, targets, counts, from_scratch=True)
    assert float(meta["loss_bbox_o2m"]) == 0
    apart = (torch.full((4,), 0.05) - targets[0]["boxes_cxcywh"][0]).abs().sum()
    torch.testing.assert_close(scratch["loss_bbox_o2m"], apart)


def test_from_scratch_one_to_many_counts_a_query_once_that_both_matchers_choose():
    outputs, targets = two_rows()
    counts = count_targets(targets)
    meta, scratch = (
        compute_losses(outputs, targets, counts, from_scratch=choice)["loss_bbox_o2m"]
        for choice in (False, True)
    )
    assert float(meta) > 0
    assert float(scratch) == float(meta)


def test_weights_choose_and_scale_the_terms_of_the_total():
    outputs, targets = two_rows()
    counts = count_targets(targets)
    losses = compute_losses(outputs, targets, counts, weights={"loss_bbox": 3.0, "loss_ce": 0.5})
    one, many = (3 * losses["loss_bbox" + b] + 0.5 * losses["loss_ce" + b] for b in ("", "_o2m"))
    torch.testing.assert_close(losses["loss"], math.sqrt(2) * (one + 2 * many))


def test_reads_of_values_are_seen(value_reads):
    """What other tests count."""
    values = torch.rand(4, 2, requires_grad=True)
    with value_reads() as found:
        values[[1, 2]].sum().backward()
    assert found == []
    with value_reads() as found:
        values[values > 1].sum().item()
        values.prod(1).sum().backward()
    assert found == ["aten::nonzero", "aten::_local_scalar_dense", "aten::_local_scalar_dense"]
