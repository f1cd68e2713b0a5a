"""Items to batches: their order, the steps they make, the processes that read them.

    worker:  items -> packed (numpy, masks as bits) --pipe--> unpacked -> batch    :training process

A tensor that crosses a worker's border takes a file descriptor and shared memory; numpy takes none.

In several training processes each reads its share of a step's images, see `share_steps`.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sam3_lora import processes
from sam3_lora.dataset import BoxPrompt, Item, PromptDataset
from sam3_lora.forward import PADDING_BOX
from sam3_lora.images import DatasetError

Keys = list[tuple[int, int]]  # (epoch, index of the item)
# Seconds that a worker lives on after SIGTERM: a step, and to save. Torch terminates its workers by
# that signal, after they were asked to end.
LINGER = 15.0
# What torch does where a worker has died, see `_take_handler`.
_torch_handler: Callable[[int, Any], None] | None = None

# The warm-up takes at most this share of a run, so that a short one reaches its learning rate.
LONGEST_WARMUP = 0.1


class LoaderError(RuntimeError):
    """A process that loads images has ended; the message says what to do."""


def collate_fn(items: list[Item]) -> dict[str, Any]:
    """Joins items into a batch of B rows.

    Args:
        items: I items of `PromptDataset`.

    Returns:
        `images` (I,3,S,S) uint8, if the items have them; lists of I: `views`, `image_ids`,
        `original_sizes`; `image_index` (B,) long, row -> image; lists of B: `texts`,
        `category_ids`, `targets`; `box_prompts_cxcywh` (B,N,4) and `box_prompt_labels` (B,N), 1, 0
        or `PADDING_BOX`, or None where no row has a box: the model is faster without.
    """
    counts = torch.tensor([len(item["texts"]) for item in items])
    images = {}
    if "image" in items[0]:
        images = {"images": torch.stack([item["image"] for item in items])}
    return {
        **images,
        "views": [item.get("view") for item in items],
        "image_ids": [item["image_id"] for item in items],
        "original_sizes": [item["original_size"] for item in items],
        "image_index": torch.repeat_interleave(torch.arange(len(items)), counts),
        "texts": [text for item in items for text in item["texts"]],
        "category_ids": [c for item in items for c in item["category_ids"]],
        "targets": [target for item in items for target in item["targets"]],
        **_pad_boxes([row for item in items for row in item.get("box_prompts", ())]),
    }


def _pad_boxes(rows: list[list[BoxPrompt]]) -> dict[str, torch.Tensor | None]:
    """The box prompts of B rows, each with as many as the longest has."""
    most = max(map(len, rows), default=0)
    if not most:
        return {"box_prompts_cxcywh": None, "box_prompt_labels": None}
    padded = [row + [(PADDING_BOX, [0.0] * 4)] * (most - len(row)) for row in rows]
    return {
        "box_prompts_cxcywh": torch.tensor([[box for _, box in row] for row in padded]),
        "box_prompt_labels": torch.tensor([[label for label, _ in row] for row in padded]),
    }


@dataclass
class Plan:
    """How many steps a run has.

    Args:
        images: of the training set.
        images_per_step: over all processes; the last step of an epoch may have fewer.
        num_epochs: of the run, unless `max_steps` says how many steps.
        max_steps: the last epoch may be cut short; None: all of them.
        wanted_warmup: steps of warm-up asked for.
    """

    images: int
    images_per_step: int
    num_epochs: int
    max_steps: int | None
    wanted_warmup: int

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"images": self.images, "images_per_step": self.images_per_step}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on as a checkpoint's state says; one of an earlier version says nothing.

        Raises:
            DatasetError: the training set is another one, or more steps are done than asked for.
        """
        if (images := state.get("images", self.images)) != self.images:
            raise DatasetError(
                f"--resume: expected the training split that the run began with, of {images} "
                f"images or tiles, found one of {self.images}; name it with --train_data_path"
            )
        self.images_per_step = state.get("images_per_step", self.images_per_step)
        if state["step"] > self.total_steps:
            raise DatasetError(
                f"--resume: expected at least the {state['step']} steps that are done, found "
                f"{self.total_steps} in all; raise --max_steps or --num_epochs"
            )

    def __str__(self) -> str:
        """The run's length, for the log."""
        text = f"{self.total_steps} steps in {self.epochs} epochs"
        if processes.count() > 1:
            text += f", {self.images_per_step} images a step in {processes.count()} processes"
        return text

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
        return min(self.wanted_warmup, int(LONGEST_WARMUP * self.total_steps))

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps, and at the run's end, is due."""
        return step % every == 0 or step == self.total_steps

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with this step."""
        return self.is_due(step, self.steps_per_epoch)

    def evaluates(self, step: int, every: int | None) -> bool:
        """Whether an evaluation is due: every so many steps (None: at the end of each epoch), and
        at the run's end."""
        return self.is_due(step, every or self.steps_per_epoch)

    def evaluations(self, every: int | None) -> int:
        """How many evaluations a run has."""
        return math.ceil(self.total_steps / (every or self.steps_per_epoch))


def epoch_batches(count: int, batch_size: int, epoch: int, seed: int, shuffle: bool) -> list[Keys]:
    """The order of one epoch: batches of (epoch, index) keys; the last batch may be smaller.

    Args:
        count: number of images.
        batch_size: images a batch.
        epoch: from 0; each has its own order when shuffled.
        seed: of the order.
        shuffle: random order, or that of the file.
    """
    order = np.arange(count)
    if shuffle:
        order = np.random.default_rng((seed, epoch)).permutation(count)
    keys = [(epoch, int(index)) for index in order]
    return [keys[i : i + batch_size] for i in range(0, count, batch_size)]


def share_steps(
    steps: list[Keys], batch_size: int, rank: int, count: int
) -> tuple[list[Keys], list[int]]:
    """One process's part of an epoch.

    Args:
        steps: the images of each optimizer step, from `epoch_batches`.
        batch_size: most images of a micro-batch.
        rank, count: which process of how many.

    Returns:
        Its micro-batches, and how many of them each step has: none where a step has fewer images
        than there are processes. Every image is in the part of one process.
    """
    parts = [
        [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
        for own in (keys[rank::count] for keys in steps)
    ]
    return [batch for part in parts for batch in part], [len(part) for part in parts]


class _Packed(Dataset):
    """A data set whose items travel between processes."""

    def __init__(self, dataset: PromptDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Keys) -> list[Item] | DatasetError:
        """A batch's items, packed, or what is wrong with them; torch's loaders call this.

        The error is handed over, not raised: a loader would wrap it in the worker's traceback.
        """
        try:
            return [_pack(self.dataset[key]) for key in keys]
        except DatasetError as error:
            return error


def _pack(item: Item) -> Item:
    """An item with numpy arrays for tensors and eight pixels of a mask in a byte."""
    targets = [{name: value.numpy() for name, value in t.items()} for t in item["targets"]]
    for target in targets:
        target["side"] = target["masks"].shape[-1]
        target["masks"] = np.packbits(target["masks"], axis=-1)  # (G,S,ceil(S/8))
    image = {"image": item["image"].numpy()} if "image" in item else {}
    return item | image | {"targets": targets}


def _unpack(item: Item) -> Item:
    """The item that `_pack` took."""
    targets = []
    for packed in item["targets"]:
        side = packed.pop("side")
        masks = np.unpackbits(packed["masks"], axis=-1, count=side).view(bool)
        arrays = packed | {"masks": masks}
        targets.append({name: torch.from_numpy(value) for name, value in arrays.items()})
    image = {"image": torch.from_numpy(item["image"])} if "image" in item else {}
    return item | image | {"targets": targets}


def _as_it_is(packed: Any) -> Any:
    """Keeps the loader from turning arrays into tensors."""
    return packed


def _begin_worker(worker: int) -> None:
    """Has a worker, in which it runs, end when the training process does, and not before: a signal
    to their group (Ctrl-C, torchrun, a scheduler) is for that one, which finishes its step.

    Torch's own watch of the parent waits forever where the pipe is full.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    def linger(number: int, frame: Any) -> None:
        timer = threading.Timer(LINGER, os._exit, (1,))
        timer.daemon = True
        timer.start()

    threading.Thread(target=watch, daemon=True).start()
    for number in processes.signals():
        signal.signal(number, linger if number == signal.SIGTERM else signal.SIG_IGN)


class Batches:
    """Iterable over the batches of a loader of packed items; `len` is their number."""

    def __init__(self, loader: DataLoader, pin: bool) -> None:
        self.loader = loader
        self.pin = pin

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields batches as from `collate_fn`.

        Raises:
            DatasetError: as `PromptDataset` does.
            LoaderError: a worker was killed.
        """
        for packed in _until_killed(self.loader):
            if isinstance(packed, DatasetError):
                raise packed
            batch = collate_fn([_unpack(item) for item in packed])
            if self.pin and "images" in batch:
                batch["images"] = batch["images"].pin_memory()
            yield batch


def _take_handler(before: Any) -> None:
    """Takes away the handler of SIGCHLD that torch sets, once, with the first loader that has
    workers: it raises where one has died, in the middle of a step too."""
    global _torch_handler
    if hasattr(signal, "SIGCHLD") and (current := signal.getsignal(signal.SIGCHLD)) is not before:
        _torch_handler = current
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


@contextmanager
def _told_of_deaths() -> Iterator[None]:
    """Within it a worker's death raises RuntimeError: else a loader can wait forever for the rest
    of what a killed worker had begun to send."""
    if _torch_handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, _torch_handler)
    try:
        _torch_handler(signal.SIGCHLD, None)  # for those that died since
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _until_killed(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches; LoaderError, between two of them, where a worker was killed."""
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    iterator = iter(loader)
    _take_handler(before)
    while True:
        try:
            with _told_of_deaths():
                packed = next(iterator, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise LoaderError(
                f"expected {loader.num_workers} processes that load images, found that one has "
                "ended, as when memory runs out; try --num_workers 0, or fewer than now"
            ) from error
        if packed is None:
            return
        yield packed


def build_loader(
    dataset: PromptDataset,
    batches: list[Keys],
    num_workers: int,
    pin: bool = False,
) -> Batches:
    """Batches as from `collate_fn`, in the order given, read ahead by workers.

    Args:
        dataset: of the images.
        batches: the keys of each batch, from `epoch_batches`.
        num_workers: processes that read; with 0 this one does. The batches are the same.
        pin: put the images in page-locked memory, which speeds copies to a GPU.
    """
    loader = DataLoader(
        _Packed(dataset),
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=_begin_worker,
        # Of its own: a draw from the global one would change dropout after a resume.
        generator=torch.Generator().manual_seed(0),
    )
    return Batches(loader, pin)


def rest_of_epoch(
    dataset: PromptDataset,
    plan: Plan,
    step: int,
    batch_size: int,
    seed: int,
    num_workers: int,
    pin: bool = False,
) -> tuple[Batches, list[int]]:
    """What this process trains on until the epoch, or the run, ends.

    Args:
        dataset, num_workers, pin: as for `build_loader`.
        plan: of the run.
        step: optimizer steps done.
        batch_size: most images of a micro-batch.
        seed: of the order.

    Returns:
        (micro-batches, how many of them each of the steps has).
    """
    epoch, done = divmod(step, plan.steps_per_epoch)
    count = min(plan.steps_per_epoch - done, plan.total_steps - step)
    steps = epoch_batches(len(dataset), plan.images_per_step, epoch, seed, shuffle=True)
    which = processes.rank(), processes.count()
    batches, sizes = share_steps(steps[done : done + count], batch_size, *which)
    return build_loader(dataset, batches, num_workers, pin=pin), sizes
