"""Several processes of one run, as torchrun starts them, and the signals that end a run.

    a step's images --[rank::count]--> each process: its losses, over the counts of all
    gradients of all --sum--> the same step in each process

What is summed is small (an adapter's gradients), so it goes in one piece after the backward, and a
process whose share of a step is empty takes part with zeros. Without torchrun there is one process,
rank 0 of 1, and nothing here costs anything.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

log = logging.getLogger(__name__)

# A terminal's Ctrl-C, what schedulers send before they kill, and a closed connection.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
# Between two lines of progress in the log.
LINE_SECONDS = 60

Losses = dict[str, torch.Tensor]


class ProcessError(RuntimeError):
    """The other processes of the run cannot be reached; the message says what to do."""


class Stopped(SystemExit):
    """A signal ended the run in order; the code is 128 + its number, as shells give it."""


def count() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine this is, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes the run's files."""
    return rank() == 0


def shows_progress() -> bool:
    """Whether a bar is drawn: by one process, on a terminal."""
    return is_main() and sys.stderr.isatty()


def progress(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """The items under a progress bar, from a second on; off a terminal the log says each minute how
    many are done.

    Args:
        items: what is worked on, one after another.
        what: their name, in the plural.
        total: their number; None asks the items for it.
    """
    if shows_progress():
        return tqdm(items, what, total, delay=1, leave=False)
    return _told(items, what, total) if is_main() else items


def _told(items: Iterable[Any], what: str, total: int | None) -> Iterator[Any]:
    """`progress` off a terminal."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    of_all = f" of {total}" if total else ""
    told = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            log.info("%d%s %s", number, of_all, what)
        yield item


def command_line(script: str | Path, *words: str) -> str:
    """The command line of a script, from here, in as many processes as this one has."""
    launch = "python"
    if count() > 1:
        launch = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', count())}"
    with suppress(ValueError):  # on another drive of Windows there is no way from here
        script = os.path.relpath(script)
    return f"{launch} {shlex.join([str(script), *words])}"


def resume_command(script: str, config: Path) -> str:
    """The command line that goes on with a run."""
    return command_line(script, "--config", str(config), "--resume")


@contextmanager
def joined() -> Iterator[None]:
    """Connects the processes of the run, for as long as it lasts.

    Raises:
        ProcessError: torchrun did not start them, or one of them has ended.
    """
    if count() == 1:
        yield
        return
    # Numbers of the host go over gloo, so that no GPU is waited for. Windows has no NCCL.
    with_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if with_nccl else "gloo"
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"WORLD_SIZE is {count()}: expected {count()} processes started by torchrun "
            f"--nproc_per_node {count()}, found {error}; start it so, or unset WORLD_SIZE"
        ) from error
    # Not after an error: those that are left would be waited for.
    yield
    dist.destroy_process_group()


@contextmanager
def _talk() -> Iterator[None]:
    """Says what it means where the other processes do not answer."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"expected an answer from all {count()} processes of the run, found that one has ended "
            "(its own message, if it had time for one, says why); start the same command again, a "
            "training run with --resume to go on from its last checkpoint"
        ) from error


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank; a value is what pickle takes.

    Raises:
        ProcessError: one of them has ended; so do all below that wait for the others.
    """
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _talk():
        dist.all_gather_object(found, value)
    return found


def total(amounts: Mapping[str, float]) -> dict[str, float]:
    """The amounts of all processes, added up by name; one that a process lacks is 0 there."""
    parts = gather(dict(amounts))
    return {name: sum(part.get(name, 0) for part in parts) for part in parts for name in part}


def wait() -> None:
    """Waits until every process has come here."""
    gather(None)


def share(items: Sequence[Any]) -> Sequence[Any]:
    """This process's part of what all have to do; no two parts differ by more than one."""
    return items[rank() :: count()]


def align(parameters: Iterable[torch.Tensor]) -> None:
    """Gives every process the parameters of the first."""
    if count() > 1:
        with _talk(), torch.no_grad():
            for parameter in parameters:
                dist.broadcast(parameter, src=0)


def sum_gradients(parameters: Sequence[torch.Tensor], losses: Losses) -> Losses:
    """Sums the gradients of all processes, in place, and their losses.

    Args:
        parameters: the same in each process; one without a gradient in any keeps none.
        losses: scalars; a process that had nothing to do has none.

    Returns:
        The losses of the step, on the parameters' device.
    """
    if count() == 1:
        return losses
    used = [parameter.grad is not None for parameter in parameters]
    seen = gather((used, list(losses)))
    names = max((own for _, own in seen), key=len)
    anywhere = [any(flags) for flags in zip(*(flags for flags, _ in seen), strict=True)]
    shared = [p for p, wanted in zip(parameters, anywhere, strict=True) if wanted]
    zero = parameters[0].new_zeros(())
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
    flat += [losses.get(name, zero).to(zero) for name in names]
    summed = torch.cat([part.flatten() for part in flat])
    with _talk():
        dist.all_reduce(summed)
    parts = summed.split([part.numel() for part in flat])
    for parameter, part in zip(shared, parts[: len(shared)], strict=True):
        parameter.grad = part.view_as(parameter)
    return {name: part[0] for name, part in zip(names, parts[len(shared) :], strict=True)}


class SignalWatch:
    """Remembers a signal that asks the run to end, until a moment when it can; see `watch`."""

    def __init__(self) -> None:
        self.received: int | None = None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Takes a signal. Of a second one a single process ends at once; torchrun, which passes on
        what it gets, may send several."""
        if self.received is not None and count() == 1:
            raise KeyboardInterrupt
        self.received = self.received or number
        if is_main():
            name = signal.Signals(number).name
            more = "; a second one ends the run at once" if count() == 1 else ""
            text = f"\n{name}: this step is finished and saved{more}\n"
            with suppress(OSError):  # of a terminal that is gone
                os.write(2, text.encode())  # it may have interrupted a write to sys.stderr

    def check(self) -> None:
        """Raises Stopped where any process has received a signal: in all, at the same moment."""
        for number in gather(self.received):
            if number is not None:
                raise Stopped(128 + number)

    def between(self, items: Iterable[Any], total: int) -> Iterator[Any]:
        """Yields this process's items, with `check` before each, as often in every process.

        Args:
            items: this process's `share`.
            total: number of items of all processes.
        """
        iterator = iter(items)
        for _ in range(math.ceil(total / count())):
            self.check()
            yield from itertools.islice(iterator, 1)


def signals() -> list[int]:
    """The numbers of SIGNALS that this system has."""
    return [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]


@contextmanager
def watch() -> Iterator[SignalWatch]:
    """A SignalWatch that receives SIGNALS, but those that are ignored (nohup) or, outside the main
    thread, none."""
    watching, before = SignalWatch(), {}
    for number in signals():
        if signal.getsignal(number) is not signal.SIG_IGN:
            try:
                before[number] = signal.signal(number, watching.receive)
            except ValueError:  # not the main thread
                break
    try:
        yield watching
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that is not Python's
