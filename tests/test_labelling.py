"""Readers of VOC, LabelMe and VIA against the same objects written as COCO, on data made here."""

import base64
import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam3_lora import coco
from sam3_lora.coco import CocoSplit, DatasetError
from sam3_lora.faults import find_faults
from sam3_lora.formats import read_labelme, read_via, read_voc, read_yolo

WIDTH, HEIGHT = 80, 60
NAMES = ["car", "person"]
# Image -> its objects: class, box (x, y, width, height) or polygon.
POLYGONS = {
    "a.jpg": [
        ("person", [10, 10, 50, 12, 44, 40, 12, 38]),
        ("car", [60.5, 20.25, 75, 30, 62, 55]),
    ],
    "b.png": [],
    "c.png": [("person", [0, 0, 20, 0, 20, 9, 0, 9])],
}
BOXES = {
    "a.jpg": [("person", [10, 10, 40, 30]), ("car", [0, 20.5, 80, 9.25])],
    "b.png": [],
    "c.png": [("person", [79, 59, 1, 1])],
}


def pairs(values: list[float]) -> list[list[float]]:
    return [list(point) for point in zip(values[0::2], values[1::2], strict=True)]


def as_coco(folder: Path, data: dict) -> CocoSplit:
    images, annotations = [], []
    for number, (name, objects) in enumerate(data.items(), start=1):
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for label, values in objects:
            is_box = len(values) == 4
            polygon = [] if is_box else [values]
            row = {"id": len(annotations) + 1, "image_id": number, "segmentation": polygon}
            row["category_id"] = NAMES.index(label) + 1
            annotations.append(row | ({"bbox": values} if is_box else {}))
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content))
    split = coco.read_coco(folder / "coco.json", folder)
    split.annotations_file.unlink()
    return split


def as_yolo(folder: Path, data: dict) -> CocoSplit:
    (folder / "labels").mkdir()
    (folder / "images").mkdir()
    for name, objects in data.items():
        (folder / name).rename(folder / "images" / name)
        lines = []
        for label, values in objects:
            if len(values) == 4:
                x, y, width, height = values
                values = [x + width / 2, y + height / 2, width, height]
            sides = [WIDTH, HEIGHT] * (len(values) // 2)
            fractions = [str(v / side) for v, side in zip(values, sides, strict=True)]
            lines.append(" ".join([str(NAMES.index(label)), *fractions]))
        (folder / "labels" / name).with_suffix(".txt").write_text("\n".join(lines))
    return read_yolo(folder, "train", NAMES)


def labelme_shape(label: str, values: list[float]) -> dict[str, Any]:
    if len(values) == 4:
        x, y, width, height = values
        corners = [[x + width, y], [x, y + height]]  # dragged from the upper right
        return {"label": label, "shape_type": "rectangle", "points": corners}
    return {"label": label, "shape_type": "polygon", "points": pairs(values), "group_id": None}


def write_labelme(folder: Path, name: str, rows: list[dict], **more: Any) -> Path:
    file = (folder / name).with_suffix(".json")
    content = {"version": "5.0", "shapes": rows, "imagePath": f"..\\old\\{name}", "imageData": None}
    file.write_text(json.dumps(content | more))
    return file


def as_labelme(folder: Path, data: dict) -> CocoSplit:
    for name, objects in reversed(data.items()):
        write_labelme(folder, name, [labelme_shape(*item) for item in objects])
    return read_labelme(folder)


def via_region(label: str | None, values: list[float]) -> dict[str, Any]:
    if len(values) == 4:
        shape = {"name": "rect"} | dict(zip(("x", "y", "width", "height"), values, strict=True))
    else:
        xs, ys = values[0::2], values[1::2]
        shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
    attributes = {} if label is None else {"kind": label}
    return {"shape_attributes": shape, "region_attributes": attributes}


def write_via(folder: Path, images: dict[str, Any]) -> Path:
    file = folder / "via.json"
    rows = {f"{name}-1": {"filename": name, "regions": rows} for name, rows in images.items()}
    file.write_text(json.dumps(rows))
    return file


def as_via(folder: Path, data: dict) -> CocoSplit:
    images = {}
    for name, objects in reversed(data.items()):
        regions = [via_region(*item) for item in objects]
        images[name] = {str(i): row for i, row in enumerate(regions)} if objects else regions
    return read_via(write_via(folder, images), folder)


def voc_object(name: str | None, *bounds: Any) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax")[: len(bounds)], bounds, strict=True)
    inside = "".join(f"<{side}>{value}</{side}>" for side, value in sides if value is not None)
    named = "" if name is None else f"<name>{name}</name>"
    return f"<object>{named}<difficult>1</difficult><bndbox>{inside}</bndbox></object>"


def write_voc(folder: Path, stem: str, objects: str, filename: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{stem}.xml"
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    text = f"<annotation><filename>{filename}</filename>{size}{objects}</annotation>"
    file.write_text(text, encoding="utf-8")
    return file


def as_voc(folder: Path, data: dict) -> CocoSplit:
    (folder / "JPEGImages").mkdir()
    for name, objects in data.items():
        (folder / name).rename(folder / "JPEGImages" / name)
        rows = [voc_object(n, x + 1, y + 1, x + w, y + h) for n, (x, y, w, h) in objects]
        write_voc(folder / "Annotations", Path(name).stem, "".join(rows), "wrong.jpeg")
    return read_voc(folder, "train")


READERS = {"yolo": as_yolo, "labelme": as_labelme, "via": as_via, "voc": as_voc}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with the images a.jpg, b.png and c.png."""
    for name in BOXES:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name)
    return tmp_path


def comparable(split: CocoSplit) -> list:
    """A split without its masks, numbers rounded."""
    rows = []
    for image in split.images:
        objects = [
            {k: np.round(v, 6).tolist() for k, v in item.items() if k != "segmentation"}
            for item in split.annotations[image["id"]]
        ]
        rows.append((image, objects))
    return [rows, split.categories, split.prompts]


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_boxes_are_those_of_coco(photos, reader):
    wanted = as_coco(photos, BOXES)
    split = reader(photos, BOXES)
    assert comparable(split) == comparable(wanted)
    assert all(item["segmentation"] is None for rows in split.annotations.values() for item in rows)
    (folder,) = coco.write_splits(photos / "data", {"train": split})
    faults = find_faults(*coco.find_split(folder))
    assert [fault for fault in faults if fault.level == "error"] == []


@pytest.mark.parametrize("name", ["yolo", "labelme", "via"])
def test_polygons_are_those_of_coco(photos, name):
    wanted = as_coco(photos, POLYGONS)
    split = READERS[name](photos, POLYGONS)
    assert [image["file_name"] for image in split.images] == list(POLYGONS)
    assert split.categories == wanted.categories
    for number, rows in wanted.annotations.items():
        found = split.annotations[number]
        assert [row["category_id"] for row in found] == [row["category_id"] for row in rows]
        for a, b in zip(found, rows, strict=True):
            masks = [coco.to_rle(row["segmentation"], HEIGHT, WIDTH) for row in (a, b)]
            assert coco.mask_iou(masks[:1], masks[1:])[0, 0] >= 0.98
            # The boxes that the COCO file lacks are read from its masks, in whole pixels.
            assert a["bbox"] == pytest.approx(b["bbox"], abs=2)


def labelme_objects(photos: Path, *rows: dict, **more: Any) -> list[dict]:
    write_labelme(photos, "a.jpg", list(rows), **more)
    return read_labelme(photos).annotations[1]


def shape(kind: Any, points: Any, label: Any = "car", **more: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": points} | more


def png(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_labelme_groups_join_parts_of_one_label(photos):
    square = [[2, 2], [12, 2], [12, 12], [2, 12]]
    other = [[30, 30], [40, 30], [40, 40], [30, 40]]
    rows = [shape("polygon", square, group_id=4), shape("polygon", other, group_id=4)]
    rows.insert(1, shape("polygon", square, "person", group_id=4))
    car, person = labelme_objects(photos, *rows)
    assert len(car["segmentation"]) == 2 and car["bbox"] == [2, 2, 38, 38]
    assert car["area"] == pytest.approx(200) and person["area"] == pytest.approx(100)


def test_labelme_circle_and_old_shapes(photos):
    circle = shape("circle", [[40, 30], [40, 50]])
    old = {"label": "car", "points": [[1, 1], [9, 1], [9, 9]]}  # before shape_type
    ring, triangle = labelme_objects(photos, circle, old)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    disc = coco.encode_mask(np.hypot(x - 40, y - 30) <= 20)
    assert coco.mask_iou([coco.to_rle(ring["segmentation"], HEIGHT, WIDTH)], [disc]) >= 0.98
    assert ring["bbox"] == pytest.approx([20, 10, 40, 40], abs=0.1)
    assert triangle["segmentation"] == [[1, 1, 9, 1, 9, 9]]


def test_labelme_masks(photos):
    pixels = np.zeros((5, 8), bool)
    pixels[1:4, 2:] = True
    mask = shape("mask", [[70, 20], [77, 24]], mask=png(pixels), group_id=1)
    rectangle = shape("rectangle", [[0, 0], [4, 4]], group_id=1)
    alone, joined = labelme_objects(photos, mask | {"group_id": None}, mask, rectangle)
    decoded = coco.decode_mask(alone["segmentation"], HEIGHT, WIDTH)
    assert (decoded[20:25, 70:78] == pixels).all() and decoded.sum() == pixels.sum()
    assert alone["bbox"] == [72, 21, 6, 3] and alone["area"] == 18
    assert joined["bbox"] == [0, 0, 78, 24] and joined["area"] == 18 + 16


def test_shapes_that_enclose_nothing_are_counted(photos, caplog):
    rows = [shape("point", [[1, 1]], None), shape("linestrip", [[1, 1], [5, 5]])]
    with caplog.at_level(logging.WARNING):
        assert len(labelme_objects(photos, *rows, shape("rectangle", [[1, 1], [5, 5]]))) == 1
        line = via_region("car", [1, 1, 9, 1, 9, 9, 5, 5])
        line["shape_attributes"]["name"] = "polyline"
        point = {"shape_attributes": {"name": "point", "cx": 1, "cy": 1}, "region_attributes": {}}
        closed = via_region("car", [1, 1, 9, 1, 9, 9, 1, 1])
        closed["shape_attributes"]["name"] = "polyline"
        file = write_via(photos, {"a.jpg": [line, point, closed]})
        assert len(read_via(file, photos).annotations[1]) == 1
    for kinds in ("1 linestrip, 1 point", "1 point, 1 polyline"):
        assert f"skipped shapes of 2 kinds, which enclose nothing: {kinds}" in caplog.text


def test_objects_are_clipped_to_the_image(photos):
    polygon, box = labelme_objects(
        photos,
        shape("polygon", [[-40, 10], [200, 10], [200, 20], [-40, 20]]),
        shape("rectangle", [[70, 50], [90, 70]]),
    )
    assert polygon["bbox"] == [0, 10, 80, 10] and polygon["area"] == pytest.approx(800)
    assert box["bbox"] == [70, 50, 10, 10]
    # An edge that crosses the border is cut where it does, not moved.
    (far,) = labelme_objects(photos, shape("polygon", [[0, 0], [160, 0], [0, 60]]))
    decoded = coco.decode_mask(far["segmentation"], HEIGHT, WIDTH)
    assert decoded[25, 79] and not decoded[35, 79]


def test_the_size_is_that_of_the_photo_as_shown(photos, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(photos / "a.jpg", exif=exif)
    write_voc(photos, "a", voc_object("car", 1, 1, 60, 80), "a.jpg")
    with caplog.at_level(logging.WARNING):
        split = read_voc(photos, "train")
    assert (split.images[0]["width"], split.images[0]["height"]) == (HEIGHT, WIDTH)
    assert split.annotations[1][0]["bbox"] == [0, 0, 60, 80]
    assert (
        "1 images differ in size" in caplog.text and "a.jpg is 60 x 80, not 80 x 60" in caplog.text
    )


def test_voc_splits(photos):
    lists = photos / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for stem in "abc":
        write_voc(photos / "Annotations", stem, voc_object("car", 1, 1, 5, 5))
    (photos / "JPEGImages").mkdir()
    for name in BOXES:
        (photos / name).rename(photos / "JPEGImages" / name)
    assert len(read_voc(photos, "test").images) == 3  # no list: all
    (lists / "train.txt").write_text("c\r\na\r\n\r\n")
    (lists / "val.txt").write_text("b\n")
    for split, names in (("train", ["a.jpg", "c.png"]), ("valid", ["b.png"])):
        assert [image["file_name"] for image in read_voc(photos, split).images] == names
    with pytest.raises(DatasetError, match="ImageSets/Main/test.txt, found lists of train, val"):
        read_voc(photos, "test")
    (lists / "val.txt").write_text("b\n../../secret\n")
    with pytest.raises(DatasetError, match=r"found 'secret' \(.*val.txt\); remove the line"):
        read_voc(photos, "val")
    (lists / "val.txt").write_text("\n")
    with pytest.raises(DatasetError, match="names of images, one a line, found none"):
        read_voc(photos, "val")


def via_objects(photos: Path, *regions: dict, **flags: Any) -> CocoSplit:
    return read_via(write_via(photos, {"a.jpg": list(regions)}), photos, **flags)


def test_via_shapes(photos):
    flat = {"name": "ellipse", "cx": 40, "cy": 30, "rx": 20, "ry": 5}
    rows = [flat, flat | {"theta": math.pi / 2}, {"name": "circle", "cx": 40, "cy": 30, "r": 8}]
    regions = [{"shape_attributes": row, "region_attributes": {"k": "car"}} for row in rows]
    boxes = [item["bbox"] for item in via_objects(photos, *regions).annotations[1]]
    assert boxes[0] == pytest.approx([20, 25, 40, 10])
    assert boxes[1] == pytest.approx([35, 10, 10, 40])
    assert boxes[2] == pytest.approx([32, 22, 16, 16])


def test_via_classes(photos):
    region = via_region("car", [1, 1, 9, 9])
    for value, name in (({"car": True, "person": False}, "car"), (7, "7"), (" dog ", "dog")):
        row = region | {"region_attributes": {"kind": value, "note": ""}}
        assert via_objects(photos, row).categories == {1: name}
    two = region | {"region_attributes": {"kind": "car", "colour": "red"}}
    assert via_objects(photos, two, class_attribute="colour").categories == {1: "red"}
    with pytest.raises(DatasetError, match="one attribute of the regions, found colour, kind"):
        via_objects(photos, two)
    bare = via_region(None, [1, 1, 9, 9])
    assert via_objects(photos, bare, class_names=["car"]).categories == {1: "car"}
    for names in (None, NAMES):
        with pytest.raises(DatasetError, match="holds the class, found none .*--classes"):
            via_objects(photos, bare, class_names=names)


def test_via_projects_and_absent_images(photos, caplog):
    file = write_via(photos, {"sub/a.jpg": [via_region("car", [1, 1, 9, 9])], "gone.png": []})
    file.write_text(
        json.dumps({"_via_settings": {}, "_via_img_metadata": json.loads(file.read_text())})
    )
    with caplog.at_level(logging.WARNING):
        split = read_via(file, photos)
    assert [image["file_name"] for image in split.images] == ["a.jpg"]
    assert "skipped 1 of 2 images, which are not in" in caplog.text and "gone.png" in caplog.text
    assert "left out 2 images without an annotation" in caplog.text


SQUARE = [[1, 1], [9, 1], [9, 9]]
LABELME_FAULTS = [
    (shape("polygon", SQUARE[:2]), "3 to 100000 points, found 2 .*a.json, shape 1.; draw"),
    (shape("rectangle", SQUARE), "a rectangle of 2 points, found 3"),
    (shape("rectangle", [[1, 5], [9, 5]]), "width and height > 0, found 1, 5 to 9, 5 .*; remove"),
    (shape("rectangle", [[90, 5], [99, 9]]), "an area inside the 80 x 60 image, found none"),
    (shape("circle", [[5, 5], [5, 5]]), "a radius > 0, found 0"),
    (shape("cuboid", SQUARE), "a polygon, rectangle, circle or mask, found 'cuboid'"),
    (shape(["polygon"], SQUARE), "circle or mask, found .'polygon'."),
    (shape("polygon", {"x": 1}), r"points as \[\[x, y\], ...\], found {'x': 1}"),
    (shape("polygon", [[1, "a"], *SQUARE]), "y as a number, 100000 pixels at most, found 'a'"),
    (shape("polygon", [[math.nan, 1], *SQUARE]), "x as a number, .* found 'nan'"),
    (shape("polygon", [[10**400, 1], *SQUARE]), "x as a number, .* found '1000"),
    (shape("polygon", [[None, 1], *SQUARE]), "expected x, found none"),
    (shape("polygon", SQUARE, None), "the name of a class, found None .*; name the object"),
    (shape("polygon", SQUARE, "cat"), "a class of car, person, found 'cat' .*; add it to --cl"),
    (shape("mask", [[1, 1], [3, 3]], mask="AAAA"), "a mask, a PNG in base64, found cannot"),
    (shape("mask", [[1, 1], [3, 3]], mask=png(np.ones((2, 3)))), "fills 1, 1 to 3, 3, found 3 x 2"),
    (shape("mask", [[-1, 0], [1, 2]], mask=png(np.ones((3, 3)))), "a mask that fills -1, 0"),
    (shape("mask", [[1, 1], [3, 3]], mask=png(np.zeros((3, 3)))), "an area inside .* found none"),
]


@pytest.mark.parametrize(("row", "message"), LABELME_FAULTS)
def test_labelme_shapes_that_are_refused(photos, row, message):
    write_labelme(photos, "a.jpg", [row])
    with pytest.raises(DatasetError, match=message) as caught:
        read_labelme(photos, NAMES)
    assert "\n" not in str(caught.value) and "a.json, shape 1" in str(caught.value)


VOC_FAULTS = [
    (voc_object(None, 1, 1, 5, 5), "the name of a class, found None .*a.xml, object 1"),
    ("<object><name>car</name></object>", "a bndbox, found none"),
    (voc_object("car", 1, 1, 5), "expected ymax, found none"),
    (voc_object("car", 9, 1, 5, 5), "xmin <= xmax and ymin <= ymax, found 9, 1 to 5, 5"),
    (voc_object("car", 1, 1, "five", 5), "xmax as a number, .* found 'five'"),
    (voc_object("car", 1, "NaN", 5, 5), "ymin as a number, .* found 'NaN'"),
    (voc_object("car", 100, 1, 120, 5), "an area inside the 80 x 60 image, found none"),
    (voc_object("cat", 1, 1, 5, 5), "a class of car, person, found 'cat'"),
]


@pytest.mark.parametrize(("row", "message"), VOC_FAULTS)
def test_voc_objects_that_are_refused(photos, row, message):
    write_voc(photos, "a", row)
    with pytest.raises(DatasetError, match=message):
        read_voc(photos, "train", NAMES)


VIA_FAULTS = [
    ({"name": "rect", "x": 1, "y": 1, "width": -5, "height": 3}, "a rect with .* found -5 x 3"),
    ({"name": "rect", "x": 1, "y": 1, "width": 5}, "expected height, found none .*region 1"),
    ({"name": "blob"}, "a rect, circle, ellipse, polygon, polyline or point, found 'blob'"),
    ({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1]}, "y of one length, found"),
    ({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1, 2]}, "3 to 100000 points"),
]


@pytest.mark.parametrize(("row", "message"), VIA_FAULTS)
def test_via_regions_that_are_refused(photos, row, message):
    with pytest.raises(DatasetError, match=message):
        via_objects(photos, {"shape_attributes": row, "region_attributes": {"k": "car"}})


def test_via_classes_that_are_refused(photos):
    region = via_region("car", [1, 1, 9, 9])
    for value, message in (
        ({"car": True, "person": True}, "one class in 'kind', found car, person .*; leave one"),
        ("", "the name of a class, found ''"),
    ):
        with pytest.raises(DatasetError, match=message):
            via_objects(photos, region, region | {"region_attributes": {"kind": value}})
    with pytest.raises(DatasetError, match="attribute 'colour', found values of .'kind'."):
        via_objects(photos, region, class_attribute="colour")


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "C:\\x.jpg", "a/..\\..\\x.jpg"])
def test_file_names_that_leave_the_folder(photos, name):
    file = write_via(photos, {name: []})
    with pytest.raises(DatasetError, match="a file name inside --images_dir, found"):
        read_via(file, photos, NAMES)
    file.unlink()
    write_voc(photos, "a", "", name)
    with pytest.raises(DatasetError, match="a file name inside .*; write the name without folders"):
        read_voc(photos, "train", NAMES)
    # LabelMe writes such paths itself: the name alone is looked for, beside the JSON.
    write_labelme(photos, "a.jpg", [], imagePath=f"{name}/../a.jpg")
    assert read_labelme(photos, NAMES).images[0]["file_name"] == "a.jpg"


def test_images_that_are_absent_or_several(photos, caplog):
    write_labelme(photos, "gone.jpg", [shape("rectangle", [[1, 1], [5, 5]])])
    with pytest.raises(DatasetError, match="expected images in .*, found none of 1: gone.jpg"):
        read_labelme(photos)
    write_labelme(photos, "a.jpg", [])
    with caplog.at_level(logging.WARNING):
        assert len(read_labelme(photos, NAMES).images) == 1
    assert "skipped 1 of 2 images, which are not in" in caplog.text
    assert "and their 1 objects: gone.jpg" in caplog.text
    assert (
        f"left out 2 images without an annotation, which may hold objects: {photos}" in caplog.text
    )
    write_labelme(photos, "z.jpg", [], imagePath="a.jpg")
    with pytest.raises(DatasetError, match="one annotation of .*a.jpg, found two .*; keep one"):
        read_labelme(photos, NAMES)
    write_labelme(photos, "z.jpg", [], imageData="AAAA")
    with pytest.raises(DatasetError, match="the image z.jpg beside it, found it embedded .*; save"):
        read_labelme(photos)
    Image.new("RGB", (9, 9)).save(photos / "a.png")
    write_voc(photos, "a", "", "other.bmp")
    with pytest.raises(DatasetError, match=r"one image, found a.jpg, a.png \(.*a.xml\); keep one"):
        read_voc(photos, "train")


def test_sources_that_are_refused(photos):
    for read, flag in ((read_voc, "--voc_dir"), (read_labelme, "--labelme_dir")):
        more = ("train",) if read is read_voc else ()
        with pytest.raises(DatasetError, match=f"the folder .*absent, found none; check {flag}"):
            read(photos / "absent", *more)
        with pytest.raises(DatasetError, match=f"files in .*, found none; check {flag}"):
            read(photos, *more)
    file = write_via(photos, {"a.jpg": []})
    with pytest.raises(DatasetError, match="the folder .*absent, found none; check --images_dir"):
        read_via(file, photos / "absent")
    with pytest.raises(DatasetError, match="annotations, found No such file .*; check the path"):
        read_via(photos / "absent.json", photos)
    with pytest.raises(DatasetError, match="expected objects, found none .*--classes"):
        read_via(file, photos)
    for content in ({"images": [], "annotations": []}, 3, [{"filename": "a.jpg"}]):
        file.write_text(json.dumps(content))
        with pytest.raises(DatasetError, match="images with regions, as in VIA 1 and 2, found"):
            read_via(file, photos)
        with pytest.raises(DatasetError, match="a list of shapes, as in LabelMe, found none"):
            read_labelme(photos)
    write_via(photos, {"a.jpg": [{"shape_attributes": {}}]})
    with pytest.raises(DatasetError, match="regions with shape_attributes and .*via.json, a.jpg"):
        read_via(file, photos)
    (photos / "a.xml").write_text("<html></html>")
    with pytest.raises(DatasetError, match="<annotation> of Pascal VOC, found <html>"):
        read_voc(photos, "train")
