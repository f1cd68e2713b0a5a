"""Each command that the documents show names a script that exists, with flags that it takes."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "TRAINING_GUIDE.md", "CONTRIBUTING.md", "data/README.md")
DOCUMENTS += ("demo/sam3_tiny/README.md",)


def fenced_lines(text: str, *languages: str) -> list[str]:
    """The lines of the fenced blocks of a document, of these languages or of all; continued lines
    are joined, prompts left out."""
    lines: list[str] = []
    language = None
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            language = line.strip("` \t") if language is None else None
        elif language is not None and (not languages or language in languages):
            lines.append(line.strip().removeprefix("$ "))
    return lines


def find_commands(text: str) -> Iterator[list[str]]:
    """The words of each `python X.py ...` command in the fenced blocks of a document."""
    for line in fenced_lines(text):
        yield from line_commands(line)


def line_commands(line: str) -> Iterator[list[str]]:
    """Those of a line; torchrun with its own flags stands for python."""
    line = re.sub(r"\btorchrun\b.*?(?=\S+\.py\b)", "python ", line)
    start = re.search(r"(?<!\S)(\S*/)?python3?\s+\S*\.py\b", line)
    if start is None:
        return
    lexer = shlex.shlex(line[start.start() :], posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    command: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;"):
            while command and Path(command[0]).name not in ("python", "python3"):
                command.pop(0)  # settings of the environment, or no command of ours
            if command[1:] and command[1].endswith(".py"):
                yield command
            command, redirected = [], False
        elif set(word) <= set("<>&"):
            redirected = True
        elif not redirected and not word.startswith("$"):  # of which the shell knows the value
            command.append(word)


def document_commands() -> list[tuple[str, list[str]]]:
    """Every command of every document that exists."""
    existing = [name for name in DOCUMENTS if (ROOT / name).exists()]
    return [
        (name, command)
        for name in existing
        for command in find_commands((ROOT / name).read_text(encoding="utf-8"))
    ]


COMMANDS = document_commands()


def test_find_commands_reads_fences_continuations_and_redirections() -> None:
    text = (
        "python not_fenced.py\n```bash\n# a comment\npython a.py x \\\n  --flag '[[1, 2]]'\n"
        "$ HF_HUB_OFFLINE=1 python b.py > log.txt && A=1 python3 b.py -x  # and then\n"
        "srun torchrun --nnodes 2 c.py --resume\npip install y\n```\nthen `python d.py`\n"
    )
    assert list(find_commands(text)) == [
        ["python", "a.py", "x", "--flag", "[[1, 2]]"],
        ["python", "b.py"],
        ["python3", "b.py", "-x"],
        ["python", "c.py", "--resume"],
    ]


def load_script(path: Path) -> ModuleType:
    """A script as a module. One at the root has its own name; one in a folder carries the folder's
    too: benchmarks/inference.py is not inference.py."""
    name = path.stem if path.parent == ROOT else f"{path.parent.name}_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_a_script_of_a_folder_is_not_that_of_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    modules = [load_script(ROOT / name) for name in ("inference.py", "benchmarks/inference.py")]
    assert [Path(module.__file__) for module in modules] == [
        *(ROOT / "inference.py", ROOT / "benchmarks" / "inference.py")
    ]


@pytest.mark.parametrize(
    ("document", "command"), COMMANDS, ids=[" ".join(words[1:3]) for _, words in COMMANDS]
)
def test_documented_command_parses(
    document: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ROOT / command[1]
    assert script.exists(), f"{document} names {command[1]}, which does not exist"
    monkeypatch.syspath_prepend(str(script.parent))
    try:
        load_script(script).build_parser().parse_args(command[2:])
    except SystemExit as stop:
        assert stop.code == 0, f"{document}: {' '.join(command)} does not parse"
