"""Metrics against the official evaluator's figures, plain pycocotools, and hand-made cases."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3_lora.coco import CocoSplit, encode_mask
from sam3_lora.metrics import (
    DetectionAccumulator,
    box_iou,
    cgf1,
    coco_ap,
    coco_results,
    mean_object_iou,
    select_detections,
)
from sam3_lora.tables import format_summary

GOLDEN = Path(__file__).parent / "golden"
SIDE = 100  # of the images made here, pixels
NONE = np.zeros((0, 0))  # a negative pair without detections
LIMITS = {"score_threshold": 0.5, "max_detections": 100}


def split_of(annotations: dict[int, list[dict]], categories: dict[int, str]) -> CocoSplit:
    """A split of SIDE x SIDE images with these annotations."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in annotations
    ]
    return CocoSplit(Path("a.json"), Path("."), images, annotations, categories, {"dog": "a dog"})


def an_object(number, category_id, box, mask=True, crowd=0):
    """An annotation; its mask fills its box."""
    x, y, w, h = box
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {
        "id": number,
        "category_id": category_id,
        "bbox": [float(v) for v in box],
        "segmentation": polygon if mask else None,
        "iscrowd": crowd,
        "area": float(w * h),
    }


def found(*rows):
    """Detections from (category_id, score, [x, y, w, h]); their masks are filled boxes."""
    boxes = np.array([box for _, _, box in rows], dtype=np.float64).reshape(-1, 4)
    rles = []
    for x, y, w, h in boxes.astype(int):
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        mask[y : y + h, x : x + w] = True
        rles.append(encode_mask(mask))
    boxes[:, 2:] += boxes[:, :2]
    return {
        "category_id": np.array([c for c, _, _ in rows], dtype=np.int64),
        "score": np.array([s for _, s, _ in rows], dtype=np.float64),
        "boxes_xyxy": boxes,
        "rles": rles,
    }


def summary_of(split, images, **options):
    """The summary when each image of `images` {id: detections} was added."""
    accumulator = DetectionAccumulator(**LIMITS | options)
    for image_id, image in images.items():
        accumulator.add_image(image_id, image)
    return accumulator.summary(split)


def two_images() -> CocoSplit:
    """Image 1: two dogs and a cat. Image 2: nothing. No image has a cow."""
    objects = [
        an_object(1, 1, [10, 10, 20, 20]),
        an_object(2, 1, [60, 60, 20, 20]),
        an_object(3, 2, [10, 60, 30, 20]),
    ]
    return split_of({1: objects, 2: []}, {1: "dog", 2: "cat", 3: "cow"})


PERFECT = ((1, 0.9, [10, 10, 20, 20]), (1, 0.8, [60, 60, 20, 20]), (2, 0.7, [10, 60, 30, 20]))


def golden_ious() -> list[np.ndarray]:
    """The golden pairs: one an image, since the file has one category."""
    truth = json.loads((GOLDEN / "cgf1_gt.json").read_text())
    predicted = json.loads((GOLDEN / "cgf1_pred.json").read_text())

    def corners(rows, image_id):
        boxes = [r["bbox"] for r in rows if r["image_id"] == image_id and r.get("score", 1) >= 0.5]
        boxes = np.array(boxes).reshape(-1, 4)
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)

    return [
        box_iou(corners(predicted, i["id"]), corners(truth["annotations"], i["id"]))
        for i in truth["images"]
    ]


EXPECTED = json.loads((GOLDEN / "cgf1_expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_cgf1_is_the_official_evaluators(name):
    figure = cgf1(golden_ious())[name.removeprefix("cgF1_eval_bbox_")]
    assert figure == pytest.approx(EXPECTED[name], abs=1e-6)


def test_accumulator_gives_the_golden_cgf1_too():
    truth = json.loads((GOLDEN / "cgf1_gt.json").read_text())
    predicted = json.loads((GOLDEN / "cgf1_pred.json").read_text())
    of_image = {i["id"]: [] for i in truth["images"]}
    for a in truth["annotations"]:
        of_image[a["image_id"]].append({**a, "segmentation": None})
    split = split_of(of_image, {1: "x"})
    images = {
        i: found(*((1, p["score"], p["bbox"]) for p in predicted if p["image_id"] == i))
        for i in of_image
    }
    summary = summary_of(split, {i: {**image, "rles": None} for i, image in images.items()})
    assert summary["cgf1"]["iou_type"] == "bbox"
    assert summary["segm"] is None and summary["mask_iou"] is None
    for name, value in EXPECTED.items():
        figure = summary["cgf1"][name.removeprefix("cgF1_eval_bbox_")]
        assert figure == pytest.approx(value, abs=1e-6), name
    assert summary["cgf1"]["pmF1"] == summary["cgf1"]["positive_micro_F1"]
    assert summary["false_positive_rate"] == pytest.approx(1 / 23)  # IL_FPR without its eps


def test_cgf1_without_negatives_is_undefined_but_pmf1_is_not():
    figures = cgf1([np.array([[1.0]])])
    assert figures["pmF1"] == pytest.approx(1.0, abs=1e-3)
    undefined = {name for name, value in figures.items() if value is None}
    assert undefined == {"cgF1", "cgF1@0.5", "cgF1@0.75", "IL_MCC", "IL_FPR"}
    assert (figures["positive_pairs"], figures["negative_pairs"]) == (1, 0)


@pytest.mark.parametrize("pairs", [[NONE, np.zeros((2, 0))], []])
def test_cgf1_without_positives_is_undefined(pairs):
    figures = cgf1(pairs)
    assert figures["cgF1"] is figures["pmF1"] is figures["IL_MCC"] is None
    assert figures["IL_FPR"] == (pytest.approx(0.5) if pairs else None)


def test_cgf1_of_missed_positives_is_zero():
    figures = cgf1([np.zeros((0, 3)), NONE])
    assert figures["cgF1"] == figures["pmF1"] == figures["positive_macro_F1"] == 0.0


def test_matching_maximises_the_total_iou():
    # Greedy would take 0.9 and leave 0: the best total is 0.8 + 0.7.
    iou = np.array([[0.9, 0.8], [0.7, 0.0]])
    assert mean_object_iou([iou]) == pytest.approx(0.75)
    assert mean_object_iou([iou, np.zeros((0, 2))]) == pytest.approx(0.375)
    assert mean_object_iou([NONE]) is None


def test_box_iou_by_hand():
    a = np.array([[0.0, 0, 10, 10], [5, 5, 5, 5]])
    b = np.array([[5.0, 0, 15, 10], [20, 20, 30, 30]])
    assert box_iou(a, b) == pytest.approx(np.array([[1 / 3, 0], [0, 0]]))
    assert box_iou(a, a)[1, 1] == 0.0


def test_perfect_predictions():
    summary = summary_of(two_images(), {1: found(*PERFECT), 2: found()})
    for kind in ("bbox", "segm"):
        assert [summary[kind][m] for m in ("AP", "AP50", "AP75")] == pytest.approx([1, 1, 1])
        assert [c["AP"] for c in summary[kind]["per_category"]] == pytest.approx([1, 1, None])
    assert summary["cgf1"]["iou_type"] == "segm"
    assert summary["cgf1"]["cgF1"] == pytest.approx(1, abs=1e-3)
    assert summary["mask_iou"] == summary["box_iou"] == pytest.approx(1)
    assert summary["false_positive_rate"] == 0
    assert summary["counts"] == {
        "images": 2,
        "objects": 3,
        "objects_with_mask": 3,
        "detections": 3,
        "absent_pairs": 4,
        "false_positive_pairs": 0,
    }
    json.dumps(summary)


def test_no_detections():
    summary = summary_of(two_images(), {1: found(), 2: found()})
    for kind in ("bbox", "segm"):
        assert [summary[kind][m] for m in ("AP", "AP50", "AP75")] == [0, 0, 0]
        assert [c["AP50"] for c in summary[kind]["per_category"]] == [0, 0, None]
    assert summary["cgf1"]["cgF1"] == summary["mask_iou"] == summary["box_iou"] == 0
    assert summary["false_positive_rate"] == 0


def test_no_objects_at_all():
    split = split_of({1: [], 2: []}, {1: "dog"})
    summary = summary_of(split, {1: found((1, 0.9, [0, 0, 5, 5])), 2: found()})
    assert summary["bbox"]["AP"] is None and summary["segm"] is None
    assert summary["cgf1"]["cgF1"] is None and summary["box_iou"] is None
    assert summary["false_positive_rate"] == 0.5
    assert format_summary(summary).splitlines()[-1] == "undefined: no image has an object"


def test_what_a_split_lacks_is_told_under_its_table():
    split = split_of({1: [an_object(1, 1, [0, 0, 20, 20])]}, {1: "dog"})
    lines = format_summary(summary_of(split, {1: found()})).splitlines()
    assert sum("undefined" in line for line in lines) == 5  # cgF1 twice, IL_MCC, the rate, why
    why = "no image lacks a category: keep images without the object to measure false alarms"
    assert lines[-1] == f"undefined: {why}"
    assert "undefined:" not in format_summary(summary_of(two_images(), {1: found(), 2: found()}))


def test_no_categories():
    summary = summary_of(split_of({1: []}, {}), {1: found()})
    assert summary["bbox"]["per_category"] == [] and summary["false_positive_rate"] is None
    assert "all" in format_summary(summary)


def test_ap_by_hand():
    # Ranked hit, miss, hit with 2 objects: precision 1 up to recall 0.5, then 2/3. COCO reads
    # it at 101 recalls: 51 of them up to 0.5. The second hit has IoU 0.64: only 0.5, 0.55, 0.6.
    objects = [an_object(1, 1, [0, 0, 20, 20]), an_object(2, 1, [50, 50, 20, 25])]
    split = split_of({1: objects}, {1: "dog"})
    detections = found(
        (1, 0.9, [0, 0, 20, 20]), (1, 0.8, [0, 70, 9, 9]), (1, 0.7, [50, 50, 20, 16])
    )
    both, first = (51 + 50 * 2 / 3) / 101, 51 / 101
    ap = coco_ap(split, coco_results(1, detections), "bbox")
    assert ap["AP50"] == pytest.approx(both)
    assert ap["AP75"] == pytest.approx(first)
    assert ap["AP"] == pytest.approx((3 * both + 7 * first) / 10)


def random_case(seed: int):
    """A split with crowds and a category without objects, and noisy detections."""
    rng = np.random.default_rng(seed)
    annotations, images, number = {}, {}, 0
    for image_id in range(1, 9):
        objects, rows = [], []
        for _ in range(rng.integers(0, 6)):
            number += 1
            x, y, w, h = (int(v) for v in rng.integers([0, 0, 8, 8], [60, 60, 40, 40]))
            category_id = int(rng.integers(1, 4))
            crowd = int(rng.random() < 0.2)
            objects.append(an_object(number, category_id, [x, y, w, h], crowd=crowd))
            for _ in range(2):
                box = np.maximum([x, y, w, h] + rng.integers(-3, 4, 4), [0, 0, 1, 1])
                rows.append((category_id, float(rng.random()), box))
        annotations[image_id] = objects
        images[image_id] = found(*rows, (4, float(rng.random()), [5, 5, 9, 9]))
    return split_of(annotations, {4: "cow", 1: "dog", 2: "cat", 3: "hen"}), images


def plain_pycocotools(split, results, kind, folder):
    """COCOeval's own stats from files, as anyone would run it."""
    annotations = [
        {**a, "image_id": i} for i, objects in split.annotations.items() for a in objects
    ]
    categories = [{"id": i, "name": name} for i, name in split.categories.items()]
    payload = {"images": split.images, "annotations": annotations, "categories": categories}
    (folder / "gt.json").write_text(json.dumps({**payload, "info": {}}))
    keys = {"image_id", "category_id", "score", "segmentation" if kind == "segm" else "bbox"}
    rows = [{k: r[k] for k in keys} for r in results]
    (folder / "dt.json").write_text(json.dumps(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "gt.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / "dt.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ap_is_that_of_plain_pycocotools(seed, kind, tmp_path, capsys):
    split, images = random_case(seed)
    accumulator = DetectionAccumulator(**LIMITS)
    for image_id, image in images.items():
        accumulator.add_image(image_id, image)
    ap = accumulator.summary(split)[kind]
    assert capsys.readouterr().out == ""
    evaluation = plain_pycocotools(split, accumulator.results(), kind, tmp_path)
    assert 0.2 < ap["AP"] < 0.9
    assert [ap[m] for m in ("AP", "AP50", "AP75")] == pytest.approx(list(evaluation.stats[:3]))
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    for category in ap["per_category"]:
        column = precision[:, :, sorted(split.categories).index(category["category_id"])]
        defined = column[column > -1]
        assert category["AP"] == (pytest.approx(defined.mean()) if defined.size else None)
    assert [c["name"] for c in ap["per_category"]] == ["cow", "dog", "cat", "hen"]


def test_annotation_id_0_is_found():
    split = split_of({1: [an_object(0, 1, [10, 10, 20, 20])]}, {1: "dog"})
    detections = found((1, 0.9, [10, 10, 20, 20]))
    assert coco_ap(split, coco_results(1, detections), "bbox")["AP"] == pytest.approx(1)


def test_a_crowd_is_neither_found_nor_missed():
    objects = [an_object(1, 1, [10, 10, 20, 20]), an_object(2, 1, [50, 50, 40, 40], crowd=1)]
    split = split_of({1: objects, 2: []}, {1: "dog"})
    image = found((1, 0.9, [10, 10, 20, 20]), (1, 0.95, [55, 55, 10, 10]))
    summary = summary_of(split, {1: image, 2: found()})
    assert [summary[kind]["AP"] for kind in ("bbox", "segm")] == pytest.approx([1, 1])
    assert summary["counts"]["objects"] == summary["bbox"]["per_category"][0]["objects"] == 1
    assert summary["box_iou"] == pytest.approx(1)
    # In cgF1 the detection on the crowd counts as false: precision 1/2, recall 1.
    assert summary["cgf1"]["pmF1"] == pytest.approx(2 / 3, abs=1e-3)


def test_a_crowd_alone_is_a_negative_pair_but_no_absent_prompt():
    split = split_of({1: [an_object(1, 1, [50, 50, 40, 40], crowd=1)]}, {1: "dog"})
    summary = summary_of(split, {1: found((1, 0.9, [50, 50, 40, 40]))})
    assert summary["cgf1"]["negative_pairs"] == 1
    assert summary["false_positive_rate"] is None


def test_an_object_without_mask_is_ignored_on_masks_only():
    objects = [an_object(1, 1, [10, 10, 20, 20]), an_object(2, 1, [60, 60, 20, 20], mask=False)]
    image = found((1, 0.9, [10, 10, 20, 20]), (1, 0.8, [60, 60, 20, 20]))
    summary = summary_of(split_of({1: objects, 2: []}, {1: "dog"}), {1: image, 2: found()})
    assert [summary[kind]["AP"] for kind in ("bbox", "segm")] == pytest.approx([1, 1])
    assert summary["cgf1"]["iou_type"] == "bbox"
    assert summary["counts"]["objects_with_mask"] == 1
    assert summary["mask_iou"] == pytest.approx(1)


def test_mask_and_box_iou_count_the_missed():
    # Dog 1: half covered. Dog 2: below the threshold. Cat: found.
    image = found((1, 0.9, [10, 10, 20, 10]), (1, 0.4, [60, 60, 20, 20]), PERFECT[2])
    summary = summary_of(two_images(), {1: image, 2: found()})
    assert summary["mask_iou"] == summary["box_iou"] == pytest.approx((0.5 + 0 + 1) / 3)
    lower = summary_of(two_images(), {1: image, 2: found()}, score_threshold=0.3)
    assert lower["mask_iou"] == pytest.approx((0.5 + 1 + 1) / 3)


def test_false_positive_rate_by_hand():
    # Absent pairs: cow on image 1, all three on image 2.
    absent = found((1, 0.5, [0, 0, 9, 9]), (1, 0.9, [0, 0, 9, 9]), (2, 0.49, [0, 0, 9, 9]))
    summary = summary_of(two_images(), {1: found(*PERFECT), 2: absent})
    assert summary["false_positive_rate"] == pytest.approx(1 / 4)
    assert summary["counts"]["absent_pairs"] == 4


def test_ap_reads_an_images_best_and_the_others_all_that_score():
    # In this order, so that the limit must look at the scores. AP reads the two dogs alone.
    image = found(PERFECT[2], *PERFECT[:2], (3, 0.6, [0, 0, 9, 9]))
    summary = summary_of(two_images(), {1: image, 2: found()}, max_detections=2)
    for kind in ("bbox", "segm"):
        assert [c["AP"] for c in summary[kind]["per_category"]] == pytest.approx([1, 0, None])
    assert summary["mask_iou"] == summary["box_iou"] == pytest.approx(1)
    assert summary["cgf1"]["IL_recall"] == pytest.approx(1)
    assert summary["cgf1"]["IL_FPR"] == pytest.approx(1 / 4)
    assert summary["false_positive_rate"] == 1 / 4 and summary["counts"]["detections"] == 4


def test_without_predicted_masks_there_are_box_metrics_only():
    summary = summary_of(two_images(), {1: {**found(*PERFECT), "rles": None}, 2: found()})
    assert summary["segm"] is None and summary["mask_iou"] is None
    assert summary["cgf1"]["iou_type"] == "bbox" and summary["box_iou"] == pytest.approx(1)


def test_a_cut_split_sums_up_its_images_only():
    split = two_images()
    cut = replace(split, images=split.images[:1])
    summary = summary_of(cut, {1: found(*PERFECT)})
    assert summary["counts"]["images"] == 1 and summary["counts"]["absent_pairs"] == 1
    with pytest.raises(ValueError, match=r"2 images, found 1 \(see id 2\)"):
        summary_of(split, {1: found(*PERFECT)})


def test_what_would_be_silently_wrong_is_refused():
    split = two_images()
    with pytest.raises(ValueError, match="image 2: no category 7"):
        summary_of(split, {1: found(), 2: found((7, 0.9, [0, 0, 5, 5]))})
    detections = found((1, 0.9, [0, 0, 5, 5]))
    small = [encode_mask(np.ones((50, 50), dtype=bool))]
    with pytest.raises(ValueError, match=r"expected a mask of \(H, W\) \[100, 100\], found"):
        summary_of(split, {1: {**detections, "rles": small}, 2: found()})
    accumulator = DetectionAccumulator(**LIMITS)
    accumulator.add_image(1, detections)
    with pytest.raises(ValueError, match="image 1 was added before"):
        accumulator.add_image(1, detections)
    with pytest.raises(ValueError, match="expected 1 masks, found 0"):
        accumulator.add_image(2, {**detections, "rles": []})


def test_score_is_the_product_and_boxes_are_the_photos():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 3.0]])
    presence = torch.tensor([1.0, -1.0])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4]] * 2, [[0.1, 0.1, 0.4, 0.1]] * 2])
    result = select_detections(logits, presence, boxes, [7, 9], (50, 200), 100, 0.5)
    product = (logits.sigmoid() * presence.sigmoid()[:, None]).double().numpy()
    order = np.argsort(-product.ravel())
    assert result["score"] == pytest.approx(product.ravel()[order], rel=1e-5)
    assert result["row"].tolist() == (order // 2).tolist()
    assert result["query"].tolist() == (order % 2).tolist()
    assert result["category_id"].tolist() == [[7, 9][k // 2] for k in order]
    assert result["boxes_xyxy"][0] == pytest.approx([80, 15, 120, 35])
    of_9 = result["boxes_xyxy"][result["category_id"] == 9]
    assert of_9[0] == pytest.approx([-20, 2.5, 60, 7.5])  # not clipped


def test_selection_is_of_the_best_and_of_all_that_score():
    rng = np.random.default_rng(0)
    logits, boxes = rng.normal(size=(3, 60)), rng.random((3, 60, 4))
    given = logits, np.full(3, 5.0), boxes, [2, 3, 4], (10, 10)
    hundred = select_detections(*given, 100, 1.0)
    assert len(hundred["score"]) == 100 and set(hundred["category_id"]) == {2, 3, 4}
    assert (np.diff(hundred["score"]) <= 0).all()
    five = select_detections(*given, 5, 1.0)
    assert five["score"].tolist() == hundred["score"][:5].tolist()
    count = (hundred["score"] >= 0.5).sum()
    assert 5 < count < 100
    for most, threshold, expected in ((5, 0.5, count), (100, 0.5, 100), (5, 0.0, 180)):
        assert len(select_detections(*given, most, threshold)["score"]) == expected
    exact = float(hundred["score"][20])
    assert len(select_detections(*given, 5, exact)["score"]) == 21


def test_selection_without_a_prompt():
    given = np.zeros((0, 3)), np.zeros(0), np.zeros((0, 3, 4)), [], (4, 5)
    result = select_detections(*given, 100, 0.5)
    assert result["boxes_xyxy"].shape == (0, 4) and len(result["score"]) == 0


def test_scores_of_low_logits_keep_their_order_and_bf16_is_read():
    logits = torch.tensor([[-60.0, -50.0, -100.0]], dtype=torch.bfloat16)
    result = select_detections(logits, torch.zeros(1), torch.zeros(1, 3, 4), [1], (9, 9), 100, 0.5)
    assert result["query"].tolist() == [1, 0, 2] and result["score"].min() > 0


def test_results_are_coco_results():
    detections = found((1, 0.75, [10, 20, 30, 40]))
    expected = {"image_id": 5, "category_id": 1, "bbox": [10, 20, 30, 40], "score": 0.75}
    assert coco_results(5, {**detections, "rles": None}) == [expected]
    masked = coco_results(5, detections)
    assert masked == [{**expected, "segmentation": detections["rles"][0]}]
    json.dumps(coco_results(np.int64(5), detections))


def test_table_names_prompts_and_says_undefined():
    table = format_summary(summary_of(two_images(), {1: found(*PERFECT), 2: found()}))
    lines = table.splitlines()
    header = " ".join(lines[0].split())
    assert header == "prompt objects box AP box AP50 mask AP mask AP50"
    assert lines[1].split() == ["a", "dog", "2", "1.000", "1.000", "1.000", "1.000"]
    assert lines[3].split() == ["cow", "0", *["undefined"] * 4]
    assert lines[4].split() == ["all", "3", "1.000", "1.000", "1.000", "1.000"]
    assert "on masks; 2 positive and 4 negative pairs" in table
    assert "0 of 4 absent prompts fired" in table
    assert len({len(line) for line in lines[:5]}) == 1


@pytest.mark.parametrize(("empty", "rows"), [(10, 13), (11, 4)])
def test_table_counts_many_categories_without_an_object(empty, rows):
    categories = {1: "dog", **{i: f"thing {i}" for i in range(2, 2 + empty)}}
    split = split_of({1: [an_object(1, 1, [0, 0, 20, 20])]}, categories)
    lines = format_summary(summary_of(split, {1: found()})).splitlines()
    assert lines.index("") == rows  # header, categories, all, the count
    assert ("11 categories without an object: not listed" in lines) == (empty > 10)
