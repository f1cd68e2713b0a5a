"""Peak GPU memory of a training step, predicted without weights and without a GPU.

The project's own forward and backward run on fake tensors, which have shapes and dtypes and no
numbers. Every storage that an operation makes is followed from its birth to its end:

    weights, adapters, optimizer, gradients | images -> vision -> heads of a chunk -> loss, backward
                                            |            '------ kept ------'--> vision, backward

For a given number of rows in a forward of the heads, the peak of each phase is linear in the
images; so a few traces (`fit`) tell that of every batch size. What CUDA itself takes (`CONTEXT`)
and what the allocator cannot use (`FRAGMENTATION`) is set aside.
"""

from __future__ import annotations

import bisect
import copy
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_layers import count_parameters, lora_modules, lora_table
from sam3_lora.forward import TEXT, Forward, Outputs
from sam3_lora.losses import FOCAL_ALPHA, MASKS_AT_ONCE, KeptByMasks, MaskLosses
from sam3_lora.model import CONTEXT_LENGTH, cast_towers, image_size, train_adapted

# CUDA's caching allocator gives blocks of whole multiples of this (c10 CUDACachingAllocator.cpp).
BLOCK = 512
PHASES = ("vision_forward", "heads", "vision_backward")
# What a peak consists of.
PARTS = ("weights", "adapters", "optimizer", "gradients", "activations", "transient")
CHECKPOINTING = ("off", "mlp", "full")
# Nominal sizes of cards, GiB.
CARDS = (8, 12, 16, 24, 40, 80)
# Set aside: CUDA's context and its libraries' workspaces, bytes; and the share of what is left that
# blocks too small for the next request take, or the driver. Both are estimates.
CONTEXT = 500_000_000
FRAGMENTATION = 0.10
MOST_IMAGES = 4096  # of a batch that is looked for


class Tracker(TorchDispatchMode):
    """Follows the bytes of live storages while it is entered.

    `live` and `peak` are in bytes, each storage rounded up to the allocator's block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def add(self, tensor: torch.Tensor) -> int:
        """Counts a tensor's storage, if it is new, until it is freed; returns its bytes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return 0
        size = _size(tensor)
        self._storages[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        return size

    def restart(self) -> None:
        """Lets the peak begin anew at what is live."""
        self.peak = self.live

    def _free(self, key: int, size: int) -> None:
        """A storage has gone."""
        del self._storages[key]
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Runs an operation and counts what it made; a fake number that is read is 0."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0
        outputs = func(*args, **kwargs or {})
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return outputs


class _FusedAttention(torch.autograd.Function):
    """Memory of CUDA's fused attention: inputs, output and log-sum-exp, never the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """(b,heads,T,d) to the same, in the memory order of (b,T,heads,d) as the kernels give."""
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the first three, one buffer in fp32 and the row sums beside them."""
        query, key, value, _, _, sums = ctx.saved_tensors
        buffers = [torch.empty_like(query, dtype=torch.float32), torch.empty_like(sums)]
        grads = [torch.empty_like(t) for t in (query, key, value)]
        del buffers
        return *grads, None


@contextmanager
def _cuda_rules() -> Iterator[None]:
    """Gives operations on a CPU the memory that they take on a GPU, for this process.

    Attention is fused, dropout keeps a mask of bytes, and norms under autocast run in fp32. A
    function mode would not do: it is off while checkpoints compute again.
    """
    own = {"scaled_dot_product_attention": _attend, "dropout": _drop}
    own |= {name: _in_fp32(getattr(F, name)) for name in ("layer_norm", "group_norm")}
    library = {name: getattr(F, name) for name in own}
    try:
        for name, function in own.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in library.items():
            setattr(F, name, function)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Fused attention; a mask is a bias in the dtype of the product."""
    mixed = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if mixed else query.dtype
    tensors = (t if t is None else t.to(dtype) for t in (query, key, value, attn_mask))
    return _FusedAttention.apply(*tensors)


def _drop(
    x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """Dropout as one kernel."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _in_fp32(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A norm as CUDA's autocast runs it."""

    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    return run


def predict(
    forward: Forward,
    *,
    images: int,
    prompts: int,
    max_rows: int,
    objects: int = MASKS_AT_ONCE,
    mask_loss: str = "full",
    cached: tuple[str, ...] = (),
    chunked: bool | None = None,
) -> dict[str, int]:
    """Bytes on the GPU at the peak of a training step.

    Args:
        forward: as training's, on an adapted model, with its weights or of `load_meta_model`;
            neither the weights nor the tokenizer are used, and it is not changed.
        images: of a micro-batch.
        prompts: rows of each image.
        max_rows: most rows in one forward of the heads.
        objects: of each row, with masks; more than `MASKS_AT_ONCE` take no more.
        mask_loss: as for `compute_losses`.
        cached: what batches bring of frozen parts, as `features.cacheable_parts` gives it; the
            backbone's weights are not on the GPU then.
        chunked: whether an earlier chunk of rows has left gradients of the features; None: if there
            are more rows than `max_rows`.

    Returns:
        `weights` (frozen, without a frozen text encoder's), `adapters`, `optimizer` (AdamW's two
        moments), `gradients`, `activations` kept when a chunk's heads have run, `transient`, what
        the peak has beyond these; `peak`, their sum; and the peak of each of the `PHASES`.
    """
    chunked = images * prompts > max_rows if chunked is None else chunked
    model = _without_data(forward.model)
    cast_towers(model, forward.dtype)
    train_adapted(model)
    loss = partial(_loss, size=image_size(model), count=objects, kind=mask_loss)
    with FakeTensorMode(allow_non_fake_inputs=True), _cuda_rules():
        forward = _fake_forward(forward, model)
        with Tracker() as tracker:
            absent = ["text_encoder."] if forward.is_frozen(*TEXT) else []
            absent += ["vision_encoder.backbone."] if cached else []
            sizes, held = _count_static(tracker, forward, tuple(absent))
            batch = _fake_batch(forward, images, images * prompts, cached)
            peaks, kept = _trace_step(tracker, forward, batch, slice(0, max_rows), loss, chunked)
            del held
    static, peak = sum(sizes.values()), max(peaks.values())
    parts = {"activations": kept - static, "transient": peak - kept, "peak": peak}
    return sizes | parts | peaks


def fit(forward: Forward, *, prompts: int, max_rows: int, **settings: Any) -> Callable[[int], int]:
    """The peak for any number of images, from two traces, or from three.

    Args:
        forward, prompts, max_rows: as for `predict`.
        settings: its other arguments.

    Returns:
        images -> bytes at the peak, never falling. It may lie above `predict` by the gradient of
        the images' features where the rows fit into one forward, and between traces.
    """
    # Up to here the rows grow with the images.
    knee = -(-max_rows // prompts)
    counts = sorted({1, knee, knee + 1})
    settings |= {"prompts": prompts, "max_rows": max_rows, "chunked": True}
    traces = [predict(forward, images=count, **settings) for count in counts]

    def peak_at(images: int) -> int:
        right = 1 if images <= counts[1] else len(counts) - 1
        low, high = counts[right - 1], counts[right]
        share = (images - low) / (high - low)
        return max(
            round(traces[right - 1][phase] * (1 - share) + traces[right][phase] * share)
            for phase in PHASES
        )

    return peak_at


def usable(free_bytes: int) -> int:
    """Bytes of free GPU memory that a prediction may fill."""
    return int(free_bytes * (1 - FRAGMENTATION))


def largest_batch(peak_at: Callable[[int], int], free_bytes: int) -> int:
    """The most images of a micro-batch that fit, 0 for none.

    Args:
        peak_at: images -> bytes, as `fit` gives.
        free_bytes: of the GPU before the model is on it; a tenth is left free.
    """
    budget = usable(free_bytes)
    return bisect.bisect_right(range(1, MOST_IMAGES + 1), budget, key=peak_at)


def choose_checkpointing(peak_of: Callable[[str], int], free_bytes: int) -> str:
    """The checkpointing that costs least time among those that fit: `off`, `mlp` or `full`.

    Args:
        peak_of: checkpointing -> bytes; asked in this order, no further than needed.
        free_bytes: of the GPU before the model is on it; a tenth is left free.

    Returns:
        `full` also where that does not fit.
    """
    budget = usable(free_bytes)
    return next((m for m in CHECKPOINTING[:-1] if peak_of(m) <= budget), CHECKPOINTING[-1])


def resolve_checkpointing(asked: str, forward: Forward, **settings: Any) -> str:
    """What is asked for; for `auto` the fastest that fits the GPU, `off` elsewhere.

    Args:
        asked, forward, settings: `hardware.gradient_checkpointing`, and as for `predict`.
    """
    if asked != "auto":
        return asked
    if forward.device.type != "cuda":
        return "off"
    # The prediction holds the weights, which are there already.
    free = torch.cuda.mem_get_info(forward.device)[0] + torch.cuda.memory_allocated(forward.device)
    modes = {mode: replace(forward, checkpointing=mode) for mode in CHECKPOINTING}
    return choose_checkpointing(lambda mode: predict(modes[mode], **settings)["peak"], free)


def _without_data(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device."""
    memo: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def _fake_forward(forward: Forward, model: nn.Module) -> Forward:
    """The same forward on a model whose tensors become fake ones on a CPU."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                module._parameters[name] = nn.Parameter(empty, tensor.requires_grad)
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        if hasattr(module, "build_sine_position_embedding"):
            # The library caches these for the whole process: no fake one may get in there.
            build = module.build_sine_position_embedding.__wrapped__
            module.build_sine_position_embedding = build
    fake = replace(forward, model=model, tokenizer=_blank_tokens, texts={})
    # On a CPU frozen parts run image by image, on a GPU all together.
    fake._groups = lambda tensor, component: (tensor,)
    return fake


def _blank_tokens(texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
    """A tokenizer of which only the shapes count."""
    tokens = torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.long)
    return {"input_ids": tokens, "attention_mask": tokens}


def _count_static(
    tracker: Tracker, forward: Forward, absent: tuple[str, ...]
) -> tuple[dict[str, int], list[torch.Tensor]]:
    """Bytes of what is there before a step, by kind, but for names that begin with one of `absent`;
    and the tensors of it that must be held."""
    sizes, held = dict.fromkeys(("weights", "adapters", "optimizer", "gradients"), 0), []
    for name, tensor in [*forward.model.named_parameters(), *forward.model.named_buffers()]:
        if not tensor.requires_grad:
            sizes["weights"] += 0 if name.startswith(absent) else tracker.add(tensor)
            continue
        sizes["adapters"] += tracker.add(tensor)
        moments = [torch.empty_like(tensor) for _ in range(2)]
        # Those of an earlier micro-batch or chunk are there already.
        tensor.grad = torch.empty_like(tensor)
        sizes["optimizer"] += sum(map(_size, moments))
        sizes["gradients"] += _size(tensor.grad)
        held += moments
    return sizes, held


def _fake_batch(
    forward: Forward, images: int, rows: int, cached: tuple[str, ...]
) -> dict[str, Any]:
    """A micro-batch on the GPU, every prompt another text."""
    model = forward.model
    side, (height, width) = image_size(model), forward.grid
    hidden = model.vision_encoder.config.backbone_config.hidden_size
    channels = model.detr_decoder.query_embed.embedding_dim
    shapes = {
        "trunk": ((images, height, width, hidden), forward.dtype),
        "memory": ((rows, height * width, channels), forward.dtype),
        "geometry": ((images, 1, channels), torch.float32),
        "images": ((images, 3, side, side), torch.uint8),
    }
    names = cached or ("images",)
    batch = {
        k: torch.empty(shape, dtype=dtype) for k, (shape, dtype) in shapes.items() if k in names
    }
    texts = [str(row) for row in range(rows)]
    if forward.is_frozen(*TEXT):
        feature, mask = torch.empty(CONTEXT_LENGTH, channels), torch.ones(CONTEXT_LENGTH).bool()
        forward.texts.update((text, (feature, mask)) for text in texts)
    return batch | {"texts": texts, "image_index": torch.zeros(rows, dtype=torch.long)}


def _trace_step(
    tracker: Tracker,
    forward: Forward,
    batch: dict[str, Any],
    rows: slice,
    loss: Callable[[Outputs], torch.Tensor],
    chunked: bool,
) -> tuple[dict[str, int], int]:
    """The step of `engine._backward` for one chunk: each phase's peak, and what the chunk keeps."""
    tracker.restart()
    features = forward.encode(batch)
    leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in features.items()}
    peaks = {"vision_forward": tracker.peak}
    if chunked:  # an earlier chunk has left its gradients
        for leaf in leaves.values():
            leaf.grad = torch.empty_like(leaf) if leaf.requires_grad else None
    tracker.restart()
    outputs = forward.predict(leaves, batch, rows)
    kept = tracker.live
    total = loss(outputs)
    total.backward()
    del outputs, total
    peaks["heads"] = tracker.peak
    tracker.restart()
    shared = [k for k, v in leaves.items() if v.grad is not None]
    if shared:
        torch.autograd.backward([features[k] for k in shared], [leaves[k].grad for k in shared])
    return peaks | {"vision_backward": tracker.peak}, kept


def _loss(outputs: Outputs, size: int, count: int, kind: str) -> torch.Tensor:
    """A sum that keeps and makes what `compute_losses` does.

    Its large tensors are those of masks: a row's matched ones, a few together, and semantic maps.
    """
    total = sum(v.float().sum() for k, v in outputs.items() if k not in ("pixel_embed", "semantic"))
    if "pixel_embed" not in outputs:
        return total
    pixels = outputs["pixel_embed"].unbind()
    # Rows are alike: it is the last that is worked on while all the others keep theirs.
    losses = [KeptByMasks] * (len(pixels) - 1) + [MaskLosses]
    shape = min(count, MASKS_AT_ONCE), size, size
    masks = [torch.empty(shape, dtype=torch.bool) for _ in pixels]
    for name in ("mask_embed", "o2m_mask_embed"):
        embed = outputs[name].unbind() if name in outputs else ()
        for query, row, own, loss in zip(embed, pixels, masks, losses, strict=bool(embed)):
            query = query[: len(own)].to(row.dtype)
            logits = torch.einsum("mc,chw->mhw", query, row).float()
            found = loss.apply(logits, own.clone(), kind, FOCAL_ALPHA)
            total = total + found[0].sum() + found[1].sum()
    for semantic, own, loss in zip(outputs["semantic"].unbind(), masks, losses, strict=True):
        found = loss.apply(semantic[None], own.any(0, keepdim=True), "full", FOCAL_ALPHA)
        total = total + found[0].sum() + found[1].sum()
    return total


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in the allocator's blocks."""
    return -(-tensor.untyped_storage().nbytes() // BLOCK) * BLOCK


def dry_run_text(
    forward: Forward,
    *,
    images: int,
    prompts: int,
    max_rows: int,
    stands_in: bool = False,
    **settings: Any,
) -> str:
    """What a training run would take, for `--dry_run`.

    Args:
        forward, images, prompts, max_rows: as for `predict`; the forward's own checkpointing is the
            one that is described.
        stands_in: as `load_meta_model` returns it.
        settings: other arguments of `predict`.
    """
    rows = {"prompts": prompts, "max_rows": max_rows, **settings}
    parts = predict(forward, images=images, **rows)
    modes = [m for m in CHECKPOINTING if m != "mlp" or not forward.is_frozen("vision_encoder")]
    fits = {mode: fit(replace(forward, checkpointing=mode), **rows) for mode in modes}
    fits.setdefault("mlp", fits["off"])  # the MLPs of a frozen tower keep nothing
    peaks = {mode: peak_at(images) for mode, peak_at in fits.items()}
    lines = [
        *(["structure: facebook/sam3's, from the library's default configuration"] * stands_in),
        lora_table(forward.model),
        *_name_lines(forward.model),
        f"adapter file: {4 * count_parameters(forward.model)[0] / 1e6:,.1f} MB",
        "",
        f"predicted peak on a GPU: {parts['peak'] / 1e9:.2f} GB for batch_size {images}, {prompts} "
        f"prompts an image, {max_rows} rows per forward, {str(forward.dtype)[6:]}, "
        f"checkpointing {forward.checkpointing}",
        *(f"  {name:<12}{parts[name] / 1e6:>10,.1f} MB" for name in PARTS),
        "",
        f"largest batch_size by checkpointing, and what auto takes for {images}",
        "card".ljust(8) + "".join(f"{mode:>8}" for mode in (*CHECKPOINTING, "auto")),
    ]
    for card in CARDS:
        free = card * 2**30 - CONTEXT
        chosen = choose_checkpointing(peaks.__getitem__, free)
        counts = [largest_batch(fits[mode], free) for mode in CHECKPOINTING]
        cells = [f"{n}+" if n == MOST_IMAGES else n for n in counts]
        cells.append(chosen if peaks[chosen] <= usable(free) else "none")
        lines.append(f"{card} GiB".ljust(8) + "".join(f"{cell:>8}" for cell in cells))
    aside = f"{CONTEXT / 1e9:.1f} GB for CUDA itself, {FRAGMENTATION:.0%} for fragmentation"
    return "\n".join([*lines, f"set aside: {aside}"])


def _name_lines(model: nn.Module) -> list[str]:
    """The adapted layers, those that differ by a number alone in one line."""
    leaves: dict[str, dict[str, int]] = {}
    for name, _ in lora_modules(model):
        parent, _, leaf = re.sub(r"\.\d+(?=\.)", ".*", name).rpartition(".")
        counts = leaves.setdefault(parent, {})
        counts[leaf] = counts.get(leaf, 0) + 1
    return [
        f"  {parent}.({'|'.join(counts)})  {sum(counts.values())} layers"
        for parent, counts in leaves.items()
    ]
