"""Each command that the documents show names a script that exists, with flags that it takes."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "TRAINING_GUIDE.md", "data/README.md", "demo/sam3_tiny/README.md")


def find_commands(text: str) -> Iterator[list[str]]:
    """The words of each `python X.py ...` command in the fenced blocks of a document; torchrun with
    its own flags stands for python."""
    fenced = False
    lines: list[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            lines.append(line.strip().removeprefix("$ "))
    for line in lines:
        line = re.sub(r"\btorchrun\b.*?(?=\S+\.py\b)", "python ", line)
        words = line.split()
        starts = [i for i, word in enumerate(words) if Path(word).name in ("python", "python3")]
        if starts and words[starts[0] + 1 : starts[0] + 2] and ".py" in words[starts[0] + 1]:
            after = line[line.index(words[starts[0]]) :]
            lexer = shlex.shlex(after, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            command = []
            for word in lexer:
                if set(word) <= set("|&;<>"):
                    break
                if word.startswith("$"):  # what the shell would put there is not known
                    continue
                command.append(word)
            yield command


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
        "$ HF_HUB_OFFLINE=1 python b.py > log.txt\nsrun torchrun --nnodes 2 c.py --resume\n"
        "pip install y\n```\nthen `python d.py`\n"
    )
    assert list(find_commands(text)) == [
        ["python", "a.py", "x", "--flag", "[[1, 2]]"],
        ["python", "b.py"],
        ["python", "c.py", "--resume"],
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
    module = importlib.import_module(script.stem)
    try:
        module.build_parser().parse_args(command[2:])
    except SystemExit as stop:
        assert stop.code == 0, f"{document}: {' '.join(command)} does not parse"
