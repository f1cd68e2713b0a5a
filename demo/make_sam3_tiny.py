r"""Writes a tiny SAM 3: the same classes as facebook/sam3, small enough for a laptop and a test.

The folder holds config, safetensors, a toy tokenizer and a processor, and loads through the same
`from_pretrained` calls as the hub's model. Its weights are random, or pretrained with --steps on
drawn scenes of coloured shapes; demo/sam3_tiny/ was made so. It is not Meta's model and shares no
weight with it.

    python demo/make_sam3_tiny.py --output_dir outputs/sam3_tiny
    python demo/make_sam3_tiny.py --output_dir outputs/sam3_tiny --size tiny112 --hub_layout
    python demo/make_sam3_tiny.py --output_dir outputs/sam3_tiny --size demo112 --steps 8500 \
        --learning_rate 2e-3

Writes: OUTPUT_DIR/{config.json, model.safetensors, tokenizer.json, processor_config.json, ...}
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer, Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

# A script in a folder of its own: the package lies one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam3_lora import engine  # noqa: E402
from sam3_lora.config import FlagParser, setup_logging, user_errors  # noqa: E402
from sam3_lora.dataset import OUT_OF_DOMAIN_WORDS, collate_fn, place_on_canvas  # noqa: E402
from sam3_lora.forward import PADDING_BOX, VISUAL_PROMPT, Forward  # noqa: E402
from sam3_lora.losses import compute_losses, count_targets  # noqa: E402
from sam3_lora.model import ModelError, choose_device, image_size, load_model  # noqa: E402
from sam3_lora.scenes import COLOURS, SHAPES, TEXTURES, draw_prompt, draw_shapes  # noqa: E402

log = logging.getLogger("make_sam3_tiny")

# Patch size of SAM 3's ViT, pixels; every image side here is a multiple of it.
PATCH = 14
# Prompt length of SAM 3's text encoder, tokens.
CONTEXT_LENGTH = 32

# image side (px), window (patches), ViT width / heads / MLP / layers / global layers,
# width of FPN and DETR, DETR encoder and decoder layers, queries.
SIZES: dict[str, dict[str, Any]] = {
    "tiny112": {
        "image": 112, "window": 4, "vit": (64, 2, 128, 4, [1, 3]),
        "width": 64, "encoder": 1, "decoder": 2, "queries": 16,
    },
    "tiny224": {
        "image": 224, "window": 8, "vit": (96, 3, 256, 4, [1, 3]),
        "width": 64, "encoder": 2, "decoder": 3, "queries": 32,
    },
    "demo112": {
        "image": 112, "window": 4, "vit": (128, 4, 384, 4, [1, 3]),
        "width": 64, "encoder": 2, "decoder": 3, "queries": 20,
    },
}  # fmt: skip


# What the demo model learns. The order is that of a kind's words.
WORDS = (TEXTURES, tuple(COLOURS), SHAPES)
# Pretraining: scenes a step and prompts a scene.
IMAGES, PROMPTS = 8, 3
# Weights for random weights: Meta's mask focal loss of 200 empties the masks before they form.
WEIGHTS = {
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_ce": 2.0,
    "presence_loss": 6.0,
    "loss_mask": 40.0,
    "loss_dice": 10.0,
    "loss_semantic_seg": 10.0,
    "loss_semantic_dice": 5.0,
}
DENSE_WEIGHT, POS_WEIGHT = 2.0, 2.0
WEIGHT_DECAY, MAX_GRAD_NORM, TEXT_RATE = 0.01, 10.0, 0.05
WARMUP_STEPS, LOG_STEPS, SAVE_STEPS = 200, 100, 500


def byte_alphabet() -> list[str]:
    """The 256 printable characters that byte-level BPE maps the bytes to, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(shifted)) for b in range(256)]


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over bytes, the words of `WORDS` merged: no download, any text.

    Returns:
        Tokenizer whose pad token is the end-of-text token, as in CLIP; up to 32 tokens a prompt.
    """
    letters = byte_alphabet()
    merges = word_merges([VISUAL_PROMPT, *(word for words in WORDS for word in words)])
    entries = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_LENGTH)


def word_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most important first, that leave each of the words one token."""
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            parts = _merge(parts, pair)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _merge(parts, merges[-1])
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins every neighbouring pair of that kind."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def tiny_config(size: str, tokenizer: CLIPTokenizer) -> Sam3Config:
    """The configuration of a tiny SAM 3.

    Args:
        size: a key of `SIZES`.
        tokenizer: gives the vocabulary size and the special tokens' ids.
    """
    s = SIZES[size]
    hidden, heads, mlp, layers, global_layers = s["vit"]
    grid = s["image"] // PATCH
    width = s["width"]
    block = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 2 * width}
    backbone = {
        "model_type": "sam3_vit_model", "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": s["image"],
        "patch_size": PATCH, "window_size": s["window"], "global_attn_indexes": global_layers,
        "pretrain_image_size": PATCH * s["window"],
    }  # fmt: skip
    text = {
        "model_type": "clip_text_model", "vocab_size": len(tokenizer), "hidden_size": 64,
        "intermediate_size": 128, "projection_dim": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": CONTEXT_LENGTH, "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return Sam3Config(
        vision_config={
            "model_type": "sam3_vision_model",
            "backbone_config": backbone,
            "fpn_hidden_size": width,
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
            "scale_factors": [4.0, 2.0, 1.0, 0.5],
        },
        text_config=text,
        geometry_encoder_config={**block, "num_layers": 1},
        detr_encoder_config={**block, "num_layers": s["encoder"]},
        detr_decoder_config={**block, "num_layers": s["decoder"], "num_queries": s["queries"]},
        mask_decoder_config={"hidden_size": width, "num_attention_heads": 4},
    )


def make_tiny(
    output_dir: Path, size: str = "tiny112", seed: int = 0, hub_layout: bool = False
) -> Path:
    """Writes a tiny SAM 3 with random weights, its tokenizer and its processor.

    Args:
        output_dir: folder to write into; files of the same names are replaced.
        size: a key of `SIZES`.
        seed: of the random weights.
        hub_layout: write as facebook/sam3 is published: the config of the video model, whose
            detector this is, and weight names that start with `detector_model.`.

    Returns:
        `output_dir`.
    """
    output_dir = Path(output_dir)
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = Sam3Model(tiny_config(size, tokenizer)).eval()
    spread_queries(model)
    spread_words(model)
    side = SIZES[size]["image"]
    mask_side = 4 * side // PATCH
    image_processor = Sam3ImageProcessor(
        size={"height": side, "width": side}, mask_size={"height": mask_side, "width": mask_side}
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    if hub_layout:
        _save_as_detector(model, output_dir)
    else:
        model.save_pretrained(output_dir)
    Sam3Processor(image_processor, tokenizer).save_pretrained(output_dir)
    return output_dir


@torch.no_grad()
def spread_queries(model: Sam3Model) -> None:
    """Starts the queries apart, on a grid of boxes; training from scratch needs it.

    The library's initialisation puts every query's box at the image's centre, with random moves.
    """
    decoder = model.detr_decoder
    count = decoder.reference_points.num_embeddings
    columns = math.ceil(math.sqrt(count))
    index = torch.arange(count)
    boxes = torch.full((count, 4), 2.0 / columns)  # (count, 4) cxcywh, neighbours overlap
    boxes[:, 0] = (index % columns + 0.5) / columns
    boxes[:, 1] = (index // columns + 0.5) / math.ceil(count / columns)
    decoder.reference_points.weight.copy_(torch.logit(boxes))
    decoder.query_embed.weight.normal_()
    decoder.box_head.layer3.weight.zero_()
    decoder.box_head.layer3.bias.zero_()


@torch.no_grad()
def spread_words(model: Sam3Model) -> None:
    """Starts the tokens apart; training from scratch needs it.

    At the library's small weights all words begin as nearly one vector, a tenth as long as the
    other features, and nothing in the loss parts them before an object is found.
    """
    embeddings = model.text_encoder.text_model.embeddings
    embeddings.token_embedding.weight.normal_()
    embeddings.position_embedding.weight.normal_(std=0.1)
    nn.init.orthogonal_(model.text_projection.weight)


class DenseHead(nn.Module):
    """Tells each pixel's texture, colour and shape from the vision features; dropped afterwards.

    It gives the vision tower something to learn long before any query finds an object.

    Args:
        width: C, channels of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [1 + len(words) for words in WORDS]
        self.levels = nn.ModuleList(nn.Conv2d(width, sum(self.sizes), 1) for _ in range(3))

    def forward(self, features: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, summed over levels and questions.

        Args:
            features: of `Forward.encode`.
            labels: (I,3,S,S) uint8, texture, colour and shape from 1, 0 for the background.
        """
        losses = []
        for index, level in enumerate(self.levels):
            parts = level(features[f"fpn_{index}"].float()).split(self.sizes, dim=1)
            goal = F.interpolate(labels, size=parts[0].shape[-2:], mode="nearest-exact")
            goal = goal.long().to(parts[0].device)
            losses += [F.cross_entropy(part, goal[:, i]) for i, part in enumerate(parts)]
        return torch.stack(losses).sum()


@dataclass
class DenseForward:
    """`Forward` with the dense head's loss beside the outputs; see engine.py for the protocol."""

    forward: Forward
    head: DenseHead

    def encode(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """As `Forward.encode`."""
        return self.forward.encode(batch)

    def predict(
        self, features: dict[str, torch.Tensor], batch: dict[str, Any], rows: slice
    ) -> dict[str, torch.Tensor]:
        """As `Forward.predict`, and `dense` where these are the batch's first rows."""
        outputs = self.forward.predict(features, batch, rows)
        if rows.start == 0:
            outputs["dense"] = self.head(features, batch["labels"])
        return outputs


def criterion(
    outputs: dict[str, torch.Tensor], targets: list, counts: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Meta's terms in their form for random weights, and the dense head's."""
    losses = compute_losses(
        outputs, targets, counts, pos_weight=POS_WEIGHT, mask_loss="native",
        weights=WEIGHTS, from_scratch=True,
    )  # fmt: skip
    if "dense" in outputs:
        losses["dense"] = outputs["dense"]
        losses["loss"] = losses["loss"] + DENSE_WEIGHT * math.sqrt(counts["rows"]) * losses["dense"]
    return losses


def scene_batches(seed: int, steps: int, side: int) -> Iterator[dict[str, Any]]:
    """Yields `steps` batches of random scenes with their prompts, as `dataset.collate_fn` does.

    Args:
        seed: of every choice.
        steps: batches; the vocabulary widens with the share of them that is done.
        side: S, of the model's canvas, pixels.
    """
    for step in range(steps):
        rng = np.random.default_rng((seed, step))
        items = [scene_item(rng, step / steps, side) for _ in range(IMAGES)]
        batch = collate_fn(items)
        batch["labels"] = torch.stack([item["labels"] for item in items])
        boxes = [box for item in items for box in item["boxes"]]
        most = max(1, *(len(row) for row in boxes))
        batch["box_prompts_cxcywh"] = torch.zeros(len(boxes), most, 4)
        batch["box_prompt_labels"] = torch.full((len(boxes), most), PADDING_BOX)
        for row, prompts in enumerate(boxes):
            for column, (box, label) in enumerate(prompts):
                batch["box_prompts_cxcywh"][row, column] = box
                batch["box_prompt_labels"][row, column] = label
        yield batch


def scene_item(rng: np.random.Generator, progress: float, side: int) -> dict[str, Any]:
    """A scene with its rows, as `dataset.PromptDataset` gives them, and what pretraining adds.

    Returns:
        also `labels` (3,S,S) for the dense head, and `boxes`, for each row a list of (box (4,)
        cxcywh, label 1 or 0).
    """
    scene = draw_shapes(rng)
    masks = place_on_canvas(torch.from_numpy(scene.masks).byte() * 255, side) > 127  # (G,S,S)
    boxes = boxes_of(masks)
    rows = [draw_prompt(rng, scene.kinds, progress, OUT_OF_DOMAIN_WORDS) for _ in range(PROMPTS)]
    labels = torch.zeros(len(WORDS), side, side, dtype=torch.uint8)
    for mask, kind in zip(masks, scene.kinds, strict=True):
        answers = [1 + words.index(word) for words, word in zip(WORDS, kind, strict=True)]
        labels[:, mask] = torch.tensor(answers, dtype=torch.uint8)[:, None]
    wanted = [torch.tensor(row["objects"], dtype=torch.long) for row in rows]
    return {
        "image": place_on_canvas(torch.from_numpy(scene.image).permute(2, 0, 1), side),
        "image_id": 0,
        "original_size": scene.image.shape[:2],
        "texts": [row["text"] or VISUAL_PROMPT for row in rows],
        "category_ids": [0] * len(rows),
        "targets": [
            {
                "boxes_cxcywh": boxes[index],
                "masks": masks[index],
                "has_mask": torch.ones(len(index), dtype=torch.bool),
            }
            for index in wanted
        ],
        "labels": labels,
        "boxes": [[(boxes[g], label) for g, label in row["boxes"]] for row in rows],
    }


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """Boxes (G,4) cxcywh in 0 to 1 of masks (G,S,S) bool, none empty."""
    side = masks.shape[-1]
    ends = []
    for axis in (-2, -1):  # columns, then rows
        line = masks.any(axis).float()  # (G,S)
        ends.append((line.argmax(1) / side, 1 - line.flip(1).argmax(1) / side))
    (left, right), (top, bottom) = ends
    return torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=1)


def pretrain(
    folder: Path, start: Path, steps: int, learning_rate: float, seed: int, device: str
) -> None:
    """Trains every weight of a model on endless scenes.

    Args:
        folder: where the weights go, every `SAVE_STEPS` too; as written by `make_tiny`, in the
            detector's layout.
        start: folder of the weights to start from, the same or one of the same size.
        steps: optimizer steps; warm-up, then cosine.
        learning_rate: peak, of AdamW.
        seed: of the scenes.
        device: where to train.
    """
    model, tokenizer = load_model(str(start))
    model.to(choose_device(device))
    head = DenseHead(model.config.detr_decoder_config.hidden_size).to(model.device)
    records = engine.train_one_epoch(
        DenseForward(Forward(model, tokenizer, one_to_many=True), head),
        criterion,
        count_targets,
        scene_batches(seed, steps, image_size(model)),
        # Without dropout, as loaded: endless scenes cannot be learned by heart.
        build_optimizer(model, head, learning_rate),
        lambda step: engine.lr_factor("cosine", step, steps, WARMUP_STEPS),
        max_grad_norm=MAX_GRAD_NORM,
        max_rows=IMAGES * PROMPTS,
    )
    recent: deque = deque(maxlen=LOG_STEPS)
    for record in records:
        recent.append(record)
        if record["step"] % LOG_STEPS == 0:
            row = engine.mean_record(list(recent), model.device)
            log.info("step %d: %s, dense %.3f", row["step"], _terms(row), row["dense"])
        if record["step"] % SAVE_STEPS == 0:
            model.save_pretrained(folder)
    model.save_pretrained(folder)


def build_optimizer(model: Sam3Model, head: DenseHead, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over every weight, the text encoder's at a smaller rate.

    At the same rate it learns first to tell words from unknown ones, and makes all words one.
    """
    model.requires_grad_(True)
    text = nn.ModuleList([model.text_encoder, model.text_projection]).requires_grad_(False)
    optimizer = engine.build_optimizer(nn.ModuleList([model, head]), learning_rate, WEIGHT_DECAY)
    parameters = list(text.requires_grad_(True).parameters())
    rate = TEXT_RATE * learning_rate
    optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": WEIGHT_DECAY})
    return optimizer


def _terms(row: dict[str, Any]) -> str:
    """The log's terms for eyes."""
    names = ("loss", "train_iou", "loss_giou", "loss_ce", "presence_loss", "loss_dice", "it_per_s")
    return ", ".join(f"{name} {row[name]:.3f}" for name in names if name in row)


def _save_as_detector(model: Sam3Model, output_dir: Path) -> None:
    """Saves under the video model's config and weight names, as the hub's repository does."""
    config = {
        "architectures": ["Sam3VideoModel"],
        "model_type": "sam3_video",
        "detector_config": model.config.to_dict(),
    }
    (output_dir / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = {f"detector_model.{name}": tensor for name, tensor in model.state_dict().items()}
    # A weight of the tracker stands in the hub's file too; the detector must ignore it.
    weights["tracker_model.no_memory_embedding"] = torch.zeros(1, 1, 8)
    save_file(weights, output_dir / "model.safetensors", metadata={"format": "pt"})


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny224", help="default: tiny224")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument("--hub_layout", action="store_true", help="as facebook/sam3 is published")
    parser.add_argument("--init_from", type=Path, help="folder whose weights to start from")
    parser.add_argument("--steps", type=int, default=0, help="of pretraining (default: 0)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="default: 1e-3")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda (default: auto)")
    return parser


@user_errors(ModelError)
def main(argv: list[str] | None = None) -> int:
    """Writes the folder that the flags ask for."""
    args = build_parser().parse_args(argv)
    setup_logging(None, logging.INFO)
    make_tiny(args.output_dir, args.size, args.seed, args.hub_layout)
    if args.steps:
        start = args.init_from or args.output_dir
        pretrain(args.output_dir, start, args.steps, args.learning_rate, args.seed, args.device)
    sys.stdout.write(f"{args.output_dir}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
