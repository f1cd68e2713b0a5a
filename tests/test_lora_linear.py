"""One LoRA layer: its formula, its gradients, its dropout, and what it keeps for backward."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from benchmarks.lora_linear import build, saved_bytes
from lora_layers import AdapterError, LoRALinear, _draw_mask

# A product that torch's counter leaves out.
IN_PLACE = {torch.ops.aten.addmm_: lambda y, a, b, out_shape: addmm_flop(y, a, b)}


def make_layer(dtype=torch.float32, dropout=0.0):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(20, 12).to(dtype), rank=4, alpha=6.0, dropout=dropout)
    return layer, torch.randn(5, 3, 20).to(dtype)


def test_layer_formula():
    layer, x = make_layer()
    layer.lora_B.data.normal_()
    base = layer.base
    weight = base.weight + 1.5 * layer.lora_B @ layer.lora_A  # alpha / rank
    torch.testing.assert_close(layer(x), x @ weight.T + base.bias)
    torch.testing.assert_close(layer.delta_weight(), weight - base.weight)
    assert layer.lora_A.shape == (4, 20) and layer.lora_B.shape == (12, 4)
    assert layer.weight is base.weight and layer.bias is base.bias


def test_a_starts_kaiming_uniform_and_b_at_zero():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 300), rank=50, alpha=1.0)
    bound = 1 / 20  # sqrt(6 / ((1 + 5) * 400))
    assert float(layer.lora_A.detach().abs().max()) <= bound
    assert float(layer.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not layer.lora_B.any()


def test_dropout_is_on_the_update_in_training_only():
    layer, x = make_layer(dropout=0.5)
    layer.lora_B.data.normal_()
    layer.eval()
    exact = layer(x)
    layer.train()
    assert not torch.allclose(layer(x), exact)
    layer.lora_B.data.zero_()
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, r"lora\.rank: expected an integer >= 1, found 0"),
        ({"alpha": 0.0}, r"lora\.alpha: expected a number > 0, found 0\.0"),
        ({"dropout": 1.0}, r"lora\.dropout: expected a number in \[0, 1\), found 1\.0"),
        ({"dropout": -0.1}, r"lora\.dropout: expected a number in \[0, 1\), found -0\.1"),
    ],
)
def test_layer_refuses_numbers_out_of_range(changed, message):
    with pytest.raises(AdapterError, match=message):
        LoRALinear(nn.Linear(4, 4), **{"rank": 1, "alpha": 1.0, "dropout": 0.0} | changed)


def test_a_bf16_base_keeps_fp32_master_weights():
    layer, x = make_layer(torch.bfloat16)
    assert torch.equal(layer(x), layer.base(x))  # B = 0
    layer.lora_B.data.normal_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer.delta_weight().dtype == torch.float32
    weight = layer.base.weight.float() + layer.delta_weight()
    torch.testing.assert_close(
        y.float(), x.float() @ weight.T + layer.base.bias.float(), rtol=0.05, atol=0.1
    )
    y.float().square().mean().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    before = layer.base.weight.clone()
    layer.merge()
    assert layer.base.weight.dtype == torch.bfloat16
    assert torch.equal(layer.base.weight, weight.bfloat16())
    layer.unmerge()
    assert torch.equal(layer.base.weight, before)


# Gradients ----------------------------------------------------------------------------------------


def formula(layer, x, mask=1.0):
    """The layer's output as autograd would differentiate it; the mask is on the update's input."""
    low = F.linear(x * mask, layer.lora_A.to(x.dtype))
    return layer.base(x) + F.linear(low, (layer.lora_B * layer.scaling).to(x.dtype))


def gradients(layer, x, function):
    """Output, and gradients of x, A and B for a loss that weighs each entry differently."""
    x = x.detach().requires_grad_()
    y = function(x)
    weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (weight.to(y.dtype) * y).sum().backward()
    found = y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad
    layer.zero_grad()
    return found


def assert_near(found, expected, tolerance):
    """Within a share of the largest entry, in the dtypes expected."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def mask_of(shape, p, seed):
    """The mask, scaled, that a layer draws after a seed: W = 0 and A = B = 1 show it."""
    layer = LoRALinear(nn.Linear(shape[-1], shape[-1], bias=False), shape[-1], shape[-1], p)
    layer.base.weight.data.zero_()
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.eye_(factor)
    torch.manual_seed(seed)
    return layer(torch.ones(shape)).detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_equal_the_formulas(dtype, bias):
    layer, x = make_layer()
    layer.lora_B.data.normal_()
    layer.base.bias = layer.base.bias if bias else None
    layer, x = layer.to(dtype), x.to(dtype)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for case in (x, x.transpose(0, 1), x[0, 0], x[:0]):  # any strides, one row, none
        expected = gradients(layer, case, lambda x: formula(layer, x))
        if case.numel():
            assert_near(gradients(layer, case, layer), expected, tolerance)
        else:
            assert [g.shape for g in gradients(layer, case, layer)] == [g.shape for g in expected]


def test_gradients_of_a_bf16_base():
    layer, x = make_layer(torch.bfloat16)
    layer.lora_B.data.normal_()
    found = gradients(layer, x, layer)
    assert [g.dtype for g in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    expected = gradients(layer.float(), x.float(), lambda x: formula(layer, x))
    assert_near([g.float() for g in found], expected, 0.02)  # bf16 has 8 bits: 0.4 %, a few times


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast_keeps_no_casts(dropout):
    layer, x = make_layer(dropout=dropout)
    layer.lora_B.data.normal_()
    mask = mask_of(x.shape, dropout, 3)
    expected = gradients(layer, x, lambda x: formula(layer, x, mask))
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(layer, x, layer)  # backward too, as some loops do
        kept = saved_bytes([layer], x)
    assert [g.dtype for g in found] == [torch.bfloat16] + [torch.float32] * 3
    assert_near([g.float() for g in found], expected, 0.02)
    assert kept == 15 * 4 * 2  # tokens x rank, bf16
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("needed", [True, False])
def test_no_product_that_is_not_asked_for(needed):
    layer, x = make_layer()
    base, wide, narrow = 2 * 15 * 20 * 12, 2 * 15 * 20 * 4, 2 * 15 * 4 * 12  # x W; x A; low B
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        layer(x.requires_grad_(needed)).sum().backward()
    assert (x.grad is None) != needed
    backward = wide + 2 * narrow + needed * (base + wide)  # dA, dlow, dB; dx
    assert counter.get_total_flops() == base + wide + narrow + backward


# Dropout ------------------------------------------------------------------------------------------


def test_dropout_draws_no_wide_integers_on_a_mac(monkeypatch):
    x = SimpleNamespace(shape=(40, 50), device=torch.device("cpu"), is_meta=False, is_mps=True)
    x.numel = lambda: 2000
    monkeypatch.setattr(torch.Tensor, "random_", None)
    mask, again, other = (_draw_mask(x, torch.float32, 0.25, seed) for seed in (1, 1, 2))
    assert torch.equal(mask, again) and not torch.equal(mask, other)
    assert mask.shape == (40, 50) and mask.unique().tolist() == [0, 1]
    assert float(mask.mean()) == pytest.approx(0.75, abs=0.05)


def test_dropout_has_its_distribution():
    mask = mask_of((500, 40), 0.2, seed=0)
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full((int(kept.sum()),), 1.25))
    assert float(kept.double().mean()) == pytest.approx(0.8, abs=4 * math.sqrt(0.2 * 0.8 / 20_000))
    assert torch.equal(mask, mask_of((500, 40), 0.2, seed=0))
    assert not torch.equal(mask, mask_of((500, 40), 0.2, seed=1))


@pytest.mark.parametrize("strides", ["rows", "columns"])
def test_dropout_draws_the_same_mask_in_backward(strides):
    layer, x = make_layer(dropout=0.5)
    layer.lora_B.data.normal_()
    x = x if strides == "rows" else x.transpose(0, 1)
    mask = mask_of(x.shape, 0.5, seed=3)
    expected = gradients(layer, x, lambda x: formula(layer, x, mask))
    torch.manual_seed(3)
    assert_near(gradients(layer, x, layer), expected, 1e-6)


def test_dropout_under_checkpointing():
    layer, x = make_layer(dropout=0.5)
    layer.lora_B.data.normal_()
    torch.manual_seed(3)
    expected = gradients(layer, x, layer)
    for reentrant in (False, True):
        torch.manual_seed(3)
        found = gradients(layer, x, lambda x, r=reentrant: checkpoint(layer, x, use_reentrant=r))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# What it keeps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_tenth_of_what_peft_keeps(dropout):
    kept = {}
    for kind in ("linear", "peft", "ours"):
        x = torch.randn(96, 64, dtype=torch.bfloat16, requires_grad=True)
        kept[kind] = saved_bytes(build(kind, 64, 4, dropout, torch.bfloat16), x)
    assert kept["linear"] == 0 and kept["ours"] == 3 * 96 * 4 * 2  # tokens x rank, bf16
    assert kept["peft"] >= 3 * 96 * 64 * 4  # a copy of x in fp32 for each
    assert kept["ours"] <= 0.1 * kept["peft"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_to_one_graph(dropout):
    layer, x = make_layer(dropout=dropout)
    layer.lora_B.data.normal_()
    torch._dynamo.reset()
    counters.clear()
    found = gradients(layer, x, torch.compile(layer, backend="eager"))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    if not dropout:
        assert_near(found, gradients(layer, x, layer), 1e-6)
