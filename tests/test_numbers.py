"""Numbers that go wrong: steps that are not finite, and data of which there is hardly any."""

import json
import logging
import math
from copy import deepcopy

import pytest
import torch

from sam3_lora.engine import (
    MOST_SKIPPED_IN_A_ROW,
    Limits,
    LossError,
    Skips,
    build_optimizer,
    train_one_epoch,
)
from sam3_lora.runlog import mean_record, progress_text

# Steps of a toy model -----------------------------------------------------------------------------

GOOD, BAD = 1.0, math.nan


class Toy:
    """A linear layer with the engine's two halves; what it computes passes through fp16."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 2)

    def encode(self, batch):
        return {"pixels": batch["images"]}

    def predict(self, features, batch, rows):
        return {"logits": self.model(features["pixels"][rows]).half().float()}


def criterion(outputs, targets, counts):
    logits = outputs["logits"]
    return {"loss": logits.square().mean(), "loss_ce": logits.sum()}


def count(targets):
    return {"targets": len(targets)}


def make_batch(image_id, value):
    return {
        "images": torch.full((1, 4), value),
        "image_ids": [image_id],
        "texts": ["part"],
        "targets": [{}],
    }


def steps(toy, optimizer, values, first=0, **options):
    """Steps of one image each, whose pixels are a value; image ids count from 100."""
    batches = [make_batch(100 + first + i, value) for i, value in enumerate(values)]
    limits = Limits(1, 8)
    return train_one_epoch(
        toy, criterion, count, batches, optimizer, lambda s: 0.5**s, limits, step=first, **options
    )


def state_of(toy, optimizer, scaler=None):
    """All that a step may change, but the learning rate and gradients."""
    state = deepcopy([toy.model.state_dict(), optimizer.state_dict()["state"]])
    return [*state, scaler.state_dict() if scaler else {}]


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def toy():
    toy = Toy()
    return toy, build_optimizer(toy.model, 1e-2, 0.01)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("before", [0, 2])
def test_a_step_left_out_changes_nothing_but_the_schedule(toy, caplog, scaled, before):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3) if scaled else None
    skips = Skips(allowed=True)
    records = steps(*toy, [GOOD] * before + [BAD, GOOD], scaler=scaler, skips=skips)
    for _ in range(before):
        next(records)
    expected = state_of(*toy, scaler)
    record = next(records)
    assert_equal(state_of(*toy, scaler), expected)
    assert record["skipped"] == 1.0 and not {"loss", "loss_ce", "grad_norm"} & record.keys()
    assert (record["step"], record["lr"]) == (before + 1, 1e-2 * 0.5**before)
    assert (skips.in_a_row, skips.total) == (1, 1)
    (message,) = caplog.messages
    assert f"step {before + 1}, image ids [{100 + before}]: loss nan, loss_ce nan, g" in message
    record = next(records)
    assert record["loss"] > 0 and record["lr"] == 1e-2 * 0.5 ** (before + 1)
    assert (skips.in_a_row, skips.total) == (0, 1)
    assert {int(s["step"]) for s in toy[1].state.values()} == {before + 1}


def test_a_step_that_is_not_finite_ends_the_run_unless_it_may_be_left_out(toy):
    expected = state_of(*toy)
    with pytest.raises(LossError, match=r"step 1, image ids \[100\]: .*; --non_finite skip"):
        next(steps(*toy, [math.inf]))
    assert_equal(state_of(*toy), expected)


def test_too_many_in_a_row_end_the_run_whatever_is_allowed(toy):
    skips, first = Skips(allowed=True), 0
    for values in ([BAD] * 20, [BAD] * (MOST_SKIPPED_IN_A_ROW - 20), [GOOD], [BAD] * 20):  # epochs
        first += len(list(steps(*toy, values, first, skips=skips)))
    assert (skips.in_a_row, skips.total) == (20, MOST_SKIPPED_IN_A_ROW + 20)
    expected = state_of(*toy)
    with pytest.raises(LossError, match=r"31 in a row .* step 62, image ids \[161\]: loss nan"):
        list(steps(*toy, [BAD] * 20, first, skips=skips))
    assert_equal(state_of(*toy), expected)


def test_what_overflows_halves_the_scale_and_is_left_out(toy, caplog):
    """Through fp16 the slope of the loss, 0.5, times a scale of 2^20 is infinite."""
    caplog.set_level(logging.INFO)
    scaler, skips = torch.amp.GradScaler("cpu", init_scale=2.0**20), Skips()
    records = steps(*toy, [GOOD] * 30, scaler=scaler, skips=skips)
    start = state_of(*toy)
    scale, overflows = 2.0**20, 0
    for record in records:
        if "skipped" not in record:
            break
        overflows, scale = overflows + 1, scale / 2
        assert_equal(state_of(*toy), start)
        assert scaler.get_scale() == scale and "grad_norm" not in record
    assert 1 < overflows == skips.total < 10 and scaler.get_scale() == scale
    assert len(caplog.messages) == overflows and "grad_norm inf" in caplog.text
    # The first step taken is that of a run without a scaler at the same place of the schedule.
    other = Toy()
    optimizer = build_optimizer(other.model, 1e-2, 0.01)
    (expected,) = steps(other, optimizer, [GOOD], first=overflows)
    assert record["loss"] == expected["loss"]
    assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    torch.testing.assert_close(toy[0].model.state_dict(), other.model.state_dict())


def test_a_first_scale_may_fall_to_none_and_no_run_overflows_for_ever(toy):
    scaler, skips = torch.amp.GradScaler("cpu"), Skips()
    steep = [3e4] * 60  # infinite until the scale is small
    for record in steps(*toy, steep, scaler=scaler, skips=skips):
        if "skipped" not in record:
            break
    assert skips.total > 10 and math.isfinite(record["grad_norm"])
    expected = state_of(*toy)

    def overflowing(outputs, targets, counts):
        return {"loss": (outputs["logits"].sum() * 0).sqrt()}  # d sqrt(x) at 0 is infinite

    batches = [make_batch(100 + i, GOOD) for i in range(60)]
    arguments = (toy[0], overflowing, count, batches, toy[1], lambda s: 1.0, Limits(1, 8))
    with pytest.raises(LossError, match=r"31 in a row .*grad_norm (nan|inf); --mixed_precision bf"):
        list(train_one_epoch(*arguments, scaler=scaler, skips=skips))
    assert_equal(state_of(*toy), expected)


def test_the_logs_line_counts_the_steps_left_out_and_averages_the_others(toy):
    skips, device = Skips(allowed=True), torch.device("cpu")
    records = list(steps(*toy, [GOOD, BAD, math.inf, GOOD], skips=skips))
    row = mean_record(records, device)
    losses = [record["loss"] for record in records if "loss" in record]
    assert row["loss"] == pytest.approx(sum(losses) / 2) and row["skipped"] == skips.total == 2
    assert progress_text(row).startswith(f"loss {row['loss']:.3f}, 2 left out, lr 1.25e-03, ")
    row = mean_record(records[1:3], device)
    assert row.keys() - {"memory_gb", "memory_percent"} == {
        *("step", "lr", "skipped", "it_per_s", "img_per_s")
    }
    assert json.dumps(row, allow_nan=False) and progress_text(row).startswith("2 left out, lr ")
    assert "skipped" not in mean_record(records[:1], device)
