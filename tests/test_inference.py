"""inference.py on the tiny model: prompts, outputs, filters, and what it refuses."""

import contextlib
import io
import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import inference
from lora_layers import LoRAConfig, apply_lora, lora_modules
from sam3_lora import checkpoint
from sam3_lora import forward as forward_module
from sam3_lora.coco import decode_mask
from sam3_lora.config import Config, save_config
from sam3_lora.images import read_image
from sam3_lora.model import load_model

SIZE = (96, 64)  # width, height
BOX = "[[10, 8, 50, 40]]"
EXIF_ORIENTATION = 274
CONFIG = LoRAConfig(rank=2, alpha=4.0, target_modules=("v_proj",), components=("detr_decoder",))


def save_photo(path: Path, seed: int = 0, size: tuple[int, int] = SIZE) -> Path:
    """A photo of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_photo(tmp_path / "photo.jpg")


@pytest.fixture
def run(tiny_model_dir, capsys):
    """Runs the script on the tiny model, on the CPU, keeping every detection; returns (exit code,
    lines of stdout, stderr)."""

    def call(*words, base=True):
        argv = ["--threshold", "0", "--device", "cpu", *map(str, words)]
        argv += ["--model_name", str(tiny_model_dir)] if base else []
        code = inference.main(argv)
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return call


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory) -> Path:
    """A folder with `zero.pt`, which changes nothing, and `trained.pt`."""
    folder = tmp_path_factory.mktemp("adapters")
    model, _ = load_model(str(tiny_model_dir))
    torch.manual_seed(0)
    apply_lora(model, CONFIG)
    description = {
        "base_model": str(tiny_model_dir),
        "geometry_cls": "hf",
        "categories": {"car": "car"},
        "step": 1,
        "metrics": {},
    }
    checkpoint.save_adapter(folder / "zero.pt", model, CONFIG, **description)
    for _, layer in lora_modules(model):
        layer.lora_B.data = 2 * torch.randn_like(layer.lora_B)
    checkpoint.save_adapter(folder / "trained.pt", model, CONFIG, **description)
    return folder


def read_json(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def scores(path: Path) -> np.ndarray:
    return np.array([row["score"] for row in read_json(path)])


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        (["--text_prompt", "red car", "bus"], ["red car", "bus"]),
        (["--bboxes", BOX], ["visual"]),
        (["--text_prompt", "bus", "--bboxes", BOX, "--bbox_labels", "[0]"], ["bus"]),
    ],
    ids=["text", "box", "both"],
)
def test_outputs_of_each_kind_of_prompt(run, photo, tmp_path, words, prompts) -> None:
    output = tmp_path / "new" / "result.png"
    code, lines, _ = run("--image", photo, "--output", output, "--save_masks", *words)
    assert code == 0
    with Image.open(output) as image:
        assert (image.size, image.mode) == (SIZE, "RGB")
    rows = read_json(tmp_path / "new" / "result_detections.json")
    assert {row["prompt"] for row in rows} == set(prompts)
    for row in rows:
        assert prompts[row["category_id"] - 1] == row["prompt"]
        assert (row["image_id"], row["file_name"]) == (1, "photo.jpg")
    masks = sorted((tmp_path / "new" / "result_masks").iterdir())
    assert len(masks) == len(rows) > 0
    for path, row in zip(masks, rows, strict=True):
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == SIZE[::-1] and set(np.unique(pixels)) <= {0, 255}
        assert np.array_equal(pixels > 0, decode_mask(row["segmentation"], *SIZE[::-1]))
    counts = [f"{p} {sum(row['prompt'] == p for row in rows)}" for p in prompts]
    best = max(row["score"] for row in rows)
    assert lines == [f"photo.jpg: {', '.join(counts)}, best score {best:.3f}, {output}"]


def test_json_of_a_folder_loads_as_coco_results(run, tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    save_photo(folder / "b.png", 1)
    save_photo(folder / "a.jpg")
    (folder / "._a.jpg").write_bytes(b"junk")
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    target = tmp_path / "all.json"
    output = tmp_path / "out"
    code, lines, _ = run(
        "--image", folder, "--text_prompt", "x", "y", "--json", target, "--output", output
    )
    assert code == 0 and [line.split(":")[0] for line in lines] == ["a.jpg", "b.png"]
    assert {path.name for path in output.iterdir()} == {"a_overlay.png", "b_overlay.png"}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "width": SIZE[0], "height": SIZE[1]} for i in (1, 2)],
        "annotations": [],
        "categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results = truth.loadRes(str(target))
    assert set(results.getCatIds()) == {1, 2}
    named = {(r["image_id"], r["file_name"]) for r in results.dataset["annotations"]}
    assert named == {(1, "a.jpg"), (2, "b.png")}
    annotation = results.dataset["annotations"][0]
    assert results.annToMask(annotation).shape == SIZE[::-1]


def test_images_of_every_kind_give_outputs_of_their_size(run, tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = Image.open(save_photo(tmp_path / "plain.png"))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    picture.convert("L").save(folder / "grey.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    deep = np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[::-1])
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    # Inside the turned photo only: a box is in pixels of the image as shown.
    box = "[[10, 60, 50, 90]]"
    (output := tmp_path / "turned.v2").mkdir()  # a folder for all its dot
    code, _, err = run("--image", folder / "turned.jpg", "--bboxes", box, "--output", output)
    assert code == 0, err
    assert run("--image", folder, "--text_prompt", "x", "--output", tmp_path / "out")[0] == 0
    overlays = (tmp_path / "out").glob("*_overlay.png")
    sizes = {p.name.removesuffix("_overlay.png"): Image.open(p).size for p in overlays}
    turned = sizes.pop("turned")
    assert turned == Image.open(output / "turned_overlay.png").size == SIZE[::-1]
    assert set(sizes) == {"grey", "alpha", "deep.png", "deep.tif"}
    assert set(sizes.values()) == {SIZE}
    for row in read_json(tmp_path / "out" / "turned_detections.json"):
        assert row["segmentation"]["size"] == list(SIZE)


def test_an_adapter_changes_scores_and_a_zero_one_does_not(run, photo, tmp_path, adapters) -> None:
    def scored(name, *words, base):
        target = tmp_path / f"{name}_detections.json"
        words += ("--image", photo, "--text_prompt", "car", "--output", tmp_path / f"{name}.png")
        code, _, err = run(*words, base=base)
        assert code == 0, err
        return scores(target), err

    base, _ = scored("base", "--model_geometry_cls", "hf", base=True)
    # Base and geometry_cls are the adapter's own.
    zero, _ = scored("zero", "--lora_weights", adapters / "zero.pt", base=False)
    trained, err = scored("trained", "--lora_weights", adapters / "trained.pt", base=False)
    assert np.array_equal(zero, base)
    assert np.abs(trained - base).max() > 1e-4
    assert "training prompts: car" in err and "WARNING" not in err
    folder = tmp_path / "best_model"
    folder.mkdir()
    shutil.copyfile(adapters / "trained.pt", folder / "lora_weights.pt")
    words = ("--lora_weights", folder, "--model_geometry_cls", "meta")
    other, err = scored("other", *words, base=True)
    assert "--model_geometry_cls is meta, the adapter was trained with hf" in err
    assert not np.array_equal(other, trained)


def test_a_training_config_is_taken(run, photo, tmp_path, adapters, monkeypatch) -> None:
    passes = []
    predict = forward_module.Forward.predict
    monkeypatch.setattr(
        forward_module.Forward, "predict", lambda *args: passes.append(args[-1]) or predict(*args)
    )
    config = Config()
    config = replace(config, training=replace(config.training, batch_size=2))
    config = replace(config, hardware=replace(config.hardware, max_rows_per_forward=1))
    save_config(config, tmp_path / "config.yaml")
    words = ["--image", photo, "--text_prompt", "a", "b", "--output", tmp_path / "r.png"]
    words += ["--config", tmp_path / "config.yaml", "--lora_weights", adapters / "zero.pt"]
    code, _, err = run(*words, base=False)
    assert code == 0 and passes == [slice(0, 1), slice(1, 2)]  # its max_rows_per_forward
    assert "model_geometry_cls: hf of the adapter, not meta of the config" in err


def test_prompts_share_one_vision_pass(run, photo, tmp_path, monkeypatch) -> None:
    calls = []
    encode = forward_module.Forward.encode_trunk
    monkeypatch.setattr(
        forward_module.Forward, "encode_trunk", lambda *args: calls.append(args) or encode(*args)
    )
    words = ["--image", photo, "--text_prompt", "a", "b", "c", "--bboxes", BOX]
    run(*words, "--output", tmp_path / "one.png")
    assert len(calls) == 1
    run(*words, "--output", tmp_path / "cut.png", "--max_rows_per_forward", 2)
    assert len(calls) == 2
    whole, cut = (sorted(scores(tmp_path / f"{name}_detections.json")) for name in ("one", "cut"))
    assert np.allclose(whole, cut, atol=1e-5)


def test_threshold_leaves_nothing_but_still_names_the_best_score(run, photo, tmp_path) -> None:
    output = tmp_path / "r.png"
    code, lines, _ = run(
        "--image", photo, "--text_prompt", "x", "--threshold", 1, "--output", output
    )
    assert code == 0 and read_json(tmp_path / "r_detections.json") == []
    score = re.fullmatch(rf"photo.jpg: x 0 \(best score (0\.\d+), below 1\), {output}", lines[0])
    assert 0 < float(score[1]) < 1
    assert np.array_equal(np.asarray(Image.open(output)), read_image(photo))


def test_filters_reach_the_outputs(run, photo, tmp_path) -> None:
    words = ["--image", photo, "--bboxes", "[[0, 0, 96, 64], [0, 0, 5, 5]]"]
    words += ["--bbox_labels", "[1, 0]", "--output", tmp_path / "r.png"]
    run(*words)
    everything = read_json(tmp_path / "r_detections.json")
    run(*words, "--only_boxed", "--nms_iou", 0)
    assert 0 < len(read_json(tmp_path / "r_detections.json")) < len(everything)
    tiny_box = ["--bboxes", "[[0, 0, 2, 2]]", "--only_boxed", "--output", tmp_path / "s.png"]
    run("--image", photo, *tiny_box)
    assert read_json(tmp_path / "s_detections.json") == []


REFUSED = {
    "no prompt": ([], "expected --text_prompt or --bboxes, found neither; say what to find"),
    "empty text": (["--text_prompt", " "], "--text_prompt: expected words"),
    "not JSON": (["--bboxes", "here"], r"argument --bboxes: expected '\[\[x1"),
    "bare box": (["--bboxes", "10,15,40,35"], r"did you mean '\[\[10, 15, 40, 35\]\]'\?"),
    "four words": (["--bboxes", "10", "15", "40", "35"], r"expected '\[\[x1, y1, x2, y2\]"),
    "width, height": (["--bboxes", "[[60, 2, 50, 8]]"], "expected two corners"),
    "no box": (
        ["--bboxes", "[]"],
        r"expected '\[\[x1, y1, x2, y2\], ...\]' in pixels, found '\[\]",
    ),
    "flat box": (["--bboxes", "[10,15,40,35]"], r"did you mean '\[\[10, 15, 40, 35\]\]'\?"),
    "fractions": (["--bboxes", "[[0.1, 0.2, 0.5, 1]]"], "looks like fractions; pixels are expect"),
    "three numbers": (["--bboxes", "[[1, 2, 3]]"], r"found the box \[1.0, 2.0, 3.0\]"),
    "text in a box": (["--bboxes", '[[1, 2, 3, "4"]]'], "found the box"),
    "true in a box": (["--bboxes", "[[1, 2, 3, true]]"], "found the box"),
    "not finite": (["--bboxes", "[[1, 2, 3, NaN]]"], "found the box"),
    "inverted": (["--bboxes", "[[9, 2, 3, 8]]"], r"x1 < x2 and y1 < y2, found the box \[9, 2, 3"),
    "beyond": (["--bboxes", "[[9, 2, 97, 8]]"], r"inside .*\(96 x 64 pixels\), found \[9, 2, 97"),
    "over the edge": (["--bboxes", "[[60, 2, 99, 8]]"], "two corners, .* not a corner with width"),
    "negative": (["--bboxes", "[[-1, 2, 9, 8]]"], r"expected boxes inside .* found \[-1, 2"),
    "label count": (["--bboxes", BOX, "--bbox_labels", "[1, 0]"], r"each box .*\(1\), found 2"),
    "labels alone": (["--text_prompt", "x", "--bbox_labels", "[1]"], r"each box .*\(0\), found 1"),
    "label 2": (["--bboxes", BOX, "--bbox_labels", "[2]"], "1 for a positive box and 0 for"),
    "negatives alone": (["--bboxes", BOX, "--bbox_labels", "[0]"], "a positive box in --bboxes"),
    "nothing boxed": (["--text_prompt", "x", "--only_boxed"], "--only_boxed: expected a positive"),
    "threshold": (["--text_prompt", "x", "--threshold", "50"], "from 0 to 1, found '50'"),
    "nms word": (["--text_prompt", "x", "--nms_iou", "on"], "from 0 to 1, found 'on'"),
    "no image": (["--text_prompt", "x", "--output", "x.pdf"], r"\(.bmp, .*\) or a folder, found x"),
    "unknown flag": (["--text_promt", "x"], "did you mean --text_prompt"),
}


def refusal(result: tuple, out: Path) -> str:
    """The error line of a run that exits with 2 and writes nothing."""
    code, lines, err = result
    assert code == 2 and lines == [] and not out.exists()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in err
    return errors[0]


@pytest.mark.parametrize("case", REFUSED)
def test_bad_flags_are_refused(run, photo, tmp_path, case) -> None:
    words, message = REFUSED[case]
    out = tmp_path / "out"
    assert re.search(message, refusal(run("--image", photo, "--output", out, *words), out))


def bad_image(kind: str, folder: Path) -> Path:
    """A path that is not an image or a folder of readable ones."""
    path = folder / kind
    if kind == "text.jpg":
        path.write_text("not an image", encoding="utf-8")
    elif kind != "missing.jpg":
        path.mkdir()
        (path / "notes.txt").write_text("x", encoding="utf-8")
    if kind == "mixed":
        save_photo(path / "a.jpg")
        for i in range(5):
            (path / f"broken{i}.jpg").write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing.jpg", "an image or a folder of images, found no .*missing.jpg; correct the path"),
        ("text.jpg", "expected an image that PIL reads, found .*text.jpg"),
        ("empty", r"images \(.bmp, .*\) directly in .*empty, found none; name the folder that"),
        ("mixed", "broken0.jpg .*broken1.jpg .*broken2.jpg .*; 2 more"),
    ],
)
def test_bad_images_are_refused_before_any_work(run, tmp_path, kind, message) -> None:
    out = tmp_path / "out"
    words = ["--image", bad_image(kind, tmp_path), "--text_prompt", "x", "--output", out]
    assert re.search(message, refusal(run(*words), out))


def test_a_photo_cut_short_in_a_folder_is_left_out(run, tmp_path) -> None:
    folder, out, rows = tmp_path / "photos", tmp_path / "out", tmp_path / "all.json"
    folder.mkdir()
    for name in ("a", "b", "c"):
        save_photo(folder / f"{name}.jpg")
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:-600])
    words = ["--image", folder, "--text_prompt", "x", "--output", out, "--json", rows]
    code, lines, err = run(*words)
    assert code == 2 and [line.split(":")[0] for line in lines] == ["a.jpg", "c.jpg"]
    assert f"left out: expected an image that PIL reads, found {folder / 'b.jpg'}" in err
    last = "error: 1 of 3 images were left out, the first: expected an image that PIL reads, found"
    assert err.splitlines()[-1].startswith(last)
    assert {path.name for path in out.iterdir()} == {"a_overlay.png", "c_overlay.png"}
    assert {row["image_id"] for row in read_json(rows)} == {1, 3}


def test_a_photo_cut_short_leaves_nothing_behind(run, photo, tmp_path) -> None:
    photo.write_bytes(photo.read_bytes()[:-600])
    out = tmp_path / "out"
    error = refusal(run("--image", photo, "--text_prompt", "x", "--output", out), out)
    assert "expected an image that PIL reads" in error


def make_bad_adapter(kind: str, source: Path, path: Path) -> Path:
    """An adapter file that does not fit the tiny model, or is none."""
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Path("x")))
    elif kind == "model":
        torch.save({"weight": torch.zeros(1)}, path)
    elif kind != "missing":
        content = torch.load(source, weights_only=True)
        if kind == "modules":
            content["lora_config"]["target_modules"] = ["qkv"]
        elif kind == "layers":
            content["lora_config"]["components"] = ["detr_encoder"]
        elif kind == "base":
            content["base_fingerprint"] = "0" * 16
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "expected an adapter file, found nothing at .*bad.pt"),
        ("pickle", "cannot be read safely"),
        ("model", "expected an adapter written by train_sam3_lora.py"),
        ("modules", "target 'qkv' matched no Linear layer"),
        ("layers", "the adapter does not fit the model: .* missing"),
        ("base", "expected the base it was trained on, .*; name the right one"),
    ],
)
def test_bad_adapters_are_refused(run, photo, tmp_path, adapters, kind, message) -> None:
    out = tmp_path / "out"
    path = make_bad_adapter(kind, adapters / "zero.pt", tmp_path / "bad.pt")
    words = ["--image", photo, "--text_prompt", "x", "--output", out, "--lora_weights", path]
    assert re.search(message, refusal(run(*words), out))


def test_no_file_that_was_not_named_is_replaced(run, photo, tmp_path) -> None:
    words = ["--image", photo, "--text_prompt", "x"]
    labels = tmp_path / "photo.json"
    labels.write_text('{"shapes": []}', encoding="utf-8")
    stranger = save_photo(tmp_path / "photo.png")
    before = {path: path.read_bytes() for path in (photo, labels, stranger)}
    for output in (photo, tmp_path / "sub" / ".." / "photo.jpg"):
        code, _, err = run(*words, "--output", output)
        assert code == 2 and "photo.jpg is a folder or device, an input, or the name of" in err
    code, _, err = run(*words, "--output", tmp_path / "r.png", "--json", tmp_path / "r.png")
    assert code == 2 and "the name of two outputs" in err
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in before}
    assert run(*words, "--output", tmp_path, "--save_masks")[0] == 0
    assert {path: path.read_bytes() for path in before} == before
    new = {path.name for path in tmp_path.iterdir()} - {path.name for path in before}
    assert new == {"photo_overlay.png", "photo_detections.json", "photo_masks"}
    assert run(*words, "--output", stranger, "--json", labels)[0] == 0
    assert isinstance(read_json(labels), list)


def test_a_second_run_replaces_its_outputs_and_sets_masks_aside(run, photo, tmp_path) -> None:
    out = tmp_path / "out"
    words = ["--image", photo, "--text_prompt", "x", "--output", out, "--save_masks"]
    assert run(*words)[0] == 0
    first = len(read_json(out / "photo_detections.json"))
    code, _, err = run(*words, "--nms_iou", 0)
    assert code == 0 and "renamed to" in err
    assert len(list((out / "photo_masks.1").iterdir())) == first
    count = len(read_json(out / "photo_detections.json"))
    assert len(list((out / "photo_masks").iterdir())) == count < first
    names = {"photo_overlay.png", "photo_detections.json", "photo_masks", "photo_masks.1"}
    assert {path.name for path in out.iterdir()} == names


def test_a_class_name_stands_for_its_trained_phrase(run, photo, tmp_path, adapters) -> None:
    content = torch.load(adapters / "trained.pt", weights_only=True)
    content["categories"] = {"bottle_cap": "bottle cap", "lid": "cap", "cap": "red cap"}
    content["categories"] |= {f"c{i}": f"thing {i}" for i in range(9)}
    torch.save(content, tmp_path / "a.pt")
    words = ["--image", photo, "--lora_weights", tmp_path / "a.pt", "--output", tmp_path / "r.png"]
    # "cap" is a class, but also the phrase of another, which was surely meant for itself.
    words += ["--text_prompt", "bottle_cap", "bottle cap", "cap", "dog"]
    code, lines, err = run(*words, base=False)
    assert code == 0
    rows = read_json(tmp_path / "r_detections.json")
    names = {1: "bottle cap", 2: "cap", 3: "dog"}
    assert {row["category_id"]: row["prompt"] for row in rows} == names
    assert "prompt 'bottle_cap': the adapter was trained with 'bottle cap'" in err
    assert err.count("which is used") == 1 and "thing 6, ... and 2 more\n" in err


def test_what_may_have_been_meant_is_told(photo, tmp_path, adapters, capsys) -> None:
    path = shutil.copy(adapters / "zero.pt", tmp_path / "a.pt")
    checkpoint.store_thresholds(path, {"car": 1.0}, {})
    words = ["--image", photo, "--output", tmp_path / "r.png", "--device", "cpu"]
    words += ["--lora_weights", path, "--text_prompt"]

    def ask(*prompts: str) -> tuple[list[str], str]:
        assert inference.main([*map(str, words), *prompts]) == 0
        printed = capsys.readouterr()
        return printed.out.splitlines(), printed.err

    lines, err = ask("CAR")
    assert "prompt 'CAR': the adapter was trained with 'car', which is used" in err
    assert re.match(r"photo.jpg: car 0 \(best score 0\.\d+, below 1\), ", lines[0])
    assert "nothing found in 1 of 1 images: --threshold keeps lower scores" in err
    assert "not among" not in err and "comma" not in err
    lines, err = ask("rust, oil leak", "car")
    assert err.count("is one prompt") == 1 and '--text_prompt rust "oil leak"\n' in err
    assert err.count("'rust, oil leak': not among the prompts that a was trained on (car); ") == 1


def test_a_folder_of_images_needs_a_folder(run, photo, tmp_path) -> None:
    output = tmp_path / "r.png"
    code, _, err = run("--image", tmp_path, "--text_prompt", "x", "--output", output)
    assert code == 2 and "expected a folder for a folder of images" in err


def test_help_says_what_a_box_does(capsys) -> None:
    assert inference.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "it finds everything like the object in it" in text
    assert "--only_boxed keeps what lies in the boxes" in text
