"""Low-rank adaptation (LoRA) of `nn.Linear` layers, in one file that needs only torch.

    y = x W^T + b + scaling * (dropout(x) A^T) B^T        scaling = alpha / rank

    x (..., in) ---> W (out, in), frozen ----------------------------> + ---> y (..., out)
          \\                                                           ^
           '-> dropout -> A (rank, in) -> B (out, rank) -> * scaling -'

A starts Kaiming-uniform and B starts at zero, so an adapted model equals its base bit for bit until
the first optimizer step. A and B are kept in fp32 whatever the base's dtype and are cast for the
product. `_Adapted` computes the formula in eager mode; what it keeps for backward is stated there.

    matched = apply_lora(model, LoRAConfig(rank=8, alpha=16, components=("detr_decoder",)))
    print(lora_table(model))
    ...                                   # train: only names with `lora_` require gradients
    torch.save(lora_state_dict(model), "lora.pt")
    merge_lora(model)                     # for inference; unmerge_lora restores the base

Source: Hu et al., LoRA, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

# The parts of SAM 3 that can be adapted: attributes of the model, whole first segments of a name.
COMPONENTS = (
    "vision_encoder",
    "text_encoder",
    "geometry_encoder",
    "detr_encoder",
    "detr_decoder",
    "mask_decoder",
)
# The attention's output projection has two names in SAM 3: CLIP's text encoder says `out_proj`, all
# else `o_proj`. Either target means both, or a list with one of them would skip a part in silence.
OUTPUT_PROJECTION = ("o_proj", "out_proj")
# Linear layers whose output nothing reads: an adapter there would never receive a gradient.
UNUSED_LINEARS = ("text_encoder.text_projection",)


class AdapterError(ValueError):
    """An adapter that fits neither the model nor its own description; the message names both
    sides."""


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how strongly.

    Args:
        rank: r >= 1, the inner dimension of the update.
        alpha: > 0; the update is scaled by alpha / rank.
        dropout: probability in [0, 1) on the input of A, in training mode only.
        target_modules: names of Linear layers, matched on whole dotted segments from the end:
            `q_proj`, `self_attn.q_proj` and `layers.3.mlp.fc1` are targets, `proj` matches none.
        components: attributes of the model to look in; see `COMPONENTS`.
    """

    rank: int = 12
    alpha: float = 24.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    components: tuple[str, ...] = ("vision_encoder", "detr_encoder", "detr_decoder")


class LoRALinear(nn.Module):
    """A frozen Linear layer plus a trainable low-rank update.

    Args:
        base: the layer to adapt, weight (out, in); it is frozen here.
        rank: r >= 1.
        alpha: > 0; scaling = alpha / rank.
        dropout: probability in [0, 1) on the update's input, in training mode only.

    Raises:
        AdapterError: rank, alpha or dropout out of range.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        _check_ranges(rank, alpha, dropout)
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self._unmerged_weight: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The base weight (out, in), for callers that treat this as an `nn.Linear`."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base bias (out,), or None."""
        return self.base.bias

    @property
    def merged(self) -> bool:
        """Whether the update is inside the base weight at present."""
        return self._unmerged_weight is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., in) to (..., out) in the dtype of the base layer's output."""
        if self.merged:
            return self.base(x)
        if torch.compiler.is_compiling():  # the compiler fuses the formula itself
            low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., rank)
            return self.base(x) + F.linear(low, (self.lora_B * self.scaling).to(x.dtype))
        p = self.dropout.p if self.training else 0.0
        weight, bias = self.base.weight, self.base.bias
        return _Adapted.apply(x, self.lora_A, self.lora_B, weight, bias, self.scaling, p)

    def delta_weight(self) -> torch.Tensor:
        """The update of the weight, scaling * B A: (out, in), fp32."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the base weight, summed in fp32; a second call changes nothing."""
        if self.merged:
            return
        weight = self.base.weight
        self._unmerged_weight = weight.detach().clone()
        weight.copy_((weight.float() + self.delta_weight()).to(weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the exact base weight back (a copy, not a subtraction); a second call does
        nothing."""
        if not self.merged:
            return
        self.base.weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"rank={self.rank}, scaling={self.scaling:g}, merged={self.merged}"


class _Adapted(torch.autograd.Function):
    """The formula in eager mode: next to nothing saved, no pass over x or y but the products.

    Plain autograd keeps, for each layer, dropout's mask and output and, under autocast, bf16 casts
    of x and W. Kept here: x, A, B and W themselves, so no new storage (layers with one input keep
    one tensor); the (..., rank) product; and dropout's seed, to draw the same mask in backward.
    Casts are made anew in backward, for one layer at a time.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        """Maps (..., in) to (..., out); p is the probability to drop an entry of A's input."""
        cast = x.to(_product_dtype(x))
        y = F.linear(cast, weight, bias)  # autocast casts W
        rows = cast.reshape(-1, cast.shape[-1])
        # On the CPU, whose generator resume files and checkpointing restore; waits for no device.
        # `tolist`, as `item` would count as a copy from the device.
        ctx.seed = torch.empty((), dtype=torch.int64, device="cpu").random_().tolist() if p else 0
        ctx.p = p
        # Scaling the (out, rank) factor saves a pass over the (..., out) result; 1 / (1 - p) too.
        ctx.scale = scaling / (1 - p)
        if p:
            rows = _draw_mask(x, y.dtype, p, ctx.seed).mul_(rows)
        low = rows @ lora_a.to(y.dtype).T  # (n, rank)
        y.view(-1, y.shape[-1]).addmm_(low, (lora_b * ctx.scale).to(y.dtype).T)
        ctx.save_for_backward(x, low, lora_a, lora_b, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x in its dtype and of A and B in theirs; W and b are frozen."""
        x, low, lora_a, lora_b, weight = ctx.saved_tensors
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        dx = da = db = mask = None
        dtype = low.dtype
        dy = dy.reshape(-1, dy.shape[-1])
        if needs_b:
            db = (dy.T @ low).to(lora_b.dtype) * ctx.scale
        if needs_x or needs_a:
            dlow = dy @ (lora_b * ctx.scale).to(dtype)
            mask = _draw_mask(x, dtype, ctx.p, ctx.seed) if ctx.p else None
        if needs_x:
            dx = dy @ weight.to(dtype)
            if mask is None:
                dx.addmm_(dlow, lora_a.to(dx.dtype))
            else:
                dx.addcmul_(mask, dlow @ lora_a.to(dx.dtype))
            dx = dx.view(x.shape).to(x.dtype)
        if needs_a:
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            da = (dlow.T @ (rows if mask is None else mask.mul_(rows))).to(lora_a.dtype)
        return dx, da, db, None, None, None, None


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a Linear layer multiplies x: autocast's where that is on."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _draw_mask(x: torch.Tensor, dtype: torch.dtype, p: float, seed: int) -> torch.Tensor:
    """For x (..., in): (n, in) of ones, and zeros with probability p; the same for a seed."""
    generator = torch.Generator("cpu" if x.is_meta else x.device).manual_seed(seed)
    if x.is_mps:  # which has no random integers of 64 bits
        mask = torch.empty(x.shape, dtype=dtype, device=x.device)
        return mask.bernoulli_(1 - p, generator=generator).view(-1, x.shape[-1])
    # 16 random bits an entry, drawn four at a time: as exact as p need be, and on a CPU much
    # cheaper than `bernoulli_`, for the mask is drawn twice.
    words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    return bits.ge_(int(p * 2**16) - 2**15).to(dtype).view(-1, x.shape[-1])


def _check_ranges(rank: int, alpha: float, dropout: float) -> None:
    """Raises AdapterError for a setting out of range."""
    if rank < 1:
        raise AdapterError(f"lora.rank: expected an integer >= 1, found {rank}")
    if not 0 < alpha < math.inf:
        raise AdapterError(f"lora.alpha: expected a number > 0, found {alpha}")
    if not 0.0 <= dropout < 1.0:
        raise AdapterError(f"lora.dropout: expected a number in [0, 1), found {dropout}")


def apply_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freezes the whole model, then puts a `LoRALinear` in place of every Linear that matches.

    Args:
        model: a SAM 3 model; its six components are attributes of the names in `COMPONENTS`.
        config: what to adapt.

    Returns:
        Dotted names of the adapted layers, in the model's order. Afterwards the only parameters
        that require gradients are those whose name contains `lora_`.

    Raises:
        AdapterError: an unknown component, a target or a component that matched nothing, a model
            that is adapted already. Nothing has been replaced then.
    """
    if any(True for _ in lora_modules(model)):
        raise AdapterError("the model is adapted already: take its adapter off with remove_lora")
    _check_ranges(config.rank, config.alpha, config.dropout)
    matched = match_modules(model, config)
    most = max(min(model.get_submodule(name).weight.shape) for name in matched)
    if config.rank > most:  # and no layer's update can have it
        raise AdapterError(f"lora.rank: expected at most {most}, found {config.rank}")
    model.requires_grad_(False)
    for name in matched:
        base = model.get_submodule(name)
        _put(model, name, LoRALinear(base, config.rank, config.alpha, config.dropout))
    strangers = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert not strangers, f"trainable parameters that are not LoRA's: {strangers}"
    return matched


def remove_lora(model: nn.Module, keep_update: bool = False) -> None:
    """Puts the base layers back in place of every LoRA layer: the exact ones, which undoes
    `apply_lora`, or with `keep_update` those that the update is merged into."""
    for name, module in list(lora_modules(model)):
        if keep_update:
            module.merge()
        else:
            module.unmerge()
        _put(model, name, module.base)


def restore_lora(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Puts LoRA layers, by dotted name, back on the base that `remove_lora` took them from."""
    for name, layer in layers.items():
        _put(model, name, layer)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one of a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def match_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The names of the Linear layers that a configuration adapts, in the model's order.

    Args:
        model: a SAM 3 model without LoRA layers.
        config: targets and components.

    Raises:
        AdapterError: lists every component and target that matched nothing, with the nearest names.
    """
    unknown = [c for c in config.components if c not in COMPONENTS]
    if unknown or not config.components:
        raise AdapterError(
            f"lora.apply_to_*: expected one or more of {', '.join(COMPONENTS)}; found "
            f"{', '.join(unknown) or 'none'}"
        )
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.split(".")[0] in config.components
        and name not in UNUSED_LINEARS
    ]
    known = set(linears)  # the full names of a blend are found without a search
    hits = {
        target: [target] if target in known else [n for n in linears if _matches(n, target)]
        for target in config.target_modules
    }
    chosen = {name for names in hits.values() for name in names}
    problems = []
    for target, names in hits.items():
        if not names:
            problems.append(f"target {target!r} matched no Linear layer{_nearest(target, linears)}")
    for component in config.components:
        if not any(name.split(".")[0] == component for name in chosen):
            leaves = sorted({n.split(".")[-1] for n in linears if n.split(".")[0] == component})
            problems.append(
                f"component {component} matched no target (its layers: {', '.join(leaves)})"
            )
    if problems or not chosen:
        raise AdapterError(
            "lora.target_modules / lora.apply_to_*: "
            + "; ".join(problems or ["no target is given"])
        )
    return [name for name in linears if name in chosen]


def _matches(name: str, target: str) -> bool:
    """Whether a target's dotted segments are the last ones of a name; o_proj means out_proj too."""
    segments, wanted = name.split("."), target.split(".")
    tail = segments[-len(wanted) :]
    if tail == wanted:
        return True
    both_outputs = tail[-1] in OUTPUT_PROJECTION and wanted[-1] in OUTPUT_PROJECTION
    return both_outputs and tail[:-1] == wanted[:-1]


def _nearest(target: str, names: Iterable[str]) -> str:
    """A hint: the leaf names nearest to a target that matched nothing, or all of them."""
    leaves = sorted({name.split(".")[-1] for name in names})
    close = difflib.get_close_matches(target, leaves, n=3)
    return f" (nearest: {', '.join(close)})" if close else f" (there are: {', '.join(leaves)})"


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yields (dotted name, layer) of every `LoRALinear`, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors.

    Returns:
        `<layer>.lora_A` (rank, in) and `<layer>.lora_B` (out, rank) for every adapted layer, fp32,
        on the CPU, detached; the names are those of the base model's layers.
    """
    state = {}
    for name, module in lora_modules(model):
        state[f"{name}.lora_A"] = module.lora_A.detach().float().cpu().clone()
        state[f"{name}.lora_B"] = module.lora_B.detach().float().cpu().clone()
    return state


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copies an adapter's tensors into an adapted model; all of them fit, or none is copied.

    Args:
        model: a model on which `apply_lora` has run.
        state: as `lora_state_dict` gives.

    Raises:
        AdapterError: lists the first missing, unexpected and misshapen names, with their counts.
    """
    own = {}
    for name, module in lora_modules(model):
        own[f"{name}.lora_A"] = module.lora_A
        own[f"{name}.lora_B"] = module.lora_B
    misshapen = [
        f"{n} {tuple(state[n].shape)} where the model has {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    faults = {
        "missing": [n for n in own if n not in state],
        "unexpected": [n for n in state if n not in own],
        "misshapen": misshapen,
    }
    if any(faults.values()):
        parts = [f"{len(v)} {k} ({some_names(v)})" for k, v in faults.items() if v]
        raise AdapterError(f"the adapter does not fit the model: {'; '.join(parts)}")
    merged = [name for name, module in lora_modules(model) if module.merged]
    if merged:
        raise AdapterError(f"unmerge before loading: {len(merged)} layers are merged")
    for name, parameter in own.items():
        parameter.copy_(state[name])


def blend_lora(
    adapters: Sequence[tuple[LoRAConfig, Mapping[str, torch.Tensor]]], weights: Sequence[float]
) -> tuple[LoRAConfig, dict[str, torch.Tensor]]:
    """One adapter whose update is the weighted sum of the updates of several, exactly.

        sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

    with s_i = alpha_i / rank_i. Zeros fill the ranks of the adapters that leave a layer alone.

    Args:
        adapters: of one base; configuration and tensors of each, as `lora_state_dict` gives.
        weights: w_i, finite, one an adapter.

    Returns:
        (configuration, tensors): of scaling 1, the sum of the ranks and the union of the layers,
        which are targets by their full names.
    """
    rank = sum(config.rank for config, _ in adapters)
    layers = dict.fromkeys(name.rpartition(".")[0] for _, state in adapters for name in state)
    blend = {}
    for layer in layers:
        parts = [
            (state[f"{layer}.lora_A"], state[f"{layer}.lora_B"] * (w * config.alpha / config.rank))
            for (config, state), w in zip(adapters, weights, strict=True)
            if f"{layer}.lora_A" in state
        ]
        a = torch.cat([a for a, _ in parts])  # (r, in), r <= rank
        b = torch.cat([b for _, b in parts], dim=1)  # (out, r)
        blend[f"{layer}.lora_A"] = F.pad(a, (0, 0, 0, rank - len(a)))
        blend[f"{layer}.lora_B"] = F.pad(b, (0, rank - len(a)))
    components = tuple(dict.fromkeys(layer.split(".")[0] for layer in layers))
    return LoRAConfig(rank, float(rank), 0.0, tuple(layers), components), blend


def some_names(names: list[str], most: int = 3) -> str:
    """The first few of a list of names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def merge_lora(model: nn.Module) -> None:
    """Merges every LoRA layer of a model; idempotent."""
    for _, module in lora_modules(model):
        module.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Restores every LoRA layer's exact base weight; idempotent."""
    for _, module in lora_modules(model):
        module.unmerge()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts parameters: (those that require gradients, those of the base model without LoRA)."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    return trainable, base


def lora_table(model: nn.Module) -> str:
    """A table of the adapted layers and parameters by component, for the log.

    Returns:
        One line a component, then the total and its share of the base model's parameters.
    """
    layers = dict.fromkeys(COMPONENTS, 0)
    parameters = dict.fromkeys(COMPONENTS, 0)
    for name, module in lora_modules(model):
        component = name.split(".")[0]
        layers[component] += 1
        parameters[component] += module.lora_A.numel() + module.lora_B.numel()
    total = sum(parameters.values())
    base = count_parameters(model)[1]
    lines = [f"{'component':<18}{'layers':>8}{'parameters':>14}"]
    lines += [f"{c:<18}{layers[c]:>8}{parameters[c]:>14,}" for c in COMPONENTS if layers[c]]
    lines.append(
        f"{'total':<18}{sum(layers.values()):>8}{total:>14,}  ({total / base:.3%} of base)"
    )
    return "\n".join(lines)
