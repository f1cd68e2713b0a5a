"""A folder that is no split: the message names what to do, by what the folder looks like."""

import json
from pathlib import Path

import pytest

import prepare_data
from sam3_lora.coco import DatasetError
from sam3_lora.layout import find_split

LABELME = {"version": "5.0.1", "shapes": [], "imagePath": "a.jpg"}
VIA = {"a.jpg123": {"filename": "a.jpg", "size": 123, "regions": []}}
COCO = {"images": [], "annotations": [], "categories": []}
# Files of a layout (text or what becomes JSON; None: an empty file), the path that was named, and
# the end of the message, both from the folder of the layout.
LAYOUTS = {
    "roboflow": ({"train/_annotations.coco.json": COCO}, ".", "name one split: {}/train"),
    "parent": ({"train/annotations.json": COCO, "a/annotations.json": COCO}, ".", "/a or {}/train"),
    "images": ({"annotations.json": COCO, "images/a.jpg": None}, "images", "its folder {}"),
    "yolo": (
        {"data.yaml": "names: [a]", "train/images/a.jpg": None, "train/labels/a.txt": ""},
        ".",
        "prepare_data.py yolo --yolo_dir {}",
    ),
    "yolo split": (
        {"data.yaml": "names: [a]", "train/images/a.jpg": None, "train/labels/a.txt": ""},
        "train",
        "prepare_data.py yolo --yolo_dir {}",
    ),
    "yolo file": ({"data.yaml": "names: [a]"}, "data.yaml", "prepare_data.py yolo --yolo_dir {}"),
    "yolo labels": (
        {"images/train/a.jpg": None, "labels/train/a.txt": ""},
        ".",
        "prepare_data.py yolo --yolo_dir {}",
    ),
    "voc": (
        {"JPEGImages/a.jpg": None, "Annotations/a.xml": "<annotation/>"},
        ".",
        "prepare_data.py voc --voc_dir {}",
    ),
    "flat voc": ({"a.jpg": None, "a.xml": ""}, ".", "prepare_data.py voc --voc_dir {}"),
    "labelme": ({"a.jpg": None, "a.json": LABELME}, ".", "labelme --labelme_dir {}"),
    "via": ({"a.jpg": None, "via.json": VIA}, ".", "via --via_json {}/via.json --images_dir {}"),
    "coco": (
        {"train2017/a.jpg": None, "annotations/instances_train2017.json": COCO},
        ".",
        "coco --coco_json {}/annotations/instances_train2017.json --images_dir {}/train2017",
    ),
    "coco, a split named": (
        {"images/a.jpg": None, "annotations/train.json": COCO},
        "train",
        "coco --coco_json {}/annotations/train.json --images_dir {}/images",
    ),
    "masks": (
        {"images/a.jpg": None, "masks/a.png": None},
        ".",
        "masks --images_dir {}/images --masks_dir {}/masks",
    ),
    "no images": ({"annotations.json": COCO}, ".", "put its images into {}/images"),
    "photos": ({"a.jpg": None}, ".", "data/README.md shows how for each format"),
    "slip": ({"train/annotations.json": COCO}, "trian", "did you mean {}/train?"),
    "another split": (
        {"train/annotations.json": COCO, "val/annotations.json": COCO},
        "test",
        "{} has train, val: name one of them",
    ),
    "nothing": ({}, "train", "`python prepare_data.py demo --output_dir {}/demo` draws a data set"),
}


# A command, its flag of labels, the labels that are not its own, and the end of the message.
WRONG_READERS = {
    "VIA as COCO": ("coco", "--coco_json {}/a.json", VIA, "via --via_json {}/a.json`"),
    "LabelMe as COCO": ("coco", "--coco_json {}/a.json", LABELME, "labelme --labelme_dir {}`"),
    "COCO as VIA": ("via", "--via_json {}/a.json", COCO, "coco --coco_json {}/a.json`"),
    "LabelMe as VIA": ("via", "--via_json {}/a.json", LABELME, "labelme --labelme_dir {}`"),
    "COCO as LabelMe": ("labelme", "--labelme_dir {}", COCO, "coco --coco_json {}/a.json`"),
    "VIA as LabelMe": ("labelme", "--labelme_dir {}", VIA, "via --via_json {}/a.json`"),
    "no COCO": ("coco", "--coco_json {}/a.json", {"images": 3}, "detection or instances)"),
    "no VIA": ("via", "--via_json {}/a.json", {"a": 3}, "from VIA 2 as JSON"),
    "no LabelMe": ("labelme", "--labelme_dir {}", [], "; move the file away"),
}


@pytest.mark.parametrize(
    ("command", "flag", "content", "remedy"), WRONG_READERS.values(), ids=WRONG_READERS
)
def test_labels_of_another_format_name_their_command(
    command: str, flag: str, content: object, remedy: str, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(content))
    (folder / "a.jpg").write_text("")
    flags = [word.format(folder) for word in flag.split()]
    flags += ["--images_dir", str(folder)] * (command != "labelme")
    assert prepare_data.main([command, *flags, "--output_dir", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.strip()
    assert err.endswith(remedy.format(folder)), err


@pytest.mark.parametrize(("files", "named", "remedy"), LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_no_split_names_the_way_out(
    files: dict[str, object], named: str, remedy: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(content) if isinstance(content, dict) else content or "")
    with pytest.raises(DatasetError) as caught:
        find_split(folder / named)
    assert str(caught.value).endswith(remedy.format(folder, folder)), caught.value
