"""Photos searched in tiles: the windows, merging what several views show, --tile of the scripts."""

import json
import math

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_benchmarks import load, tables

import evaluate_sam3_lora
import inference
from lora_layers import LoRAConfig, apply_lora, lora_modules
from sam3_lora import checkpoint, prediction
from sam3_lora.coco import decode_mask, encode_mask, read_split
from sam3_lora.forward import Forward
from sam3_lora.model import load_model
from sam3_lora.tiles import TILE_OVERLAP, merge_views, view_windows

WIDTH, HEIGHT = 100, 60
WHOLE, *TILES = view_windows(WIDTH, HEIGHT, 0.6)  # columns 0-56 and 44-100, rows 0-34 and 26-60
LEFT, RIGHT = TILES[:2]  # the upper ones


# Windows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "side"), [(0.9, 2), (0.6, 2), (0.5, 3), (0.25, 5), (0.1, 13)])
@pytest.mark.parametrize(("width", "height"), [(1000, 700), (61, 4000)])
def test_the_fewest_tiles_cover_a_photo_and_overlap(share, side, width, height) -> None:
    whole, *tiles = view_windows(width, height, share)
    assert whole == (0, 0, width, height)
    assert len(tiles) == side**2
    seen = np.zeros((height, width), dtype=int)
    for left, top, right, bottom in tiles:
        seen[top:bottom, left:right] += 1
        assert right - left <= math.ceil(share * width) + 1
        assert bottom - top <= math.ceil(share * height) + 1
    assert seen.min() == 1
    for tile, following in zip(tiles[: side - 1], tiles[1:side], strict=True):
        assert tile[2] - following[0] >= TILE_OVERLAP * (tile[2] - tile[0]) - 1
    # One tile less a side is larger than asked for, or there would be one alone.
    assert side == 2 or 1 / (side - 1 - (side - 2) * TILE_OVERLAP) > share


# What several views show --------------------------------------------------------------------------


def paint(*boxes) -> np.ndarray:
    """The mask of boxes (xyxy) on the photo."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def look(window, *rows, masks: bool = True) -> tuple:
    """A view and what it finds of (score, mask on the photo[, prompt])."""
    left, top, right, bottom = window
    shown = [row[1][top:bottom, left:right] for row in rows]
    corners = []
    for mask in shown:
        down, across = np.nonzero(mask)
        corners.append([across.min(), down.min(), across.max() + 1, down.max() + 1])
    found = {
        "category_id": np.array([(*row, 1)[2] for row in rows], dtype=int),
        "score": np.array([row[0] for row in rows], dtype=float),
        "boxes_xyxy": np.array(corners, dtype=float).reshape(-1, 4),
        "rles": [encode_mask(mask) for mask in shown] if masks else None,
    }
    return window, found


def merge(*views) -> tuple[list[float], np.ndarray]:
    """Scores and masks (n,HEIGHT,WIDTH) of what is merged; its boxes are around its masks."""
    merged = merge_views(views, WIDTH, HEIGHT)
    assert (np.diff(merged["score"]) <= 0).all()
    masks = np.array([decode_mask(rle, HEIGHT, WIDTH) for rle in merged["rles"]])
    for mask, box in zip(masks, merged["boxes_xyxy"], strict=True):
        down, across = np.nonzero(mask)
        around = [across.min(), down.min(), across.max() + 1, down.max() + 1]
        assert box.tolist() == around
    assert merged["rles"] == [encode_mask(mask) for mask in masks]
    return merged["score"].tolist(), masks.reshape(-1, HEIGHT, WIDTH)


@pytest.mark.parametrize("window", [WHOLE, *TILES])
def test_a_mask_of_a_tile_lies_in_the_photo_where_it_was(window) -> None:
    rng = np.random.default_rng(0)
    left, top, right, bottom = window
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for kind in (rng.random((HEIGHT, WIDTH)) < 0.5, np.ones((HEIGHT, WIDTH), dtype=bool)):
        mask[top:bottom, left:right] = kind[top:bottom, left:right]
        _, (merged,) = merge(look(window, (0.5, mask)))
        assert (merged == mask).all()


def test_an_object_across_a_border_comes_out_once() -> None:
    wide = paint((10, 5, 90, 15), (10, 5, 20, 25))
    scores, (mask,) = merge(look(LEFT, (0.7, wide)), look(RIGHT, (0.9, wide)))
    assert scores == [0.9]
    assert (mask == wide).all()
    # Seen as a whole, it is taken from there: a tile's mask is a part.
    coarse = paint((10, 4, 90, 16))
    scores, (mask,) = merge(
        look(WHOLE, (0.6, coarse)), look(LEFT, (0.7, wide)), look(RIGHT, (0.9, wide))
    )
    assert scores == [0.9]
    assert (mask == coarse).all()


def test_an_object_across_four_tiles_comes_out_once() -> None:
    cross = paint((10, 27, 90, 33), (46, 5, 54, 55))
    scores, (mask,) = merge(*(look(tile, (0.5 + 0.1 * k, cross)) for k, tile in enumerate(TILES)))
    assert scores == pytest.approx([0.8])
    assert (mask == cross).all()


def test_what_several_views_show_comes_out_once() -> None:
    small, shifted = paint((46, 27, 52, 33)), paint((46, 27, 52, 32))
    views = [look(tile, (0.6, shifted)) for tile in TILES]
    scores, (mask,) = merge(look(WHOLE, (0.8, small)), *views)
    assert scores == [0.8]
    assert (mask == small).all()


def test_a_sliver_at_a_border_is_the_object_beyond() -> None:
    beyond = paint((52, 5, 72, 20))  # 4 of its 20 columns are in the left tile
    scores, (mask,) = merge(look(LEFT, (0.9, beyond)), look(RIGHT, (0.5, beyond)))
    assert scores == [0.9]
    assert (mask == beyond).all()


def test_what_is_cut_and_seen_once_stays() -> None:
    cut, other = paint((40, 5, 70, 15)), paint((46, 20, 52, 26))
    scores, masks = merge(look(LEFT, (0.9, cut)), look(RIGHT, (0.8, other)), look(WHOLE))
    assert scores == [0.9, 0.8]
    assert (masks == [paint((40, 5, 56, 15)), other]).all()


def test_neighbours_stay_two() -> None:
    first, second = paint((44, 5, 50, 11)), paint((50, 5, 56, 11))
    rows = (0.9, first), (0.8, second)
    scores, masks = merge(look(WHOLE, *rows), look(LEFT, *rows), look(RIGHT, *rows))
    assert scores == [0.9, 0.8]
    assert (masks == [first, second]).all()


@pytest.mark.parametrize("score", [0.95, 0.85, 0.3])
def test_a_blob_does_not_swallow_two_neighbours(score) -> None:
    first, second = paint((10, 5, 20, 15)), paint((20, 5, 30, 15))
    # Seen apart in one tile: the blob is one of them, the other stays.
    scores, masks = merge(
        look(WHOLE, (score, first | second)), look(LEFT, (0.9, first), (0.8, second))
    )
    assert scores == [max(score, 0.9), 0.8]
    assert (masks[1] == second).all()
    assert (masks[0] == (first if score < 0.9 else first | second)).all()


@pytest.mark.parametrize("score", [0.95, 0.85, 0.3])
def test_a_blob_does_not_swallow_neighbours_in_two_tiles(score) -> None:
    # In each tile it covers all that the tile shows; but what no border cuts ends there.
    first, second = paint((18, 5, 42, 15)), paint((58, 5, 80, 15))
    blob = look(WHOLE, (score, first | second))
    scores, masks = merge(blob, look(LEFT, (0.9, first)), look(RIGHT, (0.8, second)))
    assert scores[-1] == 0.8 and len(scores) == 2
    assert (masks[1] == second).all()


def test_the_neighbour_that_agrees_more_joins() -> None:
    first, second = paint((10, 5, 30, 15)), paint((22, 5, 38, 15))
    coarse = paint((9, 5, 30, 15))  # IoU 0.95 with the first, 0.28 with the second
    scores, masks = merge(look(WHOLE, (0.9, coarse)), look(LEFT, (0.8, second), (0.6, first)))
    assert scores == [0.9, 0.8]
    assert (masks == [coarse, second]).all()
    coarse = paint((12, 5, 36, 15))  # 0.69 and 0.54
    scores, masks = merge(look(WHOLE, (0.9, coarse)), look(LEFT, (0.8, second), (0.8, first)))
    assert scores == [0.9, 0.8]
    assert (masks == [coarse, second]).all()


def test_a_faint_double_does_not_take_the_place_of_the_object() -> None:
    exact, rough = paint((46, 5, 54, 13)), paint((46, 5, 54, 12))
    scores, _ = merge(look(LEFT, (0.9, exact)), look(RIGHT, (0.8, rough), (0.01, exact)))
    assert scores == [0.9, 0.01]


def test_prompts_are_merged_apart() -> None:
    mask = paint((46, 5, 54, 13))
    merged = merge_views(
        [look(LEFT, (0.9, mask, 2), (0.4, mask, 1)), look(RIGHT, (0.8, mask, 1))], WIDTH, HEIGHT
    )
    assert merged["category_id"].tolist() == [2, 1]
    assert merged["score"].tolist() == [0.9, 0.8]


def test_nothing_found_is_nothing_merged() -> None:
    merged = merge_views([look(WHOLE), *(look(tile) for tile in TILES)], WIDTH, HEIGHT)
    assert merged["boxes_xyxy"].shape == (0, 4)
    assert merged["rles"] == [] and len(merged["score"]) == 0


def test_boxes_are_merged_where_there_are_no_masks() -> None:
    wide, small = paint((10, 5, 90, 15)), paint((46, 20, 52, 26))
    rows = (0.9, wide), (0.5, small)
    merged = merge_views(
        [look(LEFT, *rows, masks=False), look(RIGHT, *rows, masks=False)], WIDTH, HEIGHT
    )
    assert merged["rles"] is None
    assert merged["score"].tolist() == [0.9, 0.5]
    assert merged["boxes_xyxy"].tolist() == [[10, 5, 90, 15], [46, 20, 52, 26]]


# A model ------------------------------------------------------------------------------------------


@pytest.mark.scripts
def test_each_view_is_seen_once_and_the_best_of_all_are_kept(loaded, monkeypatch) -> None:
    forward = Forward(*loaded)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    encoded = []
    encode = Forward.encode

    def counted(self, batch):
        encoded.append(batch["images"])
        return encode(self, batch)

    monkeypatch.setattr(Forward, "encode", counted)
    prompts = prediction.Prompts(["a", "b", "c"], [], [])
    found = prediction.search(forward, pixels, prompts, 2, 5, 2.0, 0.6)
    assert len(encoded) == 5
    assert len(found["score"]) == 5
    left, top, right, bottom = TILES[-1]
    tile = pixels[top:bottom, left:right]
    side = encoded[0].shape[-1]
    assert (encoded[-1] == prediction.make_batch(tile, prompts, side)["images"]).all()
    # Each view's best five are enough for the best five of all.
    everything = prediction.search(forward, pixels, prompts, 2, 1000, 0.0, 0.6)
    assert found["score"].tolist() == everything["score"][:5].tolist()
    kept, best = prediction.find(forward, pixels, prompts, [1.0] * 3, 2, 0.6)
    first = everything["category_id"][0] - 1, everything["score"][0]
    assert len(kept["score"]) == 0 and best == first
    with pytest.raises(ValueError, match="no box prompts"):
        boxed = prediction.Prompts(["a"], [[1.0, 1, 9, 9]], [1])
        prediction.search(forward, pixels, boxed, 2, 5, 0.5, 0.6)


# The scripts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_dir(write_split, tmp_path_factory):
    """Three images of 96 x 64 pixels, of which two have objects."""
    return write_split(tmp_path_factory.mktemp("data"), 3)


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    """An adapter that changes nothing."""
    path = tmp_path_factory.mktemp("adapter") / "lora_weights.pt"
    model, _ = load_model(str(tiny_model_dir))
    lora = LoRAConfig(rank=2, target_modules=("v_proj",), components=("detr_decoder",))
    apply_lora(model, lora)
    assert lora_modules(model)
    checkpoint.save_adapter(
        path, model, lora, base_model=str(tiny_model_dir), geometry_cls="hf", categories={}
    )
    return path


@pytest.mark.scripts
def test_inference_in_tiles(tiny_model_dir, data_dir, tmp_path, capsys) -> None:
    argv = ["--image", data_dir / "val" / "images" / "0.png", "--text_prompt", "a", "b"]
    argv += ["--model_name", tiny_model_dir, "--device", "cpu", "--threshold", 0, "--save_masks"]
    argv += ["--tile", 0.6, "--output", tmp_path / "x.png"]
    assert inference.main([str(word) for word in argv]) == 0
    rows = json.loads((tmp_path / "x_detections.json").read_text())
    # More than the 16 queries of each prompt, no more than those of five views.
    assert 2 * 16 < len(rows) <= 5 * 2 * 16
    assert str(len([row for row in rows if row["prompt"] == "a"])) in capsys.readouterr().out
    assert all(row["segmentation"]["size"] == [64, 96] for row in rows)
    with Image.open(tmp_path / "x_masks" / "001.png") as mask:
        assert mask.size == (96, 64)


@pytest.mark.scripts
def test_evaluation_in_tiles(adapter, data_dir, tmp_path, capsys) -> None:
    argv = ["--lora_weights", adapter, "--data_dir", data_dir, "--device", "cpu"]
    argv = [str(word) for word in [*argv, "--num_workers", 0, "--max_detections", 20]]
    assert evaluate_sam3_lora.main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    tiled = ["--tile", "0.6", "--compare", "--output_dir", str(tmp_path / "tiled")]
    assert evaluate_sam3_lora.main([*argv, *tiled]) == 0
    assert "difference" in capsys.readouterr().out
    whole, tiles = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "tiled")
    )
    assert whole["losses"] and "tile" not in whole
    assert tiles["losses"] == tiles["base"]["losses"] == {}
    assert tiles["tile"] == tiles["base"]["tile"] == 0.6
    assert tiles["counts"]["images"] == 3
    # The adapter changes nothing.
    assert tiles["bbox"] == tiles["base"]["bbox"] and tiles["segm"] == tiles["base"]["segm"]
    found = json.loads((tmp_path / "tiled" / "detections.json").read_text())
    assert found == json.loads((tmp_path / "tiled" / "base_detections.json").read_text())
    assert found != json.loads((tmp_path / "whole" / "detections.json").read_text())
    best = {image: 0 for image in (1, 2, 3)}
    for row in found:
        best[row["image_id"]] += 1
    assert all(count >= 20 for count in best.values())


@pytest.mark.scripts
def test_without_tiles_the_same_is_found_as_in_batches(adapter, data_dir, tmp_path) -> None:
    argv = ["--lora_weights", adapter, "--data_dir", data_dir, "--device", "cpu", "--base"]
    argv += ["--num_workers", 0, "--output_dir", tmp_path]
    assert evaluate_sam3_lora.main([str(word) for word in argv]) == 0
    args = evaluate_sam3_lora.build_parser().parse_args([str(word) for word in argv])
    split, options = read_split(data_dir / "val"), evaluate_sam3_lora.config_from_args(args)
    forward, *_ = evaluate_sam3_lora.build_forward(args, options, split)
    limits = {"max_rows": 8, "max_detections": 100, "score_threshold": 0.5}
    summary, results = prediction.evaluate_tiles(forward, split, split.images, None, **limits)
    assert results == json.loads((tmp_path / "detections.json").read_text())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert json.loads(json.dumps(summary["segm"])) == metrics["segm"]


@pytest.mark.parametrize("value", ["0", "1e-9", "1", "nan", "half"])
@pytest.mark.parametrize("script", [inference, evaluate_sam3_lora])
def test_a_share_that_makes_no_tiles_is_refused(script, value, capsys) -> None:
    needed = ["--image", "a.png"] if script is inference else []
    assert script.main(["--tile", value, *needed]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--tile" in line and f"found '{value}'" in line


def test_box_prompts_and_tiles_are_refused(tmp_path, capsys) -> None:
    argv = ["--image", str(tmp_path), "--bboxes", "[[1, 2, 30, 40]]", "--tile", "0.5"]
    assert inference.main([*argv, "--text_prompt", "bus"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --tile") and "--bboxes" in line


@pytest.mark.scripts
def test_tiles_find_more_of_a_crowd(capsys) -> None:
    argv = ["--model_name", str(ROOT / "demo" / "sam3_tiny"), "--pictures", "1", "--tile", "0.6"]
    assert load("tiles").main([*argv, "--scenes", "2"]) == 0
    (rows,) = tables(capsys.readouterr().out)
    assert [row["views"] for row in rows] == ["1", "5"]
    assert float(rows[1]["recall"]) > float(rows[0]["recall"]) + 0.3
