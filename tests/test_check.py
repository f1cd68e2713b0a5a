"""What `--check` says of data and settings, and the whole of it on runs that would and would not
go."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_sam3_lora
from sam3_lora import memory, preflight
from sam3_lora.coco import read_split
from sam3_lora.loader import Plan
from sam3_lora.notices import find_notices
from sam3_lora.options import Config
from sam3_lora.overview import MOST_OPENED, check_split


def states(findings) -> list[str]:
    return [finding.state for finding in findings]


def remove(name):
    return lambda folder: (folder / name).unlink()


# The data -----------------------------------------------------------------------------------------


@pytest.fixture
def split_dir(run_data, tmp_path):
    return shutil.copytree(run_data / "train", tmp_path / "data" / "train")


def change(folder, edit) -> None:
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_a_split_is_counted(split_dir):
    findings, split = check_split("train", split_dir)
    assert len(split.images) == 5
    assert [str(finding) for finding in findings] == [
        f"ok       train      {split_dir}: 5 images (1 without an object), 8 objects (all with "
        'masks), 2 prompts: "red part", "blue part"'
    ]


def test_the_first_images_alone_are_counted(split_dir):
    (found,), split = check_split("val", split_dir, 2)
    assert len(split.images) == 2 and "2 images, 4 objects" in found.found


def test_boxes_alone_are_called_so(split_dir):
    change(split_dir, lambda c: [row.update(segmentation=[]) for row in c["annotations"]])
    assert "8 objects (boxes only)" in check_split("train", split_dir)[0][0].found
    change(split_dir, lambda c: c["annotations"][0].update(segmentation=[[0, 0, 9, 0, 9, 9]]))
    assert "8 objects (1 with masks)" in check_split("train", split_dir)[0][0].found


def remove_photo(folder):
    next(iter(sorted((folder / "images").iterdir()))).unlink()


def turn_photo(folder):
    path = next(iter(sorted((folder / "images").iterdir())))
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)


def unknown_category(folder):
    change(folder, lambda c: c["annotations"][0].update(category_id=77))


BROKEN = {
    "a photo is missing": (remove_photo, "expected 5 images, found 4; the first that is not"),
    "a photo is turned": (turn_photo, "expected 96 x 64 pixels as annotated, found 64 x 96"),
    "an unknown category": (unknown_category, "expected category_id to be an id in the file"),
    "no annotations": (remove("annotations.json"), "expected annotations.json with images/"),
    "broken JSON": (lambda f: (f / "annotations.json").write_text("{"), "expected JSON in"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_split_that_training_would_refuse(split_dir, case):
    spoil, message = BROKEN[case]
    spoil(split_dir)
    findings, split = check_split("train", split_dir)
    assert states(findings) == ["error"] and split is None
    assert message in findings[0].found


def test_faults_that_training_survives_are_warnings_a_kind_a_line(split_dir):
    long = " ".join(["word"] * 40)

    def edit(content):
        content["prompts"] = {"red_part": long}
        content["categories"] += [{"id": 8, "name": "green"}, {"id": 9, "name": "grey"}]

    change(split_dir, edit)
    findings, split = check_split("train", split_dir)
    assert split is not None and states(findings) == ["ok", "warning", "warning"]
    unused, tokens = (finding.found for finding in findings[1:])
    assert "category 'green' has no object" in unused
    assert f"the other 1: python prepare_data.py validate --data_dir {split_dir.parent}" in unused
    assert "has at least 42 tokens" in tokens and "32" in tokens


def test_of_many_images_a_part_is_opened(split_dir, monkeypatch):
    opened = []
    monkeypatch.setattr("sam3_lora.overview.MOST_OPENED", 2)
    monkeypatch.setattr("sam3_lora.overview.check_images", lambda s: opened.extend(s.images))
    assert states(check_split("train", split_dir)[0]) == ["ok"]
    assert [image["id"] for image in opened] == [1, 4] and MOST_OPENED >= 1000


# Data and settings together -----------------------------------------------------------------------


def notices(split_dir, images: int | None = None, **changed) -> list[str]:
    training = dataclasses.replace(Config().training, **{"batch_size": 2, **changed})
    split = val = read_split(split_dir)
    if images:
        split = dataclasses.replace(split, images=split.images[:1] * images)
    plan = Plan(len(split.images), training.batch_size, 10, None, training.warmup_steps)
    config = dataclasses.replace(Config(), training=training)
    return find_notices(config, split, plan, masks=True, validation=True, val=val)


def test_a_sound_run_has_no_notice(split_dir):
    assert notices(split_dir, images=200) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "5 images to train on: with under 100"),
        ({"batch_size": 8}, "batch_size 8: the training split fills 5"),
        ({"learning_rate": 0.02}, "learning_rate 0.02: SAM 3 takes 0.0001"),
        ({"cache_views": 3}, "without effect: cache_views with cache_features off"),
        ({"warmup_steps": 100}, "warmup_steps: 3, a tenth of this short run"),
    ],
)
def test_what_a_run_should_know(split_dir, changed, words):
    assert any(text.startswith(words) for text in notices(split_dir, **changed))


def test_data_without_validation_objects_or_masks(split_dir):
    split, plan = read_split(split_dir), Plan(5, 2, 10, None, 0)
    without = find_notices(Config(), split, plan, masks=False, validation=False)
    assert any(text.startswith("no validation split") for text in without)
    assert any(text.startswith("the training split has no masks") for text in without)
    empty = dataclasses.replace(split, annotations={key: [] for key in split.annotations})
    text = " ".join(find_notices(Config(), empty, plan, masks=False, validation=True))
    assert "has no object" in text and "has no masks" not in text


def test_figures_that_validation_cannot_give_are_told_once_before(split_dir):
    split, plan = read_split(split_dir), Plan(200, 2, 10, None, 0)

    def told(val) -> list[str]:
        words = find_notices(Config(), split, plan, masks=True, validation=True, val=val)
        return [text for text in words if "cannot be measured" in text]

    assert told(split) == [] == told(None)
    full = dataclasses.replace(split, images=split.images[:2])
    assert told(full) == [
        "validation: cgf1 and false_positive_rate cannot be measured, as no image lacks a "
        "category: keep images without the object to measure false alarms"
    ]
    (text,) = told(dataclasses.replace(split, images=split.images[-1:]))
    assert text.startswith("the validation split has no object: ap, ap50, cgf1 and iou")


# Whole runs ---------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.fixture
def checked(train_args, tmp_path, capsys, monkeypatch):
    """`checked(*flags) -> (exit code, lines)`; sees that nothing was written."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> tuple[int, list[str]]:
        before = contents(tmp_path)
        code = train_sam3_lora.main(train_args(tmp_path / "run", "--check", *flags))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        assert contents(tmp_path) == before
        return code, captured.out.splitlines()

    return run


@pytest.fixture
def no_trace(monkeypatch):
    """No prediction of memory, which takes most of the time; other tests make one."""
    monkeypatch.setattr(memory, "predict", lambda *_, **__: {"peak": 10**6})


def names(lines: list[str], state: str) -> list[str]:
    return [line.split()[1] for line in lines[:-1] if line.split()[0] == state]


@pytest.mark.scripts
def test_a_run_that_will_go(checked):
    code, lines = checked("--device", "cpu")
    assert code == 0 and names(lines, "error") == []
    said = names(lines, "ok")
    for name in ("python", "packages", "precision", "weights", "train", "val", "output"):
        assert name in said
    for name in ("adapters", "run", "memory", "disk"):
        assert name in said
    assert lines[-1].endswith("ready to train")
    assert any("6 steps in 3 epochs" in line for line in lines)


@pytest.mark.scripts
def test_everything_wrong_at_once_is_all_told(checked, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    flags = ("--device", "cuda:99", "--train_data_path", "nowhere", "--resume")
    flags += ("--lora_target_modules", "nope", "--wandb")
    code, lines = checked(*flags)
    assert code == 2
    wrong = ["device", "train", "output", "adapters"]
    assert [name for name in names(lines, "error") if name != "packages"] == wrong
    assert lines[-1].startswith(("4 errors", "5 errors"))


@pytest.mark.scripts
def test_a_validation_split_that_is_wrong_is_not_said_to_be_absent(checked, no_trace):
    code, lines = checked("--val_data_path", "nowhere", "--early_stopping_patience", "2")
    assert code == 2 and names(lines, "error") == ["val"]
    assert not any("no validation split" in line for line in lines)


@pytest.mark.scripts
def test_settings_that_cannot_go_together_are_told_with_the_rest(checked, no_trace):
    flags = ("--cache_features", "ram", "--lora_apply_to_vision_encoder", "true")
    code, lines = checked(*flags)
    assert code == 2 and names(lines, "error") == ["run"]
    assert any("expected a frozen vision encoder" in line for line in lines)
    code, lines = checked("--cache_features", "disk", "--cache_limit_gb", "1e-9")
    assert code == 2 and any("training.cache_limit_gb" in line for line in lines)
    assert names(lines, "error") == ["features"] and "memory" in names(lines, "ok")
    code, lines = checked("--cache_features", "disk")
    assert code == 0 and any("features" in line and "disk" in line for line in lines)


@pytest.mark.scripts
def test_the_published_model_is_checked_without_its_weights(checked, no_trace, monkeypatch):
    monkeypatch.setattr(preflight, "try_to_load_from_cache", lambda *_: None)
    code, lines = checked("--model_name", "facebook/sam3")
    assert code == 2 and names(lines, "error") == ["weights"]
    assert {"adapters", "run", "disk"} <= set(names(lines, "ok"))
    code, lines = checked("--model_name", "someone/else")
    assert code == 2 and "model" in names(lines, "warning")


@pytest.mark.scripts
def test_a_run_to_go_on_with(checked, no_trace, train_args, tmp_path):
    assert train_sam3_lora.main(train_args(tmp_path / "run")) == 0
    code, lines = checked("--resume")
    assert code == 0 and "run" in names(lines, "warning")
    assert any("step 6 is done; it is finished: raise --max_steps" in line for line in lines)
    code, lines = checked("--resume", "--max_steps", "9")
    assert code == 0 and any("9 steps" in line and "step 6 is done" in line for line in lines)
    code, lines = checked("--resume", "--learning_rate", "1e-5")
    assert code == 2 and names(lines, "error") == ["output"]
    start = str(tmp_path / "run" / "best_model" / "lora_weights.pt")
    code, lines = checked("--init_lora_weights", start)
    assert code == 0 and any("will be renamed to run.1" in line for line in lines)
    code, lines = checked("--init_lora_weights", start, "--lora_rank", "4")
    assert code == 2 and names(lines, "error") == ["adapters"]
    saved = tmp_path / "run" / "config.yaml"
    settings = saved.read_text()
    saved.write_text("")
    code, lines = checked("--resume")
    assert code == 2 and any("expected the settings of the run in" in line for line in lines)
    saved.write_text(settings)
    state = tmp_path / "run" / "checkpoint-6" / "training_state.pt"
    for spoil in (lambda: torch.save({"step": 6}, state), lambda: state.write_text("damaged")):
        spoil()
        code, lines = checked("--resume")
        assert code == 2 and names(lines, "error") == ["output"]
        assert any("remove that folder to go on from" in line for line in lines)


@pytest.mark.scripts
def test_of_several_processes_the_first_alone_speaks(checked, no_trace, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert checked() == (0, [])
    monkeypatch.setitem(os.environ, "RANK", "0")
    code, lines = checked("--device", "cpu")
    assert code == 0 and any("8 images a step in 2 processes" in line for line in lines)


@pytest.mark.scripts
def test_check_and_dry_run_are_one_too_many(train_args, tmp_path, capsys):
    assert train_sam3_lora.main(train_args(tmp_path / "run", "--check", "--dry_run")) == 2
    assert "output.check and output.dry_run are both on" in capsys.readouterr().err
