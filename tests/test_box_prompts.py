"""Boxes as prompts: how they are drawn, where they lie, and what comes of them in both scripts."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate_sam3_lora
import train_sam3_lora
from sam3_lora.coco import CocoSplit
from sam3_lora.dataset import PromptDataset
from sam3_lora.features import cacheable_parts
from sam3_lora.forward import PADDING_BOX, VISUAL_PROMPT, Forward
from sam3_lora.geometry import box_apart, jitter_box
from sam3_lora.loader import build_loader, collate_fn

ROOT = Path(__file__).resolve().parent.parent
SIZE, QUERIES = 112, 16
WIDTH, HEIGHT = 504, 252
MOST = 20 / 1008  # the most a side moves, of the photo's
PRESENT, CROWDED, ABSENT = 1, 2, 3
# Of PRESENT three objects, of CROWDED one and a crowd.
BOXES = [(20, 20, 100, 60), (200, 30, 40, 50), (60, 150, 30, 30)]
OBJECTS = [(PRESENT, box, 0) for box in BOXES]
OBJECTS += [(CROWDED, (400, 20, 60, 60), 0), (CROWDED, (300, 130, 204, 122), 1)]


def make_set(objects=OBJECTS, *, train=True, images=1, queries=QUERIES, **options):
    """A set of equal photos that are not read; every present prompt comes with a box."""
    rows = [
        {"id": k, "category_id": c, "bbox": [float(v) for v in box], "iscrowd": crowd}
        for k, (c, box, crowd) in enumerate(objects, 1)
    ]
    records = [
        {"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(images)
    ]
    annotations = {
        n: [{**row, "segmentation": [], "image_id": n} for row in rows] for n in range(images)
    }
    names = {PRESENT: "dog", CROWDED: "cat", ABSENT: "cow"}
    split = CocoSplit(Path(), Path(), records, annotations, names, {})
    options = {"box_prompt_probability": 1.0, **options}
    dataset = PromptDataset(split, SIZE, queries, train=train, **options)
    dataset.parts = ("targets",)
    return dataset


def items_of(dataset, epochs=40):
    return [dataset[epoch, index] for epoch in range(epochs) for index in range(len(dataset))]


def corners(boxes):
    """cxcywh to xyxy."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate(
        [boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1
    )


def prompts_of(items):
    """(category, text, target, positive boxes, negative boxes) of every prompt; xyxy."""
    for item in items:
        columns = (item[k] for k in ("category_ids", "texts", "targets", "box_prompts"))
        for category, text, target, drawn in zip(*columns, strict=True):
            boxes = [corners([box for sign, box in drawn if sign == label]) for label in (1, 0)]
            yield category, text, corners(target["boxes_cxcywh"]), *boxes


def touching(box, others):
    """Which of `others` (xyxy) share an area with a box, roundings apart."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    return (high - low > 1e-6).all(axis=1)


# A box as a hand draws it -------------------------------------------------------------------------


def test_a_drawn_box_stays_near_and_inside():
    size, boxes = (HEIGHT, WIDTH), [(0, 0, WIDTH, HEIGHT), (200, 30, 40, 50), (495, 240, 9, 12)]
    for box in boxes:
        rng = np.random.default_rng(0)
        drawn = np.array([jitter_box(box, size, rng) for _ in range(500)])
        assert (drawn[:, 2:] > 0).all() and (drawn[:, :2] >= 0).all()
        assert (drawn[:, :2] + drawn[:, 2:] <= [WIDTH + 1e-9, HEIGHT + 1e-9]).all()
        moved = np.concatenate([drawn[:, :2], drawn[:, :2] + drawn[:, 2:]], axis=1)
        moved -= [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        assert (abs(moved) <= np.array([WIDTH, HEIGHT] * 2) * MOST + 1e-9).all()
        rng = np.random.default_rng(0)
        assert drawn[0].tolist() == jitter_box(box, size, rng)
    # The side of the second is moved by a tenth of its length, where neither limit is met.
    shares = [jitter_box((200, 30, 40, 50), (10000, 10000), rng)[0] / 40 - 5 for _ in range(2000)]
    assert np.std(shares) == pytest.approx(0.1, rel=0.1)


def test_a_box_of_which_nothing_would_be_left_is_not_moved():
    class Extreme:
        def standard_normal(self, count):
            return np.array([40.0, 0.0, -40.0, 0.0])

    assert jitter_box([100.0, 50.0, 8.0, 8.0], (HEIGHT, WIDTH), Extreme()) == [100, 50, 8, 8]


def test_a_box_apart():
    rng, size = np.random.default_rng(0), (HEIGHT, WIDTH)
    taken = [[0.0, 0.0, 250.0, 252.0]]
    for _ in range(50):
        other = box_apart(taken, [[100, 10, 300, 30], [400, 100, 50, 50]], (60, 60), size, rng)
        assert np.allclose(other, [400, 100, 50, 50], atol=2 * MOST * WIDTH)
        place = box_apart(taken, [[100, 10, 300, 30]], (60, 60), size, rng)
        assert place[2:] == [60, 60] and 250 <= place[0] <= WIDTH - 60
    assert box_apart([[0.0, 0.0, 504.0, 252.0]], [], (60, 60), size, rng) is None


# Prompts of an item -------------------------------------------------------------------------------


def test_an_exemplar_is_an_object_of_its_prompt_on_the_canvas():
    dataset = make_set(flip_probability=0.5, prompts_per_image=6)
    chosen, places = Counter(), set()
    for epoch in range(40):
        side, left, top, flip = dataset._place(np.random.default_rng((0, epoch, 0)))
        places.add(flip)
        most = MOST * side / SIZE + 1e-6
        for category, _, objects, positive, negative in prompts_of([dataset[epoch, 0]]):
            assert len(negative) == 0
            if category not in (PRESENT, CROWDED):
                assert len(objects) == len(positive) == 0
                continue
            (box,) = positive
            off = abs(objects - box).max(axis=1)
            assert off.min() <= most and (objects.shape[0] == 1 or np.sort(off)[1] > most)
            assert (box[:2] * SIZE >= [left - 1e-4, top - 1e-4]).all()
            assert (box[2:] * SIZE <= [left + side + 1e-4, top + side + 1e-4]).all()
            chosen[category, int(off.argmin())] += 1
    # Each object was an exemplar, the crowd, which is no target, never.
    assert set(chosen) == {(PRESENT, 0), (PRESENT, 1), (PRESENT, 2), (CROWDED, 0)}
    assert places == {False, True}


@pytest.mark.parametrize("queries", [QUERIES, 2])
def test_a_negative_box_touches_no_object_of_its_prompt(queries):
    """Also where the photo is cut into tiles, on which nothing lies where it lies on the photo."""
    dataset = make_set(
        box_prompt_negative_probability=0.8, queries=queries, over_queries="tile", augment=False
    )
    assert (len(dataset) > 1) == (queries == 2)
    drawn, on_other = Counter(), 0
    for item in items_of(dataset):
        every = list(prompts_of([item]))
        for category, _, objects, positive, negative in every:
            drawn[len(positive), len(negative)] += 1
            others = np.concatenate([row[2] for row in every if row[0] != category])
            for box in negative:
                assert not touching(box, objects).any()
                on_other += touching(box, others).any()
    assert set(drawn) == {(0, 0), (1, 0), (1, 1)} and drawn[1, 1] > 2 * drawn[1, 0]
    assert on_other > 10


def test_a_negative_box_keeps_off_crowds_and_lies_on_the_background_where_there_is_no_other():
    only = [row for row in OBJECTS if row[0] == CROWDED]
    dataset = make_set(only, box_prompt_negative_probability=1.0, augment=False)
    crowd = corners([[402 / 504, 191 / 252, 204 / 504, 122 / 252]])
    found = [box for *_, negative in prompts_of(items_of(dataset)) for box in negative]
    assert len(found) == 40
    assert not any(touching(box, crowd).any() for box in found)
    # As large as the exemplar's object.
    assert np.allclose([box[2:] - box[:2] for box in found], [60 / WIDTH, 60 / HEIGHT], atol=1e-6)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, {True}), (1.0, {False}), (0.5, {True, False})]
)
def test_the_text_stays_or_gives_way(share, expected):
    dataset = make_set(box_prompt_text_probability=share)
    plain = make_set(box_prompt_probability=0.0)
    replaced = set()
    for item, own in zip(items_of(dataset), items_of(plain), strict=True):
        assert item["category_ids"] == own["category_ids"]
        for text, usual, boxes in zip(
            item["texts"], own["texts"], item["box_prompts"], strict=True
        ):
            assert text in ((usual, VISUAL_PROMPT) if boxes else (usual,))
            replaced |= {text == VISUAL_PROMPT} if boxes else set()
    assert replaced == expected
    assert VISUAL_PROMPT in dataset.all_texts() and VISUAL_PROMPT not in plain.all_texts()


def test_words_that_are_never_asked_for_alone_are_told(caplog):
    for share, told in ((1.0, 1), (0.9, 0)):
        caplog.clear()
        make_set(box_prompt_probability=share)
        assert caplog.text.count("words alone") == told


def test_boxes_change_no_other_draw():
    options = {"flip_probability": 0.5, "images": 2, "box_prompt_text_probability": 1.0}
    with_boxes = items_of(make_set(box_prompt_negative_probability=0.5, **options))
    without = items_of(make_set(box_prompt_probability=0.0, **options))
    assert len({json.dumps(item["box_prompts"]) for item in with_boxes}) == len(with_boxes)
    for item, plain in zip(with_boxes, without, strict=True):
        assert not any(plain["box_prompts"])
        for name in ("texts", "category_ids", "view", "image_id"):
            assert item[name] == plain[name]
        for target, own in zip(item["targets"], plain["targets"], strict=True):
            assert all(torch.equal(target[name], own[name]) for name in own)


def test_evaluation_asks_with_the_object_itself_and_always_the_same():
    options = {"train": False, "images": 9, "box_prompt_text_probability": 0.0}
    items = [make_set(**options)[0, index] for index in range(9)]
    chosen = set()
    for category, text, objects, positive, negative in prompts_of(items):
        assert len(negative) == 0 and (text == VISUAL_PROMPT) == (category != ABSENT)
        if category == PRESENT:
            (equal,) = np.flatnonzero((abs(objects - positive[0]) < 1e-6).all(axis=1))
            chosen.add(int(equal))
        assert len(positive) == (category != ABSENT)
    assert len(chosen) > 1
    again = [make_set(**options)[0, index] for index in range(9)]
    assert [i["box_prompts"] for i in again] == [i["box_prompts"] for i in items]


# Batches and the model ----------------------------------------------------------------------------


def test_rows_are_padded_and_cross_processes():
    dataset = make_set(images=3, box_prompt_probability=0.7, box_prompt_negative_probability=0.5)
    keys = [(0, 0), (0, 1), (0, 2)]
    items = [dataset[key] for key in keys]
    batch = collate_fn(items)
    drawn = [boxes for item in items for boxes in item["box_prompts"]]
    assert {len(boxes) for boxes in drawn} == {0, 1, 2}
    assert batch["box_prompts_cxcywh"].shape == (len(drawn), 2, 4)
    for boxes, labels, own in zip(
        batch["box_prompts_cxcywh"], batch["box_prompt_labels"], drawn, strict=True
    ):
        padding = [PADDING_BOX] * (2 - len(own))
        assert labels.tolist() == [label for label, _ in own] + padding
        expected = [box for _, box in own] + [[0.0] * 4] * len(padding)
        torch.testing.assert_close(boxes, torch.tensor(expected), rtol=0, atol=0)
    (loaded,) = build_loader(dataset, [keys], 1)
    for name in ("box_prompts_cxcywh", "box_prompt_labels"):
        assert torch.equal(loaded[name], batch[name])
    none = collate_fn([make_set(box_prompt_probability=0.0)[0, 0]])
    assert none["box_prompts_cxcywh"] is None and none["box_prompt_labels"] is None


@pytest.mark.parametrize("geometry_cls", ["meta", "hf"])
@torch.no_grad()
def test_a_row_without_box_is_the_same_beside_rows_with(loaded, geometry_cls):
    item = make_set(train=False, box_prompt_text_probability=1.0)[0, 0]
    generator = torch.Generator().manual_seed(0)
    item["image"] = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator).byte()
    assert [len(boxes) for boxes in item["box_prompts"]] == [1, 1, 0]
    forward = Forward(*loaded, geometry_cls)
    mixed, plain = (
        forward(collate_fn([{**item, "box_prompts": boxes}]))
        for boxes in (item["box_prompts"], [[]] * 3)
    )
    for name in ("logits", "boxes_cxcywh", "presence"):
        torch.testing.assert_close(mixed[name][:, 2], plain[name][:, 2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed["logits"][:, 0], plain["logits"][:, 0], atol=1e-4)


def test_what_reads_prompts_is_not_cached(loaded):
    model, tokenizer = loaded
    forward = Forward(model.requires_grad_(False), tokenizer)
    assert "memory" in cacheable_parts(forward)[0]
    assert cacheable_parts(forward, boxes=True) == [("trunk",)]


# Scripts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_dir(write_split, tmp_path_factory):
    root = tmp_path_factory.mktemp("boxes")
    write_split(root, 4, "train")
    return write_split(root, 4, "test")


def train(model, data, output, *more):
    """Trains on boxes for two steps; returns the losses and the adapter's file."""
    arguments = ["--config", str(ROOT / "configs" / "minimal_lora_config.yaml")]
    arguments += ["--model_name", str(model), "--train_data_path", str(data / "train")]
    arguments += ["--output_dir", str(output), "--num_workers", "0", "--batch_size", "2"]
    arguments += ["--num_epochs", "1", "--logging_steps", "1", "--prompts_per_image", "4"]
    assert train_sam3_lora.main([*arguments, "--box_prompt_probability", "1", *more]) == 0
    lines = (output / "log.jsonl").read_text().splitlines()
    weights = output / "last_model" / "lora_weights.pt"
    return [row["loss"] for row in map(json.loads, lines) if "val" not in row], weights


@pytest.mark.scripts
def test_training_reads_its_keys(tiny_model_dir, data_dir, tmp_path):
    texts = ("--box_prompt_text_probability", "1", "--box_prompt_negative_probability")
    runs = {
        "visual": ("--box_prompt_text_probability", "0", "--box_prompt_negative_probability", "0"),
        "text": (*texts, "0"),
        "negative": (*texts, "1"),
        "none": ("--box_prompt_probability", "0"),
    }
    losses = {
        name: train(tiny_model_dir, data_dir, tmp_path / name, *flags)[0]
        for name, flags in runs.items()
    }
    assert all(len(own) == 2 and np.isfinite(own).all() for own in losses.values())
    assert len({own[0] for own in losses.values()}) == len(runs)


@pytest.mark.scripts
def test_training_from_a_cache_is_the_same(tiny_model_dir, data_dir, tmp_path):
    still = ("--augment", "false", "--prompt_pool", "4")
    found = [
        train(tiny_model_dir, data_dir, tmp_path / name, *still, *flags)
        for name, flags in (("plain", ()), ("cached", ("--cache_features", "ram")))
    ]
    assert found[0][0] == found[1][0]
    first, second = (torch.load(path, weights_only=True)["lora"] for _, path in found)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "features (trunk)" in (tmp_path / "cached" / "train.log").read_text()


@pytest.mark.scripts
def test_evaluation_with_text_with_a_box_with_both(tiny_model_dir, data_dir, tmp_path, capsys):
    _, weights = train(tiny_model_dir, data_dir, tmp_path / "run")
    metrics = {}
    for kind in ("all", "text", "box", "both"):
        arguments = ["--lora_weights", str(weights), "--data_dir", str(data_dir), "--split", "test"]
        arguments += ["--num_workers", "0", "--prompt_with", kind]
        arguments += ["--compare"] if kind == "all" else []
        capsys.readouterr()
        assert evaluate_sam3_lora.main([*arguments, "--output_dir", str(tmp_path / kind)]) == 0
        shown = capsys.readouterr().out
        metrics[kind] = json.loads((tmp_path / kind / "metrics.json").read_text())
        assert metrics[kind]["prompt_with"] == kind
        assert ("asked with" in shown) == (kind == "all")
    by_prompt = metrics["all"]["by_prompt"]
    assert list(by_prompt) == list(metrics["all"]["base"]["by_prompt"]) == ["text", "box", "both"]
    losses = [summary["losses"]["loss"] for summary in by_prompt.values()]
    assert len(set(losses)) == 3 and losses[0] == metrics["all"]["losses"]["loss"]
    for kind, summary in by_prompt.items():
        assert summary["losses"] == pytest.approx(metrics[kind]["losses"], rel=1e-5)
        assert summary["bbox"] == metrics[kind]["bbox"]
    assert evaluate_sam3_lora.main(["--base", "--prompt_with", "boxes"]) == 2
