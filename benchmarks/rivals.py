"""What the benchmarks share: a model with random weights, data, settings, and whom ours is held to.

    ours      Forward + engine.train_one_epoch: vision once an image, text once a prompt, heads in
              batches; LoRALinear
    library   transformers' Sam3Model + peft in a plain loop: every row (image, prompt) brings its
              own copy of the image
    one by one  the same, a row at a time

Rivals train the same loss. What it reads beyond the library's outputs (each layer's, and the mask
embeddings instead of every query's mask) is caught by hooks, which spares them the work of a loss
of their own on `pred_masks`.

Contenders take turns, so that whatever else the machine does meets all of them. On a GPU times are
of the wall clock; on a CPU they are the processor's own for this process, on one thread.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Sam3Config, Sam3Model

ROOT = Path(__file__).resolve().parents[1]
# Scripts in folders of their own: the package lies one level up, the tiny models beside.
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from make_sam3_tiny import (  # noqa: E402
    SIZES,
    average_boxes,
    make_tokenizer,
    spread_queries,
    spread_words,
    tiny_config,
)

from lora_layers import (  # noqa: E402
    LoRAConfig,
    apply_lora,
    lora_modules,
    match_modules,
)
from sam3_lora import engine, runlog  # noqa: E402
from sam3_lora.config import Config, load_config, lora_config  # noqa: E402
from sam3_lora.forward import (  # noqa: E402
    PADDING_BOX,
    Forward,
    Outputs,
    inverse_sigmoid,
)
from sam3_lora.losses import compute_losses, count_targets  # noqa: E402
from sam3_lora.model import (  # noqa: E402
    cast_towers,
    choose_device,
    compute_dtype,
    tokenize,
)
from sam3_lora.scenes import WORDS  # noqa: E402

STRATEGIES = {"minimal": "minimal_lora", "balanced": "base", "full": "full_lora"}
MODELS = (*sorted(SIZES), "full")
# Standard deviation of the adapters' B: away from zero, where A would get no gradient.
ADAPTER_STD = 0.02
# Half the side of an object, as a share of the image's.
RADII = (0.05, 0.2)


def build_model(size: str, device: torch.device) -> Sam3Model:
    """A base model with random weights, the same in each call, made on its device in fp32, frozen
    and in eval mode.

    Args:
        size: of `MODELS`; `full` is facebook/sam3's (840 M parameters).
        device: where it is made.
    """
    torch.manual_seed(0)
    config = Sam3Config() if size == "full" else tiny_config(size, make_tokenizer())
    with device:
        model = Sam3Model(config)
    spread_queries(model)
    spread_words(model)
    average_boxes(model)
    return model.requires_grad_(False).eval()


def strategy(name: str) -> tuple[Config, LoRAConfig]:
    """The shipped configuration of a key of `STRATEGIES`, and its adapters."""
    config = load_config(ROOT / "configs" / f"{STRATEGIES[name]}_config.yaml", {})
    return config, lora_config(config)


def prompt_texts(count: int) -> list[str]:
    """Different prompts of several words."""
    texts = [" ".join(words) for words in product(*WORDS)]
    texts += [f"{text} {number}" for number in range(2, 2 + count // len(texts)) for text in texts]
    return texts[:count]


def make_batch(images: int, prompts: int, side: int, objects: int = 3) -> dict:
    """Random images, each asked the same prompts, with `objects` rectangles for every one; the same
    in each call.

    Returns:
        As `dataset.collate_fn`; the rows of an image follow each other.
    """
    random = torch.Generator().manual_seed(0)
    rows = images * prompts
    sizes = RADII[0] + (RADII[1] - RADII[0]) * torch.rand(rows, objects, 2, generator=random)
    centres = sizes + (1 - 2 * sizes) * torch.rand(rows, objects, 2, generator=random)
    pixels = (torch.arange(side) + 0.5) / side  # centres
    inside = (pixels - centres[..., None]).abs() <= sizes[..., None]  # (rows,objects,2,S)
    masks = inside[:, :, 1, :, None] & inside[:, :, 0, None, :]  # (rows,objects,S,S)
    boxes = torch.cat([centres, 2 * sizes], dim=-1)
    return {
        "images": torch.randint(
            0, 256, (images, 3, side, side), dtype=torch.uint8, generator=random
        ),
        "image_ids": list(range(images)),
        "original_sizes": [(side, side)] * images,
        "image_index": torch.arange(images).repeat_interleave(prompts),
        "texts": prompt_texts(prompts) * images,
        "category_ids": list(range(1, prompts + 1)) * images,
        "targets": [
            {
                "boxes_cxcywh": boxes[row],
                "masks": masks[row],
                "has_mask": torch.ones(objects, dtype=torch.bool),
                "complete": torch.tensor(True),
            }
            for row in range(rows)
        ],
        "box_prompts_cxcywh": None,
        "box_prompt_labels": None,
    }


def take_rows(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Some of a batch's rows, with all of its images."""
    names = ("texts", "category_ids", "targets", "image_index")
    return batch | {name: batch[name][rows] for name in names}


@torch.no_grad()
def spread_adapters(model: nn.Module) -> None:
    """Gives the adapters' B small random values, as after some training."""
    random = torch.Generator().manual_seed(1)
    for _, module in lora_modules(model):
        values = torch.randn(module.lora_B.shape, generator=random)
        module.lora_B.copy_(ADAPTER_STD * values)


def adapt_ours(
    model: Sam3Model, lora: LoRAConfig, geometry_cls: str = "meta", **options: Any
) -> Forward:
    """The model with our adapters, in the precision that training takes on its device.

    Without the one-to-many branch, which the library has not; `options` are further ones of
    `Forward`.
    """
    apply_lora(model, lora)
    spread_adapters(model)
    dtype = compute_dtype("auto", model.device)
    cast_towers(model, dtype)
    return Forward(model, make_tokenizer(), geometry_cls, dtype, **options)


@dataclass
class Library:
    """`Sam3Model` as its users run it, giving what our criterion reads.

    Args:
        model: base model, or one that `adapt_peft` has adapted.
        dtype: of autocast; fp32 is none.
        tokenizer: its tokenizer.
        geometry_cls: as for `Forward`; `meta` takes a padding box with every prompt.
    """

    model: nn.Module
    dtype: torch.dtype = torch.float32
    tokenizer: Any = field(default_factory=make_tokenizer)
    geometry_cls: str = "meta"

    def __post_init__(self) -> None:
        self.seen: dict[str, Any] = {}
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        parts = {
            "decoder": base.detr_decoder,
            "offsets": base.detr_decoder.box_head,  # last called for all layers at once
            "scores": base.dot_product_scoring,
            "mask_embed": base.mask_decoder.mask_embedder,
            "pixel_embed": base.mask_decoder.instance_projection,
        }
        for name, part in parts.items():
            part.register_forward_hook(partial(self._keep, name))
        self.base = base

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook."""
        self.seen[name] = output

    def inputs(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's inputs: an image and a prompt a row."""
        device = self.base.device
        ids, mask = tokenize(self.tokenizer, batch["texts"])
        count = len(batch["texts"])
        pixels = to_pixels(batch["images"].to(device))
        inputs = {
            "pixel_values": pixels[batch["image_index"].to(device)],
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
        }
        if self.geometry_cls == "meta":
            inputs["input_boxes"] = torch.zeros(count, 1, 4, device=device)
            inputs["input_boxes_labels"] = torch.full((count, 1), PADDING_BOX, device=device)
        return inputs

    def __call__(self, **inputs: Any) -> Any:
        """`Sam3Model.forward` with mixed precision."""
        device = self.base.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**inputs)

    def outputs(self, **inputs: Any) -> Outputs:
        """The same as `Forward.predict` gives it."""
        result = self(**inputs)
        start = inverse_sigmoid(self.seen["decoder"]["reference_boxes"].float())
        outputs = {
            "logits": self.seen["scores"].squeeze(-1),
            "boxes_cxcywh": (start + self.seen["offsets"]).sigmoid(),
            "presence": self.seen["decoder"]["presence_logits"][..., 0],
            "mask_embed": self.seen["mask_embed"],
            "pixel_embed": self.seen["pixel_embed"],
            "semantic": result.semantic_seg[:, 0],
        }
        self.seen.clear()
        return outputs


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as the processor gives them: fp32 in -1 to 1."""
    return (images.float() - 127.5) / 127.5


def adapt_peft(model: Sam3Model, lora: LoRAConfig, adapters: Mapping | None) -> nn.Module:
    """The model with peft's LoRA on the layers that `lora` matches.

    Args:
        model: base model.
        lora: ours.
        adapters: weights to start from, `lora_layers.lora_state_dict` of a model with ours; None:
            those of peft.
    """
    names = match_modules(model, lora)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names
    )
    adapted = get_peft_model(model, config)
    for name in names if adapters else ():
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(adapters[f"{name}.lora_A"])
        layer.lora_B["default"].weight.data.copy_(adapters[f"{name}.lora_B"])
    return adapted


def training_mode(model: nn.Module, components: Iterable[str]) -> None:
    """Our training's modes for a rival: dropout in the components that are adapted."""
    model.eval()
    for name in components:
        getattr(model, name).train()


def criterion_of(config: Config) -> engine.Criterion:
    """The loss with a configuration's settings."""
    training = config.training
    return partial(compute_losses, pos_weight=training.pos_weight, mask_loss=training.mask_loss)


def ours_step(
    forward: Forward,
    config: Config,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    count: engine.Count = count_targets,
) -> float:
    """One step of our training on one micro-batch; returns its loss.

    Raises:
        torch.OutOfMemoryError: the batch does not fit as a whole; training itself goes on in parts.
    """
    limits = engine.Limits(len(batch["image_ids"]), config.hardware.max_rows_per_forward)
    whole = replace(limits)
    records = engine.train_one_epoch(
        forward,
        criterion_of(config),
        count,
        [batch],
        optimizer,
        lambda step: 1.0,
        limits,
        max_grad_norm=config.training.max_grad_norm,
    )
    loss = [record["loss"] for record in records][0]
    if limits != whole:
        raise torch.OutOfMemoryError(f"{whole} was cut to {limits}")
    return loss


def library_step(
    library: Library,
    config: Config,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    rows_at_once: int | None = None,
    count: engine.Count = count_targets,
) -> float:
    """One step of a plain loop; returns its loss.

    Args:
        rows_at_once: rows in one forward and backward; None takes all of the batch's.
    """
    targets, counts = batch["targets"], count(batch["targets"])
    criterion, total = criterion_of(config), 0.0
    optimizer.zero_grad()
    size = rows_at_once or len(targets)
    for start in range(0, len(targets), size):
        part = take_rows(batch, slice(start, start + size))
        outputs = library.outputs(**library.inputs(part))
        loss = criterion(outputs, part["targets"], counts)["loss"]
        loss.backward()
        total += loss.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, config.training.max_grad_norm)
    optimizer.step()
    return total


def choose_machine(name: str, model: str | None) -> tuple[torch.device, str]:
    """The device of a flag, one thread on a CPU, and the model to measure there.

    Args:
        name: as for `hardware.device`.
        model: of `MODELS`; None takes the full size on a GPU, else `bench224`.
    """
    device = choose_device(name)
    if device.type == "cpu":
        torch.set_num_threads(1)
    return device, model or ("full" if device.type == "cuda" else "bench224")


def graphs() -> str:
    """What `torch.compile` has made since the last call: number of graphs, and of breaks."""
    counters = torch._dynamo.utils.counters
    number, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    counters.clear()
    return f"{number}, {breaks}"


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every contender in each of `repeats` rounds, after one that is not counted.

    Args:
        contenders: what is timed, by name.
        before: what a contender needs done first, not timed.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(1 + repeats):
        for name, work in contenders.items():
            if before and name in before:
                before[name]()
            wait_for(device)
            started = clock()
            work()
            wait_for(device)
            if turn:
                seconds[name].append(clock() - started)
    return seconds


def ratio(rival: Sequence[float], ours: Sequence[float]) -> float:
    """How many times longer a rival takes: the median over rounds of `take_turns`."""
    return statistics.median(a / b for a, b in zip(rival, ours, strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a markdown table; numbers with three figures."""
    cells = [list(rows[0])] + [["---"] * len(rows[0])]
    cells += [
        [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def machine(device: torch.device) -> str:
    """Commit, versions and hardware of a measurement."""
    where = f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, {where}"
    return f"{runlog.environment(Path(__file__))}, {where}"
