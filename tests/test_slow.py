"""Opt-in checks that take minutes: `python -m pytest -m slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

import evaluate_sam3_lora
import prepare_data
from sam3_lora import engine
from sam3_lora.coco import read_split
from sam3_lora.dataset import PromptDataset
from sam3_lora.forward import Forward
from sam3_lora.loader import build_loader, epoch_batches
from sam3_lora.losses import compute_losses, count_targets
from sam3_lora.model import image_size, load_model, num_queries

ROOT = Path(__file__).resolve().parent.parent
FOUR_PHOTOS = {153299, 184321, 331352, 403385}


def train_every_weight(folder, data, steps):
    """Trains a folder's model on a split with Meta's losses, in place; 4 images a step."""
    model, tokenizer = load_model(str(folder))
    model.requires_grad_(True)
    dataset = PromptDataset(
        read_split(data), image_size(model), num_queries(model), train=True, augment=False
    )
    epochs = range(steps * 4 // len(dataset) + 1)
    batches = [b for e in epochs for b in epoch_batches(len(dataset), 4, e, 0, True)]
    records = engine.train_one_epoch(
        Forward(model, tokenizer, one_to_many=True),
        compute_losses,
        count_targets,
        build_loader(dataset, batches[:steps], num_workers=2),
        engine.build_optimizer(model, 1e-3, 1e-4),
        lambda step: engine.lr_factor("cosine", step, steps, steps // 10),
        engine.Limits(images=4, rows=32),
        max_grad_norm=1.0,
    )
    assert sum(1 for _ in records) == steps
    model.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.real_data
def test_every_weight_trainable_overfits_four_photos(real_data, demo_model, tmp_path):
    """The whole pipeline can learn: four photos of tinycoco, asked for all 80 categories."""
    source = real_data / "tinycoco"
    content = json.loads((source / "annotations" / "instances_train2017.json").read_text())
    content["images"] = [i for i in content["images"] if i["id"] in FOUR_PHOTOS]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in FOUR_PHOTOS]
    (tmp_path / "four.json").write_text(json.dumps(content))
    converted = prepare_data.main(
        ["coco", "--coco_json", str(tmp_path / "four.json"), "--output_dir", str(tmp_path / "data")]
        + ["--images_dir", str(source / "images" / "train2017"), "--split", "train"]
    )
    assert converted == 0
    folder = demo_model.make_tiny(tmp_path / "model", "tiny112")
    train_every_weight(folder, tmp_path / "data" / "train", steps=800)
    evaluated = evaluate_sam3_lora.main(
        ["--base", "--model_name", str(folder), "--data_dir", str(tmp_path / "data")]
        + ["--split", "train", "--output_dir", str(tmp_path / "evaluation")]
    )
    assert evaluated == 0
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert len(metrics["segm"]["per_category"]) == 80
    assert metrics["segm"]["AP50"] >= 0.8


@pytest.mark.slow
def test_a_full_size_step_of_the_minimal_preset_fits_20_gb(demo_model, write_split, tmp_path):
    """The default `Sam3Config`, 840 M random weights, one image with 3 prompts, on the CPU."""
    model = Sam3Model(Sam3Config())
    model.save_pretrained(tmp_path / "model")
    del model
    processor = Sam3Processor(Sam3ImageProcessor(), demo_model.make_tokenizer())
    processor.save_pretrained(tmp_path / "model")
    write_split(tmp_path, 2, "train")
    # A process of its own, so that its peak memory is the step's.
    done = subprocess.run(
        [sys.executable, ROOT / "train_sam3_lora.py"]
        + ["--config", ROOT / "configs" / "minimal_lora_config.yaml", "--model_name"]
        + [tmp_path / "model", "--train_data_path", tmp_path / "data" / "train"]
        + ["--output_dir", tmp_path / "run", "--batch_size", "1", "--max_steps", "1"]
        + ["--logging_steps", "1", "--num_workers", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert "516,096 trainable" in done.stderr
    assert row["memory_gb"] <= 20
    sys.stdout.write(f"one step: {1 / row['it_per_s']:.0f} s, {row['memory_gb']:.1f} GB\n")
