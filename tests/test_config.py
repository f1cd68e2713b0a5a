"""Options: what loads, what is refused and in which words, and that nothing is lost on the way."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_layers
from sam3_lora import config as config_module
from sam3_lora.config import (
    MAX_CONFIG_BYTES,
    SECTIONS,
    Config,
    ConfigError,
    load_config,
    save_config,
)
from sam3_lora.notices import find_idle

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILES = sorted((ROOT / "configs").glob("*.yaml"))
COMPONENTS = [f"apply_to_{name}" for name in lora_layers.COMPONENTS]


def write(tmp_path: Path, text: str) -> Path:
    """A YAML file with this text."""
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(tmp_path: Path, text: str, **overrides: Any) -> Config:
    """The configuration of a YAML text."""
    return load_config(write(tmp_path, text), overrides)


def refusal(tmp_path: Path, text: str, **overrides: Any) -> str:
    """The message with which a YAML text is refused: always one line."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def switched_on(config: Config) -> list[str]:
    """The components that a configuration adapts."""
    return [name for name in COMPONENTS if getattr(config.lora, name)]


def test_key_names_are_unique_and_so_are_flags() -> None:
    names = [
        item.name
        for section in dataclasses.fields(Config())
        for item in dataclasses.fields(getattr(Config(), section.name))
    ]
    assert len(names) == len(set(names)) == len(config_module.KEYS)


def test_every_component_of_the_adapter_has_a_key() -> None:
    keys = [item.name for item in dataclasses.fields(Config().lora)]
    assert [name for name in keys if name.startswith("apply_to_")] == COMPONENTS
    defaults = lora_layers.LoRAConfig()
    assert [f"apply_to_{name}" for name in defaults.components] == switched_on(Config())
    assert defaults.rank == Config().lora.rank and defaults.alpha == Config().lora.alpha
    assert defaults.target_modules == Config().lora.target_modules


def test_nothing_given_is_the_defaults() -> None:
    assert load_config(None, {}) == Config()


def test_base_config_holds_every_key_at_its_default() -> None:
    path = ROOT / "configs" / "base_config.yaml"
    assert load_config(path, {}) == Config()
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(written) == list(SECTIONS)
    for section in SECTIONS:
        keys = [item.name for item in dataclasses.fields(getattr(Config(), section))]
        assert list(written[section]) == keys


@pytest.mark.parametrize("path", CONFIG_FILES, ids=[path.name for path in CONFIG_FILES])
def test_every_config_file_loads_and_starts_with_its_command(path: Path) -> None:
    load_config(path, {})
    head = path.read_text(encoding="utf-8")
    assert f"#   python train_sam3_lora.py --config configs/{path.name}\n" in head


def test_minimal_and_full_differ_as_they_say() -> None:
    minimal = load_config(ROOT / "configs" / "minimal_lora_config.yaml", {})
    assert switched_on(minimal) == ["apply_to_detr_decoder"]
    assert (minimal.lora.rank, minimal.lora.alpha) == (8, 16.0)
    full = load_config(ROOT / "configs" / "full_lora_config.yaml", {})
    assert switched_on(full) == COMPONENTS
    assert minimal.lora.target_modules == full.lora.target_modules
    assert len({item.output.output_dir for item in (minimal, full, Config())}) == 3


def test_a_lora_block_that_names_components_leaves_the_others_off(tmp_path: Path) -> None:
    text = "lora:\n  apply_to_text_encoder: true\n  rank: 4\n"
    assert switched_on(load(tmp_path, text)) == ["apply_to_text_encoder"]
    assert switched_on(load(tmp_path, "lora:\n  rank: 4\n")) == switched_on(Config())


ACCEPTED = [
    ("training", "learning_rate", "1e-4", 1e-4),
    ("training", "learning_rate", "'1e-4'", 1e-4),
    ("training", "learning_rate", "1", 1.0),
    ("training", "batch_size", "'12'", 12),
    ("training", "batch_size", "1e1", 10),
    ("training", "max_steps", "null", None),
    ("training", "max_steps", "~", None),
    ("training", "max_steps", "", None),
    ("training", "max_steps", "none", None),
    ("training", "max_steps", "7", 7),
    ("training", "val_data_path", "None", None),
    ("training", "val_data_path", "2024-01-01", Path("2024-01-01")),
    ("training", "augment", "no", False),
    ("training", "augment", "False", False),
    ("training", "augment", "on", True),
    ("hardware", "mixed_precision", "no", "no"),
    ("hardware", "device", "cuda:1", "cuda:1"),
    ("lora", "alpha", "16", 16.0),
    ("lora", "target_modules", "[q_proj, 'fc1']", ("q_proj", "fc1")),
    ("lora", "target_modules", "\n    - q_proj\n    - fc1", ("q_proj", "fc1")),
    ("lora", "target_modules", "q_proj,fc1", ("q_proj", "fc1")),
    ("lora", "target_modules", "q_proj", ("q_proj",)),
    ("model", "name", "models/sam3", "models/sam3"),
]


@pytest.mark.parametrize(("section", "key", "text", "expected"), ACCEPTED)
def test_value_is_converted(
    section: str, key: str, text: str, expected: Any, tmp_path: Path
) -> None:
    config = load(tmp_path, f"{section}:\n  {key}: {text}\n")
    value = getattr(getattr(config, section), key)
    assert value == expected and type(value) is type(expected)


REFUSED = [
    ("training", "batch_size", "12.5", "expected a whole number at least 1 (default 4)"),
    ("training", "batch_size", "true", "expected a whole number"),
    ("training", "batch_size", "four", "expected a whole number"),
    ("training", "batch_size", "0", "at least 1"),
    ("training", "batch_size", "null", "training.batch_size is null, expected a whole number"),
    ("training", "batch_size", "", "is null"),
    ("training", "batch_size", "1e300", "expected a whole number"),
    ("training", "batch_size", "[4]", "expected a whole number"),
    ("training", "batch_size", "{a: 4}", "expected a whole number"),
    ("training", "max_steps", "0", "expected a whole number at least 1 or null"),
    ("training", "seed", "-1", "at least 0"),
    ("training", "seed", "4294967296", "at most 4294967295"),
    ("training", "learning_rate", "true", "expected a number above 0 at most 1 (default 0.0001)"),
    ("training", "learning_rate", "0", "above 0"),
    ("training", "learning_rate", "-1e-4", "above 0"),
    ("training", "learning_rate", ".nan", "expected a number"),
    ("training", "weight_decay", ".inf", "expected a number"),
    ("training", "weight_decay", "1e999", "expected a number"),
    ("training", "weight_decay", "''", "expected a number"),
    ("training", "flip_probability", "1.5", "at most 1"),
    ("training", "augment", "2", "expected true or false"),
    ("training", "augment", "null", "expected true or false"),
    ("training", "lr_schedule", "cosin", "expected one of cosine, linear, constant, inverse_sqrt"),
    ("training", "lr_schedule", "null", "expected one of cosine"),
    ("training", "train_data_path", "null", "expected a path"),
    ("training", "train_data_path", "''", "expected a path"),
    ("training", "train_data_path", "!!python/name:os.system x", "python/name:os.system"),
    ("lora", "rank", "0", "at least 1"),
    ("lora", "alpha", "0", "above 0"),
    ("lora", "dropout", "1", "at least 0 below 1"),
    ("lora", "target_modules", "[]", "expected names"),
    ("lora", "target_modules", "null", "expected names"),
    ("lora", "target_modules", "[q_proj, [fc1]]", "expected names"),
    ("lora", "target_modules", "[q_proj, null]", "expected names"),
    ("model", "name", "null", "expected a name"),
    ("model", "name", "''", "expected a name"),
    ("model", "name", "[a, b]", "expected a name"),
    ("hardware", "device", "gpu", "expected auto, cpu, mps, cuda or cuda:N"),
    ("evaluation", "score_threshold", "2", "at most 1"),
    ("evaluation", "best_metric", "map", "expected one of ap, ap50, cgf1, iou, loss"),
]


@pytest.mark.parametrize(("section", "key", "text", "message"), REFUSED)
def test_value_is_refused_with_key_source_and_remedy(
    section: str, key: str, text: str, message: str, tmp_path: Path
) -> None:
    found = refusal(tmp_path, f"# a comment\n{section}:\n  {key}: {text}\n")
    assert message in found and f"{section}.{key} is " in found
    assert f"{tmp_path / 'run.yaml'}:3: " in found


def test_num_epochs_as_a_flag_counts_more_than_a_file_s_max_steps(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("training:\n  max_steps: 800\n  num_epochs: 3\n", encoding="utf-8")
    assert load_config(path, {}).training.max_steps == 800
    training = load_config(path, {"num_epochs": "5"}).training
    assert (training.num_epochs, training.max_steps) == (5, None)
    training = load_config(path, {"num_epochs": "5", "max_steps": "7"}).training
    assert (training.num_epochs, training.max_steps) == (5, 7)


def test_typed_overrides_are_taken_as_flags_are() -> None:
    overrides = {"batch_size": 2, "augment": False, "output_dir": Path("a/b"), "max_steps": None}
    overrides |= {"lora_target_modules": ["fc1"], "learning_rate": 2e-5}
    config = load_config(None, overrides)
    assert config.training.batch_size == 2 and config.training.augment is False
    assert config.output.output_dir == Path("a/b") and config.training.max_steps is None
    assert config.lora.target_modules == ("fc1",) and config.training.learning_rate == 2e-5
    with pytest.raises(ConfigError, match="--batch_size: training.batch_size is 'true'"):
        load_config(None, {"batch_size": True})
    with pytest.raises(ConfigError, match="unknown option bach_size, did you mean batch_size?"):
        load_config(None, {"bach_size": 2})


def test_home_is_expanded() -> None:
    config = load_config(None, {"output_dir": "~/runs"})
    assert config.output.output_dir == Path.home() / "runs"


WRONG_NAMES = [
    ("training:\n  learing_rate: 1\n", "run.yaml:2: unknown key learing_rate, did you mean lear"),
    ("training:\n  lr: 1e-4\n", "did you mean learning_rate in section training?"),
    ("training:\n  rank: 4\n", "did you mean rank in section lora?"),
    ("lora:\n  lora_rank: 4\n", "did you mean rank in section lora?"),
    ("lora:\n  batch_sise: 4\n", "did you mean batch_size in section training?"),
    ("lora:\n  zzz: 4\n", "expected one of rank, alpha, dropout, target_modules, apply_to_vision"),
    ("trainig:\n  batch_size: 4\n", "yaml:1: unknown section 'trainig', did you mean training"),
    ("batch_size: 4\n", "unknown section 'batch_size', did you mean batch_size in section"),
    ("zzz: 4\n", "expected one of model, lora, training, output, evaluation, hardware"),
    ("yes: 4\n", "unknown section 'yes'"),
    ("1: 4\n", "unknown section '1'"),
    ("? [a, b]\n: 4\n", "unknown section"),
    ("training:\n  <<: {batch_size: 2}\n", "unknown key <<"),
    ("training: 4\n", "expected indented `key: value` lines under training"),
    ("training: [batch_size]\n", "expected indented `key: value` lines under training"),
    ("- training\n", "expected the sections model, lora"),
    ("just words\n", "expected the sections model, lora"),
    ("lora:\n  rank: 4\n  rank: 4\n", "run.yaml:3: lora.rank is set again, after "),
    ("lora:\n  rank: 4\nlora:\n  rank: 8\n", "run.yaml:4: lora.rank is set again, after "),
]


@pytest.mark.parametrize(("text", "message"), WRONG_NAMES)
def test_name_is_refused_with_the_nearest(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, text)


BROKEN = [
    ("training:\n  batch_size: 4\n bad: 1\n", "run.yaml:3: broken YAML: "),
    ("training:\n\tbatch_size: 4\n", "run.yaml:2: broken YAML: "),
    ("training: {batch_size: 4\n", "broken YAML: "),
    ("a: &x 1\ntraining:\n  batch_size: *x\n", "run.yaml:3: broken YAML: an alias"),
    ("--- \na: 1\n--- \nb: 1\n", "run.yaml:3: broken YAML: "),
    ("[" * 20_000, "run.yaml"),
    ("a: \x01\n", "expected a short YAML file in UTF-8"),
    ("#" * (MAX_CONFIG_BYTES + 1), "at most 1000000 bytes"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_file_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, text)


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml cannot be read: No such file"):
        load_config(tmp_path / "none.yaml", {})
    with pytest.raises(ConfigError, match="cannot be read: "):
        load_config(tmp_path, {})
    path = tmp_path / "latin.yaml"
    path.write_bytes("training:\n  lr_schedule: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="expected a short YAML file in UTF-8"):
        load_config(path, {})


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n", "lora:\n", "{}\n"])
def test_file_that_sets_nothing_is_the_defaults(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, text) == Config()


def test_byte_order_mark_is_no_part_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbflora:\r\n  rank: 4\r\n")
    assert load_config(path, {}).lora.rank == 4


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = "lora:\n  rank: x\n  alfa: 2\ntraining:\n  batch_size: 0\nnope:\n  a: 1\n"
    message = refusal(tmp_path, text, num_epochs="0.5", resume=True, overwrite=True)
    assert message.count("; ") == 5
    for part in ("lora.rank", "alpha", "batch_size", "'nope'", "--num_epochs", "choose one"):
        assert part in message


def test_no_component_is_refused(tmp_path: Path) -> None:
    assert "no component is adapted: set one of lora_apply_to_vision_encoder" in refusal(
        tmp_path, "lora:\n  apply_to_vision_encoder: false\n"
    )
    off = {f"lora_{name}": "false" for name in COMPONENTS}
    with pytest.raises(ConfigError, match="no component"):
        load_config(None, off)


def test_saved_config_loads_back(tmp_path: Path) -> None:
    overrides = {"learning_rate": "3e-05", "lora_target_modules": "fc1,fc2", "overwrite": True}
    overrides |= {"output_dir": "out dir/é: #1", "mixed_precision": "no", "max_steps": 5}
    config = load_config(None, overrides)
    path = tmp_path / "new" / "config.yaml"
    save_config(config, path)
    assert load_config(path, {}) == config
    assert [item.name for item in path.parent.iterdir()] == ["config.yaml"]


@settings(max_examples=25, deadline=None)
@given(
    learning_rate=st.floats(min_value=1e-300, max_value=1, exclude_min=True),
    alpha=st.floats(min_value=1e-6, max_value=1e12),
    seed=st.integers(min_value=0, max_value=2**32 - 1),
    name=st.from_regex(r"[\w./ :#'\"-]{1,20}", fullmatch=True).filter(lambda text: text.strip()),
)
def test_any_sound_config_survives_saving(
    tmp_path_factory: pytest.TempPathFactory,
    learning_rate: float,
    alpha: float,
    seed: int,
    name: str,
) -> None:
    given_values = {"learning_rate": learning_rate, "lora_alpha": alpha, "seed": seed}
    config = load_config(None, given_values | {"model_name": name})
    assert config.training.learning_rate == learning_rate and config.model.name == name
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(config, path)
    assert load_config(path, {}) == config


def test_options_without_effect_are_told() -> None:
    given = {"box_prompt_text_probability": 0.9, "cache_views": 2, "early_stopping_patience": 5}
    config = load_config(None, given)
    assert [words.split()[0] for words in find_idle(config, 5)] == list(given)
    active = {"box_prompt_probability": 0.5, "cache_features": "ram"}
    assert find_idle(load_config(None, given | active), 6) == []
    assert find_idle(Config(), 0) == []


def test_a_misspelt_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "demo_config.yaml").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean .*demo_config.yaml[?]$"):
        load_config(tmp_path / "demo_confg.yaml", {})
    with pytest.raises(ConfigError, match="name another with --config .a path begins in /"):
        load_config(tmp_path / "mine.yaml", {})
