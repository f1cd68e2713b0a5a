"""What the demo model is made with: its tokenizer, and the batches it is pretrained on."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Sam3Model, Sam3Processor

from sam3_lora import scenes
from sam3_lora.coco import encode_mask, mask_iou
from sam3_lora.dataset import OUT_OF_DOMAIN_WORDS
from sam3_lora.evaluation import load_forward
from sam3_lora.forward import PADDING_BOX
from sam3_lora.model import load_model
from sam3_lora.prediction import Prompts, find
from sam3_lora.scenes import Scene, draw_shapes, shape_prompts

SHIPPED = Path(__file__).resolve().parent.parent / "demo" / "sam3_tiny"
KINDS = [("striped", "red", "ring"), ("plain", "red", "circle"), ("striped", "red", "ring")]


def test_a_word_that_the_model_learns_is_one_token_and_others_are_bytes(demo_model):
    tokenizer = demo_model.make_tokenizer()
    for word in ("visual", *(word for words in scenes.WORDS for word in words)):
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert tokenizer.tokenize("Red cup") == ["red</w>", "c", "u", "p</w>"]
    assert len(tokenizer.tokenize("Ж")) == 2  # bytes of UTF-8
    assert tokenizer("red")["input_ids"][-1] == tokenizer.eos_token_id


def test_the_vocabulary_widens_and_absent_prompts_are_absent(pretraining):
    seen: dict[float, set] = {0.0: set(), 1.0: set()}
    for progress, texts in seen.items():
        for seed in range(400):
            rng = np.random.default_rng(seed)
            prompt = pretraining.draw_prompt(rng, KINDS, progress, ("anvil",))
            text, objects = prompt["text"], prompt["objects"]
            texts.add(text)
            if not prompt["boxes"]:
                answering = [g for g, kind in enumerate(KINDS) if text in scenes.phrases(kind)]
                assert objects == answering
    assert seen[0.0] == {*scenes.TEXTURES, *scenes.COLOURS, "anvil"}
    assert seen[1.0] <= {*shape_prompts(), "anvil", None}
    assert {"ring", "red ring", "square", "anvil", None} < seen[1.0]


def test_an_exemplar_asks_for_its_kind_and_a_negative_one_takes_its_kind_out(pretraining):
    shown = {"visual": 0, "text": 0, "refused": 0}
    for seed in range(300):
        prompt = pretraining.draw_prompt(np.random.default_rng(seed), KINDS, 1.0, ("anvil",))
        if not prompt["boxes"]:
            continue
        (boxed, positive), *negative = prompt["boxes"]
        assert positive == 1 and all(label == 0 for _, label in negative)
        assert boxed in prompt["objects"]
        assert all(KINDS[g] != KINDS[boxed] for g, _ in negative)
        if prompt["text"] is None:
            assert prompt["objects"] == [g for g, k in enumerate(KINDS) if k == KINDS[boxed]]
            shown["visual"] += 1
        elif negative:
            refused = KINDS[negative[0][0]]
            assert all(KINDS[g] != refused for g in prompt["objects"])
            shown["refused"] += 1
        else:
            shown["text"] += 1
    assert min(shown.values()) > 5


@pytest.fixture
def pretraining(demo_model):
    """The module that trains what the script writes."""
    return sys.modules["pretraining"]


def test_a_batch_of_scenes_has_targets_names_and_padded_boxes(pretraining, monkeypatch):
    mask = np.zeros((2, 224, 224), bool)
    mask[0, 20:100, 40:120], mask[1, 120:180, 100:200] = True, True
    kinds = [("plain", "blue", "square"), ("striped", "yellow", "ring")]
    scene = Scene(np.zeros((224, 224, 3), np.uint8), mask, kinds)
    monkeypatch.setattr(pretraining, "draw_shapes", lambda rng: scene)
    *_, batch = pretraining.scene_batches(0, 3, 112)
    rows = pretraining.IMAGES * pretraining.PROMPTS
    assert batch["images"].shape == (pretraining.IMAGES, 3, 112, 112)
    assert len(batch["texts"]) == len(batch["targets"]) == rows
    expected = torch.tensor([[40 / 112, 30 / 112, 40 / 112, 40 / 112]])
    torch.testing.assert_close(pretraining.boxes_of(torch.tensor(mask[:1, ::2, ::2])), expected)
    labels = batch["labels"][0]
    assert labels[:, 30, 40].tolist() == [1, 3, 2]  # plain, blue, square
    assert labels[:, 75, 75].tolist() == [2, 4, 4]  # striped, yellow, ring
    assert labels[:, 0, 0].tolist() == [0, 0, 0]
    prompts, signs = batch["box_prompts_cxcywh"], batch["box_prompt_labels"]
    assert prompts.shape == (rows, signs.shape[1], 4)
    assert set(signs.flatten().tolist()) <= {1, 0, PADDING_BOX}
    assert (signs == 1).any(1).sum() > 0
    for box, named in zip(prompts[signs >= 0], batch["box_prompt_kinds"][signs >= 0], strict=True):
        assert named.tolist() == ([1, 3, 2] if torch.allclose(box, expected) else [2, 4, 4])
    assert not batch["box_prompt_kinds"][signs == PADDING_BOX].any()
    for text, target in zip(batch["texts"], batch["targets"], strict=True):
        assert len(target["masks"]) == len(target["boxes_cxcywh"]) == len(target["has_mask"])
        assert text not in OUT_OF_DOMAIN_WORDS or not len(target["masks"])


@pytest.mark.scripts
@pytest.mark.filterwarnings("ignore:.*")
def test_pretraining_moves_every_part_and_leaves_a_folder_that_loads(
    demo_model, pretraining, monkeypatch, tmp_path
):
    monkeypatch.setattr(pretraining, "IMAGES", 2)
    folder = demo_model.make_tiny(tmp_path, "tiny112")
    before = load_model(str(folder))[0].state_dict()
    pretraining.pretrain(folder, None, 2, 1e-3, seed=0, device="cpu", box_share=1.0)
    after = load_model(str(folder))[0].state_dict()
    assert before.keys() == after.keys()
    still = {name for name in before if torch.equal(before[name], after[name])}
    moved = {name.split(".")[0] for name in before.keys() - still}
    assert moved >= {"vision_encoder", "text_encoder", "detr_encoder", "detr_decoder"}
    assert moved >= {"geometry_encoder", "mask_decoder", "dot_product_scoring"}


@pytest.mark.scripts
def test_a_model_takes_over_what_does_not_begin_anew(demo_model, pretraining, tmp_path):
    earlier = load_model(str(demo_model.make_tiny(tmp_path / "earlier", "tiny112", seed=1)))[0]
    model = load_model(str(demo_model.make_tiny(tmp_path / "fresh", "tiny112")))[0]
    fresh = model.geometry_encoder.boxes_direct_project.weight.clone()
    pretraining.take_over(model, tmp_path / "earlier", ["geometry_encoder"])
    assert torch.equal(model.geometry_encoder.boxes_direct_project.weight, fresh)
    for name, value in earlier.state_dict().items():
        assert name.startswith("geometry_encoder") or torch.equal(model.state_dict()[name], value)
    assert demo_model.main(["--output_dir", str(tmp_path / "new"), "--renew", "geometry"]) == 2


def test_the_shipped_folder_loads_as_the_hub_s_would_and_is_small():
    model = Sam3Model.from_pretrained(SHIPPED)
    processor = Sam3Processor.from_pretrained(SHIPPED)
    image = draw_shapes(np.random.default_rng(0)).image
    inputs = processor(images=image, text="red circle", return_tensors="pt")
    outputs = model(**inputs)
    assert outputs.pred_masks.shape[:2] == outputs.pred_logits.shape
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*")) < 12e6


@pytest.mark.scripts
def test_the_shipped_model_finds_what_it_is_asked_for_and_nothing_else():
    forward = load_forward(str(SHIPPED), "meta", "cpu", "no")
    prompts = ["red", "circle", "striped", "blue square", "anvil"]
    right = false = objects = 0
    for seed in range(30):
        scene = draw_shapes(np.random.default_rng((7, seed)))
        asked = Prompts(prompts, [], [])
        found, _ = find(forward, scene.image, asked, [0.5] * len(prompts), max_rows=8)
        for row, prompt in enumerate(prompts):
            wanted = [g for g, kind in enumerate(scene.kinds) if prompt in scenes.phrases(kind)]
            rles = [
                r
                for r, own in zip(found["rles"], found["category_id"] - 1, strict=True)
                if own == row
            ]
            truth = [encode_mask(scene.masks[g]) for g in wanted]
            hits = int((mask_iou(rles, truth) > 0.5).any(0).sum())
            right, false, objects = right + hits, false + len(rles) - hits, objects + len(truth)
    assert right > 0.8 * objects > 50
    assert false < 0.2 * objects
