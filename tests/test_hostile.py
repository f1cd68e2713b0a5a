"""Hostile inputs, each through a script's `main(argv)`: refused in one line, and nothing written.

The cases stand in the tables of hostile_runs.py, hostile_files.py and hostile_data.py.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import hostile_files
import hostile_runs
import pytest
from hostile_runs import Case, Places

from lora_layers import LoRAConfig

pytestmark = pytest.mark.scripts

ROOT = Path(__file__).resolve().parent.parent
TABLES = [hostile_runs, hostile_files]
if importlib.util.find_spec("hostile_data"):
    TABLES.append(importlib.import_module("hostile_data"))
CASES: list[Case] = [case for table in TABLES for case in table.CASES]
LEAST_CASES, LEAST_MESSAGES = 200, 80
LONGEST = 60.0  # seconds after which a case hangs
# Cases that also run as real processes, spread over the table.
AS_PROCESSES = CASES[:: max(1, len(CASES) // 10)][:10]
# What makes two messages of one kind differ: paths, quoted values, numbers.
VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\S*\.(?:pt|yaml|json|png)\b\S*|\d[\d.,e+-]*")

messages: dict[str, str] = {}  # of the cases that have run, by name


@pytest.fixture(scope="module")
def shared(write_split, save_random_adapter, tiny_model_dir, tmp_path_factory) -> Places:
    """What is good and shared by all cases."""
    root = tmp_path_factory.mktemp("good")
    for split in ("train", "val"):
        write_split(root, 3, split)
    lora = LoRAConfig(rank=4, alpha=8.0, components=("detr_decoder",))
    categories = {"red_part": "red part", "blue_part": "blue part"}
    told = {"categories": categories, "geometry_cls": "meta", "step": 3, "metrics": {}}
    adapter = save_random_adapter(root / "adapter.pt", tiny_model_dir, lora, **told)
    image = min((root / "data" / "train" / "images").iterdir())
    return {"model": tiny_model_dir, "data": root / "data", "adapter": adapter, "image": image}


def listing(folder: Path) -> dict[str, tuple[float, bytes | str]]:
    """Every file, link and folder under a folder with its time and content."""
    found: dict[str, tuple[float, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        found[path.relative_to(folder).as_posix()] = path.lstat().st_mtime, content
    return found


def stamps(places: Places) -> dict[Path, float]:
    """When each shared file was written."""
    roots = [places[name] for name in ("model", "data", "adapter")]
    paths = [p for root in roots for p in (root, *root.rglob("*")) if p.is_file()]
    return {path: path.stat().st_mtime for path in paths}


def prepare(case: Case, shared: Places, folder: Path) -> list[str]:
    """Makes the hostile thing; the command line."""
    places = {**shared, "folder": folder, "out": folder / "out"}
    if case.make:
        case.make(folder, places)
    return shlex.split(case.argv.format(**places))


def check(case: Case, code: int, stderr: str, before: dict, folder: Path) -> str:
    """Asserts that a case was refused as it should be; the error line."""
    assert code == 2, f"exit code {code}: {stderr[-2000:]}"
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error:")]
    assert errors == [len(lines) - 1], stderr[-2000:]
    assert case.message in lines[-1]
    after = listing(folder)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    stray = [n for n in changed if not any(fnmatch(n, pattern) for pattern in case.writes)]
    assert stray == [], "written, changed or lost"
    return lines[-1]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_hostile_input_is_refused_in_one_line(
    case: Case, shared: Places, tmp_path, monkeypatch, capfd
) -> None:
    argv = prepare(case, shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    before, good = listing(tmp_path), stamps(shared)
    main = importlib.import_module(case.script).main
    capfd.readouterr()
    start = time.perf_counter()
    code = main(argv)
    took = time.perf_counter() - start
    messages[case.name] = check(case, code, capfd.readouterr().err, before, tmp_path)
    assert stamps(shared) == good
    assert took < LONGEST


def test_the_tables_are_long_and_their_messages_many() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= LEAST_CASES
    if len(messages) == len(names):  # not under -k
        assert len({VALUES.sub("_", message) for message in messages.values()}) >= LEAST_MESSAGES


@pytest.mark.parametrize("case", AS_PROCESSES, ids=[case.name for case in AS_PROCESSES])
def test_a_process_refuses_it_too(case: Case, shared: Places, tmp_path) -> None:
    argv = prepare(case, shared, tmp_path)
    before = listing(tmp_path)
    command = [sys.executable, str(ROOT / f"{case.script}.py"), *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    check(case, done.returncode, done.stderr, before, tmp_path)
