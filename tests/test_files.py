"""Files are written whole or not at all, and what cannot be written is told before."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_lora import files


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
