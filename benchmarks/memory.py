r"""How near is the predicted peak memory of a training step to the measured one?

For each strategy of configs/ and each kind of checkpointing: `memory.predict` beside a real step's
peak, with the one-to-many branch as training has it.

    python benchmarks/memory.py --device cpu
    python benchmarks/memory.py --device cuda --batch_size 1 4 --prompts 1 8

On a CPU the model is small (bench224) and the measure is `memory.Tracker` over the real step; on a
GPU it is of full size with random weights and the measure is what CUDA's allocator had given out at
most. `reserved` is what it had taken from the GPU for that. Prints a table in markdown, in MB.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from rivals import (
    MODELS,
    STRATEGIES,
    adapt_ours,
    build_model,
    choose_machine,
    machine,
    make_batch,
    ours_step,
    prompt_texts,
    strategy,
    table,
)

from sam3_lora import engine, memory
from sam3_lora.config import setup_logging, user_errors
from sam3_lora.flags import FlagParser
from sam3_lora.forward import Forward
from sam3_lora.model import ModelError, image_size, train_adapted
from sam3_lora.prompts import parse_count

# Objects of a row: a group of masks is full with these, as in `memory.predict`.
OBJECTS = memory.MASKS_AT_ONCE


def build(args: argparse.Namespace, name: str, checkpointing: str) -> tuple[Any, ...]:
    """Configuration, forward in training mode and optimizer of a strategy."""
    config, lora = strategy(name)
    forward = adapt_ours(build_model(args.model, args.device), lora)
    train_adapted(forward.model)
    optimizer = engine.build_optimizer(forward.model, config.training.learning_rate, 0.0)
    return config, replace(forward, one_to_many=True, checkpointing=checkpointing), optimizer


def measured(args: argparse.Namespace, parts: tuple[Any, ...], batch: dict) -> dict[str, int]:
    """Peak bytes of a second step, when the optimizer's state is there."""
    config, forward, optimizer = parts
    ours_step(forward, config, optimizer, batch)
    optimizer.zero_grad()
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ours_step(forward, config, optimizer, batch)
        reserved = torch.cuda.max_memory_reserved()
        return {"measured": torch.cuda.max_memory_allocated(), "reserved": reserved}
    states = [t for state in optimizer.state.values() for t in state.values()]
    with memory.Tracker() as tracker:
        for tensor in [*forward.model.parameters(), *forward.model.buffers(), *states]:
            if not tensor.is_meta:
                tracker.add(tensor)
        ours_step(forward, config, optimizer, batch)
    return {"measured": tracker.peak}


def rows_of(args: argparse.Namespace, name: str, checkpointing: str) -> list[dict[str, Any]]:
    """A row for each number of images and prompts."""
    rows = []
    config, forward, optimizer = build(args, name, checkpointing)
    forward.release_text_encoder(prompt_texts(max(args.prompts)))
    if args.device.type == "cpu":  # or frozen parts would run image by image
        forward._groups = lambda tensor, component: (tensor,)
    for prompts in args.prompts:
        for images in args.batch_size:
            started = time.perf_counter()
            predicted = predict(forward, images, prompts, config.hardware.max_rows_per_forward)
            seconds = time.perf_counter() - started
            batch = make_batch(images, prompts, image_size(forward.model), OBJECTS)
            peaks = measured(args, (config, forward, optimizer), batch)
            rows.append(
                {"strategy": name, "checkpointing": checkpointing, "K": prompts, "images": images}
                | {"predicted": f"{predicted / 1e6:.1f}"}
                | {key: f"{value / 1e6:.1f}" for key, value in peaks.items()}
                | {"difference": f"{predicted / peaks['measured'] - 1:+.1%}"}
                | {"seconds to predict": seconds}
            )
    return rows


def predict(forward: Forward, images: int, prompts: int, max_rows: int) -> int:
    """The predicted peak, bytes."""
    sizes = {"images": images, "prompts": prompts, "max_rows": max_rows}
    return memory.predict(forward, objects=OBJECTS, **sizes)["peak"]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--model", choices=MODELS, help="size (default: full on a GPU, else bench224)")
    add("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="adapters")
    modes = memory.CHECKPOINTING
    add("--checkpointing", nargs="+", choices=modes, default=list(modes), help="modes")
    add("--batch_size", nargs="+", type=parse_count, default=[1, 4], help="images")
    add("--prompts", nargs="+", type=parse_count, default=[1, 8], help="an image")
    return parser


@user_errors(ModelError)
def main(argv: list[str] | None = None) -> int:
    """Prints the table and the machine."""
    args = build_parser().parse_args(argv)
    setup_logging(None, logging.WARNING)
    args.device, args.model = choose_machine(args.device, args.model)
    rows = []
    for name in args.strategy:
        for checkpointing in args.checkpointing:
            rows += rows_of(args, name, checkpointing)
            gc.collect()
    sys.stdout.write(f"{args.model}: {machine(args.device)}\n\n{table(rows)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
