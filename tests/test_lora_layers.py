"""LoRA layers in SAM 3: laws of the update, matching of names, and parity with peft."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn
from transformers import Sam3Config, Sam3Model

from lora_layers import (
    COMPONENTS,
    AdapterError,
    LoRAConfig,
    apply_lora,
    count_parameters,
    load_lora_state_dict,
    lora_modules,
    lora_state_dict,
    lora_table,
    match_modules,
    merge_lora,
    unmerge_lora,
)
from sam3_lora.config import load_config, lora_config
from sam3_lora.forward import Forward
from sam3_lora.model import load_model

ROOT = Path(__file__).resolve().parent.parent
EVERYWHERE = LoRAConfig(
    rank=3,
    alpha=6.0,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
    components=COMPONENTS,
)
DECODER = LoRAConfig(rank=2, alpha=4.0, target_modules=("q_proj",), components=("detr_decoder",))


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return load_model(str(tiny_model_dir))


@pytest.fixture
def model(loaded):
    return deepcopy(loaded[0])


@pytest.fixture(scope="module")
def infer(loaded):
    """A function: the outputs that training reads, of a model on two images and three rows.

    Two boxes a row: the geometry encoder's queries and keys need something to choose from.
    """
    generator = torch.Generator().manual_seed(0)
    batch = {
        "images": torch.randint(0, 256, (2, 3, 112, 112), generator=generator).to(torch.uint8),
        "texts": ["cat", "a red bus", "cat"],
        "image_index": torch.tensor([0, 0, 1]),
        "box_prompts_cxcywh": 0.25 + torch.rand(3, 2, 4, generator=generator) / 2,
        "box_prompt_labels": torch.tensor([[1, 1], [1, 0], [1, -10]]),
    }
    names = ("logits", "boxes_cxcywh", "presence", "mask_embed", "pixel_embed", "semantic")

    def outputs(model):
        found = Forward(model, loaded[1])(batch)
        return {name: found[name] for name in names}

    return outputs


def randomise(model, scale=0.05):
    """Random B, so that the update is not zero."""
    torch.manual_seed(7)
    for _, module in lora_modules(model):
        module.lora_B.data.normal_(std=scale)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# What they do in SAM 3 ----------------------------------------------------------------------------


def test_exact_no_op_at_step_0(model, infer):
    with torch.no_grad():
        before = infer(model)
        matched = apply_lora(model, EVERYWHERE)
        after = infer(model)
    assert {name.split(".")[0] for name in matched} == set(COMPONENTS)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_only_lora_names_require_gradients(model):
    model.requires_grad_(True)
    matched = apply_lora(model, EVERYWHERE)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(f"{m}.lora_{f}" for m in matched for f in "AB")
    assert [name for name, _ in lora_modules(model)] == matched


def test_base_is_bit_identical_after_a_step(model, infer):
    before = snapshot(model)
    matched = apply_lora(model, EVERYWHERE)
    randomise(model)
    start = lora_state_dict(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], weight_decay=0
    )
    sum(value.float().square().mean() for value in infer(model).values()).backward()
    optimizer.step()
    after = {n.replace(".base.", "."): v for n, v in model.state_dict().items() if "lora_" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    moved = lora_state_dict(model)
    # Every adapter learns: none sits where no gradient comes.
    still = [
        m
        for m in matched
        for f in "AB"
        if torch.equal(moved[f"{m}.lora_{f}"], start[f"{m}.lora_{f}"])
    ]
    assert still == []


def test_merge_equals_the_adapter_and_unmerge_restores(model, infer):
    with torch.no_grad():
        base_outputs = infer(model)
        apply_lora(model, EVERYWHERE)
        randomise(model)
        before = snapshot(model)
        adapted = infer(model)
        merge_lora(model)
        once = snapshot(model)
        merged = infer(model)
        merge_lora(model)
        merge_lora(model)
        assert_same_state(model, once)
        for name, value in adapted.items():
            torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(merged["logits"], base_outputs["logits"], atol=1e-3)
        unmerge_lora(model)
        assert_same_state(model, before)
        unmerge_lora(model)
        assert_same_state(model, before)
        again = infer(model)
    assert all(torch.equal(again[name], adapted[name]) for name in adapted)


def test_parity_with_peft(model, infer):
    other = deepcopy(model)
    matched = apply_lora(model, EVERYWHERE)
    config = PeftConfig(r=3, lora_alpha=6, target_modules=matched, lora_dropout=0.0, bias="none")
    other = inject_adapter_in_model(config, other)
    randomise(model)
    theirs = {}
    for name, module in lora_modules(model):
        layer = other.get_submodule(name)
        theirs[name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        theirs[name][0].data.copy_(module.lora_A.data)
        theirs[name][1].data.copy_(module.lora_B.data)
    assert len(theirs) == len(matched) > 40
    ours, expected = infer(model), infer(other)
    generator = torch.Generator().manual_seed(3)
    loss = other_loss = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)
        weight = torch.randn(value.shape, generator=generator) / value.numel() ** 0.5
        loss = loss + (weight * ours[name]).sum()
        other_loss = other_loss + (weight * value).sum()
    loss.backward()
    other_loss.backward()
    for name, module in lora_modules(model):
        for mine, its in zip((module.lora_A, module.lora_B), theirs[name], strict=True):
            scale = float(its.grad.abs().max())
            assert scale > 0, name
            assert float((mine.grad - its.grad).abs().max()) <= 1e-5 * scale, name


# Which layers -------------------------------------------------------------------------------------


def choose(targets, *components):
    return LoRAConfig(target_modules=tuple(targets), components=components)


def test_whole_segments_match_from_the_end(model):
    names = match_modules(model, choose(["self_attn.q_proj"], "detr_decoder"))
    assert names == [f"detr_decoder.layers.{i}.self_attn.q_proj" for i in range(2)]
    names = match_modules(model, choose(["layers.1.mlp.fc1"], "detr_decoder"))
    assert names == ["detr_decoder.layers.1.mlp.fc1"]
    everywhere = match_modules(model, choose(["q_proj"], "detr_decoder"))
    kinds = ("self_attn", "text_cross_attn", "vision_cross_attn")
    assert everywhere == [f"detr_decoder.layers.{i}.{k}.q_proj" for i in range(2) for k in kinds]
    full = "mask_decoder.prompt_cross_attn.v_proj"
    assert match_modules(model, choose([full], "mask_decoder")) == [full]


@pytest.mark.parametrize("target", ["proj", "_proj", "q_pro", "attn.q_proj", "layers.1"])
def test_parts_of_segments_match_nothing(model, target):
    with pytest.raises(AdapterError, match=f"target '{target}' matched no Linear layer"):
        match_modules(model, choose([target], "detr_decoder"))


def test_a_layer_number_matches_as_a_whole():
    model = nn.Module()
    model.vision_encoder = nn.ModuleList(
        [nn.ModuleDict({"fc1": nn.Linear(2, 2)}) for _ in range(12)]
    )
    names = match_modules(model, choose(["1.fc1"], "vision_encoder"))
    assert names == ["vision_encoder.1.fc1"]


def test_both_names_of_the_output_projection(model):
    components = ("text_encoder", "detr_decoder")
    for target in ("o_proj", "out_proj"):
        names = match_modules(model, choose([target], *components))
        assert len([n for n in names if n.endswith("self_attn.out_proj")]) == 2  # CLIP's layers
        assert len([n for n in names if n.endswith(".o_proj")]) == 6  # 2 layers x 3 attentions
        assert len(names) == 8
    both = match_modules(model, choose(["o_proj", "out_proj"], *components))
    assert both == names
    own = match_modules(model, choose(["self_attn.o_proj"], "text_encoder"))
    assert [n.split(".")[-1] for n in own] == ["out_proj"] * 2


def test_the_unused_text_projection_is_never_adapted(model):
    assert isinstance(model.text_encoder.text_projection, nn.Linear)
    with pytest.raises(AdapterError, match="target 'text_projection' matched no Linear layer"):
        match_modules(model, choose(["text_projection"], "text_encoder"))


REFUSED = {
    "unknown component": (
        choose(["q_proj"], "detr_decoder", "backbone"),
        r"lora\.apply_to_\*: expected one or more of vision_encoder, .*; found backbone",
    ),
    "no component": (choose(["q_proj"]), r"lora\.apply_to_\*: expected one or more.*found none"),
    "no target": (choose([], "detr_decoder"), "component detr_decoder matched no target"),
    "nearest target": (
        choose(["q_proj", "qproj"], "detr_decoder"),
        r"target 'qproj' matched no Linear layer \(nearest: q_proj",
    ),
    "no near target": (
        choose(["zzz"], "mask_decoder"),
        r"target 'zzz' matched no Linear layer \(there are: .*k_proj, o_proj, q_proj, v_proj\)",
    ),
    "component without a match": (
        choose(["fc1"], "detr_decoder", "mask_decoder"),
        r"component mask_decoder matched no target \(its layers: .*q_proj",
    ),
    "all at once": (
        choose(["fc1", "to_q", "to_k"], "detr_decoder", "mask_decoder"),
        "target 'to_q' .*target 'to_k' .*component mask_decoder",
    ),
    "rank": (
        LoRAConfig(rank=0, target_modules=("q_proj",), components=("detr_decoder",)),
        r"lora\.rank: expected an integer >= 1, found 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_untouched(model, case):
    config, message = REFUSED[case]
    model.requires_grad_(True)
    before, modules = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(AdapterError, match=message):
        apply_lora(model, config)
    assert [type(m) for m in model.modules()] == modules
    assert_same_state(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_applying_twice_is_refused(model):
    apply_lora(model, DECODER)
    randomise(model)
    before = snapshot(model)
    with pytest.raises(AdapterError, match="the model is adapted already"):
        apply_lora(model, EVERYWHERE)
    assert_same_state(model, before)


# The adapter's tensors ----------------------------------------------------------------------------


def test_state_dict_round_trip(model, loaded, infer):
    matched = apply_lora(model, EVERYWHERE)
    randomise(model)
    state = lora_state_dict(model)
    assert list(state) == [f"{m}.lora_{f}" for m in matched for f in "AB"]
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in state.values())
    other = deepcopy(loaded[0])
    apply_lora(other, EVERYWHERE)
    load_lora_state_dict(other, state)
    with torch.no_grad():
        expected, found = infer(model), infer(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    first = state[f"{matched[0]}.lora_A"]
    first.zero_()
    assert model.get_submodule(matched[0]).lora_A.any()  # the state is a copy


def test_loading_is_strict_and_all_or_nothing(model):
    matched = apply_lora(model, DECODER)
    randomise(model)
    before = snapshot(model)
    state = {k: torch.ones_like(v) for k, v in lora_state_dict(model).items()}
    missing, misshapen = f"{matched[0]}.lora_B", f"{matched[1]}.lora_A"
    del state[missing]
    state[misshapen] = torch.ones(5, 64)
    state["detr_decoder.elsewhere.lora_A"] = torch.ones(2, 64)
    with pytest.raises(AdapterError) as error:
        load_lora_state_dict(model, state)
    message = str(error.value)
    assert f"1 missing ({missing})" in message
    assert "1 unexpected (detr_decoder.elsewhere.lora_A)" in message
    assert f"1 misshapen ({misshapen} (5, 64) where the model has (2, 64))" in message
    assert_same_state(model, before)


def test_loading_into_a_merged_model_is_refused(model):
    apply_lora(model, DECODER)
    randomise(model)
    state = lora_state_dict(model)
    merge_lora(model)
    before = snapshot(model)
    with pytest.raises(AdapterError, match="unmerge before loading: 6 layers are merged"):
        load_lora_state_dict(model, {k: v + 1 for k, v in state.items()})
    assert_same_state(model, before)


# Parameter counts of the real model ---------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return Sam3Model(Sam3Config())


@pytest.mark.parametrize(
    ("name", "parameters", "percent"),
    [
        ("minimal_lora_config", 516_096, 0.06),
        ("base_config", 3_883_008, 0.47),
        ("full_lora_config", 14_616_576, 1.77),
    ],
)
def test_presets_have_their_parameter_counts(full_size, name, parameters, percent):
    config = load_config(ROOT / "configs" / f"{name}.yaml", {})
    model = deepcopy(full_size)
    matched = apply_lora(model, lora_config(config))
    assert count_parameters(model) == (parameters, 840_376_374)
    assert 100 * parameters / 840_376_374 == pytest.approx(percent, rel=0.03)
    total = lora_table(model).splitlines()[-1]
    assert total.split()[:3] == ["total", str(len(matched)), f"{parameters:,}"]
    assert total.endswith(f"({parameters / 840_376_374:.3%} of base)")


def test_table_has_a_line_for_each_adapted_component(model):
    config = choose(["q_proj"], "detr_decoder", "mask_decoder")
    apply_lora(model, config)
    lines = [line.split() for line in lora_table(model).splitlines()]
    per_layer = 12 * (64 + 64)
    assert lines[1] == ["detr_decoder", "6", f"{6 * per_layer:,}"]
    assert lines[2] == ["mask_decoder", "1", f"{per_layer:,}"]
    assert lines[3][:3] == ["total", "7", f"{7 * per_layer:,}"]
    assert len(lines) == 4
