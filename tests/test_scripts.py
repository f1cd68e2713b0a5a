"""The scripts end to end on a tiny model: `main(argv)`, what they write, what they refuse."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import read_log, run_flags

import evaluate_sam3_lora
import example_usage
import train_sam3_lora
from sam3_lora import config as config_module
from sam3_lora.forward import Forward

pytestmark = pytest.mark.scripts

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted({path.name for path in ROOT.glob("*.py")} - {"lora_layers.py"})


@pytest.fixture(scope="module")
def run_dir(tiny_model_dir, run_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    assert train_sam3_lora.main(run_flags(tiny_model_dir, run_data, output)) == 0
    return output


def test_a_run_writes_what_its_docstring_says(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        *("best_model", "last_model", "checkpoint-3", "config.yaml"),
        *("log.jsonl", "metrics.csv", "train.log", "run.lock", "curves.png", "val_panel.png"),
    }
    adapter = torch.load(run_dir / "best_model" / "lora_weights.pt", weights_only=True)
    assert adapter["categories"] == {"red_part": "red part", "blue_part": "blue part"}
    assert adapter["lora_config"]["rank"] == 8
    rows = read_log(run_dir)
    steps = [row for row in rows if "val" not in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for name in ("loss_bbox", "loss_giou", "loss_ce", "presence_loss", "loss_mask", "loss_dice"):
        assert all(np.isfinite(row[name]) for row in steps)
    assert {"train_iou", "lr", "it_per_s", "img_per_s"} <= set(steps[-1])
    validation = [row["val"] for row in rows if "val" in row]
    assert len(validation) == 1
    assert {"loss", "iou", "ap", "ap50", "cgf1", "false_positive_rate"} == set(validation[0])
    assert "trainable" in (run_dir / "train.log").read_text().splitlines()[0]


def test_the_saved_configuration_starts_the_same_run(run_dir, tiny_model_dir, tmp_path):
    again = tmp_path / "again"
    args = ["--config", str(run_dir / "config.yaml"), "--output_dir", str(again)]
    assert train_sam3_lora.main(args) == 0
    first, second = (
        torch.load(run / "last_model" / "lora_weights.pt", weights_only=True)["lora"]
        for run in (run_dir, again)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluation_of_adapter_and_base(run_dir, tiny_model_dir, run_data, tmp_path, capsys):
    arguments = ["--data_dir", str(run_data), "--split", "val", "--num_workers", "0"]
    weights = run_dir / "best_model" / "lora_weights.pt"
    assert evaluate_sam3_lora.main(["--lora_weights", str(weights), *arguments]) == 0
    table = capsys.readouterr().out
    assert "red part" in table and "IL_MCC" in table
    metrics = json.loads((weights.parent / "evaluation_val" / "metrics.json").read_text())
    # The run's last validation saw the same images with the same adapter.
    logged = [row["val"] for row in read_log(run_dir) if "val" in row][-1]
    assert metrics["losses"]["iou"] == pytest.approx(logged["iou"], abs=1e-4)
    assert metrics["segm"]["AP"] == pytest.approx(logged["ap"], abs=1e-6)
    results = json.loads((weights.parent / "evaluation_val" / "detections.json").read_text())
    # 16 queries x 2 categories, 3 images, fewer than 100 an image.
    assert len(results) == 3 * 32
    base = ["--base", "--model_name", str(tiny_model_dir), "--output_dir", str(tmp_path)]
    assert evaluate_sam3_lora.main([*base, *arguments]) == 0
    other = json.loads((tmp_path / "metrics.json").read_text())
    assert other["losses"]["loss"] != metrics["losses"]["loss"]


def test_an_earlier_run_is_set_aside_replaced_or_continued(
    run_dir, tiny_model_dir, run_data, tmp_path
):
    output = tmp_path / "run"
    args = run_flags(tiny_model_dir, run_data, output, "--save_steps", "1")
    assert train_sam3_lora.main([*args, "--max_steps", "2"]) == 0
    (output / "checkpoint-2").rename(output / "kept")
    # On another machine, without bf16 say: the gradient scaler has no earlier state.
    assert train_sam3_lora.main([*args, "--resume", "--mixed_precision", "fp16"]) == 0
    full = torch.load(run_dir / "last_model" / "lora_weights.pt", weights_only=True)
    continued = torch.load(output / "last_model" / "lora_weights.pt", weights_only=True)
    assert continued["step"] == full["step"] == 3
    assert [row["step"] for row in read_log(output) if "val" not in row] == [1, 2, 3]
    assert train_sam3_lora.main([*args, "--max_steps", "1"]) == 0
    assert (tmp_path / "run.1" / "kept").is_dir()
    assert not (output / "kept").exists()
    assert train_sam3_lora.main([*args, "--max_steps", "1", "--overwrite"]) == 0
    assert not (tmp_path / "run.2").exists()


def test_starting_from_an_adapter(run_dir, tiny_model_dir, run_data, tmp_path, capsys):
    weights = run_dir / "last_model" / "lora_weights.pt"
    args = run_flags(tiny_model_dir, run_data, tmp_path / "new", "--max_steps", "1")
    args += ["--init_lora_weights", str(weights), "--learning_rate", "1e-12"]
    assert train_sam3_lora.main(args) == 0
    before = torch.load(weights, weights_only=True)["lora"]
    after = torch.load(tmp_path / "new" / "last_model" / "lora_weights.pt", weights_only=True)
    for name, value in before.items():
        torch.testing.assert_close(after["lora"][name], value, rtol=0, atol=1e-9)
    assert train_sam3_lora.main([*args, "--lora_rank", "4"]) == 2
    assert "expected an adapter of this run's settings" in capsys.readouterr().err


def test_cached_features_train_the_same_adapter(tiny_model_dir, run_data, tmp_path, caplog):
    """Two epochs of one run, cut in the middle and resumed, against one without a cache."""
    adapters = []
    for name in ("off", "ram", "disk"):
        more = ("--cache_features", name, "--cache_dir", str(tmp_path / "cache"))
        more += ("--prompt_pool", "4", "--augment", "false", "--num_epochs", "2")
        args = run_flags(tiny_model_dir, run_data, tmp_path / name, *more)
        if name == "disk":
            steps = read_log(tmp_path / "ram")[-1]["step"]
            assert train_sam3_lora.main([*args, "--max_steps", str(steps // 2)]) == 0
            args += ["--max_steps", str(steps), "--resume"]
        assert train_sam3_lora.main(args) == 0
        adapters.append(tmp_path / name / "last_model" / "lora_weights.pt")
    plain, *cached = (torch.load(file, weights_only=True)["lora"] for file in adapters)
    # The learning rate of the run that was cut went another way.
    assert all(torch.equal(plain[name], cached[0][name]) for name in plain)
    assert (tmp_path / "cache").is_dir()
    assert "0 views to compute" in caplog.text
    assert "from features (memory, geometry" in (tmp_path / "disk" / "train.log").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--lora_apply_to_vision_encoder", "true"),
            "training.cache_features is disk: expected a frozen vision encoder, found",
        ),
        (
            ("--cache_limit_gb", "1e-6"),
            "cache_limit_gb: expected at most 1e-06 GB, found at least 0.0003",
        ),
        (("--cache_views", "0"), "training.cache_views is '0', expected a whole number at least 1"),
    ],
)
def test_features_that_cannot_be_kept(tiny_model_dir, run_data, tmp_path, capsys, flags, message):
    cache = ("--cache_features", "disk", "--cache_dir", str(tmp_path / "cache"))
    args = run_flags(tiny_model_dir, run_data, tmp_path / "run", *cache, *flags)
    assert train_sam3_lora.main(args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_a_run_stays_where_the_next_one_cannot_keep_its_features(
    tiny_model_dir, run_data, tmp_path, capsys
):
    args = run_flags(tiny_model_dir, run_data, tmp_path / "run", "--max_steps", "1")
    assert train_sam3_lora.main(args) == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    (tmp_path / "file").write_text("mine")
    cache = ("--cache_features", "disk", "--cache_dir", str(tmp_path / "file"), "--overwrite")
    assert train_sam3_lora.main([*args, *cache]) == 2
    assert "--cache_dir: expected a folder that can be written, found" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_dry_run_writes_nothing(tiny_model_dir, tmp_path, capsys):
    args = run_flags(tiny_model_dir, tmp_path / "no_data", tmp_path / "run", "--dry_run")
    assert train_sam3_lora.main(args) == 0
    text, err = capsys.readouterr()
    assert f"tracing training steps of {tiny_model_dir}" in err
    assert "detr_decoder.layers.*.self_attn.(q_proj|k_proj|v_proj|o_proj)" in text
    assert "for batch_size 2, 3 prompts an image, 8 rows per forward, bfloat16" in text
    assert "largest batch_size" in text and "24 GiB" in text
    assert list(tmp_path.iterdir()) == []
    trained = [*args, "--cache_features", "ram", "--lora_apply_to_vision_encoder"]
    assert train_sam3_lora.main(trained) == 2
    assert "expected a frozen vision encoder" in capsys.readouterr().err
    args[args.index("--model_name") + 1] = str(tmp_path)
    assert train_sam3_lora.main(args) == 2
    assert "expected config.json in the folder" in capsys.readouterr().err


def test_every_key_is_read(tiny_model_dir, run_data, tmp_path, monkeypatch):
    """A key that no run reads would be a promise to users that nothing keeps."""
    read = set()

    def recording(section_class):
        def get(self, name):
            if not name.startswith("_"):
                read.add((section_class.__name__, name))
            return object.__getattribute__(self, name)

        return get

    sections = {f.name: f.default for f in dataclasses.fields(config_module.Config)}
    cache = ("--cache_features", "disk", "--cache_dir", str(tmp_path / "cache"))
    args = run_flags(tiny_model_dir, run_data, tmp_path / "run", *cache)
    parsed = train_sam3_lora.build_parser().parse_args(args)
    config = config_module.config_from_args(parsed)
    monkeypatch.setattr(train_sam3_lora, "config_from_args", lambda _: config)
    monkeypatch.setattr(train_sam3_lora, "save_config", lambda *_: None)
    monkeypatch.setattr(train_sam3_lora, "plain_config", lambda _: {})
    for section in sections.values():
        monkeypatch.setattr(type(section), "__getattribute__", recording(type(section)))
    assert train_sam3_lora.main(args) == 0
    keys = {
        (type(section).__name__, item.name)
        for section in sections.values()
        for item in dataclasses.fields(section)
    }
    assert keys - read == set()


def test_out_of_memory(tiny_model_dir, run_data, tmp_path, monkeypatch, capsys):
    """Training and evaluation go on in smaller parts while there are any; then one line tells."""
    predict, room = Forward.predict, {"rows": 2}

    def predict_within(self, features, batch, rows):
        if len(batch["texts"][rows]) > room["rows"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, features, batch, rows)

    monkeypatch.setattr(Forward, "predict", predict_within)
    args = run_flags(tiny_model_dir, run_data, tmp_path / "run")
    assert train_sam3_lora.main(args) == 0
    text = (tmp_path / "run" / "train.log").read_text()
    assert text.count("out of memory: going on") == 1
    assert "--max_rows_per_forward" in text and "step 3/3: loss" in text
    room["rows"] = 0
    assert train_sam3_lora.main(args) == 2
    assert "out of memory with one image and one row" in capsys.readouterr().err


REFUSED = {
    "no data": (["--train_data_path", "nowhere"], "nowhere"),
    "unknown key": (["--learing_rate", "1e-4"], "did you mean --learning_rate"),
    "bad target": (["--lora_target_modules", "nothing"], "'nothing' matched no Linear layer"),
    "no component": (["--lora_apply_to_detr_decoder", "false"], "apply_to_"),
    "no model": (["--model_name", "not/there"], "hf auth login"),
    "no adapter": (["--init_lora_weights", "missing.pt"], "found nothing at missing.pt"),
    "no checkpoint": (["--resume"], "expected checkpoint-<step>/"),
    "no device": (["--device", "cuda:7"], "found no cuda:7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_touches_nothing(
    case, tiny_model_dir, run_data, tmp_path, capsys
):
    flags, message = REFUSED[case]
    output = tmp_path / "run"
    output.mkdir()
    (output / "train.log").write_text("an earlier run's")
    assert train_sam3_lora.main([*run_flags(tiny_model_dir, run_data, output), *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0]
    assert [path.name for path in output.iterdir()] == ["train.log"]
    assert (output / "train.log").read_text() == "an earlier run's"
    assert not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_that_is_no_run_is_left_alone(flags, tiny_model_dir, run_data, tmp_path, capsys):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    args = [*run_flags(tiny_model_dir, run_data, output), *flags]
    assert train_sam3_lora.main(args) == 2
    assert "expected a new folder or an earlier run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]
    assert (output / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_junk_image_stops_before_the_earlier_run_is_touched(
    workers, write_split, tiny_model_dir, tmp_path, capsys
):
    data = write_split(tmp_path, 3, "train")
    (data / "train" / "images" / "1.png").write_text("no image")
    output = tmp_path / "run"
    output.mkdir()
    (output / "train.log").write_text("an earlier run's")
    args = run_flags(tiny_model_dir, data, output, "--overwrite")
    assert train_sam3_lora.main([*args, "--num_workers", workers]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "1.png" in error
    assert [path.name for path in output.iterdir()] == ["train.log"]


def test_a_resumed_run_keeps_its_settings(run_dir, tiny_model_dir, run_data, capsys):
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    args = run_flags(tiny_model_dir, run_data, run_dir, "--resume")
    assert train_sam3_lora.main([*args, "--learning_rate", "0.9", "--lora_alpha", "480"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "lora.alpha 16.0 -> 480.0; training.learning_rate 0.0001 -> 0.9" in error
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("emptied", [False, True])
def test_a_resume_that_cannot_go_on_changes_nothing(
    emptied, run_dir, tiny_model_dir, run_data, tmp_path, capsys
):
    output = tmp_path / "run"
    shutil.copytree(run_dir, output)
    if emptied:
        (output / "config.yaml").write_text("")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    args = [*run_flags(tiny_model_dir, run_data, output), "--max_steps", "2"]
    assert train_sam3_lora.main([*args, "--resume"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    asked = "--resume: expected at least the 3 steps that are done, found 2 in all; raise --max_st"
    asked = "--resume: expected the settings of the run in" if emptied else asked
    assert error.startswith(f"error: {asked}")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_max_steps_may_exceed_the_epochs(tiny_model_dir, run_data, tmp_path):
    args = run_flags(tiny_model_dir, run_data, tmp_path / "run", "--max_steps", "4")
    args += ["--logging_steps", "3"]
    assert train_sam3_lora.main(args) == 0
    rows = [row for row in read_log(tmp_path / "run") if "val" not in row]
    # Three steps an epoch: the last line is of the one step after them.
    assert [(row["step"], row["epoch"]) for row in rows] == [(3, 1), (4, 2)]


def test_a_kill_before_the_last_evaluation(tiny_model_dir, run_data, tmp_path):
    """The checkpoint of the last step is there, its evaluation is not: resuming makes up for it."""
    output = tmp_path / "run"
    args = run_flags(tiny_model_dir, run_data, output, "--save_steps", "1")
    patch = pytest.MonkeyPatch()

    def killed(run):
        raise KeyboardInterrupt

    patch.setattr(train_sam3_lora, "evaluate_now", killed)
    assert train_sam3_lora.main(args) == 130
    patch.undo()
    assert not (output / "best_model").exists()
    assert train_sam3_lora.main([*args, "--resume"]) == 0
    assert (output / "best_model" / "lora_weights.pt").is_file()
    assert [row["step"] for row in read_log(output) if "val" in row] == [3]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "annotations.json"), ('{"images": []}', "annotations.json")],
)
def test_broken_annotations(content, message, tiny_model_dir, tmp_path, capsys):
    train = tmp_path / "data" / "train"
    (train / "images").mkdir(parents=True)
    (train / "annotations.json").write_text(content)
    args = run_flags(tiny_model_dir, tmp_path / "data", tmp_path / "run")
    assert train_sam3_lora.main(args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_adapter_for_other_modules_is_refused(run_dir, run_data, tmp_path, capsys):
    content = torch.load(run_dir / "best_model" / "lora_weights.pt", weights_only=True)
    content["lora"] = {f"elsewhere.{k}": v for k, v in content["lora"].items()}
    torch.save(content, tmp_path / "other.pt")
    args = ["--lora_weights", str(tmp_path / "other.pt"), "--data_dir", str(run_data)]
    assert evaluate_sam3_lora.main(args) == 2
    assert "the adapter does not fit the model" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["other.pt"]


def test_neither_adapter_nor_base(run_data, capsys):
    assert evaluate_sam3_lora.main(["--data_dir", str(run_data)]) == 2
    assert "--base" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_weights(script):
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "python " + script in done.stdout


def test_the_tour_of_the_api_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example_usage, "STEPS", 2)
    assert example_usage.main(["--output_dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "trainable: 86,016 of" in output and "found:" in output
    for name in ("lora_weights.pt", "curves.png", "overlay.png"):
        assert (tmp_path / name).stat().st_size > 1000
