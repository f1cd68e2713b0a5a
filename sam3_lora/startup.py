"""What every script imports first: what goes wrong while its packages load ends in one line.

A Python that is too old, packages that are not installed or do not fit, Ctrl-C in the seconds that
torch takes.
"""

import sys
from types import TracebackType

from sam3_lora.packages import MIN_PYTHON, check_packages

MISMATCH = "torchvision::"  # in what torch raises where torchvision was built for another torch


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As `sys.excepthook`, but one line for what a user can cause; a bug keeps its traceback."""
    known = isinstance(error, KeyboardInterrupt | ImportError) or MISMATCH in str(error)
    if not known or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    elif isinstance(error, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
        raise SystemExit(130)
    elif isinstance(error, ModuleNotFoundError):
        _refuse(
            f"expected the package {error.name}, found none in {sys.executable}; activate the "
            "environment that has it, or run `pip install -r requirements.txt`"
        )
    elif (packages := check_packages()).state == "ok":
        sys.__excepthook__(kind, error, trace)
    else:
        _refuse(f"{packages.found} in {sys.executable}; {packages.remedy}")


def _refuse(message: str) -> None:
    """Writes an error's line and exits."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


if sys.version_info < MIN_PYTHON:
    _refuse(
        "expected Python {}.{} or newer, found {}.{} in {}; start the script with a newer "
        "one".format(*MIN_PYTHON, *sys.version_info[:2], sys.executable)
    )
sys.excepthook = _tell
