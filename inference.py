r"""Finds and outlines what a text, or boxes drawn on an image, describe.

    python inference.py --lora_weights outputs/sam3_lora/best_model/lora_weights.pt \
        --image test.jpg --text_prompt "yellow school bus" --output result.png
    python inference.py --lora_weights outputs/sam3_lora/best_model/lora_weights.pt \
        --image test.jpg --bboxes '[[100, 150, 400, 350]]' --output result.png
    python inference.py --lora_weights outputs/sam3_lora/best_model/lora_weights.pt \
        --image test.jpg --text_prompt "red car" --bboxes '[[100, 150, 400, 350]]' \
        --output result.png
    python inference.py --lora_weights cracks=outputs/a/best_model leaks=outputs/b/best_model \
        --image photos --text_prompt crack "oil leak" car --output outputs/several \
        --route crack=cracks "oil leak=leaks:0.8,cracks:0.2" car=base

SAM 3 takes a box as an example: it finds everything like the object in it, all over the image, not
that object alone. --only_boxed keeps what lies in the boxes.

Of several adapters on one base, a prompt without a --route goes in equal shares to those that were
trained on it, and to the base model where none was; the log says where each went. A blend can find
less than its parts alone do, so route what an adapter was trained for to that one.

In a large or crowded photo, --tile 0.5 also looks at nine overlapping parts of it, each as closely
as at a photo, and draws what several show once.

Writes, for result.png:
    result.png               the image with its detections, a colour a prompt; your boxes dashed
    result_detections.json   COCO results with file_name and prompt; category_id 1: first prompt
    result_masks/*.png       with --save_masks: a 0 and 255 image a detection, in the JSON's order
and into a folder, for photo.jpg, photo_overlay.png, photo_detections.json and photo_masks/.
Prints a line an image: detections of each prompt, the best score (also one below the threshold),
the overlay's path.
"""

import argparse
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_layers import AdapterError
from sam3_lora import coco, config
from sam3_lora.checkpoint import ADAPTER_FILE, read_adapter, set_aside
from sam3_lora.coco import DatasetError
from sam3_lora.config import Config, ConfigError
from sam3_lora.drawing import draw_overlay
from sam3_lora.evaluation import (
    Detections,
    load_forward,
    write_atomically,
    write_json,
)
from sam3_lora.forward import VISUAL_PROMPT, Forward
from sam3_lora.metrics import coco_results
from sam3_lora.model import ModelError
from sam3_lora.prediction import (
    BASE,
    Prompts,
    Route,
    choose_model,
    find,
    keep_boxed,
    plan_routes,
    read_texts,
    share_out,
    suppress,
)
from sam3_lora.tiles import add_tile_flag

log = logging.getLogger("inference")

# Of the files beside an overlay: no other tool's, such as labelme's photo.json, is replaced.
JSON_ENDING = "_detections.json"
DEFAULT_THRESHOLD = 0.5  # of the score
# Problems that a message lists, and training prompts that the log does.
SHOWN = 3
SHOWN_PROMPTS = 10
# Parts of an adapter's path that do not tell one run from another.
SAME_IN_EVERY_RUN = (ADAPTER_FILE, "best_model", "last_model")
# The largest weight of an adapter in a blend; minus it is the smallest.
MAX_WEIGHT = 10


def build_parser() -> argparse.ArgumentParser:
    """The command line: prompts, outputs, and the options of the model and the hardware."""
    parser = config.FlagParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--lora_weights", nargs="+", action="extend", default=[], metavar="PATH",
        help="adapter: a file, or a folder with lora_weights.pt (default: the base model alone); "
        "several of one base, each by its run's folder or as NAME=PATH")
    add("--image", type=Path, required=True, metavar="PATH", help="an image, or a folder of images")
    add("--text_prompt", nargs="+", default=[], metavar="TEXT",
        help='what to find; several: --text_prompt "red car" bus')
    add("--route", type=parse_route, nargs="+", action="extend", default=[], metavar="TEXT=NAME",
        help="the adapter that answers a prompt, or 'TEXT=NAME:0.7,NAME2:0.3' for their weighted "
        f"sum; {BASE}: none (default: those that were trained on it, else the only one or {BASE})")
    add("--bboxes", type=parse_boxes, default=[], metavar="JSON",
        help="example boxes '[[x1, y1, x2, y2], ...]' in pixels of the image as shown (in cmd.exe "
        "with double quotes); they go with every text, or alone with the word 'visual'")
    add("--bbox_labels", type=parse_labels, metavar="JSON",
        help="'[1, 0, ...]', one a box: 1 find its like, 0 not its like (default: all 1)")
    add("--only_boxed", action="store_true",
        help="keep only detections that lie by half their box or more in a positive box; "
        "without it, all that is like the boxed objects is found")
    add("--threshold", type=parse_share, metavar="0..1",
        help="lowest score kept, of every prompt (default: what evaluate_sam3_lora.py --calibrate "
        "stored for its category in the adapter, else 0.5)")
    add("--nms_iou", type=parse_share, metavar="0..1",
        help="drop a detection whose mask has a larger IoU than this with a better one of the same "
        "prompt (default: keep all)")
    add_tile_flag(parser)
    add("--output", type=Path, default=Path("outputs/inference"), metavar="PATH",
        help="image file to write, or a folder for one PNG an image (default: outputs/inference)")
    add("--json", type=Path, metavar="FILE",
        help="one file for the detections of all images (default: one beside each overlay)")
    add("--save_masks", action="store_true", help="also write each detection's mask as a PNG")
    # fmt: on
    config.add_config_flags(
        parser, ("model", "hardware"), without=("num_workers", "gradient_checkpointing")
    )
    return parser


def parse_boxes(text: str) -> list[list[float]]:
    """The value of --bboxes as boxes_xyxy."""
    form = "expected '[[x1, y1, x2, y2], ...]' in pixels, found"
    boxes = _parse_list(text, form)
    if _is_box(boxes):
        raise argparse.ArgumentTypeError(
            f"{form} one box without its outer brackets; did you mean '[{_show_box(boxes)}]'?"
        )
    for box in boxes:
        if not _is_box(box):
            raise argparse.ArgumentTypeError(f"{form} the box {json.dumps(box)[:60]}")
        if not (box[0] < box[2] and box[1] < box[3]):
            raise argparse.ArgumentTypeError(
                f"expected two corners, x1 < x2 and y1 < y2, found the box {_show_box(box)}"
            )
    return boxes


def _is_box(value: Any) -> bool:
    """Whether a JSON value is a list of four finite numbers."""
    numbers = isinstance(value, list) and all(type(v) is float and math.isfinite(v) for v in value)
    return numbers and len(value) == 4


def parse_labels(text: str) -> list[int]:
    """The value of --bbox_labels."""
    form = "expected '[1, 0, ...]', 1 for a positive box and 0 for a negative one, found"
    labels = _parse_list(text, form)
    if any(type(label) is not float or label not in (0, 1) for label in labels):
        raise argparse.ArgumentTypeError(f"{form} {text[:60]!r}")
    return [int(label) for label in labels]


def _parse_list(text: str, form: str) -> list[Any]:
    """A JSON list that is not empty, its numbers as floats."""
    try:
        values = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or not values:
        raise argparse.ArgumentTypeError(f"{form} {text[:60]!r}")
    return values


def parse_route(value: str) -> tuple[str, dict[str, float]]:
    """A value of --route: a prompt, and the weight of each adapter by name."""
    text, _, blend = value.rpartition("=")
    text, shares = " ".join(text.split()), [share.partition(":") for share in blend.split(",")]
    alone = len(shares) == 1
    try:
        weights = {n.strip(): float(w) if colon or not alone else 1.0 for n, colon, w in shares}
    except ValueError:
        weights = {}
    usable = all(name and abs(weight) <= MAX_WEIGHT for name, weight in weights.items())
    if not text or not usable or len(weights) < len(shares):
        raise argparse.ArgumentTypeError(
            "expected 'TEXT=NAME' or 'TEXT=NAME:0.7,NAME2:0.3', each name once and weights from "
            f"-{MAX_WEIGHT} to {MAX_WEIGHT}, found {value[:60]!r}"
        )
    return text, weights


def parse_share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


def _show_box(box: Sequence[float]) -> str:
    """A box for a message."""
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def read_prompts(args: argparse.Namespace) -> Prompts:
    """The prompts of the command line, checked against each other."""
    texts = list(dict.fromkeys(" ".join(text.split()) for text in args.text_prompt))
    labels = args.bbox_labels or [1] * len(args.bboxes)
    if "" in texts:
        raise ConfigError("--text_prompt: expected words, found an empty text")
    if len(labels) != len(args.bboxes):
        raise ConfigError(
            f"--bbox_labels: expected one for each box of --bboxes ({len(args.bboxes)}), found "
            f"{len(labels)}"
        )
    if not texts and not labels:
        raise ConfigError(
            "expected --text_prompt or --bboxes, found neither; say what to find, such as "
            "--text_prompt \"red car\", or box an example with --bboxes '[[x1, y1, x2, y2]]'"
        )
    if args.tile and labels:
        raise ConfigError(
            "--tile: expected --text_prompt alone, found --bboxes, which most tiles do not show; "
            "name the objects with --text_prompt, or leave out --tile"
        )
    if not any(labels) and (args.only_boxed or not texts):
        flag = "--only_boxed" if args.only_boxed else "--bbox_labels"
        raise ConfigError(f"{flag}: expected a positive box in --bboxes, found none; add one")
    return Prompts(texts or [VISUAL_PROMPT], args.bboxes, labels)


def read_routes(routes: list[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The values of --route by prompt; ConfigError for two of one prompt."""
    texts = Counter(text for text, _ in routes)
    twice = [text for text, count in texts.items() if count > 1]
    if twice:
        raise ConfigError(f"--route: expected one for each prompt, found more for {twice[0]!r}")
    return dict(routes)


def list_images(path: Path) -> list[Path]:
    """The image at a path, or those directly in a folder, sorted; hidden files are skipped."""
    if not path.exists():
        raise DatasetError(f"--image: expected an image or a folder of images, found no {path}")
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in coco.IMAGE_SUFFIXES]
    if not images:
        kinds = ", ".join(sorted(coco.IMAGE_SUFFIXES))
        raise DatasetError(f"--image: expected images ({kinds}) in {path}, found none")
    return images


def check_images(images: list[Path], boxes_xyxy: list[list[float]]) -> None:
    """Raises DatasetError where a header cannot be read, or a box does not lie in each image or is
    in fractions of it."""
    problems = []
    for path in images:
        try:
            width, height = coco.image_size(path)
        except DatasetError as error:
            problems.append(str(error))
            continue
        if boxes_xyxy and np.max(boxes_xyxy) <= 1 and max(width, height) > 2:
            problems.append(
                f"--bboxes: {_show_box(boxes_xyxy[0])} looks like fractions; pixels are expected, "
                f"of {path} ({width} x {height})"
            )
            continue
        for box in boxes_xyxy:
            if min(box) < 0 or box[2] > width or box[3] > height:
                wanted = f"--bboxes: expected boxes inside {path} ({width} x {height} pixels)"
                problems.append(f"{wanted}, found {_show_box(box)}")
    if problems:
        more = f"; {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DatasetError("; ".join(problems[:SHOWN]) + more)


def plan_overlays(args: argparse.Namespace, images: list[Path]) -> list[Path]:
    """Each image's overlay; ConfigError where two files of this run would be one."""
    output = args.output
    overlays = [output]
    if output.suffix and output.suffix.lower() not in coco.IMAGE_SUFFIXES and not output.is_dir():
        kinds = ", ".join(sorted(coco.IMAGE_SUFFIXES))
        raise ConfigError(
            f"--output: expected an image file ({kinds}) or a folder, found {output}; a folder "
            "whose name has a dot must exist"
        )
    if not output.suffix or output.is_dir():
        stems = Counter(path.stem.lower() for path in images)
        names = [p.stem if stems[p.stem.lower()] == 1 else p.name for p in images]
        overlays = [output / f"{name}_overlay.png" for name in names]
    elif args.image.is_dir():
        raise ConfigError(f"--output: expected a folder for a folder of images, found {output}")
    jsons = [args.json] if args.json else [beside(path, JSON_ENDING) for path in overlays]
    written = overlays + jsons
    uses = Counter(path.resolve() for path in images + written)
    for path in written:
        if path.is_dir() or uses[path.resolve()] > 1:
            raise ConfigError(
                f"--output, --json: {path} is a folder, an input, or the name of two outputs; name "
                "another place"
            )
    return overlays


def beside(overlay: Path, ending: str) -> Path:
    """The name of what goes with an overlay."""
    return overlay.with_name(overlay.stem.removesuffix("_overlay") + ending)


def read_adapters(words: list[str]) -> dict[str, dict[str, Any]]:
    """The adapters of --lora_weights by name: what each file holds, and its `path`."""
    adapters: dict[str, dict[str, Any]] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path or "/" in name or "\\" in name or Path(word).exists():  # a = in a path
            path = word
            parts = reversed(Path(os.path.abspath(path)).parts)
            name = next(p for p in parts if p not in SAME_IN_EVERY_RUN).removesuffix(".pt")
        if name in ("", *adapters) or (name == BASE and len(words) > 1):
            raise ConfigError(
                f"--lora_weights: expected adapters of different names, none of them {BASE}, found "
                f"{name!r} for {path}; give another by NAME={path}"
            )
        adapters[name] = {**read_adapter(Path(path)), "path": Path(path)}
    return adapters


def build_forward(
    args: argparse.Namespace,
    options: Config,
    adapters: dict[str, dict[str, Any]],
    blends: list[dict[str, float]],
) -> tuple[Forward, list[Route]]:
    """The base model, and the prompts' routes over its adapters."""
    compiled = options.hardware.use_compile
    if compiled and any(weights != blends[0] for weights in blends):
        raise ConfigError(
            "--use_compile: expected all prompts to go one way, found several, and each change of "
            "adapter would compile anew; leave it out"
        )
    name, geometry_cls = choose_model(asdict(options.model), vars(args), adapters)
    device, precision = options.hardware.device, options.hardware.mixed_precision
    forward = replace(load_forward(name, geometry_cls, device, precision), compiled=compiled)
    log.info("%s with %s on %s", name, ", ".join(adapters) or "no adapter", forward.device)
    for own, adapter in adapters.items():
        if phrases := list(adapter.get("categories", {}).values()):
            shown, rest = ", ".join(phrases[:SHOWN_PROMPTS]), len(phrases) - SHOWN_PROMPTS
            more = f", ... and {rest} more" if rest > 0 else ""
            log.info("%s (%s), training prompts: %s%s", own, adapter["path"], shown, more)
    return forward, plan_routes(forward, blends, adapters)


def choose_thresholds(
    threshold: float | None,
    texts: list[str],
    blends: list[dict[str, float]],
    adapters: dict[str, dict[str, Any]],
) -> list[float]:
    """The lowest score kept of each text: --threshold, else that of its category in the adapter
    that answers it alone: a blend's scores are others."""
    if threshold is not None:
        return [threshold] * len(texts)
    chosen, shown = [], []
    for text, weights in zip(texts, blends, strict=True):
        own = adapters[next(iter(weights))] if list(weights.values()) == [1] else {}
        by_name, phrases = own.get("thresholds", {}), own.get("categories", {})
        stored = by_name | {phrases[name]: by_name[name] for name in by_name if name in phrases}
        chosen.append(stored.get(text, DEFAULT_THRESHOLD))
        shown.append(f"{text} {chosen[-1]:.3f}" + (" (stored)" if text in stored else ""))
    if any(text.endswith("(stored)") for text in shown):
        log.info("thresholds: %s", ", ".join(shown))
    return chosen


def answer(
    args: argparse.Namespace,
    forward: Forward,
    photo: np.ndarray,
    prompts: Prompts,
    thresholds: list[float],
    max_rows: int,
) -> tuple[Detections, float]:
    """What the flags keep of the detections of one image (H, W, 3), and the best score of all."""
    found, best = find(forward, photo, prompts, thresholds, max_rows, args.tile)
    if args.only_boxed:
        positive = [b for b, label in zip(prompts.boxes_xyxy, prompts.labels, strict=True) if label]
        found = keep_boxed(found, np.array(positive))
    if args.nms_iou is not None:
        found = suppress(found, args.nms_iou)
    return found, best


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 pixels in the format of the suffix."""
    form = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda temporary: Image.fromarray(pixels).save(temporary, form))


def write_overlay(path: Path, photo: np.ndarray, found: Detections, prompts: Prompts) -> None:
    """Draws the detections over the image, a colour a prompt."""
    colors = [category_id - 1 for category_id in found["category_id"].tolist()]
    scores = zip(colors, found["score"], strict=True)
    overlay = draw_overlay(
        photo,
        # One mask at a time: all those of a large photo may not fit in memory.
        (coco.decode_mask(rle, *photo.shape[:2]) for rle in found["rles"]),
        found["boxes_xyxy"],
        [f"{prompts.texts[color]} {score:.2f}" for color, score in scores],
        colors,
        prompts.boxes_xyxy,
        prompts.labels,
    )
    write_image(path, overlay)


def write_masks(folder: Path, found: Detections) -> None:
    """Writes a 0 and 255 PNG for each detection; an earlier run's folder is renamed first."""
    if folder.exists() and (moved := set_aside(folder)):
        log.warning("%s held earlier masks: renamed to %s", folder, moved)
    for number, rle in enumerate(found["rles"], start=1):
        mask = coco.decode_mask(rle, *rle["size"])
        write_image(folder / f"{number:03d}.png", mask.astype(np.uint8) * 255)


@config.user_errors(ConfigError, DatasetError, AdapterError, ModelError)
def main(argv: list[str] | None = None) -> int:
    """Runs the prompts on the images and writes what is found."""
    args = build_parser().parse_args(argv)
    config.setup_logging(None)
    options = config.config_from_args(args)
    # 1. All that the user wrote, before a weight is loaded or a file written.
    prompts = read_prompts(args)
    images = list_images(args.image)
    check_images(images, prompts.boxes_xyxy)
    overlays = plan_overlays(args, images)
    adapters = read_adapters(args.lora_weights)
    texts, blends = share_out(prompts.texts, read_routes(args.route), adapters)
    # 2. The model.
    forward, routes = build_forward(args, options, adapters, blends)
    thresholds = choose_thresholds(args.threshold, texts, blends, adapters)
    prompts = replace(prompts, texts=texts, routes=routes)
    read_texts(forward, prompts)
    # 3. Image by image.
    rows: list[dict[str, Any]] = []
    max_rows = options.hardware.max_rows_per_forward
    for image_id, (path, overlay) in enumerate(zip(images, overlays, strict=True), start=1):
        photo = coco.read_image(path)
        found, best = answer(args, forward, photo, prompts, thresholds, max_rows)
        write_overlay(overlay, photo, found, prompts)
        if args.save_masks:
            write_masks(beside(overlay, "_masks"), found)
        own = [
            {**row, "file_name": path.name, "prompt": prompts.texts[row["category_id"] - 1]}
            for row in coco_results(image_id, found, found["rles"])
        ]
        rows += own
        if not args.json:
            write_json(beside(overlay, JSON_ENDING), own)
        counts = Counter(row["category_id"] for row in own)
        found_text = ", ".join(f"{t} {counts[i]}" for i, t in enumerate(prompts.texts, start=1))
        print(f"{path.name}: {found_text}, best score {best:.3f}, {overlay}", flush=True)
    if args.json:
        write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
