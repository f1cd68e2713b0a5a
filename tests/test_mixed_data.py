"""Data with masks, with boxes, with both or neither: through the loss, and through the scripts."""

import json
from pathlib import Path

import pytest
import torch
from test_losses import SEMANTIC_TERMS, random_outputs, random_targets, take_rows

import evaluate_sam3_lora
import train_sam3_lora
from sam3_lora.losses import compute_losses, count_targets

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "minimal_lora_config.yaml"

# The loss -----------------------------------------------------------------------------------------


def test_masks_of_box_only_objects_never_enter():
    targets = random_targets([3, 2])
    targets[0]["has_mask"][1] = targets[1]["has_mask"][:] = False
    found = []
    for junk in (False, True):
        for target in targets:
            target["masks"][~target["has_mask"]] = junk
        outputs = random_outputs(2, targets=targets)
        losses = compute_losses(outputs, targets, count_targets(targets))
        losses["loss"].backward()
        found.append([*losses.values(), *(value.grad for value in outputs.values())])
        assert all(torch.isfinite(value).all() for value in found[-1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_mixed_row_is_the_sum_of_its_parts():
    """Row 0 has a mask for one of two objects; each part alone is divided by the same counts."""
    mixed = random_targets([2, 1])
    mixed[0]["has_mask"][1] = False
    every = random_targets([2, 1])
    outputs = random_outputs(2, one_to_many=False, targets=every)
    counts = count_targets(mixed)
    assert counts == {"targets": 3, "masked_targets": 2, "rows": 2, "semantic_rows": 1}
    whole, full = (compute_losses(outputs, t, counts) for t in (mixed, every))
    only = [t | {"has_mask": t["has_mask"] & False} for t in every]
    only[0]["has_mask"] = torch.tensor([False, True])
    missing = compute_losses(outputs, only, counts)  # the mask that the mixed row lacks
    for name in ("loss_mask", "loss_dice"):
        assert float(missing[name].detach()) > 0
        torch.testing.assert_close(whole[name] + missing[name], full[name])
    for name in ("loss_bbox", "loss_giou", "loss_ce", "presence_loss"):
        assert torch.equal(whole[name], full[name])
    second = compute_losses(take_rows(outputs, slice(1, 2)), mixed[1:], counts)
    for name in SEMANTIC_TERMS:
        assert torch.equal(whole[name], second[name])


def test_a_union_of_some_objects_is_no_union():
    targets = random_targets([2, 2])
    targets[0]["complete"] = torch.tensor(False)
    outputs = random_outputs(2, targets=targets)
    counts = count_targets(targets)
    assert counts["masked_targets"] == 4 and counts["semantic_rows"] == 1
    compute_losses(outputs, targets, counts)["loss"].backward()
    assert float(outputs["semantic"].grad[0].abs().max()) == 0
    assert float(outputs["semantic"].grad[1].abs().max()) > 0


# The scripts --------------------------------------------------------------------------------------

MASK_TERMS = {"loss_mask", "loss_dice", *SEMANTIC_TERMS}
# What each object of an image is left with, by its number; None leaves the image without objects.
KINDS = {
    "masks alone": lambda image, number: {"bbox"},
    "boxes alone": lambda image, number: {"segmentation"},
    "both in one row": lambda image, number: {"segmentation"} if number % 2 else set(),
    "an image without masks": lambda image, number: {"segmentation"} if image == 0 else set(),
}


def write_kind(source: Path, kind: str) -> Path:
    """Takes boxes or masks from a COCO export, whose objects are all of one category then."""
    content = json.loads((source / "source.json").read_text())
    for number, row in enumerate(content["annotations"]):
        row["category_id"] = 1
        for key in KINDS[kind](row["image_id"], number):
            del row[key]
    (source / "_annotations.coco.json").write_text(json.dumps(content))
    return source


@pytest.mark.scripts
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_and_is_evaluated(kind, write_source, tiny_model_dir, tmp_path, capsys):
    for split in ("train", "val"):
        write_kind(write_source(tmp_path / split, 3), kind)  # two images with objects, one without
    output = tmp_path / "run"
    args = ["--config", str(CONFIG), "--model_name", str(tiny_model_dir), "--num_workers", "0"]
    args += ["--train_data_path", str(tmp_path / "train"), "--output_dir", str(output)]
    args += ["--batch_size", "2", "--max_steps", "3", "--logging_steps", "1"]
    assert train_sam3_lora.main(args) == 0
    said = capsys.readouterr().err
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps, (validation, *_) = [r for r in rows if "val" not in r], [r for r in rows if "val" in r]
    masks = kind != "boxes alone"
    assert said.count("training on boxes, without the mask loss") == (not masks)
    assert said.count("no masks: box metrics only") == (not masks)
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in steps)
    for row in steps:
        assert row.keys() >= MASK_TERMS if masks else row.keys().isdisjoint(MASK_TERMS)
    assert masks == any(row.get("loss_mask", 0) > 0 for row in steps)
    assert validation["val"]["iou"] >= 0
    args = ["--lora_weights", str(output / "best_model"), "--data_dir", str(tmp_path)]
    assert evaluate_sam3_lora.main([*args, "--num_workers", "0"]) == 0
    captured = capsys.readouterr()
    assert ("mask AP" in captured.out) == masks
    assert captured.err.count("no masks: box metrics only") == (not masks)


@pytest.mark.scripts
def test_tiles_train_and_resume(write_source, tiny_model_dir, tmp_path, capsys):
    source = write_source(tmp_path / "train", 3)
    content = json.loads((source / "source.json").read_text())
    # The random model has 16 queries: 18 boxes over the first image.
    for n in range(18):
        box = {"bbox": [10 * (n % 9), 40 * (n // 9), 8, 8], "segmentation": [], "category_id": 1}
        content["annotations"].append({**box, "image_id": 0, "id": 100 + n})
    (source / "_annotations.coco.json").write_text(json.dumps(content))
    args = ["--config", str(CONFIG), "--model_name", str(tiny_model_dir), "--num_workers", "0"]
    args += ["--train_data_path", str(source), "--over_queries", "tile", "--batch_size", "2"]
    args += ["--num_epochs", "1", "--logging_steps", "1", "--save_steps", "1"]
    weights = []
    for name, cuts in (("whole", [[]]), ("cut", [["--max_steps", "2"], ["--resume"]])):
        output = tmp_path / name
        for cut in cuts:
            flags = [*args, "--output_dir", str(output), "--lr_schedule", "constant", *cut]
            assert train_sam3_lora.main([*flags, "--warmup_steps", "0"]) == 0
        weights.append(torch.load(output / "last_model" / "lora_weights.pt", weights_only=True))
    assert "cut into 4 tiles" in capsys.readouterr().err
    first, second = weights
    assert first["step"] == second["step"] == 3  # 4 tiles and 2 photos, 2 a step
    assert all(torch.equal(value, second["lora"][name]) for name, value in first["lora"].items())
