"""Evaluation: what a split's figures read, how a model is chosen and loaded, what is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate_sam3_lora
from lora_layers import LoRAConfig, apply_lora, load_lora_state_dict, lora_modules
from sam3_lora import checkpoint, evaluation, processes
from sam3_lora.coco import CocoSplit
from sam3_lora.config import Config, save_config
from sam3_lora.forward import Forward
from sam3_lora.model import cast_towers, load_model

SIDE = 8  # of the images made here, pixels
QUERIES = 4
LORA = LoRAConfig(
    rank=2, alpha=4.0, target_modules=("v_proj",), components=("vision_encoder", "detr_decoder")
)


class Drawn:
    """A model of which the logits (rows, queries) are given: every box and mask is the image."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def encode(self, batch: dict) -> dict:
        return {}

    def predict(self, features: dict, batch: dict, rows: slice) -> dict:
        logits = self.logits[rows]
        count = len(logits)
        return {
            "logits": logits[None],
            "presence": torch.full((1, count), 50.0),
            "boxes_cxcywh": torch.tensor([0.5, 0.5, 1, 1]).expand(1, count, QUERIES, 4),
            "mask_embed": torch.ones(count, QUERIES, 1),
            "pixel_embed": torch.ones(count, 1, 2, 2),
        }


def evaluate(logits: torch.Tensor, max_rows: int, max_detections: int, objects: int):
    """Evaluates one image, which one object of each of the first categories fills."""
    count = len(logits)
    record = {"id": 7, "file_name": "a.png", "width": SIDE, "height": SIDE}
    whole = {"bbox": [0.0, 0.0, SIDE, SIDE], "area": SIDE**2, "iscrowd": 0}
    whole["segmentation"] = [[0, 0, SIDE, 0, SIDE, SIDE, 0, SIDE]]
    annotations = [{**whole, "id": c, "category_id": c} for c in range(1, objects + 1)]
    names = {c: f"c{c}" for c in range(1, count + 1)}
    split = CocoSplit(Path("a.json"), Path("."), [record], {7: annotations}, names, {})
    batch = {
        "image_ids": [7],
        "original_sizes": [(SIDE, SIDE)],
        "image_index": torch.zeros(count, dtype=torch.long),
        "texts": list(names.values()),
        "category_ids": list(names),
        "targets": [None] * count,
    }
    return evaluation.evaluate_split(
        Drawn(logits),
        lambda *_: {"loss": torch.zeros(())},
        lambda _: {"targets": 1, "masked_targets": 1},
        [batch],
        split,
        max_rows=max_rows,
        max_detections=max_detections,
        score_threshold=0.5,
    )


@pytest.mark.parametrize("max_rows", [1, 3, 100])
def test_all_that_score_count_beyond_the_best_of_an_image(max_rows) -> None:
    # Each prompt fires once, the first ones most surely; the best two are all that AP reads.
    logits = torch.full((6, QUERIES), -5.0)
    logits[:, 0] = torch.linspace(5, 1, 6)
    summary, results = evaluate(logits, max_rows, max_detections=2, objects=5)
    assert summary["mask_iou"] == summary["box_iou"] == pytest.approx(1)
    assert summary["cgf1"]["IL_recall"] == pytest.approx(1)
    assert summary["cgf1"]["positive_micro_F1"] == pytest.approx(1, abs=1e-3)
    assert summary["false_positive_rate"] == 1  # the sixth
    assert [c["AP"] for c in summary["segm"]["per_category"]] == pytest.approx(
        [1, 1, 0, 0, 0, None]
    )
    assert [r["category_id"] for r in results] == [1, 2, 3, 4, 5, 6]


def test_cut_rows_give_the_same_and_draw_no_masks_in_vain(monkeypatch) -> None:
    drawn = []
    encode = evaluation.encode_mask
    monkeypatch.setattr(evaluation, "encode_mask", lambda m: drawn.append(1) or encode(m))
    logits = torch.randn(40, QUERIES, generator=torch.Generator().manual_seed(0)) - 4
    logits[0] = 3.0  # at once four certain ones: AP's limit is full after the first chunk
    whole = evaluate(logits, 100, max_detections=4, objects=3)
    kept = len(drawn)
    drawn.clear()
    assert evaluate(logits, 1, max_detections=4, objects=3) == whole
    assert len(drawn) == kept == 4
    # All below the threshold: what is not among the best so far is not drawn.
    drawn.clear()
    falling = torch.linspace(-3, -6, 160).reshape(40, QUERIES)
    assert len(evaluate(falling, 1, max_detections=4, objects=3)[1]) == len(drawn) == 4


@pytest.fixture(scope="module")
def adapter_file(tiny_model_dir, save_random_adapter, tmp_path_factory) -> Path:
    """An adapter whose update of any weight is far below bf16's resolution."""
    path = tmp_path_factory.mktemp("adapter") / "lora_weights.pt"
    return save_random_adapter(path, tiny_model_dir, LORA, spread=1e-5, geometry_cls="hf")


def loaded(adapter_file: Path, precision: str, weights: bool = True) -> Forward:
    adapter = checkpoint.read_adapter(adapter_file)
    given = (adapter_file, adapter) if weights else ()
    return evaluation.load_forward(adapter["base_model"], "hf", "cpu", precision, *given)


def vision_features(forward: Forward) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 112, 112), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        return forward.encode({"images": images, "texts": ["a"]})["fpn_2"].float()


def test_a_small_update_is_not_lost_to_rounding(adapter_file) -> None:
    forward = loaded(adapter_file, "bf16")
    layers = [layer for _, layer in lora_modules(forward.model)]
    assert {layer.lora_A.dtype for layer in layers} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in forward.model.parameters())
    # As training sets a model up.
    content = checkpoint.read_adapter(adapter_file)
    model, tokenizer = load_model(content["base_model"])
    apply_lora(model, content["lora_config"])
    load_lora_state_dict(model, content["lora"])
    cast_towers(model, torch.bfloat16)
    trained = Forward(model.eval(), tokenizer, "hf", torch.bfloat16)
    weights = [dict(f.model.named_parameters()) for f in (forward, trained)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert torch.equal(vision_features(forward), vision_features(trained))


def test_in_fp32_the_adapter_is_merged(adapter_file) -> None:
    forward, base = loaded(adapter_file, "no"), loaded(adapter_file, "no", weights=False)
    layers = [layer for _, layer in lora_modules(forward.model)]
    assert layers and all(layer.merged for layer in layers)
    features = vision_features(forward), vision_features(base)
    assert not torch.equal(*features) and torch.allclose(*features, atol=1e-2)


OWN = {"base_model": "theirs", "geometry_cls": "hf"}
CASES = {
    # flags, config's (name, geometry_cls), adapter -> resolved, warning
    "defaults": ({}, ("d", "meta"), {}, ("d", "meta"), ""),
    "YAML alone": ({"config": "c"}, ("y", "hf"), {}, ("y", "hf"), ""),
    "adapter": ({}, ("d", "meta"), OWN, ("theirs", "hf"), ""),
    "adapter and YAML": (
        *({"config": "c"}, ("theirs", "meta"), OWN, ("theirs", "hf")),
        "model_geometry_cls: hf of the adapter, not meta of the config",
    ),
    "a flag": (
        *({"model_name": "f"}, ("f", "meta"), OWN, ("f", "hf")),
        "--model_name is f, the adapter was trained with theirs",
    ),
    "both flags": (
        *({"model_name": "theirs", "model_geometry_cls": "meta"}, ("theirs", "meta"), OWN),
        *(("theirs", "meta"), "--model_geometry_cls is meta, the adapter was trained with hf"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_flags_adapter_and_config(case, caplog) -> None:
    flags, (name, geometry_cls), adapter, resolved, warning = CASES[case]
    configured = {"name": name, "geometry_cls": geometry_cls}
    assert evaluation.resolve_model(configured, flags, adapter) == resolved
    assert [record.getMessage() for record in caplog.records] == ([warning] if warning else [])


@pytest.fixture(scope="module")
def data_dir(write_split, tmp_path_factory) -> Path:
    return write_split(tmp_path_factory.mktemp("evaluated"), 3)


@pytest.fixture
def run(data_dir, capsys):
    """Runs evaluate_sam3_lora.py on the CPU; returns (exit code, stderr)."""

    def call(*words) -> tuple[int, str]:
        argv = ["--data_dir", str(data_dir), "--device", "cpu", "--num_workers", "0"]
        code = evaluate_sam3_lora.main([*argv, *map(str, words)])
        return code, capsys.readouterr().err

    return call


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_the_base_of_an_adapter_and_of_a_config(
    run, adapter_file, tiny_model_dir, tmp_path
) -> None:
    config = Config()
    section = replace(config.model, name=str(tiny_model_dir), geometry_cls="hf")
    save_config(replace(config, model=section), tmp_path / "config.yaml")
    runs = {
        "adapter": ("--lora_weights", adapter_file),
        "its_base": ("--lora_weights", adapter_file, "--base"),
        "config": ("--base", "--config", tmp_path / "config.yaml"),
        "flag": ("--base", "--config", tmp_path / "config.yaml", "--model_geometry_cls", "meta"),
    }
    losses = {}
    for name, words in runs.items():
        code, err = run(*words, "--output_dir", tmp_path / name)
        assert code == 0 and "WARNING" not in err, err
        metrics = read_metrics(tmp_path / name)
        losses[name] = metrics["losses"]
        expected = f"{tiny_model_dir}" + (f" + {adapter_file}" if name == "adapter" else "")
        assert metrics["model"] == expected
    assert losses["its_base"] == losses["config"]
    assert losses["adapter"] != losses["its_base"] != losses["flag"]


def test_an_adapter_is_read_once(run, adapter_file, tmp_path, monkeypatch) -> None:
    reads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: reads.append(a) or load(*a, **k))
    assert run("--lora_weights", adapter_file, "--output_dir", tmp_path / "out")[0] == 0
    assert len(reads) == 1


def test_off_a_terminal_the_log_tells_how_far_it_is(run, adapter_file, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LINE_SECONDS", 0)
    for words in ([], ["--tile", 0.6]):
        words = ["--lora_weights", adapter_file, "--output_dir", tmp_path / "out", *words]
        code, err = run(*words, "--overwrite")
        assert code == 0 and "INFO 2 of 3 images" in err


def test_an_earlier_evaluation_is_renamed_or_replaced(run, adapter_file, tmp_path) -> None:
    copy = tmp_path / "best_model" / "lora_weights.pt"
    copy.parent.mkdir()
    shutil.copyfile(adapter_file, copy)
    words = ["--lora_weights", copy, "--max_val_images", 1]
    assert run(*words)[0] == 0
    code, err = run("--lora_weights", copy.parent)
    assert code == 0 and "held an earlier evaluation: renamed to" in err
    names = {path.name for path in copy.parent.iterdir()}
    assert names == {"lora_weights.pt", "evaluation_val", "evaluation_val.1"}
    counts = [read_metrics(copy.parent / f"evaluation_val{n}")["counts"] for n in ("", ".1")]
    assert [c["images"] for c in counts] == [3, 1]
    code, err = run(*words, "--overwrite")
    assert code == 0 and "renamed" not in err
    assert read_metrics(copy.parent / "evaluation_val")["counts"]["images"] == 1
    assert {path.name for path in copy.parent.iterdir()} == names
    # What else there is in the folder, such as the adapter, is never renamed with an evaluation.
    beside = [*words, "--output_dir", copy.parent]
    assert run(*beside)[0] == 0
    code, err = run(*beside)
    assert code == 2 and "found evaluation_val;" in err and copy.exists()


def test_a_limit_cuts_the_split_before_its_data_set_is_built(
    run, adapter_file, tmp_path, monkeypatch
) -> None:
    built = []
    make = evaluate_sam3_lora.PromptDataset
    monkeypatch.setattr(
        evaluate_sam3_lora,
        "PromptDataset",
        lambda split, *a, **k: built.append(len(split.images)) or make(split, *a, **k),
    )
    words = ["--lora_weights", adapter_file, "--output_dir", tmp_path / "out"]
    code, err = run(*words, "--max_val_images", 2)
    assert code == 0 and built == [2] and "2 of 3 images" in err
    results = json.loads((tmp_path / "out" / "detections.json").read_text(encoding="utf-8"))
    assert len({row["image_id"] for row in results}) == 2
    assert np.isfinite(read_metrics(tmp_path / "out")["losses"]["loss"])


@pytest.mark.parametrize("flag", ["--best_metric", "--learning_rate"])
def test_flags_that_are_not_read_are_refused(run, flag) -> None:
    code, err = run("--base", flag, "1")
    assert code == 2 and f"unknown flag {flag}" in err


def test_the_commands_of_the_help_parse() -> None:
    lines = evaluate_sam3_lora.__doc__.splitlines()
    commands = [line.split()[2:] for line in lines if line.startswith("    python")]
    assert len(commands) == 7
    for words in commands:
        evaluate_sam3_lora.build_parser().parse_args(words)


def test_a_file_in_the_place_of_the_output_is_refused_at_once(run, adapter_file, tmp_path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    code, err = run("--lora_weights", adapter_file, "--output_dir", tmp_path / "out")
    assert code == 2 and "--output_dir: expected a folder, found the file" in err
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"
