"""The batch loop: schedules, equal steps however a batch is cut, clipping, what stops it."""

import math
import random
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lora_layers import COMPONENTS, LoRAConfig, apply_lora, lora_modules, lora_state_dict
from sam3_lora.engine import (
    LossError,
    build_optimizer,
    evaluate,
    lr_factor,
    mean_record,
    memory_use,
    progress_text,
    seed_everything,
    train_one_epoch,
)
from sam3_lora.forward import Forward
from sam3_lora.losses import compute_losses, count_targets

SIZE = 112
ROWS = [("cat", 2), ("a red bus", 0), ("dog", 1), ("cat", 0), ("bolt", 3), ("a red bus", 1)]
IMAGE_OF_ROW = [0, 0, 0, 1, 1, 2]
IMAGE_IDS = [11, 12, 13]
DETR_AND_VISION = ("vision_encoder", "detr_encoder", "detr_decoder")


# The learning rate --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # at step 0, 4, 9 (end of a warm-up of 10), 10, 60 (half-way), 109, 110 (the end)
        ("cosine", [0.1, 0.5, 1, 1, 0.5, (1 + math.cos(0.99 * math.pi)) / 2, 0]),
        ("linear", [0.1, 0.5, 1, 1, 0.5, 0.01, 0]),
        ("constant", [0.1, 0.5, 1, 1, 1, 1, 1]),
        ("inverse_sqrt", [0, 0.4, 0.9, 1, 6**-0.5, 10.9**-0.5 / 10, 0]),
    ],
)
def test_schedules(schedule, expected):
    steps = (0, 4, 9, 10, 60, 109, 110)
    found = [lr_factor(schedule, step, 110, 10) for step in steps]
    assert found == pytest.approx(expected, abs=1e-9)


def test_inverse_sqrt_is_metas():
    total, timescale = 1000, 20
    for step in range(total + 1):
        meta = min(1, step / 20) / math.sqrt(max(step, 20) / 20) * min(1, (total - step) / 20)
        assert lr_factor("inverse_sqrt", step, total, timescale) == pytest.approx(meta, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (5, 0), (5, 5), (3, 10)])
def test_short_runs_have_a_rate_from_0_to_1(schedule, total, warmup):
    found = [lr_factor(schedule, step, total, warmup) for step in range(total + 2)][:total]
    assert all(0 <= rate <= 1 for rate in found)
    if schedule != "inverse_sqrt":
        assert found[0] > 0  # no step is lost


# A step -------------------------------------------------------------------------------------------


def make_target(count, seed):
    """Boxes in 0 to 1 and their rectangles as masks."""
    generator = torch.Generator().manual_seed(seed)
    boxes = 0.25 + 0.5 * torch.rand(count, 4, generator=generator)
    boxes[:, 2:] /= 2
    grid = (torch.arange(SIZE) + 0.5) / SIZE
    near = (grid - boxes[:, :2, None]).abs() < boxes[:, 2:, None] / 2  # (G,2,S)
    return {
        "boxes_cxcywh": boxes,
        "masks": near[:, 1, :, None] & near[:, 0, None, :],
        "has_mask": torch.ones(count, dtype=torch.bool),
        "complete": torch.tensor(True),
    }


def make_batch(images):
    """A batch of some of the three images, with their rows."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (3, 3, SIZE, SIZE), generator=generator).to(torch.uint8)
    rows = [row for row, image in enumerate(IMAGE_OF_ROW) if image in images]
    return {
        "images": pixels[images],
        "image_ids": [IMAGE_IDS[i] for i in images],
        "original_sizes": [(SIZE, SIZE)] * len(images),
        "image_index": torch.tensor([images.index(IMAGE_OF_ROW[row]) for row in rows]),
        "texts": [ROWS[row][0] for row in rows],
        "category_ids": rows,
        "targets": [make_target(ROWS[row][1], row) for row in rows],
        "box_prompts_cxcywh": None,
        "box_prompt_labels": None,
    }


def adapted(loaded, components=DETR_AND_VISION):
    """An adapted copy with a random update, so that A has a gradient too, and its forward."""
    model = deepcopy(loaded[0])
    torch.manual_seed(3)
    apply_lora(model, LoRAConfig(rank=2, alpha=4.0, components=components))
    for _, module in lora_modules(model):
        module.lora_B.data.normal_(std=0.05)
    return Forward(model.eval(), loaded[1], one_to_many=True)


CRITERION = partial(compute_losses, mask_loss="native")


def train(forward, batches, optimizer=None, criterion=CRITERION, **options):
    optimizer = optimizer or torch.optim.SGD(
        [p for p in forward.model.parameters() if p.requires_grad], lr=1.0
    )
    options = {"max_grad_norm": 0.0, "factor": lambda step: 1.0} | options
    factor = options.pop("factor")
    return list(
        train_one_epoch(forward, criterion, count_targets, batches, optimizer, factor, **options)
    )


def updates(forward, before):
    return {name: value - before[name] for name, value in lora_state_dict(forward.model).items()}


def step_of(loaded, batches, components=DETR_AND_VISION, **options):
    """The update by one step and its record; plain gradient descent, so errors are not hidden."""
    forward = adapted(loaded, components)
    before = lora_state_dict(forward.model)
    options = {"max_grad_norm": 0.1} | options
    (record,) = train(forward, batches, accumulation=len(batches), **options)
    return updates(forward, before), record


def assert_same_step(found, expected):
    (update, record), (other, other_record) = found, expected
    assert update.keys() == other.keys()
    for name, value in update.items():
        assert float((value - other[name]).abs().max()) <= 1e-5, name
    largest = max(float(value.abs().max()) for value in other.values())
    assert largest > 1e-3  # the tolerance is small beside the step
    assert record.keys() == other_record.keys()
    for name in record.keys() - {"counts", "seconds"}:
        assert record[name] == pytest.approx(other_record[name], rel=1e-4, abs=1e-6), name
    assert record["counts"] == other_record["counts"]


@pytest.fixture(scope="module")
def whole_step(loaded):
    return step_of(loaded, [make_batch([0, 1, 2])])


@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[0, 1], [2]], [[2], [0, 1]]])
def test_micro_batches_equal_one_batch(loaded, whole_step, parts):
    assert_same_step(step_of(loaded, [make_batch(part) for part in parts]), whole_step)


def test_adamw_takes_the_same_step_too(loaded):
    found = []
    for parts in ([[0, 1, 2]], [[0], [1, 2]]):
        forward = adapted(loaded)
        optimizer = build_optimizer(forward.model, 1e-4, 0.01)
        train(forward, [make_batch(p) for p in parts], optimizer, accumulation=len(parts))
        found.append(lora_state_dict(forward.model))
    for name, value in found[0].items():
        assert float((value - found[1][name]).abs().max()) <= 1e-5, name


@pytest.mark.parametrize("max_rows", [1, 4])
def test_row_chunks_equal_one_forward(loaded, whole_step, max_rows):
    found = step_of(loaded, [make_batch([0, 1, 2])], max_rows=max_rows)
    assert_same_step(found, whole_step)


def test_row_chunks_reach_towers_and_text_through_the_leaves(loaded):
    expected = step_of(loaded, [make_batch([0, 1, 2])], COMPONENTS)
    found = step_of(loaded, [make_batch([0, 1, 2])], COMPONENTS, max_rows=2)
    assert_same_step(found, expected)
    for component in COMPONENTS:
        moved = [float(v.abs().max()) for n, v in expected[0].items() if n.startswith(component)]
        assert max(moved) > 1e-5, component


def test_the_leaves_give_the_gradient_of_the_joined_graph(loaded):
    """The same step by plain autograd, without any detaching."""
    found, record = step_of(
        loaded, [make_batch([0, 1, 2])], COMPONENTS, max_rows=2, max_grad_norm=0
    )
    forward = adapted(loaded, COMPONENTS)
    batch = make_batch([0, 1, 2])
    losses = CRITERION(forward(batch), batch["targets"], count_targets(batch["targets"]))
    losses["loss"].backward()
    assert record["loss"] == pytest.approx(float(losses["loss"].detach()), rel=1e-5)
    for name, module in lora_modules(forward.model):
        for letter in "AB":
            grad = getattr(module, f"lora_{letter}").grad
            grad = torch.zeros(()) if grad is None else grad
            scale = float(grad.abs().max()) + 1e-3
            error = float((found[f"{name}.lora_{letter}"] + grad).abs().max())
            assert error <= 1e-4 * scale, (name, letter)


class CountingForward:
    """Counts the calls of a forward."""

    def __init__(self, forward):
        self.forward, self.model, self.encoded, self.rows = forward, forward.model, 0, []

    def encode(self, batch):
        self.encoded += 1
        return self.forward.encode(batch)

    def predict(self, features, batch, rows):
        outputs = self.forward.predict(features, batch, rows)
        self.rows.append(outputs["logits"].shape[1])
        return outputs


def test_features_are_computed_once(loaded):
    forward = CountingForward(adapted(loaded))
    batch = make_batch([0, 1, 2])
    train(forward, [batch], max_rows=4)
    assert (forward.encoded, forward.rows) == (1, [4, 2])
    list(evaluate(forward, CRITERION, count_targets, [batch], max_rows=5))
    assert (forward.encoded, forward.rows) == (2, [4, 2, 5, 1])


def test_only_lora_weights_move(loaded):
    forward = adapted(loaded)
    before = {name: value.clone() for name, value in forward.model.state_dict().items()}
    optimizer = build_optimizer(forward.model, 1e-3, 0.01)
    train(forward, [make_batch([0]), make_batch([1, 2])], optimizer)
    moved = {n for n, v in forward.model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {n for n in before if "lora_" in n}


def test_records_of_an_epoch(loaded):
    forward = adapted(loaded)
    optimizer = torch.optim.SGD([p for p in forward.model.parameters() if p.requires_grad], lr=0.5)
    batches = [make_batch([0]), make_batch([1]), make_batch([2])]
    records = train(
        forward, batches, optimizer, accumulation=2, step=7, factor=lambda s: s / 100, max_rows=2
    )
    assert [r["step"] for r in records] == [8, 9]
    assert [r["lr"] for r in records] == pytest.approx([0.5 * 0.07, 0.5 * 0.08])
    assert [r["images"] for r in records] == [2, 1]  # the last step has one micro-batch
    assert [r["counts"]["rows"] for r in records] == [5, 1]
    assert [r["counts"]["targets"] for r in records] == [6, 1]
    numbers = {k: v for k, v in records[0].items() if k not in ("counts", "step", "images")}
    assert all(type(value) is float for value in numbers.values())
    assert {"loss", "loss_ce", "loss_mask", "presence_loss", "iou", "grad_norm"} <= numbers.keys()
    assert train(forward, []) == []


def test_a_step_without_any_object(loaded):
    forward = adapted(loaded)
    batch = make_batch([0, 1, 2])
    batch["targets"] = [make_target(0, 0)] * len(batch["texts"])
    before = lora_state_dict(forward.model)
    (record,) = train(forward, [batch], max_rows=4)
    assert record["loss_ce"] == record["loss_bbox"] == 0
    assert record["presence_loss"] > 0 and math.isfinite(record["grad_norm"])
    assert any(float(v.abs().max()) > 0 for v in updates(forward, before).values())


def norm(update):
    return math.sqrt(sum(float(v.double().square().sum()) for v in update.values()))


def test_gradients_are_clipped_to_their_norm(loaded):
    free, record = step_of(loaded, [make_batch([0, 1])], max_grad_norm=0)
    assert record["grad_norm"] == pytest.approx(norm(free), rel=1e-4)
    limit = norm(free) / 5
    clipped, clipped_record = step_of(loaded, [make_batch([0, 1])], max_grad_norm=limit)
    assert norm(clipped) == pytest.approx(limit, rel=1e-3)
    assert clipped_record["grad_norm"] == pytest.approx(norm(free), rel=1e-4)  # before clipping
    for name, value in clipped.items():
        torch.testing.assert_close(value, free[name] * limit / norm(free), rtol=1e-3, atol=1e-5)
    loose, _ = step_of(loaded, [make_batch([0, 1])], max_grad_norm=10 * norm(free))
    assert norm(loose) == pytest.approx(norm(free), rel=1e-4)


# What stops it ------------------------------------------------------------------------------------


def poison(term, at_call):
    """The criterion, with one term (and the total) not a number from some call on."""
    calls = 0

    def criterion(outputs, targets, counts):
        nonlocal calls
        calls += 1
        losses = CRITERION(outputs, targets, counts)
        if calls >= at_call:
            losses[term] = losses[term] * math.nan
            losses["loss"] = losses["loss"] + losses[term]
        return losses

    return criterion


def test_a_loss_that_is_not_a_number_stops_before_the_step(loaded):
    forward = adapted(loaded)
    optimizer = build_optimizer(forward.model, 1e-3, 0.0)
    records = train_one_epoch(
        forward,
        poison("loss_giou", at_call=2),
        count_targets,
        [make_batch([1]), make_batch([0, 2])],
        optimizer,
        lambda step: 1.0,
        step=40,
    )
    next(records)
    before = lora_state_dict(forward.model)
    with pytest.raises(LossError) as error:
        next(records)
    message = str(error.value)
    assert "at step 42, image ids [11, 13]:" in message
    assert "loss_giou nan" in message and "loss nan" in message
    bbox = message.split("loss_bbox ")[1].split(",")[0]
    assert math.isfinite(float(bbox))
    assert "--learning_rate" in message
    after = lora_state_dict(forward.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def infinite_gradient(outputs, targets, counts):
    """A finite loss with an infinite slope: d sqrt(x) at 0."""
    losses = CRITERION(outputs, targets, counts)
    losses["loss"] = losses["loss"] + (outputs["logits"].sum() * 0).sqrt()
    return losses


def test_a_gradient_that_is_not_a_number_stops_too(loaded):
    forward = adapted(loaded)
    before = lora_state_dict(forward.model)
    with pytest.raises(
        LossError, match=r"at step 1, image ids \[12\]: .*loss \d.*grad_norm (nan|inf)"
    ):
        train(forward, [make_batch([1])], criterion=infinite_gradient)
    assert all(float(v.abs().max()) == 0 for v in updates(forward, before).values())


def test_a_gradient_scaler_changes_nothing_and_skips_what_overflows(loaded, whole_step):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert_same_step(step_of(loaded, [make_batch([0, 1, 2])], scaler=scaler), whole_step)
    assert scaler.get_scale() == 2.0**10
    forward = adapted(loaded)
    before = lora_state_dict(forward.model)
    train(forward, [make_batch([1])], criterion=infinite_gradient, scaler=scaler)
    assert scaler.get_scale() == 2.0**9
    assert all(float(v.abs().max()) == 0 for v in updates(forward, before).values())


# Evaluation ---------------------------------------------------------------------------------------


def test_evaluation_chunks_sum_to_the_unsplit_loss(loaded):
    forward = adapted(loaded)
    batches = [make_batch([0, 1]), make_batch([2])]
    whole = list(evaluate(forward, CRITERION, count_targets, batches))
    assert [chunk["batch"] for chunk in whole] == batches
    assert [chunk["counts"]["rows"] for chunk in whole] == [5, 1]
    sums = {}
    rows = []
    for chunk in evaluate(forward, CRITERION, count_targets, batches, max_rows=2):
        assert chunk["counts"] == count_targets(chunk["batch"]["targets"])
        assert not chunk["outputs"]["logits"].requires_grad
        assert chunk["outputs"]["logits"].shape[1] == len(chunk["batch"]["texts"][chunk["rows"]])
        rows.append((chunk["rows"].start, chunk["outputs"]["logits"].shape[1]))
        if chunk["batch"] is batches[0]:
            sums = {k: sums.get(k, 0.0) + v for k, v in chunk["losses"].items()}
    assert rows == [(0, 2), (2, 2), (4, 1), (0, 1)]
    assert sums.keys() == whole[0]["losses"].keys()
    for name, value in whole[0]["losses"].items():
        assert sums[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert sums["loss"] > 1


# Optimizer, seeds, memory -------------------------------------------------------------------------


def test_only_matrices_decay():
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 2), "norm": nn.LayerNorm(2), "frozen": nn.Linear(2, 2)}
    )
    model["frozen"].requires_grad_(False)
    optimizer = build_optimizer(model, 1e-3, 0.05)
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, plain = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model["a"].weight)]
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in model.parameters() if p.ndim == 1
    } - {id(model["frozen"].bias)}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert decayed["lr"] == plain["lr"] == 1e-3


def test_seeding():
    drawn = []
    for seed in (5, 5, 6):
        seed_everything(seed)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_memory_of_the_process():
    peak, total = memory_use(torch.device("cpu"))
    assert 0.05 < peak < total < 1e5


# The log's line -----------------------------------------------------------------------------------


def test_the_logs_line_is_the_mean_of_its_steps():
    objects, none = {"targets": 3}, {"targets": 0}
    records = []
    for step, loss, iou, counts in ((5, 2.0, 0.5, objects), (6, 4.0, 0.0, none)):
        record = {"step": step, "loss": loss, "loss_ce": loss / 4, "loss_ce_aux_0": 9.0}
        record |= {"iou": iou, "lr": step / 10, "images": 3, "counts": counts, "seconds": 0.5}
        records.append(record)
    row = mean_record(records, torch.device("cpu"))
    assert (row["step"], row["loss"], row["loss_ce"]) == (6, 3.0, 0.75)
    assert row["train_iou"] == 0.5  # a step without objects has none
    assert row["lr"] == 0.6 and not {"loss_ce_aux_0", "images", "seconds"} & set(row)
    assert (row["it_per_s"], row["img_per_s"]) == (2.0, 6.0)
    text = progress_text(row)
    assert text.startswith("loss 3.000, lr 6.00e-01, 2.00 it/s, 6.0 img/s")
    assert "train IoU 0.500" in text
