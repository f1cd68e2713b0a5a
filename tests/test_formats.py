"""Readers of other formats against the same objects written as COCO, on data made here."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_lora import coco
from sam3_lora.coco import DatasetError
from sam3_lora.formats import read_yolo

WIDTH, HEIGHT = 80, 60
POLYGONS = [
    [10, 10, 50, 12, 44, 40, 12, 38],
    [60.5, 20.25, 75, 30, 62, 55],
    [0, 0, 20, 0, 20, 9, 0, 9],
]


def label(class_index: int, polygon: list[float]) -> str:
    sides = [WIDTH, HEIGHT] * (len(polygon) // 2)
    fractions = (f"{value / side:.6f}" for value, side in zip(polygon, sides, strict=True))
    return f"{class_index} {' '.join(fractions)}"


def write_yolo(folder: Path, layout: str, split: str = "train", lines: list[str] | None = None):
    """a.jpg with the polygons, b.PNG with an empty label, sub/c.png without one, and junk."""
    kinds = {"images": folder / "images", "labels": folder / "labels"}
    if layout == "images/split":
        kinds = {kind: path / split for kind, path in kinds.items()}
    elif layout == "split/images":
        kinds = {kind: folder / split / kind for kind in kinds}
    for path in kinds.values():
        (path / "sub").mkdir(parents=True) if layout != "flat" else path.mkdir(parents=True)
    names = ["a.jpg", "b.PNG"] + (["sub/c.png"] if layout != "flat" else [])
    for name in names:
        Image.new("RGB", (WIDTH, HEIGHT)).save(kinds["images"] / name)
    (kinds["images"] / "._a.jpg").write_text("junk")
    if layout != "flat":
        (kinds["images"] / ".ipynb_checkpoints").mkdir()
        shutil.copyfile(kinds["images"] / "a.jpg", kinds["images"] / ".ipynb_checkpoints/a-2.jpg")
    lines = (
        [label(i % 2, polygon) for i, polygon in enumerate(POLYGONS)] if lines is None else lines
    )
    (kinds["labels"] / "a.txt").write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
    (kinds["labels"] / "b.txt").write_text("")
    return kinds


@pytest.mark.parametrize("layout", ["images/split", "split/images", "flat"])
def test_polygons_are_those_of_coco(tmp_path, layout):
    write_yolo(tmp_path, layout)
    split = read_yolo(tmp_path, "train", ["person", "car"])
    names = ["a.jpg", "b.PNG"] + (["sub/c.png"] if layout != "flat" else [])
    assert [image["file_name"] for image in split.images] == names
    assert all((image["width"], image["height"]) == (WIDTH, HEIGHT) for image in split.images)
    assert all(split.image_path(image).is_file() for image in split.images)
    assert [len(rows) for rows in split.annotations.values()] == [3, 0, 0][: len(names)]
    assert split.categories == {1: "person", 2: "car"}
    items = split.annotations[1]
    assert [item["category_id"] for item in items] == [1, 2, 1]
    assert [item["id"] for item in items] == [1, 2, 3]
    masks = [coco.to_rle(item["segmentation"], HEIGHT, WIDTH) for item in items]
    wanted = [coco.to_rle([polygon], HEIGHT, WIDTH) for polygon in POLYGONS]
    assert np.diag(coco.mask_iou(masks, wanted)).min() >= 0.98
    assert items[1]["bbox"] == pytest.approx([60.5, 20.25, 14.5, 34.75], abs=1e-3)
    assert items[2]["area"] == pytest.approx(180)


def read_lines(tmp_path: Path, *lines: str) -> list[dict]:
    write_yolo(tmp_path, "split/images", lines=list(lines))
    return read_yolo(tmp_path, "train", ["person", "car"]).annotations[1]


def test_boxes(tmp_path):
    items = read_lines(
        tmp_path, "0 0.5 0.5 0.25 0.5", "1\t0.1 0.5 0.4 0.2", "", "1.0 .5 .5 1.004 1"
    )
    assert [item["segmentation"] for item in items] == [None] * 3
    assert items[0]["bbox"] == pytest.approx([30, 15, 20, 30])
    assert items[0]["area"] == pytest.approx(600)
    assert items[1]["bbox"] == pytest.approx([0, 24, 24, 12])  # clipped at the left edge
    assert items[2]["bbox"] == pytest.approx([0, 0, WIDTH, HEIGHT])


def test_a_confidence_is_dropped(tmp_path):
    items = read_lines(tmp_path, "0 0.5 0.5 0.25 0.5 0.9", label(1, POLYGONS[0]) + " 0.7")
    assert items[0]["segmentation"] is None
    assert items[1]["segmentation"] == [pytest.approx(POLYGONS[0], abs=1e-3)]


LINES = [
    ("0 0.5 0.5 0.2", "expected a label, class cx cy w h .*train/labels/a.txt:2.; correct"),
    ("cat 0.5 0.5 0.2 0.2", "expected a label, .* found 'cat 0.5"),
    ("0 0.5 0.5 nan 0.2", "expected a label"),
    ("2 0.5 0.5 0.2 0.2", r"expected a class of \[0, 1\], found 2 "),
    ("0.5 0.5 0.5 0.2 0.2", "found 0.5 "),
    ("0 40 30 20 10", "expected fractions .* 0 to 1, found 40 .*divide pixels"),
    ("0 0.5 0.5 0.2 0", "width and height > 0, found '0 0.5 0.5 0.2 0'"),
    ("0 0.5 0.5 -0.005 0.1", "width and height > 0"),
    ("0 0.5 0.5 0.2 0.2 \udcff", "expected text in UTF-8, .*train/labels/a.txt.; save it"),
]


@pytest.mark.parametrize(("line", "message"), LINES)
def test_a_line_that_is_no_label(tmp_path, line, message):
    with pytest.raises(DatasetError, match=message):
        read_lines(tmp_path, "0 0.5 0.5 0.2 0.2", line)


@pytest.mark.parametrize(
    ("names", "categories"),
    [
        ("[person, car]", {1: "person", 2: "car"}),
        ("{0: person, 1: car, 5: dog}", {1: "person", 2: "car", 6: "dog"}),
        ("{'0': person, '1': 7, 2: 0}", {1: "person", 2: "7", 3: "0"}),
    ],
)
def test_names_of_data_yaml(tmp_path, names, categories):
    write_yolo(tmp_path, "images/split")
    (tmp_path / "data.yaml").write_text(f"names: {names}\n")
    assert read_yolo(tmp_path, "train").categories == categories


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[no, car]", "expected names in .*data.yaml as class: name, found 0: False"),
        ("{a: b}", "found 'a': 'b'"),
        ("3", "found 3; write a list"),
        ("[" * 600, "expected YAML in .*data.yaml, found"),
        ("[&a [x, x], &b [*a, *a], [*b, *b]]", r"found 0: \['x', 'x'\]; write a list"),
        ("[a, b", "expected YAML in .*data.yaml, found"),
        ("[person, car]\nkpt_shape: [5, 2]", "expected labels of boxes or polygons, found kpt_sh"),
        ("[car, person]", r"--classes to agree with .*data.yaml, found \['person', 'car'\]"),
    ],
)
def test_names_that_are_refused(tmp_path, names, message):
    write_yolo(tmp_path, "images/split")
    (tmp_path / "data.yaml").write_text(f"names: {names}\n")
    with pytest.raises(DatasetError, match=message):
        read_yolo(tmp_path, "train", ["person", "car"])


POINTS = "0.4 0.4 {} 0.5 0.6 {} 0.45 0.5 {}"
KEYPOINTS = {
    "0 and 1": [f"0 0.5 0.5 0.4 0.4 {POINTS.format(1, 0, 1)}"] * 2,
    "a 2": [f"0 0.5 0.5 0.4 0.4 {POINTS.format(1, 0, 2)}"],
    "not labelled": ["0 .5 .5 .4 .4 0 0 0 .4 .4 1", "", *["1 .2 .2 .4 .4 0 0 0 0 0 0"] * 2],
    "one point, a 2": ["0 0.5 0.5 0.4 0.4 0.4 0.4 2"],
}
# Numbers that may be polygons, and are read as such: fewer flags, one point, a box not inside.
POLYGON_LINES = {
    "a corner": ["0 0.1 0.1 0.2 0.2 0.1 0.15 0 0.1 0.1 0"],
    "triangles with a confidence": ["0 0.4 0.4 0.2 0.2 0.4 0.3 1"] * 9,
    "the whole image": ["0 1 0 1 1 0 1 0 0 1 0"] * 9,
    "of several lengths": [f"0 0.5 0.5 0.4 0.4 {POINTS.format(1, 0, 1)}"] * 9
    + ["0 0.2 0.2 0.4 0.4 0.1 0.3"],
}


@pytest.mark.parametrize("lines", KEYPOINTS.values(), ids=KEYPOINTS)
def test_keypoints_are_not_read_as_polygons(tmp_path, lines):
    with pytest.raises(DatasetError, match="boxes or polygons, found keypoints, x y v .*labels"):
        read_lines(tmp_path, *lines)


@pytest.mark.parametrize("lines", POLYGON_LINES.values(), ids=POLYGON_LINES)
def test_what_may_be_a_polygon_is_one(tmp_path, lines):
    assert all(item["segmentation"] for item in read_lines(tmp_path, *lines))


def test_names_are_needed(tmp_path):
    write_yolo(tmp_path, "images/split")
    with pytest.raises(DatasetError, match='no data.yaml with names; pass --classes "first'):
        read_yolo(tmp_path, "train")


@pytest.mark.parametrize("split", ["val", "valid"])
@pytest.mark.parametrize("folder", ["val", "valid"])
@pytest.mark.parametrize("layout", ["images/split", "split/images"])
def test_val_is_valid(tmp_path, layout, folder, split):
    write_yolo(tmp_path, layout, folder)
    assert len(read_yolo(tmp_path, split, ["person", "car"]).images) == 3


@pytest.mark.parametrize(
    "entry",
    ["../part/images", "part\\images", "part/images", "D:\\sets\\part\\images"],
)
def test_data_yaml_says_where(tmp_path, entry, monkeypatch):
    write_yolo(tmp_path, "split/images", "part")
    write_yolo(tmp_path / "elsewhere", "split/images", "part", [])
    monkeypatch.chdir(tmp_path / "elsewhere")  # of the same layout
    (tmp_path / "data.yaml").write_text(f"names: [person, car]\ntrain: '{entry}'\n")
    assert len(read_yolo(tmp_path, "train").annotations[1]) == 3


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="expected the YOLO folder .*absent, found none"):
        read_yolo(tmp_path / "absent", "train", ["person"])
    kinds = write_yolo(tmp_path, "images/split")
    with pytest.raises(
        DatasetError, match="split 'test' in .*images/test.*images without .*labels,"
    ):
        read_yolo(tmp_path, "test", ["person", "car"])
    for name in ("a.txt", "b.txt"):
        (kinds["labels"] / name).unlink()
    with pytest.raises(DatasetError, match="expected label files in .*found none for 3 images"):
        read_yolo(tmp_path, "train", ["person", "car"])


def test_labels_without_an_image_are_reported(tmp_path, caplog):
    kinds = write_yolo(tmp_path, "images/split")
    (kinds["labels"] / "z.txt").write_text("0 0.5 0.5 0.2 0.2")
    with caplog.at_level(logging.WARNING):
        read_yolo(tmp_path, "train", ["person", "car"])
    assert "skipped 1 label files without an image: z.txt" in caplog.text


def test_an_image_that_cannot_be_read(tmp_path):
    kinds = write_yolo(tmp_path, "images/split")
    (kinds["images"] / "b.PNG").write_text("text")
    with pytest.raises(DatasetError, match="expected an image that PIL reads, found .*b.PNG"):
        read_yolo(tmp_path, "train", ["person", "car"])
