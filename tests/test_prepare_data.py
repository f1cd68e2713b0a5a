"""The commands of prepare_data.py: what they write, print, refuse and return."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import prepare_data
from sam3_lora import coco, scenes

ROOT = Path(__file__).parents[1]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """raw/annotations.json and raw/images with a.png, b.png of the three that it names."""
    folder = tmp_path / "raw"
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number, name in enumerate(("a.png", "sub/b.png", "gone.png"), start=1):
        images.append({"id": number, "file_name": name, "width": 40, "height": 30})
        polygon = [[2, 2, 20, 2, 20, 20]]
        for category_id in (1, 2)[: 2 if number == 1 else 1]:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": category_id,
                    "bbox": [2, 2, 18, 18],
                    "segmentation": polygon,
                }
            )
        if name != "gone.png":
            photo = Image.new("RGB", (40, 30), (number, 0, 0))
            photo.save(folder / "images" / Path(name).name)
    categories = [{"id": 1, "name": "bottle_cap"}, {"id": 2, "name": "car"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def coco_command(raw: Path, *more: str) -> list[str]:
    paths = ["--coco_json", str(raw / "annotations.json"), "--images_dir", str(raw / "images")]
    return ["coco", *paths, "--output_dir", str(raw.parent / "data"), "--split", "train", *more]


def written(raw: Path) -> dict:
    return json.loads((raw.parent / "data" / "train" / "annotations.json").read_text())


def validate(raw: Path, split: str = "train") -> int:
    return prepare_data.main(["validate", "--data_dir", str(raw.parent / "data"), "--split", split])


def test_create_coco_validate(raw, capsys):
    data = raw.parent / "data"
    assert prepare_data.main(["create", "--output_dir", str(data)]) == 0
    assert sorted(path.name for path in data.iterdir()) == ["test", "train", "val"]
    assert all((path / "images").is_dir() for path in data.iterdir())
    assert validate(raw) == 2
    capsys.readouterr()
    assert prepare_data.main(coco_command(raw)) == 0
    out, err = capsys.readouterr()
    assert "images      2 (0 without an object)\nobjects     3 (3 with a mask, 0 crowds)" in out
    assert "skipped 1 of 3 images, which are not in" in err and "1 objects: gone.png" in err
    # b.png lies beside a.png, though the JSON names a sub-folder.
    assert sorted(path.name for path in (data / "train" / "images").iterdir()) == ["a.png", "b.png"]
    assert [row["id"] for row in written(raw)["annotations"]] == [1, 2, 3]
    assert validate(raw) == 0
    out = capsys.readouterr().out
    assert '      2  bottle_cap  prompted as "bottle cap"\n        1  car\n' in out
    assert out.endswith("errors 0, warnings 0\n")


def test_sub_folders_are_kept(raw):
    (raw / "images" / "sub").mkdir()
    (raw / "images" / "b.png").rename(raw / "images" / "sub" / "b.png")
    Image.new("RGB", (50, 50)).save(raw / "images" / "b.png")  # another picture
    assert prepare_data.main(coco_command(raw)) == 0
    assert [row["file_name"] for row in written(raw)["images"]] == ["a.png", "sub/b.png"]
    assert validate(raw) == 0


def test_a_split_is_replaced_only_when_asked(raw, capsys):
    assert prepare_data.main(coco_command(raw)) == 0
    file = raw.parent / "data" / "train" / "annotations.json"
    before = file.stat()
    assert prepare_data.main(coco_command(raw)) == 0
    assert "data/train is already there, with the same content" in capsys.readouterr().err
    assert prepare_data.main(coco_command(raw, "--prompts", '{"car": "van"}')) == 2
    assert "error: expected" in capsys.readouterr().err
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert prepare_data.main(coco_command(raw, "--overwrite")) == 0
    assert file.stat().st_ino != before.st_ino


def test_classes_fix_the_categories_of_coco_and_their_order(raw, capsys):
    assert prepare_data.main(coco_command(raw, "--classes", "van,car,bottle_cap")) == 0
    split = coco.read_split(raw.parent / "data" / "train")
    assert split.categories == {1: "van", 2: "car", 3: "bottle_cap"}
    own = [[a["category_id"] for a in items] for items in split.annotations.values()]
    assert own == [[3, 2], [3]]
    assert prepare_data.main(coco_command(raw, "--classes", "car", "--overwrite")) == 2
    assert "expected a class of car, found 'bottle_cap' (" in capsys.readouterr().err


def test_a_split_does_not_replace_its_source(raw, capsys):
    before = sorted(raw.rglob("*"))
    (raw / "train").mkdir()
    (raw / "annotations.json").rename(raw / "train" / "annotations.json")
    command = ["coco", "--coco_json", str(raw / "train" / "annotations.json"), "--overwrite"]
    command += ["--images_dir", str(raw / "images"), "--output_dir", str(raw)]
    assert prepare_data.main(command) == 2
    assert "expected the split apart from --coco_json" in capsys.readouterr().err
    for flag in ("yolo", "voc", "labelme"):
        command = [flag, f"--{flag}_dir", str(raw), "--output_dir", str(raw / "out")]
        assert prepare_data.main(command) == 2
        assert f"expected the split apart from --{flag}_dir {raw}" in capsys.readouterr().err
    (raw / "train" / "annotations.json").rename(raw / "annotations.json")
    (raw / "train").rmdir()
    assert sorted(raw.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/images/a.png", "--preview: expected a file outside the data, found"),
        ("train/annotations.json", "--preview: expected a file name that ends in .png, found"),
        ("", "--preview: expected a file name that ends in .png, found"),
    ],
)
def test_a_preview_replaces_no_data(raw, name, message, capsys):
    assert prepare_data.main(coco_command(raw)) == 0
    data = raw.parent / "data"
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    flags = ["validate", "--data_dir", str(data), "--preview", str(data / name)]
    assert prepare_data.main(flags) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("as_file", [False, True])
def test_prompts(raw, as_file, capsys):
    text = '{"bottle_cap": "cap of a bottle"}'
    if as_file:
        path = raw / "prompts.json"
        path.write_text(text)
        text = str(path)
    assert prepare_data.main(coco_command(raw, "--prompts", text)) == 0
    assert written(raw)["prompts"] == {"bottle_cap": "cap of a bottle"}
    assert 'bottle_cap  prompted as "cap of a bottle"' in capsys.readouterr().out
    assert coco.read_split(raw.parent / "data" / "train").phrase(1) == "cap of a bottle"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ('{"cat": "x"}', "found 'cat'; did you mean 'car'?"),
        ('{"car": 3}', "expected a phrase for 'car' in prompts, found 3"),
        ('{"car"', "expected --prompts as JSON"),
        ("absent.json", "JSON or as a file of it, found 'absent.json', neither"),
        ("x" * 5000, "JSON or as a file of it"),
    ],
)
def test_prompts_that_are_refused(raw, prompts, message, capsys):
    assert prepare_data.main(coco_command(raw, "--prompts", prompts)) == 2
    assert message in capsys.readouterr().err
    assert not (raw.parent / "data").exists()


def test_wrong_images_dir(raw, capsys):
    command = coco_command(raw)
    command[command.index("--images_dir") + 1] = str(raw / "nowhere")
    assert prepare_data.main(command) == 2
    err = capsys.readouterr().err
    assert "found none of 3: a" in err and "check the path" in err
    assert len(err.splitlines()) == 1
    command[command.index("--images_dir") + 1] = str(raw)
    assert prepare_data.main(command) == 2
    assert f"a.png is in {raw / 'images'}: name that folder" in capsys.readouterr().err


PATHS = {
    "a folder of one JSON": (
        ["via", "--via_json", "{}", "--images_dir", "{}/images"],
        "expected a file at --via_json {}, found a folder; name {}/annotations.json",
    ),
    "a folder of several": (
        ["coco", "--coco_json", "{}/..", "--images_dir", "{}/images"],
        "found a folder; name a .json file of it, such as raw/annotations.json, via.json",
    ),
    "a folder of none": (
        ["coco", "--coco_json", "{}/images", "--images_dir", "{}/images"],
        "expected a file at --coco_json {}/images, found a folder; name a .json file",
    ),
    "a file for a folder": (
        ["yolo", "--yolo_dir", "{}/annotations.json"],
        "expected a folder at --yolo_dir {}/annotations.json, found a file; name its folder {}",
    ),
    "a file to write into": (
        ["demo", "--output_dir", "{}/annotations.json"],
        "expected a folder at --output_dir {}/annotations.json, found a file; name a folder",
    ),
}


@pytest.mark.parametrize(("command", "message"), PATHS.values(), ids=PATHS)
def test_a_folder_for_a_file_and_a_file_for_a_folder(raw, capsys, command, message):
    (raw.parent / "via.json").write_text("{}")
    output = ["--output_dir", str(raw.parent / "data")] * ("--output_dir" not in command)
    assert prepare_data.main([*(word.format(raw) for word in command), *output]) == 2
    assert message.replace("{}", str(raw)) in capsys.readouterr().err
    assert not (raw.parent / "data").exists()


def test_debug_keeps_the_traceback(raw, capsys):
    command = ["coco", "--coco_json", "absent.json", "--images_dir", "."]
    assert prepare_data.main([*command, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_validate_lists_faults(raw, capsys):
    assert prepare_data.main(coco_command(raw)) == 0
    content = written(raw)
    row = content["annotations"][0]
    content["annotations"] += [
        row | {"id": 9 + i, "bbox": [35, 1, 50, 5], "segmentation": []} for i in range(7)
    ]
    file = raw.parent / "data" / "train" / "annotations.json"
    file.write_text(json.dumps(content))
    (file.parent / "images" / "._a.png").write_text("")
    capsys.readouterr()
    assert validate(raw) == 2
    out = capsys.readouterr().out
    assert "error: box outside (7)\n" in out
    assert out.count("px beyond its edge") == 5 and "  ... and 2 more\n" in out
    assert ", annotation 9); clip it" in out
    assert "error: junk file (1)\n" in out
    assert out.endswith("errors 8, warnings 0\n")
    content["annotations"][0]["image_id"] = 77
    file.write_text(json.dumps(content))
    assert validate(raw) == 2
    assert "unknown image_id" in capsys.readouterr().out


def test_validate_decodes_images_and_counts_boxes_in_fractions(raw, capsys):
    image = Image.effect_noise((40, 30), 50)
    image.save(raw / "images" / "a.png", format="JPEG")
    assert prepare_data.main(coco_command(raw)) == 0
    cut = raw.parent / "data" / "train" / "images" / "a.png"
    cut.write_bytes(cut.read_bytes()[:-100])
    content = written(raw)
    for row in content["annotations"][:2]:
        row["bbox"] = [0.1, 0.1, 0.5, 0.5]
    (cut.parents[1] / "annotations.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert validate(raw) == 2
    out = capsys.readouterr().out
    assert f"cannot be read: truncated ({cut}, image 1); replace the file or remove its row" in out
    assert "error: box in fractions (1)\n  looks like fractions of the image; COCO boxes are" in out
    assert "2 of 3 boxes, the first is [0.1, 0.1, 0.5, 0.5] of annotation 1" in out
    coco.check_images(coco.read_split(cut.parents[1]))  # looks at headers only


@pytest.mark.parametrize("count", [10, 11])
def test_many_categories_without_an_object_share_a_line(raw, count, capsys):
    file = raw / "annotations.json"
    content = json.loads(file.read_text())
    content["categories"] += [{"id": 10 + i, "name": f"thing{i}"} for i in range(count)]
    file.write_text(json.dumps(content))
    assert prepare_data.main(coco_command(raw)) == 0
    out = capsys.readouterr().out
    assert ("  11 categories without an object\n" in out) == (count > 10)
    assert out.count("thing") == (count if count <= 10 else 0) and "1  car\n" in out


def test_names_that_the_output_has_no_letters_for(raw, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # a file's on Windows
    monkeypatch.setattr(sys, "stdout", output)
    assert prepare_data.main([*coco_command(raw), "--prompts", '{"car": "\u8eca"}']) == 0
    output.flush()
    assert rb'prompted as "\u8eca"' in output.buffer.getvalue()


def test_validate_refuses_two_categories_of_one_prompt(raw, capsys):
    assert prepare_data.main([*coco_command(raw), "--prompts", '{"car": "Bottle Cap"}']) == 0
    assert validate(raw) == 2
    out = capsys.readouterr().out
    assert "error: same prompt (1)\n" in out and "--prompts" in out


def test_validate_of_a_roboflow_export_in_place(raw, capsys):
    folder = raw.parent / "data" / "valid"
    folder.mkdir(parents=True)
    content = json.loads((raw / "annotations.json").read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = content["annotations"][:2]
    content["categories"].append({"id": 0, "name": "car"})
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    for split in ("val", "valid"):
        assert validate(raw, split) == 0
        assert "categories  2\n" in capsys.readouterr().out
    assert validate(raw, "test") == 2
    assert "error: expected annotations.json with images/ or" in capsys.readouterr().err


def test_yolo(raw, capsys):
    (raw / "labels").mkdir()
    (raw / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.5 0.1 0.5 0.5\n")
    command = ["yolo", "--yolo_dir", str(raw), "--output_dir", str(raw.parent / "data")]
    assert prepare_data.main([*command, "--classes", "person,,car"]) == 2
    assert "--classes as names that differ, found 'person,,car'" in capsys.readouterr().err
    assert prepare_data.main([*command, "--classes", "person, car"]) == 0
    assert "objects     2 (1 with a mask, 0 crowds)" in capsys.readouterr().out
    assert written(raw)["annotations"][0]["segmentation"] == []
    assert validate(raw) == 0
    assert "1 of 2 images have no object" in capsys.readouterr().out


@pytest.mark.scripts
def test_command_line(capsys):
    assert prepare_data.main([]) == 2
    assert prepare_data.main(["coco", "--coco_json", "x"]) == 2
    assert "--images_dir" in capsys.readouterr().err
    run = subprocess.run(
        [sys.executable, "prepare_data.py", "yolo", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for flag in (
        "--yolo_dir",
        "--classes",
        "--output_dir",
        "--split",
        "--prompts",
        "--link",
        "--overwrite",
    ):
        assert flag in run.stdout


@pytest.mark.scripts
@pytest.mark.parametrize("task", scenes.TASKS)
def test_demo_draws_three_splits_that_validate(task, tmp_path, monkeypatch, capsys):
    for split in scenes.IMAGES:
        monkeypatch.setitem(scenes.IMAGES, split, 4)
    monkeypatch.setattr(scenes, "REPLAYED", 4)
    flags = ["demo", "--output_dir", str(tmp_path), "--task", task, "--seed", "3"]
    assert prepare_data.main(flags) == 0
    for split in ("train", "val", "test"):
        assert prepare_data.main(["validate", "--data_dir", str(tmp_path), "--split", split]) == 0
    before = (tmp_path / "val" / "annotations.json").read_bytes()
    assert prepare_data.main([*flags[:-1], "4"]) == 2  # nothing is replaced unasked
    assert "--overwrite" in capsys.readouterr().err
    assert prepare_data.main(flags) == 0  # already there
    assert prepare_data.main([*flags, "--overwrite"]) == 0
    assert (tmp_path / "val" / "annotations.json").read_bytes() == before


def test_tools_that_name_classes(raw, capsys):
    (raw / "images" / "a.xml").write_text(
        "<annotation><object><name>car</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>"
        "<ymax>9</ymax></bndbox></object></annotation>"
    )
    shape = {"label": "car", "shape_type": "rectangle", "points": [[0, 0], [9, 9]]}
    (raw / "images" / "a.json").write_text(json.dumps({"shapes": [shape]}))
    rect = {"name": "rect", "x": 0, "y": 0, "width": 9, "height": 9}
    region = {"shape_attributes": rect, "region_attributes": {"kind": "car", "note": "x"}}
    (raw / "via.json").write_text(json.dumps([{"filename": "a.png", "regions": [region]}]))
    images, out = str(raw / "images"), ["--output_dir", str(raw.parent / "data"), "--overwrite"]
    via = ["via", "--via_json", str(raw / "via.json"), "--images_dir", images]
    assert prepare_data.main([*via, *out]) == 2
    assert "found kind, note" in capsys.readouterr().err
    results = []
    for command in (
        ["voc", "--voc_dir", images],
        ["labelme", "--labelme_dir", images],
        [*via, "--class_attribute", "kind"],
    ):
        assert prepare_data.main([*command, *out, "--classes", "bottle_cap,car"]) == 0
        results.append(written(raw))
        assert validate(raw) == 0
        assert prepare_data.main([*command, *out, "--classes", "truck"]) == 2
        assert "a class of truck, found 'car'" in capsys.readouterr().err
    assert results[0] == results[1] == results[2]
    assert results[0]["annotations"][0]["category_id"] == 2


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("flags", "split", "images", "objects"),
    [
        (["voc", "--voc_dir", "bccd_voc_boxes"], "train", 205, 2805),
        (["voc", "--voc_dir", "bccd_voc_boxes"], "val", 87, 1138),
        (["voc", "--voc_dir", "bccd_voc_boxes"], "test", 72, 945),
        (["via", "--via_json", "{}/via_region_data.json", "--images_dir", "{}"], "train", 49, 78),
        (["via", "--via_json", "{}/via_region_data.json", "--images_dir", "{}"], "val", 15, 19),
    ],
)
def test_real_data(real_data, tmp_path, flags, split, images, objects, capsys):
    paths = [word.format(f"car_scratch_via/{split}") for word in flags[2::2]]
    named = zip(flags[1::2], paths, strict=True)
    source = [word for flag, path in named for word in (flag, str(real_data / path))]
    place = ["--split", split]
    command = [flags[0], *source, *place, "--output_dir", str(tmp_path)]
    assert prepare_data.main(command) == 0
    assert prepare_data.main(["validate", *place, "--data_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"images      {images} (" in out and f"objects     {objects} (" in out


@pytest.mark.real_data
def test_real_labelme(real_data, tmp_path, caplog):
    source = real_data / "sahi_terrain_coco"
    labelme = tmp_path / "labelme"
    labelme.mkdir()
    # Two photos, of which one has another suffix than its JSON says, and the JSON of an absent one.
    for name in ("terrain1.json", "terrain1.jpg", "terrain2.json", "terrain2.png", "terrain3.json"):
        shutil.copyfile(source / name, labelme / name)
    command = ["labelme", "--labelme_dir", str(labelme), "--output_dir", str(tmp_path / "data")]
    assert prepare_data.main(command) == 0
    assert prepare_data.main(["validate", "--data_dir", str(tmp_path / "data")]) == 0
    assert "skipped 1 of 3 images" in caplog.text and "10 objects: terrain3.png" in caplog.text
    split = coco.read_split(tmp_path / "data" / "train")
    wanted = coco.read_coco(source / "combined_coco.json", source)
    assert [image["file_name"] for image in split.images] == ["terrain1.jpg", "terrain2.png"]
    assert [len(rows) for rows in split.annotations.values()] == [7, 5]
    for found, rows in zip(split.annotations.values(), wanted.annotations.values(), strict=True):
        for a, b in zip(found, rows, strict=True):  # boxes, in whole pixels there
            assert a["bbox"] == pytest.approx(b["bbox"], abs=1.5)
