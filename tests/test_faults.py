"""What `find_faults` says of malformed sets, and that nothing hostile gets through."""

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import prepare_data
from sam3_lora import coco, faults, geometry, images
from sam3_lora.coco import DatasetError
from sam3_lora.faults import find_faults

WIDTH, HEIGHT = 40, 30
SQUARE = [[2, 2, 20, 2, 20, 20, 2, 20]]
BOW_TIE = [[2, 2, 20, 20, 20, 2, 2, 20]]
FLAT = [2, 2, 10, 10, 20, 20]
RUNS = [30, 10, HEIGHT * WIDTH - 40]
NAN, INF = float("nan"), float("inf")
HUGE = 10**300


def payload() -> dict:
    """Two images with a square each, of two categories."""
    return {
        "images": [
            {"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in (1, 2)
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": n, "bbox": [2, 2, 18, 18], "iscrowd": 0}
            | {"segmentation": SQUARE, "area": 324}
            for n in (1, 2)
        ],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "van"}],
    }


def write(folder: Path, content: dict | str) -> Path:
    """A split folder with 1.png and 2.png."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in (1, 2):
        photo = Image.new("RGB", (WIDTH, HEIGHT), (99 * number, 0, 0))
        photo.save(folder / "images" / f"{number}.png")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "annotations.json").write_text(text, encoding="utf-8")
    return folder


def report(folder: Path, **options) -> list[faults.Fault]:
    return find_faults(folder / "annotations.json", folder / "images", **options)


def rle(counts, size=(HEIGHT, WIDTH)) -> dict:
    return {"segmentation": {"size": list(size), "counts": counts}}


def zigzag(points: int) -> list[list[float]]:
    """A polygon that runs to and fro over the widest coordinates."""
    return [[0, 0, geometry.COORDINATE_LIMIT, 1] * (points // 2)]


# Where (table, or the whole file), the change, kind, message.
FATAL = [
    ("annotations", {"image_id": 9}, "unknown image_id", "expected image_id .* found 9"),
    ("annotations", {"image_id": True}, "unknown image_id", "found True"),
    ("annotations", {"image_id": HUGE}, "unknown image_id", r"found 10{70,}\.\.\."),
    ("annotations", {"image_id": [1]}, "unknown image_id", r"found \[1\]"),
    ("annotations", {"category_id": "x"}, "unknown category_id", "category_id .* found 'x'"),
    ("annotations", {"id": True}, "bad id", "annotation id, a whole number under 2.63 .* True"),
    ("annotations", {"id": 2**63}, "bad id", "found 9223372036854775808"),
    ("annotations", {"id": 1.5}, "bad id", "found 1.5"),
    ("annotations", {"id": [1]}, "bad id", r"found \[1\]"),
    ("annotations", {"bbox": [1, 2, 3]}, "bbox", r"of finite numbers, found \[1, 2, 3\]"),
    ("annotations", {"bbox": [1, 2, NAN, 3]}, "bbox", "of finite numbers, found .*nan"),
    ("annotations", {"bbox": [1, 2, INF, 3]}, "bbox", "of finite numbers, found .*inf"),
    ("annotations", {"bbox": [1, 2, 3, True]}, "bbox", "of finite numbers, found .*True"),
    ("annotations", {"bbox": [[[0]]] * 99}, "bbox", r"found \[\[\[0\]\], .*\.\.\.$"),
    ("annotations", {"bbox": [1, 2, 3, HUGE * HUGE]}, "bbox", "of finite numbers, found"),
    ("annotations", {"area": INF}, "not a number", "expected a finite area, found inf"),
    ("annotations", {"area": "big"}, "not a number", "expected a finite area, found 'big'"),
    ("annotations", {"iscrowd": 2}, "iscrowd", "expected iscrowd to be 0 or 1, found 2"),
    ("annotations", {"iscrowd": []}, "iscrowd", r"0 or 1, found \[\]"),
    ("annotations", {"iscrowd": "0"}, "iscrowd", "0 or 1, found '0'"),
    ("annotations", {"segmentation": "x"}, "RLE", "polygons or an RLE, found str"),
    ("annotations", {"segmentation": [["1"] * 6]}, "polygon", "lists of numbers, found .'1'"),
    ("annotations", {"segmentation": [[1, 2, 3, 4]]}, "polygon", "3 points or more, found 4"),
    ("annotations", {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "polygon", "pairs, .* found 7 num"),
    ("annotations", {"segmentation": [[1, 2, 3, 4, 5, NAN]]}, "polygon", "coordinates .* nan"),
    ("annotations", {"segmentation": [[1, 2, 3, 4, 5, HUGE]]}, "polygon", "coordinates in pix"),
    (
        "annotations",
        {"segmentation": [[1, 2] * 10**6]},
        "polygon",
        "at most 100000 points, found 1000000",
    ),
    ("annotations", {"segmentation": zigzag(1000)}, "polygon", "outline of at most 4000000 px"),
    ("annotations", rle(RUNS, (WIDTH, HEIGHT)), "RLE", r"size \[30, 40\], found \[40, 30\]"),
    ("annotations", rle(RUNS, (1,)), "RLE", r"size \[30, 40\], found \[1\]"),
    ("annotations", {"segmentation": {"counts": RUNS}}, "RLE", "image's size .* found None"),
    ("annotations", rle([1, 2]), "RLE", "runs that sum to 30 x 40, found 3"),
    ("annotations", rle([HUGE, HUGE]), "RLE", "runs that sum to 30 x 40, found 20+"),
    ("annotations", rle([-1, 1201]), "RLE", r"expected RLE counts, .* found \[-1, 1201\]"),
    ("annotations", rle([1.5, 1198.5]), "RLE", "whole numbers from 0 or COCO text"),
    ("annotations", rle("11"), "RLE", "runs that sum to 30 x 40, found 2"),
    ("annotations", rle(""), "RLE", "or COCO text, found ''"),
    ("annotations", rle("~~~"), "RLE", "or COCO text, found '~~~'"),
    ("annotations", rle("o" * 99), "RLE", "or COCO text, found 'oooo"),
    ("annotations", rle("é"), "RLE", "or COCO text, found 'é'"),
    ("images", {"file_name": "../1.png"}, "file_name", "inside the images folder, found '../"),
    ("images", {"file_name": "a/../../1.png"}, "file_name", "found 'a/../../1.png'"),
    ("images", {"file_name": "..\\1.png"}, "file_name", "inside the images folder, found '..\\\\"),
    ("images", {"file_name": "/etc/1.png"}, "file_name", "found '/etc/1.png'"),
    ("images", {"file_name": "\\\\host\\1.png"}, "file_name", "inside the images folder"),
    ("images", {"file_name": "C:1.png"}, "file_name", "found 'C:1.png'"),
    ("images", {"file_name": "1.png\0"}, "file_name", r"found '1.png\\x00'"),
    ("images", {"file_name": "1\n.png"}, "file_name", r"found '1\\n.png'"),
    ("images", {"file_name": "\ud800.png"}, "file_name", r"found '\\ud800.png'"),
    ("images", {"file_name": "é" * 130}, "file_name", "found 'ééé"),
    ("images", {"file_name": ""}, "file_name", "found ''"),
    ("images", {"file_name": 7}, "file_name", "expected a plain file_name .* found 7"),
    ("images", {"width": None}, "missing key", "width in pixels, 1 to 100000, found None"),
    ("images", {"width": NAN}, "missing key", "width in pixels, 1 to 100000, found nan"),
    ("images", {"width": 10**9}, "missing key", "width in pixels, 1 to 100000, found 1000000000"),
    ("images", {"height": -3}, "missing key", "height in pixels, 1 to 100000, found -3"),
    ("images", {"width": True}, "missing key", "width in pixels, 1 to 100000, found True"),
    ("images", {"width": 10**5, "height": 10**5}, "huge image", "at most 89478485 pixels, found"),
    ("images", {"id": None}, "missing key", "every image to have an id, .* found 1 without"),
    ("images", {"id": False}, "missing key", "every image to have an id, a whole number under"),
    ("images", {"id": -(2**70)}, "missing key", "every image to have an id"),
    ("images", {"id": 2}, "duplicate id", "expected unique image ids, found 2 2 times"),
    ("categories", {"id": 2}, "duplicate id", "expected unique category ids, found 2 2 times"),
    ("categories", {"id": 2.5}, "missing key", "every category to have an id"),
    ("categories", {"name": ""}, "missing key", "category name of printable text, found ''"),
    ("categories", {"name": "_-_"}, "missing key", "category name of printable text, found '_-_'"),
    ("categories", {"name": "a\0"}, "missing key", "category name of printable text"),
    ("categories", {"name": ["a"]}, "missing key", r"printable text, found \['a'\]"),
    (None, {"images": []}, "no images", "expected at least one image, found 0"),
    (None, {"categories": []}, "no category", "expected at least one category, found none"),
    (None, {"prompts": ["a"]}, "prompts", r"prompts \{.*\}, found list"),
    (None, {"prompts": {"cart": "x"}}, "prompts", "did you mean 'car'"),
    (None, {"prompts": {"car": " "}}, "prompts", "expected a phrase for 'car' in prompts"),
    (None, {"prompts": {"car": 5}}, "prompts", "expected a phrase for 'car' in prompts, found 5"),
    (None, {"images": None}, "file", 'expected a list of objects under "images"'),
    (None, {"annotations": [3]}, "file", 'expected a list of objects under "annotations"'),
]


def edited(table: str | None, changes: dict) -> dict:
    content = payload()
    (content if table is None else content[table][0]).update(changes)
    return content


@pytest.mark.parametrize(("table", "changes", "kind", "message"), FATAL)
def test_what_cannot_be_read(tmp_path, table, changes, kind, message):
    folder = write(tmp_path / "in", edited(table, changes))
    found = [fault for fault in report(folder) if fault.kind == kind]
    assert found and found[0].fatal and found[0].level == "error" and found[0].remedy
    with pytest.raises(DatasetError) as caught:
        coco.read_split(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert any(matches(message, fault) for fault in found), found[0]
    assert len(str(found[0])) < 600  # one line, whatever the file holds
    flags = ["coco", "--coco_json", str(folder / "annotations.json"), "--images_dir"]
    flags += [str(folder / "images"), "--output_dir", str(tmp_path / "out")]
    assert prepare_data.main(flags) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def matches(pattern: str, fault: faults.Fault) -> bool:
    return re.search(pattern, fault.message, re.DOTALL) is not None


ERRORS = [
    ({"bbox": [-2, 0, 5, 5]}, "box outside", "inside the 40 x 30 image, .* 2 px beyond"),
    ({"bbox": [50, 0, 5, 5]}, "box outside", "found .50, 0, 5, 5., 15 px beyond its edge"),
    ({"bbox": [38, 0, 5, 5]}, "box outside", "found .38, 0, 5, 5., 3 px beyond its edge"),
    ({"bbox": [40, 0, 0.5, 5]}, "box outside", "inside the 40 x 30 image, found"),
    ({"bbox": [1, 1, 0, 5]}, "empty box", r"width and height > 0, found \[1, 1, 0, 5\]"),
    ({"bbox": [1, 1, 5, -5]}, "empty box", r"width and height > 0, found \[1, 1, 5, -5\]"),
    ({"bbox": [0.1, 0.1, 0.5, 0.5]}, "box in fractions", "fractions of the image; .*: 1 of 2"),
    ({"id": 2}, "duplicate id", "unique annotation ids, found 2 2 times"),
    ({"segmentation": [FLAT]}, "empty mask", "a mask with an area inside the image, found none"),
    ({"segmentation": [[50, 2, 60, 2, 60, 9]]}, "empty mask", "found none"),
    (rle([HEIGHT * WIDTH]), "empty mask", "an area inside the image, found none"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS)
def test_errors_that_reading_survives(tmp_path, changes, kind, message):
    folder = write(tmp_path, edited("annotations", changes))
    coco.read_split(folder)
    found = [fault for fault in report(folder) if fault.kind == kind]
    assert [fault.level for fault in found] == ["error"] and found[0].remedy
    assert matches(message, found[0]), found[0]


WARNINGS = [
    ({"segmentation": [*SQUARE, FLAT]}, "flat polygon", "one part of the mask has no area"),
    ({"segmentation": BOW_TIE}, "crossing polygon", "a polygon of 4 points crosses itself"),
    ({"bbox": [12, 2, 18, 18]}, "box off mask", r"10 px off its mask, .* \[2, 2, 18, 18\]"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WARNINGS)
def test_warnings_of_a_shape(tmp_path, changes, kind, message):
    found = report(write(tmp_path, edited("annotations", changes)))
    assert [(fault.level, fault.kind, fault.id) for fault in found] == [
        ("warning", kind, "annotation 1")
    ]
    assert matches(message, found[0]) and found[0].remedy
    # The photo is what one opens to see it.
    assert found[0].image == "1.png"
    assert f"({tmp_path}/annotations.json, 1.png, annotation 1); " in str(found[0])


def test_an_object_of_the_pixel_in_the_corner_has_no_fault(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[0, 0] = True
    content = payload()
    changes = {"bbox": [0.0, 0.0, 1.0, 1.0], "segmentation": coco.encode_mask(mask), "area": 1}
    content["annotations"][0] |= changes
    assert report(write(tmp_path, content)) == []


def test_a_sound_set_has_no_fault(tmp_path):
    assert report(write(tmp_path, payload())) == []


def test_a_file_nested_deep_or_cut(tmp_path):
    for text, message in [
        ("[" * 10**5, "expected JSON in .*nested too deep"),
        ('{"images": [', "expected JSON in"),
        ('{"images": [{"id": ' + "9" * 5000 + "}]}", "expected JSON in .*digits"),
    ]:
        found = report(write(tmp_path, text))
        assert [fault.kind for fault in found] == ["file"] and matches(message, found[0])


def test_a_value_nested_deep_is_shown_short(tmp_path):
    value: list = []
    for _ in range(10**4):
        value = [value]
    assert geometry.shown(value) == "a list too large to show"
    assert geometry.shown(10**5000) == "a int too large to show"
    assert geometry.shown("x" * 999) == "'" + "x" * 76 + "..."


def test_a_set_as_a_whole(tmp_path):
    content = payload()
    row = content["annotations"][0]
    content["annotations"] += [row | {"id": 9 + n} for n in range(200)]
    content["categories"][1]["name"] = "van " + "of 7! " * 12
    content["images"].append(content["images"][0] | {"id": 3, "file_name": "1.PNG"})
    folder = write(tmp_path, content)
    (folder / "images" / "2.png").rename(folder / "images" / "1.PNG")
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "2.png")
    found = {fault.kind: fault for fault in report(folder)}
    assert matches("201 objects of 'car', the model finds at most 200", found["crowded image"])
    assert (found["crowded image"].id, found["crowded image"].image) == ("image 1", "1.png")
    assert "--over_queries tile" in found["crowded image"].remedy
    assert matches("'car' has 201 objects, 'van of .* has 1$", found["imbalance"])
    assert matches(r"has at least 39 tokens", found["long prompt"])
    assert matches("2 file names differ in capitals only, such as '1.png'", found["names alike"])
    told = [f for f in report(folder, count_tokens=lambda phrase: 40) if f.kind == "long prompt"]
    assert len(told) == 2 and all(matches("^the prompt '.* has 40 tokens$", f) for f in told)


def test_the_same_photo_twice(tmp_path):
    content = payload()
    content["images"].append(content["images"][0] | {"id": 3, "file_name": "again/1.png"})
    folder = write(tmp_path / "val", content)
    write(tmp_path / "train", payload())
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "train" / "images" / "2.png")
    (folder / "images" / "again").mkdir()
    copy = folder / "images" / "again" / "1.png"
    copy.write_bytes((folder / "images" / "1.png").read_bytes())
    found = [(f.level, f.kind, f.file) for f in report(folder) if f.kind.startswith("photo")]
    first = folder / "images" / "1.png"
    assert found == [
        ("warning", "photo twice", first),
        ("warning", "photo in two splits", first),
        ("warning", "photo in two splits", copy),
    ]
    # A file that the other split does not use is no photo of it.
    other = payload() | {"images": payload()["images"][1:]}
    write(tmp_path / "train", other | {"annotations": payload()["annotations"][1:]})
    kinds = [f.kind for f in report(folder) if f.kind.startswith("photo")]
    assert kinds == ["photo twice", "photo in two splits"]  # 2.png
    (tmp_path / "train" / "annotations.json").write_text("{")
    kinds = [f.kind for f in report(folder) if f.kind.startswith("photo")]
    assert kinds == ["photo twice"] + ["photo in two splits"] * 3


def test_a_link_that_leads_out(tmp_path, capsys):
    folder = write(tmp_path / "data" / "train", payload())
    secret = tmp_path / "secret.png"
    (folder / "images" / "2.png").rename(secret)
    (folder / "images" / "2.png").symlink_to(secret)
    (fault,) = report(folder)
    assert fault.kind == "link outside" and fault.level == "error"
    assert matches(f"expected a file in the images folder, found a link to {secret}", fault)
    flags = ["--images_dir", str(folder / "images"), "--output_dir", str(tmp_path / "out")]
    flags = ["coco", "--coco_json", str(folder / "annotations.json"), *flags]
    assert prepare_data.main(flags) == 2
    assert f"found a link to {secret}; put the file itself there" in capsys.readouterr().err
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))
    # The images folder itself may be a link, and links within it lead nowhere else.
    (folder / "images" / "2.png").unlink()
    secret.rename(folder / "images" / "real.png")
    (folder / "images" / "2.png").symlink_to(folder / "images" / "real.png")
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    (folder / "images" / "2.png").unlink()
    (folder / "images" / "2.png").symlink_to("real.png")
    assert [f.kind for f in report(folder) if f.level == "error"] == []


def test_files_that_are_no_images(tmp_path, monkeypatch):
    folder = write(tmp_path, payload())
    one, two = folder / "images" / "1.png", folder / "images" / "2.png"
    one.write_text("GIF89a, not")
    two.write_bytes(two.read_bytes()[:-30])
    assert [fault.kind for fault in report(folder)] == ["unreadable image"] * 2
    one.unlink()
    one.mkdir()
    assert [fault.kind for fault in report(folder)][0] == "missing image"
    write(tmp_path / "bomb", payload())
    monkeypatch.setattr(images, "PIXEL_LIMIT", 1000)  # pixels, where PIL would not even warn
    fault = report(tmp_path / "bomb")[-1]
    assert matches(r"at most 1000 pixels, found .* \(40 x 30 pixels\); cut it into tiles", fault)
    with pytest.raises(DatasetError, match="at most 1000 pixels"):
        images.read_image(tmp_path / "bomb" / "images" / "1.png")


def test_hostile_masks_take_no_memory():
    tracemalloc.start()
    counts = [2**40, 2**40]
    assert "sum to" in geometry.mask_problem({"size": [9, 9], "counts": counts}, 9, 9)
    assert "outline" in geometry.mask_problem(zigzag(10**4), 9, 9)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_long_polygon_is_not_searched_for_crossings():
    points = geometry.CROSSING_LIMIT + 1
    assert geometry.crosses_itself(BOW_TIE[0])
    assert not geometry.crosses_itself(BOW_TIE[0] * points)


def test_edges_that_touch_do_not_cross():
    assert not geometry.crosses_itself(SQUARE[0])
    assert not geometry.crosses_itself([*SQUARE[0], 2, 2])  # closed by its first point
    assert not geometry.crosses_itself([0, 0, 9, 0, 9, 9, 5, 0, 0, 9])  # a corner on an edge


masks = st.tuples(st.integers(1, 24), st.integers(1, 24)).flatmap(lambda s: arrays(bool, s))
corners = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None)
@given(masks)
def test_a_mask_survives_its_rle(mask):
    height, width = mask.shape
    encoded = coco.encode_mask(mask)
    assert geometry.mask_problem(encoded, height, width) is None
    assert np.array_equal(coco.decode_mask(encoded, height, width), mask)
    assert coco.mask_area(encoded, height, width) == mask.sum()
    flips = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    runs = np.diff(flips, prepend=0, append=mask.size).tolist()
    plain = {"size": [height, width], "counts": runs}
    assert np.array_equal(coco.decode_mask(plain, height, width), mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if mask.any() else None
    assert geometry.mask_box(encoded, height, width) == box
    assert geometry.mask_box(plain, height, width) == box


@settings(deadline=None)
@given(corners)
def test_a_rectangle_has_its_box_and_area(corner):
    x, y, width, height = corner
    right, bottom = x + width, y + height
    polygon = [[x, y, right, y, right, bottom, x, bottom]]
    mask = coco.decode_mask(polygon, 40, 40)
    assert mask[y:bottom, x:right].all() and mask.sum() == width * height
    assert coco.mask_area(polygon, 40, 40) == width * height
    assert geometry.mask_box(polygon, 40, 40) == [x, y, right, bottom]
    assert geometry.mask_box(coco.encode_mask(mask), 40, 40) == [x, y, right, bottom]
    assert not geometry.is_flat(polygon[0]) and not geometry.crosses_itself(polygon[0])
