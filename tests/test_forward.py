"""What the forward pass computes once, computes again, or is given."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lora_layers import LoRAConfig, apply_lora, lora_modules, remove_lora
from sam3_lora.forward import Forward

TEXTS = ["red part", "a blue part with a long name", "dent", "red part"]
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
TRAINED = ("vision_encoder", "detr_encoder", "detr_decoder", "mask_decoder")


def make_batch(images: int = 2) -> dict:
    """Random images with two prompts each."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (images, 3, 112, 112), generator=generator, dtype=torch.uint8)
    texts = (TEXTS * images)[: 2 * images]
    return {"images": pixels, "texts": texts, "image_index": torch.arange(2 * images) // 2}


@pytest.fixture
def adapt(loaded):
    """`adapt(components) -> model` with adapters that do something; taken off after the test."""
    model = loaded[0]

    def put(*components: str):
        apply_lora(
            model, LoRAConfig(4, 8.0, 0.0, PARTS[: 4 if "mask" in components else 6], components)
        )
        torch.manual_seed(5)
        for _, module in lora_modules(model):
            module.lora_B.data = 0.1 * torch.randn_like(module.lora_B)
        return model

    yield put
    remove_lora(model)
    model.requires_grad_(False)


def gradients(forward: Forward, batch: dict) -> dict[str, torch.Tensor]:
    """Gradients of the adapters for a sum over all outputs."""
    forward.model.zero_grad()
    outputs = forward(batch)
    sum(
        (v.float() * torch.linspace(0.5, 1, v.numel()).view_as(v)).sum() for v in outputs.values()
    ).backward()
    return {n: p.grad.clone() for n, p in forward.model.named_parameters() if p.grad is not None}


def kept_bytes(forward: Forward, batch: dict) -> int:
    """Bytes of the distinct storages that the backward pass would read."""
    seen = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in forward.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = forward(batch)
        seen.update()
    assert outputs["logits"].requires_grad
    return sum(size for pointer, size in seen.items() if pointer not in weights)


def test_a_frozen_text_encoder_reads_each_prompt_once(loaded, monkeypatch):
    model, tokenizer = loaded
    forward, calls = Forward(model, tokenizer), []
    read = model.get_text_features
    monkeypatch.setattr(model, "get_text_features", lambda **k: calls.append(k) or read(**k))
    first = forward.encode(make_batch())
    again = forward.encode(make_batch() | {"texts": ["dent", *TEXTS[:3]]})
    assert len(calls) == 3
    assert list(first["text_index"]) == [0, 1, 2, 0]
    # The same bits in another company.
    assert torch.equal(first["text"][2], again["text"][0])
    assert torch.equal(first["text_mask"][2], again["text_mask"][0])


def test_an_adapted_text_encoder_reads_prompts_each_time(loaded, adapt):
    forward = Forward(adapt("text_encoder"), loaded[1])
    first = forward.encode(make_batch())["text"]
    assert first.requires_grad and not forward.texts
    for _, module in lora_modules(forward.model):
        module.lora_B.data *= 2
    assert not torch.allclose(first, forward.encode(make_batch())["text"])


def test_a_released_text_encoder_leaves_what_it_has_read(demo_model, tmp_path):
    from sam3_lora.model import load_model

    model, tokenizer = load_model(str(demo_model.make_tiny(tmp_path / "model")))
    whole = Forward(model, tokenizer)(make_batch())
    forward = Forward(model, tokenizer)
    forward.release_text_encoder(TEXTS)
    assert {p.device.type for p in model.text_encoder.parameters()} == {"meta"}
    assert torch.equal(forward(make_batch())["logits"], whole["logits"])
    with pytest.raises(RuntimeError, match="released before it had read .'unread'"):
        forward.encode(make_batch() | {"texts": ["unread"] * 4})


@pytest.mark.parametrize("mode", ["mlp", "full"])
def test_checkpointing_keeps_less_and_changes_no_gradient(loaded, adapt, mode):
    model, batch = adapt(*TRAINED), make_batch()
    plain = gradients(Forward(model, loaded[1], one_to_many=True), batch)
    kept = kept_bytes(Forward(model, loaded[1], one_to_many=True), batch)
    forward = Forward(model, loaded[1], one_to_many=True, checkpointing=mode)
    again = gradients(forward, batch)
    assert len(plain) == 2 * len(list(lora_modules(model)))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    # What goes into the GELU and comes out: 4 layers of 2 x 64 tokens x 128, fp32.
    saved = {"mlp": 2 * 4 * 2 * 64 * 128 * 4, "full": kept // 2}[mode]
    assert kept - kept_bytes(forward, batch) >= saved


def test_checkpointing_can_be_changed(loaded, adapt):
    model, batch = adapt(*TRAINED), make_batch()
    kept = kept_bytes(Forward(model, loaded[1]), batch)
    Forward(model, loaded[1], checkpointing="mlp")
    assert kept_bytes(Forward(model, loaded[1]), batch) == kept


def test_only_the_levels_that_are_read_are_made(loaded):
    assert set(Forward(*loaded, masks=False).encode(make_batch())) == {
        *("fpn_2", "geometry", "text", "text_mask", "text_index")
    }
    assert "geometry" not in Forward(*loaded, geometry_cls="hf").encode(make_batch())


@pytest.mark.parametrize("given", ["trunk", "memory"])
def test_what_is_given_is_not_computed_and_changes_no_bit(loaded, adapt, given, monkeypatch):
    components = ("detr_encoder", "detr_decoder") if given == "trunk" else ("detr_decoder",)
    forward, batch = Forward(adapt(*components), loaded[1], one_to_many=True), make_batch()
    plain = gradients(forward, batch)
    with torch.no_grad():
        cached = dict(batch)
        # Alone, as they come from a cache.
        trunks = [forward.encode_trunk(image) for image in cached.pop("images").split(1)]
        cached["trunk"] = torch.cat(trunks)
        if given == "memory":
            alone = [
                {"trunk": trunk, "texts": batch["texts"][2 * i : 2 * i + 2]}
                | {"image_index": torch.zeros(2, dtype=torch.long)}
                for i, trunk in enumerate(trunks)
            ]
            features = [forward.encode(one) for one in alone]
            memory = [
                forward.fuse(f, one, slice(r, r + 1))[0]
                for f, one in zip(features, alone, strict=True)
                for r in range(2)
            ]
            cached["memory"] = torch.cat(memory)
            cached["geometry"] = torch.cat([f["geometry"] for f in features])
            monkeypatch.setattr(Forward, "_encode_detr", None)
        monkeypatch.setattr(Forward, "encode_trunk", None)
    again = gradients(forward, cached)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.scripts
def test_compiled_it_is_one_graph_a_part_with_no_break(loaded, adapt, monkeypatch):
    dynamo, stats = torch._dynamo, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, batch = adapt(*TRAINED), make_batch()
    plain = gradients(Forward(model, loaded[1], one_to_many=True), batch)
    dynamo.reset()
    stats.clear()
    forward = Forward(model, loaded[1], one_to_many=True, compiled=True)
    again = gradients(forward, batch)
    gradients(replace(forward), batch)
    assert stats["stats"]["unique_graphs"] == 2
    assert not stats["graph_break"]
    for name, gradient in plain.items():
        assert float((again[name] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max())
