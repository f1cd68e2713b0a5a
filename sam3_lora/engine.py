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

import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sam3_lora import processes

log = logging.getLogger(__name__)

# What a batch holds for each image (the last for pretraining the demo model); the rest is by row.
PER_IMAGE = ("images", "views", "image_ids", "original_sizes", "labels")
PER_IMAGE += ("trunk", "fpn_0", "fpn_1", "geometry")

# So many steps in a row may be left out. 16 halvings take a gradient scaler from its first scale,
# 2^16, to none; gradients that still overflow after nearly as many again will not come right.
MOST_SKIPPED_IN_A_ROW = 30

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


@dataclass
class Skips:
    """Optimizer steps left out of a run, as a loss or gradient was not finite.

    Args:
        allowed: whether such a step is left out, not the end; what overflows in fp16 always is.
        in_a_row: since the last step that was taken.
        total: of the run.
    """

    allowed: bool = False
    in_a_row: int = 0
    total: int = 0


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
    skips: Skips | None = None,
) -> Iterator[dict[str, Any]]:
    """Takes the optimizer steps of an epoch, yielding a record after each.

    Args:
        forward, criterion, count, batches: see above; train or eval mode is the caller's.
        optimizer, scaler: over the trainable parameters; the scaler is for fp16.
        factor: step -> share of the peak learning rate.
        limits: larger micro-batches are cut; halved, with a warning, where memory runs out.
        step, sizes: steps done before; micro-batches of each, 0 where other processes have all.
        max_grad_norm: L2 norm gradients are clipped to; 0 leaves them.
        skips: whether steps that are not finite are left out, and their count; None: they are not.

    Yields:
        `step` (from 1), the terms, `grad_norm` unclipped, `lr`, `counts`, `images`, `seconds`; of
        a step left out `skipped`, 1, for the terms and `grad_norm`.

    Raises:
        LossError: a loss or gradient is not finite, or more than MOST_SKIPPED_IN_A_ROW steps were
            left out in a row; no parameter has moved.
        TooLargeError: one image and one row at a time do not fit either; likewise.
    """
    scaler, skips = scaler or torch.amp.GradScaler(enabled=False), skips or Skips()
    iterator, started = iter(batches), time.perf_counter()
    for size in sizes:
        micro_batches = list(itertools.islice(iterator, size))
        if size and not micro_batches:
            return
        _set_rate(optimizer, factor(step))
        counts = _count_all(count, micro_batches)
        totals = _gradients(forward, criterion, micro_batches, counts, limits, optimizer, scaler)
        totals["grad_norm"] = _clip(optimizer, scaler, max_grad_norm)
        step += 1
        record = _take_step(_to_numbers(totals), step, micro_batches, optimizer, scaler, skips)
        record |= {"step": step, "lr": optimizer.param_groups[0]["lr"], "counts": counts}
        yield record | {"images": counts.pop("images"), "seconds": time.perf_counter() - started}
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
    """Sets a step's gradients, in parts that fit into memory, summed over all processes; returns
    its losses, detached."""

    def work() -> Losses:
        optimizer.zero_grad(set_to_none=True)
        totals: Losses = {}
        for batch in micro_batches:
            for part in _split(batch, limits.images):
                _accumulate(totals, _backward(forward, criterion, part, counts, limits, scaler))
        return totals

    images = max((len(batch["image_ids"]) for batch in micro_batches), default=0)
    rows = max((len(batch["texts"]) for batch in micro_batches), default=0)
    totals = _within_memory(work, limits, images, rows)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return processes.sum_gradients(parameters, totals)


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
        LossError: a loss is not finite.
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
            losses = _to_numbers(losses)
            if _not_finite(losses):
                raise LossError(
                    "expected finite losses, found in evaluation, "
                    f"{_terms(batch['image_ids'], losses)}; try --mixed_precision no, or an "
                    "adapter trained at a lower --learning_rate"
                )
            yield {
                "batch": batch,
                "rows": rows,
                "outputs": outputs,
                "counts": counts,
                "losses": losses,
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
    return processes.total(own)


def _to_numbers(values: Losses) -> dict[str, float]:
    """Tensors to floats in one copy: each copy of its own would wait for the device."""
    stacked = torch.stack([v.detach().float().reshape(()) for v in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def _not_finite(losses: dict[str, float]) -> list[str]:
    """Names of the losses that are NaN or infinite."""
    return [name for name, value in losses.items() if not math.isfinite(value)]


def _terms(images: list, losses: dict[str, float]) -> str:
    """Image ids and their losses, for a message."""
    return f"image ids {images}: " + ", ".join(f"{k} {value:.4g}" for k, value in losses.items())


def _take_step(
    record: dict[str, float],
    step: int,
    micro_batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    skips: Skips,
) -> dict[str, float]:
    """Moves the parameters and returns the record, if it is finite; else leaves the step out, with
    a record that says so, or raises LossError."""
    wrong = _not_finite(record)
    if not wrong:
        scaler.step(optimizer)
        scaler.update()
        skips.in_a_row = 0
        return record
    overflow = scaler.is_enabled() and wrong == ["grad_norm"]
    skips.in_a_row, skips.total = skips.in_a_row + 1, skips.total + 1
    own = [image_id for batch in micro_batches for image_id in batch["image_ids"]]
    images = [image_id for ids in processes.gather(own) for image_id in ids]
    found = f"step {step}, {_terms(images, record)}"
    remedy = "--mixed_precision bf16, or " if scaler.is_enabled() else ""
    remedy += "lower --learning_rate, or check these images with `python prepare_data.py validate`"
    if skips.in_a_row > MOST_SKIPPED_IN_A_ROW:
        times = f"{skips.in_a_row} in a row that are not, the last at"
        raise LossError(f"expected finite losses and gradients, found {times} {found}; {remedy}")
    if not (overflow or skips.allowed):
        remedy += "; --non_finite skip leaves such steps out"
        raise LossError(f"expected finite losses, found at {found}; {remedy}")
    # A scale that overflows is halved; a loss that is not finite says nothing of the scale.
    scaler.update(None if overflow else scaler.get_scale())
    log.log(logging.INFO if overflow else logging.WARNING, "left out, as not finite: %s", found)
    return {"skipped": 1.0}
