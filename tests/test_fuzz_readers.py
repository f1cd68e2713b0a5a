"""Random and mutated files through every reader, and hostile images that are to be read.

What a reader is given ends in a split that survives writing and reading, or in a DatasetError of
one line: in no other exception.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

import inference
import prepare_data
from sam3_lora import coco, formats, geometry, images
from sam3_lora.coco import CocoSplit, DatasetError
from sam3_lora.mask_images import KINDS, read_masks

WIDTH, HEIGHT = 24, 16
MOST_KILOBYTES = 3_500_000  # of a run on 8000 x 8000 pixels, 0.2 GB as they are
NAN, INF = float("nan"), float("inf")
# Values that readers have been known to trip over.
ODD = [None, True, 0, 1, -1, 2, 1.5, NAN, INF, -INF, 10**19, 10**300, 1e300, "", "1", "a\0b"]
ODD += [
    "\ud800",
    "../1.png",
    "1.png",
    "x" * 300 + ".png",
    [],
    {},
    [[]],
    [1, 2, 3, 4],
    [[1, 2, 3, 4, 5, 6]],
    "é",
    "٣",
]
ODD += [[NAN] * 4, ["1"] * 4, [[0, 0, 1e9, 1, 2, 9]], {"size": [16, 24], "counts": "0"}]

fuzz = settings(derandomize=True, database=None, deadline=None, max_examples=150)
fuzz = settings(fuzz, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
values = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=4)
values |= st.lists(st.integers(-9, 400) | st.floats(), max_size=8)


def picture(mode: str = "RGB", form: str = "PNG", size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """A flat picture in a format."""
    stream = BytesIO()
    Image.new(mode, size).save(stream, form)
    return stream.getvalue()


PHOTO = picture()
POLYGON = [2, 2, 20, 2, 20, 12, 2, 12]
COCO = {
    "images": [
        {"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "2.png", "width": WIDTH, "height": HEIGHT},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 18, 10], "area": 180}
        | {"segmentation": [POLYGON], "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [0, 0, 4, 16], "iscrowd": 1}
        | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 64, 320]}},
    ],
    "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "van"}],
    "prompts": {"van": "delivery van"},
}
POINTS = [[2, 2], [20, 2], [20, 12]]
LABELME = {
    "imagePath": "1.png",
    "imageWidth": WIDTH,
    "imageHeight": HEIGHT,
    "shapes": [
        {"label": "car", "shape_type": "polygon", "points": POINTS, "group_id": 1},
        {"label": "van", "shape_type": "rectangle", "points": POINTS[::2], "group_id": None},
        {"label": "car", "shape_type": "circle", "points": POINTS[1:]},
    ],
}
VIA_SHAPES = [
    {"name": "rect", "x": 1, "y": 1, "width": 5, "height": 5},
    {"name": "ellipse", "cx": 9, "cy": 9, "rx": 3, "ry": 2, "theta": 0.5},
    {"name": "polygon", "all_points_x": [2, 20, 20], "all_points_y": [2, 2, 12]},
]
VIA = {
    "a": {
        "filename": "1.png",
        "regions": [
            {"shape_attributes": shape, "region_attributes": {"kind": "car"}}
            for shape in VIA_SHAPES
        ],
    }
}
BOX = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>20</xmax><ymax>12</ymax></bndbox>"
VOC = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
VOC += f"<object><name>car</name>{BOX}</object>"
VOC = f"<annotation><filename>1.png</filename>{VOC}</annotation>"
YOLO = "0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.9 0.1 0.9 0.9\n"
DATA_YAML = "path: .\ntrain: images\nnames:\n  0: car\n  1: van\n"


def as_json(content: Any) -> bytes:
    """A JSON file of a value, which may hold halves of characters."""
    return json.dumps(content).encode()


def read(reader: Callable[[Path], CocoSplit], files: dict[str, bytes]) -> CocoSplit | None:
    """Writes files, reads them, and has what is read written and read again; None if refused."""
    with tempfile.TemporaryDirectory() as root:
        for name, content in files.items():
            path = Path(root) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        try:
            split = reader(Path(root))
        except DatasetError as error:
            assert str(error).strip() and len(str(error).splitlines()) == 1
            return None
        assert split.images and split.categories
        for image in split.images:
            for row in split.annotations[image["id"]]:
                assert geometry.is_box(row["bbox"]) and geometry.is_finite(row["area"])
                if row["segmentation"] is not None:
                    size = image["height"], image["width"]
                    assert coco.decode_mask(row["segmentation"], *size).shape == size
        try:
            (folder,) = coco.write_splits(Path(root) / "out", {"train": split})
        except DatasetError:  # an image that the file names is absent
            return split
        again = coco.read_split(folder)
        assert again.images == split.images and again.prompts == split.prompts
        assert list(again.categories.values()) == list(split.categories.values())
        rows, others = ([r for v in s.annotations.values() for r in v] for s in (split, again))
        for row, other in zip(rows, others, strict=True):
            assert {k: row[k] for k in ("bbox", "area", "iscrowd", "segmentation")} == {
                k: other[k] for k in ("bbox", "area", "iscrowd", "segmentation")
            }
        return split


def read_coco(root: Path) -> CocoSplit:
    return prepare_data.skip_missing(coco.read_coco(root / "a.json", root))


# Reader, the name of the file that is mutated, its content, the files beside it.
READERS: dict[str, tuple[Callable[[Path], CocoSplit], str, bytes, dict[str, bytes]]] = {
    "coco": (read_coco, "a.json", as_json(COCO), {"1.png": PHOTO, "2.png": PHOTO}),
    "yolo": (
        lambda root: formats.read_yolo(root, "train"),
        "labels/1.txt",
        YOLO.encode(),
        {"images/1.png": PHOTO, "data.yaml": DATA_YAML.encode()},
    ),
    "data.yaml": (
        lambda root: formats.read_yolo(root, "train"),
        "data.yaml",
        DATA_YAML.encode(),
        {"images/1.png": PHOTO, "labels/1.txt": YOLO.encode()},
    ),
    "voc": (
        lambda root: formats.read_voc(root, "train"),
        "1.xml",
        VOC.encode(),
        {"1.png": PHOTO},
    ),
    "labelme": (formats.read_labelme, "1.json", as_json(LABELME), {"1.png": PHOTO}),
    "via": (
        lambda root: formats.read_via(root / "via.json", root),
        "via.json",
        as_json(VIA),
        {"1.png": PHOTO},
    ),
    "masks": (
        lambda root: read_masks(root / "images", root / "masks", ["car"], "instance"),
        "masks/1.png",
        picture("L"),
        {"images/1.png": PHOTO},
    ),
    "photo": (
        lambda root: formats.read_yolo(root, "train", ["car", "van"]),
        "images/1.png",
        PHOTO,
        {"labels/1.txt": YOLO.encode()},
    ),
}


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes of a file cut, doubled or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 1, 4, 20, 10**6])))
        put = draw(
            st.sampled_from([b"", b"", content[start:end] * 2, b"-", b"9" * 400, b"nan", b"\xff\0"])
            | st.binary(max_size=6)
        )
        content = content[:start] + put + content[end:]
    return content


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """A JSON value of which some parts are others, or gone."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.integers(0, 4)):
                place = place[key]
                continue
            if draw(st.integers(0, 5)):
                place[key] = copy.deepcopy(draw(values))  # or the next change would reach it
            else:
                del place[key]
            break
    return content


@pytest.mark.parametrize("name", sorted(set(READERS) - {"masks"}))  # which holds no object
def test_a_file_that_is_mutated_is_sound(name: str) -> None:
    reader, file, content, others = READERS[name]
    assert read(reader, {file: content, **others}) is not None


@pytest.mark.scripts
@pytest.mark.parametrize("name", READERS)
def test_mutated_bytes(name: str) -> None:
    reader, file, content, others = READERS[name]

    @fuzz
    @given(mutated(content))
    def check(mutant: bytes) -> None:
        read(reader, {file: mutant, **others})

    check()


@pytest.mark.scripts
@pytest.mark.parametrize("name", ["coco", "labelme", "via"])
def test_changed_values(name: str) -> None:
    reader, file, content, others = READERS[name]
    accepted = 0

    @settings(fuzz, max_examples=400)
    @given(changed(json.loads(content)))
    def check(mutant: Any) -> None:
        nonlocal accepted
        accepted += read(reader, {file: as_json(mutant), **others}) is not None

    check()
    assert accepted > 0


@pytest.mark.scripts
@fuzz
@given(st.lists(st.lists(values, max_size=7), max_size=4))
def test_any_words_in_a_label_file(rows: list[list[Any]]) -> None:
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    reader, file, _, others = READERS["yolo"]
    read(reader, {file: text.encode("utf-8", "surrogatepass"), **others})


@pytest.mark.scripts
@settings(fuzz, max_examples=100)
@given(
    st.sampled_from(["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]),
    st.sampled_from(KINDS),
    st.sampled_from([["car"], ["car", "van"], {"7": "car"}, {"car": "#0000ff"}, {"a": None}, None]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(WIDTH, HEIGHT), (HEIGHT, WIDTH)]),
)
def test_masks_of_any_mode(mode: str, kind: str, classes: Any, seed: int, size: Any) -> None:
    rng = np.random.default_rng(seed)
    image = Image.new(mode, size)
    for xy in rng.integers(0, min(size), (9, 2)).tolist():
        count = len(image.getbands())
        color = tuple(rng.integers(0, 9, count).tolist()) if count > 1 else int(rng.integers(0, 9))
        image.putpixel(xy, color)
    stream = BytesIO()
    image.save(stream, "TIFF")
    files = {"masks/1.tif": stream.getvalue(), "images/1.png": PHOTO}
    read(lambda root: read_masks(root / "images", root / "masks", classes, kind), files)


counts = st.lists(values | st.integers(0, 500), max_size=6) | st.text(max_size=12)
counts |= st.binary(max_size=12) | st.text("0123456789:;<=>?@ABCDEFGHIJKLMNO", max_size=9)
polygons = st.lists(st.lists(values | st.floats(-50, 90), max_size=12) | values, max_size=3)


@pytest.mark.scripts
@settings(fuzz, max_examples=600)
@given(st.fixed_dictionaries({"size": st.just([HEIGHT, WIDTH]) | values, "counts": counts}))
def test_any_runs_are_a_mask_or_refused(rle: dict[str, Any]) -> None:
    check_mask(rle)


@settings(fuzz, max_examples=600)
@given(polygons | values)
def test_any_polygons_are_a_mask_or_refused(segmentation: Any) -> None:
    check_mask(segmentation)


def check_mask(segmentation: Any) -> None:
    """Asserts that a segmentation is refused, or is a mask that its RLE gives back."""
    try:
        mask = coco.decode_mask(segmentation, HEIGHT, WIDTH)
    except DatasetError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert mask.shape == (HEIGHT, WIDTH) and mask.dtype == bool
    assert (coco.decode_mask(coco.encode_mask(mask), HEIGHT, WIDTH) == mask).all()
    assert coco.mask_area(segmentation, HEIGHT, WIDTH) == mask.sum()


def write_animation(path: Path) -> None:
    frames = [Image.new("P", (WIDTH, HEIGHT), n) for n in range(3)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def write_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(path, "JPEG", exif=exif)


def write_transparent(path: Path) -> None:
    Image.new("P", (WIDTH, HEIGHT), 1).save(path, "PNG", transparency=1)


# How a photo is written that is odd and yet to be read, and its size as shown.
ODD_PHOTOS: dict[str, tuple[Callable[[Path], object], tuple[int, int]]] = {
    "1 x 1": (lambda path: path.write_bytes(picture(size=(1, 1))), (1, 1)),
    "1 x 5000": (lambda path: path.write_bytes(picture(size=(1, 5000))), (1, 5000)),
    "5000 x 1": (lambda path: path.write_bytes(picture(size=(5000, 1))), (5000, 1)),
    "16-bit": (lambda path: path.write_bytes(picture("I;16")), (WIDTH, HEIGHT)),
    "CMYK": (lambda path: path.write_bytes(picture("CMYK", "JPEG")), (WIDTH, HEIGHT)),
    "palette with transparency": (write_transparent, (WIDTH, HEIGHT)),
    "animated GIF": (write_animation, (WIDTH, HEIGHT)),
    "turned by EXIF": (write_turned, (WIDTH, HEIGHT)),
}


@pytest.mark.scripts
@pytest.mark.parametrize("name", ODD_PHOTOS)
def test_an_odd_photo_is_read(name: str, tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    write, size = ODD_PHOTOS[name]
    path, out = tmp_path / "photo of 🙂.png", tmp_path / "out"
    write(path)
    assert images.image_size(path) == size and images.read_image(path).shape == (*size[::-1], 3)
    flags = ["--model_name", str(tiny_model_dir), "--image", str(path), "--output", str(out)]
    assert inference.main([*flags, "--text_prompt", "car", "--threshold", "0"]) == 0
    assert images.image_size(out / "photo of 🙂_overlay.png") == size
    rows = json.loads((out / "photo of 🙂_detections.json").read_text(encoding="utf-8"))
    assert rows and all(geometry.is_box(row["bbox"]) for row in rows)


# Prompts that are odd and yet to be read; the model reads the first 32 tokens of a long one.
ODD_PROMPTS = [
    "car " * 2500,
    "🙂" * 10_000,
    "🙂",
    "红色的汽车",
    "سيارة حمراء",
    "rød\nbil",
    "<end>",
    "a" * 10_000,
]


@pytest.mark.scripts
def test_odd_prompts_are_read(tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "1.png").write_bytes(PHOTO)
    flags = ["--model_name", str(tiny_model_dir), "--image", str(tmp_path / "1.png")]
    flags += ["--output", str(tmp_path / "out"), "--threshold", "0"]
    assert inference.main([*flags, "--text_prompt", *ODD_PROMPTS]) == 0
    rows = json.loads((tmp_path / "out" / "1_detections.json").read_text(encoding="utf-8"))
    assert {row["prompt"] for row in rows} == {" ".join(text.split()) for text in ODD_PROMPTS}


@pytest.mark.scripts
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the memory of a child is not told")
def test_a_photo_of_64_megapixels_takes_some_memory(tiny_model_dir: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8000, 8000)).save(tmp_path / "1.png", compress_level=1)
    command = [sys.executable, inference.__file__, "--model_name", str(tiny_model_dir)]
    command += ["--image", str(tmp_path / "1.png"), "--text_prompt", "car"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0 and b"1.png: car" in output
    assert usage.ru_maxrss < MOST_KILOBYTES
