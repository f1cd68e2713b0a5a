"""What tests of whole training runs share: their flags, their processes, runs compared."""

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_sam3_lora

MINIMAL = Path(__file__).resolve().parent.parent / "configs" / "minimal_lora_config.yaml"
# Figures of the log that no two runs have in common.
TIMED = {"it_per_s", "img_per_s", "memory_gb", "memory_percent"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def fork(work, folder: Path, count: int = 1) -> list[tuple[int, str]]:
    """Runs `work(rank)` in so many connected processes; exit code and stderr of each."""
    folder.mkdir(parents=True, exist_ok=True)
    children, port = [], str(free_port())
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if count > 1:
                    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")
                    values = map(str, (count, count, rank, rank))
                    os.environ.update(zip(names, values, strict=True))
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                for stream, name in ((1, "out"), (2, "err")):
                    file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(file, stream)
                sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
                code = work(rank)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [(code, (folder / f"{rank}.err").read_text()) for rank, code in enumerate(codes)]


def run_flags(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """Flags of a small training run, which more of them, coming later, may change."""
    return [
        *("--config", str(MINIMAL), "--model_name", str(model)),
        *("--train_data_path", str(data / "train"), "--output_dir", str(output)),
        *("--num_workers", "0", "--batch_size", "2", "--num_epochs", "1"),
        *("--logging_steps", "1", "--prompts_per_image", "3", *more),
    ]


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, two: Path, tolerance: float = 0.0) -> None:
    """The same figures logged, but of time and memory, and the same adapters."""
    rows, others = read_log(one), read_log(two)
    assert [r.keys() for r in rows] == [r.keys() for r in others]
    for row, other in zip(rows, others, strict=True):
        for name in row.keys() - TIMED:
            assert_close(row[name], other[name], tolerance, tolerance)
    for name in ("best_model", "last_model"):
        mine, theirs = (
            torch.load(run / name / "lora_weights.pt", weights_only=True)["lora"]
            for run in (one, two)
        )
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert float((value - theirs[key]).abs().max()) <= tolerance, key


def assert_close(one, two, relative: float = 1e-9, absolute: float = 1e-12) -> None:
    """Equal JSON, numbers to rounding."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_close(one[key], two[key], relative, absolute)
    elif isinstance(one, list):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_close(left, right, relative, absolute)
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=relative, abs=absolute)
    else:
        assert one == two


def at_step(step: int, act: Callable[[], object]) -> None:
    """Has this process do something as its run logs a step."""
    original = train_sam3_lora.log_steps

    def log_steps(run, epoch):
        if run.at.step == step:
            act()
        return original(run, epoch)

    train_sam3_lora.log_steps = log_steps
