r"""Writes a tiny SAM 3: the same classes as facebook/sam3, small enough for a laptop and a test.

The folder holds config, safetensors, a toy tokenizer and a processor, and loads through the same
`from_pretrained` calls as the hub's model. Its weights are random, or pretrained with --steps on
drawn scenes of coloured shapes; demo/sam3_tiny/ was made so. It is not Meta's model and shares no
weight with it.

    python demo/make_sam3_tiny.py --output_dir outputs/sam3_tiny
    python demo/make_sam3_tiny.py --output_dir outputs/sam3_tiny --size tiny112 --hub_layout
    python demo/make_sam3_tiny.py --output_dir outputs/sam3_tiny --size demo112 --steps 8500 \
        --learning_rate 2e-3
    python demo/make_sam3_tiny.py --output_dir outputs/sam3_tiny_boxes --size demo112 \
        --init_from outputs/sam3_tiny --renew geometry_encoder --steps 2000 --box_share 0.5 --seed 1

Writes: OUTPUT_DIR/{config.json, model.safetensors, tokenizer.json, processor_config.json, ...}
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer, Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

# A script in a folder of its own: the package lies one level up.
sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

from pretraining import BOX_SHARE, pretrain  # noqa: E402

from lora_layers import COMPONENTS  # noqa: E402
from sam3_lora.config import setup_logging, user_errors  # noqa: E402
from sam3_lora.flags import FlagParser  # noqa: E402
from sam3_lora.forward import VISUAL_PROMPT  # noqa: E402
from sam3_lora.model import ModelError  # noqa: E402
from sam3_lora.scenes import WORDS  # noqa: E402

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
    # For benchmarks: as in SAM 3 itself, nineteen twentieths of the work are the image's.
    "bench224": {
        "image": 224, "window": 8, "vit": (256, 4, 1024, 8, [3, 7]),
        "width": 32, "encoder": 2, "decoder": 3, "queries": 32,
    },
}  # fmt: skip


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
    # No dropout: the weights are trained on endless scenes, and an adapter on these same weights.
    block = {
        "hidden_size": width, "num_attention_heads": 4, "intermediate_size": 2 * width,
        "dropout": 0.0,
    }  # fmt: skip
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
    average_boxes(model)
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


@torch.no_grad()
def average_boxes(model: Sam3Model) -> None:
    """Starts a box's token as the mean of the features under it; training from scratch needs it.

    The library's start is noise over 49 places, from which no box's content is learned.
    """
    pool = model.geometry_encoder.boxes_pool_project
    pool.weight.copy_(torch.eye(pool.out_channels)[..., None, None] / pool.weight[0, 0].numel())
    pool.bias.zero_()


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
    parser = FlagParser(__doc__)
    # fmt: off
    add = parser.add_argument_group("what to write").add_argument
    add("--output_dir", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--size", choices=sorted(SIZES), default="tiny224", help="of the model")
    add("--hub_layout", action="store_true", help="as facebook/sam3 is published")
    add("--seed", type=int, default=0, metavar="INT", help="of the random weights")
    add = parser.add_argument_group("pretraining").add_argument
    add("--steps", type=int, default=0, metavar="INT", help="how many; 0: random weights")
    add("--learning_rate", type=float, default=1e-3, metavar="FLOAT", help="peak learning rate")
    add("--init_from", type=Path, metavar="DIR", help="folder of a pretrained one to go on from")
    add("--renew", nargs="+", choices=COMPONENTS, default=(), metavar="NAME",
        help=f"components of --init_from that begin anew: {', '.join(COMPONENTS)}")
    add("--box_share", type=float, default=BOX_SHARE, metavar="0..1",
        help="of the prompts for a scene with objects, those with boxes")
    add("--device", default="auto", help="auto, cpu, mps or cuda")
    # fmt: on
    return parser


@user_errors(ModelError)
def main(argv: list[str] | None = None) -> int:
    """Writes the folder that the flags ask for."""
    args = build_parser().parse_args(argv)
    setup_logging(None, logging.INFO)
    make_tiny(args.output_dir, args.size, args.seed, args.hub_layout)
    if args.steps:
        pretrain(
            args.output_dir, args.init_from, args.steps, args.learning_rate, args.seed,
            args.device, args.box_share, args.renew,
        )  # fmt: skip
    sys.stdout.write(f"{args.output_dir}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
