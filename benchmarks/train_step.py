r"""How long does a training step take, beside Sam3Model + peft in a plain loop?

For each strategy of configs/ and each number of prompts an image: a step of ours, of the library
with all rows in one batch, and of the library a row at a time, on the same weights, data and loss
(see rivals.py), in turns. One-to-many is off, since the library has no such branch; what it costs
us stands in a column of its own.

    python benchmarks/train_step.py --device cpu
    python benchmarks/train_step.py --device cuda --batch_size 4
    python benchmarks/train_step.py --device cuda --strategy balanced --prompts 1 \
        --memory_caps 12 4

On a CPU the model is small (bench224, with the real one's shares of work), on a GPU of full size.
Prints tables in markdown: seconds, ratios and how far the losses are apart before the first step;
then, for a step, operations, values that the host waits for and, on a GPU, synchronisations and
peak memory. With --memory_caps, instead, the largest batch that trains in so much of a GPU's
memory.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    criterion_of,
    graphs,
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
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_layers import LoRAConfig, lora_state_dict
from sam3_lora import engine
from sam3_lora.config import Config, setup_logging, user_errors
from sam3_lora.flags import FlagParser
from sam3_lora.forward import Forward
from sam3_lora.losses import count_targets
from sam3_lora.model import ModelError, image_size, train_adapted
from sam3_lora.prompts import parse_count

log = logging.getLogger("train_step")

OURS, O2M, LIBRARY, ONE_BY_ONE = "ours", "ours, one-to-many on", "library", "one by one"
# The optimizers do their work and move nothing: every step of all is the same step.
RATE = 0.0
# Images a batch tried under a memory cap.
MOST_IMAGES = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Pair:
    """Ours and the library's model with the same weights, and their optimizers."""

    config: Config
    forward: Forward
    library: Library
    ours: torch.optim.Optimizer
    theirs: torch.optim.Optimizer


def build_ours(args: argparse.Namespace, lora: LoRAConfig) -> tuple[Forward, Any]:
    """Our model with adapters, in training mode, and its optimizer."""
    model = build_model(args.model, args.device)
    forward = adapt_ours(
        model,
        lora,
        args.geometry_cls,
        compiled=args.use_compile,
        checkpointing=args.gradient_checkpointing,
    )
    forward.release_text_encoder(prompt_texts(max(args.prompts)))
    train_adapted(model)
    return forward, engine.build_optimizer(model, RATE, 0.01)


def build_library(
    args: argparse.Namespace, lora: LoRAConfig, dtype: torch.dtype, adapters: Any
) -> tuple[Library, Any]:
    """The library's model with peft's adapters, in training mode, and an optimizer."""
    model = build_model(args.model, args.device).to(DTYPES[args.library_weights])
    adapted = adapt_peft(model, lora, adapters)
    training_mode(model, lora.components)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    library = Library(adapted, dtype, geometry_cls=args.geometry_cls)
    return library, torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.01)


def build_pair(args: argparse.Namespace, name: str) -> Pair:
    """Both models for a strategy."""
    config, lora = strategy(name)
    forward, ours = build_ours(args, lora)
    adapters = lora_state_dict(forward.model)
    library, theirs = build_library(args, lora, forward.dtype, adapters)
    return Pair(config, forward, library, ours, theirs)


@torch.no_grad()
def loss_gap(pair: Pair, batch: dict[str, Any]) -> float:
    """How far the two losses are apart, relative to the library's; without dropout."""
    modules = [*pair.forward.model.modules(), *pair.library.base.modules()]
    modes = [module.training for module in modules]
    pair.forward.model.eval()
    pair.library.base.eval()
    criterion, counts = criterion_of(pair.config), count_targets(batch["targets"])
    outputs = pair.forward(batch), pair.library.outputs(**pair.library.inputs(batch))
    ours, theirs = (criterion(o, batch["targets"], counts)["loss"].item() for o in outputs)
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    return abs(ours - theirs) / abs(theirs)


def contenders(pair: Pair, batch: dict[str, Any], **options: Any) -> dict[str, Callable[[], float]]:
    """A step of each, by name."""
    both = replace(pair.forward, one_to_many=True)
    theirs = pair.library, pair.config, pair.theirs, batch
    return {
        OURS: lambda: ours_step(pair.forward, pair.config, pair.ours, batch, **options),
        O2M: lambda: ours_step(both, pair.config, pair.ours, batch, **options),
        LIBRARY: lambda: library_step(*theirs, **options),
        ONE_BY_ONE: lambda: library_step(*theirs, rows_at_once=1, **options),
    }


class Operations(TorchDispatchMode):
    """Counts operations, and those whose result's value or shape the host has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.all = 0
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called in place of every operation."""
        self.all += 1
        if torch.Tag.data_dependent_output in func.tags or _shape_depends_on_values(func, args):
            self.waits[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _shape_depends_on_values(func: Any, args: Any) -> bool:
    """Whether an operation's result has as many elements as its input's values say."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func.overloadpacket is torch.ops.aten.index:  # only by a mask
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    return True


def count_operations(work: Callable[[], Any]) -> dict[str, Any]:
    """Operations of a step, those that wait for values, and by name which."""
    with Operations() as counter:
        work()
    named = ", ".join(f"{name} {number}" for name, number in counter.waits.most_common())
    waits = sum(counter.waits.values())
    return {"operations": counter.all, "value reads": waits, "which": named or "none"}


def count_syncs(work: Callable[[], Any]) -> int:
    """How often a step makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def peak_memory(work: Callable[[], Any], model: nn.Module, device: torch.device) -> float:
    """GB (10^9 bytes) that a step would take if its model were alone on the GPU."""
    work()  # the optimizer's state is there from now on
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    tensors = [*model.parameters(), *model.buffers()]
    own = sum(t.nbytes for t in tensors if t.device.type != "meta")  # a text encoder let go
    # Gradients and two moments of what is trained stay between steps.
    own += 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return (torch.cuda.max_memory_allocated(device) - before + own) / 1e9


def time_row(args: argparse.Namespace, name: str, pair: Pair, prompts: int) -> dict[str, Any]:
    """A row of the first table."""
    batch = make_batch(args.batch_size, prompts, image_size(pair.forward.model))
    gap = loss_gap(pair, batch)
    seconds = take_turns(contenders(pair, batch), args.repeats, args.device)
    row = {"strategy": name, "images": args.batch_size, "prompts": prompts}
    row |= {f"{who}, s": statistics.median(times) for who, times in seconds.items()}
    for rival in (LIBRARY, ONE_BY_ONE):
        row[f"{rival} / ours"] = ratio(seconds[rival], seconds[OURS])
    row["losses apart"] = f"{gap:.0e}"
    # With one-to-many the heads are a graph of their own, as for each other number of rows.
    return row | ({"graphs, breaks": graphs()} if args.use_compile else {})


def count_rows(
    args: argparse.Namespace, name: str, pair: Pair, prompts: int
) -> list[dict[str, Any]]:
    """Rows of the second table: a step of ours and of the library."""
    batch = make_batch(args.batch_size, prompts, image_size(pair.forward.model))
    counts = count_targets(batch["targets"])
    if args.device.type != "cuda":
        # On a CPU AdamW reads each parameter's step number, which on a GPU it does not.
        rates = (
            torch.optim.SGD(optimizer.param_groups[0]["params"], lr=RATE)
            for optimizer in (pair.ours, pair.theirs)
        )
        pair = replace(pair, **dict(zip(("ours", "theirs"), rates, strict=True)))
    # What the data loader's side knows is no wait for a GPU.
    steps = contenders(pair, batch, count=lambda targets: counts)
    rows = []
    for who, model in ((OURS, pair.forward.model), (LIBRARY, pair.library.base)):
        row = {"strategy": name, "images": args.batch_size, "prompts": prompts, "who": who}
        row |= count_operations(steps[who])
        if args.device.type == "cuda":
            row["syncs"] = count_syncs(steps[who])
            row["peak GB"] = peak_memory(steps[who], model, args.device)
        rows.append(row)
    return rows


def largest(fits: Callable[[int], bool], most: int = MOST_IMAGES) -> int:
    """The largest number up to `most` that fits, 0 if none does; what fits is fit by less too."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def trains(step: Callable[[dict], float], side: int, images: int, prompts: int) -> bool:
    """Whether two steps go through; the second holds the optimizer's state too."""
    batch = make_batch(images, prompts, side)
    try:
        step(batch)
        step(batch)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def cap_row(args: argparse.Namespace, name: str, prompts: int, cap: float) -> dict[str, Any]:
    """The largest batch of each with `cap` GB of the GPU's memory."""
    config, lora = strategy(name)
    row: dict[str, Any] = {"strategy": name, "prompts": prompts, "cap, GB": cap}
    total = torch.cuda.get_device_properties(args.device).total_memory
    for who in (OURS, LIBRARY):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, args.device)  # to build the model
        forward, optimizer = build_ours(args, lora)
        side, step = image_size(forward.model), ours_step
        if who == LIBRARY:
            dtype = forward.dtype
            del forward, optimizer
            forward, optimizer = build_library(args, lora, dtype, None)
            step = library_step
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(cap * 1e9 / total, 1.0), args.device)

        def fits(images: int, parts: Any = (step, forward, optimizer), side: int = side) -> bool:
            step, model, optimizer = parts
            return trains(
                lambda batch: step(model, config, optimizer, batch), side, images, prompts
            )

        row[f"{who}, images"] = largest(fits)
        del forward, optimizer, fits
    return row


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    # fmt: off
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--model", choices=MODELS, help="size (default: full on a GPU, else bench224)")
    add("--batch_size", type=parse_count, default=2, help="images")
    add("--prompts", type=parse_count, nargs="+", default=[1, 4, 8], help="an image")
    add("--repeats", type=parse_count, default=5, help="timed steps of each, after one")
    add("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="adapters")
    add("--geometry_cls", choices=("meta", "hf"), default="meta", help="of both")
    add("--library_weights", choices=DTYPES, default="fp32",
        help="in which the library holds its weights (default: fp32, as they are published)")
    add("--use_compile", action="store_true", help="ours through torch.compile")
    add("--gradient_checkpointing", choices=("off", "mlp", "full"), default="off",
        help="of ours; the library's model has none")
    add("--memory_caps", type=float, nargs="+", metavar="GB",
        help="GPU: only look for the largest batch in so much memory")
    # fmt: on
    return parser


@user_errors(ModelError)
def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    args = build_parser().parse_args(argv)
    setup_logging(None)
    args.device, args.model = choose_machine(args.device, args.model)
    sys.stdout.write(f"{args.model}, random weights; {machine(args.device)}\n\n")
    if args.memory_caps:
        if args.device.type != "cuda":
            raise ModelError("--memory_caps: expected a CUDA device, found none; leave it out")
        caps = [(cap, name, k) for cap in args.memory_caps for name in args.strategy
                for k in args.prompts]  # fmt: skip
        rows = [cap_row(args, name, prompts, cap) for cap, name, prompts in caps]
        sys.stdout.write(table(rows) + "\n")
        return 0
    times, counts = [], []
    for name in args.strategy:
        pair = build_pair(args, name)
        for prompts in args.prompts:
            log.info("%s, %d prompts an image", name, prompts)
            times.append(time_row(args, name, pair, prompts))
            counts += count_rows(args, name, pair, prompts)
    sys.stdout.write(f"{table(times)}\n\n{table(counts)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
