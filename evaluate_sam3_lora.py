"""Evaluates an adapter, or the base model, on a split of a COCO data set.

    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model/lora_weights.pt
    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model --split test
    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model --base --split test

Every category is asked for on every image. Prints a table: AP of boxes and masks by category, cgF1
with its factors pmF1 and IL_MCC, mask IoU, and how often an absent category is found all the same.
--base evaluates the base model that the adapter was trained on, or --model_name, without adapter.

Writes to output_dir (default: evaluation_<split>/ beside the adapter, or in outputs/base/):
    metrics.json      every figure
    detections.json   in COCO's results format, what the figures read: the best 100 of each image,
                      for AP, and all of score >= --score_threshold
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lora_layers import AdapterError
from sam3_lora import checkpoint
from sam3_lora.coco import CocoSplit, DatasetError, check_images, read_split, split_dir
from sam3_lora.config import (
    Config,
    ConfigError,
    FlagParser,
    add_config_flags,
    config_from_args,
    setup_logging,
    user_errors,
)
from sam3_lora.dataset import PromptDataset, build_loader, epoch_batches
from sam3_lora.evaluation import evaluate_split, load_forward, resolve_model, write_json
from sam3_lora.forward import Forward
from sam3_lora.losses import compute_losses, count_targets
from sam3_lora.metrics import format_summary
from sam3_lora.model import ModelError, image_size, num_queries

log = logging.getLogger("evaluate")


def build_parser() -> argparse.ArgumentParser:
    """The command line: what to evaluate, and the configuration's flags for model and machine."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--lora_weights", type=Path, help="adapter file, or the folder it is in")
    parser.add_argument("--base", action="store_true", help="evaluate without the adapter")
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), help="data folder (default: data)"
    )
    parser.add_argument("--split", default="val", help="train, val or test (default: val)")
    parser.add_argument("--output_dir", type=Path, help="where metrics.json goes")
    # Not the configuration's own key, which is about a training run.
    parser.add_argument(
        "--overwrite",
        dest="replace",
        action="store_true",
        help="write over an earlier evaluation in output_dir, which else is renamed",
    )
    sections = ("model", "evaluation", "hardware")
    add_config_flags(parser, sections, without=("best_metric",))
    return parser


def choose_output(args: argparse.Namespace, data: Path) -> Path:
    """Where the files go; ConfigError where an earlier evaluation there cannot be renamed."""
    beside = Path("outputs/base")
    if args.lora_weights and not args.base:
        beside = args.lora_weights if args.lora_weights.is_dir() else args.lora_weights.parent
    output_dir = args.output_dir or beside / f"evaluation_{args.split}"
    if (output_dir / "metrics.json").exists() and not args.replace:
        used = [path.resolve() for path in (Path(), data, args.lora_weights) if path]
        if any(path.is_relative_to(output_dir.resolve()) for path in used):
            raise ConfigError(
                f"--output_dir: {output_dir} holds an earlier evaluation, and files in use, so it "
                "is not renamed; name another folder, or --overwrite the evaluation"
            )
    return output_dir


def build_forward(args: argparse.Namespace, config: Config) -> tuple[Forward, str]:
    """The model to evaluate, and what it is."""
    if args.lora_weights is None and not args.base:
        raise ConfigError(
            "expected an adapter, found none; give --lora_weights FILE, or --base for the base "
            "model alone"
        )
    adapter = checkpoint.read_adapter(args.lora_weights) if args.lora_weights else {}
    name, geometry_cls = resolve_model(asdict(config.model), vars(args), adapter)
    weights = None if args.base else args.lora_weights
    device, precision = config.hardware.device, config.hardware.mixed_precision
    forward = load_forward(name, geometry_cls, device, precision, weights, adapter)
    return forward, f"{name} + {weights}" if weights else name


def run_evaluation(
    forward: Forward, split: CocoSplit, config: Config
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of a split, and its detections as COCO results."""
    model = forward.model
    dataset = PromptDataset(split, image_size(model), num_queries(model), train=False)
    if not dataset.has_masks():
        log.warning("the split has no masks: box metrics only")
        forward.masks = False
    batches = epoch_batches(len(dataset), 1, 0, 0, shuffle=False)
    loader = build_loader(dataset, batches, config.hardware.num_workers)
    return evaluate_split(
        forward,
        compute_losses,
        count_targets,
        tqdm(loader, "images", disable=not sys.stderr.isatty()),
        split,
        max_rows=config.hardware.max_rows_per_forward,
        max_detections=config.evaluation.max_detections,
        score_threshold=config.evaluation.score_threshold,
    )


def write_files(output_dir: Path, metrics: dict[str, Any], results: list, replaced: bool) -> None:
    """Writes the evaluation; an earlier one is renamed with its folder unless it is replaced."""
    earlier = (output_dir / "metrics.json").exists()
    if earlier and not replaced and (moved := checkpoint.set_aside(output_dir)):
        log.warning("%s held an earlier evaluation: renamed to %s", output_dir, moved)
    write_json(output_dir / "metrics.json", metrics, indent=2)
    write_json(output_dir / "detections.json", results)
    log.info("wrote %s", output_dir / "metrics.json")


@user_errors(ConfigError, DatasetError, AdapterError, ModelError)
def main(argv: list[str] | None = None) -> int:
    """Evaluates what the flags name."""
    args = build_parser().parse_args(argv)
    setup_logging(None)
    config = config_from_args(args)
    # 1. The data and where to write, before any weight loads.
    folder = split_dir(args.data_dir, args.split)
    output_dir = choose_output(args, folder)
    split = read_split(folder)
    total = len(split.images)
    split = replace(split, images=split.images[: config.evaluation.max_val_images])
    check_images(split)
    # 2. Every category on every image.
    forward, subject = build_forward(args, config)
    log.info("%s on %s: %d of %d images", subject, folder, len(split.images), total)
    summary, results = run_evaluation(forward, split, config)
    # 3. The table and the files.
    described = {"model": subject, "data": str(folder), "split": args.split, **summary}
    sys.stdout.write(format_summary(summary) + "\n")
    write_files(output_dir, described, results, args.replace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
