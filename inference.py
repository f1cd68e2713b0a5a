r"""Finds and outlines what a text, or boxes drawn on an image, describe.

    python inference.py --lora_weights outputs/sam3_lora/best_model/lora_weights.pt \
        --image test.jpg --text_prompt "yellow school bus" --output result.png
    python inference.py --lora_weights outputs/sam3_lora/best_model/lora_weights.pt \
        --image test.jpg --bboxes '[[100, 150, 400, 350]]' --output result.png
    python inference.py --lora_weights outputs/sam3_lora/best_model/lora_weights.pt \
        --image test.jpg --text_prompt "red car" --bboxes '[[100, 150, 400, 350]]' \
        --output result.png
    python inference.py --lora_weights outputs/sam3_lora/best_model/lora_weights.pt \
        --video frames --text_prompt "red car" --output outputs/inference

SAM 3 takes a box as an example: it finds everything like the object in it, all over the image, not
that object alone. --only_boxed keeps what lies in the boxes.

Writes, for result.png:
    result.png               the image with its detections, a colour a prompt; your boxes dashed
    result_detections.json   COCO results with file_name and prompt; category_id 1: first prompt
    result_masks/*.png       with --save_masks: a 0 and 255 image a detection, in the JSON's order
and into a folder, for photo.jpg, photo_overlay.png, photo_detections.json and photo_masks/.
For a video clip.mp4, or a folder of frames named clip, into the folder of --output:
    clip_frames/00001.png    the frames with their detections, a colour an identity
    clip.gif                 at most 640 pixels a side and 200 frames
    clip_detections.json     as above, with frame (from 0) and track_id: one object, one id
Prints a line an image: detections of each prompt, the best score (also one below --threshold), the
overlay's path; of a video, one line.

--tracker iou links detections whose masks overlap from frame to frame; two masks of one object are
two identities, unless --nms_iou 0.5 drops one. --tracker sam3 runs SAM 3's own video model, with
the adapter merged into its detector, in fp32, on the frames as they come; it needs facebook/sam3 or
a full copy of it. A new object needs the score that its config asks for (0.7), or --threshold where
that is higher. An adapter of the vision tower also shifts what that tracker sees; one of the other
components leaves it as it is.
"""

import argparse
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_layers import AdapterError
from sam3_lora import coco, config, video
from sam3_lora.checkpoint import read_adapter, set_aside
from sam3_lora.coco import DatasetError
from sam3_lora.config import Config, ConfigError
from sam3_lora.drawing import draw_overlay
from sam3_lora.evaluation import (
    Detections,
    load_forward,
    resolve_model,
    write_atomically,
    write_json,
)
from sam3_lora.forward import VISUAL_PROMPT, Forward
from sam3_lora.metrics import coco_results
from sam3_lora.model import ModelError, load_video_model
from sam3_lora.prediction import Prompts, find, keep_boxed, suppress

log = logging.getLogger("inference")

# Of the files beside an overlay: no other tool's, such as labelme's photo.json, is replaced.
JSON_ENDING = "_detections.json"
# Problems that a message lists, and training prompts that the log does.
SHOWN = 3
SHOWN_PROMPTS = 10


def build_parser() -> argparse.ArgumentParser:
    """The command line: prompts, outputs, and the options of the model and the hardware."""
    parser = config.FlagParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--lora_weights", type=Path, metavar="PATH",
        help="adapter: a file, or a folder with lora_weights.pt (default: the base model alone)")
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--image", type=Path, metavar="PATH", help="an image, or a folder of images")
    source("--video", type=Path, metavar="PATH",
        help="a folder of frames, in natural order, or a video file, which needs `pip install av`")
    add("--every", type=parse_count, default=1, metavar="N",
        help="of a video, take each N-th frame (default: 1)")
    add("--fps", type=parse_count, metavar="N",
        help="frames a second of a video's GIF (default: as the video, 10 for images)")
    add("--tracker", choices=("iou", "sam3"), default="iou",
        help="how a video's objects keep their identity: by overlap of masks, or by SAM 3's own "
        "tracker, which also shifts with an adapter of the vision tower (default: iou)")
    add("--text_prompt", nargs="+", default=[], metavar="TEXT",
        help='what to find; several: --text_prompt "red car" bus')
    add("--bboxes", type=parse_boxes, default=[], metavar="JSON",
        help="example boxes '[[x1, y1, x2, y2], ...]' in pixels of the image as shown (in cmd.exe "
        "with double quotes); they go with every text, or alone with the word 'visual'")
    add("--bbox_labels", type=parse_labels, metavar="JSON",
        help="'[1, 0, ...]', one a box: 1 find its like, 0 not its like (default: all 1)")
    add("--only_boxed", action="store_true",
        help="keep only detections that lie by half their box or more in a positive box; "
        "without it, all that is like the boxed objects is found")
    add("--threshold", type=parse_share, default=0.5, metavar="0..1",
        help="lowest score kept (default: 0.5)")
    add("--nms_iou", type=parse_share, metavar="0..1",
        help="drop a detection whose mask has a larger IoU than this with a better one of the same "
        "prompt (default: keep all)")
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


def parse_share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


def parse_count(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, found {text!r}")
    return int(text)


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
    if not any(labels) and (args.only_boxed or not texts):
        flag = "--only_boxed" if args.only_boxed else "--bbox_labels"
        raise ConfigError(f"{flag}: expected a positive box in --bboxes, found none; add one")
    return Prompts(texts or [VISUAL_PROMPT], args.bboxes, labels)


def list_images(path: Path, flag: str = "--image") -> list[Path]:
    """The image at a path, or those directly in a folder, sorted; hidden files are skipped."""
    if not path.exists():
        raise DatasetError(f"{flag}: expected an image or a folder of images, found no {path}")
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in coco.IMAGE_SUFFIXES]
    if not images:
        kinds = ", ".join(sorted(coco.IMAGE_SUFFIXES))
        raise DatasetError(f"{flag}: expected images ({kinds}) in {path}, found none")
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
        problems += box_problems(path, width, height, boxes_xyxy)
    if problems:
        more = f"; {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DatasetError("; ".join(problems[:SHOWN]) + more)


def box_problems(path: Path, width: int, height: int, boxes_xyxy: list[list[float]]) -> list[str]:
    """What is wrong with boxes on an image of that size."""
    if boxes_xyxy and np.max(boxes_xyxy) <= 1 and max(width, height) > 2:
        box = _show_box(boxes_xyxy[0])
        wanted = f"pixels are expected, of {path} ({width} x {height})"
        return [f"--bboxes: {box} looks like fractions; {wanted}"]
    wanted = f"--bboxes: expected boxes inside {path} ({width} x {height} pixels)"
    outside = [b for b in boxes_xyxy if min(b) < 0 or b[2] > width or b[3] > height]
    return [f"{wanted}, found {_show_box(box)}" for box in outside]


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


def build_forward(args: argparse.Namespace, options: Config) -> tuple[Forward, dict[str, str]]:
    """The model, and the phrase of each class that its adapter was trained on."""
    adapter = read_adapter(args.lora_weights) if args.lora_weights else {}
    name, geometry_cls = resolve_model(asdict(options.model), vars(args), adapter)
    device, precision = options.hardware.device, options.hardware.mixed_precision
    forward = load_forward(name, geometry_cls, device, precision, args.lora_weights, adapter)
    forward = replace(forward, compiled=options.hardware.use_compile)
    log.info("%s with %s on %s", name, args.lora_weights or "no adapter", forward.device)
    phrases = adapter.get("categories", {})
    if phrases:
        shown = ", ".join(list(phrases.values())[:SHOWN_PROMPTS])
        rest = len(phrases) - SHOWN_PROMPTS
        more = f", ... and {rest} more" if rest > 0 else ""
        log.info("the adapter's training prompts: %s%s", shown, more)
    return forward, phrases


def use_trained_phrases(prompts: Prompts, phrases: dict[str, str]) -> Prompts:
    """Prompts in which a class name of the adapter stands as the phrase it was trained with."""
    trained = {t: phrases[t] for t in prompts.texts if t in phrases and t not in phrases.values()}
    for name, phrase in trained.items():
        log.info("prompt %r: the adapter was trained with %r, which is used", name, phrase)
    texts = list(dict.fromkeys(trained.get(text, text) for text in prompts.texts))
    return replace(prompts, texts=texts)


def answer(
    args: argparse.Namespace, forward: Forward, photo: np.ndarray, prompts: Prompts, max_rows: int
) -> tuple[Detections, float]:
    """What the flags keep of the detections of one image (H, W, 3), and the best score of all."""
    thresholds = [args.threshold] * len(prompts.texts)
    found, best = find(forward, photo, prompts, thresholds, max_rows)
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


def run_video(args: argparse.Namespace, options: Config, prompts: Prompts) -> None:
    """Runs the prompts on the frames of a video and writes what is found."""
    if args.tracker == "sam3":
        if args.bboxes or args.nms_iou is not None:
            raise ConfigError(
                "--bboxes, --nms_iou: --tracker sam3 takes texts alone, and parts overlaps itself; "
                "drop them, or use --tracker iou"
            )
        # The library's model has one precision for all its parts.
        options = replace(options, hardware=replace(options.hardware, mixed_precision="no"))
    files = list_images(args.video, "--video") if args.video.is_dir() else None
    clip = video.open_clip(args.video, files, args.every, args.fps)
    outputs = video.plan_outputs(clip, args.output, args.json)
    if problems := box_problems(clip.path, *clip.size, prompts.boxes_xyxy):
        raise DatasetError("; ".join(problems[:SHOWN]))
    forward, phrases = build_forward(args, options)
    prompts = use_trained_phrases(prompts, phrases)
    forward.release_text_encoder(prompts.texts)
    frames = video.read_frames(clip)
    if args.tracker == "sam3":
        name = forward.model.name_or_path
        parts = load_video_model(name, forward.model, forward.tokenizer)
        tracked = video.track_sam3(*parts, forward, prompts.texts, args.threshold, frames)
    else:
        rows = options.hardware.max_rows_per_forward
        tracked = video.follow(frames, lambda photo: answer(args, forward, photo, prompts, rows)[0])
    masks = write_masks if args.save_masks else None
    print(video.write_video(clip, tracked, prompts, outputs, masks), flush=True)


@config.user_errors(ConfigError, DatasetError, AdapterError, ModelError)
def main(argv: list[str] | None = None) -> int:
    """Runs the prompts on the images and writes what is found."""
    args = build_parser().parse_args(argv)
    config.setup_logging(None)
    options = config.config_from_args(args)
    # 1. All that the user wrote, before a weight is loaded or a file written.
    prompts = read_prompts(args)
    if args.video:
        run_video(args, options, prompts)
        return 0
    if (args.every, args.fps, args.tracker) != (1, None, "iou"):
        raise ConfigError("--every, --fps, --tracker: expected --video, found --image; drop them")
    images = list_images(args.image)
    check_images(images, prompts.boxes_xyxy)
    overlays = plan_overlays(args, images)
    # 2. The model.
    forward, phrases = build_forward(args, options)
    prompts = use_trained_phrases(prompts, phrases)
    forward.release_text_encoder(prompts.texts)
    # 3. Image by image.
    rows: list[dict[str, Any]] = []
    for image_id, (path, overlay) in enumerate(zip(images, overlays, strict=True), start=1):
        photo = coco.read_image(path)
        found, best = answer(args, forward, photo, prompts, options.hardware.max_rows_per_forward)
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
        counts = Counter(row["prompt"] for row in own)
        found_text = ", ".join(f"{text} {counts[text]}" for text in prompts.texts)
        print(f"{path.name}: {found_text}, best score {best:.3f}, {overlay}", flush=True)
    if args.json:
        write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
