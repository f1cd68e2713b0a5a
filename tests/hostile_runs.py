"""Hostile command lines, configurations, adapters, checkpoints and base models, as a table.

test_hostile.py runs the cases: each must be refused in one line, with exit code 2, and write
nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Places = dict[str, Path]


class Case(NamedTuple):
    """One hostile input.

    Attributes:
        name: unique over all tables.
        script: the module whose `main(argv)` runs, such as `train_sam3_lora`.
        argv: its command line, formatted with the places and split as a shell does; `{{` is `{`.
        message: a piece of the error line that is expected.
        make: writes the hostile thing into the case's folder, which is the working directory.
        writes: patterns of files under the case's folder that may be new or changed after all.

    The places are absolute paths without spaces: `folder`, the case's own, empty; `out`, a folder
    in it that is not there; and, good and shared by all cases, never to be changed: `model`, the
    tiny base; `data`, a data set with `train/` and `val/`, each of `annotations.json` and
    `images/`; `adapter`, a file trained on `model`; `image`, a photo of 96 x 64 pixels.
    """

    name: str
    script: str
    argv: str
    message: str
    make: Callable[[Path, Places], object] | None = None
    writes: tuple[str, ...] = ()


CASES: list[Case] = []
