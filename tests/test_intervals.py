"""Bootstrap over images against pycocotools on repeated images; thresholds chosen on a split."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sam3_lora import intervals
from sam3_lora.coco import CocoSplit, encode_mask

SIDE = 64  # of the images made here, pixels
MOST = 5  # detections of an image that AP reads
THRESHOLD = 0.5
NAMES = {4: "cat", 2: "dog", 9: "cow", 7: "unseen"}
GOLDEN = Path(__file__).parent / "golden"


def box_mask(box: list[float]) -> dict:
    """The RLE of a filled box (xywh)."""
    x, y, w, h = (round(v) for v in box)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[y : y + h, x : x + w] = True
    return encode_mask(mask)


def a_row(image_id: int, category_id: int, box: list[float], masks: bool, **more) -> dict:
    """An annotation or a detection."""
    mask = {"segmentation": box_mask(box) if masks else None}
    row = {"image_id": image_id, "category_id": category_id, "bbox": box, **mask, **more}
    return {k: v for k, v in row.items() if v is not None or "score" not in more}


def random_case(seed: int, images: int, masks: bool = True) -> tuple[CocoSplit, list[list[dict]]]:
    """A split with crowds and empty images, and the results of two models, of distinct scores."""
    rng = np.random.default_rng(seed)
    records = [
        {"id": 10 * i + 3, "file_name": f"{i}.png", "width": SIDE, "height": SIDE}
        for i in rng.permutation(images).tolist()
    ]
    annotations, models = {}, ([], [])
    for record in records:
        own = annotations[record["id"]] = []
        for _ in range(rng.integers(0, 5)):
            box = [*rng.integers(0, 30, 2).tolist(), *rng.integers(6, 30, 2).tolist()]
            crowd = int(rng.random() < 0.15)
            category = int(rng.choice([2, 4, 9]))
            row = a_row(
                record["id"], category, box, masks, iscrowd=crowd, area=float(box[2] * box[3])
            )
            own.append({**row, "id": 1})
            for results in models:
                near = (np.array(box) + rng.integers(-2, 3, 4)).clip(1).tolist()
                guess = category if rng.random() < 0.7 else 7
                results.append(a_row(record["id"], guess, near, masks, score=rng.random()))
        for results in models:
            box = [5, 5, int(rng.integers(5, 30)), 20]
            guess = int(rng.choice(list(NAMES)))
            results.append(a_row(record["id"], guess, box, masks, score=rng.random()))
    return CocoSplit(Path("a.json"), Path("."), records, annotations, NAMES, {}), list(models)


def summarise(split: CocoSplit, results: list[dict]) -> dict:
    return intervals.collect(split, results, THRESHOLD, MOST).summary(split)


def repeated(split: CocoSplit, results: list[dict], counts: list[int]) -> tuple:
    """The split and its results with each image as often as its count."""
    images, annotations, rows = [], {}, []
    for image, count in zip(split.images, counts, strict=True):
        for copy in range(count):
            new = image["id"] + 1000 * copy
            images.append({**image, "id": new})
            annotations[new] = split.annotations[image["id"]]
            rows += [{**r, "image_id": new} for r in results if r["image_id"] == image["id"]]
    return replace(split, images=images, annotations=annotations), rows


def main_figures(summary: dict) -> dict:
    """The summary's figures under the names of the comparison."""
    kinds = {"box": summary["bbox"], "mask": summary["segm"] or {}}
    return {
        **{f"{k} {m}": kinds[k].get(m) for k in kinds for m in ("AP", "AP50", "AP75")},
        **{name: summary["cgf1"][name] for name in ("cgF1", "pmF1", "IL_MCC")},
        "mask IoU": summary["mask_iou"],
        "box IoU": summary["box_iou"],
        "false positives on absent categories": summary["false_positive_rate"],
    }


def as_nan(values: dict) -> dict:
    return {name: np.nan if v is None else v for name, v in values.items()}


def compare(split: CocoSplit, models: list, weights: np.ndarray) -> dict:
    both = [(summarise(split, results), results) for results in models]
    return intervals.compare_models(split, *both, MOST, weights)


@pytest.mark.parametrize(("images", "masks"), [(25, True), (25, False), (1, True)])
def test_the_figures_are_those_of_the_summary(images, masks) -> None:
    split, models = random_case(images, images, masks)
    compared = compare(split, models, intervals.draw_weights(images, 0))
    for side, results in zip(("base", "adapter"), models, strict=True):
        summary = summarise(split, results)
        assert (summary["segm"] is not None) == masks
        found = {name: own[side]["value"] for name, own in compared["figures"].items()}
        expected = main_figures(summary)
        assert found.keys() == expected.keys()
        assert as_nan(found) == pytest.approx(as_nan(expected), abs=1e-12, nan_ok=True)
        assert {name for name in found if found[name] is None} == {
            name for name in expected if expected[name] is None
        }
        block = summary["segm"] or summary["bbox"]
        for own, entry in zip(compared["per_category"], block["per_category"], strict=True):
            assert {k: own[k] for k in ("category_id", "name", "prompt", "objects")} == {
                k: entry[k] for k in ("category_id", "name", "prompt", "objects")
            }
            for name in ("AP", "AP50"):
                values = as_nan({0: own[name][side]["value"], 1: entry[name]})
                assert values[0] == pytest.approx(values[1], abs=1e-12, nan_ok=True)
    json.dumps(compared, allow_nan=False)


@pytest.mark.parametrize("masks", [True, False])
def test_a_weight_counts_as_so_many_copies_of_the_image(masks) -> None:
    split, (results, _) = random_case(3, 15, masks)
    drawn = np.random.default_rng(0).integers(0, 4, (6, 15))
    drawn[5] = 0
    drawn[5, 4] = 3  # one image alone, so that categories are absent
    figures, categories, _ = intervals._measure(
        split, summarise(split, results), results, MOST, drawn.astype(float)
    )
    for k, counts in enumerate(drawn.tolist()):
        copies, rows = repeated(split, results, counts)
        summary = summarise(copies, rows)
        expected = as_nan(main_figures(summary))
        found = {name: values[k] for name, values in figures.items()}
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
        block = summary["segm"] or summary["bbox"]
        values = [np.nan if row["AP"] is None else row["AP"] for row in block["per_category"]]
        own = categories[:, :, k].mean(axis=1)
        assert own == pytest.approx(np.array(values), abs=1e-12, nan_ok=True)


def test_average_precision_does_not_depend_on_how_resamples_are_cut(monkeypatch) -> None:
    split, (results, _) = random_case(4, 12)
    weights = intervals.draw_weights(12, 50)
    matches = intervals.match_categories(split, results, "segm")
    whole = [intervals.average_precision(own, weights) for own in matches]
    monkeypatch.setattr(intervals, "CELLS_AT_ONCE", 7)
    cut = [intervals.average_precision(own, weights) for own in matches]
    assert np.array_equal(whole, cut, equal_nan=True)
    assert np.isnan(whole[list(NAMES).index(7)]).all()  # no object at all


def test_resamples_are_seeded_and_draw_as_many_images() -> None:
    weights = intervals.draw_weights(30, 200, seed=1)
    assert weights.shape == (201, 30) and (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 30).all() and weights[1:].std() == pytest.approx(1, abs=0.05)
    assert np.array_equal(weights, intervals.draw_weights(30, 200, seed=1))
    assert not np.array_equal(weights, intervals.draw_weights(30, 200, seed=2))
    # A single image says nothing about others.
    assert intervals.draw_weights(1, 200).shape == (1, 1)


def test_an_interval_covers_the_truth_and_a_pair_is_tighter() -> None:
    rng = np.random.default_rng(0)
    covered, images = 0, 60
    for seed in range(100):
        values = rng.random(images)
        weights = intervals.draw_weights(images, 400, seed)
        drawn = weights @ values / images
        low, high = intervals.interval(drawn)["interval"]
        covered += low <= 0.5 <= high
    assert 88 <= covered <= 99
    both = intervals.compare_values(drawn, weights @ (values + 0.01 * values) / images)
    spans = {name: np.diff(own["interval"])[0] for name, own in both.items()}
    assert spans["difference"] < spans["base"] / 50
    assert both["difference"]["interval"][0] > 0


def test_undefined_is_none() -> None:
    nan = np.nan
    assert intervals.interval(np.array([nan, 1.0])) == {"value": None, "interval": None}
    assert intervals.interval(np.array([0.5])) == {"value": 0.5, "interval": None}
    assert intervals.interval(np.array([0.5, nan])) == {"value": 0.5, "interval": None}
    assert intervals.interval(np.array([0.5, nan, 0.4]))["interval"] == [0.4, 0.4]


def test_the_golden_cgf1() -> None:
    truth = json.loads((GOLDEN / "cgf1_gt.json").read_text())
    predicted = json.loads((GOLDEN / "cgf1_pred.json").read_text())
    expected = json.loads((GOLDEN / "cgf1_expected.json").read_text())
    annotations: dict[int, list] = {image["id"]: [] for image in truth["images"]}
    for a in truth["annotations"]:
        annotations[a["image_id"]].append({**a, "segmentation": None})
    images = [{**image, "file_name": "x"} for image in truth["images"]]
    split = CocoSplit(Path("a.json"), Path("."), images, annotations, {1: "x"}, {})
    rows = [{k: v for k, v in p.items() if k != "segmentation"} for p in predicted]
    model = summarise(split, rows), rows
    weights = intervals.draw_weights(len(images), 0)
    figures = intervals.compare_models(split, model, model, 100, weights)["figures"]
    names = {"cgF1": "cgF1", "pmF1": "positive_micro_F1", "IL_MCC": "IL_MCC"}
    for name, theirs in names.items():
        value = figures[name]["adapter"]["value"]
        assert value == pytest.approx(expected[f"cgF1_eval_bbox_{theirs}"], abs=1e-6)
        assert figures[name]["difference"]["value"] == 0


def a_split(objects: dict[int, list[tuple]], names: dict[int, str]) -> CocoSplit:
    """Images with objects (category, box)."""
    images = [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in objects]
    annotations = {
        i: [
            {**a_row(i, c, box, True, iscrowd=0, area=1.0), "id": k}
            for k, (c, box) in enumerate(own)
        ]
        for i, own in objects.items()
    }
    return CocoSplit(Path("a.json"), Path("."), images, annotations, names, {})


BOX, OTHER = [0, 0, 20, 20], [30, 30, 20, 20]


def detection(image_id: int, category_id: int, score: float, box: list[float]) -> dict:
    return a_row(image_id, category_id, box, True, score=score)


def test_the_threshold_with_the_highest_f1() -> None:
    names = {1: "low", 2: "high", 3: "none", 4: "missed"}
    split = a_split({1: [(1, BOX), (1, OTHER), (2, BOX), (4, BOX)], 2: []}, names)
    results = [
        detection(1, 1, 0.3, BOX),
        detection(1, 1, 0.2, OTHER),  # two of two from 0.2 on
        detection(2, 1, 0.1, BOX),
        detection(1, 2, 0.9, BOX),
        detection(2, 2, 0.8, BOX),  # false, on an image without the category
        detection(2, 2, 0.6, OTHER),
        detection(1, 3, 0.9, BOX),
    ]
    chosen = intervals.calibrate(split, results, "segm", 0.5)
    rows = {row["name"]: row for row in chosen["per_category"]}
    assert {name: row["threshold"] for name, row in rows.items()} == {
        "low": pytest.approx(0.15), "high": pytest.approx(0.85), "none": 0.5, "missed": 0.5
    }  # fmt: skip
    before = {name: row["F1_before"] for name, row in rows.items()}
    assert before == {"low": 0, "high": pytest.approx(2 / 4), "none": 0, "missed": 0}
    assert [rows[name]["F1_after"] for name in names.values()] == [1, 1, 0, 0]
    assert [rows[name]["objects"] for name in names.values()] == [2, 1, 0, 1]
    assert all(row["few"] for row in rows.values())
    # Over all: one hit of 4 objects, 4 detections; then three, and four.
    assert chosen["F1_before"] == pytest.approx(2 / 8)
    assert chosen["F1_after"] == pytest.approx(6 / 8)
    stored = intervals.calibrate(split, results, "segm", 0.5, {"low": 0.25, "gone": 0.1})
    rows = {row["name"]: row for row in stored["per_category"]}
    assert [rows[name]["threshold"] for name in names.values()] == [0.25, 0.5, 0.5, 0.5]
    assert rows["low"]["F1_after"] == pytest.approx(2 / 3)


def test_equal_scores_are_kept_together() -> None:
    split = a_split({1: [(1, BOX)] * 1, 2: [(1, BOX)]}, {1: "x"})
    tied = [detection(1, 1, 0.4, BOX), detection(2, 1, 0.4, OTHER), detection(2, 1, 0.3, BOX)]
    (row,) = intervals.calibrate(split, tied, "segm", 0.5)["per_category"]
    # 0.4 keeps a false one with the hit: F1 1/2; 0.3 gives 4/5.
    assert (row["threshold"], row["F1_after"]) == (0.3, pytest.approx(0.8))


@pytest.mark.parametrize(("score", "expected"), [(0.9, 0.7), (0.5, 0.5), (0.4, 0.4)])
def test_a_threshold_keeps_nothing_that_was_not_measured(score, expected) -> None:
    # Of a crowded image, what is neither among the best nor of the default's score is not told.
    split = a_split({1: [(1, BOX), (1, OTHER)]}, {1: "x"})
    found = [detection(1, 1, 0.95, BOX), detection(1, 1, score, OTHER)]
    (row,) = intervals.calibrate(split, found, "segm", 0.5)["per_category"]
    assert (row["threshold"], row["F1_after"]) == (pytest.approx(expected), 1)


@pytest.mark.scripts
def test_no_threshold_is_better_than_the_chosen_one() -> None:
    split, (results, _) = random_case(8, 30)
    chosen = intervals.calibrate(split, results, "segm", 0.5)["per_category"]
    for value in np.linspace(0, 1, 21):
        every = dict.fromkeys(NAMES.values(), value)
        other = intervals.calibrate(split, results, "segm", 0.5, every)["per_category"]
        for own, theirs in zip(chosen, other, strict=True):
            if own["objects"]:
                assert own["F1_after"] >= theirs["F1_after"] - 1e-12
    assert not chosen[0]["few"] and chosen[3]["few"] and chosen[3]["threshold"] == 0.5


def test_words_that_should_find_nothing() -> None:
    names = {1: "harp", 2: "moose", 3: "person"}
    split = a_split({1: [], 2: [], 3: []}, names)
    base = [detection(1, 1, 0.9, BOX), detection(1, 1, 0.8, OTHER), detection(2, 2, 0.5, BOX)]
    adapter = [detection(1, 1, 0.49, BOX), detection(3, 3, 0.9, BOX), detection(3, 2, 0.9, BOX)]
    weights = intervals.draw_weights(3, 100)
    found = intervals.compare_words(split, base, adapter, ["moose", "harp"], 0.5, weights)
    assert found["words"] == {
        "moose": {"base": 1, "adapter": 1}, "harp": {"base": 1, "adapter": 0}
    }  # fmt: skip
    assert found["rate"]["base"]["value"] == pytest.approx(2 / 6)
    assert found["rate"]["difference"]["value"] == pytest.approx(-1 / 6)
    assert found["rate"]["base"]["interval"][0] == 0
    none = intervals.compare_words(split, base, adapter, [], 0.5, weights)
    assert none["rate"]["base"]["value"] is None


def test_agreement_with_the_base() -> None:
    split = a_split({1: [], 2: []}, {1: "tree", 2: "harp"})
    base = [detection(1, 1, 0.9, BOX), detection(1, 1, 0.9, OTHER), detection(2, 1, 0.4, BOX)]
    near = [0, 0, 20, 12]  # IoU 0.6
    adapter = [detection(1, 1, 0.6, near), detection(2, 1, 0.9, BOX), detection(2, 2, 0.9, BOX)]
    weights = intervals.draw_weights(2, 100)
    found = intervals.compare_agreement(split, base, adapter, ["tree"], 0.5, weights)
    assert (found["base"], found["found"], found["new"]) == (2, 1, 1)
    assert found["kept"]["value"] == 0.5
    assert found["words"] == {"tree": {"base": 2, "found": 1, "new": 1}}
    nothing = intervals.compare_agreement(split, [], adapter, ["tree"], 0.5, weights)
    assert nothing["kept"] == {"value": None, "interval": None} and nothing["new"] == 2


def test_best_and_worst_images() -> None:
    def row(image_id, f1, iou=None):
        return {"image_id": image_id, "adapter": {"F1": f1, "IoU": iou}}

    rows = [row(1, 0.5, 0.5), row(2, None), row(3, 1.0, 0.8), row(4, 0.0), row(5, 1.0, 0.9)]
    assert intervals.rank_images(rows, 4) == ([5, 3], [4, 1])
    assert intervals.rank_images(rows, 1) == ([5], [4])
    assert intervals.rank_images(rows[:2], 4) == ([1], [])
    assert intervals.rank_images(rows[1:2], 4) == ([], [])


def test_what_is_made_of_each_image() -> None:
    split = a_split({1: [(1, BOX), (1, OTHER)], 2: [], 3: []}, {1: "x"})
    results = [detection(1, 1, 0.9, BOX), detection(1, 1, 0.4, OTHER), detection(3, 1, 0.9, BOX)]
    compared = compare(split, [results, []], intervals.draw_weights(3, 0))
    rows = {row["image_id"]: row for row in compared["per_image"]}
    assert rows[1]["base"] == {"F1": pytest.approx(2 / 3), "IoU": 0.5}
    assert rows[1]["adapter"] == {"F1": 0, "IoU": 0}
    assert rows[2]["base"] == {"F1": None, "IoU": None}
    assert rows[3]["base"] == {"F1": 0, "IoU": None}
    assert Counter(row["file_name"] for row in compared["per_image"])["3.png"] == 1


def test_where_no_threshold_helps_the_default_stays() -> None:
    split = a_split({1: [(1, BOX)], 2: []}, {1: "cell"})
    noise = [detection(2, 1, 0.4, OTHER) for _ in range(30)]
    hit = detection(1, 1, 0.1, BOX)  # F1 2 / 32 with all that scores more
    (row,) = intervals.calibrate(split, [*noise, hit], "segm", 0.5)["per_category"]
    assert row["threshold"] == 0.5
    (row,) = intervals.calibrate(split, [*noise[:10], hit], "segm", 0.5)["per_category"]
    assert row["threshold"] == pytest.approx(0.1) and row["F1_after"] == pytest.approx(2 / 12)
