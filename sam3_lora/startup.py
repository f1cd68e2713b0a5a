"""What every script imports first: what goes wrong while its packages load ends in one line.

A Python that is too old, a package that is not installed, Ctrl-C in the seconds that torch takes.
"""

import sys
from types import TracebackType

OLDEST = (3, 11)


def tell(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:  # of `sys.excepthook`
    """Writes one line about what a user can cause, and exits; a bug keeps its traceback."""
    known = issubclass(kind, KeyboardInterrupt | ModuleNotFoundError)
    if not known or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    if isinstance(error, ModuleNotFoundError):
        refuse(
            f"expected the package {error.name}, found none in {sys.executable}; activate the "
            "environment that has it, or run `pip install -r requirements.txt`"
        )
    if known:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130)


def refuse(message: str) -> None:
    """Writes an error's line and exits."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


if sys.version_info < OLDEST:
    refuse(
        "expected Python {}.{} or newer, found {}.{} in {}; start the script with a newer "
        "one".format(*OLDEST, *sys.version_info[:2], sys.executable)
    )
sys.excepthook = tell
