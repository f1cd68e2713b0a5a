"""`--help` of every script: grouped, short of usage, each flag with its words and its default."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_docs import ROOT, load_script

from sam3_lora.flags import FlagParser

COLUMNS = 80
SOURCE_COLUMNS = 100  # commands and lists in the docstring of a script for developers
USAGE_LINES = 3
SIDES = [p for folder in ("demo", "benchmarks") for p in sorted((ROOT / folder).glob("*.py"))]
# Modules that the other scripts of their folder share.
SIDES = [path for path in SIDES if path.stem not in ("pretraining", "rivals")]
SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if path.stem != "lora_layers"]
EACH = [pytest.param(path, id=path.stem) for path in SCRIPTS]
EACH += [
    pytest.param(path, id=f"{path.parent.name}/{path.stem}", marks=pytest.mark.scripts)
    for path in SIDES
]


def parsers(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[argparse.ArgumentParser]:
    """The parser of a script, and those of its subcommands."""
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    parser = load_script(path).build_parser()
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize("path", EACH)
def test_help_is_complete_and_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for parser in parsers(path, monkeypatch):
        assert isinstance(parser, FlagParser) and parser.description, parser.prog
        shown = parser.format_help()
        usage = shown.split("\n\n")[0].splitlines()
        assert len(usage) <= USAGE_LINES, usage
        most = COLUMNS if path.parent == ROOT else SOURCE_COLUMNS
        assert [line for line in shown.splitlines() if len(line) > most] == []
        assert shown.rindex("--debug") > max(shown.rindex(f"\n{g.title}:") for g in groups(parser))
        for group in groups(parser):
            for action in group._group_actions:
                check_argument(parser, action, shown)


@pytest.mark.parametrize("path", EACH[: len(SCRIPTS)])
def test_the_commands_of_the_help_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = next(parsers(path, monkeypatch))
    lines = parser.description.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("    python ")]
    assert commands
    for _, name, *words in commands:
        assert name == path.name
        parser.parse_args(words)


def groups(parser: argparse.ArgumentParser) -> list[argparse._ArgumentGroup]:
    """The groups that the help shows."""
    found = [group for group in parser._action_groups if group._group_actions]
    titles = [group.title for group in found]
    assert not {"options", "positional arguments", None} & set(titles), titles
    assert len(set(titles)) == len(titles), titles
    return found


def check_argument(parser: FlagParser, action: argparse.Action, shown: str) -> None:
    """The words of one flag say what it takes, whether it must be there and what it is else."""
    name = f"{parser.prog} {action.option_strings or action.dest}"
    assert action.help and action.help != argparse.SUPPRESS, name
    text = parser._get_formatter()._expand_help(action)
    assert text in " ".join(shown.split()) or "-" in text, name  # lines break at a dash too
    assert ("(required)" in text) == (bool(action.option_strings) and action.required), name
    switch = action.nargs == 0 or not action.option_strings
    has_default = action.default not in (None, argparse.SUPPRESS, False, [], ())
    assert text.count("(default: ") == 1 or switch or not has_default, f"{name}: {text}"
    assert text.count("(default: ") <= 1 and "default: " not in text.replace("(default: ", ""), name
