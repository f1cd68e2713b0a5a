"""The demo's drawings: reproducible, labelled as drawn, written as COCO."""

import numpy as np
import pytest

from sam3_lora import scenes
from sam3_lora.coco import DatasetError, decode_mask, read_split
from sam3_lora.faults import find_faults

DRAWERS = {"shapes": scenes.draw_shapes, "parts": scenes.draw_part}


@pytest.mark.parametrize("task", DRAWERS)
def test_objects_lie_apart_in_the_picture(task):
    for seed in range(30):
        scene = DRAWERS[task](np.random.default_rng(seed))
        assert scene.image.shape == (scenes.SIDE, scenes.SIDE, 3)
        assert scene.image.dtype == np.uint8
        assert len(scene.masks) == len(scene.kinds)
        assert scene.masks.sum(0).max(initial=0) <= 1
        assert all(mask.sum() > 300 for mask in scene.masks)


@pytest.mark.parametrize("task", DRAWERS)
def test_a_seed_is_a_scene(task):
    one, same, other = (DRAWERS[task](np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one.image, same.image)
    assert one.kinds == same.kinds
    assert not np.array_equal(one.image, other.image)


@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_a_shape_has_the_colour_that_its_kind_says(colour):
    found = 0
    for seed in range(40):
        scene = scenes.draw_shapes(np.random.default_rng(seed))
        for mask, (_, named, _) in zip(scene.masks, scene.kinds, strict=True):
            mean = scene.image[mask].mean(0)
            nearest = min(
                scenes.COLOURS,
                key=lambda c: np.abs(_hue(mean) - _hue(np.array(scenes.COLOURS[c]))).sum(),
            )
            found += named == colour
            assert nearest == named
    assert found > 5


def _hue(colour):
    """A colour without its brightness."""
    return colour / colour.sum()


def test_a_kind_answers_to_its_words_and_to_pairs_with_the_noun():
    kind = ("striped", "red", "circle")
    expected = ["striped", "red", "circle", "striped circle", "red circle"]
    assert scenes.phrases(kind) == expected
    assert scenes.phrases(("oil leak",)) == ["oil leak"]


def test_scenes_come_back_from_disk_as_they_were_drawn(tmp_path):
    drawn = [scenes.draw_part(np.random.default_rng(seed)) for seed in range(6)]
    folder = scenes.write_scenes(tmp_path, "val", drawn, list(scenes.DEFECTS))
    assert not find_faults(folder / "annotations.json", folder / "images")
    split = read_split(folder)
    assert list(split.categories.values()) == list(scenes.DEFECTS)
    for record, scene in zip(split.images, drawn, strict=True):
        objects = split.annotations[record["id"]]
        assert [split.categories[o["category_id"]] for o in objects] == [k for (k,) in scene.kinds]
        for entry, mask in zip(objects, scene.masks, strict=True):
            size = record["height"], record["width"]
            assert np.array_equal(decode_mask(entry["segmentation"], *size).astype(bool), mask)
    with pytest.raises(DatasetError, match="absent, empty or of this source"):
        scenes.write_scenes(tmp_path, "val", drawn[1:], list(scenes.DEFECTS))


def test_an_object_is_written_once_for_each_category_that_it_answers_to(tmp_path):
    scene = scenes.Scene(
        np.zeros((20, 20, 3), np.uint8), np.ones((1, 20, 20), bool), [("striped", "red", "ring")]
    )
    names = ["circle", "red", "red ring", "ring", "striped"]
    split = read_split(scenes.write_scenes(tmp_path, "test", [scene], names))
    (objects,) = split.annotations.values()
    found = [split.categories[o["category_id"]] for o in objects]
    assert sorted(found) == ["red", "red ring", "ring", "striped"]


def test_splits_and_seeds_share_no_scene(monkeypatch):
    monkeypatch.setattr(scenes, "IMAGES", {"train": 3, "val": 3, "test": 3})
    monkeypatch.setattr(scenes, "REPLAYED", 2)
    pictures, counts = set(), 0
    for task in scenes.TASKS:
        for split in scenes.IMAGES:
            for seed in (0, 1):
                drawn = list(scenes.demo_split(task, split, seed)[0])
                pictures |= {scene.image.tobytes() for scene in drawn}
                counts += len(drawn)
    assert len(pictures) == counts == 2 * (2 * 9 + 2)


def test_the_parts_replay_the_base_s_words_in_training_alone():
    words = {*scenes.TEXTURES, *scenes.COLOURS, *scenes.SHAPES}
    assert words < set(scenes.demo_split("parts", "train", 0)[1])
    assert scenes.demo_split("parts", "test", 0)[1] == list(scenes.DEFECTS)
    assert len(scenes.demo_split("shapes", "test", 0)[1]) == 34
