"""Where a run stands, and where its figures go while it trains.

    log.jsonl      a line a logged step and a validation; what follows is made from it
    metrics.csv    the same, as a table
    curves.png     the same, drawn
    val_panel.png  annotations beside what the adapter finds
    events.out.tfevents.*   the same for TensorBoard, wandb/ for Weights & Biases: where asked for

A figure has one name in the table, TensorBoard and Weights & Biases: train/loss, val/ap.
"""

from __future__ import annotations

import csv
import gc
import importlib
import importlib.metadata
import io
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam3_lora.checkpoint import ADAPTER_FILE, read_adapter
from sam3_lora.drawing import draw_curves
from sam3_lora.files import telling, write_picture, write_text
from sam3_lora.layout import annotation_file
from sam3_lora.processes import command_line

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

LOG_FILE = "log.jsonl"
EVALUATE = Path(__file__).resolve().parent.parent / "evaluate_sam3_lora.py"
TABLE_FILE = "metrics.csv"
WANDB_ID_FILE = "wandb_id.txt"
# Optional package -> what is imported of it.
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
# Of a run's Progress, what a checkpoint keeps as it is.
RESUMED = ("records", "best", "stale", "val")


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: optimizer steps done.
        records: of `engine.train_one_epoch`, of the steps since the last line of the log.
        best, stale: the best evaluation's figure (`evaluation.rank`), and evaluations since.
        evaluated, figure, val: step of the last evaluation, its figure, all its figures by name.
        patience: evaluations without a better one that end a run; None: it goes on.
        began: step and time, as of `time.monotonic`, at which this process took the run up.
    """

    step: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    best: list[float] | None = None
    stale: int = 0
    evaluated: int = -1
    figure: list[float] | None = None
    val: dict[str, Any] = field(default_factory=dict)
    patience: int | None = None
    began: tuple[int, float] | None = None

    @property
    def stopped(self) -> bool:
        """Whether the run ends early."""
        return self.patience is not None and self.stale >= self.patience

    def judge(self, figures: dict[str, Any], figure: list[float]) -> bool:
        """Takes an evaluation of this step; returns whether it is the best so far."""
        better = self.best is None or figure > self.best
        self.evaluated, self.val, self.figure = self.step, figures, figure
        self.best, self.stale = (figure, 0) if better else (self.best, self.stale + 1)
        return better

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; `figure` is None where this step was not evaluated."""
        figure = self.figure if self.evaluated == self.step else None
        return {"figure": figure, **{name: getattr(self, name) for name in RESUMED}}

    def begin(self) -> None:
        """Notes where and when this process takes the run up."""
        self.began = self.step, time.monotonic()

    def seconds_left(self, total_steps: int) -> float | None:
        """What the run still takes at its pace so far, evaluations and all; None: not known."""
        step, then = self.began or (self.step, 0.0)
        if self.stopped or not step < self.step < total_steps:
            return None
        return (total_steps - self.step) * (time.monotonic() - then) / (self.step - step)

    def ending(self, total_steps: int) -> str:
        """What to do about a run that has nothing left to train, for a message; else nothing."""
        if self.step >= total_steps:
            return "; it is finished: raise --max_steps or --num_epochs"
        return "; it stopped early: raise --early_stopping_patience" if self.stopped else ""

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state; one of an earlier version lacks some of it."""
        self.step, self.figure = state["step"], state["figure"]
        self.evaluated = self.step if self.figure else -1
        for name in RESUMED:
            setattr(self, name, state.get(name, getattr(self, name)))


class RunLogError(RuntimeError):
    """A service for figures that cannot be used: what was expected, found, to do."""


def check_optional_packages(**asked: bool) -> None:
    """Imports the optional packages that are asked for.

    Args:
        asked: whether each of PACKAGES is.

    Raises:
        RunLogError: one is not there.
    """
    for name in (name for name, wanted in asked.items() if wanted):
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            raise RunLogError(
                f"output.{name} is true: expected the package {name}, found {error}; "
                f"pip install {name}, or drop --{name}"
            ) from error


def environment(source: Path) -> str:
    """Commit of a source file's checkout and versions of what runs it, for the log's first line."""
    command = ["git", "-C", str(source.parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"  # not a clone
    library = importlib.metadata.version("transformers")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    return f"sam3-lora {commit}, {versions}, transformers {library}"


def flat_figures(row: dict[str, Any]) -> dict[str, Any]:
    """A row's figures but its step, by their names: `train/<name>`, of a validation `val/<name>`.

    Args:
        row: of log.jsonl: "step" and figures, or "step" and the dict "val" of them.
    """
    if "val" in row:
        return {f"val/{name}": value for name, value in row["val"].items()}
    return {f"train/{k.removeprefix('train_')}": v for k, v in row.items() if k != "step"}


def memory_use(device: torch.device) -> tuple[float, float] | None:
    """Peak memory of this run and all there is, in GB (10^9 bytes): of the GPU, or of the process.

    Returns:
        (peak, total), or None where the system does not tell.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 1e9, total / 1e9
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB on Linux
    return peak / 1e9, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def available_ram() -> int | None:
    """Bytes of RAM that a new process can have, None where the system does not tell."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line]
    # What a container may have.
    with suppress(OSError, ValueError):
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if not found and hasattr(os, "sysconf"):
        with suppress(OSError, ValueError):  # a Mac: all there is
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def mean_record(records: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """The log's line for some steps: means of the last layer's terms, speed, memory.

    Args:
        records: of `engine.train_one_epoch`, one a step.
        device: where the model runs.

    Returns:
        `step` and `lr` of the last one, each term's mean over the steps taken, `train_iou` over
        those with objects, `skipped`, the number left out, if any, `it_per_s`, `img_per_s`, and
        where the system tells `memory_gb`, `memory_percent`.
    """
    sums: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            # A step without objects has no IoU to average.
            unused = name in ("seconds", "lr", "skipped") or "_aux_" in name
            unused = unused or (name == "iou" and not record["counts"]["targets"])
            if isinstance(value, float) and not unused:
                sums["train_iou" if name == "iou" else name].append(value)
    row = {"step": records[-1]["step"], "lr": records[-1]["lr"]}
    row |= {name: sum(values) / len(values) for name, values in sums.items()}
    if skipped := sum(record.get("skipped", 0) for record in records):
        row["skipped"] = skipped
    seconds = sum(record["seconds"] for record in records)
    row["it_per_s"] = len(records) / seconds
    row["img_per_s"] = sum(record["images"] for record in records) / seconds
    if memory := memory_use(device):
        row["memory_gb"], row["memory_percent"] = memory[0], 100 * memory[0] / memory[1]
    return row


def progress_text(row: dict[str, Any], seconds_left: float | None = None) -> str:
    """A line of the log for eyes, with the time that the run still takes, if that is known."""
    text = f"loss {row['loss']:.3f}, " if "loss" in row else ""
    text += f"{row['skipped']:.0f} left out, " if "skipped" in row else ""
    text += f"lr {row['lr']:.2e}, {row['it_per_s']:.2f} it/s, {row['img_per_s']:.1f} img/s"
    if "train_iou" in row:
        text += f", matched IoU {row['train_iou']:.3f}"
    if "memory_gb" in row:
        text += f", {row['memory_gb']:.2f} GB ({row['memory_percent']:.0f} %)"
    return text if seconds_left is None else f"{text}, {_show_time(seconds_left)} left"


def _show_time(seconds: float) -> str:
    """A time as a person would say it."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def describe_end(
    at: Progress, best: Path, splits: Sequence[Path], metric: str, device: str, skipped: int
) -> list[str]:
    """How a run went, which adapter is its best, and the next command, in lines for the log.

    Args:
        at: where it stands.
        best: folder of that adapter.
        splits: folder of the training split and, if there is one, of the validation split.
        metric: figure that chose the adapter.
        device: `hardware.device`.
        skipped: steps left out.
    """
    lines = [f"{skipped} steps left out, as not finite: see train.log"] * (skipped > 0)
    if at.stopped:
        stale = f"{at.stale} evaluations without a better {metric}"
        lines.append(f"stopped early at step {at.step}: {stale}")
    adapter = read_adapter(best)
    value = adapter["metrics"].get(metric)
    figure = "" if value is None else f", {metric} {value:.3f}"
    lines.append(f"done: {best.name} is step {adapter['step']}{figure}: {best / ADAPTER_FILE}")
    tests = [folder.parent / "test" for folder in splits[:1]]
    if measured := [folder for folder in tests if annotation_file(folder)] + [*splits[1:]]:
        words = ["--lora_weights", str(best), "--data_dir", str(measured[0].parent)]
        words += ["--split", measured[0].name, "--compare"]
        words += ["--device", device] * (device != "auto")
        lines.append(f"next: {command_line(EVALUATE, *words)}")
    return lines


class RunLog:
    """A run's folder, open for figures.

    Args:
        folder: of the run.
        step: rows after it are dropped: a resumed run makes them again.
        evaluated: whether this step's validation was done; if not, its row is dropped too.
        logged: whether this step's own row was due; if not, its row, as of a run that stopped
            early, is dropped too.
        tensorboard, wandb: whether figures also go there, see `check_optional_packages`.
        settings: the run's, plain values, for Weights & Biases.

    Raises:
        RunLogError: Weights & Biases cannot be reached.
    """

    def __init__(
        self,
        folder: Path,
        step: int = 0,
        *,
        evaluated: bool = True,
        logged: bool = True,
        tensorboard: bool = False,
        wandb: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        rows = _read_rows(folder / LOG_FILE)
        here = [row for row in rows if row["step"] == step]
        stay = [row for row in here if (evaluated if "val" in row else logged)]
        self.rows = [row for row in rows if row["step"] < step] + stay
        write_text(folder / LOG_FILE, "".join(map(_line, self.rows)))
        self._write_table()
        self._events = self._wandb = None
        if tensorboard:
            writer = importlib.import_module(PACKAGES["tensorboard"]).SummaryWriter
            # TensorBoard then hides what an interrupted run wrote of the steps to come.
            self._events = writer(str(folder), purge_step=step + (stay == here) if step else None)
            for row in stay if stay != here else ():  # which is hidden too
                self._add_events(row)
        if wandb:
            self._wandb = _open_wandb(folder, settings)

    def add_row(self, row: dict[str, Any]) -> None:
        """Adds the figures of a step: a row as `flat_figures` takes."""
        self.rows.append(row)
        _append(self.folder / LOG_FILE, _line(row))
        figures = flat_figures(row)
        if figures.keys() <= set(self._columns):
            _append(self.folder / TABLE_FILE, self._table([row]))
        else:
            self._write_table()
        if self._events:
            self._add_events(row)
        if self._wandb:
            known = {name: value for name, value in figures.items() if value is not None}
            self._wandb.log({"step": row["step"], **known})

    def show(self, step: int, panel: np.ndarray | None = None) -> None:
        """Draws the curves anew and, where given, a step's panel, uint8 (H, W, 3)."""
        draw_curves(self.rows, self.folder / "curves.png")
        # A drawing is 18,000 objects in cycles, 7 MB, that Python lets lie until there are more.
        gc.collect()
        if panel is None:
            return
        write_picture(self.folder / "val_panel.png", panel)
        if self._events:
            self._events.add_image("val/panel", panel, step, dataformats="HWC")
            self._events.flush()
        if self._wandb:
            image = importlib.import_module("wandb").Image(panel)
            self._wandb.log({"step": step, "val/panel": image})

    def close(self) -> None:
        """Ends what was opened."""
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()

    def _add_events(self, row: dict[str, Any]) -> None:
        """Tells TensorBoard the figures of a row."""
        for name, value in flat_figures(row).items():
            if value is not None:
                self._events.add_scalar(name, value, row["step"])
        self._events.flush()

    def _write_table(self) -> None:
        """Writes the whole table: columns are added on the right as figures first come up."""
        names = (name for row in self.rows for name in flat_figures(row))
        self._columns = list(dict.fromkeys(("step", *names)))
        header = ",".join(self._columns) + "\n"
        write_text(self.folder / TABLE_FILE, header + self._table(self.rows))

    def _table(self, rows: list[dict[str, Any]]) -> str:
        """Rows as lines of the table; what a row has not, or is undefined, is empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writerows({"step": row["step"], **flat_figures(row)} for row in rows)
        return text.getvalue()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl, but a last one that a kill left half-written."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _line(row: dict[str, Any]) -> str:
    """A row as a line of log.jsonl."""
    return json.dumps(row) + "\n"


def _append(path: Path, line: str) -> None:
    """Adds a line to a file in one write, which a kill does not cut."""
    with telling(path), path.open("a", encoding="utf-8") as file:
        file.write(line)


def _open_wandb(folder: Path, settings: dict[str, Any] | None) -> Any:
    """Begins a run of Weights & Biases, or goes on with the one whose id the folder holds."""
    wandb, id_file = importlib.import_module("wandb"), folder / WANDB_ID_FILE
    if not id_file.exists():
        write_text(id_file, secrets.token_hex(8))
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sam3-lora"),
            name=folder.name,
            dir=str(folder),
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            config=settings,
        )
    except wandb.Error as error:
        raise RunLogError(
            f"--wandb: expected a login to Weights & Biases, found {error}; run `wandb login`, or "
            "set WANDB_MODE=offline"
        ) from error
    # Its own step only ever rises; a resumed run goes over some steps again.
    run.define_metric("*", step_metric="step")
    return run
