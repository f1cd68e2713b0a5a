"""Prompts on a photo: the batch they make, what is kept of the detections."""

import json

import numpy as np
import torch
from PIL import Image

from sam3_lora import prediction
from sam3_lora.coco import encode_mask, read_split
from sam3_lora.dataset import PromptDataset


def test_the_canvas_is_that_of_evaluation(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    record = {"id": 1, "file_name": "a.png", "width": 96, "height": 64}
    content = {
        "images": [record],
        "annotations": [],
        "categories": [{"id": 1, "name": "x"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
    item = PromptDataset(read_split(tmp_path), 112, 16, train=False)[0, 0]
    prompts = prediction.Prompts(["x", "y"], [[24.0, 16.0, 72.0, 32.0]], [0])
    batch = prediction.make_batch(pixels, prompts, 112)
    assert torch.equal(batch["images"][0], item["image"])
    expected = torch.tensor([[[0.5, 0.375, 0.5, 0.25]]] * 2)
    assert torch.allclose(batch["box_prompts_cxcywh"], expected)
    assert batch["box_prompt_labels"].tolist() == [[0], [0]]


def detections(*rows) -> dict:
    """Detections (category, score, box) on a 20 x 20 image, each mask its box."""
    masks = np.zeros((len(rows), 20, 20), dtype=bool)
    for mask, (_, _, (x1, y1, x2, y2)) in zip(masks, rows, strict=True):
        mask[y1:y2, x1:x2] = True
    return {
        "category_id": np.array([row[0] for row in rows]),
        "score": np.array([row[1] for row in rows]),
        "boxes_xyxy": np.array([row[2] for row in rows], dtype=float),
        "rles": [encode_mask(mask) for mask in masks],
    }


def test_suppress_drops_overlaps_of_the_same_prompt() -> None:
    found = detections(
        (1, 0.9, (0, 0, 10, 10)),
        (2, 0.8, (0, 0, 10, 10)),
        (1, 0.7, (0, 0, 10, 8)),  # IoU 0.8 with the first
        (1, 0.6, (5, 0, 15, 10)),  # 1/3
    )
    kept = prediction.suppress(found, 0.5)
    assert kept["score"].tolist() == [0.9, 0.8, 0.6]
    assert kept["rles"] == [found["rles"][i] for i in (0, 1, 3)]
    assert prediction.suppress(found, 0.8)["score"].tolist() == [0.9, 0.8, 0.7, 0.6]
    assert prediction.suppress(found, 0.3)["score"].tolist() == [0.9, 0.8]
    assert len(prediction.suppress(detections(), 0.5)["score"]) == 0


def test_keep_boxed_keeps_what_lies_in_a_box() -> None:
    found = detections(
        (1, 0.9, (2, 2, 6, 6)),  # inside the first
        (1, 0.8, (6, 0, 14, 10)),  # half in the first
        (1, 0.7, (7, 0, 15, 10)),  # 3/8 in it
        (1, 0.6, (0, 0, 20, 20)),  # around it
        (1, 0.5, (16, 16, 20, 20)),  # the second
    )
    boxes = np.array([[0.0, 0, 10, 10], [15, 15, 20, 20]])
    assert prediction.keep_boxed(found, boxes)["score"].tolist() == [0.9, 0.8, 0.5]
    found["boxes_xyxy"] = np.empty((0, 4))
    empty = prediction.take(found, [])
    assert len(prediction.keep_boxed(empty, boxes)["rles"]) == 0
