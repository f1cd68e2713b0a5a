"""Writing splits: whole or not at all, by link or copy, again, and after a run that was killed."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_coco import HEIGHT, WIDTH, payload, write, write_again

from sam3_lora import coco
from sam3_lora.coco import DatasetError


def test_write_is_all_or_nothing(tmp_path):
    source = coco.read_split(write(tmp_path / "in", payload()))
    (tmp_path / "out" / "train" / "images").mkdir(parents=True)  # as `create` leaves it
    (tmp_path / "out" / "train" / ".DS_Store").write_text("")  # as looking at it leaves it
    folder = write_again(source, tmp_path / "out")
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(DatasetError, match="of this source, found annotations.json, .*--overwrite"):
        write_again(source, tmp_path / "out")
    (source.images_dir / "sub" / "b.png").unlink()
    with pytest.raises(
        DatasetError, match="expected an image file at .*sub/b.png, found none; put"
    ):
        write_again(source, tmp_path / "out", overwrite=True)
    assert (folder / "mine.txt").is_file()
    Image.new("RGB", (WIDTH, HEIGHT)).save(source.images_dir / "sub" / "b.png")
    write_again(source, tmp_path / "out", overwrite=True)
    assert not (folder / "mine.txt").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]


def test_write_never_replaces_its_own_source(tmp_path):
    source = coco.read_split(write(tmp_path / "data" / "train", payload()))
    with pytest.raises(DatasetError, match="expected the source images outside"):
        write_again(source, tmp_path / "data", overwrite=True)
    assert (tmp_path / "data" / "train" / "images" / "a.png").is_file()


def test_a_split_that_is_a_link_is_not_replaced(tmp_path):
    source = coco.read_split(write(tmp_path / "in", payload()))
    for folder in ("disk", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out" / "train").symlink_to(tmp_path / "disk")
    with pytest.raises(DatasetError, match="expected a folder at .*train, found a link; move it"):
        write_again(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]


def inodes(folder: Path) -> list[int]:
    return [(folder / "images" / name).stat().st_ino for name in ("a.png", "sub/b.png")]


def test_link_is_a_hard_link(tmp_path):
    source = coco.read_split(write(tmp_path / "in", payload()))
    copied = inodes(write_again(source, tmp_path / "copied"))
    linked = inodes(write_again(source, tmp_path / "linked", link=True))
    assert linked == inodes(tmp_path / "in") and not set(linked) & set(copied)


def test_link_falls_back_to_copies_with_one_warning(tmp_path, monkeypatch, caplog):
    def refuse(*paths):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source = coco.read_split(write(tmp_path / "in", payload()))
    splits = {"train": source, "val": source}
    for folder in coco.write_splits(tmp_path / "out", splits, link=True):
        assert not set(inodes(folder)) & set(inodes(tmp_path / "in"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "copied, not linked" in caplog.text and "cross-device" in caplog.text


@pytest.mark.parametrize("link", [False, True])
def test_links_out_of_the_source_are_refused(tmp_path, link):
    source = coco.read_split(write(tmp_path / "in", payload()))
    image = source.images_dir / "a.png"
    image.rename(source.images_dir / "c.png")
    image.symlink_to("c.png")  # within the folder: its file is taken
    folder = write_again(source, tmp_path / "out", link=link)
    assert not (folder / "images" / "a.png").is_symlink()
    (source.images_dir / "c.png").rename(tmp_path / "secret.png")
    image.unlink()
    image.symlink_to(tmp_path / "secret.png")
    with pytest.raises(DatasetError, match="images/a.png, found a link to .*secret.png; put the"):
        write_again(source, tmp_path / "other", link=link)
    assert not list(tmp_path.glob("other/**/*"))


def written(folder: Path) -> tuple[int, int]:
    """Which file annotations.json is, and when it was written; reading it may change its atime."""
    found = (folder / "annotations.json").stat()
    return found.st_ino, found.st_mtime_ns


@pytest.mark.parametrize("link", [False, True])
def test_a_split_that_holds_the_same_is_left(tmp_path, link, caplog):
    source = coco.read_split(write(tmp_path / "in", payload() | {"prompts": {"car": "véhicule"}}))
    folder = write_again(source, tmp_path / "out", link=link)
    before = written(folder)
    with caplog.at_level("INFO"):
        assert write_again(source, tmp_path / "out") == folder
    assert f"{folder} is already there" in caplog.text
    assert written(folder) == before


CHANGES = {
    "a record": lambda source, _: source.annotations[1].pop(),
    "an image": lambda source, _: Image.new("RGB", (WIDTH, HEIGHT), "blue").save(
        source.image_path(source.images[0])
    ),
    "a file more": lambda _, folder: (folder / "images" / "c.png").write_text(""),
    "a file less": lambda _, folder: (folder / "images" / "a.png").unlink(),
    "more text": lambda _, folder: (folder / "annotations.json").open("a").write(" "),
    "no text": lambda _, folder: (folder / "annotations.json").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_split_that_holds_anything_else_is_refused(tmp_path, change):
    source = coco.read_split(write(tmp_path / "in", payload()))
    CHANGES[change](source, write_again(source, tmp_path / "out"))
    with pytest.raises(DatasetError, match="to be absent, empty or of this source, found annota"):
        write_again(source, tmp_path / "out")


KILLED = """
import os, signal, sys
from sam3_lora import coco
source, output_dir, moment = sys.argv[1:]
replace = os.replace

def kill(*paths):
    os.kill(os.getpid(), signal.SIGKILL)

def replace_or_kill(path, target):
    kill() if str(path).endswith(".new") else replace(path, target)

if moment == "building":
    coco.shutil.copyfile = kill
else:
    os.replace = replace_or_kill
coco.write_splits(output_dir, {"train": coco.read_split(source)}, overwrite=True)
"""


@pytest.mark.scripts
@pytest.mark.skipif(os.name == "nt", reason="leftovers stay there")
@pytest.mark.parametrize("moment", ["building", "moved"])
def test_a_killed_run_leaves_no_half_split(tmp_path, moment):
    source = coco.read_split(write(tmp_path / "in", payload()))
    folder = write_again(source, tmp_path / "out")
    (folder / "mine.txt").write_text("kept")
    command = [sys.executable, "-c", KILLED, tmp_path / "in", tmp_path / "out", moment]
    done = subprocess.run(command, cwd=Path(coco.__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    assert folder.is_dir() == (moment == "building")
    left = [path.name for path in (tmp_path / "out").iterdir() if path != folder]
    assert len(left) == (1 if moment == "building" else 2)
    running = tmp_path / "out" / f".train.{os.getppid()}.new"
    running.mkdir()  # of a run that goes on
    with pytest.raises(DatasetError, match="found annotations.json, images, mine.txt"):
        write_again(source, tmp_path / "out")
    assert set((tmp_path / "out").iterdir()) == {folder, running}
    assert (folder / "mine.txt").read_text() == "kept"


def test_several_splits_are_written_together_or_not(tmp_path, monkeypatch):
    source = coco.read_split(write(tmp_path / "in", payload()))
    splits = dict.fromkeys(("train", "val", "test"), source)
    (tmp_path / "out" / "test").mkdir(parents=True)
    (tmp_path / "out" / "test" / "mine.txt").write_text("kept")
    with pytest.raises(DatasetError, match="expected .*test to be absent"):
        coco.write_splits(tmp_path / "out", splits)
    replace = os.replace

    def fail(source, target):
        if target == tmp_path / "out" / "test":
            monkeypatch.undo()
            raise PermissionError("in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError):
        coco.write_splits(tmp_path / "out", splits, overwrite=True)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == [tmp_path / "out" / "test" / "mine.txt"]
