"""A run's figures: log, table, pictures, TensorBoard, Weights & Biases; and the early stop."""

import csv
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from runs import read_log, run_flags

import train_sam3_lora
from lora_layers import LoRAConfig
from sam3_lora.coco import read_split
from sam3_lora.config import Config, ConfigError, check_stopping, load_config
from sam3_lora.evaluation import describe, rank
from sam3_lora.overview import detections_panel
from sam3_lora.runlog import (
    Progress,
    RunLog,
    RunLogError,
    check_optional_packages,
    describe_end,
    flat_figures,
)

ROWS = [
    {"step": 1, "lr": 1e-4, "loss": 12.5, "epoch": 1},
    {"step": 2, "lr": 2e-4, "loss": 1 / 3, "train_iou": 0.25, "epoch": 1},
    {"step": 2, "val": {"loss": 3.0, "ap": 0.125, "cgf1": None}},
    {"step": 3, "lr": 1e-4, "loss": 11.0, "epoch": 2},
]


def read_table(folder: Path) -> list[dict]:
    """The table as rows of numbers, without its empty cells."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(text) for name, text in row.items() if text} for row in rows]


def named(rows: list[dict]) -> list[dict]:
    """Rows of log.jsonl as `read_table` gives them."""
    flat = [{"step": row["step"], **flat_figures(row)} for row in rows]
    return [{k: float(v) for k, v in row.items() if v is not None} for row in flat]


def fill(folder: Path, rows: list[dict], **options) -> RunLog:
    log = RunLog(folder, **options)
    for row in rows:
        log.add_row(row)
    return log


@pytest.fixture
def wandb(monkeypatch):
    """A Weights & Biases that lists what it is told."""
    module, calls = ModuleType("wandb"), []

    class Run:
        def log(self, figures):
            calls.append(("log", figures))

        def define_metric(self, name, step_metric):
            calls.append(("metric", name, step_metric))

        def finish(self):
            calls.append(("finish",))

    def init(**options):
        calls.append(("init", options))
        return Run()

    module.Error, module.Image, module.init = type("Error", (Exception,), {}), np.shape, init
    module.calls = calls
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


# Log and table ------------------------------------------------------------------------------------


def test_the_table_holds_what_the_log_holds(tmp_path):
    log = RunLog(tmp_path)
    headers = []
    for number, row in enumerate(ROWS, 1):
        log.add_row(row)
        assert read_log(tmp_path) == ROWS[:number]
        assert read_table(tmp_path) == named(ROWS[:number])
        headers.append((tmp_path / "metrics.csv").read_text().splitlines()[0])
    # A column keeps its place.
    assert all(later.startswith(header) for header, later in pairwise(headers))
    assert headers[-1] == (
        "step,train/lr,train/loss,train/epoch,train/iou,val/loss,val/ap,val/cgf1"
    )


@pytest.mark.parametrize(
    ("step", "evaluated", "logged", "kept"),
    [
        *((3, True, True, 4), (2, True, True, 3), (2, False, True, 2), (1, False, True, 1)),
        *((3, True, False, 3), (1, False, False, 0), (0, False, True, 0)),
    ],
)
def test_what_comes_after_a_checkpoint_is_cut(tmp_path, step, evaluated, logged, kept):
    fill(tmp_path, ROWS)
    for name in ("log.jsonl", "metrics.csv"):  # as a kill may leave them
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + text.splitlines()[-1][:9])
    RunLog(tmp_path, step, evaluated=evaluated, logged=logged)
    assert read_log(tmp_path) == ROWS[:kept]
    assert read_table(tmp_path) == named(ROWS[:kept])
    assert (tmp_path / "metrics.csv").read_text().endswith("\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "metrics.csv"]


def test_a_log_without_a_table_gets_one(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    RunLog(tmp_path, 3)
    assert read_table(tmp_path) == named(ROWS)


# TensorBoard --------------------------------------------------------------------------------------


def read_events(folder: Path) -> tuple[dict[str, list], list]:
    """Scalars as tag -> (step, value), and (step, width, height) of the panels."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    assert set(tags["images"]) <= {"val/panel"}
    scalars = {
        tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags["scalars"]
    }
    panels = accumulator.Images("val/panel") if tags["images"] else []
    return scalars, [(event.step, event.width, event.height) for event in panels]


def logged(rows: list[dict]) -> dict[str, list]:
    """Rows of log.jsonl as the scalars of `read_events`, which are of single precision."""
    found: dict[str, list] = {}
    for row in rows:
        for name, value in flat_figures(row).items():
            if value is not None:
                found.setdefault(name, []).append((row["step"], float(np.float32(value))))
    return found


@pytest.mark.scripts
def test_tensorboard_shows_what_the_log_holds(tmp_path):
    pytest.importorskip("tensorboard")
    log = fill(tmp_path, ROWS, tensorboard=True)
    # Readable while the run goes on.
    assert read_events(tmp_path) == (logged(ROWS), [])
    log.show(3, np.zeros((20, 30, 3), np.uint8))
    log.close()
    assert read_events(tmp_path) == (logged(ROWS), [(3, 30, 20)])
    assert (tmp_path / "val_panel.png").is_file() and (tmp_path / "curves.png").is_file()


@pytest.mark.scripts
def test_tensorboard_shows_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard")
    fill(tmp_path, [*ROWS, {"step": 4, "loss": 9.0}], tensorboard=True).close()
    again = [{"step": 3, "loss": 7.0}, {"step": 4, "loss": 6.0}]
    fill(tmp_path, again, step=2, tensorboard=True).close()
    assert read_events(tmp_path)[0]["train/loss"] == logged([*ROWS[:2], *again])["train/loss"]


@pytest.mark.scripts
@pytest.mark.parametrize("evaluated", [False, True])
def test_tensorboard_shows_no_row_of_the_same_step_twice(tmp_path, evaluated):
    """Resumed at step 2, whose validation, or else own row, is made again."""
    pytest.importorskip("tensorboard")
    fill(tmp_path, ROWS, tensorboard=True).close()
    lost = [ROWS[1] if evaluated else ROWS[2]]
    options = {"step": 2, "evaluated": evaluated, "logged": not evaluated}
    fill(tmp_path, lost, **options, tensorboard=True).close()
    scalars, expected = read_events(tmp_path)[0], logged(ROWS[:3])
    assert {name: sorted(values) for name, values in scalars.items()} == expected


@pytest.mark.scripts
def test_tensorboard_keeps_the_panel_of_the_step_that_a_run_goes_on_from(tmp_path):
    pytest.importorskip("tensorboard")
    log = fill(tmp_path, [ROWS[0], ROWS[2]], tensorboard=True)
    log.show(2, np.zeros((20, 30, 3), np.uint8))
    log.close()
    fill(tmp_path, [ROWS[3]], step=2, logged=False, tensorboard=True).close()
    assert read_events(tmp_path) == (logged([ROWS[0], *ROWS[2:]]), [(2, 30, 20)])


# Weights & Biases ---------------------------------------------------------------------------------


@pytest.mark.scripts
def test_weights_and_biases_gets_what_the_log_holds(tmp_path, wandb):
    run = tmp_path / "run"
    run.mkdir()
    log = fill(run, ROWS, wandb=True, settings={"lora": {"rank": 8}})
    log.show(3, np.zeros((20, 30, 3), np.uint8))
    log.close()
    (_, options), metric, *figures, panel, end = wandb.calls
    assert (options["name"], options["dir"], options["resume"]) == ("run", str(run), "allow")
    assert options["config"] == {"lora": {"rank": 8}}
    assert metric == ("metric", "*", "step")
    assert [value for _, value in figures] == named(ROWS)
    assert panel == ("log", {"step": 3, "val/panel": (20, 30, 3)}) and end == ("finish",)


def test_a_resumed_run_goes_on_with_its_curve(tmp_path, wandb):
    for step, folder in ((0, "one"), (3, "one"), (0, "two")):
        (tmp_path / folder).mkdir(exist_ok=True)
        RunLog(tmp_path / folder, step, wandb=True)
    first, again, other = (call[1]["id"] for call in wandb.calls if call[0] == "init")
    assert first == again != other and len(first) == 16


def test_no_login_to_weights_and_biases(tmp_path, wandb, monkeypatch):
    def refuse(**_):
        raise wandb.Error("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(RunLogError, match="found api_key not configured; run `wandb login`"):
        RunLog(tmp_path, wandb=True)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_not_there(name, monkeypatch):
    check_optional_packages(tensorboard=False, wandb=False)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(RunLogError, match=f"expected the package {name}.*pip install {name}, or"):
        check_optional_packages(**{"tensorboard": False, "wandb": False, name: True})


# The panel ----------------------------------------------------------------------------------------


def test_the_panel_shows_annotations_beside_detections(write_split, tmp_path):
    split = read_split(write_split(tmp_path, 6) / "val")
    results = [
        {"image_id": image_id, "category_id": a["category_id"], "score": score, "bbox": a["bbox"]}
        | ({"segmentation": a["segmentation"]} if score > 0.8 else {})
        for image_id, items in split.annotations.items()
        for a, score in zip(items, (0.9, 0.7)[: len(items)], strict=True)
    ]
    drawn = {t: detections_panel(split, results, t) for t in (0.5, 0.8, 0.95)}
    shape = drawn[0.5].shape
    # Four photos, of 96 x 64 pixels, below each other, twice.
    assert shape[0] > 4 * 384 > shape[1] > 2 * 576
    left, right = drawn[0.95][60:, : shape[1] // 2], drawn[0.95][60:, shape[1] // 2 :]
    assert not np.array_equal(left, right)
    for one, other in ((0.5, 0.8), (0.8, 0.95)):
        same = drawn[one] == drawn[other]
        assert same[60:, : shape[1] // 2].all() and not same[60:, shape[1] // 2 :].all()
    assert np.array_equal(drawn[0.5], detections_panel(split, results, 0.5))
    detections_panel(split, [], 0.5)


# Early stopping -----------------------------------------------------------------------------------


def test_the_better_of_two_validations():
    figures = {"loss": 2.0, "ap": 0.5, "cgf1": None}
    assert rank(figures, "ap") > rank({**figures, "ap": 0.4, "loss": 1.0}, "ap")
    assert rank(figures, "ap") < rank({**figures, "loss": 1.0}, "ap")
    assert rank(figures, "cgf1") < rank({**figures, "cgf1": 0.0, "loss": 9.0}, "cgf1")
    assert rank(figures, "loss") < rank({**figures, "loss": 1.0, "ap": 0.0}, "loss")


def test_the_line_of_a_validation_names_what_is_measured():
    figures = {"loss": 2.0, "iou": 0.25, "ap": None, "cgf1": None, "false_positive_rate": 0.5}
    assert describe(figures) == "loss 2, matched IoU 0.25, false_positive_rate 0.5"


def test_a_run_ends_with_its_best_and_the_next_command(
    tmp_path, monkeypatch, save_random_adapter, tiny_model_dir
):
    monkeypatch.chdir(tmp_path)
    lora, best = LoRAConfig(1, 1.0, 0.0, ("v_proj",), ("detr_decoder",)), Path("run/best_model")
    figures = {"step": 200, "metrics": {"ap": 0.4124, "cgf1": None}, "geometry_cls": "meta"}
    save_random_adapter(best / "lora_weights.pt", tiny_model_dir, lora, **figures)
    at, splits = (
        Progress(step=300, stale=2, patience=2),
        [Path("my data/train"), Path("my data/valid")],
    )
    stopped, done, following = describe_end(at, best, splits, "ap", "cpu", 0)
    assert stopped == "stopped early at step 300: 2 evaluations without a better ap"
    assert done == "done: best_model is step 200, ap 0.412: run/best_model/lora_weights.pt"
    words = "--lora_weights run/best_model --data_dir 'my data' --split valid --compare"
    words += " --device cpu"
    assert following.endswith(f"evaluate_sam3_lora.py {words}") and following.startswith(
        "next: python "
    )
    at.patience = None
    left_out, done = describe_end(at, best, splits[:1], "cgf1", "auto", 3)
    assert left_out.startswith("3 steps left out")
    assert done == "done: best_model is step 200: run/best_model/lora_weights.pt"
    Path("my data/test").mkdir(parents=True)
    Path("my data/test/annotations.json").touch()
    last = describe_end(at, best, splits, "ap", "auto", 0)[-1]
    assert last.endswith("'my data' --split test --compare")


def test_early_stopping_needs_a_validation_split():
    check_stopping(Config(), has_validation=False)
    asked = load_config(None, {"early_stopping_patience": 2})
    check_stopping(asked, has_validation=True)
    with pytest.raises(ConfigError, match="early_stopping_patience: expected a validation split"):
        check_stopping(asked, has_validation=False)


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def train(tiny_model_dir, run_data):
    """Runs the training script: `train(output, *flags) -> exit code`; three steps an epoch."""
    return lambda output, *flags: train_sam3_lora.main(
        run_flags(tiny_model_dir, run_data, output, *flags)
    )


def adapter_of(run: Path, folder: str = "last_model") -> dict:
    return torch.load(run / folder / "lora_weights.pt", weights_only=True)


@pytest.mark.scripts
def test_a_watched_run_is_the_same_run(train, tmp_path, wandb):
    pytest.importorskip("tensorboard")
    flags = ("--max_steps", "3", "--eval_steps", "2", "--mask_loss", "points")
    assert train(tmp_path / "plain", *flags) == 0
    assert train(tmp_path / "seen", *flags, "--tensorboard", "--wandb") == 0
    plain, seen = (adapter_of(tmp_path / name)["lora"] for name in ("plain", "seen"))
    assert all(torch.equal(plain[name], seen[name]) for name in plain)
    added = {path.name for path in (tmp_path / "seen").iterdir() if "tfevents" not in path.name}
    assert added - {path.name for path in (tmp_path / "plain").iterdir()} == {"wandb_id.txt"}
    rows = read_log(tmp_path / "seen")
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 3]
    for name in ("plain", "seen"):
        assert read_table(tmp_path / name) == named(read_log(tmp_path / name))
    scalars, panels = read_events(tmp_path / "seen")
    assert scalars == logged(rows)
    wanted = {"train/loss", "train/loss_mask", "train/lr", "train/img_per_s", "train/it_per_s"}
    wanted |= {"train/memory_gb", "train/grad_norm", "train/iou", "val/ap", "val/loss"}
    assert wanted <= scalars.keys()
    assert [step for step, *_ in panels] == [2, 3]
    sent = [call[1] for call in wandb.calls if call[0] == "log"]
    assert [figures for figures in sent if "val/panel" not in figures] == named(rows)
    assert wandb.calls[0][1]["config"]["training"]["max_steps"] == 3


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(*ap)`: the AP of the validations to come."""

    def script(*values: float) -> None:
        figures = iter(values)
        monkeypatch.setattr(
            train_sam3_lora, "validation_figures", lambda _: {"loss": 1.0, "ap": next(figures)}
        )

    return script


@pytest.mark.scripts
def test_an_early_stop_is_exact_and_stays(train, scripted, tmp_path, caplog):
    """AP rises at step 2 only; of patience 2 the run ends at step 4, in the midst of an epoch."""
    run = tmp_path / "run"
    flags = ["--max_steps", "7", "--eval_steps", "1", "--save_steps", "1"]
    flags += ["--save_total_limit", "9", "--logging_steps", "3"]

    def logged() -> list[int]:
        return [row["step"] for row in read_log(run) if "val" not in row]

    scripted(0.1, 0.2, 0.1, 0.15)
    assert train(run, *flags, "--early_stopping_patience", "2") == 0
    assert "stopped early at step 4: 2 evaluations without a better ap" in caplog.text
    assert f"done: best_model is step 2, ap 0.200: {run / 'best_model'}" in caplog.text
    assert "step 3/7: " in caplog.text and caplog.text.count(" s left\n") == 1
    assert caplog.text.count("loading ") == 1
    whole = adapter_of(run)
    assert whole["step"] == 4 and adapter_of(run, "best_model")["step"] == 2
    assert (run / "curves.png").is_file()
    # Killed before its last step, it stops at the same one: the count is in the checkpoint.
    for file in (run / "checkpoint-4").iterdir():
        file.unlink()
    (run / "checkpoint-4").rmdir()
    scripted(0.15)
    assert train(run, *flags, "--early_stopping_patience", "2", "--resume") == 0
    again = adapter_of(run)
    assert again["step"] == 4
    assert all(torch.equal(whole["lora"][name], again["lora"][name]) for name in whole["lora"])
    # It stays stopped, until it is let go on.
    scripted()
    caplog.clear()
    assert train(run, *flags, "--early_stopping_patience", "2", "--resume") == 0
    assert "at step 4 of 7; it stopped early: raise --early_stopping_patience" in caplog.text
    assert adapter_of(run)["step"] == 4 and logged() == [3, 4]
    scripted(0.15)
    assert train(run, *flags, "--early_stopping_patience", "3", "--resume") == 0
    assert adapter_of(run)["step"] == 5
    assert logged() == [3, 5]
    # A checkpoint from before there was a count.
    state = torch.load(run / "checkpoint-5" / "training_state.pt", weights_only=True)
    assert state.pop("stale") == 3
    torch.save(state, run / "checkpoint-5" / "training_state.pt")
    scripted(0.15, 0.15)
    assert train(run, *flags, "--early_stopping_patience", "3", "--resume") == 0
    assert adapter_of(run)["step"] == 7
    assert [row["step"] for row in read_log(run) if "val" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert logged() == [3, 6, 7]


@pytest.mark.scripts
def test_a_validation_is_logged_once(train, tmp_path, monkeypatch):
    """Killed between the evaluation that ends an epoch and its checkpoint."""
    save = train_sam3_lora.save_now

    def killed(run):
        if run.at.evaluated == run.at.step:
            raise KeyboardInterrupt
        save(run)

    flags = ("--max_steps", "3", "--save_steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(train_sam3_lora, "save_now", killed)
        assert train(tmp_path / "run", *flags) == 130
    # A run that was killed has its pictures.
    assert {"curves.png", "val_panel.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert train(tmp_path / "run", *flags, "--resume") == 0
    steps = [(row["step"], "val" in row) for row in read_log(tmp_path / "run")]
    assert steps == [(1, False), (2, False), (3, False), (3, True)]


@pytest.mark.scripts
def test_what_cannot_be_watched_is_refused_before_anything_is_touched(
    train, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.log").write_text("an earlier run's")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(run, "--wandb") == 2
    monkeypatch.setattr(train_sam3_lora, "read_splits", lambda *_: (None, None))
    assert train(run, "--early_stopping_patience", "3") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2
    assert "pip install wandb, or drop --wandb" in errors[0]
    assert "name one with --val_data_path" in errors[1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (run / "train.log").read_text() == "an earlier run's"
