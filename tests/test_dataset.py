"""Prompts, targets and their place on the canvas, on photos drawn here."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam3_lora.coco import DatasetError, read_split
from sam3_lora.dataset import OUT_OF_DOMAIN, OUT_OF_DOMAIN_WORDS, PromptDataset, place_on_canvas
from sam3_lora.loader import build_loader, collate_fn, epoch_batches
from sam3_lora.losses import compute_losses, count_targets

SIZE, QUERIES = 112, 16
WIDTH, HEIGHT = 90, 60
COLOURS = {1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 0, 255)}
NAMES = {1: "bottle_cap", 2: "car", 3: "dog", 4: "traffic-light", 5: "tree"}


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(image_id, category_id, box, **changed):
    row = {"image_id": image_id, "category_id": category_id, "bbox": list(box), "iscrowd": 0}
    return row | {"segmentation": polygon(*box)} | changed


CROWD = {"size": [HEIGHT, WIDTH], "counts": [60, 600, HEIGHT * WIDTH - 660]}
# Photo 1: three objects of two categories. 2: nothing. 3: a crowd of dogs and a car without a mask.
ANNOTATIONS = [
    annotation(1, 1, (10, 8, 30, 20)),
    annotation(1, 2, (50, 30, 24, 25)),
    annotation(1, 1, (60, 4, 12, 10)),
    annotation(3, 3, (1, 0, 10, 60), iscrowd=1, segmentation=CROWD),
    annotation(3, 2, (30, 10, 20, 30), segmentation=[]),
]


def write_split(folder: Path, annotations=ANNOTATIONS, count=3, **more) -> Path:
    """A split of photos in grey noise, each object a rectangle in its category's colour."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    images = []
    for number in range(1, count + 1):
        photo = generator.integers(90, 110, (HEIGHT, WIDTH, 1)).repeat(3, 2).astype(np.uint8)
        for row in annotations:
            if row["image_id"] == number and row["category_id"] in COLOURS:
                x, y, w, h = (round(v) for v in row["bbox"])
                photo[y : y + h, x : x + w] = COLOURS[row["category_id"]]
        Image.fromarray(photo).save(folder / "images" / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT}
        )
    payload = {
        "images": images,
        "annotations": [row | {"id": i + 1} for i, row in enumerate(annotations)],
        "categories": [{"id": k, "name": v} for k, v in NAMES.items()],
    }
    (folder / "annotations.json").write_text(json.dumps(payload | more))
    return folder


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return read_split(write_split(tmp_path_factory.mktemp("data") / "train"))


def make(split, train=True, **options):
    return PromptDataset(split, SIZE, QUERIES, train=train, **options)


def assert_same(a, b):
    """Equal values of equal types, in dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        assert_same(list(a.values()), [b[name] for name in a])
    elif isinstance(a, list):
        for mine, its in zip(a, b, strict=True):
            assert_same(mine, its)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


# Which prompts ------------------------------------------------------------------------------------


def test_present_then_absent_then_out_of_domain(split):
    item = make(split, prompts_per_image=4, out_of_domain_prompts=1)[0, 0]
    assert item["category_ids"][:2] == [1, 2]
    assert item["category_ids"][2] in (3, 4, 5)
    assert item["category_ids"][3] == OUT_OF_DOMAIN
    assert item["texts"][:2] == ["bottle cap", "car"]
    assert item["texts"][3] in OUT_OF_DOMAIN_WORDS
    assert [len(t["boxes_cxcywh"]) for t in item["targets"]] == [2, 1, 0, 0]
    assert item["image_id"] == 1 and item["original_size"] == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("prompts", "words", "expected"),
    [
        (1, 1, (2, 0, 0)),  # more present than prompts: all the present
        (3, 1, (2, 0, 1)),
        (4, 2, (2, 0, 2)),
        (5, 0, (2, 3, 0)),
        (8, 1, (2, 3, 1)),  # fewer absent ones than free places
        (20, 3, (2, 3, 3)),
    ],
)
def test_prompts_are_filled_up_to_the_number(split, prompts, words, expected):
    dataset = make(split, prompts_per_image=prompts, out_of_domain_prompts=words)
    for epoch in range(5):
        item = dataset[epoch, 0]
        ids = item["category_ids"]
        assert ids[:2] == [1, 2]
        absent = [i for i in ids[2:] if i != OUT_OF_DOMAIN]
        assert (2, len(absent), ids.count(OUT_OF_DOMAIN)) == expected
        assert len(set(absent)) == len(absent) and set(absent) <= {3, 4, 5}
        assert len(set(item["texts"])) == len(item["texts"])


def test_every_absent_category_has_its_turn(split):
    dataset = make(split, prompts_per_image=3, out_of_domain_prompts=0)
    assert {dataset[epoch, 0]["category_ids"][2] for epoch in range(30)} == {3, 4, 5}


def test_evaluation_asks_every_category_in_order(split):
    dataset = make(split, train=False)
    for index in range(3):
        item = dataset[0, index]
        assert item["category_ids"] == [1, 2, 3, 4, 5]
        assert item["texts"] == ["bottle cap", "car", "dog", "traffic light", "tree"]
    assert [len(t["boxes_cxcywh"]) for t in dataset[0, 0]["targets"]] == [2, 1, 0, 0, 0]


def test_a_crowd_is_no_target_and_its_category_is_not_asked(split):
    dataset = make(split, prompts_per_image=20)
    for epoch in range(10):
        item = dataset[epoch, 2]
        assert 3 not in item["category_ids"]
        assert set(item["category_ids"]) == {2, 1, 4, 5, OUT_OF_DOMAIN}
        assert [len(t["boxes_cxcywh"]) for t in item["targets"]] == [1, 0, 0, 0, 0]
    evaluated = make(split, train=False)[0, 2]
    assert [len(t["boxes_cxcywh"]) for t in evaluated["targets"]] == [0, 1, 0, 0, 0]


def test_a_crowd_beside_an_object_leaves_the_object(tmp_path):
    rows = [*ANNOTATIONS, annotation(3, 3, (60, 20, 20, 20))]
    item = make(read_split(write_split(tmp_path / "train", rows)))[0, 2]
    assert item["category_ids"][:2] == [2, 3]
    assert len(item["targets"][1]["boxes_cxcywh"]) == 1
    assert item["targets"][1]["has_mask"].tolist() == [True]
    assert [bool(target["complete"]) for target in item["targets"][:2]] == [True, True]


def test_images_without_objects_are_negative_rows(split):
    item = make(split, prompts_per_image=4)[0, 1]
    assert item["image_id"] == 2 and len(item["texts"]) == 4
    assert item["category_ids"].count(OUT_OF_DOMAIN) == 1
    for target in item["targets"]:
        assert target["boxes_cxcywh"].shape == (0, 4)
        assert target["masks"].shape == (0, SIZE, SIZE)
        assert target["has_mask"].shape == (0,) and target["has_mask"].dtype == torch.bool


def test_an_image_with_nothing_to_ask_for_gets_a_word(tmp_path):
    crowds = [annotation(1, c, (1, 0, 10, 60), iscrowd=1, segmentation=CROWD) for c in range(1, 6)]
    folder = write_split(tmp_path / "train", crowds, count=1)
    item = make(read_split(folder), out_of_domain_prompts=0)[0, 0]
    assert item["category_ids"] == [OUT_OF_DOMAIN]
    assert item["texts"][0] in OUT_OF_DOMAIN_WORDS


def test_boxes_without_area_are_no_targets(tmp_path, caplog):
    rows = [annotation(1, 1, (10, 8, 0, 20), segmentation=[]), annotation(1, 2, (50, 30, 24, 25))]
    dataset = make(read_split(write_split(tmp_path / "train", rows)), prompts_per_image=20)
    assert len(caplog.messages) == 1 and "1 objects have boxes that are empty or" in caplog.text
    assert dataset[0, 0]["category_ids"][0] == 2 and 1 not in dataset[0, 0]["category_ids"]


def test_out_of_domain_words_are_not_the_data_sets(tmp_path):
    folder = write_split(tmp_path / "train", prompts={"car": "a Pianola", "dog": "drum"})
    words = make(read_split(folder)).words
    assert words == [w for w in OUT_OF_DOMAIN_WORDS if w not in ("piano", "drum kit")]


def test_prompts_of_the_file_override_names(tmp_path):
    folder = write_split(tmp_path / "train", prompts={"bottle_cap": "red  metal cap"})
    item = make(read_split(folder))[0, 0]
    assert item["texts"][:2] == ["red metal cap", "car"]


def test_categories_of_one_prompt_are_warned_of_in_training(tmp_path, caplog):
    prompts = {"car": "Bottle  Cap", "dog": "a thing", "tree": "A Thing"}
    data = read_split(write_split(tmp_path / "train", prompts=prompts))
    make(data, train=False)
    assert not caplog.messages
    make(data)
    named = "('bottle_cap' and 'car' as 'bottle cap'; 'dog' and 'tree' as 'a thing')"
    assert len(caplog.messages) == 1 and named in caplog.text and "--prompts" in caplog.text


# Random choices -----------------------------------------------------------------------------------


def test_items_follow_from_seed_epoch_and_index(split):
    first, again = (make(split, seed=5, prompts_per_image=3) for _ in range(2))
    expected = [first[epoch, 0] for epoch in range(4)]
    torch.manual_seed(123)
    np.random.seed(123)
    for epoch in (3, 1, 0, 2):  # in another order, from another random state
        assert_same(again[epoch, 0], expected[epoch])
    for a in range(4):
        for b in range(a):
            assert not torch.equal(expected[a]["image"], expected[b]["image"])
    other = make(split, seed=6, prompts_per_image=3)[0, 0]
    assert not torch.equal(other["image"], expected[0]["image"])


@pytest.mark.parametrize("size", [SIZE, 101])  # 101: masks of no whole number of bytes
def test_batches_do_not_depend_on_the_number_of_workers(split, size):
    dataset = make(split, prompts_per_image=3, flip_probability=0.5)
    dataset.image_size = size
    batches = epoch_batches(len(dataset), 2, epoch=1, seed=3, shuffle=True)
    expected = [collate_fn([dataset[key] for key in keys]) for keys in batches]
    state = torch.get_rng_state()
    for workers in (0, 2):
        loader = build_loader(dataset, batches, num_workers=workers)
        assert len(loader) == len(batches)
        assert_same(list(loader), expected)
    assert torch.equal(torch.get_rng_state(), state)  # dropout goes on as it would have


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_arrives_from_a_worker_as_it_was_raised(tmp_path, workers):
    folder = write_split(tmp_path / "train")
    (folder / "images" / "2.png").write_bytes(b"no image")
    loader = build_loader(make(read_split(folder)), [[(0, 0)], [(0, 2), (0, 1)]], workers)
    batches = iter(loader)
    assert next(batches)["image_ids"] == [1]
    with pytest.raises(DatasetError, match=r"^expected an image that PIL reads.*leave it out$"):
        next(batches)


def test_batches_that_are_kept_hold_no_descriptors(split):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest_free:
        # Two workers take a dozen; 12 batches hold hundreds of tensors.
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free.fileno() + 40, limits[1]))
    try:
        batches = [[(epoch, 0), (epoch, 1)] for epoch in range(12)]
        assert len(list(build_loader(make(split), batches, num_workers=2))) == 12
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (6, 2), (2, 5)])
def test_an_epoch_covers_all_images_once(count, batch_size, shuffle):
    batches = epoch_batches(count, batch_size, epoch=4, seed=1, shuffle=shuffle)
    keys = [key for batch in batches for key in batch]
    assert sorted(keys) == [(4, index) for index in range(count)]
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size
    assert shuffle or keys == sorted(keys)


def test_epochs_are_shuffled_differently():
    orders = [tuple(i for b in epoch_batches(50, 8, e, 1, True) for _, i in b) for e in range(3)]
    assert len(set(orders)) == 3
    assert epoch_batches(50, 8, 1, 1, True) == epoch_batches(50, 8, 1, 1, True)
    assert epoch_batches(50, 8, 1, 1, True) != epoch_batches(50, 8, 1, 2, True)


# Where things land --------------------------------------------------------------------------------


def extent(pixels):
    """The box of the true pixels (H,W), corners in pixels."""
    ys, xs = np.nonzero(np.asarray(pixels))
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=float)


def corners(box_cxcywh):
    cx, cy, w, h = (box_cxcywh.double() * SIZE).tolist()
    return np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])


CASES = {
    "evaluation": {"train": False},
    "plain": {"augment": False},
    "flip": {"augment": False, "flip_probability": 1.0},
    "padded": {},
    "padded flip": {"flip_probability": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_targets_land_on_their_objects(split, case):
    dataset = make(split, **CASES[case])
    for epoch in range(4):
        item = dataset[epoch, 0]
        canvas = item["image"].permute(1, 2, 0).numpy().astype(int)
        assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, SIZE, SIZE)
        for category, target in zip(item["category_ids"], item["targets"], strict=True):
            if category not in (1, 2):
                continue
            distance = np.abs(canvas - COLOURS[category]).max(2)
            for box, mask in zip(target["boxes_cxcywh"], target["masks"].numpy(), strict=True):
                # Under the mask, but for its rim, the colour is pure: half-way it is past half.
                inner = erode(mask)
                assert inner.sum() > 10
                assert distance[inner].max() <= 2
                assert (distance[mask] < 160).all()
                assert np.abs(extent(mask) - corners(box)).max() <= 1.5
        # The masks of a category hold all its pixels.
        for category in (1, 2):
            pure = np.abs(canvas - COLOURS[category]).max(2) <= 2
            masks = item["targets"][item["category_ids"].index(category)]["masks"].any(0).numpy()
            assert pure.sum() > 50
            assert not (pure & ~masks).any()


def erode(mask):
    """The pixels of a mask whose 8 neighbours are in it."""
    padded = np.pad(mask, 1)
    shifts = [padded[y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)]
    return np.logical_and.reduce(shifts)


def test_plain_boxes_are_exact(split):
    target = make(split, train=False)[0, 0]["targets"][0]
    expected = [[25 / 90, 18 / 60, 30 / 90, 20 / 60], [66 / 90, 9 / 60, 12 / 90, 10 / 60]]
    torch.testing.assert_close(target["boxes_cxcywh"], torch.tensor(expected))
    flipped = make(split, augment=False, flip_probability=1.0)[0, 0]["targets"][0]
    expected = [[65 / 90, 18 / 60, 30 / 90, 20 / 60], [24 / 90, 9 / 60, 12 / 90, 10 / 60]]
    torch.testing.assert_close(flipped["boxes_cxcywh"], torch.tensor(expected))


def test_flips_come_as_often_as_asked(split):
    dataset = make(split, augment=False, flip_probability=0.5)
    lefts = [float(dataset[e, 0]["targets"][0]["boxes_cxcywh"][0, 0]) < 0.5 for e in range(40)]
    assert 10 < sum(lefts) < 30
    never = make(split, augment=False)
    assert all(torch.equal(never[e, 0]["image"], never[0, 0]["image"]) for e in range(3))


def test_padding_is_zero_and_the_photo_square(split):
    dataset = make(split)
    places, sides = set(), set()
    for epoch in range(12):
        # Noise from 90 to 109 and pure colours: no pixel of the photo is black.
        image = dataset[epoch, 0]["image"]
        left, top, right, bottom = extent(image.amax(0) > 0)
        assert right - left == bottom - top
        inside = image[:, int(top) : int(bottom), int(left) : int(right)]
        assert int(inside.amax(0).min()) > 0
        assert int(image.sum()) == int(inside.sum())
        sides.add(int(right - left))
        places.add((left, top))
    # 480 to 992 of 1008 px, in steps of 32, on a canvas of 112 px.
    assert sides <= {round(s * SIZE / 1008) for s in range(480, 1008, 32)}
    assert len(sides) > 4 and len(places) > 8


def test_objects_without_a_mask_keep_their_box(split):
    item = make(split, train=False)[0, 2]
    target = item["targets"][1]
    assert target["has_mask"].tolist() == [False]
    assert target["masks"].shape == (0, SIZE, SIZE)
    expected = torch.tensor([[40 / 90, 25 / 60, 20 / 90, 30 / 60]])
    torch.testing.assert_close(target["boxes_cxcywh"], expected)


def test_a_mask_that_is_missing_among_others_is_empty(tmp_path):
    rows = [*ANNOTATIONS, annotation(3, 2, (60, 10, 20, 30))]
    item = make(read_split(write_split(tmp_path / "train", rows)), train=False)[0, 2]
    target = item["targets"][1]
    assert target["has_mask"].tolist() == [False, True]
    assert target["masks"].flatten(1).any(1).tolist() == [False, True]


def test_the_loss_reads_no_mask_of_objects_without(split):
    target = make(split, train=False)[0, 2]["targets"][1]
    padded = target | {"masks": torch.zeros(1, SIZE, SIZE, dtype=torch.bool)}
    generator = torch.Generator().manual_seed(0)
    shapes = {"logits": (1, 1, 4), "boxes_cxcywh": (1, 1, 4, 4), "presence": (1, 1)}
    shapes |= {"mask_embed": (1, 4, 5), "pixel_embed": (1, 5, 8, 8), "semantic": (1, 8, 8)}
    outputs = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    assert_same(*(compute_losses(outputs, [t], count_targets([t])) for t in (target, padded)))


def test_has_masks(split, tmp_path):
    assert make(split).has_masks()
    rows = [row | {"segmentation": []} for row in ANNOTATIONS if not row["iscrowd"]]
    assert not make(read_split(write_split(tmp_path / "train", rows))).has_masks()


def test_a_photo_of_another_size_is_refused(tmp_path):
    folder = write_split(tmp_path / "train")
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "images" / "1.png")
    dataset = make(read_split(folder))
    with pytest.raises(DatasetError, match=r"1\.png \(image id 1\).*says 90x60.*has 60x90"):
        dataset[0, 0]
    dataset[0, 1]


# More objects than queries ------------------------------------------------------------------------


@pytest.fixture
def crowded(tmp_path):
    """Photo 1 holds QUERIES + 4 cars, wider and wider, the widest in the middle; photo 2 a few."""
    widths = [*range(1, 11), *range(20, 10, -1)]
    rows = [annotation(1, 2, (2 + i, 3 * i, w, 2)) for i, w in enumerate(widths)]
    rows += [annotation(2, 2, (4, 3 * i, 3, 2)) for i in range(QUERIES)]
    return read_split(write_split(tmp_path / "train", rows, count=2)), widths


def test_the_largest_are_kept_with_a_warning(crowded, caplog):
    split, widths = crowded
    with caplog.at_level(logging.WARNING):
        dataset = make(split, train=False)
    assert "1 images have more than 16 objects of one category" in caplog.text
    assert "(1.png)" in caplog.text and "2.png" not in caplog.text
    boxes = dataset[0, 0]["targets"][1]["boxes_cxcywh"]
    kept = sorted((boxes[:, 2] * WIDTH).round().int().tolist())
    assert kept == sorted(widths)[4:]
    assert len(dataset[0, 1]["targets"][1]["boxes_cxcywh"]) == QUERIES


def test_too_many_objects_can_be_refused(crowded):
    with pytest.raises(
        DatasetError, match=r"more than 16 objects.*\(1\.png\); set --over_queries tile or cap"
    ):
        make(crowded[0], over_queries="error")
    assert len(PromptDataset(crowded[0], SIZE, 20, train=True, over_queries="error")) == 2


def test_boxes_end_at_the_photos_border(tmp_path, caplog):
    rows = [
        annotation(1, 2, (80, 50, 30, 20), segmentation=[]),
        annotation(1, 2, (WIDTH, 10, 5, 5), segmentation=[]),  # wholly outside: no object
    ]
    item = make(read_split(write_split(tmp_path / "train", rows, count=1)), train=False)[0, 0]
    assert caplog.messages == ["the split has no masks: box metrics only"]
    expected = [85 / WIDTH, 55 / HEIGHT, 10 / WIDTH, 10 / HEIGHT]
    torch.testing.assert_close(item["targets"][1]["boxes_cxcywh"], torch.tensor([expected]))


def test_a_mask_below_a_pixel_of_the_canvas_keeps_one(tmp_path):
    rows = [annotation(1, 2, (44.9, 29.9, 0.2, 0.2), segmentation=polygon(44.9, 29.9, 0.2, 0.2))]
    item = make(read_split(write_split(tmp_path / "train", rows, count=1)), train=False)[0, 0]
    target = item["targets"][1]
    assert target["has_mask"].tolist() == [True]
    assert target["masks"].nonzero().tolist() == [[0, SIZE // 2, SIZE // 2]]


def test_a_photo_fills_the_canvas_or_lies_where_it_is_put():
    pixels = torch.arange(1, 13, dtype=torch.uint8).reshape(1, 3, 4)
    assert place_on_canvas(pixels, 8).shape == (1, 8, 8)
    placed = place_on_canvas(pixels, 8, side=4, left=3, top=2, flip=True)
    alone = place_on_canvas(pixels, 4)
    assert torch.equal(placed[:, 2:6, 3:7], alone.flip(-1))
    assert int((placed > 0).sum()) == 16


# Batches ------------------------------------------------------------------------------------------


def test_collate(split):
    dataset = make(split, prompts_per_image=4)
    items = [dataset[0, 0], dataset[0, 1], dataset[0, 2]]
    batch = collate_fn(items)
    counts = [len(item["texts"]) for item in items]
    assert batch["images"].shape == (3, 3, SIZE, SIZE) and batch["images"].dtype == torch.uint8
    assert batch["image_ids"] == [1, 2, 3]
    assert batch["original_sizes"] == [(HEIGHT, WIDTH)] * 3
    expected = [index for index, count in enumerate(counts) for _ in range(count)]
    assert batch["image_index"].tolist() == expected and batch["image_index"].dtype == torch.long
    for name in ("texts", "category_ids", "targets"):
        assert len(batch[name]) == sum(counts)
        for row, index in enumerate(expected):
            assert batch[name][row] is items[index][name][row - sum(counts[:index])]
    assert batch["box_prompts_cxcywh"] is None and batch["box_prompt_labels"] is None
