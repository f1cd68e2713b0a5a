"""`evaluate_sam3_lora.py --report` and `--calibrate`: figures, page, thresholds and their use."""

import copy
import json
import logging
import re
import shutil
from argparse import Namespace
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_sam3_lora
import inference
from lora_layers import AdapterError, LoRAConfig
from sam3_lora import checkpoint, intervals, report
from sam3_lora.coco import CocoSplit, encode_mask
from sam3_lora.config import Config
from sam3_lora.dataset import OUT_OF_DOMAIN_WORDS
from sam3_lora.drawing import PALETTE

LORA = LoRAConfig(
    rank=2,
    alpha=4.0,
    target_modules=("v_proj",),
    components=("vision_encoder", "text_encoder", "detr_decoder"),
)
FILES = {"metrics.json", "detections.json", "base_detections.json", "panel.png", "report.html"}
HOSTILE = "<script>alert('x')</script>\"&"
SIDE = 32


@pytest.fixture(scope="module")
def adapter_file(tiny_model_dir, save_random_adapter, tmp_path_factory) -> Path:
    """An adapter that changes what the model finds."""
    path = tmp_path_factory.mktemp("adapter") / "lora_weights.pt"
    description = {"geometry_cls": "hf", "categories": {"red_part": "red part"}, "step": 3}
    return save_random_adapter(path, tiny_model_dir, LORA, **description)


@pytest.fixture
def adapter(adapter_file, tmp_path) -> Path:
    """A copy of the adapter, to be written into."""
    return Path(shutil.copyfile(adapter_file, tmp_path / "lora_weights.pt"))


@pytest.fixture(scope="module")
def data_dirs(write_split, tmp_path_factory) -> dict[str, Path]:
    """Splits of three images: with masks, boxes only, and without any object."""
    root, kinds = tmp_path_factory.mktemp("data"), ("masks", "boxes", "empty")
    folders = {k: write_split(root / k, 3, masks=k != "boxes") for k in kinds}
    file = folders["empty"] / "val" / "annotations.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "annotations": []}), encoding="utf-8")
    return folders


@pytest.fixture
def run(data_dirs, adapter, capsys):
    """Evaluates the adapter on the CPU; returns (exit code, stdout, stderr)."""

    def call(*words, data: str = "masks") -> tuple[int, str, str]:
        argv = ["--data_dir", data_dirs[data], "--device", "cpu", "--num_workers", "0", *words]
        argv += [] if "--no_adapter" in words else ["--lora_weights", adapter]
        argv = [str(word) for word in argv if word != "--no_adapter"]
        return evaluate_sam3_lora.main(argv), *capsys.readouterr()

    return call


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """The tags, attributes and text of a page; open tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources, self.open, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "br", "img", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_page(folder: Path) -> Page:
    """The page of a report, checked to hold all it shows."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "http" not in text and "@import" not in text and "url(" not in text
    return page


def test_a_report_holds_every_figure(run, tmp_path) -> None:
    out = tmp_path / "out"
    words = ["--score_threshold", "0.01", "--bootstrap", "50"]
    code, printed, err = run("--report", out, *words)
    assert code == 0, err
    assert " 'blue part': not among the prompts that " in err and "trained on (red part);" in err
    assert {path.name for path in out.iterdir()} == FILES
    metrics, page = read(out), check_page(out)
    summaries = {"base": metrics["base"], "adapter": metrics}
    figures = metrics["report"]["figures"]
    for side, summary in summaries.items():
        expected = {
            "mask AP75": summary["segm"]["AP75"],
            "box AP": summary["bbox"]["AP"],
            "cgF1": summary["cgf1"]["cgF1"],
            "IL_MCC": summary["cgf1"]["IL_MCC"],
            "mask IoU": summary["mask_iou"],
            report.ABSENT: summary["false_positive_rate"],
        }
        own = {name: figures[name][side]["value"] for name in expected}
        assert own == pytest.approx(expected, abs=1e-12)
    assert metrics["report"]["resamples"] == 50
    low, high = figures["mask IoU"]["adapter"]["interval"]
    assert low <= metrics["mask_iou"] <= high
    asked = metrics["report"]["out_of_domain"]["words"]
    assert tuple(asked) == OUT_OF_DOMAIN_WORDS
    rate = sum(n["adapter"] for n in asked.values()) / (3 * len(asked))
    assert figures[report.OUT_OF_DOMAIN]["adapter"]["value"] == pytest.approx(rate)
    kept = metrics["report"]["forgetting"]
    assert kept["kind"] == "agreement" and kept["asked"] == list(report.EVERYDAY_WORDS)
    assert printed.rstrip().endswith(report.verdict(metrics))
    assert report.verdict(metrics).replace("->", "→") in page.text
    assert f"{metrics['mask_iou']:.3f}" in page.text
    assert "3 images: too few for intervals" in page.text
    assert page.tags.count("img") == 9
    # The same figures as a plain comparison, and the same intervals again.
    assert run("--compare", *words[:2], "--output_dir", tmp_path / "plain")[0] == 0
    plain = read(tmp_path / "plain")
    assert plain == {name: metrics[name] for name in plain}
    assert run("--report", tmp_path / "again", *words)[0] == 0
    assert read(tmp_path / "again") == metrics


def test_a_probe_set_is_scored_for_both(run, data_dirs, tmp_path) -> None:
    probe = ["--probe_dir", data_dirs["masks"], "--probe_split", "val"]
    code, _, err = run("--report", tmp_path / "out", *probe, "--bootstrap", "20", data="boxes")
    assert code == 0, err
    metrics, page = read(tmp_path / "out"), check_page(tmp_path / "out")
    kept = metrics["report"]["forgetting"]
    assert kept["kind"] == "probe" and kept["images"] == 3 and kept["trained"] == ["red_part"]
    assert run("--compare", "--output_dir", tmp_path / "probed")[0] == 0
    probed = read(tmp_path / "probed")
    for side, summary in (("base", probed["base"]), ("adapter", probed)):
        value = kept["figures"]["mask AP50"][side]["value"]
        assert value == pytest.approx(summary["segm"]["AP50"], abs=1e-12)
    assert "trained on 1 of the 2" in page.text and "everyday" not in page.text
    assert "The split has no masks: box figures only." in page.text
    assert metrics["report"]["figures"]["mask AP"]["base"]["value"] is None


@pytest.mark.parametrize(
    ("data", "words", "shown"),
    [
        ("masks", ["--max_val_images", "1"], "1 image: too few"),
        ("boxes", ["--bootstrap", "0"], "box figures only"),
        ("empty", [], "undefined"),
        ("masks", ["--score_threshold", "1"], "0.000 [0.000, 0.000]"),
    ],
    ids=["one image", "boxes", "no object", "no detection"],
)
def test_a_page_whatever_there_is_to_show(data, words, shown, run, tmp_path) -> None:
    code, _, err = run("--report", tmp_path / "out", *words, data=data)
    assert code == 0, err
    page = check_page(tmp_path / "out")
    assert shown in page.text
    for term in ("nan", "None", "inf "):
        assert term not in page.text
    assert "NaN" not in (tmp_path / "out" / "metrics.json").read_text()


def test_an_earlier_report_is_renamed_or_replaced(run, tmp_path) -> None:
    words = ["--report", tmp_path / "out", "--bootstrap", "0", "--max_val_images", "1"]
    assert run(*words)[0] == 0
    code, _, err = run(*words)
    assert code == 0 and "renamed to" in err
    assert {path.name for path in (tmp_path / "out.1").iterdir()} == FILES
    # Nor is a folder that holds more: another tool's figures, a paper's pictures.
    (tmp_path / "out" / "figure.pdf").write_text("mine", encoding="utf-8")
    code, out, err = run(*words)
    assert (code, out) == (2, "") and "found figure.pdf; name another folder" in err
    assert (tmp_path / "out" / "figure.pdf").exists() and not (tmp_path / "out.2").exists()
    (tmp_path / "out" / "figure.pdf").unlink()
    assert run("--output_dir", tmp_path / "out", "--overwrite")[0] == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"metrics.json", "detections.json"}


REFUSED = {
    "base": (["--report", "out", "--base"], "--report: expected --lora_weights FILE alone"),
    "no adapter": (["--report", "out", "--no_adapter"], "found no adapter; it evaluates"),
    "calibrated base": (["--calibrate", "--base"], "--calibrate: expected --lora_weights FILE"),
    "two folders": (["--report", "out", "--output_dir", "x"], "expected without --output_dir"),
    "bootstrap alone": (["--bootstrap", "9"], "--bootstrap: expected with --report DIR"),
    "probe alone": (["--probe_dir", "x"], "--probe_dir: expected with --report DIR"),
    "probe split": (
        ["--report", "out", "--probe_split", "val"],
        "--probe_split: expected with --probe_dir",
    ),
    "negative": (["--report", "out", "--bootstrap", "-1"], "a whole number from 0 up, found '-1'"),
    "no probe": (["--report", "out", "--probe_dir", "nowhere"], "found no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = REFUSED[case]
    code, out, err = run(*words)
    assert (code, out) == (2, "") and message in err
    assert [line for line in err.splitlines() if "INFO" not in line and "usage" not in line]
    assert err.splitlines()[-1].count("error") == 1 and not (tmp_path / "out").exists()


def test_thresholds_are_stored_and_measured_elsewhere(run, adapter, tmp_path, monkeypatch) -> None:
    words = ["--bootstrap", "0", "--score_threshold", "0.3"]
    code, out, err = run("--calibrate", *words[2:], "--output_dir", tmp_path / "few")
    assert code == 0 and "red_part" in out and "fewer than 5 objects" in out
    assert "too few objects, no threshold stored: red_part, blue_part" in err
    assert checkpoint.read_adapter(adapter)["thresholds"] == {}
    monkeypatch.setattr(intervals, "FEW_OBJECTS", 2)
    checkpoint.store_thresholds(adapter, {}, {})
    before = torch.load(adapter, weights_only=True)
    code, out, err = run("--calibrate", *words[2:], "--output_dir", tmp_path / "a")
    assert code == 0, err
    after = torch.load(adapter, weights_only=True)
    chosen = {
        r["name"]: r["threshold"] for r in read(tmp_path / "a")["calibration"]["per_category"]
    }
    assert after.pop("thresholds") == chosen and set(chosen) == {"red_part", "blue_part"}
    assert after.pop("calibration") == {
        "split": "val", "images": 3, "iou": 0.5, "tile": None,
        "prompts": {"red_part": "red part", "blue_part": "blue part"},
    }  # fmt: skip
    assert after.keys() == before.keys() - {"thresholds", "calibration"}
    before = {k: before[k] for k in after}
    tensors = [content.pop("lora") for content in (before, after)]
    assert before == after and all(torch.equal(tensors[0][k], v) for k, v in tensors[1].items())
    code, _, err = run("--calibrate", *words[2:], "--output_dir", tmp_path / "again")
    replaced = "these replace the thresholds chosen on val: red_part 0."
    assert code == 0 and replaced in err and "blue_part 0." in err, err
    # Another evaluation measures these, not new ones, and says whence they are.
    checkpoint.store_thresholds(adapter, {"red_part": 0.25}, {"split": "other"})
    assert run("--report", tmp_path / "b", *words)[0] == 0
    found = read(tmp_path / "b")["calibration"]
    assert [r["threshold"] for r in found["per_category"]] == [0.25, 0.3]
    page = check_page(tmp_path / "b")
    assert "chosen on other (stored in the adapter)" in page.text
    assert "They were chosen on the images" not in page.text
    assert run("--report", tmp_path / "c", *words, "--calibrate")[0] == 0
    assert "They were chosen on the images" in check_page(tmp_path / "c").text
    assert checkpoint.read_adapter(adapter)["thresholds"] == chosen


@pytest.mark.parametrize(
    "thresholds", [[0.5], {"x": "0.5"}, {"x": 1.5}, {"x": float("nan")}, {"x": True}, {3: 0.5}]
)
def test_an_adapter_with_malformed_thresholds_is_refused(thresholds, adapter) -> None:
    checkpoint.store_thresholds(adapter, thresholds, {})
    with pytest.raises(AdapterError, match="found another thresholds"):
        checkpoint.read_adapter(adapter)
    checkpoint.store_thresholds(adapter, {"x": 1}, {})
    assert checkpoint.read_adapter(adapter)["thresholds"] == {"x": 1}


def test_the_threshold_of_a_prompt(caplog) -> None:
    caplog.set_level(logging.INFO)
    adapter = {
        "thresholds": {"bottle_cap": 0.25, "cup": 0.75},
        "categories": {"bottle_cap": "red metal cap"},
    }
    texts = ["red metal cap", "cup", "tree"]
    alone, adapters = [{"a": 1.0}] * 3, {"a": adapter, "b": {}}
    assert inference.choose_thresholds(None, texts, alone, adapters) == [0.25, 0.75, 0.5]
    assert "red metal cap 0.250 (stored), cup 0.750 (stored), tree 0.5" in caplog.text
    caplog.clear()
    assert inference.choose_thresholds(0.1, texts, alone, adapters) == [0.1] * 3
    # Calibrated on what it was not trained on, or in other words.
    adapter["calibration"] = {"prompts": {"cup": "tea cup", "bottle_cap": "cap"}}
    texts = ["red metal cap", "cap", "tea cup"]
    assert inference.choose_thresholds(None, texts, alone, adapters) == [0.5, 0.25, 0.75]
    caplog.clear()
    others = [{"a": 0.5, "b": 0.5}, {"b": 1.0}, {}]  # a blend, another adapter, the base
    assert inference.choose_thresholds(None, texts, others, adapters) == [0.5] * 3
    assert caplog.text == ""


def test_thresholds_of_another_search_are_warned_of(caplog) -> None:
    tiled = {"thresholds": {"cup": 0.7}, "calibration": {"tile": 0.5}}
    whole = {"thresholds": {"cup": 0.7}}
    inference.check_calibration(0.5, {"a": tiled, "b": {}})
    inference.check_calibration(None, {"a": whole, "b": {"thresholds": {}}})
    assert caplog.text == ""
    inference.check_calibration(None, {"a": tiled, "b": whole})
    assert "a: its thresholds were chosen with --tile 0.5 and scores with no --tile" in caplog.text
    caplog.clear()
    inference.check_calibration(0.25, {"a": tiled, "b": whole})
    assert [record.args[0] for record in caplog.records] == ["a", "b"]


def test_inference_keeps_what_reaches_the_stored_threshold(run, adapter, tmp_path, capsys) -> None:
    photo = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    words = ["--lora_weights", adapter, "--image", photo, "--text_prompt", "red_part", "other"]
    words += ["--device", "cpu", "--output", tmp_path / "out.png"]

    def found(*more) -> list[tuple[str, float]]:
        assert inference.main([str(word) for word in (*words, *more)]) == 0
        rows = json.loads((tmp_path / "out_detections.json").read_text(encoding="utf-8"))
        return sorted((row["prompt"], row["score"]) for row in rows)

    everything = found("--threshold", "0")
    red = sorted(score for prompt, score in everything if prompt == "red part")
    assert len(red) > 1
    checkpoint.store_thresholds(adapter, {"red_part": red[-1]}, {})
    kept = found()
    err = capsys.readouterr().err
    assert "red part" in err and "chosen with" not in err
    found("--tile", "0.9")
    assert "chosen with no --tile and scores with --tile 0.9" in capsys.readouterr().err
    found("--tile", "0.9", "--route", "red_part=base", "other=base")
    assert "chosen with" not in capsys.readouterr().err
    default = [(p, s) for p, s in everything if p == "other" and s >= 0.5]
    assert kept == sorted([*default, ("red part", red[-1])])
    assert found("--threshold", "0") == everything


def a_split(names: dict[int, str]) -> tuple[CocoSplit, list[dict]]:
    """Two images, an object on the first, and its detection."""
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[4:12, 4:20] = True
    row = {"category_id": 1, "bbox": [4, 4, 16, 8], "segmentation": encode_mask(mask)}
    images = [
        {"id": i, "file_name": f"{HOSTILE}{i}.png", "width": SIDE, "height": SIDE} for i in (1, 2)
    ]
    annotations = {1: [{**row, "id": 1, "iscrowd": 0, "area": 128.0}], 2: []}
    split = CocoSplit(Path(HOSTILE), Path("."), images, annotations, names, {names[1]: HOSTILE})
    return split, [{**row, "image_id": 1, "score": 0.875}]


@pytest.fixture
def metrics() -> dict:
    """What a report's page is made of, every name hostile."""
    split, results = a_split({1: HOSTILE, 2: "b"})
    words = CocoSplit(*[getattr(split, f) for f in ("annotations_file", "images_dir", "images")],
                      {1: [], 2: []}, {1: HOSTILE + "w", 2: HOSTILE + "v"}, {})  # fmt: skip
    models = []
    for rows in ([], results):
        summary = intervals.collect(split, rows, 0.5, 100).summary(split)
        asked = [{**row, "category_id": c, "image_id": 2} for row in results for c in (1, 2)]
        models.append({"split": (summary, rows), "words": ({}, asked)})
    splits = {"split": split, "words": words}
    made = report.build_report(
        splits, *models, [HOSTILE + "w"], most=100, resamples=100, trained=[HOSTILE]
    )
    chosen = intervals.calibrate(split, results, "segm", 0.5)
    described = {"model": HOSTILE, "data": HOSTILE, "split": HOSTILE, "max_detections": 100}
    described["prompt_with"] = "text"
    calibration = {**chosen, "chosen_on": HOSTILE, "stored": False}
    return {**models[1]["split"][0], **described, "report": made, "calibration": calibration}


def test_no_name_breaks_out_of_the_page(metrics) -> None:
    picture = np.full((8, 8, 3), 200, np.uint8)
    page = Page(report.build_page(metrics, {"Best images": [(HOSTILE, [picture] * 3)]}))
    assert "script" not in page.tags and page.tags.count("img") == 3
    # Split, data, model, category, its prompt, the words, the caption.
    assert page.text.count("<script>alert('x')</script>\"&") >= 9


def test_a_page_says_how_it_was_asked(metrics) -> None:
    def text(**how) -> str:
        return Page(report.build_page({**metrics, **how}, {})).text

    assert "asked with their text" in text() and "tiles" not in text()
    assert "asked with their text, in tiles of 0.6" in text(tile=0.6)
    assert "asked with a box in place of their text" in text(prompt_with="box")
    assert "asked with a box and their text" in text(prompt_with="both")
    assert "asked with their text" in text(prompt_with="all")
    assert "undefined: no image lacks a category" not in text()
    counts = {**metrics["counts"], "absent_pairs": 0}
    assert "undefined: no image lacks a category: keep images" in text(counts=counts)


def test_the_verdict_says_what_moved_and_what_did_not(metrics) -> None:
    def figure(base, adapter, limits) -> dict:
        change = {"value": None if base is None else adapter - base, "interval": limits}
        values = {"base": base, "adapter": adapter}
        return {**{k: {"value": v} for k, v in values.items()}, "difference": change}

    own = metrics["report"]["figures"]
    own["mask AP50"] = figure(0.013, 0.993, [0.95, 0.99])
    own["cgF1"] = figure(0.5, 0.51, [-0.02, 0.04])
    own[report.ABSENT] = figure(None, 0.25, None)
    own[report.OUT_OF_DOMAIN] = figure(0.5, 0.25, [-0.3, -0.1])
    kept = metrics["report"]["forgetting"]
    kept |= {"base": 40, "kept": {"value": 0.9, "interval": [0.8, 0.95]}}
    assert report.verdict(metrics) == (
        "On 2 images: mask AP50 0.013 -> 0.993 (+0.980 [+0.950, +0.990]); no clear difference in "
        "cgF1 (0.500 -> 0.510); false positives on absent categories undefined -> 0.250; "
        "detections of out-of-domain words 0.500 -> 0.250 (-0.250 [-0.300, -0.100]); of the base's "
        "40 detections of everyday words the adapter keeps 0.900 [0.800, 0.950]."
    )
    own["mask AP50"] = figure(0.5, 0.5, [0.0, 0.0])
    kept |= {"base": 0}
    assert "no clear difference in mask AP50 (0.500 -> 0.500)" in report.verdict(metrics)
    assert "everyday" not in report.verdict(metrics)
    own["mask AP50"]["difference"]["interval"] = None
    assert "mask AP50 0.500 -> 0.500 (+0.000);" in report.verdict(metrics)
    own[report.ABSENT] = own["cgF1"] = figure(None, None, None)
    assert "undefined" not in report.verdict(metrics)


def test_categories_that_are_part_of_every_word_leave_none_to_ask(metrics) -> None:
    split, results = a_split(dict(enumerate("aeiou", start=1)))
    split = replace(split, prompts={})
    args = Namespace(report=Path("out"), probe_dir=None)
    more, strangers = evaluate_sam3_lora.choose_more(args, split, Config())
    assert strangers == [] and more["words"].categories == {}
    found = evaluate_sam3_lora.run_more(SimpleNamespace(masks=True), more, Config(), None)
    assert found == {"words": ({}, [])}
    summary = intervals.collect(split, results, 0.5, 100).summary(split)
    model = {"split": (summary, results), **found}
    made = report.build_report({"split": split, **more}, model, model, [], most=100, resamples=9)
    assert made["figures"][report.OUT_OF_DOMAIN]["adapter"] == {"value": None, "interval": None}
    page = Page(report.build_page({**metrics, "report": made}, {}))
    assert "0 words that no category is named after" in page.text


def test_numbers_are_never_a_negative_zero() -> None:
    assert report._number(-0.0001, signed=True) == "+0.000" and report._number(None) == "undefined"


def test_a_category_has_one_colour_in_panel_and_report(monkeypatch) -> None:
    split, _ = a_split({1: "a", 2: "b"})
    box = {**split.annotations[1][0], "segmentation": None}
    # The second image, which the panel draws first, has both; the report draws the first alone.
    split.annotations[1] = [{**box, "category_id": 2}]
    split.annotations[2] = [box, {**box, "category_id": 2, "bbox": [20, 20, 8, 8]}]
    monkeypatch.setattr(report, "read_image", lambda path: np.full((SIDE, SIDE, 3), 90, np.uint8))
    _, colors = evaluate_sam3_lora.draw_comparison(split, [], [], 0.5)
    assert colors == {1: 0, 2: 1}
    figures = {"F1": 0.0, "IoU": 0.0}
    row = {"image_id": 1, "file_name": "1.png", "base": figures, "adapter": figures}
    examples = report.draw_examples(split, [], [], [row], 0.5, colors)
    picture = examples["Best images"][0][1][0]
    drawn = [(picture == color).all(axis=-1).any() for color in PALETTE[:2]]
    assert drawn == [False, True]


def test_the_pictures_of_a_report_are_small(monkeypatch, metrics) -> None:
    split, results = a_split({1: "a", 2: "b"})
    noise = np.random.default_rng(0).integers(0, 256, (2000, 3000, 3), dtype=np.uint8)
    split.images[0] |= {"width": 3000, "height": 2000}
    monkeypatch.setattr(report, "read_image", lambda path: noise)
    results[0]["segmentation"] = split.annotations[1][0]["segmentation"] = None
    examples = report.draw_examples(split, [], results, metrics["report"]["per_image"], 0.5)
    assert [len(rows) for rows in examples.values()] == [1, 0]
    ((caption, pictures),) = examples["Best images"]
    assert caption.endswith("1.png: F1 0.000 → 1.000, IoU 0.000 → 1.000")
    assert all(picture.shape == (384, 576, 3) for picture in pictures)
    page = report.build_page(copy.deepcopy(metrics), examples)
    # Noise is the worst case of JPEG.
    assert len(page) < 3 * 250_000 and len(re.findall("data:image", page)) == 3
