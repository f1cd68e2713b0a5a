"""Does LoRA teach the demo model the demo task, whatever the seed, and does it keep what it knew?

For each seed: draws the data, trains with configs/demo_config.yaml, evaluates base and adapter on
the test split of the parts, and of the shapes, which the base knows.

    python benchmarks/demo_seeds.py --output_dir outputs/demo_seeds

Prints a line a seed; each command's own output goes to OUTPUT_DIR/<seed>/log.txt.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A script in a folder of its own: the package lies one level up.
sys.path.insert(0, str(ROOT))

from sam3_lora.config import ConfigError, user_errors  # noqa: E402
from sam3_lora.flags import FlagParser  # noqa: E402


def run(log: Path, *command: str | Path) -> float:
    """Runs a script of the project; returns its seconds."""
    started = time.perf_counter()
    with log.open("a", encoding="utf-8") as output:
        script, *flags = command
        done = subprocess.run(
            [sys.executable, ROOT / script, *flags], stdout=output, stderr=output, cwd=ROOT
        )
    if done.returncode:
        raise ConfigError(f"expected {script} to succeed, found exit code {done.returncode}: {log}")
    return time.perf_counter() - started


def measure(folder: Path, seed: int, flags: list[str]) -> str:
    """One seed's line."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    for task in ("parts", "shapes"):
        data = ["--output_dir", folder / task, "--task", task, "--seed", str(seed), "--overwrite"]
        run(log, "prepare_data.py", "demo", *data)
    train = ["--config", ROOT / "configs/demo_config.yaml", "--train_data_path"]
    train += [folder / "parts" / "train", "--output_dir", folder / "run", "--overwrite"]
    seconds = run(log, "train_sam3_lora.py", *train, "--seed", str(seed), *flags)
    figures = {}
    for task in ("parts", "shapes"):
        evaluation = folder / f"evaluation_{task}"
        compare = ["--lora_weights", folder / "run" / "best_model", "--data_dir", folder / task]
        compare += ["--split", "test", "--compare", "--output_dir", evaluation, "--overwrite"]
        run(log, "evaluate_sam3_lora.py", *compare, "--max_rows_per_forward", "64")
        figures[task] = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    parts, shapes = figures["parts"], figures["shapes"]
    return (
        f"seed {seed}: parts mask AP50 {parts['base']['segm']['AP50']:.3f} -> "
        f"{parts['segm']['AP50']:.3f}, false positives {parts['false_positive_rate']:.3f}; shapes "
        f"AP50 {shapes['base']['segm']['AP50']:.3f} -> {shapes['segm']['AP50']:.3f}, false "
        f"positives {shapes['false_positive_rate']:.3f}; training {seconds:.0f} s"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line: flags that are not this script's go to train_sam3_lora.py."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--output_dir", type=Path, default=Path("outputs/demo_seeds"), help="for the runs")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    add("--train_flags", type=shlex.split, default=[], metavar="'--FLAG VALUE ...'",
        help="for train_sam3_lora.py, as one word")  # fmt: skip
    return parser


@user_errors()
def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    args = build_parser().parse_args(argv)
    for seed in args.seeds:
        folder = args.output_dir.resolve() / str(seed)
        sys.stdout.write(measure(folder, seed, args.train_flags) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
