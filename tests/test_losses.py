"""The loss against Meta's own figures, and the laws it obeys."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss as library_focal

from sam3_lora.losses import compute_losses, count_targets, total_loss
from sam3_lora.matching import box_iou, match_queries, to_xyxy

GOLDEN = Path(__file__).parent / "golden" / "meta_loss.npz"
LAYERS, QUERIES, CHANNELS, SIDE, CANVAS = 3, 8, 5, 12, 48
MASK_TERMS = {"loss_mask", "loss_dice", "loss_mask_o2m", "loss_dice_o2m"}
SEMANTIC_TERMS = {"loss_semantic_seg", "loss_semantic_dice"}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def golden_inputs(golden, masks: bool):
    """Meta's inputs in our layout; a query's mask comes out of an identity embedding."""
    tensors = {k: torch.from_numpy(v) for k, v in golden.items() if v.dtype.kind != "U"}
    targets = [
        {
            "boxes_cxcywh": boxes,
            "masks": mask.bool(),
            "has_mask": torch.ones(len(boxes), dtype=torch.bool),
            "complete": torch.tensor(True),
        }
        for boxes, mask in zip(
            tensors["gt_boxes"].split(tensors["num_boxes"].tolist()),
            tensors["gt_masks"].split(tensors["num_boxes"].tolist()),
            strict=True,
        )
    ]
    outputs = {
        "logits": tensors["logits"],
        "boxes_cxcywh": tensors["boxes"],
        "presence": tensors["presence"][..., 0],
        "o2m_logits": tensors["logits_o2m"],
        "o2m_boxes_cxcywh": tensors["boxes_o2m"],
    }
    if masks:
        rows, queries = tensors["masks"].shape[:2]
        eye = torch.eye(2 * queries)[None].expand(rows, -1, -1)
        outputs["pixel_embed"] = torch.cat([tensors["masks"], tensors["masks_o2m"]], 1)
        outputs["mask_embed"], outputs["o2m_mask_embed"] = eye[:, :queries], eye[:, queries:]
        outputs["semantic"] = tensors["semantic"][:, 0]
    return outputs, targets


@pytest.mark.parametrize(
    ("case", "pos_weight", "terms"),
    [("box_pw10", 10.0, 21), ("box_pw5", 5.0, 21), ("seg_pw10", 10.0, 25), ("semantic", 10.0, 2)],
)
def test_every_term_equals_metas(golden, case, pos_weight, terms):
    masks = case in ("seg_pw10", "semantic")
    outputs, targets = golden_inputs(golden, masks)
    losses = compute_losses(outputs, targets, count_targets(targets), pos_weight)
    names = golden[f"{case}_names"].tolist()
    expected = dict(zip(names, golden[f"{case}_values"].tolist(), strict=True))
    compared = 0
    for name, value in expected.items():
        if name in losses:
            weight = 2.0 if name.endswith("_o2m") else 1.0  # inside Meta's figure already
            assert weight * float(losses[name]) == pytest.approx(value, rel=1e-5), name
            compared += 1
    assert compared == terms
    if case != "semantic":
        semantic = {k: v for k, v in losses.items() if k in SEMANTIC_TERMS}
        rest = {k: v for k, v in losses.items() if k not in semantic}
        core = float(total_loss(rest, {"rows": 4})) / math.sqrt(4)
        assert core == pytest.approx(expected["core_loss"], rel=1e-5)
        both = float(losses["loss"]) / math.sqrt(4)
        own = (
            20 * semantic["loss_semantic_seg"] + 30 * semantic["loss_semantic_dice"] if masks else 0
        )
        assert both == pytest.approx(core + float(own), rel=1e-5)


def match(outputs, targets):
    """`match_queries` of target dicts."""
    boxes = [t["boxes_cxcywh"] for t in targets]
    return match_queries(outputs, torch.cat(boxes), [len(b) for b in boxes])


def test_matches_equal_metas(golden):
    outputs, targets = golden_inputs(golden, masks=False)
    matches = match(outputs, targets)
    rows, queries, objects = matches[""][2]
    assert rows.tolist() == golden["o2o_rows"].tolist()
    assert queries.tolist() == golden["o2o_queries"].tolist()
    assert objects.tolist() == list(range(8))
    rows, queries, objects = matches["o2m_"][2]
    assert rows.tolist() == golden["o2m_rows"].tolist()
    assert queries.tolist() == golden["o2m_queries"].tolist()
    assert objects.tolist() == golden["o2m_targets"].tolist()


def random_targets(sizes, masked=None, seed=0):
    """One target a size: boxes inside the canvas, and the ellipse in each as its mask."""
    generator = torch.Generator().manual_seed(seed)
    masked = masked or [True] * len(sizes)
    ys, xs = torch.meshgrid(*[(torch.arange(CANVAS) + 0.5) / CANVAS] * 2, indexing="ij")
    targets = []
    for size, mask in zip(sizes, masked, strict=True):
        centre = 0.3 + 0.4 * torch.rand(size, 2, generator=generator)
        extent = 0.2 + 0.3 * torch.rand(size, 2, generator=generator)
        dx = (xs - centre[:, 0, None, None]) / (extent[:, 0, None, None] / 2)
        dy = (ys - centre[:, 1, None, None]) / (extent[:, 1, None, None] / 2)
        targets.append(
            {
                "boxes_cxcywh": torch.cat([centre, extent], 1),
                "masks": (dx**2 + dy**2 < 1) & mask,
                "has_mask": torch.full((size,), mask),
                "complete": torch.tensor(True),
            }
        )
    return targets


def random_outputs(rows, masks=True, one_to_many=True, seed=0, targets=None):
    """Leaves that require gradients; some queries lie near the targets, as after training."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def boxes():
        found = torch.cat(
            [
                draw(LAYERS, rows, QUERIES, 2).sigmoid(),
                0.1 + 0.4 * draw(LAYERS, rows, QUERIES, 2).sigmoid(),
            ],
            -1,
        )
        for row, target in enumerate(targets or []):
            near = target["boxes_cxcywh"][:QUERIES]
            found[:, row, : len(near)] = near + 0.02 * draw(LAYERS, len(near), 4)
        return found

    outputs = {
        "logits": draw(LAYERS, rows, QUERIES),
        "boxes_cxcywh": boxes(),
        "presence": draw(LAYERS, rows),
    }
    if one_to_many:
        outputs |= {"o2m_logits": draw(LAYERS, rows, QUERIES), "o2m_boxes_cxcywh": boxes()}
    if masks:
        outputs |= {
            "mask_embed": draw(rows, QUERIES, CHANNELS),
            "pixel_embed": draw(rows, CHANNELS, SIDE, SIDE),
            "semantic": draw(rows, SIDE, SIDE),
        }
        if one_to_many:
            outputs["o2m_mask_embed"] = draw(rows, QUERIES, CHANNELS)
    return {name: value.requires_grad_() for name, value in outputs.items()}


def take_rows(outputs, rows):
    """Some rows of all outputs; layers come before rows where there are layers."""
    return {
        k: v[rows] if k.endswith("embed") or k == "semantic" else v[:, rows]
        for k, v in outputs.items()
    }


SIZES = [2, 0, 5, 1, 0, 3]
MASKED = [True, True, True, False, True, True]


@pytest.mark.parametrize("mask_loss", ["full", "native"])
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5], [2], [5], [1, 4]])
def test_chunks_of_rows_sum_to_the_whole_step(cuts, mask_loss):
    targets = random_targets(SIZES, MASKED)
    outputs = random_outputs(len(SIZES), targets=targets)
    counts = count_targets(targets)
    assert counts == {"targets": 11, "masked_targets": 10, "rows": 6, "semantic_rows": 3}
    whole = compute_losses(outputs, targets, counts, mask_loss=mask_loss)
    whole["loss"].backward()
    expected = {name: value.grad.clone() for name, value in outputs.items()}
    for value in outputs.values():
        value.grad = None
    sums = {}
    for start, stop in itertools.pairwise([0, *cuts, len(SIZES)]):
        rows = slice(start, stop)
        part = compute_losses(take_rows(outputs, rows), targets[rows], counts, mask_loss=mask_loss)
        part["loss"].backward()
        sums = {k: sums.get(k, 0.0) + float(v.detach()) for k, v in part.items()}
    assert sums.keys() == whole.keys()
    for name, value in whole.items():
        assert sums[name] == pytest.approx(float(value.detach()), rel=1e-6, abs=1e-6), name
    for name, value in outputs.items():
        assert float(expected[name].abs().max()) > 0, name
        scale = float(expected[name].abs().max())
        assert float((value.grad - expected[name]).abs().max()) <= 1e-6 * max(scale, 1), name


def test_counts_of_micro_batches_add_up():
    targets = random_targets(SIZES, MASKED)
    parts = [count_targets(targets[:2]), count_targets(targets[2:])]
    assert {k: sum(p[k] for p in parts) for k in parts[0]} == count_targets(targets)


def test_a_negative_row_gets_presence_loss_only():
    targets = random_targets([2, 0])
    outputs = random_outputs(2, targets=targets)
    losses = compute_losses(outputs, targets, count_targets(targets))
    losses["loss"].backward()
    for name, value in outputs.items():
        rows_last = name.endswith("embed") or name == "semantic"
        grad = value.grad if rows_last else value.grad.transpose(0, 1)
        assert torch.isfinite(grad).all(), name
        assert float(grad[0].abs().max()) > 0, name
        if name == "presence":
            # d/dx of sqrt(B) 20 (0.5 / B) BCE(x, 0), in every layer
            slope = math.sqrt(2) * 20 * 0.5 / 2 * value.detach()[:, 1].sigmoid()
            torch.testing.assert_close(grad[1], slope)
        else:
            assert float(grad[1].abs().max()) == 0, name


def test_a_negative_row_stays_in_the_mean_of_queries():
    targets = random_targets([2, 0])
    outputs = random_outputs(2, targets=targets)
    both = compute_losses(outputs, targets, count_targets(targets))
    alone = compute_losses(take_rows(outputs, slice(0, 1)), targets[:1], count_targets(targets[:1]))
    assert float(both["loss_ce"].detach()) == pytest.approx(
        float(alone["loss_ce"].detach()) / 2, rel=1e-6
    )
    for name in ("loss_bbox", "loss_giou", "loss_mask", "loss_dice", "loss_semantic_dice"):
        assert float(both[name].detach()) == pytest.approx(float(alone[name].detach()), rel=1e-6), (
            name
        )


def test_rows_without_masks_drop_mask_and_semantic_terms_only():
    with_masks = random_targets([2, 1])
    without = random_targets([2, 1], [False, False])
    outputs = random_outputs(2, targets=with_masks)
    expected = compute_losses(outputs, with_masks, count_targets(with_masks))
    found = compute_losses(outputs, without, count_targets(without))
    assert expected.keys() - found.keys() == {"iou"}  # no box IoU among mask IoUs
    for name in found.keys() - {"loss"} - MASK_TERMS - SEMANTIC_TERMS:
        assert torch.equal(found[name], expected[name]), name
    # Zeros, but with a gradient: a step of such rows alone still reaches a mask adapter.
    for name in MASK_TERMS | SEMANTIC_TERMS:
        assert float(found[name].detach()) == 0 and found[name].requires_grad, name
    weights = {"loss_mask": 200, "loss_dice": 10, "loss_semantic_seg": 20, "loss_semantic_dice": 30}
    dropped = sum(
        (2 if k.endswith("_o2m") else 1) * weights[k.removesuffix("_o2m")] * float(expected[k])
        for k in MASK_TERMS | SEMANTIC_TERMS
    )
    assert float(found["loss"]) == pytest.approx(
        float(expected["loss"]) - math.sqrt(2) * dropped, rel=1e-5
    )


def test_mixed_rows_take_masks_where_they_are():
    targets = random_targets([2, 2, 1])
    # The first row has a mask for one of its objects, the second none, the third all.
    targets[0]["has_mask"][1] = False
    targets[0]["masks"][1] = False
    targets[1]["has_mask"][:] = False
    outputs = random_outputs(3, one_to_many=False, targets=targets)
    counts = count_targets(targets)
    assert counts == {"targets": 5, "masked_targets": 2, "rows": 3, "semantic_rows": 1}
    losses = compute_losses(outputs, targets, counts)
    rows, queries, objects = match(outputs, targets)[""][-1]
    dice, focal = 0.0, 0.0
    for row, query, index in zip(rows.tolist(), queries.tolist(), objects.tolist(), strict=True):
        local = index - [0, 2, 4][row]
        if bool(targets[row]["has_mask"][local]):
            logits = torch.einsum(
                "c,chw->hw", outputs["mask_embed"][row, query], outputs["pixel_embed"][row]
            )
            logits = F.interpolate(logits[None, None], size=(CANVAS, CANVAS), mode="bilinear")
            goal = targets[row]["masks"][local].float()[None, None]
            p = logits.sigmoid()
            dice += float(1 - (2 * (p * goal).sum() + 1) / (p.sum() + goal.sum() + 1)) / 5
            focal += float(library_focal(logits, goal, alpha=0.25, gamma=2).mean()) / 5
    assert float(losses["loss_dice"]) == pytest.approx(dice, rel=1e-5)
    assert float(losses["loss_mask"]) == pytest.approx(focal, rel=1e-5)
    losses["loss"].backward()
    assert float(outputs["semantic"].grad[:2].abs().max()) == 0
    assert float(outputs["semantic"].grad[2].abs().max()) > 0
    assert float(outputs["mask_embed"].grad[1].abs().max()) == 0


def test_more_targets_than_queries_match_every_query():
    targets = random_targets([QUERIES + 3, 1])
    outputs = random_outputs(2)
    rows, queries, objects = match(outputs, targets)[""][0]
    first = rows == 0
    assert sorted(queries[first].tolist()) == list(range(QUERIES))
    assert len(set(objects[first].tolist())) == QUERIES
    assert objects[rows == 1].tolist() == [QUERIES + 3]
    losses = compute_losses(outputs, targets, count_targets(targets))
    losses["loss"].backward()
    assert all(torch.isfinite(v.grad).all() for v in outputs.values())
    assert float(losses["loss_ce"]) > 0


@pytest.mark.parametrize("masks", [True, False])
def test_a_step_without_targets_is_finite_and_has_a_gradient(masks):
    targets = random_targets([0, 0, 0])
    outputs = random_outputs(3, masks=masks)
    losses = compute_losses(outputs, targets, count_targets(targets))
    assert all(math.isfinite(float(v)) for v in losses.values())
    presence = outputs["presence"].detach()
    expected = math.sqrt(3) * 20 * 0.5 * F.softplus(presence).mean(1).sum()
    assert float(losses["loss"]) == pytest.approx(float(expected), rel=1e-6)
    losses["loss"].backward()
    for name in ("logits", "boxes_cxcywh", "o2m_logits", "o2m_boxes_cxcywh"):
        assert outputs[name].grad is not None, name
        assert float(outputs[name].grad.abs().max()) == 0, name
    assert float(outputs["presence"].grad.abs().min()) > 0


def test_a_negative_chunk_of_a_masked_step_reaches_the_mask_head():
    targets = random_targets([0, 0])
    outputs = random_outputs(2)
    counts = count_targets(targets + random_targets([2]))
    losses = compute_losses(outputs, targets, counts)
    losses["loss"].backward()
    for name in ("mask_embed", "pixel_embed", "o2m_mask_embed", "semantic"):
        assert float(outputs[name].grad.abs().max()) == 0, name
    assert losses.keys() >= MASK_TERMS | SEMANTIC_TERMS


def blob_outputs(targets, side):
    """Rows whose masks are their targets', blurred and shifted: what a half-trained head gives."""
    outputs = random_outputs(len(targets), one_to_many=False, targets=targets)
    maps = torch.zeros(len(targets), QUERIES, CANVAS, CANVAS)
    for row, target in enumerate(targets):
        maps[row, : len(target["masks"])] = target["masks"].roll((3, 2), (1, 2)).float()
    maps = F.interpolate(maps, size=(side, side), mode="area")
    outputs["pixel_embed"] = 6 * F.avg_pool2d(maps, 3, 1, 1) - 3
    outputs["mask_embed"] = torch.eye(QUERIES)[None].expand(len(targets), -1, -1)
    return {k: v.detach() for k, v in outputs.items()}


def test_the_three_places_of_mask_losses_agree_in_size():
    targets = random_targets([2, 3])
    outputs = blob_outputs(targets, SIDE)
    torch.manual_seed(0)
    counts = count_targets(targets)
    found = {
        m: compute_losses(outputs, targets, counts, mask_loss=m)
        for m in ("full", "native", "points")
    }
    for mask_loss in ("native", "points"):
        for name in ("loss_mask", "loss_dice"):
            ratio = float(found[mask_loss][name]) / float(found["full"][name])
            assert 0.5 < ratio < 5, (mask_loss, name, ratio)
        assert float(found[mask_loss]["loss_bbox"]) == float(found["full"]["loss_bbox"])
    assert 0.2 < float(found["full"]["iou"]) < 1
    assert {float(f["iou"]) for f in found.values()} == {float(found["full"]["iou"])}


def test_native_equals_full_at_equal_sizes():
    targets = random_targets([2, 3])
    outputs = blob_outputs(targets, CANVAS)
    counts = count_targets(targets)
    full = compute_losses(outputs, targets, counts, mask_loss="full")
    native = compute_losses(outputs, targets, counts, mask_loss="native")
    assert all(torch.equal(full[name], native[name]) for name in full)


def test_a_thin_object_does_not_vanish_in_native():
    masks = torch.zeros(1, CANVAS, CANVAS, dtype=torch.bool)
    masks[0, :, 17] = True  # 1 px of 48; the prediction has 12 columns, column 4 holds it
    targets = [
        {
            "boxes_cxcywh": torch.tensor([[17.5 / 48, 0.5, 1 / 48, 1.0]]),
            "masks": masks,
            "has_mask": torch.tensor([True]),
            "complete": torch.tensor(True),
        }
    ]
    outputs = random_outputs(1, one_to_many=False, targets=targets)
    outputs["mask_embed"] = torch.ones(1, QUERIES, 1)
    nothing = torch.full((1, 1, SIDE, SIDE), -12.0)
    line = nothing.clone()
    line[..., 4] = 12.0
    counts = count_targets(targets)
    dice = {}
    for name, pixels in (("nothing", nothing), ("line", line)):
        losses = compute_losses(outputs | {"pixel_embed": pixels}, targets, counts, 10, "native")
        dice[name] = float(losses["loss_dice"])
    # A quarter of each of 12 pixels: 3 in all. An object that vanished would have no loss at all.
    assert dice["nothing"] == pytest.approx(1 - 1 / (3 + 1), rel=1e-3)
    assert dice["line"] == pytest.approx(1 - (2 * 3 + 1) / (12 + 3 + 1), rel=1e-3)


def test_classification_gradients():
    """What values cannot show: p^2 is not detached, the matched target is."""
    targets = random_targets([2])
    outputs = random_outputs(1, masks=False, one_to_many=False, targets=targets)
    counts = count_targets(targets)
    losses = compute_losses(outputs, targets, counts, pos_weight=7.0)
    boxes_grad, grad = torch.autograd.grad(
        losses["loss_ce"], [outputs["boxes_cxcywh"], outputs["logits"]], allow_unused=True
    )
    assert boxes_grad is None or float(boxes_grad.abs().max()) == 0
    _, queries, objects = match(outputs, targets)[""][-1]
    x = outputs["logits"][-1, 0].detach().double()
    p = x.sigmoid()
    expected = 2 * p * p * (1 - p) * F.softplus(x) + p**3
    found, wanted = outputs["boxes_cxcywh"][-1, 0, queries], targets[0]["boxes_cxcywh"][objects]
    iou = box_iou(to_xyxy(found.detach()), to_xyxy(wanted))[0]
    wanted = (p[queries] ** 0.25 * iou.double() ** 0.75).clamp(min=0.01)
    expected[queries] = 7.0 * (p[queries] - wanted)
    torch.testing.assert_close(grad[-1, 0].double(), expected / QUERIES, rtol=1e-4, atol=1e-7)
    assert float(grad[:-1].abs().max()) == 0  # the other layers have terms of their own


def test_values_that_are_not_numbers_reach_the_loss():
    targets = random_targets([2, 0])
    outputs = random_outputs(2, targets=targets)
    outputs["logits"] = torch.full_like(outputs["logits"], math.nan)
    outputs["o2m_logits"] = torch.full_like(outputs["o2m_logits"], math.nan)
    losses = compute_losses(outputs, targets, count_targets(targets))
    assert math.isnan(float(losses["loss"]))
    assert math.isnan(float(losses["loss_ce"]))
    assert math.isfinite(float(losses["presence_loss"]))


def test_half_precision_inputs_give_single_precision_terms():
    targets = random_targets([2, 1])
    outputs = random_outputs(2, targets=targets)
    exact = compute_losses(outputs, targets, count_targets(targets))
    with torch.autocast("cpu", torch.bfloat16):
        half = outputs | {"pixel_embed": outputs["pixel_embed"].bfloat16()}
        losses = compute_losses(half, targets, count_targets(targets))
    for name, value in losses.items():
        assert value.dtype == torch.float32, name
        assert float(value) == pytest.approx(float(exact[name]), rel=0.02, abs=1e-3), name


def test_iou_is_that_of_the_matched_boxes_without_masks():
    targets = random_targets([2, 0, 1], [False] * 3)
    outputs = random_outputs(3, masks=False, targets=targets)
    losses = compute_losses(outputs, targets, count_targets(targets))
    rows, queries, objects = match(outputs, targets)[""][-1]
    wanted = torch.cat([t["boxes_cxcywh"] for t in targets])[objects]
    found = outputs["boxes_cxcywh"][-1, rows, queries]
    iou = box_iou(to_xyxy(found), to_xyxy(wanted))[0].mean()
    assert float(losses["iou"]) == pytest.approx(float(iou), rel=1e-5)
    assert float(iou) > 0.5


def test_a_query_of_two_objects_has_one_goal():
    """The one-to-many branch may match a query twice: value and gradient are those of one goal."""
    box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    outputs = {
        "logits": torch.full((1, 1, 8), -3.0),
        "boxes_cxcywh": torch.full((1, 1, 8, 4), 0.2),
        "presence": torch.zeros(1, 1),
        "o2m_boxes_cxcywh": torch.full((1, 1, 8, 4), 0.1),
    }
    outputs["o2m_boxes_cxcywh"][0, 0, 3] = box
    values, gradients = [], []
    for count in (1, 2):
        o2m = torch.full((1, 1, 8), -3.0, requires_grad=True)
        target = {"boxes_cxcywh": box.repeat(count, 1), "has_mask": torch.zeros(count).bool()}
        target["masks"] = torch.zeros(0, 4, 4).bool()
        losses = compute_losses({**outputs, "o2m_logits": o2m}, [target], count_targets([target]))
        (gradient,) = torch.autograd.grad(losses["loss_ce_o2m"], o2m)
        values.append(losses["loss_ce_o2m"].detach())
        gradients.append(gradient)
    assert float(gradients[0][0, 0, 3]) < 0
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.scripts
def test_values_are_read_once(monkeypatch, value_reads):
    """A GPU is waited for where the costs are copied to the CPU, and nowhere else."""
    targets = random_targets(SIZES, MASKED)
    targets[2]["has_mask"][1] = False
    outputs = random_outputs(len(SIZES), targets=targets)
    copies, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: copies.append(t.shape) or copy(t))
    with value_reads() as found:
        counts = count_targets(targets)
        for mask_loss in ("full", "native", "points"):
            losses = compute_losses(outputs, targets, counts, mask_loss=mask_loss)
            losses["loss"].backward()
    assert found == []
    # Costs of every layer of both branches, then what the one-to-many matcher chose.
    assert copies == 3 * [(2 * LAYERS + 1, sum(SIZES), QUERIES)]
