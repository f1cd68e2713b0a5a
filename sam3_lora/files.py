"""Writing files: whole or not at all, and known to be writable before the work."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_atomically(path: Path, save: Callable[[Path], Any], durable: bool = False) -> None:
    """Has `save` write a file beside the target, and renames that over it; makes the folder.

    Args:
        path: the target; an earlier file stays as it is until the new one is whole.
        save: writes to the path that it is given.
        durable: wait until the disk has it, for what a power cut must not take.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        if durable:
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def check_writable(folder: Path, flag: str) -> None:
    """Sees to it, before any work, that files can be written to a folder, which need not exist.

    Args:
        folder: where files will go.
        flag: what named it, for the message.

    Raises:
        PermissionError: they cannot.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise PermissionError(
            f"{flag}: expected a folder that can be written, found {folder} ({error.strerror}); "
            "name another place"
        ) from error
