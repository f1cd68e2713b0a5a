"""The Python API in one tour: a CPU, the small model in demo/, no download, half a minute.

    python example_usage.py

Writes: outputs/example/ with the adapter, its curves and an overlay.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import sam3_lora.startup  # noqa: F401  # isort: skip

import torch

from lora_layers import LoRAConfig, apply_lora, count_parameters
from sam3_lora import checkpoint, engine
from sam3_lora.coco import DatasetError, decode_mask, read_split
from sam3_lora.config import user_errors
from sam3_lora.dataset import PromptDataset
from sam3_lora.drawing import draw_curves, draw_overlay
from sam3_lora.evaluation import load_forward
from sam3_lora.files import write_picture
from sam3_lora.flags import FlagParser
from sam3_lora.forward import Forward
from sam3_lora.images import read_image
from sam3_lora.loader import build_loader, epoch_batches
from sam3_lora.losses import compute_losses, count_targets
from sam3_lora.model import ModelError, image_size, load_model, num_queries, train_adapted
from sam3_lora.prediction import Prompts, find
from sam3_lora.runlog import mean_record, progress_text
from sam3_lora.scenes import DEFECTS, demo_split, write_scenes

BASE = "demo/sam3_tiny"
LORA = LoRAConfig(rank=8, alpha=16, components=("vision_encoder", "detr_encoder", "detr_decoder"))
STEPS, BATCH_SIZE, PROMPTS, LEARNING_RATE = 42, 5, 4, 4e-3


def adapt_and_train(data: Path, output_dir: Path) -> Path:
    """A few steps of LoRA on a COCO split; returns the adapter's file."""
    # 1. The base model, frozen, and an adapter in its attention layers.
    engine.seed_everything(0)
    model, tokenizer = load_model(BASE)
    apply_lora(model, LORA)
    sys.stdout.write("trainable: {:,} of {:,} parameters\n".format(*count_parameters(model)))
    # 2. Images with their prompts, absent ones too.
    split = read_split(data)
    side, queries = image_size(model), num_queries(model)
    dataset = PromptDataset(
        split, side, queries, train=True, augment=False, prompts_per_image=PROMPTS
    )
    keys = [b for e in range(STEPS) for b in epoch_batches(len(dataset), BATCH_SIZE, e, 0, True)]
    # 3. The batch loop: a record of every loss after each step.
    train_adapted(model)
    records = engine.train_one_epoch(
        Forward(model, tokenizer, one_to_many=True),
        partial(compute_losses, mask_loss="native"),
        count_targets,
        build_loader(dataset, keys[:STEPS], num_workers=0),
        engine.build_optimizer(model, LEARNING_RATE, weight_decay=0.01),
        lambda step: engine.lr_factor("cosine", step, STEPS, warmup_steps=5),
        engine.Limits(BATCH_SIZE, BATCH_SIZE * PROMPTS),
    )
    log = []
    for record in records:
        log.append(mean_record([record], torch.device("cpu")))
        if record["step"] % 10 == 0:
            sys.stdout.write(f"step {record['step']}: {progress_text(log[-1])}\n")
    draw_curves(log, output_dir / "curves.png")
    # 4. An adapter file carries what re-creates it.
    path = output_dir / checkpoint.ADAPTER_FILE
    categories = {name: split.phrase(c) for c, name in split.categories.items()}
    description = {"base_model": BASE, "geometry_cls": "meta", "step": STEPS, "metrics": {}}
    checkpoint.save_adapter(path, model, LORA, categories=categories, **description)
    return path


def show(adapter: Path, data: Path, picture: Path) -> None:
    """Loads base and adapter, merged, and draws what they find on the split's first image."""
    content = checkpoint.read_adapter(adapter)
    forward = load_forward(BASE, content["geometry_cls"], "cpu", "no", adapter, content)
    split = read_split(data)
    photo, prompts = read_image(split.image_path(split.images[0])), list(DEFECTS)
    found, _ = find(forward, photo, Prompts(prompts, [], []), [0.5] * len(prompts), max_rows=8)
    rows = found["category_id"] - 1  # of the prompts
    labels = [f"{prompts[r]} {s:.2f}" for r, s in zip(rows, found["score"], strict=True)]
    masks = [decode_mask(rle, *photo.shape[:2]).astype(bool) for rle in found["rles"]]
    overlay = draw_overlay(photo, masks, found["boxes_xyxy"], labels, rows)
    write_picture(picture, overlay)
    sys.stdout.write(f"found: {', '.join(labels) or 'nothing'}\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to write").add_argument
    default = Path("outputs/example")
    add("--output_dir", type=Path, default=default, metavar="DIR", help="folder of all it writes")
    return parser


@user_errors(DatasetError, ModelError)
def main(argv: list[str] | None = None) -> int:
    """Data, training, inference."""
    output_dir = build_parser().parse_args(argv).output_dir
    data = write_scenes(
        output_dir / "data", "train", *demo_split("parts", "val", 0), overwrite=True
    )
    adapter = adapt_and_train(data, output_dir)
    show(adapter, data, output_dir / "overlay.png")
    sys.stdout.write(
        f"wrote {adapter}, {output_dir / 'curves.png'}, {output_dir / 'overlay.png'}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
