r"""Does a long run stay as it began: its memory, its open files, its processes, its speed?

Trains the demo model with train_sam3_lora.py in this process, with workers, evaluations and
checkpoints, and looks at the process after every step; Linux only.

    python benchmarks/soak.py --data_dir data/demo
    python benchmarks/soak.py --data_dir data/demo --train_flags "--cache_features ram"

Draws the data where the folder has none. Prints the growth of memory, what is left at the end, and
the CPU time of late steps against early ones; exit code 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
# A script in a folder of its own: the package lies one level up.
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
import train_sam3_lora  # noqa: E402
from sam3_lora import engine  # noqa: E402
from sam3_lora.config import ConfigError, setup_logging, user_errors  # noqa: E402
from sam3_lora.flags import FlagParser  # noqa: E402
from sam3_lora.prompts import parse_count  # noqa: E402

# One image of the demo model (112 x 112, 3 bytes) kept a step would be 38 MB in 1,000 steps.
MOST_GROWTH = 10.0
# Late steps' CPU time above early ones', as a share.
MOST_SLOWER = 0.05
# Steps until caches, pools and the optimizer's state are filled.
WARMUP_STEPS = 20


@dataclass
class Sample:
    """What the process holds after a step, and what the step took."""

    step: int
    megabytes: float  # resident
    handles: int
    threads: int
    children: int
    cpu_seconds: float


def look(step: int = 0, cpu_seconds: float = 0.0) -> Sample:
    """The process as it is now."""
    process = Path("/proc/self")
    pages = int((process / "statm").read_text().split()[1])
    # The listing itself is one handle.
    handles = len(os.listdir(process / "fd")) - 1
    tasks = list((process / "task").iterdir())
    children = sum(len((task / "children").read_text().split()) for task in tasks)
    return Sample(
        step, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, handles, len(tasks), children, cpu_seconds
    )


def watched(samples: list[Sample]) -> Callable[..., Iterator[dict[str, Any]]]:
    """`engine.train_one_epoch`, of which every step leaves a sample."""
    original = engine.train_one_epoch

    def train_one_epoch(*args: Any, **settings: Any) -> Iterator[dict[str, Any]]:
        records = original(*args, **settings)
        while True:
            started = time.process_time()
            record = next(records, None)
            if record is None:
                return
            samples.append(look(record["step"], time.process_time() - started))
            yield record

    return train_one_epoch


def growth(samples: list[Sample]) -> float:
    """MB in 1,000 steps: the slope of the least squares over all but the first tenth."""
    late = samples[max(len(samples) // 10, min(WARMUP_STEPS, len(samples) // 2)) :]
    slope = np.polyfit([s.step for s in late], [s.megabytes for s in late], 1)[0]
    return float(slope) * 1000


def slower(samples: list[Sample]) -> tuple[float, float]:
    """Median CPU seconds of a step, over the first tenth after the warm-up and the last one."""
    warm = samples[min(WARMUP_STEPS, len(samples) // 2) :]
    tenth = max(len(warm) // 10, 1)
    first, last = (
        statistics.median(s.cpu_seconds for s in part) for part in (warm[:tenth], warm[-tenth:])
    )
    return first, last


def report(before: Sample, samples: list[Sample], after: Sample) -> tuple[str, bool]:
    """The table, and whether every limit is kept."""
    slope, (first, last) = growth(samples), slower(samples)
    late = samples[len(samples) // 2 :]
    handles = f"{before.handles} before, {max(s.handles for s in late)} at most in the second half"
    rows = [
        ("steps", f"{len(samples)}", True),
        ("memory, MB", f"{samples[0].megabytes:.0f} to {samples[-1].megabytes:.0f}", True),
        ("growth, MB in 1,000 steps", f"{slope:+.2f}", slope <= MOST_GROWTH),
        ("open files", f"{handles}, {after.handles} after", after.handles <= before.handles),
        ("processes", f"{before.children} before, {after.children} after", not after.children),
        ("threads", f"{samples[0].threads} first, {samples[-1].threads} last", True),
        (
            "CPU ms a step, first and last tenth",
            f"{first * 1e3:.1f}, {last * 1e3:.1f}: {last / first - 1:+.1%}",
            last <= first * (1 + MOST_SLOWER),
        ),
    ]
    lines = ["| what | found | within the limit |", "|---|---|---|"]
    lines += [f"| {name} | {found} | {'yes' if kept else 'NO'} |" for name, found, kept in rows]
    return "\n".join(lines) + "\n", all(kept for _, _, kept in rows)


def train(args: argparse.Namespace, folder: Path, steps: int) -> int:
    """A run of so many steps; returns its exit code."""
    flags = ["--config", str(ROOT / "configs/demo_config.yaml"), "--batch_size", "2"]
    flags += ["--model_name", str(ROOT / "demo/sam3_tiny"), "--num_workers", "2"]
    flags += ["--train_data_path", str(args.data_dir / "train"), "--max_steps", str(steps)]
    flags += ["--eval_steps", "200", "--save_steps", "100", "--save_total_limit", "2"]
    flags += ["--output_dir", str(folder), "--overwrite", *args.train_flags]
    code = train_sam3_lora.main(flags)
    setup_logging(None)  # closes train.log
    return code


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--steps", type=parse_count, default=2000, help="of the run")
    add("--data_dir", type=Path, default=Path("data/demo"), help="data folder")
    add("--output_dir", type=Path, help="of the run (default: a temporary folder)")
    add("--train_flags", type=shlex.split, default=[], metavar="'--FLAG VALUE ...'",
        help="for train_sam3_lora.py, as one word")  # fmt: skip
    return parser


@user_errors()
def main(argv: list[str] | None = None) -> int:
    """Trains, watches and prints."""
    args = build_parser().parse_args(argv)
    if not Path("/proc/self/statm").exists():
        raise ConfigError("expected Linux, whose /proc tells a process's memory; run it there")
    if not args.data_dir.exists():
        with redirect_stdout(sys.stderr):
            prepare_data.main(["demo", "--output_dir", str(args.data_dir)])
    samples: list[Sample] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        patch.object(engine, "train_one_epoch", watched(samples)),
    ):
        folder = args.output_dir or Path(scratch) / "run"
        # A first run opens what a process keeps for good: libraries, the fonts of the curves.
        code = train(args, folder, 2)
        before = look()
        samples.clear()
        code = code or train(args, folder, args.steps)
    gc.collect()
    if code:
        return code
    text, kept = report(before, samples, look())
    sys.stdout.write(text)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
