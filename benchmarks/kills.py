r"""Does a run that is killed, whenever, and resumed end as the run that was not?

Trains the demo model on a few drawn images with train_sam3_lora.py: once undisturbed, then over and
over, killed at random moments and resumed until it is finished, and compared: the losses of each
logged step and validation, the adapters bit by bit, what is left on the disk. POSIX only.

    python benchmarks/kills.py --kills 50
    python benchmarks/kills.py --kills 5 --signals 2 --train_flags "--max_steps 7"

More than a third of the kills wait for a checkpoint or another file that is being written, a few
for start-up and evaluation; the others come at any time. --signals is the number of SIGTERMs and of
SIGINTs, after which the run must have saved, printed the command to resume, and gone with 143 or
130. Prints three tables; exit code 1 where anything differs or is left. Linux shows what is left of
processes.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
# A script in a folder of its own: the package lies one level up.
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
import train_sam3_lora  # noqa: E402
from sam3_lora.checkpoint import checkpoints, read_adapter  # noqa: E402
from sam3_lora.config import ConfigError, user_errors  # noqa: E402
from sam3_lora.flags import FlagParser  # noqa: E402

# What a run does, by the function of train_sam3_lora.py that does it; the first is before them all.
PHASES = {
    "start-up": "",
    "training": "train_epoch",
    "evaluation": "evaluate_now",
    "saving an adapter": "save_model",
    "saving a checkpoint": "save_now",
}
# Figures of a log line that tell of the machine, not of the training.
TIMES = ("it_per_s", "img_per_s", "memory_gb", "memory_percent")
# Seconds until a worker notices that its parent is gone: torch looks every 5.
WORKERS_NOTICE = 15.0
# 4.6 epochs of 5 steps; of the steps between two checkpoints, log lines and evaluations, no number
# divides another.
SETTINGS = """
--lora_dropout 0.1 --lora_rank 4 --augment --mask_loss points --batch_size 1 --num_workers 1
--gradient_accumulation_steps 2 --max_steps 23 --learning_rate 1e-3 --prompts_per_image 2
--save_steps 3 --logging_steps 4 --eval_steps 7 --save_total_limit 2 --device cpu
"""
IMAGES = {"train": 10, "val": 2}


@dataclass
class Tally:
    """What came of the kills."""

    hits: Counter[str] = field(default_factory=Counter)
    half_written: int = 0
    resumes: int = 0
    runs: int = 0
    numbers: int = 0
    difference: float = 0.0
    faults: list[str] = field(default_factory=list)


class Trainer:
    """A run in a process of its own, forked from this one, which has everything imported."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.phase = mmap.mmap(-1, 1)
        self.started = time.monotonic()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = self._work(arguments, log)
            finally:
                os._exit(code)

    def _work(self, arguments: list[str], log: Path) -> int:
        """In the new process: trains, and tells where it is; a session finds its workers again."""
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
        sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
        for stream in (1, 2):
            os.dup2(sys.stdout.fileno(), stream)
        with ExitStack() as stack:
            for number, name in enumerate(PHASES.values()):
                if name:
                    replacement = self._telling(number, getattr(train_sam3_lora, name))
                    stack.enter_context(patch.object(train_sam3_lora, name, replacement))
            with patch.object(sys, "argv", ["train_sam3_lora.py", *arguments]):
                return train_sam3_lora.main(arguments)

    def _telling(self, number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, within which the phase is this one."""

        def told(*args: Any, **named: Any) -> Any:
            before, self.phase[0] = self.phase[0], number
            try:
                return function(*args, **named)
            finally:
                self.phase[0] = before

        return told

    def ended(self) -> bool:
        """Whether the process is gone."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def wait(self) -> int:
        """Its exit code, as a shell tells it."""
        while not self.ended():
            time.sleep(0.005)
        code = os.waitstatus_to_exitcode(self.status)
        return code if code >= 0 else 128 - code

    def send(self, number: int, ready: Callable[[], bool]) -> bool:
        """Sends a signal as soon as it is time; False where the process came to its end before."""
        while not self.ended():
            if ready():
                os.kill(self.pid, number)
                return True
            time.sleep(0.001)
        return False

    def where(self) -> str:
        """What it does, or did when it was killed."""
        return list(PHASES)[self.phase[0]]

    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.started


def temporary_files(folder: Path) -> list[Path]:
    """What is being written, or was when a kill came."""
    while True:
        try:
            return [*folder.glob(".*"), *folder.glob("*/.*")]
        except FileNotFoundError:  # the run has just removed a folder: once more
            continue


def draw_data(folder: Path) -> None:
    """The first images of the demo's splits."""
    with redirect_stdout(sys.stderr):
        code = prepare_data.main(["demo", "--output_dir", str(folder / "demo"), "--overwrite"])
    if code:
        raise ConfigError("expected prepare_data.py to draw the data, found the error above")
    for split, count in IMAGES.items():
        place = folder / "demo" / split
        (file,) = place.glob("*.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        content["images"] = content["images"][:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        file.write_text(json.dumps(content), encoding="utf-8")


def arguments_of(data: Path, run: Path, more: list[str]) -> list[str]:
    """The flags of a run, resumed where there is a checkpoint, else anew."""
    flags = ["--config", str(ROOT / "configs/demo_config.yaml"), *shlex.split(SETTINGS)]
    flags += ["--model_name", str(ROOT / "demo/sam3_tiny"), "--output_dir", str(run)]
    flags += ["--train_data_path", str(data / "train"), *more]
    return [*flags, "--resume" if checkpoints(run) else "--overwrite"]


def moment(
    trainer: Trainer, run: Path, kind: str, longest: float, rng: random.Random
) -> Callable[[], bool]:
    """When to send the signal: at a time, or after it once something shows."""
    if kind == "start-up":
        longest /= 10
    earliest = rng.uniform(0, longest if kind in ("any", "start-up") else longest / 2)

    def ready() -> bool:
        if trainer.seconds() < earliest:
            return False
        if kind == "checkpoint":
            return any(run.glob(".checkpoint-*.tmp"))
        if kind == "any file":
            return bool(temporary_files(run))
        return kind != "evaluation" or trainer.where() == "evaluation"

    return ready


def figures(run: Path) -> dict[str, float | None]:
    """Every figure of log.jsonl by a name of its own, but those of the machine."""
    found: dict[str, float | None] = {}
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind, values = ("val", row["val"]) if "val" in row else ("train", row)
        for name, value in values.items():
            key = f"{kind}/{name} of step {row['step']}"
            if name not in TIMES:
                found[key if key not in found else f"{key}, again"] = value
    return found


def compare(whole: Path, run: Path, tally: Tally) -> None:
    """Holds a killed and resumed run against the undisturbed one."""
    expected, found = figures(whole), figures(run)
    for name in expected.keys() ^ found.keys():
        tally.faults.append(f"{name}: {'lost' if name in expected else 'not in the whole run'}")
    for name in expected.keys() & found.keys():
        ours, theirs = expected[name], found[name]
        tally.numbers += 1
        if ours != theirs:
            apart = abs(ours - theirs) if None not in (ours, theirs) else float("inf")
            tally.difference = max(tally.difference, apart)
            tally.faults.append(f"{name}: {ours} against {theirs}")
    for name in ("best_model", "last_model"):
        ours, theirs = (read_adapter(folder / name) for folder in (whole, run))
        same = ours["lora"].keys() == theirs["lora"].keys() and ours["step"] == theirs["step"]
        if not same or not all(torch.equal(t, theirs["lora"][n]) for n, t in ours["lora"].items()):
            tally.faults.append(f"{name}: other tensors")
    tally.faults += [f"left: {path}" for path in temporary_files(run)]
    tally.runs += 1


def session_members(sessions: set[int]) -> list[int]:
    """Processes of trainers and their workers that still live."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (
                (place / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[:4]
            )
        except OSError:  # gone meanwhile
            continue
        if int(session) in sessions and state != "Z":
            found.append(int(place.name))
    return found


def finish(args: argparse.Namespace, run: Path, sessions: set[int]) -> Trainer:
    """A run from where it stands, in a process of its own."""
    trainer = Trainer(arguments_of(args.data_dir, run, args.train_flags), run.parent / "log.txt")
    sessions.add(trainer.pid)
    return trainer


def kill(
    args: argparse.Namespace, whole: Path, longest: float, sessions: set[int], rng: random.Random
) -> Tally:
    """Runs, killed and resumed until each is finished, until there were enough kills."""
    tally, run = Tally(), args.output_dir / "killed"
    kinds = ["any", "checkpoint", "any", "start-up", "any file", "any", "evaluation", "checkpoint"]
    while sum(tally.hits.values()) < args.kills:
        shutil.rmtree(run, ignore_errors=True)
        finished = False
        while not finished:
            resumed, trainer = bool(checkpoints(run)), finish(args, run, sessions)
            tally.resumes += resumed
            count = sum(tally.hits.values())
            hit = count < args.kills and trainer.send(
                signal.SIGKILL, moment(trainer, run, kinds[count % len(kinds)], longest, rng)
            )
            code = trainer.wait()
            if hit:
                tally.hits[trainer.where()] += 1
                tally.half_written += bool(temporary_files(run))
            elif code:
                raise ConfigError(f"expected exit code 0, found {code}: see {run.parent}/log.txt")
            finished = not hit or code == 0
        compare(whole, run, tally)
    return tally


def ask(
    args: argparse.Namespace, whole: Path, longest: float, sessions: set[int], rng: random.Random
) -> tuple[Tally, list[str]]:
    """Runs that are asked to end by SIGTERM and SIGINT; the tally, and a line for each signal."""
    tally, lines, run = Tally(), [], args.output_dir / "asked"
    for number, name in enumerate(("SIGTERM", "SIGINT") * args.signals):
        shutil.rmtree(run, ignore_errors=True)
        expected = 128 + getattr(signal, name)
        log = run.parent / f"signal-{number}.txt"
        trainer = Trainer(arguments_of(args.data_dir, run, args.train_flags), log)
        sessions.add(trainer.pid)
        hit = trainer.send(getattr(signal, name), moment(trainer, run, "any", longest, rng))
        where, code = trainer.where(), trainer.wait()
        steps = [folder.name for folder in checkpoints(run)]
        lines.append(f"| {name} | {where} | {code} | {steps[-1] if steps else 'none'} |")
        if hit and code not in (expected, 0):
            tally.faults.append(f"{name} in {where}: exit code {code}, expected {expected}")
        commands = [line for line in log.read_text().splitlines() if "--resume" in line]
        if code == expected and steps:
            if not commands:
                tally.faults.append(f"{name} in {where}: no command to resume in {log}")
                continue
            words = shlex.split(commands[-1].partition("train_sam3_lora.py")[2])
            trainer = Trainer(words, log)
            sessions.add(trainer.pid)
            tally.resumes += 1
            if again := trainer.wait():
                tally.faults.append(f"{commands[-1]}: exit code {again}")
                continue
        elif code:
            finish(args, run, sessions).wait()
        compare(whole, run, tally)
    return tally, lines


def summary(name: str, tally: Tally) -> str:
    """A tally as a table."""
    rows = [(f"{name} in {where}", tally.hits[where]) for where in PHASES if tally.hits[where]]
    rows += [("with a file half-written", tally.half_written)] if tally.hits else []
    rows += [("resumes", tally.resumes), ("finished runs compared", tally.runs)]
    rows += [("figures compared", tally.numbers), ("largest difference", tally.difference)]
    rows += [("faults", len(tally.faults))]
    lines = ["| what | number |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    return "\n".join([*lines, *(f"- {fault}" for fault in tally.faults[:20])]) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--kills", type=int, default=50, help="SIGKILLs")
    add("--signals", type=int, default=5, help="SIGTERMs, and as many SIGINTs")
    add("--seed", type=int, default=0, help="of the moments")
    add("--output_dir", type=Path, help="for data and runs (default: a temporary folder)")
    add("--train_flags", type=shlex.split, default=[], metavar="'--FLAG VALUE ...'",
        help="for train_sam3_lora.py, as one word")  # fmt: skip
    return parser


def measure(args: argparse.Namespace) -> int:
    """The undisturbed run, the killed ones, and what they left."""
    rng, sessions, whole = random.Random(args.seed), set(), args.output_dir / "whole"
    args.data_dir = args.output_dir / "demo"
    draw_data(args.output_dir)
    shutil.rmtree(whole, ignore_errors=True)
    trainer = finish(args, whole, sessions)
    if code := trainer.wait():
        raise ConfigError(f"expected exit code 0, found {code}: see {args.output_dir}/log.txt")
    longest = trainer.seconds()
    killed = kill(args, whole, longest, sessions, rng)
    sys.stdout.write(f"{summary('SIGKILL', killed)}\n")
    asked, lines = ask(args, whole, longest, sessions, rng)
    head = ["| signal | in | exit code | newest checkpoint |", "|---|---|---|---|"]
    sys.stdout.write("\n".join([*head, *lines]) + f"\n\n{summary('signal', asked)}\n")
    until = time.monotonic() + WORKERS_NOTICE
    while (left := session_members(sessions)) and time.monotonic() < until:
        time.sleep(0.1)
    sys.stdout.write(f"undisturbed run: {longest:.1f} s; processes left: {len(left)}\n")
    return int(bool(left or killed.faults or asked.faults))


@user_errors()
def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    args = build_parser().parse_args(argv)
    if not hasattr(os, "fork"):
        raise ConfigError("expected a system that can fork, found Windows; run it elsewhere")
    torch.set_num_threads(1)  # else forking a process that has computed may hang it
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir = (args.output_dir or Path(scratch)).resolve()
        args.output_dir.mkdir(parents=True, exist_ok=True)
        return measure(args)


if __name__ == "__main__":
    sys.exit(main())
