"""Files are written whole or not at all, and what cannot be written is told before."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate_sam3_lora
import export_sam3_lora
import inference
from sam3_lora import files, video


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path) -> None:
    target = tmp_path / "new" / "a.json"
    files.write_json(target, {"é": None})
    assert json.loads(target.read_text(encoding="utf-8")) == {"é": None}

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(target, fail)
    assert json.loads(target.read_text(encoding="utf-8")) == {"é": None}
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp", ".tiff"])
def test_a_picture_takes_the_format_of_its_suffix(tmp_path, suffix) -> None:
    files.write_picture(tmp_path / f"r{suffix}", np.zeros((4, 6, 3), dtype=np.uint8))
    with Image.open(tmp_path / f"r{suffix}") as image:
        assert image.size == (6, 4) and image.format != "PNG"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path) -> None:
    files.check_writable(tmp_path / "new" / "er", "--output")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    wanted = "--output: expected a folder that can be written, found .*; name another place"
    with pytest.raises(PermissionError, match=wanted):
        files.check_writable(tmp_path / "file" / "new", "--output")


@pytest.mark.parametrize("case", ["evaluate", "calibrate", "image", "json", "video", "export"])
def test_scripts_tell_before_the_work_what_they_cannot_write(case, tmp_path, capsys, monkeypatch):
    def refuse(folder: Path, flag: str) -> None:
        if folder.absolute().is_relative_to(tmp_path / "no"):
            raise PermissionError(f"{flag}: expected a folder that can be written")

    for module in (evaluate_sam3_lora, inference, export_sam3_lora, video):
        monkeypatch.setattr(module, "check_writable", refuse)
    monkeypatch.setattr(evaluate_sam3_lora, "split_dir", lambda *_: tmp_path)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    adapter, no = str(tmp_path / "no" / "a.pt"), str(tmp_path / "no" / "out")
    image = ["--image", str(tmp_path / "a.png"), "--text_prompt", "x"]
    main, words, flag = {
        "evaluate": (evaluate_sam3_lora, ["--base", "--output_dir", no], "--output_dir"),
        "calibrate": (
            evaluate_sam3_lora,
            ["--calibrate", "--lora_weights", adapter, "--output_dir", str(tmp_path)],
            "--calibrate",
        ),
        "image": (inference, [*image, "--output", no], "--output"),
        "json": (inference, [*image, "--output", str(tmp_path), "--json", f"{no}.json"], "--json"),
        "video": (inference, ["--video", str(tmp_path), *image[2:], "--output", no], "--output"),
        "export": (
            export_sam3_lora,
            ["peft", "--lora_weights", adapter, "--output_dir", no],
            "--output_dir",
        ),
    }[case]
    assert main.main(words) == 2
    assert f"error: {flag}: expected a folder that can be written" in capsys.readouterr().err
