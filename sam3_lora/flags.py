"""The command line: a parser whose help is for reading and whose errors are one line.

Each key of options.py has one flag, made here; config.py reads their values.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sam3_lora import processes
from sam3_lora.config import SYNONYMS, as_text, nearest, one_line, shorten
from sam3_lora.options import KEYS, SECTIONS

_METAVARS = {int: "INT", float: "FLOAT", bool: "true|false", Path: "PATH", tuple: "NAME"}
# argparse's words for what is missing, and those of all our errors.
_MISSING = {
    r"^one of the arguments (.+) is required$": r"expected one of \1, found none",
    r"^the following arguments are required: (.+)$": r"expected \1, found none",
}


class HelpFormatter(argparse.HelpFormatter):
    """Fills prose to the terminal, keeps indented lines as they are, says what is required and what
    the default is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """A description or an epilog."""
        filled, prose = [], []
        for line in [*text.strip().splitlines(), ""]:
            is_prose = line and not line.startswith(" ")
            prose += [line] if is_prose else []
            if not is_prose or line.endswith("."):
                filled += textwrap.wrap(" ".join(prose), width, break_on_hyphens=False)
                prose = []
            filled += [] if is_prose else [line]
        return "\n".join(filled) + "\n"

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None) -> str:
        """The usage in a line or two: as it was given, else what is required."""
        if usage is None and prefix is None:
            words = ["%(prog)s"]
            for action in actions:
                if action.required and action.option_strings:
                    words += [action.option_strings[-1], str(action.metavar or action.dest.upper())]
                elif action.required:
                    words.append(f"{action.metavar} ...")
            usage = " ".join(words + ["[--FLAG VALUE ...]"] * ("COMMAND ..." not in words))
        text = super()._format_usage(usage, actions, groups, prefix)
        if prefix is None:
            text = text.replace(" VALUE ...]", "\u00a0VALUE\u00a0...]")  # stays on one line
            text = textwrap.fill(text, self._width, subsequent_indent=" " * 7)
            text = text.replace("\u00a0", " ") + "\n\n"
        return text

    def _get_help_string(self, action: argparse.Action) -> str:
        """The help of a flag."""
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        if action.default in (None, False, argparse.SUPPRESS) or "(default: " in text:
            return text
        values = action.default if isinstance(action.default, list | tuple) else [action.default]
        default = " ".join(str(as_text(value)) for value in values).replace("%", "%%")
        return f"{text} (default: {default})" if default else text


class FlagParser(argparse.ArgumentParser):
    """Takes whole flag names only, names the nearest one, and fails in one line; has `--debug`.

    The usage names what is required; `usage` may name more. Flags belong in titled groups, which
    the help shows in their order, `other` last.
    """

    def __init__(self, description: str | None = None, **options: Any) -> None:
        defaults = {"allow_abbrev": False, "add_help": False, "formatter_class": HelpFormatter}
        super().__init__(description=description, **{**defaults, **options})
        self._optionals.title = "other"
        # No shell sees to `--flag=~/place`, nor to a `~` in quotes.
        self.register("type", Path, expand)
        self.add_argument("-h", "--help", action="help", help="show this text and stop")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def format_help(self) -> str:
        """As argparse, the group `other` last."""
        groups = self._action_groups
        groups.append(groups.pop(groups.index(self._optionals)))
        return super().format_help()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse; an unknown flag comes before a missing one, of which it is the cause."""
        words = list(sys.argv[1:] if args is None else args)
        flags, problems = self._option_string_actions, []
        for name in (word.split("=")[0] for word in words if word.startswith("--")):
            # argparse takes a word with a space in it for a value.
            if name != "--" and name not in flags and " " not in name:
                bare = name[2:].replace("-", "_")
                real = f"--{SYNONYMS.get(bare, bare)}"
                hint = nearest(real, flags, "none is like it")
                problems.append(f"unknown flag {shorten(name)}, {hint}")
        problems += _word_problems(words, flags)
        # A sub-command's flags are known to its own parser, which comes here too.
        if problems and self._subparsers is None:
            self.error("; ".join(problems))
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints `message` on one line, of several processes once, and exits with code 2."""
        for theirs, ours in _MISSING.items():
            message = re.sub(theirs, ours, message)
        text = f"error: {one_line(message)} (see {self.prog} --help)\n"
        self.exit(2, text if processes.is_main() else None)


def expand(text: str) -> Path:
    """A path, with `~` as the home folder."""
    return Path(text).expanduser() if text.startswith("~/") else Path(text)


def _word_problems(words: Sequence[str], flags: Mapping[str, argparse.Action]) -> list[str]:
    """Words of a command line that no file can have, and paths that are empty: the folder here."""
    problems = [
        f"expected text in UTF-8, found {shorten(repr(word))}"
        for word in words
        if re.search("[\0\ud800-\udfff]", word)
    ]
    pairs = [word.split("=", 1) for word in words if word.startswith("--") and "=" in word]
    pairs += zip(words[:-1], words[1:], strict=True)
    return problems + [
        f"{flag}: expected a path, found {value!r}"
        for flag, value in pairs
        if flag in flags and flags[flag].type is Path and not value.strip()
    ]


def add_config_flags(
    parser: argparse.ArgumentParser,
    sections: Iterable[str] = SECTIONS,
    without: Iterable[str] = (),
    first: Sequence[str] = (),
) -> None:
    """Adds `--config` and one flag for each key of `sections`, a group a section.

    Args:
        parser: The script's parser.
        sections: The sections whose keys the script reads, in the order of the help.
        without: Flags of theirs, without dashes, that it does not read.
        first: Flags of theirs, without dashes, for a group before the sections.
    """
    start = parser.add_argument_group("most used" if first else "configuration")
    start.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of options; a flag overrides its key"
    )
    groups = {section: parser.add_argument_group(f"{section} section") for section in sections}
    arity = {bool: {"nargs": "?", "const": "true"}, tuple: {"nargs": "+"}}
    listed = [flag for section in sections for flag in KEYS if KEYS[flag].section == section]
    for flag in [*first, *(flag for flag in listed if flag not in first)]:
        if flag not in without:
            key = KEYS[flag]
            default = as_text(key.default) or "null"
            default = " ".join(default) if isinstance(default, list) else default
            (start if flag in first else groups[key.section]).add_argument(
                f"--{flag}",
                # Kept as text: config_from_args converts all at once, and reports all at once.
                default=argparse.SUPPRESS,
                metavar="|".join(key.limits.get("choices", ())) or _METAVARS.get(key.kind, "TEXT"),
                help=f"{key.limits['help']} (default: {default})".replace("%", "%%"),
                **arity.get(key.kind, {}),
            )
