"""Does a box around one object find the others of its kind?

Draws scenes of shapes; for every kind with two objects or more, boxes one and asks for "visual".
The figures are over the others: the boxed object counts neither as found nor as false.

    python benchmarks/demo_exemplars.py --scenes 200

Prints AP and AP50 of boxes and masks.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A script in a folder of its own: the package lies one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam3_lora.coco import CocoSplit  # noqa: E402
from sam3_lora.config import user_errors  # noqa: E402
from sam3_lora.dataset import place_on_canvas  # noqa: E402
from sam3_lora.evaluation import detect, load_forward  # noqa: E402
from sam3_lora.flags import FlagParser  # noqa: E402
from sam3_lora.forward import VISUAL_PROMPT, Forward  # noqa: E402
from sam3_lora.metrics import DetectionAccumulator  # noqa: E402
from sam3_lora.model import ModelError, image_size  # noqa: E402
from sam3_lora.prompts import parse_count  # noqa: E402
from sam3_lora.scenes import Scene, draw_shapes, to_annotation  # noqa: E402

MAX_DETECTIONS, SCORE_THRESHOLD = 100, 0.5


def questions(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[int, list[int]]]:
    """Yields (boxed object, the others of its kind)."""
    for kind, number in Counter(scene.kinds).items():
        if number > 1:
            own = [g for g, other in enumerate(scene.kinds) if other == kind]
            boxed = int(rng.choice(own))
            yield boxed, [g for g in own if g != boxed]


@torch.no_grad()
def ask(forward: Forward, scene: Scene, boxed: int) -> dict[str, Any]:
    """What the model finds with one object's box, as `evaluation.detect`."""
    height, width = scene.image.shape[:2]
    x, y, w, h = to_annotation(scene.masks[boxed])["bbox"]
    box = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
    pixels = torch.from_numpy(scene.image).permute(2, 0, 1)
    batch = {
        "images": place_on_canvas(pixels, image_size(forward.model))[None],
        "texts": [VISUAL_PROMPT],
        "image_index": torch.zeros(1, dtype=torch.long),
        "box_prompts_cxcywh": torch.tensor([[box]]),
        "box_prompt_labels": torch.ones(1, 1, dtype=torch.long),
    }
    return detect(forward(batch), [0], [1], (height, width), MAX_DETECTIONS, SCORE_THRESHOLD)


def measure(forward: Forward, scenes: int, seed: int) -> dict[str, Any]:
    """The summary over all questions; each is an image of its own."""
    accumulator = DetectionAccumulator(SCORE_THRESHOLD, MAX_DETECTIONS)
    images, annotations, objects = [], {}, count(1)
    for number in range(scenes):
        # Three numbers: pretraining draws its scenes from (seed, step).
        rng = np.random.default_rng((seed, number, 1))
        scene = draw_shapes(rng)
        height, width = scene.image.shape[:2]
        for boxed, others in questions(scene, rng):
            image_id = len(images) + 1
            accumulator.add_image(image_id, ask(forward, scene, boxed))
            images.append({"id": image_id, "file_name": "", "width": width, "height": height})
            rows = [{**to_annotation(scene.masks[g]), "category_id": 1} for g in others]
            # A crowd is ignored: finding the boxed object is neither right nor wrong.
            shown = {"category_id": 1, **to_annotation(scene.masks[boxed]), "iscrowd": 1}
            annotations[image_id] = [{**row, "id": next(objects)} for row in (*rows, shown)]
    split = CocoSplit(Path(), Path(), images, annotations, {1: VISUAL_PROMPT}, {})
    return accumulator.summary(split)


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--model_name", default="demo/sam3_tiny", help="base model")
    add("--scenes", type=parse_count, default=200, help="how many")
    add("--seed", type=int, default=0, help="of the scenes")
    return parser


@user_errors(ModelError)
def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    args = build_parser().parse_args(argv)
    forward = load_forward(args.model_name, "meta", "auto", "auto")
    summary = measure(forward, args.scenes, args.seed)
    lines = [f"questions {summary['counts']['images']}, objects {summary['counts']['objects']}"]
    for name, figures in (("boxes", summary["bbox"]), ("masks", summary["segm"])):
        lines.append(f"{name}  AP {figures['AP']:.3f}  AP50 {figures['AP50']:.3f}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
