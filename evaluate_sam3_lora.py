r"""Evaluates an adapter, or the base model, on a split of a COCO data set.

    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model
    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model \
        --data_dir data --split test --report outputs/report
    python evaluate_sam3_lora.py --lora_weights outputs/sam3_lora/best_model \
        --calibrate
    python evaluate_sam3_lora.py --base --split test

Every category is asked for on every image. Prints a table: AP of boxes and masks by category, cgF1
with its factors pmF1 and IL_MCC, mask IoU, and how often an absent category is found all the same.
--base evaluates the base model that the adapter was trained on, or --model_name, without adapter.
--compare evaluates the adapter, then its base in the same process, and prints both side by side.
--report does so into its folder, adds a page with intervals and pictures, and asks both models for
words that should find nothing, and for what the base should still know: the annotated concepts of
--probe_dir or, without it, everyday words.
--calibrate chooses each category's threshold for the highest F1 on the split and stores it in the
adapter's file, where inference.py reads it. Choose on val, and measure on test.
--tile 0.5 searches each photo and its tiles, as `inference.py --tile 0.5`; `losses` is then empty.
--prompt_with box asks for each category of an image with a box round one of its objects (an
exemplar, the same at each evaluation) and the word "visual" in place of its text; both asks with
that box and the text; all evaluates text, box and both. The boxed object is to be found too, and
categories that an image lacks are asked for by their text, as in Meta's evaluation.
torchrun --nproc_per_node N evaluate_sam3_lora.py ... shares the images out over N processes.

Writes to output_dir (default: evaluation_<split>/ beside the adapter, or in outputs/base/):
    metrics.json      every figure; with --prompt_with all those of text, and
                      each in `by_prompt`
    detections.json   in COCO's results format, what the figures read: the best
                      100 of each image, for AP, and all of score >=
                      --score_threshold
and with --compare, the base's figures being `base` in metrics.json:
    base_detections.json   those of the base
    panel.png              annotation, base and adapter side by side, on 4
                           images at most, those with the most categories
and with --report:
    report.html            all of it on one page that needs no other file;
                           `report` in metrics.json
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import sam3_lora.startup  # noqa: F401  # isort: skip

import numpy as np

from lora_layers import AdapterError, remove_lora
from sam3_lora import checkpoint, processes
from sam3_lora.coco import CocoSplit, DatasetError, check_images, read_split
from sam3_lora.config import (
    Config,
    ConfigError,
    config_from_args,
    setup_logging,
    user_errors,
)
from sam3_lora.dataset import OUT_OF_DOMAIN_WORDS, PromptDataset, other_words
from sam3_lora.drawing import draw_panel
from sam3_lora.engine import LossError, TooLargeError
from sam3_lora.evaluation import evaluate_split, load_forward, resolve_model
from sam3_lora.files import check_writable, set_aside, write_json, write_picture, write_text
from sam3_lora.flags import FlagParser, add_config_flags
from sam3_lora.forward import Forward
from sam3_lora.intervals import Evaluated, calibrate, format_thresholds
from sam3_lora.layout import split_dir
from sam3_lora.loader import build_loader, epoch_batches
from sam3_lora.losses import compute_losses, count_targets
from sam3_lora.model import ModelError, image_size, num_queries
from sam3_lora.prediction import evaluate_tiles, tell_unknown
from sam3_lora.prompts import add_tile_flag, parse_count, parse_split
from sam3_lora.report import (
    EVERYDAY_WORDS,
    PANEL_TITLES,
    build_page,
    build_report,
    draw_examples,
    draw_rows,
    list_objects,
    verdict,
)
from sam3_lora.tables import format_comparison, format_summary

log = logging.getLogger("evaluate")

FOUND = ("detections.json", "base_detections.json")
COMPARISON_FILES = ("base_detections.json", "panel.png", "report.html")
# All that an evaluation writes into its folder.
OWN_FILES = {"metrics.json", *FOUND, *COMPARISON_FILES}
PANEL_IMAGES = 4
BOOTSTRAP = 1000  # resamples of the images
# How `PromptDataset` asks for the categories of an image.
PROMPT_WITH = {
    "text": {},
    "box": {"box_prompt_probability": 1.0, "box_prompt_text_probability": 0.0},
    "both": {"box_prompt_probability": 1.0, "box_prompt_text_probability": 1.0},
}


def build_parser() -> argparse.ArgumentParser:
    """The command line: what to evaluate, and the configuration's flags for model and machine."""
    usage = "%(prog)s (--lora_weights PATH | --base) [--FLAG VALUE ...]"
    parser = FlagParser(__doc__, usage=usage)
    # fmt: off
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--lora_weights", type=Path, metavar="PATH",
        help="adapter: a file, or the folder that holds it")
    add("--base", action="store_true",
        help="the base model alone: that of --lora_weights, else --model_name")
    add("--data_dir", type=Path, default=Path("data"), metavar="DIR",
        help="data folder, which holds the split")
    add("--split", type=parse_split, default="val", metavar="NAME",
        help="which split of it: train, val or test")
    measure = parser.add_argument_group("what to measure")
    add = measure.add_argument
    add("--compare", action="store_true",
        help="also evaluate the base without the adapter, and draw both beside the truth")
    add("--report", type=Path, metavar="DIR",
        help="as --compare, into DIR, with a page: intervals, forgetting, thresholds, pictures")
    add("--bootstrap", type=partial(parse_count, least=0), metavar="N",
        help=f"--report: resamples of the intervals, 0 for none (default: {BOOTSTRAP})")
    add("--probe_dir", type=Path, metavar="DIR",
        help="--report: data folder with other concepts, to see whether the adapter forgot them")
    add("--probe_split", type=parse_split, metavar="NAME",
        help="which split of --probe_dir (default: test)")
    add("--calibrate", action="store_true",
        help="choose each category's threshold on the split and store it in the adapter's file")
    add("--prompt_with", choices=(*PROMPT_WITH, "all"), default="text",
        help="ask for an image's categories with text, with a box round one object, or with both; "
        "absent categories keep their text")
    add_tile_flag(measure)
    add = parser.add_argument_group("what to write").add_argument
    add("--output_dir", type=Path, metavar="DIR",
        help="where metrics.json goes (default: evaluation_<split>/ beside the adapter)")
    # Not the configuration's own key, which is about a training run.
    add("--overwrite", dest="replace", action="store_true",
        help="write over an earlier evaluation in output_dir, which else is renamed")
    # fmt: on
    sections = ("model", "evaluation", "hardware")
    add_config_flags(parser, sections, without=("best_metric", "gradient_checkpointing"))
    return parser


def check_subject(args: argparse.Namespace) -> None:
    """Raises ConfigError unless the flags name what to evaluate."""
    for flag in ("bootstrap", "probe_dir", "probe_split"):
        needed = "probe_dir" if flag == "probe_split" else "report"
        if getattr(args, flag) is not None and getattr(args, needed) is None:
            raise ConfigError(f"--{flag}: expected with --{needed} DIR, found without; add it")
    if args.report and args.output_dir:
        raise ConfigError(
            "--report: expected without --output_dir, which it names itself; drop one"
        )
    for flag, purpose in (
        ("report", "it evaluates the adapter and its base in one run"),
        ("compare", "it evaluates the adapter and its base in one run"),
        ("calibrate", "the thresholds are those of an adapter"),
    ):
        if getattr(args, flag) and (args.base or args.lora_weights is None):
            found = "--base" if args.base else "no adapter"
            raise ConfigError(
                f"--{flag}: expected --lora_weights FILE alone, found {found}; {purpose}"
            )
    if args.tile and args.prompt_with != "text":
        raise ConfigError(
            f"--prompt_with {args.prompt_with}: expected without --tile, as most tiles do not show "
            "the box; drop one"
        )
    if args.calibrate and args.prompt_with in ("box", "both"):
        raise ConfigError(
            f"--calibrate: expected thresholds of text prompts, found --prompt_with "
            f"{args.prompt_with}; drop one"
        )
    if args.lora_weights is None and not args.base:
        raise ConfigError(
            "expected an adapter, found none; give --lora_weights FILE, or --base for the base "
            "model alone"
        )


def choose_output(args: argparse.Namespace) -> Path:
    """Where the files go; ConfigError where an earlier evaluation there cannot be renamed."""
    beside = Path("outputs/base")
    if args.lora_weights and not args.base:
        beside = args.lora_weights if args.lora_weights.is_dir() else args.lora_weights.parent
    output_dir = args.report or args.output_dir or beside / f"evaluation_{args.split}"
    flag = "--report" if args.report else "--output_dir"
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"{flag}: expected a folder, found the file {output_dir}; name another")
    if (output_dir / "metrics.json").exists() and not args.replace:
        # Hidden ones are the system's, such as .DS_Store.
        names = {path.name for path in output_dir.iterdir() if not path.name.startswith(".")}
        others = sorted(names - OWN_FILES)
        if others or Path().resolve() == output_dir.resolve():
            found = others[0] if others else "the folder that this command runs in"
            raise ConfigError(
                f"{flag}: expected nothing but an earlier evaluation in {output_dir}, to "
                f"rename it, found {found}; name another folder, or --overwrite the evaluation"
            )
    check_writable(output_dir, flag)
    if args.calibrate:  # the adapter's file is replaced in its folder
        check_writable(beside, "--calibrate")
    return output_dir


def read_images(folder: Path, config: Config) -> CocoSplit:
    """A split, cut to the images that are evaluated, with these checked."""
    split = read_split(folder)
    total = len(split.images)
    split = replace(split, images=split.images[: config.evaluation.max_val_images])
    check_images(split)
    log.info("%s: %d of %d images", folder, len(split.images), total)
    return split


def choose_more(
    args: argparse.Namespace, split: CocoSplit, config: Config
) -> tuple[dict[str, CocoSplit], list[str]]:
    """What a report asks beside the split, and the words that should find nothing.

    The splits are "words", the same images with words for categories, and perhaps "probe".
    """
    if not args.report:
        return {}, []
    strangers = other_words(OUT_OF_DOMAIN_WORDS, split)
    known = [] if args.probe_dir else other_words(EVERYDAY_WORDS, split)
    asked = {
        "annotations": {image["id"]: [] for image in split.images},
        "categories": dict(enumerate(strangers + known, start=1)),
        "prompts": {},
    }
    more = {"words": replace(split, **asked)}
    if args.probe_dir:
        try:
            probe = read_images(split_dir(args.probe_dir, args.probe_split or "test"), config)
        except DatasetError as error:
            raise DatasetError(f"--probe_dir, --probe_split: {error}") from error
        more["probe"] = probe
    return more, strangers


def build_forward(
    args: argparse.Namespace, config: Config, split: CocoSplit
) -> tuple[Forward, str, dict[str, Any]]:
    """The model to evaluate on a split, what it is, and what its adapter's file holds."""
    adapter = checkpoint.read_adapter(args.lora_weights) if args.lora_weights else {}
    if not args.base:
        asked = [split.phrase(category) for category in split.categories]
        tell_unknown(asked, str(args.lora_weights), adapter.get("categories", {}))
    name, geometry_cls = resolve_model(asdict(config.model), vars(args), adapter)
    weights = None if args.base else args.lora_weights
    device, precision = config.hardware.device, config.hardware.mixed_precision
    forward = load_forward(name, geometry_cls, device, precision, weights, adapter)
    forward = replace(forward, compiled=config.hardware.use_compile)
    return forward, f"{name} + {weights}" if weights else name, adapter


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
    order = processes.share(epoch_batches(len(split.images), 1, 0, 0, shuffle=False))
    return {k: build_loader(d, order, config.hardware.num_workers) for k, d in datasets.items()}


def run_evaluation(
    forward: Forward,
    batches: dict[str, Iterable[dict[str, Any]]],
    split: CocoSplit,
    config: Config,
    tile: float | None,
) -> Evaluated:
    """Metrics of a split and its detections as COCO results, of the first way to ask; where there
    are several, the metrics of each are in `by_prompt`, and printed."""
    limits = {
        "max_rows": config.hardware.max_rows_per_forward,
        "max_detections": config.evaluation.max_detections,
        "score_threshold": config.evaluation.score_threshold,
    }
    if tile:
        images = processes.progress(processes.share(split.images), "images")
        return evaluate_tiles(forward, split, images, tile, **limits)
    losses = compute_losses, count_targets
    found = {
        kind: evaluate_split(forward, *losses, processes.progress(own, "images"), split, **limits)
        for kind, own in batches.items()
    }
    summary, results = next(iter(found.values()))
    if len(found) > 1:
        summaries = {kind: own for kind, (own, _) in found.items()}
        say(format_by_prompt(summaries) + "\n\n")
        summary = {**summary, "by_prompt": summaries}
    return summary, results


def say(text: str) -> None:
    """Writes a result to stdout, of several processes once."""
    if processes.is_main():
        sys.stdout.write(text)


def format_by_prompt(summaries: dict[str, dict[str, Any]]) -> str:
    """The figures of each way to ask, a line each."""
    rows = [("asked with", "box AP50", "mask AP50", "cgF1@0.5", "false positives")]
    for kind, summary in summaries.items():
        found = [(summary[geometry] or {}).get("AP50") for geometry in ("bbox", "segm")]
        found += [summary["cgf1"]["cgF1@0.5"], summary["false_positive_rate"]]
        rows.append((kind, *("undefined" if f is None else f"{f:.3f}" for f in found)))
    return "\n".join(f"{row[0]:<10}" + "".join(f"{c:>17}" for c in row[1:]) for row in rows)


def run_more(
    forward: Forward, more: dict[str, CocoSplit], config: Config, tile: float | None
) -> dict[str, Evaluated]:
    """`run_evaluation` of the splits that `choose_more` gives."""
    masks, found = forward.masks, {}
    for name, split in more.items():
        if not split.categories:  # no word is unlike the categories
            found[name] = {}, []
            continue
        batches = build_batches(forward, split, config, compare=True, prompt_with="text")
        if name == "words":  # for which there is no annotation and no AP
            forward.masks = True
            log.info("%d words on the same images", len(split.categories))
        limit = replace(config.evaluation, max_detections=1)
        limited = replace(config, evaluation=limit) if name == "words" else config
        found[name] = run_evaluation(forward, batches, split, limited, tile)
    forward.masks = masks
    return found


def measure_thresholds(
    args: argparse.Namespace, adapter: dict[str, Any], split: CocoSplit, evaluated: Evaluated
) -> dict[str, Any]:
    """The adapter's thresholds on a split: its own, or without, or by --calibrate, new ones."""
    summary, results = evaluated
    stored = None if args.calibrate else adapter.get("thresholds")
    iou_type, default = summary["cgf1"]["iou_type"], summary["score_threshold"]
    chosen = calibrate(split, results, iou_type, default, stored)
    source = adapter.get("calibration", {}).get("split", "an unknown split")
    chosen["chosen_on"] = args.split if stored is None else str(source)
    return {**chosen, "stored": args.calibrate or stored is not None}


def store_thresholds(
    args: argparse.Namespace, adapter: dict[str, Any], chosen: dict[str, Any], split: CocoSplit
) -> None:
    """Writes what `measure_thresholds` chose into the adapter, but for categories with too few
    objects to trust it."""
    rows = chosen["per_category"]
    thresholds = {row["name"]: row["threshold"] for row in rows if not row["few"]}
    if few := [row["name"] for row in rows if row["few"]]:
        log.warning("too few objects, no threshold stored: %s", ", ".join(few))
    made = {"split": chosen["chosen_on"], "images": len(split.images), "iou": chosen["iou"]}
    made |= {"prompts": {name: split.phrase(c) for c, name in split.categories.items()}}
    if old := adapter.get("thresholds"):
        before = {name: f"{old[name]:.3f}" if name in old else "none" for name in thresholds}
        shown = (f"{name} {before[name]} -> {value:.3f}" for name, value in thresholds.items())
        chosen_on = adapter.get("calibration", {}).get("split", "an unknown split")
        log.warning("these replace the thresholds chosen on %s: %s", chosen_on, ", ".join(shown))
    checkpoint.store_thresholds(args.lora_weights, thresholds, made | {"tile": args.tile})
    log.info("stored the thresholds in %s", args.lora_weights)


def draw_comparison(
    split: CocoSplit, base: list[dict[str, Any]], adapter: list[dict[str, Any]], threshold: float
) -> tuple[np.ndarray, dict[int, int]]:
    """The annotations beside two models' COCO results of score >= threshold, on the images with the
    most different categories; and each category's colour."""

    def kinds(image: dict[str, Any]) -> int:
        return len({a["category_id"] for a in list_objects(split, image)})

    images = sorted(split.images, key=kinds, reverse=True)[:PANEL_IMAGES]
    pictures, colors = draw_rows(split, images, base, adapter, threshold)
    legend = {split.phrase(c): k for c, k in colors.items()}
    return draw_panel(pictures, PANEL_TITLES, legend), colors


def write_files(
    output_dir: Path, metrics: dict[str, Any], found: dict[str, list], replaced: bool
) -> None:
    """Writes figures and detections, by file name; an earlier evaluation is renamed with its folder
    unless it is replaced."""
    earlier = (output_dir / "metrics.json").exists()
    if earlier and replaced:
        for name in COMPARISON_FILES:  # which this evaluation may not write
            (output_dir / name).unlink(missing_ok=True)
    elif earlier and (moved := set_aside(output_dir)):
        log.warning("%s held an earlier evaluation: renamed to %s", output_dir, moved)
    write_json(output_dir / "metrics.json", metrics, indent=2)
    for name, results in found.items():
        write_json(output_dir / name, results)
    log.info("wrote %s", output_dir / "metrics.json")


def write_pictures(
    args: argparse.Namespace, output_dir: Path, split: CocoSplit, metrics: dict, found: dict
) -> None:
    """Draws base beside adapter, and with --report the page; photos are read again."""
    models, threshold = [found[name] for name in FOUND[::-1]], metrics["score_threshold"]
    panel, colors = draw_comparison(split, *models, threshold)
    write_picture(output_dir / "panel.png", panel)
    log.info("wrote %s", output_dir / "panel.png")
    if args.report:
        per_image = metrics["report"]["per_image"]
        examples = draw_examples(split, *models, per_image, threshold, colors)
        write_text(output_dir / "report.html", build_page(metrics, examples))
        log.info("wrote %s", output_dir / "report.html")
        say("\n" + verdict(metrics) + "\n")


@user_errors(ConfigError, DatasetError, AdapterError, ModelError, LossError, TooLargeError)
def main(argv: list[str] | None = None) -> int:
    """Evaluates what the flags name."""
    args = build_parser().parse_args(argv)
    setup_logging(None)
    config = config_from_args(args)
    check_subject(args)
    args.split = "val" if args.split == "valid" else args.split  # two names of one
    compare = args.compare or args.report is not None
    # 1. The data and where to write, before any weight loads.
    folder = split_dir(args.data_dir, args.split)
    output_dir = choose_output(args)
    split = read_images(folder, config)
    more, strangers = choose_more(args, split, config)
    # 2. Every category on every image.
    with processes.joined():
        forward, subject, adapter = build_forward(args, config, split)
        log.info("%s on %s", subject, folder)
        batches = build_batches(forward, split, config, compare, args.prompt_with)
        summary, results = run_evaluation(forward, batches, split, config, args.tile)
        described = {"model": subject, "data": str(folder), "split": args.split}
        tested = None if args.base else checkpoint.adapter_fingerprint(adapter)
        described |= {"adapter": tested, "geometry_cls": forward.geometry_cls}
        described |= {"prompt_with": args.prompt_with, **summary}
        found = {FOUND[0]: results}
        say(format_summary(summary) + "\n")
        ours = {"split": (summary, results), **run_more(forward, more, config, args.tile)}
        if args.calibrate or args.report:
            described["calibration"] = measure_thresholds(args, adapter, split, ours["split"])
            say("\n" + format_thresholds(described["calibration"]) + "\n")
        # 3. The base model that is under the adapter.
        if compare:
            remove_lora(forward.model)
            forward.texts.clear()  # which an adapter may have read
            log.info("its base on the same images")
            base, found[FOUND[1]] = run_evaluation(forward, batches, split, config, args.tile)
            described["base"] = base
            say("\n" + format_comparison(base, summary) + "\n")
        theirs = run_more(forward, more, config, args.tile) if args.report else {}
    if not processes.is_main():
        return 0
    # 4. The report, the files; the pictures last.
    if args.report:
        theirs |= {"split": (base, found[FOUND[1]])}
        most = described["max_detections"] = config.evaluation.max_detections
        described["report"] = build_report(
            {"split": split, **more},
            theirs,
            ours,
            strangers,
            most=most,
            resamples=BOOTSTRAP if args.bootstrap is None else args.bootstrap,
            trained=[text for pair in adapter.get("categories", {}).items() for text in pair],
        )
    write_files(output_dir, described, found, args.replace)
    if args.calibrate:
        store_thresholds(args, adapter, described["calibration"], split)
    if compare:
        write_pictures(args, output_dir, split, described, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
