"""Masks that are image files: drawn masks come back as they were drawn, whatever the kind."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from scipy import ndimage

import prepare_data
from sam3_lora import coco
from sam3_lora.coco import CocoSplit, DatasetError
from sam3_lora.mask_images import read_masks

WIDTH, HEIGHT = 80, 60
# Class -> its objects; the second car is a ring, the road touches nothing.
COLOURS = {1: (128, 64, 128), 2: (0, 0, 142)}


def drawn() -> list[tuple[int, np.ndarray]]:
    """(class, mask) of the objects, by class and then from the top; none touches another."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    ring = (x - 60) ** 2 + (y - 15) ** 2
    return [
        (1, (y > 40) & (y - 40 > abs(x - 30) / 4)),
        (2, (ring < 100) & (ring > 25)),
        (2, (abs(x - 12) + abs(y - 20) < 9)),
    ]


def save(pixels: np.ndarray, path: Path, palette: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(path)


def write_photo(folder: Path, name: str = "a.jpg", size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(folder / "images" / name)


def index_map(dtype: type = np.uint8) -> np.ndarray:
    return sum(mask.astype(dtype) * dtype(number) for number, mask in drawn())


def read(folder: Path, classes=None, kind=None, **options) -> CocoSplit:
    return read_masks(folder / "images", folder / "masks", classes, kind, **options)


def one(folder: Path, pixels: np.ndarray, *args, **options) -> list[dict]:
    """The objects of the photo a.jpg with this mask."""
    write_photo(folder)
    save(pixels, folder / "masks" / "a.png")
    return read(folder, *args, **options).annotations[1]


def check(items: list[dict], wanted: list[tuple[int, np.ndarray]]) -> None:
    """Category, mask, box and area are those drawn, read by numpy and pycocotools alone."""
    assert [item["category_id"] for item in items] == [number for number, _ in wanted]
    assert [item["id"] for item in items] == list(range(1, len(wanted) + 1))
    for item, (_, mask) in zip(items, wanted, strict=True):
        assert (mask_utils.decode(item["segmentation"]).astype(bool) == mask).all()
        ys, xs = np.nonzero(mask)
        sides = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert item["bbox"] == sides
        assert item["area"] == mask.sum()
        assert item["iscrowd"] == 0 and isinstance(item["segmentation"]["counts"], str)


NAMES = ["road", "car"]


@pytest.mark.parametrize("form", ["grey", "palette", "uint16", "rgb", "rgba"])
def test_index(tmp_path, form):
    pixels = index_map(np.uint16 if form == "uint16" else np.uint8)
    if form.startswith("rgb"):
        pixels = np.stack([pixels] * 3 + [np.full_like(pixels, 255)] * (form == "rgba"), axis=2)
    write_photo(tmp_path)
    palette = np.arange(768, dtype=np.uint8)[::-1] if form == "palette" else None
    save(pixels, tmp_path / "masks" / "a.png", palette)
    check(read(tmp_path, NAMES).annotations[1], drawn())


TABLES = [{"0": "background", "1": "road", "2": "car"}, {"road": 1, "car": 2}]


@pytest.mark.parametrize("classes", [NAMES, ["_background_", *NAMES], *TABLES])
def test_names_of_an_index_mask(tmp_path, classes):
    check(one(tmp_path, index_map(), classes), drawn())
    assert read(tmp_path, classes).categories == {1: "road", 2: "car"}


def test_a_class_may_have_value_0_or_255(tmp_path):
    pixels = index_map()
    pixels[pixels == 2] = 255
    items = one(tmp_path, pixels, {"0": "sky", "255": "car", "1": "car"}, whole=True)
    assert [item["category_id"] for item in items] == [1, 2, 2]
    assert [item["area"] for item in items] == [(pixels == v).sum() for v in (0, 1, 255)]


def test_void(tmp_path):
    pixels = index_map()
    pixels[0, :] = 255
    check(one(tmp_path, pixels, NAMES), drawn())
    pixels[0, :] = 9
    check(one(tmp_path, pixels, NAMES, void=["9", "255"]), drawn())


@pytest.mark.parametrize("form", ["#", "list"])
@pytest.mark.parametrize("palette", [False, True])
def test_colour(tmp_path, form, palette):
    table = np.array([(0, 0, 0), *COLOURS.values(), (224, 224, 192)], np.uint8)
    pixels = index_map()
    pixels[0, :] = 3
    classes = {"road": list(COLOURS[1]), "car": list(COLOURS[2]), "background": [0, 0, 0]}
    if form == "#":
        classes = {"road": "#804080", "car": "#00008E"}
    write_photo(tmp_path)
    file = tmp_path / "masks" / "a.png"
    save(pixels if palette else table[pixels], file, table if palette else None)
    split = read(tmp_path, classes, void=["#e0e0c0"])
    # By the number of the colour: the car's is less.
    objects = drawn()
    check(split.annotations[1], [*objects[1:], objects[0]])
    assert split.categories == {1: "road", 2: "car"}


def test_a_background_of_another_colour(tmp_path):
    pixels = np.where(index_map()[..., None] == 2, (0, 0, 142), (255, 255, 255)).astype(np.uint8)
    items = one(tmp_path, pixels, {"background": "#ffffff", "car": "#00008e"})
    check(items, [(1, mask) for number, mask in drawn() if number == 2])


@pytest.mark.parametrize("form", ["uint8", "uint16", "int32", "rgb"])
def test_instance(tmp_path, form):
    values = [7, 255, 40] if form == "uint8" else [7, 40000, 300]
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8 if form == "uint8" else np.int32)
    for value, (_, mask) in zip(values, drawn(), strict=True):
        pixels[mask] = value
    if form == "uint16":
        pixels = pixels.astype(np.uint16)
    if form == "rgb":
        pixels = np.stack([pixels >> 16, pixels >> 8 & 255, pixels & 255], axis=2).astype(np.uint8)
    write_photo(tmp_path)
    name = "a.tif" if form == "int32" else "a.png"
    save(pixels, tmp_path / "masks" / name)
    items = read(tmp_path, ["cell"], "instance").annotations[1]
    masks = [drawn()[at][1] for at in np.argsort(values)]
    check(items, [(1, mask) for mask in masks])


def test_parts_of_one_value_are_one_object(tmp_path):
    pixels = (drawn()[0][1] | drawn()[1][1]).astype(np.uint8) * 5
    pixels[0, 0] = 6  # one pixel, with a value of its own
    items = one(tmp_path, pixels, ["cell"], "instance")
    check(items, [(1, pixels == 5), (1, pixels == 6)])


def test_classes_that_are_taken_for_objects_are_told(tmp_path, caplog):
    """A class lies about the photo in parts; an object that another hides in part is the rarer."""
    one(tmp_path, index_map(), ["cell"], "instance")  # of two values, the cars are two parts
    assert caplog.text == ""
    pixels = index_map()
    pixels[2:5, 2:5] = 1
    one(tmp_path, pixels, ["cell"], "instance")
    wanted = "2 of 2 objects lie in parts that do not touch; if a value is a class, pass --kind in"
    assert wanted in caplog.text


OBJECT_FILES = ["a_0 a_1 a_2", "a-0 a-01 a-2", "a/0 a/1 a/2", "a/2f a/9e a/c1"]
CLASS_FILES = ["a_0_road a_1_car a_2_car", "a_road a_car_0 a_car_1", "a/0_road a/car_0 a/car_1"]
CLASS_FILES += ["a/road a/car/0 a/car/1"]


@pytest.mark.parametrize("names", OBJECT_FILES + CLASS_FILES)
@pytest.mark.parametrize("value", [1, 255, "1 bit"])
def test_object(tmp_path, names, value):
    write_photo(tmp_path)
    classes = NAMES if names in CLASS_FILES else ["car"]
    wanted = drawn() if names in CLASS_FILES else [(1, mask) for _, mask in drawn()]
    for name, (_, mask) in zip(names.split(), drawn(), strict=True):
        pixels = mask if value == "1 bit" else mask.astype(np.uint8) * value
        save(pixels, tmp_path / "masks" / f"{name}.png")
    split = read(tmp_path, classes, "object")
    order = np.argsort(names.split())
    check(split.annotations[1], [wanted[at] for at in order])
    assert split.categories == dict(enumerate(classes, start=1))


def test_a_file_without_a_pixel_is_an_image_without_an_object(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        write_photo(tmp_path, name)
    save(drawn()[1][1], tmp_path / "masks" / "a.png")
    save(np.zeros((HEIGHT, WIDTH), np.uint8), tmp_path / "masks" / "b.png")
    split = read(tmp_path, ["car"], "object")
    assert [len(items) for items in split.annotations.values()] == [1, 0]


def test_diagonal_neighbours_are_one_part_and_small_parts_are_reported(tmp_path, caplog):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    np.fill_diagonal(pixels[:20, :20], 1)
    pixels[50, 10:14] = 1
    rows = np.arange(HEIGHT)[:, None]
    wanted = [(1, (pixels == 1) & (rows < 30)), (1, (pixels == 1) & (rows >= 30))]
    pixels[55, 70] = 1
    check(one(tmp_path, pixels, ["road"], "index", min_pixels=4), wanted)
    assert "left out 1 parts of classes, under --min_pixels" in caplog.text
    check(one(tmp_path, pixels, ["road"], "index"), [*wanted, (1, (pixels == 1) & (rows == 55))])
    assert "1 parts of classes have under 4 pixels; --min_pixels 4 leaves such out" in caplog.text
    caplog.clear()
    check(one(tmp_path, pixels, ["road"], "index", whole=True), [(1, pixels == 1)])
    pixels[0, -1] = 2  # what is wrong is told alone
    with pytest.raises(DatasetError, match="found none for 1: 2"):
        one(tmp_path, pixels, ["road"], "index")
    assert caplog.text == ""


def test_components_are_those_of_an_independent_count(tmp_path):
    rng = np.random.default_rng(3)
    pixels = (ndimage.gaussian_filter(rng.normal(size=(HEIGHT, WIDTH)), 2) > 0.05).astype(np.uint8)
    items = one(tmp_path, pixels, ["road"], "index")
    union = sum(mask_utils.decode(item["segmentation"]).astype(int) for item in items)
    assert union.max() == 1 and len(items) > 5
    for item in items:  # a flood from one pixel, by dilation, fills the object and nothing else
        mask = mask_utils.decode(item["segmentation"]).astype(bool)
        seed = np.zeros_like(mask)
        seed.flat[np.flatnonzero(mask)[0]] = True
        flood = ndimage.binary_dilation(seed, np.ones((3, 3)), iterations=-1, mask=pixels == 1)
        assert (flood == mask).all()


@pytest.mark.parametrize(
    ("pattern", "photo", "mask"),
    [
        ("{stem}", "sub/a.JPG", "sub/a.png"),
        ("{stem}_mask.png", "a.jpg", "a_mask.PNG"),
        ("{stem}_mask", "sub/a.jpg", "sub/a_mask.tif"),
        ("img{stem}:mask{stem}", "img1.jpg", "mask1.png"),
        ("{stem}_leftImg8bit:{stem}_gtFine", "x/1_leftImg8bit.png", "x/1_gtFine.png"),
        ("{stem}/{stem}.jpg:{stem}/label.png", "1/1.jpg", "1/label.png"),
    ],
)
@pytest.mark.parametrize("folder", ["masks", "images"])
def test_pattern(tmp_path, pattern, photo, mask, folder, caplog):
    write_photo(tmp_path, photo)
    save(index_map(), tmp_path / folder / mask)
    if folder == "images" and ":" not in pattern:
        pattern = pattern if pattern != "{stem}" else f"{{stem}}.jpg:{pattern}.png"
    split = read_masks(tmp_path / "images", tmp_path / folder, NAMES, pattern=pattern)
    assert [image["file_name"] for image in split.images] == [photo]
    check(split.annotations[1], drawn())
    assert caplog.text == ""


def test_a_folder_of_masks_among_the_images(tmp_path, caplog):
    write_photo(tmp_path)
    save(index_map(), tmp_path / "images" / "masks" / "a.png")
    split = read_masks(tmp_path / "images", tmp_path / "images" / "masks", NAMES)
    check(split.annotations[1], drawn())
    assert len(split.images) == 1 and caplog.text == ""


def test_object_files_with_a_pattern(tmp_path):
    write_photo(tmp_path, "1/images/1.png")
    for number, (_, mask) in enumerate(drawn()):
        save(mask, tmp_path / "images" / "1" / "masks" / f"{number}f.png")
    folder = tmp_path / "images"
    pattern = "{stem}/images/{stem}:{stem}/masks"
    split = read_masks(folder, folder, ["nucleus"], "object", pattern=pattern)
    assert [image["file_name"] for image in split.images] == ["1/images/1.png"]
    check(split.annotations[1], [(1, mask) for _, mask in drawn()])


def test_the_image_of_an_object_is_the_one_its_number_leaves(tmp_path):
    for name in ("a.jpg", "a_1.jpg"):
        write_photo(tmp_path, name)
    for name, (_, mask) in zip(("a_0", "a_2", "a_1_0"), drawn(), strict=True):
        save(mask, tmp_path / "masks" / f"{name}.png")
    assert [len(i) for i in read(tmp_path, ["car"], "object").annotations.values()] == [2, 1]
    save(drawn()[0][1], tmp_path / "masks" / "a_1.png")
    message = "each mask to be of one image, found a_1.png for a.jpg and for a_1.jpg; use a folder"
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, ["car"], "object")
    (tmp_path / "images" / "a_1.jpg").unlink()  # what was of it is no object of a.jpg
    with pytest.raises(DatasetError, match="number or the class of car .*, found a_1_0.png; ren"):
        read(tmp_path, ["car"], "object")


def test_what_does_not_pair_is_reported(tmp_path, caplog):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        write_photo(tmp_path, name)
    for name in ("b", "x", "._c", ".ipynb_checkpoints/c", "c"):
        save(index_map(), tmp_path / "masks" / f"{name}.png")
    (tmp_path / "masks" / "names.txt").write_text("road")
    with caplog.at_level(logging.WARNING):
        split = read(tmp_path, NAMES)
    assert "skipped 1 images without a mask: a.jpg" in caplog.text
    assert "skipped 1 masks without an image: x.png" in caplog.text
    assert [image["file_name"] for image in split.images] == ["b.jpg", "c.jpg"]
    assert [item["id"] for items in split.annotations.values() for item in items] == [*range(1, 7)]
    assert read(tmp_path, NAMES) == split


def test_a_mask_is_of_the_photo_as_it_is_shown(tmp_path):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images" / "a.jpg", exif=exif)
    save(index_map(), tmp_path / "masks" / "a.png")
    split = read(tmp_path, NAMES)
    assert (split.images[0]["width"], split.images[0]["height"]) == (WIDTH, HEIGHT)
    check(split.annotations[1], drawn())
    save(index_map().T.copy(), tmp_path / "masks" / "a.png")
    with pytest.raises(DatasetError, match="mask of 80x60 as .*a.jpg, found 60x80 in .*EXIF"):
        read(tmp_path, NAMES)


RED = np.full((HEIGHT, WIDTH, 3), (255, 0, 0), np.uint8)
FLOAT = np.zeros((HEIGHT, WIDTH), np.float32)
RANDOM = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
FIVE = np.full((HEIGHT, WIDTH), 5, np.uint8)
PIXELS = [
    (FIVE, NAMES, None, r"for each value in .*masks, found none for 1: 5 \(4800 pixels\); name"),
    (FIVE, None, "index", r"--classes '\{\"5\": \"name\"\}', or leave .*--void \"5,255\"; if"),
    (RED, {"car": "#0000ff"}, None, r"#ff0000 \(4800 pixels\).*\{\"name\": \"#ff0000\"\}"),
    (RED, NAMES, None, "one value a pixel for --kind index, found colours in .*a.tif; pass"),
    (FIVE * 51, ["car"], "index", r"only 0, 255 \(void\); .*'\{\"255\": \"name\"\}'"),
    (FIVE * 0, ["car"], "instance", "expected objects in .*, found only 0; check --masks_dir"),
    (FLOAT, NAMES, None, "whole numbers or colours, found PIL mode F in .*a.tif; save"),
    (FIVE.astype(np.uint16), {"car": "#ff0000"}, None, "found PIL mode I;16 in .*a.tif"),
    (FIVE.astype(np.int32) - 9, ["cell"], "instance", "values from 0, found -4 in .*a.tif"),
    (FIVE[:30], NAMES, None, "mask of 80x60 as .*a.jpg, found 80x30 in .*; export it at"),
    (RANDOM, ["cell"], "instance", "up to 10000 values in a mask, found .*not photos"),
    (index_map(), ["cell"], "object", "0 and one other value .*, found 2 in .*--kind inst"),
]


@pytest.mark.parametrize(("pixels", "classes", "kind", "message"), PIXELS)
def test_pixels_that_are_refused(tmp_path, pixels, classes, kind, message):
    write_photo(tmp_path, size=(160, 120) if pixels is RANDOM else (WIDTH, HEIGHT))
    save(pixels, tmp_path / "masks" / "a.tif")
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, classes, kind)


def test_files_that_are_refused(tmp_path):
    write_photo(tmp_path)
    file = tmp_path / "masks" / "a.png"
    save(index_map(), file)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DatasetError, match="expected a mask that PIL reads, found .*a.png"):
        read(tmp_path, NAMES)
    Image.fromarray(index_map()).save(file, format="JPEG")  # whatever it is called
    with pytest.raises(DatasetError, match="PNG or TIFF, found .*a.png, whose JPEG compression"):
        read(tmp_path, NAMES)
    file.unlink()
    pages = [Image.fromarray(index_map())] * 3
    pages[0].save(file.with_suffix(".tif"), save_all=True, append_images=pages[1:])
    with pytest.raises(DatasetError, match="one page, found 3 in .*a.tif; save each slice"):
        read(tmp_path, NAMES)


CLASSES = [
    (None, None, "expected --kind index .a value a class.*found none and no classes; pass --kind"),
    (["car"], None, "found none and one class, 'car', which fits each of them"),
    (["a", "b"], "instance", r"--classes as one name for --kind instance, found \['a', 'b'\]"),
    (None, "object", "expected --classes as names for --kind object, found None; write --classes"),
    ({"1": "a"}, "object", "expected --classes as names for --kind object"),
    (NAMES, "colour", r"expected a colour for each class, found the names road, car; write .*#ff0"),
    (
        {"road": "red"},
        "colour",
        r"as \{\"road\": \"#804080\"\} for --kind colour, found 'road': 'red'",
    ),
    ({"road": [1, 2, 256]}, None, "found 'road': .1, 2, 256.; correct it"),
    ({"road": [1, 2, "3"]}, None, "found 'road': .1, 2, '3'.; correct it"),
    ({"1": ""}, None, r"expected --classes as \{\"7\": \"road\"\} for --kind index, found '1': ''"),
    ({"road": 1.5}, "index", "for --kind index, found 'road': 1.5"),
    ({"a": "#ff0000", "b": [255, 0, 0]}, None, "a value of its own .* found #ff0000 for 'a' and"),
    ({"1": "a", "01": "b"}, None, "found 1 for 'a' and 'b'; correct --classes"),
]


@pytest.mark.parametrize(("classes", "kind", "message"), CLASSES)
def test_classes_that_are_refused(tmp_path, classes, kind, message):
    with pytest.raises(DatasetError, match=message):
        one(tmp_path, index_map(), classes, kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"void": ["none"]}, "expected --void as values or colours, found 'none'; write --void"),
        ({"pattern": "*_mask"}, r"--pattern with \{stem\} in each path, found '\*_mask'; write"),
        ({"pattern": "img:{stem}"}, "in each path, found 'img'"),
        ({"kind": "instance", "whole": True}, "--whole with --kind index or colour, found it with"),
        ({"kind": "object", "min_pixels": 2}, "--min_pixels with --kind index or colour, found it"),
        ({"min_pixels": 0}, "--min_pixels of 1 or more, found 0; --whole makes all"),
    ],
)
def test_options_that_are_refused(tmp_path, options, message):
    with pytest.raises(DatasetError, match=message):
        one(tmp_path, index_map(), NAMES, **options)


def test_names_that_do_not_pair(tmp_path):
    write_photo(tmp_path)
    with pytest.raises(DatasetError, match="a folder at --masks_dir .*masks, found none; check"):
        read(tmp_path, NAMES)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DatasetError, match="expected files .bmp .*masks, found none; check --mas"):
        read(tmp_path, NAMES)
    save(index_map(), tmp_path / "masks" / "a_mask.png")
    message = r"by --pattern '\{stem\}', found none for 1 images and 1 masks, such as a.jpg and "
    with pytest.raises(DatasetError, match=message + r"a_mask.png; .*, such as \"\{stem\}_mask.pn"):
        read(tmp_path, NAMES)
    with pytest.raises(DatasetError, match="a class of road, car after a.jpg's name, found a_mask"):
        read(tmp_path, NAMES, "object")
    for name in ("a.png", "a.tif"):
        save(index_map(), tmp_path / "masks" / name)
    with pytest.raises(DatasetError, match="one mask for a.jpg, found a.png and a.tif; name one"):
        read(tmp_path, NAMES)
    write_photo(tmp_path, "a.bmp")
    with pytest.raises(DatasetError, match="one image for a mask, found a.bmp and a.jpg in "):
        read(tmp_path, NAMES)
    with pytest.raises(DatasetError, match="found that each file is taken for a mask; tell them"):
        read_masks(tmp_path / "images", tmp_path / "images", NAMES)


def masks_command(folder: Path, *more: str) -> list[str]:
    paths = ["--images_dir", str(folder / "images"), "--masks_dir", str(folder / "masks")]
    return ["masks", *paths, "--output_dir", str(folder / "data"), *more]


def test_command(tmp_path, capsys):
    write_photo(tmp_path)
    save(index_map(), tmp_path / "masks" / "a.png")
    (table := tmp_path / "classes.json").write_text('{"1": "road", "2": "car"}')
    written = []
    many = ",".join(["road, car", *map(str, range(3, 900))])  # longer than a path may be
    assert prepare_data.main(masks_command(tmp_path, "--classes", many, "--void", "255,9")) == 0
    for classes in ("road, car", table.read_text(), str(table)):
        command = masks_command(tmp_path, "--classes", classes, "--overwrite", "--void", "255,9")
        assert prepare_data.main([*command, "--prompts", '{"car": "parked car"}']) == 0
        assert '2  car  prompted as "parked car"' in capsys.readouterr().out
        written.append((tmp_path / "data" / "train" / "annotations.json").read_bytes())
    assert written[0] == written[1] == written[2]
    check(coco.read_split(tmp_path / "data" / "train").annotations[1], drawn())
    assert prepare_data.main(["validate", "--data_dir", str(tmp_path / "data")]) == 0
    assert prepare_data.main([*command, "--whole"]) == 0
    assert "objects     2 (2 with a mask" in capsys.readouterr().out
    table.write_text("[1]")
    assert prepare_data.main(command) == 2
    assert "expected --classes as a JSON object, found list" in capsys.readouterr().err
    assert prepare_data.main(masks_command(tmp_path, "--kind", "index", "--classes", "{")) == 2
    assert "expected --classes as JSON" in capsys.readouterr().err


CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "traffic_sign", "fence", "car"]
CAMVID += ["pedestrian", "bicyclist"]


@pytest.mark.real_data
@pytest.mark.parametrize(("split", "count", "objects"), [("train", 5, 243), ("test", 3, 213)])
def test_real_index_masks(real_data, tmp_path, split, count, objects):
    folder = real_data / "semseg_png_dirs"
    masks_dir = folder / f"annotations_prepped_{split}"
    flags = ["--images_dir", str(folder / f"images_prepped_{split}"), "--masks_dir", str(masks_dir)]
    flags += ["--classes", json.dumps(dict(enumerate(CAMVID))), "--void", "11", "--split", split]
    assert prepare_data.main(["masks", *flags, "--output_dir", str(tmp_path)]) == 0
    assert prepare_data.main(["validate", "--data_dir", str(tmp_path), "--split", split]) == 0
    found = coco.read_split(tmp_path / split)
    assert len(found.images) == count
    assert sum(map(len, found.annotations.values())) == objects
    for image in found.images:
        values = np.asarray(Image.open(masks_dir / image["file_name"]))
        union = np.full_like(values, 11)
        for item in found.annotations[image["id"]]:
            union[mask_utils.decode(item["segmentation"]) == 1] = item["category_id"] - 1
        assert (union == values).all()


@pytest.mark.real_data
@pytest.mark.parametrize(("folder", "objects"), [("tests/data", 65), ("stardist/data/images", 125)])
def test_real_label_maps(real_data, tmp_path, folder, objects):
    folder = real_data / "stardist_labelmaps" / folder
    flags = ["--images_dir", str(folder), "--masks_dir", str(folder), "--classes", "nucleus"]
    command = ["masks", *flags, "--kind", "instance", "--output_dir", str(tmp_path)]
    assert prepare_data.main([*command, "--pattern", "img2{stem}:mask2{stem}"]) == 0
    assert prepare_data.main(["validate", "--data_dir", str(tmp_path)]) == 0
    values = np.asarray(Image.open(folder / "mask2d.tif"))
    items = coco.read_split(tmp_path / "train").annotations[1]
    assert len(items) == len(np.unique(values)) - 1 == objects
    for item, value in zip(items, np.unique(values)[1:], strict=True):
        assert (mask_utils.decode(item["segmentation"]) == (values == value)).all()
