"""The batch loop: one optimizer step over its micro-batches, and the pass over an evaluation set.

Training, validation loss and evaluation share `_chunk`: features are computed once per image and
text, then the heads run over at most so many rows at a time.

    encode(micro-batch) -> features --detach--> leaves -> heads(rows 0..r)  -> losses.backward()
                                             |-> heads(rows r..2r) -> losses.backward()
    features.backward(leaves.grad)    once, however many chunks the rows were cut into

Counts for the means are taken over the whole step first, so cutting changes memory, not the step:
where memory runs out, the same step is taken in smaller parts. In several processes the counts are
those of all, and the gradients are summed.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sam3_lora import processes

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

log = logging.getLogger(__name__)

# What a batch holds for each image (the last for pretraining the demo model); the rest is by row.
PER_IMAGE = ("images", "views", "image_ids", "original_sizes", "labels")
PER_IMAGE += ("trunk", "fpn_0", "fpn_1", "geometry")

# The warm-up takes at most this share of a run, so that a short one reaches its learning rate.
LONGEST_WARMUP = 0.1

Batch = dict[str, Any]
Losses = dict[str, torch.Tensor]
# forward.encode(batch) -> features; forward.predict(features, batch, rows) -> outputs
ForwardLike = Any
# criterion(outputs, targets, counts) -> named losses with the total under "loss"
Criterion = Callable[[dict[str, torch.Tensor], list, dict[str, int]], Losses]
# count(targets) -> what the criterion's means are taken over
Count = Callable[[list], dict[str, int]]


class LossError(ValueError):
    """A loss or gradient that is NaN or infinite; the message names step, images and terms."""


@dataclass
class Limits:
    """How much goes through the model at once; smaller ever after memory ran out.

    Args:
        images: most in one `encode`.
        rows: most in one `predict`.
    """

    images: int
    rows: int

    def halve(self, images: int, rows: int) -> bool:
        """Halves what was tried of so many images and rows; False where that was one of each."""
        images, rows = min(self.images, images), min(self.rows, rows)
        self.images = images // 2 if images > 1 else self.images
        self.rows = rows // 2 if rows > 1 else self.rows
        return images > 1 or rows > 1


class TooLargeError(torch.OutOfMemoryError):
    """What cannot be made smaller does not fit; the message says what to change."""


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch; data has its own seeds (see dataset.py)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients; none for biases and norms is decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = bool(trainable) and trainable[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=fused)


def lr_factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at one optimizer step.

    Args:
        schedule: `cosine` and `linear` fall to 0 at the end, `constant` stays, `inverse_sqrt` is
            Meta's: falls as 1/sqrt(step) and cools down linearly over the last `warmup_steps`.
        step: optimizer steps done, from 0.
        total_steps: of the run.
        warmup_steps: linear rise from 1/warmup_steps (`inverse_sqrt`: from 0, as Meta).

    Returns:
        0 to 1.
    """
    if schedule == "inverse_sqrt":
        scale = max(warmup_steps, 1)
        rise = min(1.0, step / scale)
        cool = min(1.0, (total_steps - step) / scale)
        return rise * cool / math.sqrt(max(step, scale) / scale)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return 1 - min(progress, 1.0) if schedule == "linear" else 1.0


@dataclass
class Plan:
    """How many steps a run has.

    Args:
        images: of the training set.
        images_per_step: over all processes; the last step of an epoch may have fewer.
        num_epochs: of the run, unless `max_steps` says how many steps.
        max_steps: the last epoch may be cut short; None: all of them.
        longest_warmup: steps of warm-up asked for.
    """

    images: int
    images_per_step: int
    num_epochs: int
    max_steps: int | None
    longest_warmup: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.images / self.images_per_step)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.max_steps or self.steps_per_epoch * self.num_epochs

    @property
    def epochs(self) -> int:
        """Epochs of the run, one that is cut short among them."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up: no more than LONGEST_WARMUP of the run."""
        return min(self.longest_warmup, int(LONGEST_WARMUP * self.total_steps))

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with this step."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps


def train_one_epoch(
    forward: ForwardLike,
    criterion: Criterion,
    count: Count,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    factor: Callable[[int], float],
    limits: Limits,
    *,
    step: int = 0,
    sizes: Iterable[int] = itertools.repeat(1),
    max_grad_norm: float = 0.1,
    scaler: torch.amp.GradScaler | None = None,
) -> Iterator[dict[str, Any]]:
    """Takes the optimizer steps of an epoch, yielding a record after each.

    Args:
        forward, criterion, count: see above; train or eval mode is the caller's.
        batches: micro-batches.
        optimizer, scaler: over the trainable parameters; the scaler is for fp16.
        factor: step -> share of the peak learning rate.
        limits: larger micro-batches are cut; halved, with a warning, where memory runs out.
        step: steps done before.
        sizes: micro-batches of each step; 0 where the other processes have them all.
        max_grad_norm: L2 norm gradients are clipped to; 0 leaves them.

    Yields:
        `step` (from 1), the terms, `grad_norm` unclipped, `lr`, `counts`, `images`, `seconds`.

    Raises:
        LossError: a loss or gradient is not finite; no parameter has moved.
        TooLargeError: one image and one row at a time do not fit either; likewise.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    iterator, started = iter(batches), time.perf_counter()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for size in sizes:
        micro_batches = list(itertools.islice(iterator, size))
        if size and not micro_batches:
            return
        _set_rate(optimizer, factor(step))
        counts = _count_all(count, micro_batches)
        totals = _gradients(forward, criterion, micro_batches, counts, limits, optimizer, scaler)
        totals = processes.sum_gradients(parameters, totals)
        totals["grad_norm"] = _clip(optimizer, scaler, max_grad_norm)
        step += 1
        record = _to_numbers(totals)
        _check_finite(record, step, micro_batches, scaler.is_enabled())
        scaler.step(optimizer)
        scaler.update()
        images = counts.pop("images")
        record |= {"step": step, "lr": optimizer.param_groups[0]["lr"], "counts": counts}
        yield record | {"images": images, "seconds": time.perf_counter() - started}
        started = time.perf_counter()  # what the caller did meanwhile is not the step's


def _set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Sets each group's learning rate to a share of its first one."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * share


def _clip(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float
) -> torch.Tensor:
    """Clips the L2 norm of the unscaled gradients, 0 leaves them; returns the norm before."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


def _within_memory(work: Callable[[], Any], limits: Limits, images: int, rows: int) -> Any:
    """What `work`, within the limits, makes of so many images and rows; where memory runs out it is
    done again, within smaller ones."""
    before = replace(limits)
    while True:
        try:
            result = work()
            break
        except torch.OutOfMemoryError as error:
            if not limits.halve(images, rows):
                raise TooLargeError(
                    "out of memory with one image and one row at a time; take --device cpu or, in "
                    "training, --gradient_checkpointing full, fewer components, or masks compared "
                    "at fewer pixels, --mask_loss native"
                ) from error
        # Not inside `except`: its traceback holds what the failed try had allocated.
        torch.cuda.empty_cache()
    if limits != before:
        flags = f"--max_rows_per_forward {limits.rows}"
        if limits.images != before.images:
            flags += f" --batch_size {limits.images}, with more --gradient_accumulation_steps"
        log.warning("out of memory: going on in smaller parts, to the same result; set %s", flags)
    return result


def _gradients(
    forward: ForwardLike,
    criterion: Criterion,
    micro_batches: list[Batch],
    counts: dict[str, int],
    limits: Limits,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Losses:
    """Sets a step's gradients, in parts that fit into memory; returns its losses, detached."""

    def work() -> Losses:
        optimizer.zero_grad(set_to_none=True)
        totals: Losses = {}
        for batch in micro_batches:
            for part in _split(batch, limits.images):
                _accumulate(totals, _backward(forward, criterion, part, counts, limits, scaler))
        return totals

    images = max((len(batch["image_ids"]) for batch in micro_batches), default=0)
    rows = max((len(batch["texts"]) for batch in micro_batches), default=0)
    return _within_memory(work, limits, images, rows)


def _split(batch: Batch, images: int) -> Iterator[Batch]:
    """Parts of a batch, of at most so many images each, with the rows of these."""
    count = len(batch["image_ids"])
    if count <= images:
        yield batch
        return
    for start in range(0, count, images):
        own = range(start, start + images)
        rows = [row for row, image in enumerate(batch["image_index"].tolist()) if image in own]
        part = {}
        for name, value in batch.items():
            if name in PER_IMAGE and value is not None:
                part[name] = value[start : start + images]
            elif torch.is_tensor(value):
                part[name] = value[rows]
            else:
                part[name] = value and [value[row] for row in rows]
        part["image_index"] = part["image_index"] - start
        yield part


def _backward(
    forward: ForwardLike,
    criterion: Criterion,
    batch: Batch,
    counts: dict[str, int],
    limits: Limits,
    scaler: torch.amp.GradScaler,
) -> Losses:
    """Adds one micro-batch's gradients; returns its share of the step's losses, detached."""
    features = forward.encode(batch)
    leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in features.items()}
    totals: Losses = {}
    for start in range(0, len(batch["texts"]), limits.rows):
        # Without the outputs, which would stay through the next forward.
        losses = _chunk(forward, criterion, leaves, batch, counts, limits, start)[-1]
        scaler.scale(losses["loss"]).backward()
        _accumulate(totals, losses)
    shared = [k for k, v in leaves.items() if v.grad is not None]
    if shared:
        torch.autograd.backward([features[k] for k in shared], [leaves[k].grad for k in shared])
    return totals


def _chunk(
    forward: ForwardLike,
    criterion: Criterion,
    features: dict[str, torch.Tensor],
    batch: Batch,
    counts: dict[str, int],
    limits: Limits,
    start: int,
) -> tuple[slice, dict[str, torch.Tensor], Losses]:
    """Rows, outputs and losses of as many rows of a batch, from `start`, as the limits allow."""
    rows = slice(start, start + limits.rows)
    outputs = forward.predict(features, batch, rows)
    return rows, outputs, criterion(outputs, batch["targets"][rows], counts)


@torch.no_grad()
def evaluate(
    forward: ForwardLike,
    criterion: Criterion,
    count: Count,
    batches: Iterable[Batch],
    max_rows: int = 32,
) -> Iterator[dict[str, Any]]:
    """Runs the model over an evaluation set.

    Args:
        forward, criterion, count, batches: as for `train_one_epoch`.
        max_rows: rows in one forward of the heads; halved, with a warning, where memory runs out.

    Yields:
        For every chunk of rows `batch`, `rows` (a slice of the batch's rows), `outputs`, `counts`
        of the batch, and `losses`, numbers whose sum over a batch's chunks is that batch's loss.
        The caller sets eval mode.

    Raises:
        TooLargeError: as `train_one_epoch`.
    """
    limits = Limits(1, max_rows)
    for batch in batches:
        features = _within_memory(partial(forward.encode, batch), limits, 1, 1)
        counts = count(batch["targets"])
        start, total = 0, len(batch["texts"])
        while start < total:
            work = partial(_chunk, forward, criterion, features, batch, counts, limits, start)
            rows, outputs, losses = _within_memory(work, limits, 1, total - start)
            yield {
                "batch": batch,
                "rows": rows,
                "outputs": outputs,
                "counts": counts,
                "losses": _to_numbers(losses),
            }
            start = rows.stop


def _accumulate(totals: Losses, losses: Losses) -> None:
    """Adds losses to totals, detached."""
    for name, value in losses.items():
        totals[name] = totals.get(name, 0.0) + value.detach()


def _count_all(count: Count, micro_batches: list[Batch]) -> dict[str, int]:
    """A step's counts, and its `images`, over the micro-batches of all processes."""
    counts = [count(batch["targets"]) for batch in micro_batches] or [count([])]
    own = {key: sum(c[key] for c in counts) for key in counts[0]}
    own["images"] = sum(len(batch["image_ids"]) for batch in micro_batches)
    everywhere = processes.gather(own)
    return {key: sum(c[key] for c in everywhere) for key in own}


def _to_numbers(values: Losses) -> dict[str, float]:
    """Tensors to floats in one copy: each copy of its own would wait for the device."""
    stacked = torch.stack([v.detach().float().reshape(()) for v in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def _check_finite(
    record: dict[str, float], step: int, micro_batches: list[Batch], scaled: bool
) -> None:
    """Stops on a loss or gradient that is not finite; under fp16 the scaler sees to gradients."""
    watched = ("loss",) if scaled else ("loss", "grad_norm")
    if all(math.isfinite(record[name]) for name in watched):
        return
    own = [image_id for batch in micro_batches for image_id in batch["image_ids"]]
    images = [image_id for ids in processes.gather(own) for image_id in ids]
    terms = ", ".join(f"{name} {value:.4g}" for name, value in record.items())
    raise LossError(
        f"expected finite losses, found at step {step}, image ids {images}: {terms}; lower "
        "--learning_rate, or check these images with `python prepare_data.py validate`"
    )


def environment(source: Path) -> str:
    """Commit of a source file's checkout and versions of what runs it, for the log's first line."""
    command = ["git", "-C", str(source.parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"  # not a clone
    library = importlib.metadata.version("transformers")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    return f"sam3-lora {commit}, {versions}, transformers {library}"


def memory_use(device: torch.device) -> tuple[float, float] | None:
    """Peak memory of this run and all there is, in GB (10^9 bytes): of the GPU, or of the process.

    Returns:
        (peak, total), or None where the system does not tell.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 1e9, total / 1e9
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB on Linux
    return peak / 1e9, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def mean_record(records: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """The log's line for some steps: means of the last layer's terms, speed, memory.

    Args:
        records: of `train_one_epoch`, one a step.
        device: where the model runs.

    Returns:
        `step` and `lr` of the last one, each term's mean, `train_iou` over steps with objects,
        `it_per_s`, `img_per_s`, and where the system tells `memory_gb`, `memory_percent`.
    """
    sums: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            # A step without objects has no IoU to average.
            skipped = name in ("seconds", "lr") or "_aux_" in name
            skipped = skipped or (name == "iou" and not record["counts"]["targets"])
            if isinstance(value, float) and not skipped:
                sums["train_iou" if name == "iou" else name].append(value)
    row = {"step": records[-1]["step"], "lr": records[-1]["lr"]}
    row |= {name: sum(values) / len(values) for name, values in sums.items()}
    seconds = sum(record["seconds"] for record in records)
    row["it_per_s"] = len(records) / seconds
    row["img_per_s"] = sum(record["images"] for record in records) / seconds
    if memory := memory_use(device):
        row["memory_gb"], row["memory_percent"] = memory[0], 100 * memory[0] / memory[1]
    return row


def progress_text(row: dict[str, Any]) -> str:
    """A line of the log for eyes."""
    text = f"loss {row['loss']:.3f}, lr {row['lr']:.2e}, {row['it_per_s']:.2f} it/s, "
    text += f"{row['img_per_s']:.1f} img/s"
    if "train_iou" in row:
        text += f", train IoU {row['train_iou']:.3f}"
    if "memory_gb" in row:
        text += f", {row['memory_gb']:.2f} GB ({row['memory_percent']:.0f} %)"
    return text
