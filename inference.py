r"""Finds and outlines what a text, or boxes drawn on an image, describe.

    python inference.py --lora_weights outputs/sam3_lora/best_model \
        --image test.jpg --text_prompt "yellow school bus" --output result.png
    python inference.py --lora_weights outputs/sam3_lora/best_model \
        --image test.jpg --bboxes '[[100, 150, 400, 350]]' --output result.png
    python inference.py --lora_weights outputs/sam3_lora/best_model \
        --video frames --text_prompt "red car" --output outputs/inference
    python inference.py --image photos --text_prompt crack "oil leak" car \
        --lora_weights cracks=outputs/a/best_model leaks=outputs/b/best_model \
        --route crack=cracks "oil leak=leaks:0.8,cracks:0.2" car=base

SAM 3 takes a box as an example: it finds everything like the object in it, all over the image, not
that object alone. --only_boxed keeps what lies in the boxes.

Of several adapters on one base, a prompt without a --route goes in equal shares to those that were
trained on it, and to the base model where none was; the log says where each went. A blend can find
less than its parts alone do, so route what an adapter was trained for to that one.

In a large or crowded photo, --tile 0.5 also looks at nine overlapping parts of it, each as closely
as at a photo, and draws what several show once.

torchrun --nproc_per_node N inference.py ... shares the images of a folder out over N processes.

Writes, for result.png:
    result.png               the image with its detections, a colour a prompt;
                             your boxes dashed
    result_detections.json   COCO results with file_name and prompt;
                             category_id 1: first prompt
    result_masks/*.png       with --save_masks: a 0 and 255 image a detection,
                             in the JSON's order
and into a folder, for photo.jpg, photo_overlay.png, photo_detections.json and photo_masks/.
For a video clip.mp4, or a folder of frames named clip, into the folder of --output:
    clip_frames/00001.png    the frames with their detections, a colour a track
    clip.gif                 at most 640 pixels a side and 200 frames
    clip_detections.json     as above, with frame (from 0) and track_id: one
                             object, one id
Prints a line an image: detections of each prompt, the best score (with its threshold where it is
below that), the overlay's path; of a video, one line. A file that is no image ends the run before
it begins; one that turns out to be cut short is left out, and the exit code is 2 at the end.

--tracker iou links detections whose masks overlap from frame to frame; two masks of one object are
two identities, unless --nms_iou 0.5 drops one. --tracker sam3 runs SAM 3's own video model, with
the adapter merged into its detector, in fp32, on the frames as they come; it needs facebook/sam3 or
a full copy of it. A new object needs the score that its config asks for (0.7), or --threshold where
that is higher. An adapter of the vision tower also shifts what that tracker sees; one of the other
components leaves it as it is.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sam3_lora.startup  # noqa: F401  # isort: skip

import numpy as np

from lora_layers import AdapterError
from sam3_lora import coco, config, processes, video
from sam3_lora.checkpoint import ADAPTER_FILE, read_adapter
from sam3_lora.coco import DatasetError
from sam3_lora.config import Config, ConfigError
from sam3_lora.drawing import draw_overlay
from sam3_lora.evaluation import load_forward
from sam3_lora.files import check_writable, set_aside, write_json, write_picture
from sam3_lora.flags import FlagParser, add_config_flags, expand
from sam3_lora.forward import Forward
from sam3_lora.images import IMAGE_SUFFIXES, image_size, list_images, read_image
from sam3_lora.metrics import Detections, coco_results
from sam3_lora.model import ModelError, build_tracker
from sam3_lora.prediction import (
    BASE,
    Prompts,
    Route,
    choose_model,
    find,
    keep_boxed,
    name_some,
    plan_routes,
    read_texts,
    share_out,
    suppress,
)
from sam3_lora.prompts import (
    add_tile_flag,
    box_problems,
    choose_thresholds,
    count_words,
    parse_boxes,
    parse_count,
    parse_labels,
    parse_route,
    parse_share,
    read_prompts,
    read_routes,
)
from sam3_lora.tiles import view_windows

log = logging.getLogger("inference")

# Of the files beside an overlay: no other tool's, such as labelme's photo.json, is replaced.
JSON_ENDING = "_detections.json"
NAME_BYTES = 200  # of an image's file: a disk has 255, of which what is added takes some 30
NOTHING = "nothing found in %d of %d images: --threshold keeps lower scores, and "
NOTHING += "evaluate_sam3_lora.py --calibrate chooses a threshold from annotated photos"
# Problems that a message lists, and training prompts that the log does.
SHOWN = 3
SHOWN_PROMPTS = 10
# Parts of an adapter's path that do not tell one run from another.
SAME_IN_EVERY_RUN = (ADAPTER_FILE, "best_model", "last_model")


def build_parser() -> argparse.ArgumentParser:
    """The command line: prompts, outputs, and the options of the model and the hardware."""
    usage = "%(prog)s (--image PATH | --video PATH) --text_prompt TEXT ... [--FLAG VALUE ...]"
    parser = FlagParser(__doc__, usage=usage)
    # fmt: off
    group = parser.add_argument_group("what to run on")
    source = group.add_mutually_exclusive_group(required=True).add_argument
    source("--image", type=Path, metavar="PATH", help="an image, or a folder of images")
    source("--video", type=Path, metavar="PATH",
        help="a folder of frames, in natural order, or a video file, which needs `pip install av`")
    add = group.add_argument
    add("--lora_weights", nargs="+", action="extend", default=[], metavar="PATH",
        help="adapter: a file, or a folder with lora_weights.pt (default: the base model alone); "
        "several of one base, each by its run's folder or as NAME=PATH")
    add = parser.add_argument_group("what to find").add_argument
    add("--text_prompt", nargs="+", default=[], metavar="TEXT", help='"red car" bus: two prompts')
    add("--bboxes", type=parse_boxes, default=[], metavar="JSON",
        help="example boxes '[[x1, y1, x2, y2], ...]' in pixels of the image as shown (in cmd.exe "
        "with double quotes); they go with every text, or alone with the word 'visual'")
    add("--bbox_labels", type=parse_labels, metavar="JSON",
        help="'[1, 0, ...]', one a box: 1 find its like, 0 not its like (default: all 1)")
    add("--route", type=parse_route, nargs="+", action="extend", default=[], metavar="TEXT=NAME",
        help="the adapter that answers a prompt, or 'TEXT=NAME:0.7,NAME2:0.3' for their weighted "
        f"sum; {BASE}: none (default: those that were trained on it, else the only one or {BASE})")
    add = parser.add_argument_group("what to keep").add_argument
    add("--threshold", type=parse_share, metavar="0..1",
        help="lowest score kept, of every prompt (default: what evaluate_sam3_lora.py --calibrate "
        "stored for its category in the adapter that answers it alone, else 0.5)")
    add("--only_boxed", action="store_true",
        help="keep only detections that lie by half their box or more in a positive box; "
        "without it, all that is like the boxed objects is found")
    add("--nms_iou", type=parse_share, metavar="0..1",
        help="drop a detection whose mask has a larger IoU than this with a better one of the same "
        "prompt (default: keep all)")
    add_tile_flag(parser.add_argument_group("large photos"))
    add = parser.add_argument_group("videos").add_argument
    add("--every", type=parse_count, default=1, metavar="N", help="take each N-th frame")
    add("--fps", type=parse_count, metavar="N",
        help="frames a second of the GIF (default: as the video, 10 for images)")
    add("--tracker", choices=("iou", "sam3"), default="iou",
        help="how objects keep their identity: by overlap of masks, or by SAM 3's own tracker")
    add = parser.add_argument_group("what to write").add_argument
    add("--output", type=Path, default=Path("outputs/inference"), metavar="PATH",
        help="image file to write, or a folder for one PNG an image")
    add("--json", type=Path, metavar="FILE",
        help="one file for the detections of all images (default: one beside each overlay)")
    add("--save_masks", action="store_true", help="also write each detection's mask as a PNG")
    # fmt: on
    add_config_flags(parser, ("model", "hardware"), ("num_workers", "gradient_checkpointing"))
    return parser


def check_images(images: list[Path], boxes_xyxy: list[list[float]]) -> None:
    """Raises DatasetError where a header cannot be read, or a box does not lie in each image or is
    in fractions of it."""
    problems = []
    for path in images:
        try:
            width, height = image_size(path)
        except DatasetError as error:
            problems.append(str(error))
            continue
        problems += box_problems(path, width, height, boxes_xyxy)
        if len(os.fsencode(path.name)) > NAME_BYTES:
            found = f"of at most {NAME_BYTES} bytes, after which outputs are named, found {path}"
            problems.append(f"--image: expected a file name {found}; rename it")
    if problems:
        more = f"; {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DatasetError("; ".join(problems[:SHOWN]) + more)


def plan_overlays(args: argparse.Namespace, images: list[Path]) -> list[Path]:
    """Each image's overlay; ConfigError where two files of this run would be one."""
    output = args.output
    overlays = [output]
    if output.suffix and output.suffix.lower() not in IMAGE_SUFFIXES and not output.is_dir():
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
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
        if (path.exists() and not path.is_file()) or uses[path.resolve()] > 1:
            raise ConfigError(
                f"{'--json' if path == args.json else '--output'}: {path} is a folder or device, "
                "an input, or the name of two outputs; name another place"
            )
    for flag, path in (("--output", overlays[0]), ("--json", jsons[0])):
        check_writable(path.parent, flag)
    return overlays


def beside(overlay: Path, ending: str) -> Path:
    """The name of what goes with an overlay."""
    return overlay.with_name(overlay.stem.removesuffix("_overlay") + ending)


def read_adapters(words: list[str], routed: bool) -> dict[str, dict[str, Any]]:
    """The adapters of --lora_weights by name: what each file holds, and its `path`. One of several,
    or that is `routed` to, cannot be named as the base."""
    adapters: dict[str, dict[str, Any]] = {}
    problems = []
    for word in words:
        name, _, path = word.partition("=")
        if not path or "/" in name or "\\" in name or Path(word).exists():  # a = in a path
            path = word
            parts = reversed(Path(os.path.abspath(path)).parts)
            name = next(p for p in parts if p not in SAME_IN_EVERY_RUN).removesuffix(".pt")
        if name in ("", *adapters) or (name == BASE and (routed or len(words) > 1)):
            raise ConfigError(
                f"--lora_weights: expected adapters of different names, none of them {BASE}, found "
                f"{name!r} for {path}; give another by NAME={path}"
            )
        try:
            adapters[name] = {**read_adapter(expand(path)), "path": expand(path)}
        except AdapterError as error:
            adapters[name] = {}
            problems.append(str(error))
    if problems:
        raise AdapterError("; ".join(problems))
    return adapters


def build_forward(
    args: argparse.Namespace,
    options: Config,
    adapters: dict[str, dict[str, Any]],
    blends: list[dict[str, float]],
) -> tuple[Forward, list[Route]]:
    """The base model, and the prompts' routes over its adapters."""
    name, geometry_cls = choose_model(asdict(options.model), vars(args), adapters)
    device, precision = options.hardware.device, options.hardware.mixed_precision
    forward = load_forward(name, geometry_cls, device, precision)
    forward = replace(forward, compiled=options.hardware.use_compile)
    log.info("%s with %s on %s", name, ", ".join(adapters) or "no adapter", forward.device)
    for own, adapter in adapters.items():
        if phrases := list(adapter.get("categories", {}).values()):
            shown = name_some(phrases, SHOWN_PROMPTS)
            log.info("%s (%s), training prompts: %s", own, adapter["path"], shown)
    return forward, plan_routes(forward, blends, adapters)


def load(
    args: argparse.Namespace, options: Config, prompts: Prompts
) -> tuple[Forward, Prompts, list[float]]:
    """The model, the prompts as its adapters know them, and the lowest score kept of each."""
    adapters = read_adapters(args.lora_weights, bool(args.route))
    texts, blends = share_out(prompts.texts, read_routes(args.route), adapters)
    check_one_way(args, options, blends)
    if args.threshold is None:
        alone = {next(iter(own)) for own in blends if list(own.values()) == [1]}
        check_calibration(args.tile, {name: adapters[name] for name in adapters if name in alone})
    if args.tile:
        log.info("%d views of each image", len(view_windows(1, 1, args.tile)))
    forward, routes = build_forward(args, options, adapters, blends)
    prompts = replace(prompts, texts=texts, routes=routes)
    read_texts(forward, prompts)
    return forward, prompts, choose_thresholds(args.threshold, texts, blends, adapters)


def check_calibration(tile: float | None, adapters: dict[str, dict[str, Any]]) -> None:
    """Warns of thresholds that were chosen on scores of another search than this one."""
    for name, adapter in adapters.items():
        chosen = adapter.get("calibration", {}).get("tile")
        if adapter.get("thresholds") and chosen != tile:
            ways = [f"--tile {share}" if share else "no --tile" for share in (chosen, tile)]
            log.warning(
                "%s: its thresholds were chosen with %s and scores with %s are others: calibrate "
                "it so, or give --threshold", name, *ways
            )  # fmt: skip


def check_one_way(
    args: argparse.Namespace, options: Config, blends: list[dict[str, float]]
) -> None:
    """Raises ConfigError where prompts go several ways and the adapter cannot be changed."""
    reasons = {
        "--use_compile": (
            options.hardware.use_compile,
            "each change of adapter would compile anew",
        ),
        "--tracker sam3": (args.tracker == "sam3", "its detector has one adapter"),
    }
    for flag, (given, reason) in reasons.items():
        if given and any(weights != blends[0] for weights in blends):
            raise ConfigError(
                f"{flag}: expected all prompts to go one way, found several, and {reason}; leave "
                "it out, or send all prompts one way with --route"
            )


def answer(
    args: argparse.Namespace,
    forward: Forward,
    photo: np.ndarray,
    prompts: Prompts,
    thresholds: list[float],
    max_rows: int,
) -> tuple[Detections, tuple[int, float]]:
    """What the flags keep of the detections of one image (H, W, 3), and the best, as `find`."""
    found, best = find(forward, photo, prompts, thresholds, max_rows, args.tile)
    if args.only_boxed:
        positive = [b for b, label in zip(prompts.boxes_xyxy, prompts.labels, strict=True) if label]
        found = keep_boxed(found, np.array(positive))
    if args.nms_iou is not None:
        found = suppress(found, args.nms_iou)
    return found, best


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
    write_picture(path, overlay)


def write_masks(folder: Path, found: Detections) -> None:
    """Writes a 0 and 255 PNG for each detection; an earlier run's folder is renamed first."""
    if folder.exists() and (moved := set_aside(folder)):
        log.warning("%s held earlier masks: renamed to %s", folder, moved)
    for number, rle in enumerate(found["rles"], start=1):
        mask = coco.decode_mask(rle, *rle["size"])
        write_picture(folder / f"{number:03d}.png", mask.astype(np.uint8) * 255)


def write_image(
    args: argparse.Namespace,
    image_id: int,
    path: Path,
    overlay: Path,
    photo: np.ndarray,
    found: Detections,
    prompts: Prompts,
) -> list[dict[str, Any]]:
    """Writes what goes with an image; returns its detections as rows of the JSON."""
    write_overlay(overlay, photo, found, prompts)
    if args.save_masks:
        write_masks(beside(overlay, "_masks"), found)
    rows = [
        {**row, "file_name": path.name, "prompt": prompts.texts[row["category_id"] - 1]}
        for row in coco_results(image_id, found)
    ]
    if not args.json:
        write_json(beside(overlay, JSON_ENDING), rows)
    return rows


def run_video(args: argparse.Namespace, options: Config, prompts: Prompts) -> None:
    """Runs the prompts on the frames of a video and writes what is found."""
    if args.tracker == "sam3":
        given = {
            "--bboxes": args.bboxes,
            "--nms_iou": args.nms_iou is not None,
            "--tile": args.tile,
            "--use_compile": options.hardware.use_compile,
        }
        if words := [flag for flag, value in given.items() if value]:
            raise ConfigError(
                f"{', '.join(words)}: --tracker sam3 takes texts alone, whole frames, parts "
                "overlaps itself, and is not compiled; leave it out, or use --tracker iou"
            )
        # The library's model has one precision for all its parts.
        options = replace(options, hardware=replace(options.hardware, mixed_precision="no"))
    if processes.count() > 1:
        raise ConfigError("--video: expected one process, found torchrun's; start it with python")
    files = list_images(args.video, "--video") if args.video.is_dir() else None
    clip = video.open_clip(args.video, files, args.every, args.fps)
    outputs = video.plan_outputs(clip, args.output, args.json)
    if problems := box_problems(clip.path, *clip.size, prompts.boxes_xyxy):
        raise DatasetError("; ".join(problems[:SHOWN]))
    video.check_frames(clip)
    forward, prompts, thresholds = load(args, options, prompts)
    frames, bests = video.read_frames(clip), []
    if args.tracker == "sam3":
        parts = build_tracker(forward.model.name_or_path, forward.model, forward.tokenizer)
        tracked = video.track_sam3(*parts, forward, prompts.texts, thresholds, frames)
    else:
        limits = thresholds, options.hardware.max_rows_per_forward

        def look(photo: np.ndarray) -> Detections:
            found, best = answer(args, forward, photo, prompts, *limits)
            bests.append(best)
            return found

        tracked = video.follow(frames, look)
    masks = write_masks if args.save_masks else None
    print(video.write_video(clip, tracked, prompts, outputs, masks), flush=True)
    if bests and all(score < thresholds[row] for row, score in bests):
        best = max(bests, key=lambda own: own[1])
        words = count_words(prompts.texts, {}, thresholds, best)
        log.info("nothing found: %s; --threshold keeps lower scores", words)


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
    given = {"--every": args.every != 1, "--fps": args.fps, "--tracker": args.tracker != "iou"}
    if words := [flag for flag, value in given.items() if value]:
        raise ConfigError(f"{', '.join(words)}: expected --video, found --image; leave it out")
    images = list_images(args.image, "--image")
    check_images(images, prompts.boxes_xyxy)
    overlays = plan_overlays(args, images)
    # 2. The model; of several processes each takes its part of the images.
    with processes.joined():
        forward, prompts, thresholds = load(args, options, prompts)
        numbered = list(enumerate(zip(images, overlays, strict=True), start=1))
        rows: list[dict[str, Any]] = []
        unread: list[str] = []
        max_rows = options.hardware.max_rows_per_forward
        # 3. Image by image.
        for image_id, (path, overlay) in processes.share(numbered):
            try:
                photo = read_image(path)
            except DatasetError as error:
                if len(images) == 1:
                    raise
                log.error("left out: %s", error)
                unread.append(str(error))
                continue
            found, best = answer(args, forward, photo, prompts, thresholds, max_rows)
            own = write_image(args, image_id, path, overlay, photo, found, prompts)
            rows += own
            counts = Counter(row["category_id"] for row in own)
            words = count_words(prompts.texts, counts, thresholds, best)
            print(f"{path.name}: {words}, {overlay}", flush=True)
        everywhere = [row for part in processes.gather(rows) for row in part]
        left_out = [reason for part in processes.gather(unread) for reason in part]
    blank = len(images) - len(left_out) - len({row["image_id"] for row in everywhere})
    if blank and args.threshold is None:
        log.info(NOTHING, blank, len(images))
    if args.json and processes.is_main():
        write_json(args.json, sorted(everywhere, key=lambda row: row["image_id"]))
    if left_out:
        raise DatasetError(
            f"{len(left_out)} of {len(images)} images were left out, the first: {left_out[0]}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
