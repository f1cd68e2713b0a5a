"""Crowded photos in tiles: which tiles, which objects in them, and the items they become."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam3_lora.coco import DatasetError, decode_mask, encode_mask, read_split
from sam3_lora.dataset import PromptDataset
from sam3_lora.loader import build_loader, epoch_batches
from sam3_lora.losses import compute_losses, count_targets
from sam3_lora.tiles import (
    MOST_TILES,
    TILE_OVERLAP,
    choose_tiles,
    count_beyond,
    cut_objects,
    touches,
)

WIDTH, HEIGHT = 240, 160
SIZE, QUERIES = 112, 8
COLOURS = {1: (255, 0, 0), 2: (0, 255, 0)}
NAMES = {1: "red", 2: "green", 3: "blue", 4: "white"}


def make_object(x, y, w, h, category=1, mask=True):
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    entry = {"category_id": category, "bbox": [x, y, w, h], "iscrowd": 0}
    return entry | {"segmentation": polygon if mask else []}


# 24 red squares, a green strip across the photo and a green object in a corner. Of 2 x 2 tiles,
# that end at 134 and begin at 106 pixels (89 and 71 from the top), each shows 6 squares whole.
SQUARES = [
    make_object(x, y, 12, 12) for y in (10, 44, 100, 134) for x in (12, 50, 88, 136, 176, 216)
]
OBJECTS = [*SQUARES, make_object(0, 70, WIDTH, 10, 2), make_object(230, 150, 8, 8, 2, mask=False)]


def write_photos(folder: Path, objects=OBJECTS, more=()) -> Path:
    """A split: a photo with the objects, and one with `more`."""
    (folder / "images").mkdir(parents=True)
    images, rows = [], []
    for number, own in enumerate((objects, more), start=1):
        photo = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
        for entry in own:
            x, y, w, h = entry["bbox"]
            photo[y : y + h, x : x + w] = COLOURS.get(entry["category_id"], (9, 9, 9))
            rows.append({**entry, "image_id": number, "id": len(rows) + 1})
        Image.fromarray(photo).save(folder / "images" / f"{number}.png")
        size = {"width": WIDTH, "height": HEIGHT}
        images.append({"id": number, "file_name": f"{number}.png", **size})
    categories = [{"id": k, "name": v} for k, v in NAMES.items()]
    content = {"images": images, "annotations": rows, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return read_split(write_photos(tmp_path_factory.mktemp("tiles") / "train"))


def make(split, **options):
    options = {"train": True, "over_queries": "tile", "augment": False} | options
    return PromptDataset(split, SIZE, QUERIES, **options)


# Which tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(240, 160), (1024, 1024), (4000, 61), (60, 40)])
def test_tiles_cover_the_photo_and_overlap(width, height):
    # More objects in one place than queries: every grid is tried, the last one is given.
    objects = [{"category_id": 1, "bbox": [0, 0, width, height]}] * 2
    tiles, crowded = choose_tiles(objects, width, height, 1)
    assert len(tiles) == len(set(tiles)) == crowded == MOST_TILES**2
    for axis, length in ((0, width), (1, height)):
        spans = sorted({(t[axis], t[axis + 2]) for t in tiles})
        assert spans[0][0] == 0 and spans[-1][1] == length
        for (begin, end), (following, _) in itertools.pairwise(spans):
            assert begin < following < end
            assert end - following >= TILE_OVERLAP * (end - begin) - 2
        assert len({end - begin for begin, end in spans}) <= 3  # whole pixels: all but equal


def test_the_fewest_tiles_that_suffice():
    for queries, side in ((23, 2), (6, 2), (5, 4), (4, 4), (3, 5), (1, 6)):
        tiles, crowded = choose_tiles(SQUARES, WIDTH, HEIGHT, queries)
        most = max(len(cut_objects(SQUARES, tile, WIDTH, HEIGHT)) for tile in tiles)
        assert (len(tiles), crowded, most <= queries) == (side**2, 0, True), queries
    # Two categories in turn: a prompt asks for one of them.
    halves = [entry | {"category_id": i % 2} for i, entry in enumerate(SQUARES)]
    assert len(choose_tiles(halves, WIDTH, HEIGHT, 4)[0]) == 4


@pytest.mark.parametrize("queries", [1, 3, 10, 30])
def test_every_object_belongs_to_a_tile(queries):
    rng = np.random.default_rng(queries)
    for _ in range(20):
        width, height = (int(v) for v in rng.integers(60, 900, 2))
        corners = np.sort(rng.random((40, 2, 2)) * (width, height), axis=1)
        sizes = corners[:, 1] - corners[:, 0]
        sizes[::2] *= 0.1  # small ones as well
        boxes = np.concatenate([corners[:, 0], sizes], axis=1).tolist()
        objects = [
            {"category_id": 1, "bbox": box, "segmentation": None, "n": n}
            for n, box in enumerate(boxes)
        ]
        tiles, _ = choose_tiles(objects, width, height, queries)
        shown = [entry["n"] for t in tiles for entry in cut_objects(objects, t, width, height)]
        assert set(shown) == set(range(40))


def test_objects_beyond_the_queries_are_counted_by_category():
    assert count_beyond(OBJECTS, 8) == 16
    assert count_beyond(OBJECTS, 24) == 0
    assert count_beyond(OBJECTS, 1) == 23 + 1
    assert count_beyond([], 1) == 0


# Objects in a tile --------------------------------------------------------------------------------

TILE = (100, 50, 200, 150)


def cut(*objects):
    return cut_objects(objects, TILE, WIDTH, HEIGHT)


def test_an_object_inside_keeps_its_box_and_mask():
    (found,) = cut(make_object(110.5, 60.25, 30.5, 20))
    assert found["bbox"] == [10.5, 10.25, 30.5, 20]
    whole = decode_mask(make_object(110.5, 60.25, 30.5, 20)["segmentation"], HEIGHT, WIDTH)
    assert (decode_mask(found["segmentation"], 100, 100) == whole[50:150, 100:200]).all()
    assert found["category_id"] == 1


def test_a_cut_object_ends_where_the_tile_does():
    box, mask = cut(make_object(90, 60, 20, 10, mask=False), make_object(90, 60, 20, 10))
    assert box["bbox"] == mask["bbox"] == [0, 10, 10, 10]
    assert box["segmentation"] == []
    assert decode_mask(mask["segmentation"], 100, 100).sum() == 100
    # The box is around what the tile shows of the object, not of its box: a triangle's tip.
    tip = make_object(180, 60, 40, 40) | {"segmentation": [[180, 60, 220, 60, 220, 100]]}
    (found,) = cut(tip)
    shown = decode_mask(found["segmentation"], 100, 100)
    rows, columns = (np.flatnonzero(shown.any(axis)) for axis in (1, 0))
    x, y, w, h = found["bbox"]
    assert (x, x + w, y, y + h) == (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1)
    assert x + w == 100 and h < 25


@pytest.mark.parametrize(
    ("box", "belongs"),
    [
        ((60, 60, 53, 10), False),  # 13 of 53 pixels
        ((61, 60, 52, 10), True),
        ((110, 140, 10, 41), False),  # 10 of 41
        ((110, 140, 10, 40), True),
        ((0, 0, WIDTH, HEIGHT), True),  # larger than the tile
        ((0, 126, WIDTH, 34), True),
        ((0, 0, 99, 160), False),
    ],
)
def test_a_quarter_of_each_side_belongs(box, belongs):
    assert len(cut(make_object(*box, mask=False))) == belongs


def test_a_box_whose_object_is_elsewhere_is_no_object():
    far = make_object(60, 60, 80, 10) | {"segmentation": [[60, 60, 80, 60, 80, 70, 60, 70]]}
    assert cut(far) == []
    # Smaller than a pixel, and not cut: an object all the same.
    (speck,) = cut(make_object(150.4, 100.4, 0.1, 0.1))
    assert speck["bbox"] == pytest.approx([50.4, 50.4, 0.1, 0.1])


def test_runs_are_cut_as_polygons_are():
    entry = make_object(90, 40, 60, 60)
    rle = encode_mask(decode_mask(entry["segmentation"], HEIGHT, WIDTH))
    assert cut(entry) == cut(entry | {"segmentation": rle})


def test_touching_needs_a_part_inside():
    assert touches([99, 49, 1.5, 1.5], TILE) and touches([0, 0, WIDTH, HEIGHT], TILE)
    assert not touches([90, 60, 10, 10], TILE) and not touches([110, 150, 5, 5], TILE)


# Items --------------------------------------------------------------------------------------------


def test_items_are_tiles_of_crowded_photos_and_whole_others(split, caplog):
    dataset = make(split)
    assert len(dataset) == len(dataset.items) == 4 + 1
    assert [position for position, _ in dataset.items] == [0] * 4 + [1]
    assert dataset.items[4] == (1, None)
    assert len(caplog.messages) == 1
    assert "1 images have more than 8 objects of one category" in caplog.text
    assert "(1.png): cut into 4 tiles" in caplog.text and "2.png" not in caplog.text
    assert len(make(split, over_queries="cap")) == 2
    batches = epoch_batches(len(dataset), 2, 0, 0, shuffle=True)
    ids = [i for batch in build_loader(dataset, batches, 0) for i in batch["image_ids"]]
    assert sorted(ids) == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("options", [{}, {"augment": True, "flip_probability": 0.5}])
def test_targets_of_a_tile_land_on_their_objects(split, options):
    dataset, found = make(split, **options), 0
    for index, (_, tile) in enumerate(dataset.items[:4]):
        item = dataset[1, index]
        assert item["image"].shape == (3, SIZE, SIZE)
        assert item["original_size"] == (tile[3] - tile[1], tile[2] - tile[0])
        canvas = item["image"].permute(1, 2, 0).numpy().astype(int)
        for category, target in zip(item["category_ids"], item["targets"], strict=True):
            if category not in COLOURS:
                continue
            found += len(target["boxes_cxcywh"])
            assert len(target["boxes_cxcywh"]) <= QUERIES
            distance = np.abs(canvas - COLOURS[category]).max(2)
            for g in target["has_mask"].nonzero()[:, 0]:
                mask, (cx, cy, w, h) = target["masks"][g].numpy(), target["boxes_cxcywh"][g] * SIZE
                assert (distance[mask] < 160).all()
                ys, xs = np.nonzero(mask)
                ends = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                corners = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
                assert np.abs(ends - corners).max() <= 1.5
            shown = (distance <= 2) & ~target["masks"].any(0).numpy()
            assert category == 2 or not shown.any()
    assert found >= len(OBJECTS)


def test_a_tile_asks_for_what_it_shows(tmp_path):
    # A green strip of which the left tiles show 12 of 100 pixels; a crowd of blue in one corner.
    crowd = make_object(0, 0, 20, 20, 3) | {"iscrowd": 1}
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:20, :20] = True
    runs = encode_mask(mask)
    rows = [*SQUARES, make_object(121, 10, 100, 12, 2), crowd | {"segmentation": runs}]
    dataset = make(read_split(write_photos(tmp_path / "train", rows)), prompts_per_image=20)
    asked = [set(dataset[0, i]["category_ids"]) for i in range(4)]
    tiles = [tile for _, tile in dataset.items[:4]]
    assert tiles[0][2] == 134 and tiles[1][0] < 121
    assert [2 in ids for ids in asked] == [False, True, True, True]
    assert [3 in ids for ids in asked] == [False, True, True, True]
    counts = [
        len(item["targets"][item["category_ids"].index(2)]["boxes_cxcywh"])
        for item in (dataset[0, i] for i in (1, 2, 3))
    ]
    assert counts == [1, 0, 0]


def test_items_of_tiles_follow_from_seed_epoch_and_index(split):
    first, again = make(split, augment=True), make(split, augment=True)
    for key in ((0, 1), (2, 3), (0, 4)):
        a, b = first[key], again[key]
        assert a["texts"] == b["texts"] and torch.equal(a["image"], b["image"])
        for mine, its in zip(a["targets"], b["targets"], strict=True):
            assert all(torch.equal(mine[name], its[name]) for name in mine)
    assert not torch.equal(first[0, 1]["image"], first[1, 1]["image"])


def test_what_tiles_cannot_part_is_capped_with_a_warning(tmp_path, caplog):
    pile = [make_object(5, 5, 10 + n, 10) for n in range(QUERIES + 2)]
    dataset = make(read_split(write_photos(tmp_path / "train", pile)))
    assert len(dataset) == MOST_TILES**2 + 1
    tiles = f"cut into {MOST_TILES**2} tiles; of 1 that still have more only the largest 8 are used"
    assert tiles in caplog.text
    sizes = [len(t["boxes_cxcywh"]) for i in range(37) for t in dataset[0, i]["targets"]]
    assert max(sizes) == QUERIES


def test_training_capped_says_what_is_lost(split, caplog):
    with caplog.at_level(logging.WARNING):
        make(split, over_queries="cap")
    assert len(caplog.messages) == 1
    assert "only the largest 8 are used, 16 are not; --over_queries tile" in caplog.text


def test_a_capped_row_is_not_complete(split):
    capped, tiled = (make(split, over_queries=name) for name in ("cap", "tile"))
    for dataset, complete in ((capped, [False, True]), (tiled, [True] * 5)):
        for index, expected in enumerate(complete):
            item = dataset[0, index]
            whole = [bool(t["complete"]) for t in item["targets"]]
            assert all(whole) == expected
            assert whole.count(False) == (not expected)


def test_evaluation_sees_whole_photos_and_says_what_it_cannot_reach(split, caplog):
    for over_queries in ("cap", "tile", "error"):
        caplog.clear()
        dataset = make(split, train=False, over_queries=over_queries)
        assert len(dataset) == 2
        assert len(caplog.messages) == 1
        assert "(1.png): no prediction can reach 16 of their objects" in caplog.text
    with pytest.raises(DatasetError, match="set --over_queries tile or cap"):
        make(split, over_queries="error")


@pytest.mark.real_data
def test_tiles_of_real_photos_hold_no_more_than_the_queries(real_data):
    split = read_split(real_data / "facade_test_roboflow_coco" / "test")
    dataset = PromptDataset(split, 336, 20, train=True, over_queries="tile", augment=False)
    tiles = [index for index, (_, tile) in enumerate(dataset.items) if tile]
    assert len(tiles) > 200
    for index in tiles[::25]:
        for target in dataset[0, index]["targets"]:
            assert len(target["boxes_cxcywh"]) <= 20
            filled = target["masks"].flatten(1).any(1)
            assert torch.equal(filled[: len(target["has_mask"])], target["has_mask"][: len(filled)])


def test_losses_of_tiles_are_finite(split):
    dataset = make(split)
    targets = [t for index in range(4) for t in dataset[0, index]["targets"]]
    generator = torch.Generator().manual_seed(0)
    rows = len(targets)
    shapes = {"logits": (1, rows, 8), "boxes_cxcywh": (1, rows, 8, 4), "presence": (1, rows)}
    shapes |= {"mask_embed": (rows, 8, 5), "pixel_embed": (rows, 5, 8, 8), "semantic": (rows, 8, 8)}
    outputs = {n: torch.rand(s, generator=generator).requires_grad_() for n, s in shapes.items()}
    losses = compute_losses(outputs, targets, count_targets(targets))
    losses["loss"].backward()
    assert all(torch.isfinite(value.grad).all() for value in outputs.values())
