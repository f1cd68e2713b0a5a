"""Reading, checking and writing COCO, masks and images, on data made here."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_lora import coco, images
from sam3_lora.coco import DatasetError
from sam3_lora.faults import find_faults

WIDTH, HEIGHT = 40, 30
TWO_PARTS = [[1, 1, 11, 1, 11, 11, 1, 11], [20, 20, 30, 20, 30, 28, 20, 28]]
DISK = np.hypot(*np.mgrid[-15:15, -20:20]) < 9
CROWD = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}


def payload() -> dict:
    """Two images: a.png with a two-part polygon and an RLE, b.png with a crowd and a box."""
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 2, "file_name": "sub/b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            record(5, 1, 3, [1, 1, 29, 27], TWO_PARTS),
            record(6, 1, 7, [11, 6, 18, 18], coco.encode_mask(DISK)),
            record(7, 2, 7, [3, 0, 3, 30], CROWD) | {"iscrowd": 1},
            record(8, 2, 3, [4, 5, 6, 7], []),
        ],
        "categories": [{"id": 3, "name": "bottle_cap"}, {"id": 7, "name": "car"}],
    }


def record(number, image_id, category_id, bbox, segmentation) -> dict:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "segmentation": segmentation,
        "iscrowd": 0,
        "area": 9.0,
    }


def write(folder: Path, content: dict | str) -> Path:
    """A split folder with the payload's images."""
    for name in ("a.png", "sub/b.png"):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), "red" if name == "a.png" else "blue").save(path)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "annotations.json").write_text(text)
    return folder


def test_read_split(tmp_path):
    split = coco.read_split(write(tmp_path, payload()))
    assert [image["file_name"] for image in split.images] == ["a.png", "sub/b.png"]
    assert split.image_path(split.images[1]).is_file()
    assert {key: len(rows) for key, rows in split.annotations.items()} == {1: 2, 2: 2}
    assert split.annotations[2][1]["segmentation"] is None
    assert split.annotations[2][0]["iscrowd"] == 1
    assert split.categories == {3: "bottle_cap", 7: "car"}
    assert split.phrase(3) == "bottle cap"


def test_prompts_override_the_name(tmp_path):
    content = payload() | {"prompts": {"bottle_cap": " cap  of a bottle "}}
    assert coco.read_split(write(tmp_path, content)).phrase(3) == "cap of a bottle"
    content["prompts"] = {"botle_cap": "cap"}
    with pytest.raises(DatasetError, match="found 'botle_cap'; did you mean 'bottle_cap'"):
        coco.read_split(write(tmp_path, content))


def test_ids_are_numbered_from_one(tmp_path):
    content = payload()
    for row, new in zip(content["images"], ("x", 0), strict=True):
        row["id"] = new
    for row in content["annotations"]:
        row["image_id"] = {1: "x", 2: "0"}[row["image_id"]]
        row["id"] -= 5
    content["categories"] = [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]
    for row in content["annotations"]:
        row["category_id"] = {3: "0", 7: 1}[row["category_id"]]
    split = coco.read_split(write(tmp_path, content))
    assert [(image["id"], image["source_id"]) for image in split.images] == [(1, "x"), (2, 0)]
    assert [item["id"] for rows in split.annotations.values() for item in rows] == [1, 2, 3, 4]
    assert split.categories == {1: "a", 2: "b"}
    assert [item["category_id"] for item in split.annotations[2]] == [2, 1]


def test_only_an_unused_root_category_is_dropped(tmp_path):
    content = payload()
    content["categories"] += [{"id": 0, "name": "car"}, {"id": 9, "name": "unused"}]
    split = coco.read_split(write(tmp_path, content))
    assert split.categories == {3: "bottle_cap", 7: "car", 9: "unused"}
    content["annotations"][0]["category_id"] = 0
    assert len(coco.read_split(write(tmp_path, content)).categories) == 4


def test_what_is_absent_is_computed(tmp_path):
    content = payload()
    for key in ("bbox", "area", "iscrowd"):
        del content["annotations"][0][key]
    item = coco.read_split(write(tmp_path, content)).annotations[1][0]
    assert item["bbox"] == [1, 1, 29, 27]
    assert item["area"] == 180
    assert item["iscrowd"] == 0


BROKEN = {
    "{": "expected JSON in .*annotations.json, found",
    "[]": 'expected a list of objects under "images" in .*, found list; export',
    '{"images": []}': "\"annotations\" in .*, found \\['images'\\]",
}


@pytest.mark.parametrize("text", BROKEN)
def test_read_refuses_a_broken_file(tmp_path, text):
    folder = write(tmp_path, text)
    with pytest.raises(DatasetError, match=BROKEN[text]):
        coco.read_split(folder)
    faults = find_faults(folder / "annotations.json", folder / "images")
    assert [fault.kind for fault in faults] == ["file"]


def test_read_names_the_first_fault_and_counts_the_rest(tmp_path):
    content = payload()
    for row in content["annotations"]:
        row["image_id"] = 9
    with pytest.raises(DatasetError, match=r"\(3 more: prepare_data.py validate lists them\)"):
        coco.read_split(write(tmp_path, content))


def faults_of(folder: Path) -> list[tuple[str, str]]:
    faults = find_faults(folder / "annotations.json", folder / "images")
    assert all(fault.remedy and fault.message for fault in faults)
    return [(fault.level, fault.kind) for fault in faults]


@pytest.mark.parametrize(
    ("name", "kind"), [("c.png", "missing image"), ("sub\\b.png", "duplicate file")]
)
def test_a_file_that_is_absent_or_named_twice(tmp_path, name, kind):
    content = payload()
    content["images"][0]["file_name"] = name
    folder = write(tmp_path, content)
    coco.read_split(folder)
    assert ("error", kind) in faults_of(folder)


def test_a_box_may_pass_the_edge_by_rounding(tmp_path):
    content = payload()
    content["annotations"][0] |= {"bbox": [-0.5, 0, 41, 30.9], "segmentation": []}
    assert faults_of(write(tmp_path, content)) == []


def test_faults_of_files(tmp_path):
    folder = write(tmp_path, payload())
    (folder / "images" / "sub" / "b.png").write_text("no image")
    (folder / "images" / "._a.png").write_text("junk")
    (folder / "images" / "extra.JPG").write_text("")
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(folder / "images" / "a.png")
    assert faults_of(folder) == [
        ("error", "image size"),
        ("error", "unreadable image"),
        ("error", "junk file"),
        ("warning", "unlisted images"),
    ]
    faults = find_faults(folder / "absent.json", folder / "absent")
    assert "No such file" in str(faults[0])
    faults = find_faults(folder / "annotations.json", folder / "absent")
    assert [fault.kind for fault in faults] == ["no images folder"]


def test_warnings(tmp_path):
    content = payload()
    content["annotations"] = content["annotations"][:1]
    content["categories"].append({"id": 8, "name": "van"})
    assert sorted(faults_of(write(tmp_path, content))) == [
        ("warning", "empty images"),
        ("warning", "unused category"),
        ("warning", "unused category"),
    ]


@pytest.mark.parametrize(
    ("name", "prompts", "others"),
    [
        ("car", {}, "'car'"),
        (" CAR", {}, "'car'"),
        ("Bottle-cap", {}, "'bottle_cap'"),
        ("van", {"van": "a  Car", "car": "a car"}, "'car'"),
        ("van", {"van": "bottle cap"}, "'bottle_cap'"),
    ],
)
def test_two_categories_of_one_prompt(tmp_path, name, prompts, others):
    content = payload() | {"prompts": prompts}
    content["categories"].append({"id": 8, "name": name})
    content["annotations"][0]["category_id"] = 8
    folder = write(tmp_path, content)
    coco.read_split(folder)
    assert faults_of(folder) == [("error", "same prompt")]
    fault = find_faults(folder / "annotations.json", folder / "images")[0]
    assert others in fault.message and repr(name) in fault.message and fault.id == "category 8"
    assert "merge" in fault.remedy and "--prompts" in fault.remedy


def test_prompts_tell_categories_apart_and_an_unused_root_is_no_category(tmp_path):
    content = payload() | {"prompts": {"Car": "toy car"}}
    content["categories"] += [{"id": 8, "name": "Car"}, {"id": 0, "name": "bottle cap"}]
    content["annotations"][0]["category_id"] = 8
    assert faults_of(write(tmp_path, content)) == []


def test_size_is_that_after_exif_rotation(tmp_path):
    content = payload()
    content["images"][0]["file_name"] = "turned.jpg"
    folder = write(tmp_path, content)
    path = folder / "images" / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: shown turned by 90 degrees
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)
    assert images.image_size(path) == (HEIGHT, WIDTH)
    assert images.read_image(path).shape == (WIDTH, HEIGHT, 3)
    faults = find_faults(folder / "annotations.json", folder / "images")
    assert "expected 40 x 30 pixels as annotated, found 30 x 40" in str(faults[0])
    assert "EXIF" in faults[0].remedy
    with pytest.raises(DatasetError, match="expected 40 x 30 pixels .* its EXIF tag, .*; `python"):
        coco.check_images(coco.read_split(folder))


def test_find_split(tmp_path):
    roboflow = tmp_path / "valid"
    roboflow.mkdir()
    (roboflow / "_annotations.coco.json").write_text("{}")
    (tmp_path / "val" / "images").mkdir(parents=True)  # as `create` leaves it
    assert coco.split_dir(tmp_path, "val") == roboflow
    assert coco.find_split(roboflow) == (roboflow / "_annotations.coco.json", roboflow)
    assert coco.sibling_val(tmp_path / "train") == roboflow
    assert coco.sibling_val(roboflow) is None
    assert coco.split_dir(tmp_path / "new", "valid") == tmp_path / "new" / "val"
    write(tmp_path / "train", payload())
    assert coco.find_split(tmp_path / "train")[1] == tmp_path / "train" / "images"
    with pytest.raises(DatasetError, match="expected annotations.json .* name one split: "):
        coco.find_split(tmp_path)
    with pytest.raises(DatasetError, match="found a file; name its folder .*train$"):
        coco.find_split(tmp_path / "train" / "annotations.json")
    with pytest.raises(DatasetError, match="valid is a split itself: --data_dir is the folder"):
        coco.find_split(coco.split_dir(roboflow, "val"))
    with pytest.raises(DatasetError, match="no such folder; .* has train, valid: name one of them"):
        coco.find_split(tmp_path / "absent")


def test_masks():
    union = coco.decode_mask(TWO_PARTS, HEIGHT, WIDTH)
    assert union.shape == (HEIGHT, WIDTH) and union.dtype == bool
    assert union.sum() == 180 == coco.mask_area(TWO_PARTS, HEIGHT, WIDTH)
    rle = coco.encode_mask(DISK)
    assert np.array_equal(coco.decode_mask(rle, HEIGHT, WIDTH), DISK)
    as_bytes = rle | {"counts": rle["counts"].encode()}
    assert np.array_equal(coco.decode_mask(as_bytes, HEIGHT, WIDTH), DISK)
    assert coco.decode_mask(CROWD, HEIGHT, WIDTH).sum() == 50
    clipped = coco.decode_mask([[-50, -50, 90, -50, 90, 90, -50, 90]], HEIGHT, WIDTH)
    assert clipped.all()
    with pytest.raises(DatasetError, match=r"size \[10, 10\], found \[30, 40\]"):
        coco.decode_mask(rle, 10, 10)


def test_mask_iou():
    rles = [coco.encode_mask(mask) for mask in (DISK, ~DISK)]
    assert np.array_equal(coco.mask_iou(rles, rles), np.eye(2))
    assert coco.mask_iou([], rles).shape == (0, 2)
    assert coco.mask_iou(rles, []).shape == (2, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_read_image_of_8_bit_modes(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (8, 6), "white").convert(mode).save(path)
    pixels = images.read_image(path)
    assert pixels.shape == (6, 8, 3) and pixels.dtype == np.uint8
    assert (pixels == 255).all()


def test_errors_that_reading_survives_are_told(tmp_path, caplog):
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0.1, 0.1, 0.5, 0.5]}
    image = {"id": 1, "file_name": "a.png", "width": 40, "height": 30}
    content = {"images": [image], "annotations": [row]}
    content["categories"] = [{"id": 1, "name": "car"}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    coco.read_coco(tmp_path / "a.json", tmp_path)
    wanted = "a.json has 1 errors, which validate lists, the first: looks like fractions"
    assert wanted in caplog.text


def test_read_image_of_deep_modes(tmp_path):
    ramp = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        pixels = images.read_image(tmp_path / name)
        assert np.array_equal(pixels[..., 0], np.rint(ramp / 257))
        for bits in (8, 10, 12):  # values of so many bits in a 16-bit file
            Image.fromarray(ramp >> (16 - bits)).save(tmp_path / name)
            wanted = np.rint((ramp >> (16 - bits)) * (255 / (2**bits - 1)))
            assert np.array_equal(images.read_image(tmp_path / name)[..., 0], wanted)
    floats = np.array([[-1.0, 0.0], [1.0, np.nan]], dtype=np.float32)
    Image.fromarray(floats).save(tmp_path / "f.tif")
    assert images.read_image(tmp_path / "f.tif")[..., 1].tolist() == [[0, 128], [255, 0]]
    Image.fromarray(np.full((2, 2), 7, np.int32)).save(tmp_path / "i.tif")
    assert (images.read_image(tmp_path / "i.tif") == 0).all()


def test_read_image_refuses(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "a.jpg"
    )
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("text")
    for name in ("cut.jpg", "text.png", "absent.png"):
        with pytest.raises(DatasetError, match=f"expected an image that PIL reads, found .*{name}"):
            images.read_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DatasetError, match="decompression bomb"):
        images.read_image(tmp_path / "a.jpg")


def masks_of(split: coco.CocoSplit) -> list[dict]:
    return [
        coco.to_rle(item["segmentation"], image["height"], image["width"])
        for image in split.images
        for item in split.annotations[image["id"]]
        if item["segmentation"] is not None
    ]


def write_again(split: coco.CocoSplit, output_dir: Path, **options) -> Path:
    return coco.write_splits(output_dir, {"train": split}, **options)[0]


def test_coco_in_coco_out(tmp_path):
    source = coco.read_split(write(tmp_path / "in", payload() | {"prompts": {"car": "van"}}))
    folder = write_again(source, tmp_path / "out")
    assert folder == tmp_path / "out" / "train"
    back = coco.read_split(folder)
    assert back.images == source.images
    assert back.categories == source.categories and back.prompts == {"car": "van"}
    for image_id, rows in source.annotations.items():
        copies = back.annotations[image_id]
        assert [row | {"id": 0} for row in copies] == [row | {"id": 0} for row in rows]
    assert [row["id"] for rows in back.annotations.values() for row in rows] == [1, 2, 3, 4]
    iou = coco.mask_iou(masks_of(source), masks_of(back))
    assert len(iou) == 3 and np.diag(iou).min() >= 0.98
    assert faults_of(folder) == []


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("annotations", "images", "counts"),
    [
        ("facade_test_roboflow_coco/test/_annotations.coco.json", None, (83, 2842, 10)),
        ("tinycoco/annotations/instances_train2017.json", "train2017", (32, 288, 80)),
        ("tinycoco/annotations/instances_val2017.json", "val2017", (6, 136, 80)),
    ],
)
@pytest.mark.scripts
def test_real_data_survives_the_round_trip(real_data, tmp_path, annotations, images, counts):
    file = real_data / annotations
    images_dir = real_data / "tinycoco" / "images" / images if images else file.parent
    source = coco.read_coco(file, images_dir)
    back = coco.read_split(write_again(source, tmp_path))
    objects = sum(map(len, back.annotations.values()))
    assert (len(back.images), objects, len(back.categories)) == counts
    ious = [
        coco.mask_iou([first], [second])[0, 0]
        for first, second in zip(masks_of(source), masks_of(back), strict=True)
    ]
    # A crowd's IoU is not special here: mask_iou takes every object as single.
    assert len(ious) == counts[1] and min(ious) >= 0.98
    assert not [f for f in find_faults(*coco.find_split(tmp_path / "train")) if f.level == "error"]
