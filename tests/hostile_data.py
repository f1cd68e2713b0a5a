"""Hostile images, annotations, prompts, boxes, videos and data folders, as a table.

test_hostile.py runs the cases beside those of hostile_runs.py: each must be refused in one line,
with exit code 2, and write nothing.
"""

import base64
import json
import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from hostile_runs import Case, Places
from PIL import Image

Make = Callable[[Path, Places], object]
WIDTH, HEIGHT = 40, 30
SIDE = 60_000  # pixels; a picture of this side squared would take 10 GB
COCO = "coco --coco_json {folder}/a.json --images_dir {folder}/images --output_dir {out}"
YOLO = "yolo --yolo_dir {folder}/in --output_dir {out}"
VOC = "voc --voc_dir {folder}/in --output_dir {out}"
LABELME = "labelme --labelme_dir {folder}/in --output_dir {out}"
VIA = "via --via_json {folder}/in/via.json --images_dir {folder}/in --output_dir {out}"
SPLIT = "split --data_dir {data}/val --output_dir {out}"
MASKS = "masks --images_dir {folder}/images --masks_dir {folder}/masks --output_dir {out}"
RUN = "--model_name {model} --output {out}"
FIND = f"{RUN} --text_prompt square"
DATA_DIR = "{folder}/data"
EVALUATE = "--base --model_name {model} --output_dir {out}"


def picture(form: str = "PNG", size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> bytes:
    """A flat picture in a format."""
    stream = BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(stream, form, **options)
    return stream.getvalue()


def noise(form: str) -> bytes:
    """A picture that takes some kilobytes in a format."""
    stream = BytesIO()
    Image.effect_noise((96, 64), 90).convert("RGB").save(stream, form)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png_of(width: int, height: int, content: bytes = bytes(1000)) -> bytes:
    """A PNG whose header tells a size, with whatever content."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of(width: int, height: int) -> bytes:
    """A TIFF of one strip whose header tells a size."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 200), (277, 3, 1), (278, 4, height), (279, 4, 8)]
    rows = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + rows + bytes(4)
    return head.ljust(200, b"\0") + bytes(8)


SMALL = struct.pack("<HH", WIDTH, HEIGHT)
BOMBS = {
    "big.png": png_of(10_000, 10_000),
    "x.png": png_of(SIDE, SIDE),
    "x.gif": picture("GIF").replace(SMALL, struct.pack("<HH", SIDE, SIDE)),
    "x.tif": tiff_of(SIDE, SIDE),
    "x.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, SIDE, SIDE, 1, 24, *[0] * 6),
    "x.jpg": picture("JPEG").replace(SMALL[:1:-1] + SMALL[1::-1], struct.pack(">HH", SIDE, SIDE)),
}
PNG, JPEG = noise("PNG"), noise("JPEG")


def file(name: str, content: bytes | str) -> Make:
    """Writes a file."""

    def make(folder: Path, _: Places) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def both(*makes: Make) -> Make:
    """Writes several."""
    return lambda *where: [make(*where) for make in makes]


def link(name: str, target: str) -> Make:
    """Writes a link."""
    return lambda folder, _: (folder / name).symlink_to(target)


def files(**contents: bytes | str) -> Make:
    """Writes files, `__` standing for a slash and `_` before the end for the suffix's dot."""

    def make(folder: Path, places: Places) -> None:
        for key, content in contents.items():
            stem, _, suffix = key.replace("__", "/").rpartition("_")
            file(f"{stem}.{suffix}", content)(folder, places)

    return make


def payload(**tables: Any) -> dict[str, Any]:
    """A COCO file of one image with one object."""
    return {
        "images": [{"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 18, 18], "iscrowd": 0}
            | {"area": 324, "segmentation": [[2, 2, 20, 2, 20, 20, 2, 20]]}
        ],
        "categories": [{"id": 1, "name": "car"}],
    } | tables


def coco_text(text: str | bytes) -> Make:
    """Writes a COCO file of that text, beside its image."""
    return both(file("a.json", text), file("images/1.png", picture()))


GOOD = coco_text(json.dumps(payload()))


def coco(name: str, table: str, changes: dict[str, Any], message: str) -> Case:
    """A COCO file of which the first row of a table is changed."""
    content = payload()
    content[table][0] |= changes
    return Case(f"coco {name}", "prepare_data", COCO, message, coco_text(json.dumps(content)))


def convert(name: str, argv: str, message: str, **contents: bytes | str) -> Case:
    """A conversion of files."""
    return Case(name, "prepare_data", argv, message, files(**contents))


def find(name: str, flags: str, message: str, make: Any = None, **options: Any) -> Case:
    """A run of the inference script."""
    return Case(name, "inference", f"{FIND} {flags}", message, make, **options)


def on_image(name: str, argv: str, message: str) -> Case:
    """A run of the inference script on the shared image, with prompts or boxes of its own."""
    return Case(name, "inference", f"{RUN} --image {{image}} {argv}", message)


def val(content: dict[str, Any], image: bytes | None = None) -> Make:
    """Writes a data folder's split `val`."""
    name = "data__val__images__1_png" if image else "data__val__images__note_txt"
    return files(data__val__annotations_json=json.dumps(content), **{name: image or b""})


HUGE = 10**300
NAN, INF = float("nan"), float("inf")
NESTED = "[" * 100_000 + "]" * 100_000


def cut(name: str, whole: bytes, size: int, message: str) -> Case:
    """A picture of which only the first bytes are there."""
    make = file(name, whole[:size])
    return find(f"{name} cut to {size} bytes", f"--image {{folder}}/{name}", message, make)


IMAGES = [
    *(
        find(f"bomb {name}", f"--image {{folder}}/{name}", message, file(name, BOMBS[name]))
        for name, message in (
            ("x.png", "at most 89478485 pixels"),
            ("x.tif", "at most 89478485 pixels"),
            ("x.gif", "at most 89478485 pixels"),
            ("x.bmp", "at most 89478485 pixels"),
            ("x.jpg", "at most 89478485 pixels"),
            ("big.png", "(10000 x 10000 pixels)"),
        )
    ),
    cut("x.png", PNG, 20, "Truncated File Read"),
    cut("x.png", PNG, len(PNG) // 2, "image file is truncated"),
    cut("x.jpg", JPEG, 2, "cannot identify image file"),
    cut("x.jpg", JPEG, len(JPEG) // 2, "image file is truncated"),
    cut("empty.png", PNG, 0, "cannot identify image file"),
    find("text as jpg", "--image {folder}/x.jpg", "an image that PIL", file("x.jpg", "hello")),
    find("page as png", "--image {folder}/x.png", "an image", file("x.png", "<!DOCTYPE html><p>")),
    find("svg", "--image {folder}/x.svg", "an image that PIL", file("x.svg", "<svg></svg>")),
    find("damaged", "--image {folder}/x.png", "truncated", file("x.png", png_of(40, 30, b"no"))),
    find("png of no side", "--image {folder}/x.png", "image", file("x.png", png_of(0, 30))),
    find("absent", "--image {folder}/x.png", "expected an image or a folder of images, found no"),
    find("dangling link", "--image {folder}/x.png", "found no", link("x.png", "nowhere.png")),
    find("name of half a character", "--image {folder}/in", "a printable name",
        file("in/\udcff.png", PNG)),
    find("name of 210 bytes", "--image {folder}/in", "of at most 200 bytes",
        file(f"in/{'x' * 206}.png", PNG)),
    find("pipe", "--image {folder}/x.png", "no file", lambda f, _: os.mkfifo(f / "x.png")),
    find("link to itself", "--image {folder}/x.png", "x.png", link("x.png", "x.png")),
    find("device", "--image /dev/null", "expected an image"),
    find("folder as image", "--image {folder}/x.jpg", "found none", file("x.jpg/a.txt", "hi")),
    find("empty folder", "--image {folder}", "expected images (.bmp, .jpeg"),
    find(
        "one bad among good", "--image {folder}/in", "cannot identify image",
        files(in__a_png=PNG, in__b_png=b"no", in__c_png=PNG),
    ),
    find(
        "one cut among good", "--image {folder}/in", "image file is truncated",
        files(in__a_png=PNG, in__b_png=PNG[:2000], in__c_png=PNG), writes=("out*",),
    ),
    find("name of 300 bytes", "--image {folder}/" + "x" * 300 + ".png", "File name too long"),
    find("name with a line break", "--image '{folder}/a\nb.png'", "found no"),
]  # fmt: skip

BOXES = [
    on_image("boxes not JSON", "--bboxes '[[1, 2'", "in pixels, found '[[1, 2'"),
    on_image("boxes nested deep", f"--bboxes '{NESTED[:9999]}'", "in pixels, found"),
    on_image("one box", "--bboxes '[1, 2, 3, 4]'", "did you mean '[[1, 2, 3, 4]]'"),
    on_image("box of 3", "--bboxes '[[1, 2, 3]]'", "found the box [1.0, 2.0, 3.0]"),
    on_image("box inverted", "--bboxes '[[20, 2, 3, 9]]'", "x1 < x2 and y1 < y2, found the box"),
    on_image("box of no area", "--bboxes '[[2, 2, 2, 9]]'", "expected two corners"),
    on_image("box outside", "--bboxes '[[1, 2, 999, 9]]'", "expected boxes inside"),
    on_image("box of NaN", "--bboxes '[[1, 2, NaN, 9]]'", "found the box [1.0, 2.0, NaN, 9.0]"),
    on_image("box to infinity", "--bboxes '[[1, 2, Infinity, 9]]'", "found the box"),
    on_image("box of 10^400", f"--bboxes '[[1, 2, 1{'0' * 400}, 9]]'", "found the box"),
    on_image("box in fractions", "--bboxes '[[0.1, 0.1, 0.5, 0.5]]'", "looks like fractions"),
    on_image("labels too many", "--bboxes '[[1, 2, 9, 9]]' --bbox_labels '[1, 0]'", "one for each"),
    on_image("label 2", "--bboxes '[[1, 2, 9, 9]]' --bbox_labels '[2]'", "0 for a negative one"),
    on_image("label true", "--bboxes '[[1, 2, 9, 9]]' --bbox_labels '[true]'", "found '[true]'"),
    on_image(
        "3,000 boxes outside", f"--bboxes '{json.dumps([[1, 2, 999, 9]] * 3000)}'", "; 2997 more"
    ),
]

PROMPTS = [
    on_image("prompt empty", "--text_prompt ''", "expected words, found an empty text"),
    on_image("prompt of spaces", "--text_prompt ' \t\n '", "found an empty text"),
    on_image("no prompt", "", "expected --text_prompt or --bboxes, found neither"),
    on_image("prompt of half a character", "--text_prompt 'a\udcffb'", "text in UTF-8"),
    *(
        on_image(f"{flag} {value}", f"--text_prompt car {flag} {value}", message)
        for flag, value, message in (
            ("--threshold", "1.5", "a number from 0 to 1, found '1.5'"),
            ("--threshold", "1e400", "a number from 0 to 1, found '1e400'"),
            ("--nms_iou", "-1", "--nms_iou"),
            ("--tile", "1e-9", "from 0.01 to less than 1"),
        )
    ),
]

OUTPUTS = [
    on_image("output a text file", "--text_prompt a --output {folder}/a.txt", "an image file"),
    on_image("output the input", "--text_prompt a --output {image}", "an input"),
    on_image("json the input", "--text_prompt a --json {image}", "an input"),
    on_image("json the overlay", "--text_prompt a --output a.png --json a.png", "two outputs"),
    find("output in a file", "--image {image} --output {folder}/a/b", "a/b", file("a", "hello")),
    find("output a file", "--image {image} --output {folder}/a", "a", file("a", "hello")),
    find("json in a file", "--image {image} --json {folder}/a/b", "--json", file("a", "hello")),
    on_image("output in a device", "--text_prompt a --output /dev/null/x", "/dev/null"),
    on_image("output unwritable", "--text_prompt a --output /proc/x", "--output"),
    on_image("json with a name too long", f"--text_prompt a --json {'x' * 300}", "too long"),
]

VIDEOS = [
    Case(name, "inference", f"{FIND} --video {argv}", message, make)
    for name, argv, message, make in (
        ("video absent", "{folder}/v", "expected a folder of frames or a video", None),
        ("video of text", "{folder}/v.mp4", "--video", file("v.mp4", "hello " * 99)),
        ("video empty", "{folder}/v.mp4", "--video", file("v.mp4", "")),
        ("video of noise", "{folder}/v.mp4", "--video", file("v.mp4", bytes(range(256)) * 99)),
        ("video of a device", "/dev/null", "--video", None),
        ("video frames of two sizes", "{folder}/v", "frames of one size, 96 x 64 as the first",
            files(v__1_png=PNG, v__2_png=picture())),
        ("video frame no image", "{folder}/v", "cannot identify",
            files(v__1_png=PNG, v__2_png=b"no", v__3_png=PNG)),
        ("video frame cut", "{folder}/v", "truncated",
            files(v__1_png=PNG, v__2_png=PNG[:2000], v__3_png=PNG)),
        ("video output a gif", "{folder}/v --output v.gif", "expected a folder for a video",
            files(v__1_png=PNG)),
        ("video output in a file", "{folder}/v --output a/b", "--output",
            both(file("v/1.png", PNG), file("a", ""))),
    )
]  # fmt: skip

RECORDS = [
    *(
        Case(f"coco {name}", "prepare_data", COCO, message, coco_text(text))
        for name, text, message in (
            ("not JSON", "hello", "expected JSON in"),
            ("list", "[1, 2]", 'a list of objects under "images"'),
            ("nested deep", NESTED, "expected JSON in"),
            ("UTF-16", json.dumps(payload()).encode("utf-16"), "expected JSON in"),
            ("duplicate key", '{"images": [], ' + json.dumps(payload())[1:].replace("[", "[", 1),
                "the key 'images' twice"),
        )
    ),
    coco("file absent", "images", {"file_name": "2.png"}, "found none of 1: 2.png"),
    coco("category name with a line break", "categories", {"name": "a\nb"}, "printable text"),
]  # fmt: skip


def voc(objects: str, head: str = "") -> str:
    """A VOC file of one image."""
    return f"{head}<annotation><filename>1.png</filename>{objects}</annotation>"


def voc_box(name: str, *sides: object) -> str:
    """An object of a VOC file."""
    names = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{n}>{v}</{n}>" for n, v in zip(names, sides, strict=True))
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def labelme(**fields: Any) -> str:
    """A LabelMe file of one shape."""
    shape = {"label": "car", "shape_type": "polygon", "points": [[1, 1], [9, 1], [9, 9]]}
    return json.dumps({"imagePath": "1.png", "shapes": [shape | fields]})


def via(attributes: dict[str, str] | None = None, **shape: Any) -> str:
    """A VIA file of one region."""
    shape = {"name": "rect", "x": 1, "y": 1, "width": 5, "height": 5} | shape
    region = {"shape_attributes": shape, "region_attributes": attributes or {"c": "car"}}
    return json.dumps({"a": {"filename": "1.png", "regions": [region]}})


LAUGHS = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
LAUGHS = f'<!DOCTYPE a [<!ENTITY a0 "ha">{LAUGHS}]>'
SECRET = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
TREE = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40)
)
DATA = "names: [car]\n"
IN = {"in__images__1_png": picture(), "in__data_yaml": DATA}
BOMB64 = base64.b64encode(png_of(SIDE, SIDE)).decode()

LABELS = [
    *(
        convert(f"yolo {name}", YOLO, message, **IN | {"in__labels__1_txt": text})
        for name, text, message in (
            ("of words", "car 1 2 3 4", "expected a label, class cx cy w h"),
            ("of NaN", "0 nan 0.5 0.1 0.1", "expected a label"),
            ("class unknown", "7 0.5 0.5 0.1 0.1", "expected a class of [0], found 7"),
            ("in pixels", "0 20 15 10 10", "fractions of the image's sides"),
            ("of no area", "0 0.5 0.5 0 0.1", "an object with width and height > 0"),
            ("binary", b"\xff\xfe\0", "text in UTF-8"),
        )
    ),
    *(
        convert(f"data.yaml {name}", YOLO, message,
            **IN | {"in__labels__1_txt": "0 0.5 0.5 0.1 0.1", "in__data_yaml": text})
        for name, text, message in (
            ("bomb", TREE + "names: *a39", "names"),
            ("recursive", "names: &a [*a]", "names in"),
            ("with a tag", "names: !!python/object/apply:os.system ['echo']", "expected YAML"),
            ("nested deep", "names: " + "[" * 9999, "expected YAML"),
            ("without names", "a: b", "no data.yaml with names"),
            ("name empty", "names: ['']", "as class: name"),
            ("of keypoints", "kpt_shape: [3, 2]\nnames: [a]", "found kpt_shape"),
        )
    ),
    convert("yolo without labels", YOLO, "expected label files", **IN),
    convert("yolo bomb", YOLO, "60000", **IN | {"in__images__1_png": BOMBS["x.png"],
        "in__labels__1_txt": "0 0.5 0.5 0.1 0.1"}),
    *(
        convert(f"voc {name}", VOC, message, in__1_png=picture(), in__1_xml=text)
        for name, text, message in (
            ("billion laughs", voc(voc_box("&a9;", 1, 1, 5, 5), LAUGHS), "without a DOCTYPE"),
            ("external entity", voc(voc_box("&x;", 1, 1, 5, 5), SECRET), "without a DOCTYPE"),
            ("not XML", "hello", "expected XML"),
            ("nested deep", "<a>" * 100_000, "expected XML"),
            ("of NaN", voc(voc_box("car", "nan", 1, 5, 5)), "xmin as a number"),
            ("huge", voc(voc_box("car", 1, 1, 5, "1e300")), "ymax as a number"),
            ("inverted", voc(voc_box("car", 9, 1, 5, 5)), "xmin <= xmax"),
            ("outside", voc(voc_box("car", 900, 900, 950, 950)), "an area inside the 40 x 30"),
            ("without box", voc("<object><name>car</name></object>"), "a bndbox"),
        )
    ),
    *(
        convert(f"labelme {name}", LABELME, message, in__1_png=picture(), in__1_json=text)
        for name, text, message in (
            ("of NaN", labelme(points=[[1, 1], [NAN, 1], [9, 9]]), "x as a number"),
            ("huge", labelme(points=[[1, 1], [HUGE, 1], [9, 9]]), "x as a number, 100000 pixels"),
            ("of two points", labelme(points=[[1, 1], [2, 2]]), "a polygon of 3 to"),
            ("label null", labelme(label=None), "the name of a class, found None"),
            ("mask bomb", labelme(shape_type="mask", points=[[0, 0], [SIDE - 1] * 2], mask=BOMB64),
                "a PNG in base64"),
            ("mask of other size", labelme(shape_type="mask", points=[[1, 1], [9, 9]],
                mask=base64.b64encode(picture()).decode()), "a mask that fills 1, 1 to 9, 9"),
        )
    ),
    *(
        convert(f"via {name}", VIA, message, in__1_png=picture(), in__via_json=text)
        for name, text, message in (
            ("other JSON", '{"a": 1}', "images with regions"),
            ("inverted", via(width=-5), "a rect with width and height > 0"),
            ("radius 0", via(name="circle", cx=5, cy=5, r=0), "a radius > 0"),
            ("file above", via().replace("1.png", "../1.png"), "inside --images_dir"),
            ("outside", via(x=900), "an area inside"),
        )
    ),
    *(
        convert(f"mask {name}", f"{MASKS} {argv}", message, images__1_png=picture(), **contents)
        for name, argv, message, contents in (
            ("of other size", "--classes a,b", "expected a mask of 40x30",
                {"masks__1_png": picture(size=(30, 40))}),
            ("bomb", "--classes a,b", "60000", {"masks__1_png": BOMBS["x.png"]}),
            ("no image", "--classes a,b", "a mask that PIL reads", {"masks__1_png": b"no"}),
            ("JPEG", "--classes a,b", "expected masks as PNG", {"masks__1_jpg": picture("JPEG")}),
            ("of colours", "--classes a,b", "one value a pixel", {"masks__1_png": picture()}),
            ("classes not JSON", "--classes '{{a'", "--classes as JSON", {"masks__1_png": b""}),
            ("classes nested", f"--classes '{{{{\"a\": {NESTED[:99999]}'", "--classes as JSON",
                {"masks__1_png": b""}),
            ("pattern without stem", "--classes a,b --pattern x", "{stem}", {"masks__1_png": b""}),
        )
    ),
]  # fmt: skip

FOLDERS = [
    Case(name, "evaluate_sam3_lora", f"{EVALUATE} --data_dir {argv}", message, make)
    for name, argv, message, make in (
        ("data absent", DATA_DIR, "no such folder", None),
        ("data a file", "{folder}/a", "a", file("a", "hello")),
        ("split absent", "{data} --split nowhere", "no such folder", None),
        ("split above", "{data} --split ../../data", "data", None),
        ("no categories", DATA_DIR, "one category", val(payload(categories=[], annotations=[]))),
        ("images vanished", DATA_DIR, "1.png", val(payload())),
        ("image of other size", DATA_DIR, "as annotated, found 96 x 64", val(payload(), PNG)),
        ("image damaged", DATA_DIR, "cannot identify", val(payload(), b"no")),
        ("image cut", DATA_DIR, "truncated", val(payload(), picture()[:80])),
    )
]  # fmt: skip

WRITES = [
    Case(name, "prepare_data", argv, message, make)
    for name, argv, message, make in (
        *(
            (f"fractions {text}", f"{SPLIT} --fractions={text}", "from 0 and with sum 1", None)
            for text in ("0.9,0.9,0.9", "-1,1,1", "nan,0.5,0.5", "1e400,0,0", "0.5,0.5", "a,b,c")
        ),
        ("fraction tiny", f"{SPLIT} --fractions 0.999999,0.000001,0", "an image for each", None),
        ("seed negative", "demo --seed=-1 --output_dir {out}", "from 0, of 18 digits", None),
        ("class of half a character", COCO + " --classes 'a\udcffb'", "text in UTF-8", GOOD),
        ("output over its source", "coco --coco_json {folder}/train/a.json --images_dir "
            "{folder}/train --output_dir {folder}", "apart from --coco_json", None),
        ("output in its source", "yolo --yolo_dir {folder}/in --output_dir {folder}/in/a",
            "apart from --yolo_dir", files(**IN)),
        ("split folder a file", COCO, "a file; name a folder", both(GOOD, file("out", "hello"))),
        ("split folder in a device", COCO.replace("{out}", "/dev/null/a"), "/dev/null", GOOD),
        ("output holds others", COCO, "to be absent, empty or of this source",
            both(GOOD, file("out/train/notes.txt", "mine"))),
        ("source a folder", "coco --coco_json {folder} --images_dir {folder} --output_dir {out}",
            "found a folder; name a .json file", None),
        ("link out of the source", COCO, "a link to",
            both(file("a.json", json.dumps(payload())), file("images/a.txt", ""),
                link("images/1.png", "../a.json"))),
        ("phrase empty", COCO + """ --prompts '{{"car": ""}}'""", "a phrase for", GOOD),
        ("fix over the source", "validate --data_dir {data} --split val --fix {data}",
            "expected the source images outside", None),
        ("split unknown", "validate --data_dir {data} --split ../val", "invalid choice", None),
    )
]  # fmt: skip

CASES: list[Case] = [*IMAGES, *BOXES, *PROMPTS, *OUTPUTS, *VIDEOS]
CASES += [*RECORDS, *LABELS, *FOLDERS, *WRITES]
