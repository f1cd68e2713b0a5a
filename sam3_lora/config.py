"""Reads the options of options.py from YAML and from flags.

Defaults come first, then a YAML file, then the flags. Whatever its source, a value arrives as text
and is converted by the field's type: `1e-4` is a number and `no` a word in a file just as on a
command line.
"""

import argparse
import difflib
import functools
import logging
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from lora_layers import COMPONENTS, LoRAConfig
from sam3_lora import processes
from sam3_lora.files import write_text
from sam3_lora.images import UNSAFE
from sam3_lora.options import KEYS, SECTIONS, Config, Key, find_clashes

MAX_CONFIG_BYTES = 1_000_000
MAX_INTEGER = 2**53  # float() is exact up to here
# Characters of a value, and of a whole message, that are shown.
MAX_SHOWN, MAX_MESSAGE = 100, 2000

_PLAIN_TAGS = {"null", "bool", "int", "float", "str", "timestamp"}
_NULL_WORDS = {"null", "none", "~"}
_BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True)
_BOOLEANS |= dict.fromkeys(("false", "no", "off", "0"), False)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
_KINDS |= {str: "a name", tuple: "names, such as q_proj,v_proj"}
# Settings that a resumed run may change: how long, how often; none that steps done depend on.
_MAY_CHANGE = (
    *("num_epochs", "max_steps", "eval_steps", "save_steps", "save_total_limit"),
    *("early_stopping_patience", "non_finite"),
    *("train_data_path", "val_data_path", "init_lora_weights", "cache_dir", "cache_limit_gb"),
)
# Names that other trainers use and that look nothing like ours.
SYNONYMS = {"lr": "learning_rate", "bs": "batch_size", "r": "rank", "wd": "weight_decay"}
_CHATTY_LIBRARIES = ("httpx", "httpx2", "httpcore", "urllib3", "filelock", "matplotlib", "PIL")


class ConfigError(ValueError):
    """An option is unknown, or its value cannot be used."""


def as_text(value: Any) -> Any:
    """A typed value as it would be written: text, None, or a list of texts."""
    if isinstance(value, list | tuple):
        return [as_text(item) for item in value]
    if isinstance(value, bool):
        return str(value).lower()
    return value.as_posix() if isinstance(value, Path) else value if value is None else str(value)


def _convert(key: Key, value: Any) -> Any:
    """Text, None or a list of texts as the type of `key`; ValueError, KeyError or TypeError."""
    limits = key.limits
    if key.optional and (value is None or str(value).lower() in _NULL_WORDS):
        return None
    if key.kind is bool:
        return _BOOLEANS[str(value).lower()]
    if key.kind is tuple:
        text = " ".join(value if isinstance(value, list) else [value])
        names = tuple(dict.fromkeys(text.replace(",", " ").split()))
        if not names or UNSAFE.search("".join(names)):
            raise ValueError(value)
        return names
    if key.kind in (int, float):
        number = float(value)
        whole = number.is_integer() and abs(number) <= MAX_INTEGER
        inside = limits.get("low", -math.inf) <= number <= limits.get("high", sys.float_info.max)
        strictly = limits.get("above", -math.inf) < number < limits.get("below", math.inf)
        if not (inside and strictly and (whole or key.kind is float)):
            raise ValueError(value)
        return key.kind(number)
    allowed = limits.get("choices", (value,))
    unusable = value not in allowed or UNSAFE.search(value)
    if unusable or not re.fullmatch(limits.get("pattern", r".*\S.*"), value):
        raise ValueError(value)
    if key.kind is Path:
        return Path(value).expanduser() if value.startswith("~/") else Path(value)
    return value


def _expectation(key: Key) -> str:
    """What a value of `key` must be, with an example."""
    if "choices" in key.limits:
        return f"expected one of {', '.join(key.limits['choices'])}"
    wording = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    text = f"expected {key.limits['help'] if 'pattern' in key.limits else _KINDS[key.kind]}"
    bounds = [f"{word} {key.limits[name]}" for name, word in wording.items() if name in key.limits]
    bounds += ["or null"] if key.optional else []
    default = ",".join(key.default) if key.kind is tuple else as_text(key.default)
    return " ".join([text, *bounds]) + ("" if default is None else f" (default {default})")


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few nested ones can stand for billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            problem, mark = "an alias (*name) is not accepted", self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return super().compose_node(parent, index)


def _parse(path: Path) -> yaml.Node | None:
    """The node tree of a YAML file; ConfigError when it has none, with the line if it is broken."""
    try:
        with path.open("rb") as stream:
            # One byte past the limit tells a file, or an endless device, that is too long.
            data = stream.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: expected a YAML file of at most {MAX_CONFIG_BYTES} bytes")
        return _PlainLoader(data.decode("utf-8-sig")).get_single_node()
    except OSError as error:
        beside = [p.name for p in path.parent.glob("*.y*ml")]
        hint = f"name another with --config (a path begins in {Path.cwd()})"
        if close := difflib.get_close_matches(path.name, beside, n=1):
            hint = f"did you mean {path.with_name(close[0])}?"
        reason = f"{error.strerror}; {hint}"
        raise ConfigError(f"config file {path} cannot be read: {reason}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: broken YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = one_line(error)
        raise ConfigError(f"{path}: expected a short YAML file in UTF-8: {reason}") from error


def _node_value(node: yaml.Node) -> Any:
    """A scalar as the text it was written as, None for null, a list of them; else its tag."""
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.ScalarNode) and tag in _PLAIN_TAGS:
        return None if tag == "null" else node.value
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return [_node_value(item) for item in node.value]
    return {tag}  # no option takes a set, so it is refused, with the tag in the message


def _name(node: yaml.Node) -> str:
    """A section's or a key's name as it was written, for messages too; of another node its tag."""
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    is_plain = isinstance(node, yaml.ScalarNode) and tag in _PLAIN_TAGS | {"merge"}
    return shorten(node.value if is_plain else tag)


def _is_mapping(node: yaml.Node) -> bool:
    """Whether a node is lines of `key: value`, and no object that is made of them."""
    return isinstance(node, yaml.MappingNode) and node.tag.endswith(":map")


def _read_yaml(path: Path, problems: list[str]) -> dict[str, tuple[Any, str]]:
    """Value (text, None, a list) and source of a file's keys, by flag; adds to `problems`."""
    root, found = _parse(path), {}
    if root is None or root.tag.endswith(":null"):
        return {}
    if not _is_mapping(root):
        raise ConfigError(f"{path}:1: expected the sections {', '.join(SECTIONS)}, found none")
    flags = {(key.section, key.name): flag for flag, key in KEYS.items()}
    # A section written twice goes on where it stopped, a key written twice is a problem.
    for section_node, body in root.value:
        section, source = _name(section_node), f"{path}:{section_node.start_mark.line + 1}"
        if section not in SECTIONS:
            problems.append(f"{source}: unknown section {section!r}, {_place_hint(section)}")
            continue
        if not _is_mapping(body):
            if not body.tag.endswith(":null"):
                problems.append(f"{source}: expected indented `key: value` lines under {section}")
            continue
        for node, value in body.value:
            name, source = _name(node), f"{path}:{node.start_mark.line + 1}"
            flag = flags.get((section, name))
            if flag is None:
                problems.append(f"{source}: unknown key {name}, {_place_hint(name, section)}")
            elif flag in found:
                problems.append(f"{source}: {section}.{name} is set again, after {found[flag][1]}")
            else:
                found[flag] = _node_value(value), source
    return found


def nearest(name: str, candidates: Iterable[str], otherwise: str) -> str:
    """`did you mean X?`, or `otherwise` when no candidate is close."""
    close = difflib.get_close_matches(SYNONYMS.get(name, name), list(candidates), n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def _place_hint(name: str, section: str | None = None) -> str:
    """Where a misplaced or misspelled YAML name belongs."""
    places = {word: key for flag, key in KEYS.items() for word in (flag, key.name)}
    real = SYNONYMS.get(name, name)
    here = [key.name for key in KEYS.values() if key.section == section] or SECTIONS
    if real not in places and (close := nearest(name, here, "")):
        return close
    for word in difflib.get_close_matches(real, places, n=1, cutoff=0.75):
        return f"did you mean {places[word].name} in section {places[word].section}?"
    return f"expected one of {', '.join(here)}"


def load_config(config_path: Path | None, argv_overrides: dict[str, Any]) -> Config:
    """Resolves the options: defaults, then the YAML file, then the overrides.

    A `lora:` block that sets any `apply_to_*` leaves the others off; an override sets its own only,
    but for `num_epochs`, beside which a file's `max_steps` does not count.

    Args:
        config_path: A YAML file, complete or partial, or None for the defaults.
        argv_overrides: Values by flag without dashes (`lora_rank`), as text or typed.

    Returns:
        The configuration; every value has its field's type and is in its range.

    Raises:
        ConfigError: The file cannot be read, or names or values are wrong: all in one message.
    """
    problems: list[str] = []
    found = {} if config_path is None else _read_yaml(Path(config_path), problems)
    components = [flag for flag in KEYS if flag.startswith("lora_apply_to_")]
    if not found.keys().isdisjoint(components):
        found = {flag: ("false", str(config_path)) for flag in components} | found
    if "num_epochs" in argv_overrides:
        found.pop("max_steps", None)  # the flag says how long a run is, not the file
    for flag, value in argv_overrides.items():
        if flag in KEYS:
            found[flag] = as_text(value), f"--{flag}"
        else:
            problems.append(f"unknown option {flag}, {nearest(flag, KEYS, 'see --help')}")
    config = Config()
    for flag, (value, source) in found.items():
        key = KEYS[flag]
        try:
            section = replace(getattr(config, key.section), **{key.name: _convert(key, value)})
            config = replace(config, **{key.section: section})
        except (ValueError, KeyError, TypeError):
            text = "null" if value is None else shorten(repr(value))
            problems.append(f"{source}: {key.section}.{key.name} is {text}, {_expectation(key)}")
    if problems := problems + find_clashes(config):
        raise ConfigError("; ".join(problems))
    return config


def plain_config(config: Config) -> dict[str, dict[str, Any]]:
    """Every option by section and key, as YAML and JSON hold them: paths as text."""
    sections = asdict(config)
    for values in sections.values():
        values |= {k: as_text(v) for k, v in values.items() if isinstance(v, Path | tuple)}
    return sections


def save_config(config: Config, path: Path) -> None:
    """Writes every option as a YAML file that loads back to the same configuration.

    Args:
        config: The resolved configuration.
        path: The file; it appears whole or not at all.
    """
    text = yaml.safe_dump(plain_config(config), sort_keys=False, allow_unicode=True)
    write_text(path, text, durable=True)


def lora_config(config: Config) -> LoRAConfig:
    """The `lora` section as the LoRA layers take it."""
    section = config.lora
    return LoRAConfig(
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        target_modules=section.target_modules,
        components=tuple(c for c in COMPONENTS if getattr(section, f"apply_to_{c}")),
    )


def check_trainable(config: Config, has_masks: bool) -> None:
    """Compares the adapted components with what they would be trained from.

    Args:
        config: The resolved configuration.
        has_masks: Whether the training data has masks.

    Raises:
        ConfigError: The only adapted component would get no gradient, or the features to be kept
            are not frozen.
    """
    components, cached = lora_config(config).components, config.training.cache_features
    if cached != "off" and "vision_encoder" in components:
        raise ConfigError(
            f"training.cache_features is {cached}: expected a frozen vision encoder, found "
            "lora.apply_to_vision_encoder true; turn one of them off"
        )
    if components == ("mask_decoder",) and not has_masks:
        raise ConfigError(
            "lora.apply_to_*: the mask decoder alone cannot learn from data without masks; add "
            "--lora_apply_to_detr_decoder true"
        )
    if components == ("geometry_encoder",) and config.model.geometry_cls == "hf":
        raise ConfigError(
            "lora.apply_to_*: with model.geometry_cls hf text prompts do not use the geometry "
            "encoder, so it alone cannot learn; add --lora_apply_to_detr_decoder true"
        )


def check_stopping(config: Config, has_validation: bool) -> None:
    """Raises ConfigError when a run shall stop early and has no validation split to tell when."""
    if config.training.early_stopping_patience and not has_validation:
        raise ConfigError(
            "training.early_stopping_patience: expected a validation split, found none; name one "
            "with --val_data_path, or set it to null"
        )


def load_saved(path: Path) -> Config:
    """The configuration that a run saved, to go on with it.

    Raises:
        ConfigError: as `load_config`; or the file is empty.
    """
    config = load_config(path, {})
    if not _read_yaml(path, []):
        raise ConfigError(
            f"--resume: expected the settings of the run in {path}, found none; copy config.yaml "
            "of best_model/ over it, or start a new run"
        )
    return config


def check_same_settings(config: Config, earlier: Config) -> None:
    """Compares the settings of a resumed run with those it began with.

    Raises:
        ConfigError: a key of `model`, `lora` or `training` that steps done depend on has changed.
    """
    changed = [
        f"{section}.{key} {old!r} -> {value!r}"
        for section in ("model", "lora", "training")
        for key, value in vars(getattr(config, section)).items()
        if key not in _MAY_CHANGE and (old := getattr(getattr(earlier, section), key)) != value
    ]
    if changed:
        raise ConfigError(
            f"--resume: expected the settings that the run began with, found {'; '.join(changed)}; "
            "leave these, or start a new run with --init_lora_weights"
        )


def config_from_args(args: argparse.Namespace) -> Config:
    """Resolves the options from parsed flags and the YAML file of `--config`.

    Args:
        args: From a parser with `add_config_flags`; what is None or no option is ignored.

    Returns:
        The configuration; raises as `load_config` does.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    overrides = {flag: given[flag] for flag in KEYS if flag in given}
    return load_config(given.get("config"), overrides)


def shorten(text: str, most: int = MAX_SHOWN) -> str:
    """A text for a message; of a longer one its beginning and its end."""
    return text if len(text) <= most else f"{text[: most * 3 // 4]} ... {text[-most // 4 :]}"


def one_line(message: object) -> str:
    """A message without its line breaks, and with nothing that a terminal takes for a command."""
    text = shorten(" ".join(str(message).split()), MAX_MESSAGE)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def user_errors(*errors: type[Exception]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorates `main(argv=None) -> int`: what a user can cause ends in one line and an exit code.

    Args:
        *errors: The exceptions a user's input can cause, beside ConfigError and OSError.

    Returns:
        A decorator. Main then returns 2 after such an error (its traceback is shown with
        `--debug`) or a wrong command line, and 128 + its number after a signal; a bug passes
        through. What is wrong with the options, one of several processes alone says.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def guarded(argv: Sequence[str] | None = None) -> int:
            try:
                return main(argv)
            except SystemExit as stop:
                return stop.code if isinstance(stop.code, int) else 2 * (stop.code is not None)
            except KeyboardInterrupt:
                sys.stderr.write("interrupted\n")
                return 130
            except (ConfigError, OSError, processes.ProcessError, *errors) as error:
                if "--debug" in (sys.argv if argv is None else argv):
                    traceback.print_exc()
                if processes.is_main() or not isinstance(error, ConfigError):
                    which = f"process {processes.rank()}: " if processes.count() > 1 else ""
                    sys.stderr.write(f"error: {which}{one_line(error)}\n")
                return 2

        return guarded

    return decorate


def setup_logging(log_file: Path | None = None, level: int | str = logging.INFO) -> None:
    """Sends log lines to stderr and to the end of a file. A second call replaces the first.

    Of several processes the first alone says more than errors, and has a file.

    Args:
        log_file: A file, made with its folder if it does not exist; None: stderr only.
        level: The lowest level shown.
    """
    if not processes.is_main():
        log_file, level = None, logging.ERROR
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log_file is not None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):  # Windows has few letters when it goes to a file
        sys.stdout.reconfigure(errors="backslashreplace")
    root = logging.getLogger()
    # Named, so that handlers of others (a test's, a notebook's) are left alone.
    for handler in [item for item in root.handlers if item.get_name() == __name__]:
        root.removeHandler(handler)
        handler.close()
    form = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    for handler in handlers:
        handler.set_name(__name__)
        handler.setFormatter(form)
        root.addHandler(handler)
    root.setLevel(level)
    for name in _CHATTY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
