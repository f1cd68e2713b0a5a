"""The use cases' configurations: what each sets, and that the commands of its head run as written
on a tiny model."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_docs import find_commands, load_script
from transformers import Sam3Config, Sam3Model

import evaluate_sam3_lora
import train_sam3_lora
from lora_layers import COMPONENTS, apply_lora, count_parameters
from sam3_lora.config import Config, load_config, lora_config

ROOT = Path(__file__).resolve().parent.parent

# Rank, alpha, components, training data, batch size, learning rate, epochs; prompts; parameters.
USE_CASES = {
    "retail": (
        *(8, 16.0, ("vision_encoder", "detr_decoder"), "data/retail/train", 4, 1e-4, 15),
        {"sku_17": "coca cola bottle", "sku_42": "milk carton", "sku_63": "bread package"},
        2_392_064,
    ),
    "medical": (
        *(16, 32.0, ("vision_encoder", "detr_encoder", "detr_decoder"), "data/medical/train"),
        *(2, 5e-5, 30, {"tumor": "tumor", "lesion": "lesion", "organ": "organ"}, 5_177_344),
    ),
    "driving": (
        *(12, 24.0, ("vision_encoder", "text_encoder", "detr_decoder"), "data/driving/train"),
        *(4, 1e-4, 20),
        {"pedestrian": "pedestrian", "vehicle": "vehicle"}
        | {"traffic_sign": "traffic sign", "road": "road"},
        5_947_392,
    ),
    "agriculture": (
        *(8, 16.0, ("vision_encoder", "detr_decoder"), "data/crops/train", 4, 1e-4, 15),
        {"diseased": "diseased leaf", "ripe": "ripe fruit", "pest": "pest"},
        2_392_064,
    ),
}
each_use_case = pytest.mark.parametrize("name", USE_CASES)


def config_of(name: str) -> Config:
    """The configuration of a use case."""
    return load_config(ROOT / "configs" / f"{name}_config.yaml", {})


def head_of(name: str) -> list[list[str]]:
    """The commands that a configuration file begins with."""
    text = (ROOT / "configs" / f"{name}_config.yaml").read_text(encoding="utf-8")
    head = [line[1:] for line in text.splitlines() if line.startswith("#")]
    return list(find_commands("\n".join(["```", *head, "```"])))


def write_source(folder: Path, names: list[str]) -> None:
    """annotations.json and images/ as the heads name them: two photos with an object a category."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in (1, 2):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 96, "height": 64})
        for category in range(1, len(names) + 1):
            x = 20 * category - 16
            record = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            record |= {"bbox": [x, 8, 16, 40], "area": 640, "iscrowd": 0}
            record["segmentation"] = [[x, 8, x + 16, 8, x + 16, 48, x, 48]]
            annotations.append(record)
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")


@each_use_case
def test_a_use_case_sets_this_and_nothing_else(name: str) -> None:
    rank, alpha, components, data, batch, rate, epochs, *_ = USE_CASES[name]
    overrides = {f"lora_apply_to_{part}": part in components for part in COMPONENTS}
    overrides |= {"lora_rank": rank, "lora_alpha": alpha, "train_data_path": data}
    overrides |= {"batch_size": batch, "learning_rate": rate, "num_epochs": epochs}
    assert config_of(name) == load_config(None, overrides | {"output_dir": f"outputs/{name}"})


def test_use_cases_share_no_folder() -> None:
    every = [load_config(path, {}) for path in (ROOT / "configs").glob("*.yaml")]
    assert len({config.output.output_dir for config in every}) == len(every) >= 8


@pytest.mark.scripts
def test_use_cases_have_their_parameter_counts_on_sam3() -> None:
    for name, (*_, parameters) in USE_CASES.items():
        with torch.device("meta"):
            model = Sam3Model(Sam3Config())
        apply_lora(model, lora_config(config_of(name)))
        assert count_parameters(model)[0] == parameters, name


@pytest.mark.slow
@each_use_case
def test_a_use_case_is_predicted_at_full_size(name: str, capsys: pytest.CaptureFixture) -> None:
    path = ROOT / "configs" / f"{name}_config.yaml"
    assert train_sam3_lora.main(["--config", str(path), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"{USE_CASES[name][-1]:,}" in shown and "largest batch_size" in shown


@pytest.mark.scripts
@each_use_case
def test_the_commands_of_a_use_case_run_as_written(
    name: str, published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Converts, trains twice, evaluates and predicts; then the dry run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    *_, data, _, _, _, prompts, _ = USE_CASES[name]
    write_source(tmp_path, list(prompts))
    commands = head_of(name)
    assert [words[1] for words in commands] == [
        *("train_sam3_lora.py", "train_sam3_lora.py", "prepare_data.py", "inference.py")
    ]
    *training, convert, predict = commands
    photo = Path(predict[predict.index("--image") + 1])
    Image.open(tmp_path / "images" / "1.jpg").save(photo)
    small = ["--device", "cpu", "--num_workers", "0"]

    def run(words: list[str], *more: str) -> None:
        code = load_script(ROOT / words[1]).main([*words[2:], *more])
        assert code == 0, shlex.join([*words, *more])

    run(convert)
    for words in training:
        run(words, *small, "--max_steps", "2")
    adapter = torch.load(f"outputs/{name}/best_model/lora_weights.pt", weights_only=True)
    assert adapter["step"] == 2 and adapter["categories"] == prompts
    moved = [value.abs().max() > 0 for key, value in adapter["lora"].items() if "lora_B" in key]
    assert all(moved) and moved
    run(predict, "--threshold", "0", "--device", "cpu")
    asked = predict[predict.index("--text_prompt") + 1 : predict.index("--output")]
    assert asked == list(prompts.values())
    found = Path(predict[-1])
    assert found.is_file()
    detections = json.loads(found.with_name(f"{found.stem}_detections.json").read_text())
    assert {item["prompt"] for item in detections} == set(asked)
    args = ["--lora_weights", f"outputs/{name}/best_model", "--data_dir", str(Path(data).parent)]
    assert evaluate_sam3_lora.main([*args, "--split", "train", *small]) == 0
    table = capsys.readouterr().out
    assert all(text in table for text in asked)
    run(training[0], "--dry_run", "--device", "cpu")
    assert "largest batch_size" in capsys.readouterr().out
