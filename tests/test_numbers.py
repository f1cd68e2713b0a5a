"""Numbers that go wrong: steps that are not finite, and data of which there is hardly any."""

import json
import logging
import math
import shutil
from copy import deepcopy

import pytest
import torch
from PIL import Image
from runs import run_flags

import evaluate_sam3_lora
import train_sam3_lora
from sam3_lora.engine import (
    MOST_SKIPPED_IN_A_ROW,
    Limits,
    LossError,
    Skips,
    build_optimizer,
    train_one_epoch,
)
from sam3_lora.losses import compute_losses
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


# Runs that go wrong -------------------------------------------------------------------------------

OBJECT = [10, 10, 30, 20]
PLAIN = [(64, 48, [OBJECT])] * 3


def make_object(shape):
    """An annotation: of category 1 and a rectangle for a mask, from a box; else what is given."""
    if isinstance(shape, dict):
        return {"category_id": 1, "iscrowd": 0} | shape
    x, y, w, h = shape
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {"category_id": 1, "iscrowd": 0, "bbox": shape, "segmentation": [polygon]}


def write_data(folder, images, names=("part",), val=None):
    """A data folder: train, and val with the same or other images (width, height, objects)."""
    for split, own in (("train", images), ("val", images if val is None else val)):
        (folder / split / "images").mkdir(parents=True)
        rows, annotations = [], []
        for number, (width, height, objects) in enumerate(own, 1):
            name = f"{number}.png"
            Image.new("RGB", (width, height), (40 * number, 90, 30)).save(
                folder / split / "images" / name
            )
            rows.append({"id": number, "file_name": name, "width": width, "height": height})
            annotations += [{"image_id": number} | make_object(o) for o in objects]
        for number, annotation in enumerate(annotations, 1):
            annotation["id"] = number
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        content = {"images": rows, "annotations": annotations, "categories": categories}
        (folder / split / "annotations.json").write_text(json.dumps(content))
    return folder


def run_args(model, data, *more):
    more = ("--batch_size", "1", "--prompts_per_image", "2", *more)
    return run_flags(model, data, data / "run", *more)


def read_rows(run):
    """The log's rows, each strict JSON: no NaN, no Infinity."""
    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def read_steps(run):
    return [row for row in read_rows(run) if "val" not in row]


def contents(run):
    """Every file of a run but its messages."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "train.log")
    return {path: path.read_bytes() for path in files}


class Poison:
    """The criterion; from some call in training on, as many have a loss or slope not finite."""

    def __init__(self, monkeypatch, first, count, slope=False, training=True):
        self.calls, self.wrong, self.slope = 0, range(first, first + count), slope
        self.training, self.at_first = training, lambda: None
        monkeypatch.setattr(train_sam3_lora, "compute_losses", self)

    def __call__(self, outputs, *arguments, **options):
        losses = compute_losses(outputs, *arguments, **options)
        if outputs["logits"].requires_grad != self.training:
            return losses
        self.calls += 1
        if self.calls == self.wrong.start:
            self.before = self.at_first()
        if self.calls in self.wrong:
            nothing = outputs["logits"].sum() * 0
            losses["loss"] = losses["loss"] + (nothing.sqrt() if self.slope else nothing.log())
        return losses


@pytest.mark.scripts
@pytest.mark.parametrize(
    ("place", "slope"), [("training", False), ("training", True), ("evaluation", False)]
)
def test_nothing_is_saved_after_a_figure_that_is_not_finite(
    tiny_model_dir, tmp_path, monkeypatch, capsys, place, slope
):
    data = write_data(tmp_path, PLAIN)
    poison = Poison(monkeypatch, 3 if place == "training" else 4, 9, slope, place == "training")
    poison.at_first = lambda: contents(data / "run")
    args = run_args(tiny_model_dir, data, "--save_steps", "1", "--eval_steps", "1")
    assert train_sam3_lora.main(args) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    where = "in evaluation" if place == "evaluation" else "at step 3"
    assert message.startswith(f"error: expected finite losses, found {where}, image ids [")
    assert contents(data / "run") == poison.before
    names = {path.relative_to(data / "run").parts[0] for path in poison.before}
    assert {"best_model", "checkpoint-1"} < names and "last_model" not in names
    if not slope and place == "training":  # resumed, the run may leave the step out
        Poison(monkeypatch, 1, 1)
        assert train_sam3_lora.main([*args, "--resume", "--non_finite", "skip"]) == 0
        assert [row.get("skipped") for row in read_steps(data / "run")] == [None, None, 1]


def states(run, step):
    """What a checkpoint holds of adapter, optimizer, scaler and skips."""
    state = torch.load(run / f"checkpoint-{step}" / "training_state.pt", weights_only=True)
    adapter = torch.load(run / f"checkpoint-{step}" / "lora_weights.pt", weights_only=True)
    return adapter["lora"], state["optimizer"]["state"], state["scaler"], state["skips"]


@pytest.mark.scripts
def test_steps_left_out_are_counted_and_named_and_change_nothing(
    tiny_model_dir, tmp_path, monkeypatch
):
    data = write_data(tmp_path, PLAIN * 2)
    Poison(monkeypatch, 3, 2)
    args = run_args(tiny_model_dir, data, "--save_steps", "1", "--save_total_limit", "9")
    assert train_sam3_lora.main([*args, "--non_finite", "skip", "--logging_steps", "2"]) == 0
    rows = read_steps(data / "run")
    assert [(row["step"], row.get("skipped"), "loss" in row) for row in rows] == [
        *((2, None, True), (4, 2, False), (6, None, True))
    ]
    assert "nan" not in (data / "run" / "metrics.csv").read_text()
    text = (data / "run" / "train.log").read_text()
    assert text.count("left out, as not finite: step ") == 2
    assert "2 left out, lr" in text and "2 steps left out" in text.splitlines()[-3]
    before, *after = (states(data / "run", step) for step in (2, 3, 4, 5))
    assert_equal([state[:3] for state in after[:2]], [before[:3]] * 2)
    assert after[2][1][0]["step"] == 3 and not torch.equal(
        *(state[1][0]["exp_avg"] for state in (before, after[2]))
    )
    assert [state[3] for state in after] == [(1, 1), (2, 2), (0, 2)]


@pytest.mark.scripts
def test_a_run_in_fp16_halves_its_scale_logs_no_infinity_and_resumes_exactly(
    tiny_model_dir, tmp_path
):
    data = write_data(tmp_path, PLAIN * 2)
    whole, cut = data / "run", data / "cut"
    args = run_args(tiny_model_dir, data, "--mixed_precision", "fp16", "--save_steps", "1")
    args += ["--save_total_limit", "9"]
    assert train_sam3_lora.main(args) == 0
    shutil.copytree(whole, cut)
    for step in range(3, 7):
        shutil.rmtree(cut / f"checkpoint-{step}")
    (_, _, scaler, skips), end = states(cut, 2), states(whole, 6)
    assert scaler["scale"] == 2.0**14 and skips == (2, 2)  # the tiny model overflows at 2^13
    assert train_sam3_lora.main([*args, "--output_dir", str(cut), "--resume"]) == 0
    assert_equal(states(cut, 6), end)
    skipped, again = ([r.get("skipped", 0) for r in read_steps(run)] for run in (whole, cut))
    assert skipped == again and sum(skipped) == end[3][1] and 0 in skipped
    assert end[2]["scale"] == 2.0 ** (16 - sum(skipped))


# Data of which there is hardly any ----------------------------------------------------------------

NO_HEIGHT = {"bbox": [10, 10, 20, 0], "segmentation": []}
LINE = {"bbox": [10, 10, 20, 5], "segmentation": [[10, 10, 20, 10, 30, 10]]}
GRID = [[1 + 6 * (i % 20), 1 + 4 * (i // 20), 5, 3] for i in range(300)]
THREE = [make_object(OBJECT) | {"category_id": number} for number in (1, 2, 3)]

# Images, names of categories, images of the validation split where it has others, flags.
RUNS = {
    "boxes without height": ([(64, 48, [NO_HEIGHT])] * 2, ["part"], None, ()),
    "masks that are lines": ([(64, 48, [LINE])] * 2, ["part"], None, ()),
    "one image, 1 x 1": ([(1, 1, [[0, 0, 1, 1]])], ["part"], None, ()),
    "1 x N": ([(1, 900, [[0, 9, 1, 90]]), (900, 1, [[9, 0, 90, 1]])], ["part"], None, ()),
    "the whole image": ([(64, 48, [[0, 0, 64, 48]])], ["part"], None, ()),
    "one pixel": ([(900, 700, [[5, 5, 1, 1]])], ["part"], None, ("--mask_loss", "points")),
    "only negatives": ([(64, 48, [])] * 2, ["a", "b"], None, ("--best_metric", "iou")),
    "validation without objects": (PLAIN, ["part"], [(64, 48, [])], ("--best_metric", "iou")),
    "300 objects, 16 queries": ([(128, 64, GRID)], ["part"], None, ()),
    "one prompt of three": (
        *([(64, 48, THREE)], ["a", "b", "c"], None),
        ("--prompts_per_image", "1", "--out_of_domain_prompts", "0"),
    ),
    "a batch above the set": (PLAIN, ["part"], None, ("--batch_size", "50")),
    "micro-batches above the set": (
        *(PLAIN, ["part"], None),
        ("--gradient_accumulation_steps", "50", "--warmup_steps", "9"),
    ),
    "a warm-up above the run": (
        *(PLAIN, ["part"], None),
        ("--max_steps", "1", "--warmup_steps", "100", "--logging_steps", "100"),
    ),
}


@pytest.mark.scripts
@pytest.mark.parametrize("case", RUNS)
def test_the_least_data_trains_and_evaluates_to_finite_figures(tiny_model_dir, tmp_path, case):
    images, names, val, flags = RUNS[case]
    data = write_data(tmp_path, images, names, val)
    assert train_sam3_lora.main(run_args(tiny_model_dir, data, *flags)) == 0
    steps = read_steps(data / "run")
    assert steps and all(row["loss"] > 0 and row["grad_norm"] > 0 for row in steps)
    objects = any(own for _, _, own in images if own != [NO_HEIGHT])
    assert all(("train_iou" in row) == objects for row in steps)
    (val_row,) = (row["val"] for row in read_rows(data / "run") if "val" in row)
    assert val_row["loss"] > 0
    assert (val_row["iou"] is not None) == (objects and val is None)
    adapter = str(data / "run" / "best_model")
    args = ["--lora_weights", adapter, "--data_dir", str(data), "--num_workers", "0"]
    assert evaluate_sam3_lora.main([*args, "--output_dir", str(data / "found")]) == 0
    metrics = (data / "found" / "metrics.json").read_text()
    assert json.loads(metrics, parse_constant=pytest.fail)["losses"]["loss"] > 0


@pytest.mark.scripts
@pytest.mark.parametrize(
    ("images", "names", "flags", "message"),
    [
        ([(64, 48, [])], [], (), "expected at least one category, found none"),
        ([], ["part"], (), "expected at least one image, found 0"),
        (PLAIN, [""], (), "expected a category name of printable text, found ''"),
        (PLAIN, ["  "], (), "expected a category name of printable text, found ' ' ("),
        ([(128, 64, GRID)], ["part"], ("--over_queries", "error"), "more than 16 objects of one c"),
    ],
)
def test_less_than_the_least_is_refused_in_one_line(
    tiny_model_dir, tmp_path, capsys, images, names, flags, message
):
    data = write_data(tmp_path, images, names)
    before = sorted(tmp_path.rglob("*"))
    assert train_sam3_lora.main(run_args(tiny_model_dir, data, *flags)) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "INFO" not in line)
    assert error.startswith("error: ") and message in error
    assert sorted(tmp_path.rglob("*")) == before
