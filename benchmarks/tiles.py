"""What do tiles find in a crowded photo that is larger than the model's canvas?

Joins drawn scenes of shapes, 4 x 4 in a picture, and asks the demo base for every shape, colour and
texture: of the whole picture alone, then with tiles of each given share of its side.

    python benchmarks/tiles.py --pictures 8

Prints a table in markdown: recall and precision of masks at IoU 0.5 and score 0.5, mask AP50,
false positives on absent prompts, and the time a picture as a multiple of that without tiles.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np

# A script in a folder of its own: the package lies one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam3_lora.coco import CocoSplit, read_split  # noqa: E402
from sam3_lora.config import user_errors  # noqa: E402
from sam3_lora.evaluation import load_forward  # noqa: E402
from sam3_lora.flags import FlagParser  # noqa: E402
from sam3_lora.forward import Forward  # noqa: E402
from sam3_lora.model import ModelError  # noqa: E402
from sam3_lora.prediction import evaluate_tiles  # noqa: E402
from sam3_lora.prompts import parse_count, parse_tile  # noqa: E402
from sam3_lora.scenes import Scene, draw_shapes, shape_prompts, write_scenes  # noqa: E402
from sam3_lora.tiles import view_windows  # noqa: E402

MAX_ROWS, SCORE_THRESHOLD = 8, 0.5
MAX_DETECTIONS = 200  # a picture has some 200 objects to find: one for each prompt that names it
COLUMNS = ("tiles", "views", "recall", "precision", "mask AP50", "false positives", "time")


def join_scenes(seed: int, number: int, side: int, count: int) -> Scene:
    """A picture of count x count scenes, each of `side` pixels."""
    scenes = [
        draw_shapes(np.random.default_rng((seed, number, part, 2)), side=side)
        for part in range(count**2)
    ]
    whole = (count * side, count * side)
    image, masks = np.zeros((*whole, 3), np.uint8), []
    for scene, (row, column) in zip(scenes, product(range(count), repeat=2), strict=True):
        place = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
        image[place] = scene.image
        own = np.zeros((len(scene.masks), *whole), bool)
        own[:, *place] = scene.masks
        masks.append(own)
    return Scene(image, np.concatenate(masks), [kind for scene in scenes for kind in scene.kinds])


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--model_name", default="demo/sam3_tiny", help="base model")
    add("--pictures", type=parse_count, default=8, help="how many")
    add("--scenes", type=parse_count, default=4, help="of a picture's side")
    add("--side", type=parse_count, default=112, help="of a scene, pixels")
    add("--tile", type=parse_tile, nargs="+", default=[0.6, 0.5, 0.25], help="shares of a side")
    add("--seed", type=int, default=0, help="of the scenes")
    return parser


def measure(forward: Forward, split: CocoSplit, tile: float | None) -> tuple[list[str], float]:
    """The cells of a row but the last, and the seconds of all pictures."""
    limits = {"max_detections": MAX_DETECTIONS, "score_threshold": SCORE_THRESHOLD}
    start = time.process_time()
    summary, _ = evaluate_tiles(forward, split, split.images, tile, max_rows=MAX_ROWS, **limits)
    seconds = time.process_time() - start
    image = split.images[0]
    views = len(view_windows(image["width"], image["height"], tile)) if tile else 1
    figures = [summary["cgf1"][name] for name in ("recall@0.5", "precision@0.5")]
    figures += [summary["segm"]["AP50"], summary["false_positive_rate"]]
    cells = ["undefined" if value is None else f"{value:.3f}" for value in figures]
    return [f"{tile:g}" if tile else "none", str(views), *cells], seconds


@user_errors(ModelError)
def main(argv: list[str] | None = None) -> int:
    """Draws, measures and prints."""
    args = build_parser().parse_args(argv)
    forward = load_forward(args.model_name, "meta", "auto", "auto")
    prompts = shape_prompts()
    forward.remember_texts(prompts)
    with tempfile.TemporaryDirectory() as folder:
        parts = (args.side, args.scenes)
        pictures = (join_scenes(args.seed, k, *parts) for k in range(args.pictures))
        split = read_split(write_scenes(Path(folder), "test", pictures, prompts))
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        whole = None
        for tile in (None, *args.tile):
            cells, seconds = measure(forward, split, tile)
            whole = whole or seconds
            print(f"| {' | '.join(cells)} | {seconds / whole:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
