"""The batch loop: equal steps however a batch is cut, clipping, what stops it."""

import math
import weakref
from copy import deepcopy
from functools import partial
from itertools import repeat

import pytest
import torch

from lora_layers import COMPONENTS, LoRAConfig, apply_lora, lora_modules, lora_state_dict
from sam3_lora.engine import (
    Limits,
    LossError,
    TooLargeError,
    _split,
    build_optimizer,
    evaluate,
    train_one_epoch,
)
from sam3_lora.forward import Forward
from sam3_lora.losses import compute_losses, count_targets

SIZE = 112
ROWS = [("cat", 2), ("a red bus", 0), ("dog", 1), ("cat", 0), ("bolt", 3), ("a red bus", 1)]
IMAGE_OF_ROW = [0, 0, 0, 1, 1, 2]
IMAGE_IDS = [11, 12, 13]
DETR_AND_VISION = ("vision_encoder", "detr_encoder", "detr_decoder")


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
    options = {"max_grad_norm": 0.0, "factor": lambda step: 1.0, "max_rows": 32} | options
    factor, limits = options.pop("factor"), Limits(3, options.pop("max_rows"))
    limits = options.pop("limits", limits)
    return list(
        train_one_epoch(
            forward, criterion, count_targets, batches, optimizer, factor, limits, **options
        )
    )


def updates(forward, before):
    return {name: value - before[name] for name, value in lora_state_dict(forward.model).items()}


def step_of(loaded, batches, components=DETR_AND_VISION, **options):
    """The update by one step and its record; plain gradient descent, so errors are not hidden."""
    forward = adapted(loaded, components)
    before = lora_state_dict(forward.model)
    options = {"max_grad_norm": 0.1} | options
    (record,) = train(forward, batches, sizes=repeat(len(batches)), **options)
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
        forward, batches, optimizer, sizes=repeat(2), step=7, factor=lambda s: s / 100, max_rows=2
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


@pytest.mark.scripts
def test_a_step_reads_no_more_values_than_its_forward(loaded, value_reads):
    """A GPU would be waited for at each; the record's one copy is not among them on a CPU."""
    forward, batch = adapted(loaded, COMPONENTS), make_batch([0, 1, 2])
    forward(batch)  # what is read but once
    with value_reads() as expected:
        forward(batch)
    with value_reads() as found:
        train(forward, [batch])
    assert found == expected


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
        Limits(3, 32),
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


# Memory -------------------------------------------------------------------------------------------


class SmallMemory:
    """A forward on a device that holds so many images and rows; keeps an eye on what it returns."""

    def __init__(self, forward, images, rows):
        self.forward, self.model, self.images, self.rows = forward, forward.model, images, rows
        self.tried, self.returned = [], []

    def encode(self, batch):
        return self._check("images", len(batch["images"]), self.forward.encode(batch))

    def predict(self, features, batch, rows):
        count = len(batch["texts"][rows])
        return self._check("rows", count, self.forward.predict(features, batch, rows))

    def _check(self, what, count, outputs):
        if what == "images" and self.tried and self.tried[-1][2]:
            assert all(value() is None for value in self.returned)  # freed before the next try
        self.returned += [weakref.ref(value) for value in outputs.values()]
        self.tried.append((what, count, count > getattr(self, what)))
        if self.tried[-1][2]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outputs


def parts_tried(forward):
    return [(what, count) for what, count, _ in forward.tried]


@pytest.mark.scripts
@pytest.mark.parametrize(("images", "rows"), [(1, 32), (3, 2), (1, 1), (2, 1)])
def test_out_of_memory_takes_the_same_step_in_parts(loaded, whole_step, caplog, images, rows):
    forward = adapted(loaded)
    before = lora_state_dict(forward.model)
    forward = SmallMemory(forward, images, rows)
    (record,) = train(forward, [make_batch([0, 1, 2])], max_grad_norm=0.1)
    assert_same_step((updates(forward, before), record), whole_step)
    assert len(caplog.messages) == 1 and "out of memory" in caplog.text


def test_smaller_parts_last(loaded, caplog):
    forward = SmallMemory(adapted(loaded), images=3, rows=2)
    limits = Limits(images=4, rows=8)
    train(forward, [make_batch([0, 1]), make_batch([2])], sizes=repeat(2), limits=limits)
    # 5 rows of two images do not fit: the step again, one image and two rows at a time.
    first = [("images", 2), ("rows", 5), ("images", 1), ("rows", 2), ("rows", 1)]
    first += [("images", 1), ("rows", 2), ("images", 1), ("rows", 1)]
    assert parts_tried(forward) == first
    assert limits == Limits(images=1, rows=2)
    (message,) = caplog.messages
    assert "--max_rows_per_forward 2 --batch_size 1," in message
    forward.tried.clear()
    for _ in range(2):  # epochs
        train(forward, [make_batch([1, 2])], limits=limits)
    assert parts_tried(forward) == 2 * [("images", 1), ("rows", 2), ("images", 1), ("rows", 1)]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("images", "rows"), [(0, 32), (3, 0)])
def test_out_of_memory_with_one_image_and_one_row_stops(loaded, caplog, images, rows):
    forward = adapted(loaded)
    before = lora_state_dict(forward.model)
    forward = SmallMemory(forward, images, rows)
    with pytest.raises(TooLargeError):
        train(forward, [make_batch([0, 1, 2])])
    assert parts_tried(forward)[-1] in (("images", 1), ("rows", 1))
    assert all(float(v.abs().max()) == 0 for v in updates(forward, before).values())
    with pytest.raises(TooLargeError):
        list(evaluate(forward, CRITERION, count_targets, [make_batch([0])]))
    assert caplog.messages == []


def test_parts_keep_what_is_of_an_image_and_what_is_of_a_row():
    batch = make_batch([0, 1, 2]) | {"trunk": torch.arange(3.0), "box_prompt_labels": None}
    batch["box_prompts_cxcywh"] = torch.arange(24.0).reshape(6, 1, 4)
    first, second = _split(batch, 2)
    assert first.keys() == second.keys() == batch.keys()
    assert [len(p["images"]) for p in (first, second)] == [2, 1]
    assert second["image_ids"] == [13] and second["original_sizes"] == [(SIZE, SIZE)]
    assert second["trunk"].tolist() == [2] and second["box_prompt_labels"] is None
    assert first["texts"] + second["texts"] == batch["texts"]
    assert first["image_index"].tolist() == [0, 0, 0, 1, 1] and second["image_index"].tolist() == [
        0
    ]
    assert torch.equal(second["box_prompts_cxcywh"], batch["box_prompts_cxcywh"][5:])
    assert second["targets"][0] is batch["targets"][5]
    assert list(_split(batch, 3)) == [batch]


def test_evaluation_out_of_memory_goes_on_with_fewer_rows(loaded, caplog):
    batches = [make_batch([0, 1]), make_batch([2])]
    whole = list(evaluate(adapted(loaded), CRITERION, count_targets, batches))
    forward = SmallMemory(adapted(loaded), images=3, rows=2)
    sums = {}
    for chunk in evaluate(forward, CRITERION, count_targets, batches):
        if chunk["batch"] is batches[0]:
            sums = {k: sums.get(k, 0.0) + v for k, v in chunk["losses"].items()}
    for name, value in whole[0]["losses"].items():
        assert sums[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    rows = [("rows", count) for count in (5, 2, 2, 1)]
    assert parts_tried(forward) == [("images", 2), *rows, ("images", 1), ("rows", 1)]
    assert len(caplog.messages) == 1 and "--max_rows_per_forward 2" in caplog.text
    assert "--batch_size" not in caplog.text


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
