"""What readers share: files that are hostile, and the way from a part to a record."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sam3_lora import coco, shapes
from sam3_lora.coco import DatasetError
from sam3_lora.formats import read_voc, read_yolo

BOMB = '<!DOCTYPE a [<!ENTITY b "{}">]><annotation><filename>&b;</filename></annotation>'
XML_FAULTS = [
    (BOMB.format("x" * 99).encode(), "XML without a DOCTYPE, found one .*x.xml.; remove it"),
    (BOMB.format("x").encode("utf-16"), "XML without a DOCTYPE"),
    (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "XML without a DOCTYPE"),
    (b"<annotation><object></annotation>", "expected XML, found mismatched tag: line 1.*export"),
    (b"", "expected XML, found no element found"),
    (b'<?xml version="1.0" encoding="nonsense"?><a/>', "expected XML, found unknown encoding"),
    (b"<a>\xff\xfe</a>", "expected XML, found not well-formed"),
]
JSON_FAULTS = [
    (b'{"shapes": [', "expected JSON, found Expecting value: line 1 .*x.json.; export it again"),
    (b"\xff\xd8\xff", "expected JSON, found 'utf-8' codec"),
    (b"[" * 100_000, "expected JSON, found values nested too deep"),
    (b"1" * 5000, "expected JSON, found Exceeds the limit"),
]


@pytest.mark.parametrize(("content", "message"), XML_FAULTS)
def test_xml_that_is_refused(tmp_path, content, message):
    (tmp_path / "x.xml").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        shapes.read_xml(tmp_path / "x.xml")


@pytest.mark.parametrize(("content", "message"), JSON_FAULTS)
def test_json_that_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        shapes.read_json(tmp_path / "x.json")


def test_files_too_large_for_annotations(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "XML_BYTES", 2**20)
    monkeypatch.setattr(shapes, "JSON_BYTES", 2**20)
    for name, read in (("x.xml", shapes.read_xml), ("x.json", shapes.read_json)):
        (tmp_path / name).write_bytes(b" " * (3 * 2**20))
        with pytest.raises(DatasetError, match="annotations of 1 MB or less, found 3 MB .*split"):
            read(tmp_path / name)


@pytest.mark.scripts
def test_deep_xml_does_not_overflow_the_stack(tmp_path):
    (tmp_path / "x.xml").write_bytes(b"<a>" * 200_000 + b"</a>" * 200_000)
    assert shapes.read_xml(tmp_path / "x.xml").tag == "a"


sides = st.integers(1, 300)
numbers = st.floats(0, 1, allow_subnormal=False)


@settings(max_examples=40, deadline=None)
@given(sides, sides, numbers, numbers, numbers, numbers)
def test_boxes_of_yolo_coco_and_voc_agree(tmp_path_factory, width, height, a, b, c, d):
    left, right = sorted((a * width, c * width))
    top, bottom = sorted((b * height, d * height))
    if min(right - left, bottom - top) < 1e-3:
        return
    folder = tmp_path_factory.mktemp("boxes")
    for name in ("images", "labels", "JPEGImages", "Annotations"):
        (folder / name).mkdir()
    for name in ("images", "JPEGImages"):
        Image.new("L", (width, height)).save(folder / name / "a.png")
    centre = (left + right) / 2 / width, (top + bottom) / 2 / height
    size = (right - left) / width, (bottom - top) / height
    (folder / "labels" / "a.txt").write_text(" ".join(map(str, (0, *centre, *size))))
    bounds = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
    text = "".join(f"<{side}>{value}</{side}>" for side, value in bounds.items())
    text = f"<annotation><object><name>car</name><bndbox>{text}</bndbox></object></annotation>"
    (folder / "Annotations" / "a.xml").write_text(text)
    (yolo,) = read_yolo(folder, "train", ["car"]).annotations[1]
    wanted = [left, top, right - left, bottom - top]
    assert yolo["bbox"] == pytest.approx(wanted, abs=1e-6)
    # VOC's pixels are whole: a box thinner than one has xmax < xmin, which is refused.
    if min(right - left, bottom - top) >= 1:
        (voc,) = read_voc(folder, "train").annotations[1]
        assert voc["bbox"] == pytest.approx(wanted, abs=1e-6)
        assert voc["area"] == pytest.approx(yolo["area"], abs=1e-3)


points = st.tuples(st.floats(-50, 150), st.floats(-50, 150))


@settings(max_examples=100, deadline=None)
@given(st.lists(points, min_size=3, max_size=8))
def test_clipping_keeps_the_mask(corners):
    try:
        item = shapes.geometry([("polygon", corners)], 97, 61, "here")
    except DatasetError:
        return
    x, y, width, height = item["bbox"]
    assert x >= 0 and y >= 0 and x + width <= 97 + 1e-9 and y + height <= 61 + 1e-9
    flat = [[v for point in corners for v in point]]
    clipped, whole = (coco.decode_mask(s, 61, 97) for s in (item["segmentation"], flat))
    # They differ at most along the outline, by rounding.
    assert (clipped ^ whole).sum() <= 0.02 * whole.sum() + 4 * len(corners) + 2 * (97 + 61) * 0.1


def test_a_polygon_of_a_million_points_is_refused():
    with pytest.raises(DatasetError, match="3 to 100000 points, found 1000000 .here.; draw"):
        shapes.polygon([(1.0, 1.0)] * 10**6, "here")


def test_a_polygon_along_a_line_is_refused():
    with pytest.raises(DatasetError, match="an area inside the 9 x 9 image, found none .here."):
        shapes.geometry([("polygon", [(1, 1), (4, 4), (7, 7)])], 9, 9, "here")


def test_an_ellipse_has_the_area_of_one():
    part = shapes.ellipse(50, 40, 30, 10, 0.5, "here")
    item = shapes.geometry([part], 100, 80, "here")
    assert item["area"] == pytest.approx(math.pi * 300, rel=0.02)


def test_a_mask_beyond_the_image_is_cut():
    item = shapes.geometry([("mask", (8, 5, np.ones((4, 6), bool)))], 10, 7, "here")
    assert item["bbox"] == [8, 5, 2, 2] and item["area"] == 4


@pytest.mark.parametrize(
    ("file_name", "name", "message"),
    [
        ("a\udce9.png", "car", r"file names of printable text, found 'a\\udce9.png' .*; rename"),
        ("a\\b.png", "car", "file names of printable text"),
        ("a.png", "car\n", r"class names of printable text, found 'car\\n' .*; rename the class"),
    ],
)
def test_names_that_would_be_read_as_others_are_refused(tmp_path, file_name, name, message):
    records = {tmp_path / file_name: ((4, 3), [])}
    with pytest.raises(DatasetError, match=message):
        shapes.split_of(tmp_path, tmp_path, records, {1: name})
