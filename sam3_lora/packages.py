"""What must be installed, beside what is: Python, and the packages of requirements.txt.

Imports the standard library alone, as it speaks where the others cannot be imported.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from dataclasses import dataclass
from pathlib import Path

MIN_PYTHON = (3, 11)
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
INSTALL = "run `pip install -r requirements.txt` with this Python"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    `state` is `ok`, `warning` or `error`; `remedy`, what to do about the latter two, may be part of
    `found`.
    """

    state: str
    name: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.found}; {self.remedy}" if self.remedy else self.found
        return f"{self.state:<9}{self.name:<11}{text}"


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Whether Python is new enough, and which one it is."""
    wanted, found = (".".join(map(str, numbers)) for numbers in (MIN_PYTHON, version))
    found = f"{found} ({sys.executable})"
    if version >= MIN_PYTHON:
        return Finding("ok", "python", found)
    remedy = f"install Python {wanted} or newer, and make a new environment with it"
    return Finding("error", "python", f"expected {wanted} or newer, found {found}", remedy)


def check_packages(requirements: Path = REQUIREMENTS) -> Finding:
    """Whether the packages of a requirements file are there, none older than its lower bound.

    Reads what is written of the installed packages and imports none.
    """
    lines = requirements.read_text(encoding="utf-8").splitlines()
    wanted = [line.split(">=") for line in lines if line.strip() and not line.startswith("#")]
    versions = {name: installed_version(name) for name, _ in wanted}
    problems = [
        f"{name}>={bound} (found {versions[name] or 'none'})"
        for name, bound in wanted
        if versions[name] is None or _numbers(versions[name]) < _numbers(bound)
    ]
    if versions.get("torch") and versions.get("torchvision"):
        problems += _mismatch(versions["torch"], versions["torchvision"])
    if problems:
        return Finding("error", "packages", f"expected {', '.join(problems)}", INSTALL)
    named = ", ".join(f"{name} {versions[name]}" for name, _ in wanted[:3])
    return Finding("ok", "packages", f"{named} and {len(wanted) - 3} more of {requirements.name}")


def installed_version(name: str) -> str | None:
    """The version of an installed package, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """A version for comparisons: 2.14.1+cu130 is (2, 14, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def _mismatch(torch: str, torchvision: str) -> list[str]:
    """What is wrong with torch beside a torchvision that was built for another version of it."""
    problems = []
    for line in _needs("torchvision"):
        for operator, version in re.findall(r"^torch\s*\(?(==|>=)\s*([\d.]+)", line):
            fits = _numbers(torch) == _numbers(version)
            if not fits and (operator == "==" or _numbers(torch) < _numbers(version)):
                needed = f"torch{operator}{version} for torchvision {torchvision}"
                problems.append(f"{needed} (found {torch})")
    return problems


def _needs(name: str) -> list[str]:
    """What a package says that it needs."""
    return importlib.metadata.requires(name) or []
