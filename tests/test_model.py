"""Our forward equals `Sam3Model.forward`, in values and in gradients; what cannot be loaded."""

import json
import logging
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import Sam3Model

from sam3_lora import model as model_module
from sam3_lora import processes
from sam3_lora.forward import Forward, predict_masks
from sam3_lora.model import (
    PUBLISHED,
    ModelError,
    cast_towers,
    compute_dtype,
    image_size,
    load_model,
    num_queries,
    tokenize,
)

TEXTS = ["cat", "a red bus", "cat"]
IMAGE_INDEX = torch.tensor([0, 0, 1])
BOXES = torch.tensor([[[0.5, 0.5, 0.4, 0.3]], [[0.3, 0.6, 0.2, 0.2]], [[0.0, 0.0, 0.0, 0.0]]])
LABELS = torch.tensor([[1], [0], [-10]])


@pytest.fixture(scope="module")
def images(loaded):
    side = image_size(loaded[0])
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


def make_batch(images, boxes=None, labels=None):
    return {
        "images": images,
        "texts": TEXTS,
        "image_index": IMAGE_INDEX,
        "box_prompts_cxcywh": boxes,
        "box_prompt_labels": labels,
    }


def library_forward(model, tokenizer, images, boxes, labels):
    """The same rows through `Sam3Model.forward`, one image copy a row; all layers recomputed."""
    ids, mask = tokenize(tokenizer, TEXTS)
    seen = {}
    hook = model.detr_decoder.register_forward_hook(lambda m, a, out: seen.update(out))
    pixels = (images[IMAGE_INDEX].float() - 127.5) / 127.5
    out = model(
        pixel_values=pixels,
        input_ids=ids,
        attention_mask=mask,
        input_boxes=boxes,
        input_boxes_labels=labels,
    )
    hook.remove()
    out.all_states = seen["intermediate_hidden_states"]
    return out


CASES = {
    "text-hf": ("hf", None, None),
    "text-meta": ("meta", None, None),
    "boxes": ("meta", BOXES, LABELS),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_the_library(loaded, images, case):
    model, tokenizer = loaded
    geometry_cls, boxes, labels = CASES[case]
    library_boxes, library_labels = boxes, labels
    if case == "text-meta":
        library_boxes, library_labels = torch.zeros(3, 1, 4), torch.full((3, 1), -10)
    model.requires_grad_(True)
    outputs = Forward(model, tokenizer, geometry_cls)(make_batch(images, boxes, labels))
    expected = library_forward(model, tokenizer, images, library_boxes, library_labels)

    all_queries = torch.arange(num_queries(model))
    masks = torch.stack([predict_masks(outputs, row, all_queries) for row in range(3)])
    cxcywh = outputs["boxes_cxcywh"][-1]
    ours = {
        "pred_logits": outputs["logits"][-1],
        "presence_logits": outputs["presence"][-1][:, None].clamp(-10, 10),
        "pred_boxes": torch.cat(
            [cxcywh[..., :2] - cxcywh[..., 2:] / 2, cxcywh[..., :2] + cxcywh[..., 2:] / 2], -1
        ),
        "pred_masks": masks,
        "semantic_seg": outputs["semantic"][:, None],
    }
    generator = torch.Generator().manual_seed(2)
    loss = expected_loss = 0.0
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
        weight = torch.randn(value.shape, generator=generator)
        loss = loss + (weight * value).sum()
        expected_loss = expected_loss + (weight * expected[name]).sum()
    named = [(n, p) for n, p in model.named_parameters()]
    parameters = [p for _, p in named]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected_grads = torch.autograd.grad(expected_loss, parameters, allow_unused=True)
    compared = 0
    for (name, _), grad, other in zip(named, grads, expected_grads, strict=True):
        if grad is None:  # what only a masked padding box would read is not run at all
            assert other is None or not other.any(), name
        else:
            scale = float(other.abs().max()) + 1e-6
            assert float((grad - other).abs().max()) <= 1e-5 * scale + 1e-5, name
            compared += 1
    assert compared > 250
    model.requires_grad_(False)


def test_every_layers_outputs(loaded, images):
    model, tokenizer = loaded
    outputs = Forward(model, tokenizer)(make_batch(images))
    expected = library_forward(
        model, tokenizer, images, torch.zeros(3, 1, 4), torch.full((3, 1), -10)
    )
    reference = expected.decoder_reference_boxes.clamp(1e-3, 1 - 1e-3)
    offsets = model.detr_decoder.box_head(expected.all_states)
    torch.testing.assert_close(
        outputs["boxes_cxcywh"],
        (torch.log(reference / (1 - reference)) + offsets).sigmoid(),
        rtol=1e-4,
        atol=1e-5,
    )
    assert outputs["logits"].shape == (2, 3, num_queries(model))


def test_rows_without_a_box_equal_text_only_rows_under_hf(loaded, images):
    model, tokenizer = loaded
    forward = Forward(model, tokenizer, "hf")
    mixed = forward(make_batch(images, BOXES, LABELS))
    text_only = forward(make_batch(images))
    torch.testing.assert_close(
        mixed["logits"][:, 2], text_only["logits"][:, 2], rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(mixed["logits"][:, 0], text_only["logits"][:, 0], atol=1e-4)


def test_one_to_many_branch_is_a_pass_without_self_attention(loaded, images):
    model, tokenizer = loaded
    plain = Forward(model, tokenizer)(make_batch(images))
    both = Forward(model, tokenizer, one_to_many=True)(make_batch(images))
    for name in ("logits", "boxes_cxcywh", "presence", "mask_embed"):
        torch.testing.assert_close(both[name], plain[name], rtol=1e-5, atol=1e-5)
    # Zero output projections make self-attention add nothing: then both halves must agree.
    kept = []
    for layer in model.detr_decoder.layers:
        for parameter in layer.self_attn.o_proj.parameters():
            kept.append((parameter, parameter.data.clone()))
            parameter.data.zero_()
    silent = Forward(model, tokenizer, one_to_many=True)(make_batch(images))
    for name in ("logits", "boxes_cxcywh", "mask_embed"):
        torch.testing.assert_close(silent["o2m_" + name], silent[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both["o2m_" + name], silent[name], rtol=1e-4, atol=1e-4)
    for parameter, data in kept:
        parameter.data.copy_(data)


def test_rows_can_be_split(loaded, images):
    model, tokenizer = loaded
    forward = Forward(model, tokenizer)
    batch = make_batch(images, BOXES, LABELS)
    whole = forward(batch)
    features = forward.encode(batch)
    parts = [forward.predict(features, batch, rows) for rows in (slice(0, 1), slice(1, 3))]
    for name, dim in (("logits", 1), ("boxes_cxcywh", 1), ("presence", 1), ("semantic", 0)):
        joined = torch.cat([part[name] for part in parts], dim)
        torch.testing.assert_close(joined, whole[name], rtol=1e-5, atol=1e-5)


def test_bf16_keeps_boxes_and_logits_in_fp32(tiny_model_dir, images):
    model, tokenizer = load_model(str(tiny_model_dir))
    exact = Forward(model, tokenizer)(make_batch(images, BOXES, LABELS))
    cast_towers(model, torch.bfloat16)
    outputs = Forward(model, tokenizer, dtype=torch.bfloat16)(make_batch(images, BOXES, LABELS))
    for name in ("logits", "boxes_cxcywh", "presence", "semantic", "mask_embed"):
        assert outputs[name].dtype == torch.float32, name
    assert outputs["pixel_embed"].dtype == torch.bfloat16
    assert predict_masks(outputs, 0, torch.tensor([0, 3])).dtype == torch.float32
    # 1 px of 1008: what bf16 weights in the decoder would not keep.
    assert float((outputs["boxes_cxcywh"] - exact["boxes_cxcywh"]).abs().max()) < 1 / 1008


def test_hub_layout_loads_the_same_weights(tiny_model_dir, tiny_hub_dir):
    model, _ = load_model(str(tiny_model_dir))
    hub, _ = load_model(str(tiny_hub_dir))
    assert isinstance(hub, Sam3Model)
    for (name, ours), (other_name, other) in zip(
        model.state_dict().items(), hub.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(ours, other), name


def test_long_and_foreign_prompts_are_cut_at_32_tokens(loaded):
    ids, mask = tokenize(loaded[1], ["x" * 500, "", "猫 🐈"])
    assert ids.shape == mask.shape == (3, 32)
    assert int(mask[0].sum()) == 32


def test_incomplete_weights_are_refused(tiny_model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "half"
    shutil.copytree(tiny_model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["detr_decoder.query_embed.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 missing_keys.*detr_decoder.query_embed.weight"):
        load_model(str(folder))


def test_what_is_not_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="expected config.json in the folder"):
        load_model(str(tmp_path))
    (tmp_path / "sam3.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match="Meta's own sam3.pt is another format"):
        load_model(str(tmp_path / "sam3.pt"))
    with pytest.raises(ModelError, match="SAM 3.1"):
        load_model("facebook/sam3.1")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="expected a SAM 3 model, found model_type 'clip'"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="hf auth login.*--model_name DIR"):
        load_model("nobody/nothing-here")


def cut(name, share=0.5):
    """Cuts a file short."""

    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def replaced(name, text):
    return lambda folder: (folder / name).write_text(text)


def configured(**changes):
    """Changes keys of config.json."""

    def damage(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return damage


DAMAGES = {
    "unknown type": (configured(model_type="nope"), "nope"),
    "type is a list": (configured(model_type=["sam3"]), "unhashable"),
    "wrong value": (configured(detr_decoder_config={"num_queries": "many"}), "num_queries"),
    "another size": (configured(text_config={"vocab_size": 7}), "mismatched_keys"),
    "no heads": (configured(detr_decoder_config={"num_attention_heads": 0}), "ZeroDivision"),
    "config is null": (replaced("config.json", "null"), "NoneType"),
    "config cut": (cut("config.json"), "not a valid JSON"),
    "weights cut": (cut("model.safetensors"), "not fully covered"),
    "weights empty": (replaced("model.safetensors", ""), "header too small"),
    "tokenizer cut": (cut("tokenizer.json"), "JSONDecodeError"),
    "tokenizer is a list": (replaced("tokenizer_config.json", "[]"), "could not be read as SAM 3"),
    "tokenizer absent": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(tiny_model_dir, tmp_path, case):
    damage, cause = DAMAGES[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert str(folder) in message and cause in message
    assert "\n" not in message


def test_compute_dtype(monkeypatch, caplog):
    cpu, mps, cuda = (torch.device(name) for name in ("cpu", "mps", "cuda"))
    for device in (cpu, mps, cuda):
        assert compute_dtype("no", device) == torch.float32
        assert compute_dtype("fp16", device) == torch.float16
    assert compute_dtype("auto", cpu) == compute_dtype("auto", mps) == torch.float32
    assert compute_dtype("bf16", mps) == compute_dtype("bf16", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    assert compute_dtype("auto", cuda) == torch.bfloat16
    # torch calls bf16 supported where it is emulated, slower than fp32.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert {compute_dtype(name, cuda) for name in ("auto", "bf16")} == {torch.float16}
    assert "no bf16: using fp16" in caplog.text


def test_gradients_of_a_bf16_image_are_summed_in_fp32(loaded, images):
    forward = Forward(*loaded, masks=False)
    rows = 24
    batch = make_batch(images[:1]) | {"texts": [f"thing {i}" for i in range(rows)]}
    batch["image_index"] = torch.zeros(rows, dtype=torch.long)
    with torch.no_grad():
        features = forward.encode(batch)
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = features["fpn_2"].bfloat16().to(dtype).requires_grad_(True)
        outputs = forward.predict(features | {"fpn_2": leaf}, batch, slice(None))
        (outputs["boxes_cxcywh"].sum() + outputs["logits"].sum()).backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1].bfloat16())


def test_text_embeds_object_contract(loaded, images):
    """The library reads `.pooler_output` of `text_embeds`; ours gives what it would read."""
    model, tokenizer = loaded
    ids, mask = tokenize(tokenizer, TEXTS)
    features = Forward(model, tokenizer).encode(make_batch(images))
    vision = model.get_vision_features((images[IMAGE_INDEX].float() - 127.5) / 127.5)
    out = model(
        vision_embeds=vision,
        text_embeds=SimpleNamespace(pooler_output=features["text"][features["text_index"]]),
        attention_mask=mask,
    )
    ours = Forward(model, tokenizer, "hf")(make_batch(images))
    torch.testing.assert_close(ours["logits"][-1], out.pred_logits, rtol=1e-5, atol=1e-5)


def test_a_prompt_that_is_cut_or_not_english_is_told_once(loaded, caplog) -> None:
    _, tokenizer = loaded
    long = " ".join(["car"] * 11)  # a token a letter here
    for _ in range(2):
        tokenize(tokenizer, [long, "red car", "naïve café", "красная машина"])
    tokenize(tokenizer, [" ".join(["car"] * 10)])  # 32 tokens with the two at its ends
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2, told
    assert "has 35 tokens, of which SAM 3 reads the first 32; shorten it" in told[0]
    assert told[1].startswith("the prompt 'красная машина': expected English words")


def test_loading_and_downloading_are_told(tiny_model_dir, hub_cache, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    load_model(str(tiny_model_dir))
    assert caplog.messages == [f"loading {tiny_model_dir}"]
    bars = []

    class Absent:
        @staticmethod
        def from_pretrained(*_, **__):
            bars.append(not are_progress_bars_disabled())
            raise OSError("no network")

    for cache, shown in ((hub_cache, False), (tmp_path, True), (tmp_path, False)):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(processes, "shows_progress", lambda shown=shown: shown)
        with pytest.raises(ModelError, match="no network"):
            model_module._load_weights(Absent, PUBLISHED)
    assert caplog.messages[1] == "loading facebook/sam3"
    assert caplog.messages[2].startswith("downloading facebook/sam3 from the hub, once; ")
    assert bars == [False, True, False]  # a bar on a terminal alone
