"""Evaluates an adapter, or the base model, on a split of a COCO data set.

    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model/lora_weights.pt
    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model --data_dir data --split
    test python evaluate_sam3_lora.py --base --data_dir data --split test

Every category is asked for on every image. Prints a table: AP of boxes and masks by category, cgF1
with its factors pmF1 and IL_MCC, mask IoU, and how often an absent category is found all the same.

Writes to output_dir (default: evaluation_<split>/ beside the adapter, or outputs/base/):
    metrics.json      every figure
    detections.json   the detections in COCO's results format
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lora_layers import AdapterError
from sam3_lora.coco import CocoSplit, DatasetError, read_split, split_dir
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
from sam3_lora.evaluation import evaluate_split, load_forward
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
    add_config_flags(parser, ("model", "evaluation", "hardware"))
    return parser


def build_forward(args: argparse.Namespace, config: Config) -> tuple[Forward, str]:
    """The model to evaluate, and what it is."""
    if args.lora_weights is None and not args.base:
        raise ConfigError(
            "expected an adapter, found none; give --lora_weights FILE, or --base for the base "
            "model alone"
        )
    weights = None if args.base else args.lora_weights
    named = getattr(args, "model_name", None)
    forward, adapter = load_forward(
        weights,
        named or (None if weights else config.model.name),
        getattr(args, "model_geometry_cls", None),
        config.hardware.device,
        config.hardware.mixed_precision,
    )
    return forward, f"{adapter['base_model']} + {weights}" if adapter else config.model.name


def run_evaluation(
    forward: Forward, split: CocoSplit, config: Config
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of a split, and its detections as COCO results."""
    model = forward.model
    dataset = PromptDataset(split, image_size(model), num_queries(model), train=False)
    if not dataset.has_masks():
        log.warning("the split has no masks: box metrics only")
        forward.masks = False
    limit = config.evaluation.max_val_images
    batches = epoch_batches(len(split.images[:limit]), 1, 0, 0, shuffle=False)
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


def write_json(content: Any, path: Path) -> None:
    """Writes beside the target, then renames over it."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(scratch, path)


@user_errors(ConfigError, DatasetError, AdapterError, ModelError)
def main(argv: list[str] | None = None) -> int:
    """Evaluates what the flags name."""
    args = build_parser().parse_args(argv)
    setup_logging(None)
    config = config_from_args(args)
    # 1. The split before any weight loads.
    folder = split_dir(args.data_dir, args.split)
    split = read_split(folder)
    # 2. Every category on every image.
    forward, subject = build_forward(args, config)
    log.info("%s on %s: %d images", subject, folder, len(split.images))
    summary, results = run_evaluation(forward, split, config)
    # 3. The table and the files.
    beside = Path("outputs/base")
    if args.lora_weights and not args.base:
        beside = args.lora_weights if args.lora_weights.is_dir() else args.lora_weights.parent
    output_dir = args.output_dir or beside / f"evaluation_{args.split}"
    output_dir.mkdir(parents=True, exist_ok=True)
    described = {"model": subject, "data": str(folder), "split": args.split, **summary}
    write_json(described, output_dir / "metrics.json")
    write_json(results, output_dir / "detections.json")
    sys.stdout.write(format_summary(summary) + "\n")
    log.info("wrote %s", output_dir / "metrics.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
