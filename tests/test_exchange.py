"""Adapters in PEFT's format and with Meta's names: read exactly, or refused by name."""

import json
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Sam3Model

from lora_layers import (
    COMPONENTS,
    UNUSED_LINEARS,
    AdapterError,
    LoRAConfig,
    apply_lora,
    load_lora_state_dict,
    lora_modules,
    remove_lora,
)
from sam3_lora import exchange
from sam3_lora.exchange import Foreign, fit, library_names, portable_name, read_source, write_peft

ALPHA = 5.0
# Meta's layers of each kind, with their sizes in the tiny model, and the library's names.
META = {
    "backbone.vision_backbone.trunk.blocks.1.attn.qkv": [
        f"vision_encoder.backbone.layers.1.attention.{p}_proj" for p in "qkv"
    ],
    "backbone.vision_backbone.trunk.blocks.2.attn.proj": [
        "vision_encoder.backbone.layers.2.attention.o_proj"
    ],
    "backbone.vision_backbone.trunk.blocks.0.mlp.fc1": ["vision_encoder.backbone.layers.0.mlp.fc1"],
    "backbone.vision_backbone.trunk.blocks.0.mlp.fc2": ["vision_encoder.backbone.layers.0.mlp.fc2"],
    "backbone.language_backbone.encoder.transformer.resblocks.1.attn.in_proj": [
        f"text_encoder.text_model.encoder.layers.1.self_attn.{p}_proj" for p in "qkv"
    ],
    "backbone.language_backbone.encoder.transformer.resblocks.1.attn.out_proj": [
        "text_encoder.text_model.encoder.layers.1.self_attn.out_proj"
    ],
    "backbone.language_backbone.encoder.transformer.resblocks.0.mlp.c_fc": [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    ],
    "backbone.language_backbone.encoder.transformer.resblocks.0.mlp.c_proj": [
        "text_encoder.text_model.encoder.layers.0.mlp.fc2"
    ],
    "geometry_encoder.boxes_pos_enc_project": ["geometry_encoder.boxes_pos_enc_project"],
    "geometry_encoder.encode.0.cross_attn_image.k_proj": [
        "geometry_encoder.layers.0.cross_attn.k_proj"
    ],
    "geometry_encoder.encode.0.linear2": ["geometry_encoder.layers.0.mlp.fc2"],
    "transformer.encoder.layers.0.cross_attn_image.out_proj": [
        "detr_encoder.layers.0.cross_attn.o_proj"
    ],
    "transformer.encoder.layers.0.linear1": ["detr_encoder.layers.0.mlp.fc1"],
    "transformer.decoder.layers.1.ca_text.q_proj": ["detr_decoder.layers.1.text_cross_attn.q_proj"],
    "transformer.decoder.layers.1.cross_attn.v_proj": [
        "detr_decoder.layers.1.vision_cross_attn.v_proj"
    ],
    "transformer.decoder.layers.0.self_attn.out_proj": ["detr_decoder.layers.0.self_attn.o_proj"],
    "transformer.decoder.layers.0.linear2": ["detr_decoder.layers.0.mlp.fc2"],
    "transformer.decoder.bbox_embed.layers.2": ["detr_decoder.box_head.layer3"],
    "transformer.decoder.boxRPB_embed_y.layers.0": ["detr_decoder.box_rpb_embed_y.layer1"],
    "segmentation_head.cross_attend_prompt.out_proj": ["mask_decoder.prompt_cross_attn.o_proj"],
    "segmentation_head.mask_predictor.mask_embed.layers.1": ["mask_decoder.mask_embedder.layers.1"],
}


@pytest.fixture
def model(loaded) -> Any:
    """The tiny model, as it was before the test."""
    yield loaded[0]
    remove_lora(loaded[0])


def load(adapter: Foreign, model: Any) -> LoRAConfig:
    """Puts an adapter that was read into the base model."""
    lora, state = fit(adapter, model, Path("source"))
    apply_lora(model, lora)
    load_lora_state_dict(model, state)
    return lora


def updates(model: Any) -> dict[str, torch.Tensor]:
    """The update of each adapted layer's weight."""
    return {name: layer.delta_weight() for name, layer in lora_modules(model)}


def meta_tensors(model: Any, rank: int = 2, kind: str = "lora") -> dict[str, torch.Tensor]:
    """A file of the Meta-named kind: A (in, r) and B (r, out), or as weights of Linear layers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, ours in META.items():
        layers = [model.get_submodule(one) for one in ours]
        a = torch.randn(layers[0].in_features, rank, generator=generator)
        b = torch.randn(rank, sum(layer.out_features for layer in layers), generator=generator)
        if kind == "lora":
            tensors |= {f"{name}.lora.lora_A": a, f"{name}.lora.lora_B": b}
        else:
            tensors |= {f"module.detector.{name}.lora_A.weight": a.T.contiguous()}
            tensors |= {f"module.detector.{name}.lora_B.weight": b.T.contiguous()}
    return tensors


@pytest.mark.parametrize("kind", ["lora", "weight"])
def test_meta_names_give_the_update_computed_by_hand(model, tmp_path, kind) -> None:
    torch.save(meta_tensors(model, kind=kind), tmp_path / "sam3_lora.pt")
    tensors = meta_tensors(model)
    adapter = read_source(tmp_path / "sam3_lora.pt", ALPHA)
    lora = load(adapter, model)
    assert (lora.rank, lora.alpha, adapter.description["geometry_cls"]) == (2, ALPHA, "meta")
    found = updates(model)
    assert len(found) == sum(map(len, META.values()))
    for name, ours in META.items():
        # x A B, scaled: the weight's update is its transpose.
        product = tensors[f"{name}.lora.lora_A"] @ tensors[f"{name}.lora.lora_B"]
        whole = (ALPHA / 2 * product).T
        torch.testing.assert_close(torch.cat([found[one] for one in ours]), whole)


def test_every_layer_that_can_be_adapted_has_a_name_in_metas_code(model) -> None:
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    ours = {n for n in linears if n.split(".")[0] in COMPONENTS} - set(UNUSED_LINEARS)
    attentions = [f"{name}.{leaf}" for name in exchange._ATTENTIONS for leaf in ("qkv", "out_proj")]
    shapes = [*attentions, *exchange._LINEARS, *exchange._HEADS]
    metas = [shape.replace("#", str(number)) for shape in shapes for number in range(4)]
    named = {one for name in metas for one in library_names(name)}
    assert ours <= named, sorted(ours - named)[:5]


def save_peft(base: Any, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """An adapter that peft makes, with random B, and the updates that peft computes."""
    torch.manual_seed(0)
    peft_model = get_peft_model(base, LoraConfig(**options))
    found = {}
    for name, module in peft_model.base_model.model.named_modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            module.lora_B["default"].weight.data.normal_()
            found[name] = module.get_delta_weight("default").detach()
    peft_model.save_pretrained(folder)
    return found


PEFT_CASES = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6},
    "output": {"target_modules": ["q_proj", "out_proj"], "r": 4},
    "regex": {"target_modules": r"detr_decoder.*\.mlp\.fc[12]", "r": 2, "lora_dropout": 0.1},
    "rslora": {"target_modules": ["v_proj"], "r": 5, "lora_alpha": 3, "use_rslora": True},
    "ranks": {
        "target_modules": ["detr_encoder.layers.0.mlp.fc1", "detr_decoder.layers.0.mlp.fc1"],
        "r": 3,
        "rank_pattern": {"detr_encoder.layers.0.mlp.fc1": 5},
    },
    "alphas": {
        "target_modules": ["fc1"],
        "exclude_modules": ["text_encoder.text_model.encoder.layers.0.mlp.fc1"],
        "r": 3,
        "lora_alpha": 4,
        "alpha_pattern": {"layers.0.mlp.fc1": 7},
        "rank_pattern": {"layers.1.mlp.fc1": 2},
        "use_rslora": True,
    },
}


@pytest.fixture(scope="module")
def plain_base(tiny_model_dir) -> Sam3Model:
    return Sam3Model.from_pretrained(tiny_model_dir)


@pytest.mark.parametrize("case", PEFT_CASES)
def test_what_peft_trained_is_read_exactly(plain_base, model, tmp_path, case) -> None:
    base = type(plain_base)(plain_base.config)
    expected = save_peft(base, tmp_path / "a", **PEFT_CASES[case])
    adapter = read_source(tmp_path / "a", None)
    lora = load(adapter, model)
    found = updates(model)
    assert found.keys() == expected.keys() and len(found) >= 2
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update)
    assert lora.dropout == PEFT_CASES[case].get("lora_dropout", 0.0)
    if case in ("plain", "output", "regex", "rslora"):  # nothing is padded or scaled: the same bits
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        for name, layer in lora_modules(model):
            assert torch.equal(layer.lora_A, tensors[f"base_model.model.{name}.lora_A.weight"])
            assert torch.equal(layer.lora_B, tensors[f"base_model.model.{name}.lora_B.weight"])
    if case == "plain":  # described by its leaves, not by every layer's name
        assert set(lora.target_modules) == {"q_proj", "v_proj"}
    if case == "output":  # here out_proj would mean o_proj too
        assert set(lora.target_modules) == set(expected)


@pytest.fixture
def exported(model, tmp_path) -> SimpleNamespace:
    """A folder that PEFT reads, and what may be spoilt in it."""
    names = [f"detr_decoder.layers.{n}.mlp.fc1" for n in range(2)]
    lora = LoRAConfig(3, 6.0, 0.0, ("fc1",), ("detr_decoder",))
    state = {}
    for name in names:
        layer = model.get_submodule(name)
        state[f"{name}.lora_A"] = torch.randn(3, layer.in_features)
        state[f"{name}.lora_B"] = torch.randn(layer.out_features, 3)
    content = {"lora_config": lora, "lora": state, "base_fingerprint": "f", "geometry_cls": "hf"}
    folder = tmp_path / "peft"
    folder.mkdir()
    write_peft(folder, content, "sam3")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    return SimpleNamespace(
        folder=folder,
        content=content,
        tensors=load_file(weights),
        config=json.loads(config.read_text(encoding="utf-8")),
        save=lambda tensors, **more: save_file(tensors, weights, {"format": "pt", **more}),
        configure=lambda values: config.write_text(json.dumps(values), encoding="utf-8"),
    )


def test_the_file_that_peft_reads(exported) -> None:
    name = "base_model.model.detr_decoder.layers.0.mlp.fc1.lora_A.weight"
    assert torch.equal(
        exported.tensors[name], exported.content["lora"]["detr_decoder.layers.0.mlp.fc1.lora_A"]
    )
    assert len(exported.tensors) == 4
    names = [f"detr_decoder.layers.{n}.mlp.fc1" for n in range(2)]
    assert exported.config["target_modules"] == names
    LoraConfig(**{k: v for k, v in exported.config.items() if k != "peft_type"})
    back = read_source(exported.folder, None)
    assert back.selectors == (("fc1",), ("detr_decoder",))
    assert back.description == {
        "base_model": "sam3", "base_fingerprint": "f", "geometry_cls": "hf",
    }  # fmt: skip


LAYER = "base_model.model.detr_decoder.layers.0.mlp.fc1"
SPOILT_KEYS = {
    "prefix": (lambda key: key.removeprefix("base_model."), "4 keys that are none of a LoRA"),
    "component": (
        lambda key: key.replace("detr_decoder.layers.0.mlp.fc1", "dot_product_scoring.text_proj"),
        r"1 layers of parts that are not adapted here \(dot_product_scoring",
    ),
    "absent": (lambda key: key.replace("layers.1", "layers.9"), "1 layers that the base does not"),
    "conv": (
        lambda key: key.replace(
            "detr_decoder.layers.0.mlp.fc1", "vision_encoder.neck.fpn_layers.0.proj1"
        ),
        r"1 layers that are not Linear \(vision_encoder.neck",
    ),
    "embedding": (lambda key: key.replace("lora_A.weight", "lora_embedding_A"), "none of a LoRA"),
}
SPOILT_TENSORS = {
    "rank": (lambda t: t[:2], "expected rank 3 of adapter_config.json, found 2", "both"),
    "pair": (lambda t: t[:2], "that are no pair of matrices of one rank", "A"),
    "inputs": (lambda t: t[:, :5].contiguous(), "1 misshapen .* where the base has", "A"),
    "four axes": (lambda t: t[..., None, None], "of a convolution", "A"),
    "not finite": (lambda t: t / 0, "values that are not finite", "A"),
}
SPOILT_CONFIG = {
    "dora": ({"use_dora": True}, "found use_dora True"),
    "bias": ({"bias": "lora_only"}, "found bias 'lora_only'"),
    "whole modules": ({"modules_to_save": ["box_head"]}, "modules_to_save"),
    "start": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    "kind": ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    "rank": ({"r": 4}, "expected rank 4 of adapter_config.json, found 3"),
    "target": ({"target_modules": ["fc1", "box_head.layer1"]}, "found 9 missing"),
    "alpha": ({"lora_alpha": -1}, "2 whose alpha is not a number > 0"),
    "pattern": ({"alpha_pattern": {"(": 2}}, "is damaged"),
    "no rank": ({"r": None}, "is damaged"),
}


def refusal(source: Path, model: Any, alpha: float | None = None) -> str:
    """The words in which a source is refused; the model stays without an adapter."""
    with pytest.raises(AdapterError) as error:
        load(read_source(source, alpha), model)
    assert not list(lora_modules(model))
    return str(error.value)


@pytest.mark.parametrize("case", SPOILT_KEYS)
def test_peft_keys_that_do_not_fit_are_refused(exported, model, case) -> None:
    spoil, message = SPOILT_KEYS[case]
    exported.save({spoil(key): tensor for key, tensor in exported.tensors.items()})
    exported.configure(exported.config | {"target_modules": "all-linear"})
    assert re.search(message, refusal(exported.folder, model))


@pytest.mark.parametrize("case", SPOILT_TENSORS)
def test_peft_tensors_that_do_not_fit_are_refused(exported, model, case) -> None:
    spoil, message, side = SPOILT_TENSORS[case]
    tensors = dict(exported.tensors)
    tensors[f"{LAYER}.lora_A.weight"] = spoil(tensors[f"{LAYER}.lora_A.weight"])
    if side == "both":
        b = tensors[f"{LAYER}.lora_B.weight"]
        tensors[f"{LAYER}.lora_B.weight"] = b[:, :2].contiguous()
    exported.save(tensors)
    assert re.search(message, refusal(exported.folder, model))


@pytest.mark.parametrize("case", SPOILT_CONFIG)
def test_peft_settings_without_a_counterpart_are_refused(exported, model, case) -> None:
    values, message = SPOILT_CONFIG[case]
    exported.configure(exported.config | values)
    assert re.search(message, refusal(exported.folder, model))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([1], "is damaged"),
        ({"lora_config": 3}, "is damaged"),
        ({"lora_config": {"rank": 3}}, "is damaged"),
        ({"thresholds": {"x": 7}}, "found another thresholds"),
        ({"categories": ["x"]}, "found another categories"),
        ({"categories": {"x": 1}}, "found another categories"),
        ({"geometry_cls": "x"}, "found another geometry_cls"),
        ({"base_model": 5, "step": "1"}, "found another base_model, step"),
    ],
)
def test_a_malformed_description_is_refused(exported, model, told, message) -> None:
    exported.save(exported.tensors, sam3_lora=json.dumps(told))
    assert message in refusal(exported.folder, model)


def test_a_description_cannot_stand_for_the_weights(exported) -> None:
    exported.save(exported.tensors, sam3_lora=json.dumps({"lora": 1, "model": 2, "step": 3}))
    told = read_source(exported.folder, None).description
    assert told == {"base_model": "sam3", "geometry_cls": "hf", "step": 3}


def test_other_sources_are_refused_by_name(exported, model, tmp_path) -> None:
    folder = exported.folder
    assert "stores its own alpha" in refusal(folder, model, alpha=3.0)
    assert "name PEFT's folder" in refusal(folder / "adapter_model.safetensors", model)
    assert "found nothing" in refusal(tmp_path / "gone", model)
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "is damaged" in refusal(folder, model)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "can hold code" in refusal(folder, model)
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Path("x"), protocol=2))
    assert "cannot be read safely" in refusal(tmp_path / "code.pt", model)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    assert "found another kind of file" in refusal(tmp_path / "other.pt", model)


SPOILT_META = {
    "no alpha": ({}, None, "--alpha: .* does not store the alpha"),
    "alpha": ({}, math.nan, "whose alpha is not a number > 0"),
    "conv": (
        {"backbone.vision_backbone.convs.0.conv_1x1": (4, 4)},
        ALPHA,
        r"1 layers have no counterpart .*: backbone.vision_backbone.convs.0.conv_1x1",
    ),
    "points": ({"geometry_encoder.points_direct_project": (2, 64)}, ALPHA, "no counterpart"),
    "resizer": ({"backbone.language_backbone.resizer": (64, 64)}, ALPHA, "no counterpart"),
    "thirds": ({"backbone.vision_backbone.trunk.blocks.0.attn.qkv": (64, 64)}, ALPHA, "of a fused"),
    "twice": (
        {"backbone.vision_backbone.trunk.blocks.1.attn.k_proj": (64, 64)},
        ALPHA,
        "expected each layer once, found vision_encoder.backbone.layers.1.attention.k_proj in",
    ),
    "both ways": ({"detector.transformer.encoder.layers.0.linear1": (64, 128)}, ALPHA, "2 keys"),
    "shape": ({"transformer.encoder.layers.0.linear2": (64, 64)}, ALPHA, "1 misshapen"),
    "depth": ({"transformer.encoder.layers.7.linear2": (64, 64)}, ALPHA, "the base does not have"),
    "base too": ("original_layer.weight", ALPHA, "1 keys that are none of a LoRA adapter's"),
}


@pytest.mark.parametrize("case", SPOILT_META)
def test_meta_layers_without_a_place_are_refused(model, tmp_path, case) -> None:
    extra, alpha, message = SPOILT_META[case]
    tensors = meta_tensors(model)
    if isinstance(extra, str):
        tensors[f"transformer.encoder.layers.0.linear1.{extra}"] = torch.zeros(2, 2)
    else:
        for name, (inputs, outputs) in extra.items():
            tensors[f"{name}.lora.lora_A"] = torch.ones(inputs, 2)
            tensors[f"{name}.lora.lora_B"] = torch.ones(2, outputs)
    torch.save(tensors, tmp_path / "a.pt")
    assert re.search(message, refusal(tmp_path / "a.pt", model, alpha))


def test_a_layer_that_nothing_reads_is_left_out(model) -> None:
    kept = "detr_decoder.layers.0.mlp.fc1"
    layers = {
        name: (torch.ones(2, (m := model.get_submodule(name)).in_features),
               torch.ones(m.out_features, 2), 4.0)
        for name in (kept, *UNUSED_LINEARS)
    }  # fmt: skip
    lora = load(Foreign(layers), model)
    assert list(updates(model)) == [kept] and lora.target_modules == (kept,)


@pytest.mark.parametrize(
    ("name", "portable"),
    [
        ("facebook/sam3", "facebook/sam3"),
        ("models/sam3", "models/sam3"),
        ("/data/models/sam3", "sam3"),
        ("/data/models/sam3/", "sam3"),
        (r"C:\\models\\sam3", "sam3"),
    ],
)
def test_an_absolute_path_does_not_travel(name, portable) -> None:
    assert portable_name(name) == portable
