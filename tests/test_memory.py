"""The prediction of peak memory, held against tracked steps of the tiny model on the CPU."""

import gc
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from lora_layers import COMPONENTS, LoRAConfig, apply_lora, count_parameters
from sam3_lora import engine, losses, memory
from sam3_lora.forward import Forward
from sam3_lora.losses import compute_losses, count_targets
from sam3_lora.model import (
    ModelError,
    image_size,
    load_meta_model,
    load_model,
    train_adapted,
)

MINIMAL = LoRAConfig(rank=8, alpha=16, components=("detr_decoder",))
FULL = LoRAConfig(
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"), components=COMPONENTS
)
pytestmark = pytest.mark.scripts  # each trace takes a second or more

SIZES = {"images": 2, "prompts": 4, "max_rows": 4}
OBJECTS = 2
# Bytes of a tensor beyond what it holds: blocks are rounded up, and there are two or three hundred.
ROUNDING = 400 * memory.BLOCK


def describe(folder, lora, **settings):
    """A forward on the adapted structure of the tiny model."""
    model, _ = load_meta_model(str(folder))
    apply_lora(model, lora)
    return Forward(model, None, **{"one_to_many": True, **settings})


@cache
def predict(folder, lora, checkpointing="off", dtype=torch.float32, **changes):
    """`memory.predict` for `SIZES` but for the changes; each prediction is made once."""
    forward = describe(folder, lora, checkpointing=checkpointing, dtype=dtype)
    return memory.predict(forward, **SIZES | {"objects": OBJECTS} | changes)


def make_batch(side):
    rows = SIZES["images"] * SIZES["prompts"]
    masks = torch.zeros(OBJECTS, side, side, dtype=torch.bool)
    masks[:, side // 4 : side // 2, side // 4 : side // 2] = True
    target = {
        "boxes_cxcywh": torch.tensor([[0.375, 0.375, 0.25, 0.25]] * OBJECTS),
        "masks": masks,
        "has_mask": torch.ones(OBJECTS, dtype=torch.bool),
        "complete": torch.tensor(True),
    }
    return {
        "images": torch.zeros(SIZES["images"], 3, side, side, dtype=torch.uint8),
        "image_ids": list(range(SIZES["images"])),
        "image_index": torch.arange(SIZES["images"]).repeat_interleave(SIZES["prompts"]),
        "texts": [str(row) for row in range(rows)],
        "targets": [target] * rows,
    }


def tracked_peak(folder, lora, checkpointing):
    """Bytes at the peak of a real second step, and of what lay there before it."""
    model, tokenizer = load_model(str(folder))
    apply_lora(model, lora)
    train_adapted(model)
    forward = Forward(model, tokenizer, one_to_many=True, checkpointing=checkpointing)
    forward._groups = lambda tensor, component: (tensor,)  # as on a GPU
    batch = make_batch(image_size(model))
    forward.release_text_encoder(batch["texts"])
    optimizer = engine.build_optimizer(model, 1e-4, 0.01)

    def step():
        return list(
            engine.train_one_epoch(
                forward, compute_losses, count_targets, [batch], optimizer, lambda step: 1.0,
                limits=engine.Limits(SIZES["images"], SIZES["max_rows"]),
            )
        )  # fmt: skip

    step()
    optimizer.zero_grad()
    gc.collect()
    with memory.Tracker() as tracker:
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_meta:
                tracker.add(tensor)
        before = tracker.live
        step()
    return tracker.peak, before


@pytest.mark.parametrize(("lora", "checkpointing"), [(MINIMAL, "off"), (FULL, "full")])
def test_prediction_is_near_a_tracked_step(tiny_model_dir, lora, checkpointing):
    parts = predict(tiny_model_dir, lora, checkpointing)
    peak, before = tracked_peak(tiny_model_dir, lora, checkpointing)
    assert parts["weights"] + parts["adapters"] == pytest.approx(before, abs=ROUNDING)
    static = ("weights", "adapters", "optimizer")  # the optimizer's state is not tracked
    predicted = parts["peak"] - sum(parts[name] for name in static)
    assert predicted == pytest.approx(peak - before, rel=0.15)


@pytest.mark.parametrize("mask_loss", ["full", "native", "points"])
def test_rows_that_are_alike_are_traced_once(tiny_model_dir, monkeypatch, mask_loss):
    forward, drawn = describe(tiny_model_dir, MINIMAL), []
    original = losses.focal_and_dice

    def counted(*args):
        drawn.append(len(args))  # not the maps themselves, which would stay
        return original(*args)

    monkeypatch.setattr(losses, "focal_and_dice", counted)
    settings = SIZES | {"objects": OBJECTS, "mask_loss": mask_loss}
    parts = memory.predict(forward, **settings)
    assert len(drawn) == 3  # of both branches and the semantic map
    monkeypatch.setattr(memory, "KeptByMasks", losses.MaskLosses)
    assert memory.predict(forward, **settings) == parts
    assert len(drawn) == 3 + 3 * SIZES["max_rows"]


def test_parts_are_exact_and_sum_up(tiny_model_dir):
    parts = predict(tiny_model_dir, FULL, "full")
    model = describe(tiny_model_dir, FULL).model
    trainable, base = count_parameters(model)
    tensors = sum(1 for name, _ in model.named_parameters() if "lora_" in name)
    for name, factor in (("adapters", 1), ("gradients", 1), ("optimizer", 2)):
        surplus = parts[name] - 4 * factor * trainable
        assert 0 <= surplus < factor * tensors * memory.BLOCK
    assert 0 <= parts["weights"] - 4 * base < ROUNDING
    assert sum(parts[name] for name in memory.PARTS) == parts["peak"]
    assert parts["peak"] == max(parts[phase] for phase in memory.PHASES)


def test_frozen_text_encoder_is_not_counted_and_bf16_halves_towers(tiny_model_dir):
    model = describe(tiny_model_dir, MINIMAL).model
    text = sum(p.numel() for p in model.text_encoder.parameters())
    towers = [*model.vision_encoder.parameters(), *model.text_projection.parameters()]
    weights = predict(tiny_model_dir, MINIMAL)["weights"]
    assert weights == pytest.approx(4 * (count_parameters(model)[1] - text), abs=ROUNDING)
    half = predict(tiny_model_dir, MINIMAL, dtype=torch.bfloat16)["weights"]
    assert weights - half == pytest.approx(2 * sum(p.numel() for p in towers), abs=ROUNDING)
    # A backbone whose features come from the cache rests on the CPU.
    backbone = sum(p.numel() for p in model.vision_encoder.backbone.parameters())
    rest = predict(tiny_model_dir, MINIMAL, dtype=torch.bfloat16, cached=("trunk",))["weights"]
    assert half - rest == pytest.approx(2 * backbone, abs=ROUNDING)


def test_more_of_anything_takes_more(tiny_model_dir):
    peak = predict(tiny_model_dir, MINIMAL)["peak"]
    assert predict(tiny_model_dir, MINIMAL, max_rows=8)["peak"] > peak
    assert predict(tiny_model_dir, replace(MINIMAL, rank=64))["peak"] > peak
    assert predict(tiny_model_dir, MINIMAL, images=7)["peak"] > peak


def test_checkpointing_of_the_vision_encoder_takes_less(tiny_model_dir):
    lora = LoRAConfig(dropout=0.1, components=("vision_encoder",))
    sizes = {"images": 1, "prompts": 1}
    peaks = [
        predict(tiny_model_dir, lora, mode, torch.bfloat16, **sizes)
        for mode in memory.CHECKPOINTING
    ]
    off, mlp, full = (parts["vision_backward"] for parts in peaks)
    assert full < mlp < off


def test_nothing_of_a_prediction_stays(tiny_model_dir):
    attention, norm = F.scaled_dot_product_attention, F.layer_norm
    model, tokenizer = load_model(str(tiny_model_dir))
    forward = Forward(model, tokenizer, masks=False)
    batch = make_batch(image_size(model))
    before = forward(batch)["logits"]
    apply_lora(model, MINIMAL)
    memory.predict(forward, **SIZES)
    assert F.scaled_dot_product_attention is attention and F.layer_norm is norm
    assert not model.training
    assert torch.equal(forward(batch)["logits"], before)


def test_fit_and_largest_batch_agree_with_predict(tiny_model_dir):
    sizes = {name: SIZES[name] for name in ("prompts", "max_rows")}
    peak_at = memory.fit(describe(tiny_model_dir, MINIMAL), objects=OBJECTS, **sizes)
    exact = predict(tiny_model_dir, MINIMAL, images=7)["peak"]
    assert peak_at(7) == pytest.approx(exact, rel=0.01)
    budgets = [10**6, 50 * 10**6, 100 * 10**6, 200 * 10**6]
    found = [memory.largest_batch(peak_at, budget) for budget in budgets]
    assert found[0] == 0 and found == sorted(set(found))
    for budget, images in zip(budgets[1:], found[1:], strict=True):
        assert peak_at(images) <= memory.usable(budget) < peak_at(images + 1)


def test_checkpointing_is_chosen_by_what_fits():
    peaks = {"off": 80, "mlp": 60, "full": 20}
    chosen = [memory.choose_checkpointing(peaks.__getitem__, free) for free in (100, 80, 60, 10)]
    assert chosen == ["off", "mlp", "full", "full"]


def test_dry_run_says_what_is_adapted_and_what_fits(tiny_model_dir, monkeypatch):
    parts = dict.fromkeys((*memory.PARTS, *memory.PHASES, "peak"), 10**9)

    def stub(forward, *, images, **_):
        return parts | {"heads": images * (4 if forward.checkpointing == "off" else 2) * 10**9}

    monkeypatch.setattr(memory, "predict", stub)
    forward = describe(tiny_model_dir, MINIMAL)
    text = memory.dry_run_text(forward, images=4, prompts=4, max_rows=4, stands_in=True)
    assert "detr_decoder.layers.*.self_attn.(q_proj|k_proj|v_proj|o_proj)  8 layers" in text
    assert "default configuration" in text
    rows = [line.split() for line in text.splitlines() if " GiB" in line]
    assert [int(row[0]) for row in rows] == list(memory.CARDS)
    assert [row[2:] for row in rows[:3]] == [
        ["1", "1", "3", "none"],
        ["2", "2", "5", "full"],
        ["3", "3", "7", "full"],
    ]
    assert rows[-1][-1] == "off"


def test_structure_needs_the_config_alone(tiny_model_dir, tiny_hub_dir, tmp_path):
    for folder in (tiny_model_dir, tiny_hub_dir):
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        model, stands_in = load_meta_model(str(tmp_path))
        real, _ = load_model(str(folder))
        assert not stands_in and not any(p.requires_grad for p in model.parameters())
        shapes = {name: tensor.shape for name, tensor in real.state_dict().items()}
        assert {n: t.shape for n, t in model.state_dict().items()} == shapes
        assert all(p.is_meta for p in model.parameters())


def test_published_structure_stands_in_for_its_config_alone(tmp_path):
    model, stands_in = load_meta_model("facebook/sam3")  # tests are offline
    assert stands_in and sum(p.numel() for p in model.parameters()) == 840_376_374
    for name in ("someone/sam3", str(tmp_path)):
        with pytest.raises(ModelError, match="expected config.json|no folder someone/sam3"):
            load_meta_model(name)
