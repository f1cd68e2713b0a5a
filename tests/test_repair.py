"""A mended copy: what is put right, what is said, and what is never touched."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_data
from sam3_lora import coco, overview
from sam3_lora.drawing import PALETTE
from sam3_lora.faults import find_faults
from sam3_lora.repair import mend_split

SQUARE = [[2, 2, 20, 2, 20, 20, 2, 20]]
FLAT = [2, 2, 10, 10, 20, 20]


def image(number, name, width=40, height=30) -> dict:
    return {"id": number, "file_name": name, "width": width, "height": height}


def row(number, bbox=(2, 2, 18, 18), segmentation=SQUARE, image_id=1, category_id=1) -> dict:
    bbox = list(bbox) if bbox else bbox
    found = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox}
    return found | {"segmentation": segmentation, "iscrowd": 0, "area": 1}


def broken() -> dict:
    """Every fault that can be mended, once or more."""
    images = [image(1, "a.png"), image(2, "a.png"), image(3, "gone.png"), image(4, "text.png")]
    images += [image(5, "link.png"), image(6, "../a.png"), image(7, "small.png", 90, 90)]
    images += [image(8, "b.png", None)]
    rows = [
        row(1, image_id=2),
        row(2, [-5, 2, 18, 18], []),
        row(3, [2, 2, 0, 5], []),
        row(4, [60, 2, 9, 5], []),
        row(5, [2, 2, 0, 5]),
        row(6, [12, 2, 18, 18]),
        row(7, None),
        row(7, [1, 2], []),
        row(True, segmentation=[[1, 2, 3]]),
        row(10, "box", [[1, 2, 3]]),
        row(11, segmentation=[*SQUARE, FLAT]),
        row(12, segmentation=[FLAT]),
        row(13) | {"area": float("nan")},
        row(14, segmentation={"size": [9, 9], "counts": "1"}),
        row(15, image_id=99),
        row(16, image_id=3),
        row(17, category_id=99),
        row(18, image_id=7),
        row(19, image_id=8),
    ]
    return {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "car"}]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """data/train, broken in every way that can be mended."""
    folder = tmp_path / "data" / "train"
    (folder / "images").mkdir(parents=True)
    for name, size in (("a.png", (40, 30)), ("b.png", (40, 31)), ("small.png", (30, 30))):
        Image.new("RGB", size).save(folder / "images" / name)
    (folder / "images" / "text.png").write_text("text")
    (folder / "images" / "._a.png").write_text("junk")
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.png")
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    return save(folder, broken())


def save(folder: Path, content: dict) -> Path:
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def fix(source: Path, target: Path, *more: str) -> int:
    flags = ["validate", "--data_dir", str(source.parent), "--split", "train"]
    return prepare_data.main([*flags, "--fix", str(target), *more])


def content_of(folder: Path) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def test_what_can_be_mended_is(source, tmp_path, capsys):
    before, beside = content_of(source), set(tmp_path.iterdir())
    assert fix(source, tmp_path / "new") == 0
    out = capsys.readouterr().out.split("mended copy ")[1]
    assert content_of(source) == before
    assert set(tmp_path.iterdir()) - beside == {tmp_path / "new"}
    folder = tmp_path / "new" / "train"
    names = {path.relative_to(folder).as_posix() for path in content_of(folder)}
    assert names == {"annotations.json"} | {f"images/{n}.png" for n in ("a", "b", "small")}
    assert [f for f in find_faults(*coco.find_split(folder)) if f.level == "error"] == []
    for line in (
        "4  images dropped: missing, unreadable or outside the folder",
        "1  image rows merged with that of the same file",
        "1  objects dropped: unknown image_id",
        "1  objects dropped with their image",
        "1  objects dropped: unknown category_id",
        "1  objects dropped: no usable mask or box",
        "1  objects dropped: a mask of no area",
        "3  objects dropped: a box of no area inside the image",
        "16  objects numbered anew",
        "2  image sizes taken from the file",
        "2  masks dropped that cannot be read, their box kept",
        "1  masks without their parts of no area",
        "1  boxes clipped to the image",
        "2  boxes taken from the mask",
        "1  junk files left out",
    ):
        assert f"  {line}\n" in out, line
    assert out.endswith("errors 0, warnings 0\n")
    split = coco.read_split(folder)
    boxes = [item["bbox"] for item in split.annotations[1]]
    assert boxes == [[2, 2, 18, 18], [0, 2, 13, 18], *[[2, 2, 18, 18]] * 7]
    assert [(i["width"], i["height"]) for i in split.images] == [(40, 30), (30, 30), (40, 31)]
    assert [split.annotations[1][i]["area"] for i in (1, -2)] == [13 * 18, 324]


def test_a_copy_is_never_written_over_files(source, tmp_path, capsys):
    assert fix(source, source.parent) == 2  # in place
    assert "expected" in capsys.readouterr().err
    assert fix(source, tmp_path / "new") == 0
    (tmp_path / "new" / "train" / "notes.txt").write_text("mine")
    before = content_of(tmp_path / "new")
    assert fix(source, tmp_path / "new") == 2
    assert "found annotations.json, images, notes.txt; pass --overwrite" in capsys.readouterr().err
    assert content_of(tmp_path / "new") == before


def test_what_cannot_be_mended_is_left_and_said(source, tmp_path, capsys):
    content = broken()
    content["images"][6] |= {"width": 25, "height": 25}  # smaller than its file
    content["annotations"][-2] |= {"bbox": [2, 2, 30, 18], "segmentation": []}  # larger than it
    content["categories"].append({"id": 2, "name": "Car"})
    content["annotations"][0]["category_id"] = 2
    save(source, content)
    assert fix(source, tmp_path / "new") == 2
    out = capsys.readouterr().out.split("mended copy ")[1]
    assert "error: image size (1)\n" in out and "error: same prompt (1)\n" in out
    assert "1  image sizes taken from the file\n" in out and "errors 2" in out


def test_a_turned_photo_is_not_mended(tmp_path):
    folder = tmp_path / "data" / "train"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (30, 40)).save(folder / "images" / "a.png")
    content = broken() | {"images": [image(1, "a.png")], "annotations": [row(1)]}
    found = coco.find_split(save(folder, content))
    copy, done = mend_split(*found, find_faults(*found), tmp_path / "new", "train")
    assert done == {} and coco.read_split(copy).images[0]["width"] == 40


def test_a_copy_that_could_not_be_read_is_not_written(source, tmp_path, capsys):
    save(source, broken() | {"categories": [{"id": 1, "name": ""}]})
    assert fix(source, tmp_path / "new") == 2
    err = capsys.readouterr().err
    assert "cannot be mended, nothing was written: expected a category name" in err
    assert not (tmp_path / "new").exists()
    (source / "annotations.json").write_text("{")
    assert fix(source, tmp_path / "new") == 2
    assert "expected JSON in" in capsys.readouterr().err


@pytest.mark.parametrize("width", [None, {}, 0, float("nan")])
def test_an_image_whose_size_cannot_be_known(source, tmp_path, width, capsys):
    content = broken()
    content["images"][7]["width"] = width
    content["annotations"][-1] |= {"segmentation": [[1, 1, 90, 1, 90, 9]], "bbox": None}
    save(source, content)
    assert fix(source, tmp_path / "new") == 2
    assert "nothing was written: expected width in pixels, 1 to" in capsys.readouterr().err


def test_json(source, tmp_path, capsys):
    assert fix(source, tmp_path / "new", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] is None and report["errors"] > 15
    fault = next(f for f in report["faults"] if f["kind"] == "unknown image_id")
    assert fault["level"] == "error" and fault["id"] == "annotation 15"
    assert fault["file"].endswith("annotations.json") and fault["message"] and fault["remedy"]
    mended = report["mended"]
    assert mended["done"]["boxes clipped to the image"] == 1 and mended["errors"] == 0
    assert mended["counts"]["categories"] == {"car": 11}
    shutil.rmtree(source)
    shutil.copytree(tmp_path / "new" / "train", source)
    flags = ["validate", "--data_dir", str(source.parent), "--json"]
    assert prepare_data.main(flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == mended["counts"] and report["faults"] == []


def test_prompts_are_counted_by_a_tokenizer(source, tiny_model_dir, capsys):
    content = {"images": [image(1, "a.png")], "annotations": [row(1)]}
    save(source, content | {"categories": [{"id": 1, "name": "q" * 40}]})
    flags = ["validate", "--data_dir", str(source.parent)]
    prepare_data.main(flags)
    assert "long prompt" not in capsys.readouterr().out  # one word, as far as one can tell
    prepare_data.main([*flags, "--model_name", str(tiny_model_dir)])
    assert f"the prompt '{'q' * 40}' has 42 tokens" in capsys.readouterr().out
    assert prepare_data.main([*flags, "--model_name", str(source)]) == 2
    assert "error: --model_name: " in capsys.readouterr().err


def test_preview(source, tmp_path, capsys):
    sheet = tmp_path / "sheets" / "train.png"
    flags = ["validate", "--data_dir", str(source.parent), "--preview", str(sheet)]
    assert prepare_data.main(flags) == 2
    assert "its annotations cannot be read: mend the errors above" in capsys.readouterr().err
    assert not sheet.exists()
    assert fix(source, tmp_path / "new", "--preview", str(sheet)) == 0  # of the copy
    assert sheet.exists()
    images = [image(1, "a.png"), image(2, "text.png"), image(3, "small.png", 30, 30)]
    rows = [row(1), row(2, segmentation=[]), row(3, category_id=2, image_id=3)]
    names = [{"id": 1, "name": "car"}, {"id": 2, "name": "van"}, {"id": 3, "name": "bus"}]
    save(source, {"images": images, "annotations": rows, "categories": names})
    assert prepare_data.main(flags) == 2  # text.png
    assert "left out of the preview: expected an image that PIL reads" in capsys.readouterr().err
    with Image.open(sheet) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(2**24)}
    assert set(PALETTE[:2]) <= colors and PALETTE[2] not in colors
    assert list(sheet.parent.iterdir()) == [sheet]


def test_preview_begins_with_images_that_have_faults(tmp_path, monkeypatch):
    folder = tmp_path / "train"
    (folder / "images").mkdir(parents=True)
    photos = [image(number, f"{number}.png") for number in range(40)]
    for number, photo in enumerate(photos):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(folder / "images" / photo["file_name"])
    shutil.copy(folder / "images" / "5.png", folder / "images" / "6.png")
    rows = [row(number + 1, image_id=number) for number in range(40)]
    rows[20] |= {"segmentation": [[2, 2, 20, 20, 20, 2, 2, 20]]}
    rows[30] |= {"bbox": [2, 2, 60, 18]}
    save(folder, {"images": photos, "annotations": rows, "categories": [{"id": 1, "name": "car"}]})
    captions: list[str] = []
    sheet = np.zeros((9, 9, 3), np.uint8)
    monkeypatch.setattr(
        overview, "draw_sheet", lambda _, names, __: captions.extend(names) or sheet
    )
    flags = ["--data_dir", str(tmp_path), "--preview", str(tmp_path / "sheet.png")]
    assert prepare_data.main(["validate", *flags]) == 2
    wanted = ["30.png: box outside, box off mask", "20.png: crossing polygon", "5.png: photo twice"]
    assert captions[:3] == wanted and len(captions) == overview.EXAMPLES
    assert not any(":" in caption for caption in captions[3:])


def write_split_of(folder: Path, photos: dict[str, int]) -> None:
    """A split of photos of one grey value each, with an object on each."""
    (folder / "images").mkdir(parents=True)
    for name, grey in photos.items():
        Image.new("RGB", (40, 30), (grey,) * 3).save(folder / "images" / name)
    images = [image(number, name) for number, name in enumerate(photos, start=1)]
    rows = [row(number, image_id=number) for number in range(1, len(photos) + 1)]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "car"}]}
    save(folder, content)


def test_a_training_photo_of_another_split_is_dropped(tmp_path, capsys, caplog):
    """It is dropped where it is trained on, so that what an evaluation counts stays the same."""
    data, new = tmp_path / "data", tmp_path / "new"
    write_split_of(data / "train", {"a.png": 1, "b.png": 2, "c.png": 3, "again.png": 1})
    write_split_of(data / "val", {"1.png": 1, "9.png": 9})
    write_split_of(data / "test", {"2.png": 2, "9.png": 9})
    flags = ["validate", "--data_dir", str(data), "--fix", str(new)]
    assert prepare_data.main(flags) == 0
    paths = f"--train_data_path {new / 'train'} --val_data_path {data / 'val'}"
    assert f"train on it with: python train_sam3_lora.py {paths}" in caplog.text
    before, after = capsys.readouterr().out.split("mended copy ")
    assert "warning: photo in two splits (3)" in before and "--fix DIR takes train's out" in before
    assert "  3  images dropped that val or test has too: a.png, again.png, b.png\n" in after
    assert "  3  objects dropped with their image\n" in after
    assert [photo["file_name"] for photo in coco.read_split(new / "train").images] == ["c.png"]
    for split, kept in (("val", "1.png, 9.png"), ("test", "2.png, 9.png")):
        assert prepare_data.main([*flags, "--split", split]) == 0
        after = capsys.readouterr().out.split("mended copy ")[1]
        assert f"  2  images kept that another split has too: {kept}\n" in after
        assert content_of(new / split).keys() >= {new / split / "images" / "9.png"}
    # Of the new train and the new val no photo is the other's.
    assert prepare_data.main(["validate", "--data_dir", str(new)]) == 0
    assert capsys.readouterr().out.endswith("errors 0, warnings 0\n")


def test_a_training_split_that_another_holds_whole_is_not_mended(tmp_path, capsys):
    for split in ("train", "test"):
        write_split_of(tmp_path / "data" / split, {"a.png": 1, "b.png": 2})
    assert fix(tmp_path / "data" / "train", tmp_path / "new") == 2
    wanted = "expected images that val or test lacks, found none of 2; divide one of the splits"
    assert f"cannot be mended, nothing was written: {wanted}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.real_data
def test_a_real_set_whose_splits_share_photos(real_data, tmp_path, capsys):
    for split in ("train", "val"):
        source = real_data / "car_scratch_via" / split
        flags = ["--via_json", str(source / "via_region_data.json"), "--images_dir", str(source)]
        flags += ["--output_dir", str(tmp_path / "data"), "--split", split]
        assert prepare_data.main(["via", *flags]) == 0
    assert fix(tmp_path / "data" / "train", tmp_path / "new") == 0
    out = capsys.readouterr().out
    names = "image15.jpg, image58.jpg, image63.jpg"
    assert f"  3  images dropped that val or test has too: {names}\n" in out
    assert len(coco.read_split(tmp_path / "new" / "train").images) == 46
    shutil.copytree(tmp_path / "data" / "val", tmp_path / "new" / "val")
    assert prepare_data.main(["validate", "--data_dir", str(tmp_path / "new")]) == 0
    assert "photo in two splits" not in capsys.readouterr().out


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("annotations", "images", "counts"),
    [
        ("facade_test_roboflow_coco/test/_annotations.coco.json", None, (83, 2842)),
        ("tinycoco/annotations/instances_train2017.json", "train2017", (32, 288)),
        ("tinycoco/annotations/instances_val2017.json", "val2017", (6, 136)),
    ],
)
@pytest.mark.scripts
def test_real_data_needs_no_mending(real_data, tmp_path, annotations, images, counts):
    file = real_data / annotations
    images_dir = real_data / "tinycoco" / "images" / images if images else file.parent
    found = find_faults(file, images_dir)
    assert {fault.level for fault in found} == {"warning"}
    folder, done = mend_split(file, images_dir, found, tmp_path, "train")
    assert done == {}
    split = coco.read_split(folder)
    assert (len(split.images), sum(map(len, split.annotations.values()))) == counts
    assert prepare_data.preview(split).shape[2] == 3
