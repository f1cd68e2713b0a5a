"""What frames the batch loop: learning rates, the optimizer, seeds, memory, the log's line."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from sam3_lora.engine import build_optimizer, lr_factor, seed_everything
from sam3_lora.loader import Plan
from sam3_lora.runlog import Progress, mean_record, memory_use, progress_text

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


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (5, 0), (5, 5), (3, 10)])
def test_short_runs_have_a_rate_from_0_to_1(schedule, total, warmup):
    found = [lr_factor(schedule, step, total, warmup) for step in range(total + 2)][:total]
    assert all(0 <= rate <= 1 for rate in found)
    if schedule != "inverse_sqrt":
        assert found[0] > 0  # no step is lost


def test_a_short_run_has_a_short_warmup():
    assert [Plan(1, 1, 1, steps, 100).warmup_steps for steps in (5000, 1000, 999, 9)] == [
        100,
        100,
        99,
        0,
    ]


def test_evaluations_end_epochs_or_come_every_so_many_steps_and_end_the_run() -> None:
    plan = Plan(50, 4, 2, 30, 0)  # 13 steps an epoch
    for every, steps in ((None, [13, 26, 30]), (10, [10, 20, 30]), (100, [30])):
        assert [step for step in range(1, 31) if plan.evaluates(step, every)] == steps
        assert plan.evaluations(every) == len(steps)


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
    assert "matched IoU 0.500" in text and "left" not in text
    for seconds, words in ((4.4, "4 s"), (89, "89 s"), (90, "2 min"), (7199, "2 h 00 min")):
        assert progress_text(row, seconds) == f"{text}, {words} left"


def test_the_time_left_is_that_of_the_pace_so_far(monkeypatch):
    clock = iter((100.0, 108.0, 109.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    at = Progress(step=40)
    assert at.seconds_left(100) is None  # not begun
    at.begin()
    assert at.seconds_left(100) is None  # a resumed run has no pace yet
    at.step = 44
    assert at.seconds_left(100) == 112.0
    assert at.seconds_left(45) == 2.25
    at.step = 100
    assert at.seconds_left(100) is None and "began" not in at.state()
