"""Evaluates an adapter, or the base model, on a split of a COCO data set.

    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model/lora_weights.pt
    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model --split test
    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model --base --split test
    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model --compare
    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model --prompt_with all

Every category is asked for on every image. Prints a table: AP of boxes and masks by category, cgF1
with its factors pmF1 and IL_MCC, mask IoU, and how often an absent category is found all the same.
--base evaluates the base model that the adapter was trained on, or --model_name, without adapter.
--compare evaluates the adapter, then its base in the same process, and prints both side by side.
--prompt_with box asks for each category of an image with a box round one of its objects (an
exemplar, the same at each evaluation) and the word "visual" in place of its text; both asks with
that box and the text; all evaluates text, box and both. The boxed object is to be found too, and
categories that an image lacks are asked for by their text, as in Meta's evaluation.

Writes to output_dir (default: evaluation_<split>/ beside the adapter, or in outputs/base/):
    metrics.json      every figure; with --prompt_with all those of text, and each in `by_prompt`
    detections.json   in COCO's results format, what the figures read: the best 100 of each image,
                      for AP, and all of score >= --score_threshold
and with --compare, the base's figures being `base` in metrics.json:
    base_detections.json   those of the base
    panel.png              annotation, base and adapter side by side, on 4 images at most, those
                           with the most different categories
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from lora_layers import AdapterError, remove_lora
from sam3_lora import checkpoint
from sam3_lora.coco import (
    CocoSplit,
    DatasetError,
    check_images,
    decode_mask,
    read_image,
    read_split,
    split_dir,
)
from sam3_lora.config import (
    Config,
    ConfigError,
    FlagParser,
    add_config_flags,
    config_from_args,
    setup_logging,
    user_errors,
)
from sam3_lora.dataset import PromptDataset
from sam3_lora.drawing import draw_overlay, draw_panel, to_cell
from sam3_lora.engine import TooLargeError
from sam3_lora.evaluation import (
    evaluate_split,
    load_forward,
    resolve_model,
    write_atomically,
    write_json,
)
from sam3_lora.forward import Forward
from sam3_lora.loader import build_loader, epoch_batches
from sam3_lora.losses import compute_losses, count_targets
from sam3_lora.metrics import format_comparison, format_summary
from sam3_lora.model import ModelError, image_size, num_queries

log = logging.getLogger("evaluate")

COMPARISON_FILES = ("base_detections.json", "panel.png")
PANEL_IMAGES = 4
PANEL_TITLES = ("annotation", "base model", "adapter")
# How `PromptDataset` asks for the categories of an image.
PROMPT_WITH = {
    "text": {},
    "box": {"box_prompt_probability": 1.0, "box_prompt_text_probability": 0.0},
    "both": {"box_prompt_probability": 1.0, "box_prompt_text_probability": 1.0},
}


def build_parser() -> argparse.ArgumentParser:
    """The command line: what to evaluate, and the configuration's flags for model and machine."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--lora_weights", type=Path, help="adapter file, or the folder it is in")
    parser.add_argument("--base", action="store_true", help="evaluate without the adapter")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also evaluate the base without the adapter, and draw both beside the truth",
    )
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), help="data folder (default: data)"
    )
    parser.add_argument("--split", default="val", help="train, val or test (default: val)")
    parser.add_argument(
        "--prompt_with",
        choices=(*PROMPT_WITH, "all"),
        default="text",
        help="ask for an image's categories with text, with a box round one object, or with both; "
        "absent categories keep their text (default: text)",
    )
    parser.add_argument("--output_dir", type=Path, help="where metrics.json goes")
    # Not the configuration's own key, which is about a training run.
    parser.add_argument(
        "--overwrite",
        dest="replace",
        action="store_true",
        help="write over an earlier evaluation in output_dir, which else is renamed",
    )
    sections = ("model", "evaluation", "hardware")
    add_config_flags(parser, sections, without=("best_metric", "gradient_checkpointing"))
    return parser


def check_subject(args: argparse.Namespace) -> None:
    """Raises ConfigError unless the flags name what to evaluate."""
    if args.compare and (args.base or args.lora_weights is None):
        found = "--base" if args.base else "no adapter"
        raise ConfigError(
            f"--compare: expected --lora_weights FILE alone, found {found}; it evaluates the "
            "adapter and its base in one run"
        )
    if args.lora_weights is None and not args.base:
        raise ConfigError(
            "expected an adapter, found none; give --lora_weights FILE, or --base for the base "
            "model alone"
        )


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
    adapter = checkpoint.read_adapter(args.lora_weights) if args.lora_weights else {}
    name, geometry_cls = resolve_model(asdict(config.model), vars(args), adapter)
    weights = None if args.base else args.lora_weights
    device, precision = config.hardware.device, config.hardware.mixed_precision
    forward = load_forward(name, geometry_cls, device, precision, weights, adapter)
    forward = replace(forward, compiled=config.hardware.use_compile)
    return forward, f"{name} + {weights}" if weights else name


def build_batches(
    forward: Forward, split: CocoSplit, config: Config, compare: bool, prompt_with: str
) -> dict[str, Iterable[dict[str, Any]]]:
    """Batches of one image with all its prompts, for each way to ask; turns masks off where the
    split has none."""
    canvas = image_size(forward.model), num_queries(forward.model)
    kinds = PROMPT_WITH if prompt_with == "all" else (prompt_with,)
    datasets = {k: PromptDataset(split, *canvas, train=False, **PROMPT_WITH[k]) for k in kinds}
    forward.masks = next(iter(datasets.values())).has_masks()
    if not compare:  # the base reads the prompts again
        forward.release_text_encoder([t for d in datasets.values() for t in d.all_texts()])
    order = epoch_batches(len(split.images), 1, 0, 0, shuffle=False)
    return {k: build_loader(d, order, config.hardware.num_workers) for k, d in datasets.items()}


def run_evaluation(
    forward: Forward,
    batches: dict[str, Iterable[dict[str, Any]]],
    split: CocoSplit,
    config: Config,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of a split and its detections as COCO results, of the first way to ask; where there
    are several, the metrics of each are in `by_prompt`, and printed."""
    found = {
        kind: evaluate_split(
            forward,
            compute_losses,
            count_targets,
            tqdm(own, f"images, {kind}", disable=not sys.stderr.isatty()),
            split,
            max_rows=config.hardware.max_rows_per_forward,
            max_detections=config.evaluation.max_detections,
            score_threshold=config.evaluation.score_threshold,
        )
        for kind, own in batches.items()
    }
    summary, results = next(iter(found.values()))
    if len(found) > 1:
        summaries = {kind: own for kind, (own, _) in found.items()}
        sys.stdout.write(format_by_prompt(summaries) + "\n\n")
        summary = {**summary, "by_prompt": summaries}
    return summary, results


def format_by_prompt(summaries: dict[str, dict[str, Any]]) -> str:
    """The figures of each way to ask, a line each."""
    rows = [("asked with", "box AP50", "mask AP50", "cgF1@0.5", "false positives")]
    for kind, summary in summaries.items():
        found = [(summary[geometry] or {}).get("AP50") for geometry in ("bbox", "segm")]
        found += [summary["cgf1"]["cgF1@0.5"], summary["false_positive_rate"]]
        rows.append((kind, *("undefined" if f is None else f"{f:.3f}" for f in found)))
    return "\n".join(f"{row[0]:<10}" + "".join(f"{c:>17}" for c in row[1:]) for row in rows)


def draw_comparison(
    split: CocoSplit, base: list[dict[str, Any]], adapter: list[dict[str, Any]], threshold: float
) -> np.ndarray:
    """The annotations beside two models' COCO results of score >= threshold, on the images with the
    most different categories."""
    truth = [
        {**a, "image_id": image["id"]}
        for image in split.images
        for a in split.annotations[image["id"]]
        if not a["iscrowd"]  # a region to ignore, as in the figures
    ]
    kinds = Counter(image_id for image_id, _ in {(a["image_id"], a["category_id"]) for a in truth})
    images = sorted(split.images, key=lambda image: -kinds[image["id"]])[:PANEL_IMAGES]
    chosen = {image["id"] for image in images}
    found = [[row for row in rows if row["score"] >= threshold] for rows in (base, adapter)]
    columns = [[row for row in rows if row["image_id"] in chosen] for rows in (truth, *found)]
    # The annotations come first: they get the colours that no two categories share.
    shown = dict.fromkeys(row["category_id"] for column in columns for row in column)
    colors = {category_id: k for k, category_id in enumerate(shown)}
    pictures = []
    for image in images:
        photo = read_image(split.image_path(image))
        own = ([row for row in column if row["image_id"] == image["id"]] for column in columns)
        pictures.append([draw_cell(photo, rows, split, colors) for rows in own])
    return draw_panel(pictures, PANEL_TITLES, {split.phrase(c): k for c, k in colors.items()})


def draw_cell(
    photo: np.ndarray, rows: list[dict[str, Any]], split: CocoSplit, colors: dict[int, int]
) -> np.ndarray:
    """Annotations or COCO results over their photo, scaled before, so that tags stay readable."""
    size = photo.shape[:2]
    cell = to_cell(photo)
    scale = np.divide(cell.shape[1::-1], size[::-1])  # of x and y
    corners = np.array([row["bbox"] for row in rows]).reshape(-1, 2, 2).cumsum(axis=1)
    segmentations = [row.get("segmentation") for row in rows]
    masks = (to_cell(decode_mask(s, *size) if s else np.zeros(size, bool)) for s in segmentations)
    scores = [f" {row['score']:.2f}" if "score" in row else "" for row in rows]
    return draw_overlay(
        cell,
        masks if any(segmentations) else None,
        (corners * scale).reshape(-1, 4),
        [split.phrase(row["category_id"]) + s for row, s in zip(rows, scores, strict=True)],
        [colors[row["category_id"]] for row in rows],
    )


def write_files(
    output_dir: Path, metrics: dict[str, Any], found: dict[str, list], replaced: bool
) -> None:
    """Writes figures and detections, by file name; an earlier evaluation is renamed with its folder
    unless it is replaced."""
    earlier = (output_dir / "metrics.json").exists()
    if earlier and replaced:
        for name in COMPARISON_FILES:  # which this evaluation may not write
            (output_dir / name).unlink(missing_ok=True)
    elif earlier and (moved := checkpoint.set_aside(output_dir)):
        log.warning("%s held an earlier evaluation: renamed to %s", output_dir, moved)
    write_json(output_dir / "metrics.json", metrics, indent=2)
    for name, results in found.items():
        write_json(output_dir / name, results)
    log.info("wrote %s", output_dir / "metrics.json")


@user_errors(ConfigError, DatasetError, AdapterError, ModelError, TooLargeError)
def main(argv: list[str] | None = None) -> int:
    """Evaluates what the flags name."""
    args = build_parser().parse_args(argv)
    setup_logging(None)
    config = config_from_args(args)
    check_subject(args)
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
    batches = build_batches(forward, split, config, args.compare, args.prompt_with)
    summary, results = run_evaluation(forward, batches, split, config)
    described = {"model": subject, "data": str(folder), "split": args.split}
    described |= {"prompt_with": args.prompt_with, **summary}
    found = {"detections.json": results}
    sys.stdout.write(format_summary(summary) + "\n")
    # 3. The base model that is under the adapter.
    if args.compare:
        remove_lora(forward.model)
        forward.texts.clear()  # which an adapter may have read
        log.info("its base on the same images")
        base, found["base_detections.json"] = run_evaluation(forward, batches, split, config)
        described["base"] = base
        sys.stdout.write("\n" + format_comparison(base, summary) + "\n")
    # 4. The files; the picture last, which reads photos again.
    write_files(output_dir, described, found, args.replace)
    if args.compare:
        threshold = config.evaluation.score_threshold
        panel = draw_comparison(split, found["base_detections.json"], results, threshold)
        save = Image.fromarray(panel).save
        write_atomically(output_dir / "panel.png", lambda path: save(path, "PNG"))
        log.info("wrote %s", output_dir / "panel.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
