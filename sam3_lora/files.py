"""Writing files: whole or not at all, and known to be writable before the work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

try:
    import fcntl
except ImportError:  # Windows has no such module
    fcntl = None

LOCK_FILE = "run.lock"
# The lock of this process's run, or of its last one.
_held: list[Any] = []


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Has what the system says against writing a file (no room, a quota, no right) name the file,
    and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's, or told already
            raise
        raise type(error)(
            f"{path}: expected to write it, found: {error.strerror}; make room or take away what "
            "is in the way, or name another place"
        ) from error


def write_atomically(path: Path, save: Callable[[Path], Any], durable: bool = False) -> None:
    """Has `save` write a file beside the target, and renames that over it; makes the folder.

    Args:
        path: the target; an earlier file stays as it is until the new one is whole.
        save: writes to the path that it is given.
        durable: wait until the disk has it, for what a power cut must not take.

    Raises:
        OSError: it cannot be written; nothing is left of the try.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save(temporary)
            if durable:
                sync(temporary)
            os.replace(temporary, path)
            if durable:
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until the disk has a file's content, or a folder's names."""
    if path.is_file():
        with path.open("r+b") as file:  # Windows wants it writable
            os.fsync(file.fileno())
    elif hasattr(os, "O_DIRECTORY"):  # Windows opens no folder
        handle = os.open(path, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network shares cannot
                raise
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Removes a file or a folder that never is there in part: it takes a hidden name first."""
    hidden = path.with_name(f".{path.name}.removed.tmp")
    discard(hidden)
    if path.exists():
        os.replace(path, hidden)
        sync(path.parent)
        discard(hidden)


def discard(path: Path) -> None:
    """Removes a file or a folder, if it is there, piece by piece."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Writes a text, UTF-8, whole or not at all."""
    write_atomically(path, lambda place: place.write_text(text, encoding="utf-8"), durable)


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent))


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 pixels (H, W, 3) or (H, W) in the format of the suffix, else as PNG."""
    form = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    write_atomically(path, lambda place: Image.fromarray(pixels).save(place, form))


def set_aside(place: Path, replace: bool = False) -> Path | None:
    """Renames an earlier run's folder, or a file, to `<name>.1`, or the first free number; or
    removes it.

    Returns:
        The new name, or None when there was nothing to rename.
    """
    discard(place.with_name(f".{place.name}.removed.tmp"))
    if not place.exists():
        return None
    if place.is_dir() and not any(p.name != ".gitkeep" for p in place.iterdir()):
        return None
    if replace:
        remove(place)
        return None
    number = 1
    while (target := place.with_name(f"{place.name}.{number}")).exists():
        number += 1
    os.replace(place, target)
    return target


def claim(run_dir: Path, replace: bool, resume: bool) -> Path | None:
    """Takes a run's folder for this process, until it ends, however it ends, or takes another.

    Args:
        run_dir: of the run; made where it is not there.
        replace, resume: an earlier run there is removed, or gone on with; else it is set aside.

    Returns:
        As `set_aside`.

    Raises:
        BlockingIOError: another run writes to it.
    """
    _release(keep=0)
    if (run_dir / LOCK_FILE).exists():
        _lock(run_dir)
        if resume:
            return None
    moved = None if resume else set_aside(run_dir, replace)
    with telling(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        _lock(run_dir)
    _release(keep=1)
    return moved


def check_free(run_dir: Path) -> None:
    """Raises BlockingIOError where a run writes to a folder now; takes nothing."""
    if fcntl is None or not (run_dir / LOCK_FILE).exists():
        return
    try:
        _lock(run_dir)
    finally:
        _held.pop().close()


def _release(keep: int) -> None:
    """Lets go of all locks but the last so many."""
    while len(_held) > keep:
        _held.pop(0).close()


def _lock(folder: Path) -> None:
    """Locks a folder, where the system has locks that end with the process."""
    if fcntl is None:
        return
    _held.append((folder / LOCK_FILE).open("a"))
    try:
        # Of this process alone: one that it forked, and that outlives it, does not hold it.
        fcntl.lockf(_held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # else the file system has no locks
            raise BlockingIOError(
                f"output_dir: expected a folder that no other run writes to, found one in "
                f"{folder}; wait for its end, or name another with --output_dir"
            ) from error


def check_writable(folder: Path, flag: str) -> None:
    """Sees to it, before any work, that files can be written to a folder, which need not exist.

    Args:
        folder: where files will go.
        flag: what named it, for the message.

    Raises:
        PermissionError: they cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=_nearest_folder(folder)):
            pass
    except OSError as error:
        raise PermissionError(
            f"{flag}: expected a folder that can be written, found {folder} ({error.strerror}); "
            "name another place"
        ) from error


def _nearest_folder(folder: Path) -> Path:
    """A folder, or where it is not there yet the nearest one above it."""
    place = folder.absolute()
    # A link to nothing is in the way of a folder.
    while not os.path.lexists(place):
        place = place.parent
    return place


def by_disk(folders: Iterable[Path]) -> list[tuple[list[Path], int]]:
    """Folders, there or not, by the file system they are on, each with its free bytes."""
    disks: dict[int, list[Path]] = {}
    for folder in folders:
        disks.setdefault(_nearest_folder(folder).stat().st_dev, []).append(folder)
    return [(some, shutil.disk_usage(_nearest_folder(some[0])).free) for some in disks.values()]
