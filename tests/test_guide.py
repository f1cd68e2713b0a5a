"""Every command and every YAML block of the documents, and of the guide that this project keeps to,
runs as written, on facebook/sam3 in miniature; flags are added that make it small, no more."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_docs import ROOT, fenced_lines, line_commands, load_script
from workspace import Workspace, flags_of

from sam3_lora.config import KEYS, SECTIONS, load_config, lora_config

pytestmark = pytest.mark.scripts

DOCUMENTS = ("README.md", "TRAINING_GUIDE.md", "data/README.md")
SHELL = ("bash", "sh", "console")
# Flags whose value is written; each is there after the command.
WRITES = ("--output", "--output_dir", "--report", "--preview", "--fix")

# Lines that no test here runs, by how they begin, and why; what else a document shows is run.
NOT_RUN = {
    "git clone": "needs the network",
    "cd ": "the tests stand in the folder already",
    "python -m venv": "the tests run in an environment",
    "python3 -m venv": "the tests run in an environment",
    "source ": "the tests run in an environment",
    "pip install": "needs the network; requirements.txt is what the tests run on",
    "python -m pip install": "needs the network; requirements.txt is what the tests run on",
    "hf auth login": "asks for a secret",
    "huggingface-cli login": "asks for a secret; hf auth login today",
    "hf download": "needs the network",
    "nvidia-smi": "needs a GPU",
    "watch -n 1 nvidia-smi": "needs a GPU, and never ends",
    "tensorboard --logdir": "a server that never ends",
    "./quickstart.sh": "minutes; .ci/run runs it",
    "python -m pytest": "the tests themselves",
    "python example_usage.py": "half a minute; tests/test_scripts.py runs it",
    "python demo/make_sam3_tiny.py": "hours; tests/test_demo_model.py runs it",
    "python benchmarks/": "minutes to hours; tests/test_benchmarks.py runs what can be",
    "first=$(scontrol": "needs SLURM",
    "resume=": "needs SLURM",
}
# Commands of ours that cannot run here, by a flag.
NOT_RUN_WITH = {"--push_to_hub": "uploads", "--wandb": "needs wandb; tests/test_runlog.py has it"}

# The commands and the configurations of the guide that users come with.
GUIDE = """\
```bash
git clone <repository-url>
cd sam3-lora
python -m venv venv
source venv/bin/activate
pip install -r requirements.txt
huggingface-cli login
python prepare_data.py create --output_dir data
python prepare_data.py coco \\
  --coco_json annotations.json \\
  --images_dir images/ \\
  --output_dir data \\
  --split train
python prepare_data.py yolo \\
  --yolo_dir dataset/ \\
  --classes "person,car,dog" \\
  --output_dir data \\
  --split train
python prepare_data.py validate \\
  --data_dir data \\
  --split train
python train_sam3_lora.py \\
  --config configs/minimal_lora_config.yaml
python train_sam3_lora.py \\
  --config configs/base_config.yaml
python train_sam3_lora.py \\
  --config configs/full_lora_config.yaml
python train_sam3_lora.py \\
  --config configs/base_config.yaml \\
  --batch_size 8 \\
  --learning_rate 2e-4 \\
  --num_epochs 20 \\
  --lora_rank 16
python inference.py \\
  --lora_weights outputs/sam3_lora/best_model/lora_weights.pt \\
  --image test.jpg \\
  --text_prompt "yellow school bus" \\
  --output result.png
python inference.py \\
  --lora_weights outputs/sam3_lora/best_model/lora_weights.pt \\
  --image test.jpg \\
  --bboxes '[[100, 150, 400, 350]]' \\
  --output result.png
python inference.py \\
  --lora_weights outputs/sam3_lora/best_model/lora_weights.pt \\
  --image test.jpg \\
  --text_prompt "red car" \\
  --bboxes '[[100, 150, 400, 350]]' \\
  --output result.png
python train_sam3_lora.py \\
  --config configs/minimal_lora_config.yaml \\
  --num_epochs 1
python train_sam3_lora.py \\
  --config configs/base_config.yaml \\
  --num_epochs 10
python train_sam3_lora.py \\
  --config configs/full_lora_config.yaml \\
  --num_epochs 20
watch -n 1 nvidia-smi
python train_sam3_lora.py \\
  --config configs/base_config.yaml \\
  --batch_size 2
python train_sam3_lora.py \\
  --config configs/base_config.yaml \\
  --batch_size 2 \\
  --gradient_accumulation_steps 4
```
```yaml
apply_to_vision_encoder: false
apply_to_text_encoder: false
apply_to_detr_encoder: false
apply_to_detr_decoder: true

apply_to_vision_encoder: true
apply_to_text_encoder: false
apply_to_detr_encoder: true
apply_to_detr_decoder: true

apply_to_vision_encoder: true
apply_to_text_encoder: true
apply_to_geometry_encoder: true
apply_to_detr_encoder: true
apply_to_detr_decoder: true
apply_to_mask_decoder: true
```
```yaml
training:
  save_steps: 1000
  eval_steps: 500
  save_total_limit: 3
```
```yaml
training:
  learning_rate: 2e-4

lora:
  rank: 16
  alpha: 32

lora:
  apply_to_vision_encoder: true
  apply_to_detr_encoder: true
  apply_to_detr_decoder: true
```
```yaml
lora:
  dropout: 0.1

training:
  weight_decay: 0.05

lora:
  rank: 4
```
```yaml
lora:
  rank: 8
  alpha: 16
  apply_to_vision_encoder: true
  apply_to_detr_decoder: true

training:
  train_data_path: "data/retail/train"
  batch_size: 4
  learning_rate: 1e-4
  num_epochs: 15
```
```yaml
lora:
  rank: 16
  alpha: 32
  apply_to_vision_encoder: true
  apply_to_detr_encoder: true
  apply_to_detr_decoder: true

training:
  train_data_path: "data/medical/train"
  batch_size: 2
  learning_rate: 5e-5
  num_epochs: 30
```
```yaml
lora:
  rank: 12
  alpha: 24
  apply_to_vision_encoder: true
  apply_to_text_encoder: true
  apply_to_detr_decoder: true

training:
  train_data_path: "data/driving/train"
  batch_size: 4
  learning_rate: 1e-4
  num_epochs: 20
```
```yaml
lora:
  rank: 8
  alpha: 16
  apply_to_vision_encoder: true
  apply_to_detr_decoder: true

training:
  train_data_path: "data/crops/train"
  batch_size: 4
  learning_rate: 1e-4
  num_epochs: 15
```
"""


def read_documents() -> dict[str, str]:
    """The text of each document and of the guide, in reading order."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    return texts | {"the guide": GUIDE}


def is_not_run(line: str) -> bool:
    """Whether a line of a shell is listed as one that cannot run here."""
    return line.startswith(tuple(NOT_RUN)) or not NOT_RUN_WITH.keys().isdisjoint(line.split())


def document_commands() -> list[tuple[str, list[str]]]:
    """Every command to run, with its document; one that stands in several, once."""
    found: dict[tuple[str, ...], str] = {}
    for name, text in read_documents().items():
        for line in fenced_lines(text):
            for words in [] if is_not_run(line) else line_commands(line):
                found.setdefault(tuple(words), name)
    return [(name, list(words)) for words, name in found.items()]


def keys_of(block: str) -> list[str]:
    """The names at the top of a YAML text."""
    node = yaml.compose(block)  # none where there are comments alone
    return [key.value for key, _ in node.value] if node else []


def yaml_blocks(text: str) -> Iterator[str]:
    """The YAML blocks of a document. One that names no section is put under that of its keys, each
    of its paragraphs for itself: so alternatives are written."""
    for block in re.findall(r"^ *```ya?ml\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        block = textwrap.dedent(block)
        if set(keys_of(block)) & set(SECTIONS):
            yield block
            continue
        for part in filter(keys_of, re.split(r"\n\s*\n", block.strip())):
            sections = {key.section for key in KEYS.values() if key.name in keys_of(part)}
            assert len(sections) == 1, f"no section, or several, have these keys: {part}"
            yield f"{sections.pop()}:\n" + textwrap.indent(part, "  ")


def values_of(node: yaml.Node, prefix: str = "") -> dict[str, Any]:
    """Every `section.key: text` of a YAML tree, repeated sections included; lists of texts."""
    if isinstance(node, yaml.ScalarNode):
        return {prefix: node.value}
    if isinstance(node, yaml.SequenceNode):
        return {prefix: [item.value for item in node.value]}
    found: dict[str, Any] = {}
    for key, value in node.value:
        found |= values_of(value, f"{prefix}.{key.value}" if prefix else key.value)
    return found


COMMANDS = document_commands()
BLOCKS = [(n, block) for n, text in read_documents().items() for block in yaml_blocks(text)]


def places(shown: list[tuple[str, Any]]) -> list[str]:
    """A name for each test, by document."""
    return [f"{name} {number}" for number, (name, _) in enumerate(shown, 1)]


@pytest.fixture(scope="module")
def workspace(published: None, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """One folder for all commands, in reading order: a command finds what those before it wrote."""
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.mark.parametrize("name", read_documents())
def test_every_line_of_a_shell_is_run_or_listed(name: str) -> None:
    lines = fenced_lines(read_documents()[name], *SHELL)
    shown = [line for line in lines if line and not line.startswith("#")]
    forgotten = [line for line in shown if not is_not_run(line) and not [*line_commands(line)]]
    assert shown and forgotten == []


def test_what_is_shown_is_found() -> None:
    everything = "\n".join(read_documents().values())
    assert len(BLOCKS) >= len(re.findall("```ya?ml", everything)) >= 8
    scripts = {words[1] for _, words in COMMANDS}
    assert scripts >= {f"{name}_sam3_lora.py" for name in ("train", "evaluate", "export")}
    assert scripts >= {"prepare_data.py", "inference.py"}


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=places(COMMANDS))
def test_documented_command_runs(
    name: str, words: list[str], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace.folder)
    added = workspace.provide(words)
    script = load_script(ROOT / words[1])
    assert script.main([*words[2:], *added]) == 0, f"{name}: {shlex.join([*words, *added])}"
    flags = flags_of(words[2:])
    for flag in WRITES:
        for path in flags.get(flag, []):
            assert Path(path).exists(), f"{name}: {shlex.join(words)} wrote no {path}"
    if words[1] == "train_sam3_lora.py" and flags.keys().isdisjoint(("--dry_run", "--check")):
        run = load_config(Path(flags["--config"][0]), {}).output.output_dir
        run = Path(flags.get("--output_dir", [run])[0])
        adapter = torch.load(run / "best_model" / "lora_weights.pt", weights_only=True)
        assert adapter["lora"] and adapter["step"] >= 1


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=places(BLOCKS))
def test_documented_yaml_loads_with_its_values(name: str, block: str, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    path.write_text(block, encoding="utf-8")
    config = load_config(path, {})
    given = values_of(yaml.compose(block))
    assert given
    for place, text in given.items():
        section, key = place.split(".")
        value = getattr(getattr(config, section), key)
        wanted = {"true": True, "false": False, "null": None}.get(str(text), text)
        assert value == (wanted if wanted is None else type(value)(wanted)), f"{name}: {place}"
    named = {place for place, text in given.items() if "apply_to_" in place and text == "true"}
    if any("apply_to_" in place for place in given):
        adapted = {f"lora.apply_to_{part}" for part in lora_config(config).components}
        assert adapted == named, name
