r"""How long does it take to find N concepts in a photo, beside the library's model in a loop?

    python benchmarks/inference.py --device cpu
    python benchmarks/inference.py --device cuda --prompts 1 16 64

All start from the photo on the model's canvas and end with the masks, as COCO RLE at the photo's
size, of what scores above a threshold, which is set so that three objects a prompt do:
    ours          the photo once, heads in batches, masks of what is found alone; texts are known,
                  as they are from the second photo on
    prompt by prompt   ours, the photo once, heads and masks for one prompt after another
    library       Sam3Model whole for each prompt, then its own post-processing; peft's adapter is
                  merged, which spares it the most work
On a CPU the model is small (bench224, with the real one's shares of work), on a GPU of full size.

Prints tables in markdown: seconds and ratios by number of prompts; one prompt on the base, with
the adapter merged and beside the weights; loading an adapter and changing to another.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rivals import (
    MODELS,
    STRATEGIES,
    Library,
    adapt_ours,
    adapt_peft,
    build_model,
    choose_machine,
    machine,
    make_batch,
    ratio,
    strategy,
    table,
    take_rows,
    take_turns,
)
from transformers import Sam3ImageProcessor

from lora_layers import (
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from sam3_lora import checkpoint
from sam3_lora.coco import encode_mask, mask_iou
from sam3_lora.config import user_errors
from sam3_lora.evaluation import detect
from sam3_lora.flags import FlagParser
from sam3_lora.forward import Forward
from sam3_lora.model import ModelError, cast_towers, image_size
from sam3_lora.prompts import parse_count

OBJECTS = 3  # a prompt
MASK_THRESHOLD = 0.5
Found = list[tuple[float, dict[str, Any]]]  # score and mask of a detection


@torch.no_grad()
def find_ours(
    forward: Forward, batch: dict, size: tuple[int, int], threshold: float, max_rows: int
) -> Found:
    """What ours finds in a batch of one image (see `inference.py` of the project)."""
    features, found = forward.encode(batch), []
    for start in range(0, len(batch["texts"]), max_rows):
        ids = batch["category_ids"][start : start + max_rows]
        outputs = forward.predict(features, batch, slice(start, start + max_rows))
        part = detect(outputs, list(range(len(ids))), ids, size, 0, threshold, threshold)
        found += zip(part["score"].tolist(), part["rles"], strict=True)
    return found


@torch.no_grad()
def find_library(library: Library, batch: dict, size: tuple[int, int], threshold: float) -> Found:
    """What the library's model finds, prompt by prompt."""
    post_process = Sam3ImageProcessor().post_process_instance_segmentation
    found = []
    for row in range(len(batch["texts"])):
        outputs = library(**library.inputs(take_rows(batch, slice(row, row + 1))))
        result = post_process(outputs, threshold, MASK_THRESHOLD, [size])[0]
        masks = result["masks"].bool().cpu().numpy()
        found += zip(result["scores"].tolist(), map(encode_mask, masks), strict=True)
    return found


@torch.no_grad()
def choose_threshold(forward: Forward, batch: dict[str, Any]) -> float:
    """A score that `OBJECTS` queries a prompt reach, on average."""
    outputs = forward(batch)
    scores = outputs["logits"][-1].sigmoid() * outputs["presence"][-1].sigmoid()[:, None]
    number = OBJECTS * len(batch["texts"])
    return float(scores.flatten().topk(number + 1).values[-2:].mean())


def prompt_row(
    args: argparse.Namespace, forward: Forward, library: Library, prompts: int, max_rows: int
) -> dict[str, Any]:
    """A row of the first table."""
    batch, size = make_batch(1, prompts, image_size(forward.model)), args.photo_size
    threshold = choose_threshold(forward, batch)
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: find_ours(forward, batch, size, threshold, max_rows),
        "prompt by prompt": lambda: find_ours(forward, batch, size, threshold, 1),
        "library": lambda: find_library(library, batch, size, threshold),
    }
    found = {name: sorted(work(), key=lambda d: -d[0]) for name, work in contenders.items()}
    images = batch["images"].to(args.device)
    contenders["image alone"] = torch.no_grad()(lambda: forward.encode_trunk(images))
    contenders["texts, first time"] = lambda: forward.remember_texts(batch["texts"])
    before = {"texts, first time": forward.texts.clear}
    seconds = take_turns(contenders, args.repeats, args.device, before=before)
    row: dict[str, Any] = {"prompts": prompts}
    row |= {f"{name}, s": statistics.median(times) for name, times in seconds.items()}
    for name in ("prompt by prompt", "library"):
        row[f"{name} / ours"] = ratio(seconds[name], seconds["ours"])
    row["found: ours, library"] = f"{len(found['ours'])}, {len(found['library'])}"
    if forward.dtype == torch.float32:  # below, near scores change places
        pairs = list(zip(found["ours"], found["library"], strict=True))
        row["scores apart"] = f"{max(abs(a[0] - b[0]) for a, b in pairs):.0e}"
        row["least mask IoU"] = min(float(mask_iou([a[1]], [b[1]])[0, 0]) for a, b in pairs)
    return row


def adapter_rows(
    args: argparse.Namespace, base: Forward, forward: Forward, library: Library, max_rows: int
) -> list[dict[str, Any]]:
    """The second table: one prompt on the base, and with the adapter merged or beside it."""
    batch, size = make_batch(1, 1, image_size(forward.model)), args.photo_size
    threshold = choose_threshold(forward, batch)
    ours = partial(find_ours, batch=batch, size=size, threshold=threshold, max_rows=max_rows)
    theirs = partial(find_library, library, batch, size, threshold)
    contenders = {
        "ours, base": lambda: ours(base),
        "ours, merged": lambda: ours(forward),
        "ours, beside": lambda: ours(forward),
        "library, merged": theirs,
        "library, beside": theirs,
    }
    before = {
        "ours, merged": lambda: merge_lora(forward.model),
        "ours, beside": lambda: unmerge_lora(forward.model),
        "library, merged": library.model.merge_adapter,
        "library, beside": library.model.unmerge_adapter,
    }
    # A few per cent are looked for here.
    seconds = take_turns(contenders, 3 * args.repeats, args.device, before=before)
    return [
        {
            "one prompt": name,
            "s": statistics.median(times),
            "/ ours, base": ratio(times, seconds["ours, base"]),
        }
        for name, times in seconds.items()
    ]


def loading_rows(
    args: argparse.Namespace, forward: Forward, base: Forward, lora: Any, folder: Path
) -> list[dict[str, Any]]:
    """The third table: an adapter's file to a model that is ready."""
    path, model, adapted = folder / "lora_weights.pt", base.model, forward.model
    unmerge_lora(adapted)
    checkpoint.save_adapter(path, adapted, lora, base_model=args.model)
    state = lora_state_dict(adapted)

    def load_and_merge() -> None:
        checkpoint.load_adapter(path, model)
        merge_lora(model)

    contenders: dict[str, Callable[[], Any]] = {
        "base to merged, from the file": load_and_merge,
        "another adapter, from the file": lambda: load_lora_state_dict(
            adapted, checkpoint.read_adapter(path)["lora"]
        ),
        "another adapter, from memory": lambda: load_lora_state_dict(adapted, state),
    }
    before = {"base to merged, from the file": lambda: remove_lora(model)}
    seconds = take_turns(contenders, args.repeats, args.device, before=before)
    remove_lora(model)
    megabytes = path.stat().st_size / 1e6
    return [
        {"adapter": name, "file, MB": megabytes, "ms": 1e3 * statistics.median(times)}
        for name, times in seconds.items()
    ]


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    # fmt: off
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--model", choices=MODELS, help="size (default: full on a GPU, else bench224)")
    add("--prompts", type=parse_count, nargs="+", default=[1, 8, 16], help="an image")
    add("--repeats", type=parse_count, default=7,
        help="timed runs of each, after one; thrice that of adapters")
    add("--strategy", choices=STRATEGIES, default="balanced", help="adapter")
    add("--geometry_cls", choices=("meta", "hf"), default="meta", help="of both")
    add("--photo_size", type=parse_count, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="pixels of the masks (default: the model's own)")
    # fmt: on
    return parser


@user_errors(ModelError)
def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    args = build_parser().parse_args(argv)
    args.device, args.model = choose_machine(args.device, args.model)
    config, lora = strategy(args.strategy)
    max_rows = config.hardware.max_rows_per_forward
    # 1. The base, ours and the library's, with the same weights.
    model = build_model(args.model, args.device)
    forward = adapt_ours(model, lora, args.geometry_cls)
    adapted = adapt_peft(build_model(args.model, args.device), lora, lora_state_dict(model))
    library = Library(adapted.eval(), forward.dtype, geometry_cls=args.geometry_cls)
    model.requires_grad_(False)
    plain = build_model(args.model, args.device)
    cast_towers(plain, forward.dtype)
    base = Forward(plain, forward.tokenizer, args.geometry_cls, forward.dtype)
    args.photo_size = tuple(args.photo_size or [image_size(model)] * 2)
    # 2. As the scripts run an adapter: merged in fp32, beside the weights below.
    if forward.dtype == torch.float32:
        merge_lora(model)
    adapted.merge_adapter()
    rows = [prompt_row(args, forward, library, n, max_rows) for n in args.prompts]
    # 3. What an adapter costs.
    second = adapter_rows(args, base, forward, library, max_rows)
    with tempfile.TemporaryDirectory() as folder:
        third = loading_rows(args, forward, base, lora, Path(folder))
    sys.stdout.write(
        f"{args.model}, random weights, {args.strategy}, photo {args.photo_size[0]} x "
        f"{args.photo_size[1]}; {machine(args.device)}\n\n"
        f"{table(rows)}\n\n{table(second)}\n\n{table(third)}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
