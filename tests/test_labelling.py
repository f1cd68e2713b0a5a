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
from sam3_lora.formats import read_labelme, read_via, read_voc, read_yolo

WIDTH, HEIGHT = 80, 60
NAMES = ["car", "person"]
# Image -> its objects: class, box (x, y, width, height) or polygon. Objects of one kind an image.
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
    sides = zip(("xmin", "ymin", "xmax", "ymax"), bounds, strict=False)
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
    folder = coco.write_split(
        photos / "data",
        "train",
        split.images,
        split.annotations,
        split.categories,
        {},
        images_dir=split.images_dir,
    )
    faults = coco.find_faults(*coco.find_split(folder))
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
    assert "enclose nothing: 1 linestrip, 1 point" in caplog.text
    assert "enclose nothing: 1 point, 1 polyline" in caplog.text


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
    names = [[i["file_name"] for i in read_voc(photos, s).images] for s in ("train", "valid")]
    assert names == [["a.jpg", "c.png"], ["b.png"]]
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
