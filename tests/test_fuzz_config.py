"""Random options and random adapter files: a sound value, or one line of our own error."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_layers import AdapterError, LoRAConfig
from sam3_lora.checkpoint import read_adapter
from sam3_lora.config import (
    Config,
    ConfigError,
    config_from_args,
    load_config,
    save_config,
)
from sam3_lora.flags import FlagParser, add_config_flags
from sam3_lora.options import KEYS, SECTIONS

pytestmark = pytest.mark.scripts

BASE = (Path(__file__).resolve().parent.parent / "configs" / "base_config.yaml").read_bytes()
FAST = settings(max_examples=150, deadline=None, derandomize=True, database=None)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["1e999", "0x10", "~", "\x00", "a\nb", "auto", "cuda:٣", "true", "q_proj"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
SECTION_NAMES = st.sampled_from(SECTIONS) | st.text(max_size=6)
KEY_NAMES = st.sampled_from([key.name for key in KEYS.values()]) | st.text(max_size=6)
# What stands for structure in YAML, more often than chance would have it.
YAML_TEXT = st.text(st.sampled_from(" \n\t:-[]{}&*!|>'\"#%@,?~abrank0129.\x00\ud800é\u2028"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def says_something(error: Exception) -> None:
    """Asserts that a message is not empty; the scripts make one line of it."""
    assert str(error).strip()


def check_config(folder: Path, data: bytes, **overrides: Any) -> None:
    """A file is refused, or gives a configuration that is the same after saving it."""
    path = folder / "run.yaml"
    path.write_bytes(data)
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        says_something(error)
        return
    assert isinstance(config, Config)
    for key in KEYS.values():
        value = getattr(getattr(config, key.section), key.name)
        assert isinstance(value, key.kind) or (key.optional and value is None)
    save_config(config, folder / "saved.yaml")
    assert load_config(folder / "saved.yaml", {}) == config


@FAST
@given(data=st.binary(max_size=60) | YAML_TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_config_or_refused(folder: Path, data: bytes) -> None:
    check_config(folder, data)


@FAST
@given(content=VALUES | st.dictionaries(SECTION_NAMES, st.dictionaries(KEY_NAMES, VALUES)))
def test_any_values_are_a_config_or_refused(folder: Path, content: Any) -> None:
    check_config(folder, yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "replace"))


@FAST
@given(
    place=st.integers(0, len(BASE)),
    length=st.integers(0, 30),
    new=st.binary(max_size=8) | YAML_TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")),
)
def test_a_changed_config_is_a_config_or_refused(
    folder: Path, place: int, length: int, new: bytes
) -> None:
    check_config(folder, BASE[:place] + new + BASE[place + length :])


WORDS = st.one_of(
    st.sampled_from([f"--{flag}" for flag in KEYS]),
    st.builds("--{}={}".format, st.sampled_from(list(KEYS)), SCALARS),
    SCALARS.map(str),
)


@FAST
@given(words=st.lists(WORDS, max_size=6))
def test_any_flags_are_a_config_or_refused(words: list[str]) -> None:
    words = [word for word in words if word not in ("-h", "--help")]
    parser = FlagParser("A script.", prog="script.py")
    add_config_flags(parser)
    try:
        assert isinstance(config_from_args(parser.parse_args(words)), Config)
    except SystemExit as stop:
        assert stop.code == 2
    except ConfigError as error:
        says_something(error)


@pytest.fixture(scope="module")
def adapter() -> dict[str, Any]:
    """The content of a small file that is read."""
    lora = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(LoRAConfig()).items()}
    tensors = {"detr_decoder.x.lora_A": torch.ones(2, 3), "detr_decoder.x.lora_B": torch.ones(3, 2)}
    told = {"base_model": "b", "base_fingerprint": "0", "categories": {"a": "a b"}, "metrics": {}}
    return {
        "format": "sam3-lora-adapter",
        "version": 1,
        "lora_config": lora,
        "lora": tensors,
    } | told


def saved(content: Any) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def check_adapter(folder: Path, data: bytes) -> None:
    """A file is refused, or gives an adapter."""
    path = folder / "adapter.pt"
    path.write_bytes(data)
    try:
        content = read_adapter(path)
    except AdapterError as error:
        says_something(error)
        return
    assert isinstance(content["lora_config"], LoRAConfig)
    assert all(bool(tensor.isfinite().all()) for tensor in content["lora"].values())


@FAST
@given(data=st.data(), changes=st.integers(1, 4))
def test_changed_bytes_are_an_adapter_or_refused(
    folder: Path, adapter: dict[str, Any], data: st.DataObject, changes: int
) -> None:
    content = bytearray(saved(adapter))
    for _ in range(changes):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(1, 3))] = data.draw(st.binary(max_size=3))
    check_adapter(folder, bytes(content[: data.draw(st.integers(0, 2 * len(content)))]))


@FAST
@given(data=st.binary(max_size=80))
def test_random_bytes_are_no_adapter(folder: Path, data: bytes) -> None:
    check_adapter(folder, data)


@FAST
@given(data=st.data(), value=VALUES)
def test_changed_values_are_an_adapter_or_refused(
    folder: Path, adapter: dict[str, Any], data: st.DataObject, value: Any
) -> None:
    settings_of = adapter["lora_config"]
    fields = [field.name for field in dataclasses.fields(LoRAConfig)]
    name = data.draw(st.sampled_from([*adapter, *fields]))
    changed = {**adapter, name: value}
    if name in fields:
        changed = {**adapter, "lora_config": {**settings_of, name: value}}
    check_adapter(folder, saved(changed))
