r"""How much faster is a step of a decoder-only adapter from cached features?

    python benchmarks/cache.py --device cpu
    python benchmarks/cache.py --device cuda --batch_size 8 --mask_loss native
    python benchmarks/cache.py --device cuda --batch_size 8 --prompts 1 --epochs 10

For each number of prompts an image: a step of the minimal strategy from the cache, the same without
it, and the library's with peft in a plain loop, on the same weights, images, prompts and loss, in
turns; then what some epochs take, the building of the cache included. One-to-many is off, as the
library has no such branch. On a CPU a step from the cache and one without have the same gradients,
bit for bit, or this script fails.

On a CPU the model is small (bench224, with the real one's shares of work), on a GPU of full size.
Prints a table in markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rivals import (
    MODELS,
    Library,
    adapt_ours,
    adapt_peft,
    build_model,
    choose_machine,
    library_step,
    machine,
    make_batch,
    ours_step,
    prompt_texts,
    ratio,
    strategy,
    table,
    take_turns,
    training_mode,
    wait_for,
)

from lora_layers import lora_state_dict
from sam3_lora import engine
from sam3_lora.config import user_errors
from sam3_lora.features import FeatureCache
from sam3_lora.flags import FlagParser
from sam3_lora.model import ModelError, image_size, train_adapted
from sam3_lora.prompts import parse_count

CACHED, PLAIN, LIBRARY = "cached", "not cached", "library"
LEARNING_RATE = 1e-4
NO_LIMIT = 1e6  # GB


@dataclass
class Photos:
    """Image files with one view each and the same prompts, as `FeatureCache` reads a data set."""

    files: list[Path]
    texts: list[str]
    views: int = 1
    box_prompt_probability: float = 0.0

    def __len__(self) -> int:
        return len(self.files)

    def pool(self, index: int) -> list[str]:
        """The prompts of an image."""
        return self.texts

    def placement(self, index: int, view: int) -> None:
        """Where an image lies on the canvas: there is one place."""

    def image_of(self, index: int) -> tuple[Path, None]:
        """An image's file, and no tile of it."""
        return self.files[index], None


def build_cache(forward: Any, batch: dict[str, Any], folder: Path) -> tuple[FeatureCache, float]:
    """A cache in RAM of a batch's images, and the seconds its features took."""
    files = [folder / f"{number}.png" for number in range(len(batch["images"]))]
    for file, image in zip(files, batch["images"], strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    texts = list(dict.fromkeys(batch["texts"]))
    cache = FeatureCache(forward, Photos(files, texts), None, NO_LIMIT)
    singles = [
        {"images": batch["images"][index : index + 1], "views": [(index, view)]}
        for index, view in cache.missing()
    ]
    wait_for(forward.device)
    started = time.perf_counter()
    for _ in cache.build(singles):
        pass
    wait_for(forward.device)
    return cache, time.perf_counter() - started


def gradients(step: Callable[[], Any], model: torch.nn.Module) -> list[torch.Tensor]:
    """The adapters' gradients in a step, which is then taken back."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    torch.manual_seed(0)  # of dropout and sampled points
    step()
    for parameter, value in zip(trained, before, strict=True):
        parameter.data.copy_(value)
    return [p.grad.clone() for p in trained]


def measure(args: argparse.Namespace, prompts: int, folder: Path) -> dict[str, Any]:
    """A row of the table."""
    config, lora = strategy("minimal")
    config = replace(config, training=replace(config.training, mask_loss=args.mask_loss))
    forward = adapt_ours(build_model(args.model, args.device), lora)
    model = forward.model
    forward.release_text_encoder(prompt_texts(prompts))
    train_adapted(model)
    rival = build_model(args.model, args.device)
    library = Library(adapt_peft(rival, lora, lora_state_dict(model)), forward.dtype)
    training_mode(rival, lora.components)
    trainable = [p for p in library.model.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.01)
    ours = engine.build_optimizer(model, LEARNING_RATE, 0.01)

    batch = make_batch(args.batch_size, prompts, image_size(model), args.objects)
    batch["views"] = [(index, 0) for index in range(args.batch_size)]
    cache, built = build_cache(forward, batch, folder)
    bare = {name: value for name, value in batch.items() if name != "images"}

    def from_cache() -> None:
        for filled in cache.filled([bare]):
            ours_step(forward, config, ours, filled)

    steps = {
        CACHED: from_cache,
        PLAIN: lambda: ours_step(forward, config, ours, batch),
        LIBRARY: lambda: library_step(library, config, theirs, batch),
    }
    if args.device.type == "cpu":
        pairs = zip(*(gradients(steps[name], model) for name in (CACHED, PLAIN)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), "other gradients"
    seconds = take_turns(steps, args.repeats, args.device)
    row = {"images": args.batch_size, "prompts": prompts, "mask loss": args.mask_loss}
    row |= {"kept": ", ".join(cache.parts), "MB an image": cache.bytes / args.batch_size / 1e6}
    row |= {f"{who}, s": statistics.median(times) for who, times in seconds.items()}
    row |= {f"{who} / cached": ratio(seconds[who], seconds[CACHED]) for who in (PLAIN, LIBRARY)}
    row["build, s an image"] = built / args.batch_size
    with_build = built + args.epochs * row["cached, s"]
    row[f"{args.epochs} epochs, library / cached"] = args.epochs * row["library, s"] / with_build
    return row


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    # fmt: off
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--model", choices=MODELS, help="size (default: full on a GPU, else bench224)")
    add("--batch_size", type=parse_count, default=4, help="images")
    add("--prompts", type=parse_count, nargs="+", default=[1, 4, 8], help="an image")
    add("--objects", type=parse_count, default=1, help="of each prompt")
    add("--mask_loss", choices=("full", "native", "points"), default="native",
        help="where masks are compared")
    add("--epochs", type=parse_count, default=10, help="in the last column")
    add("--repeats", type=parse_count, default=9, help="timed steps of each, after one")
    # fmt: on
    return parser


@user_errors(ModelError)
def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    args = build_parser().parse_args(argv)
    args.device, args.model = choose_machine(args.device, args.model)
    print(f"{args.model}, minimal strategy; {machine(args.device)}\n")
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(args, prompts, Path(folder)) for prompts in args.prompts]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
