"""Pretraining of the demo model: every weight, on endless drawn scenes.

    scene -> 3 prompts -> rows with boxes and targets -> the adapters' own loss, for random weights
          -> a head that names each pixel and each exemplar, dropped afterwards

`pretrain` is the loop; make_sam3_tiny.py calls it.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Sam3Model

from sam3_lora import engine
from sam3_lora.dataset import OUT_OF_DOMAIN_WORDS, place_on_canvas
from sam3_lora.forward import PADDING_BOX, VISUAL_PROMPT, Forward
from sam3_lora.loader import collate_fn
from sam3_lora.losses import compute_losses, count_targets
from sam3_lora.model import choose_device, image_size, load_model
from sam3_lora.runlog import mean_record
from sam3_lora.scenes import COLOURS, TEXTURES, WORDS, draw_shapes, phrases, shape_prompts

log = logging.getLogger(__name__)

# Scenes a step and prompts a scene.
IMAGES, PROMPTS = 8, 3
# Weights for random weights: Meta's mask focal loss of 200 empties the masks before they form.
WEIGHTS = {
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_ce": 2.0,
    "presence_loss": 6.0,
    "loss_mask": 40.0,
    "loss_dice": 10.0,
    "loss_semantic_seg": 10.0,
    "loss_semantic_dice": 5.0,
}
NAMING_WEIGHT, POS_WEIGHT = 2.0, 2.0
WEIGHT_DECAY, MAX_GRAD_NORM, PROMPT_RATE = 0.01, 10.0, 0.05
WARMUP_STEPS, LOG_STEPS, SAVE_STEPS = 200, 100, 500
# Share of the training after which prompts name shapes too, and after which boxes are prompts.
SHAPES_FROM, BOXES_FROM = 0.08, 0.2
# Of the prompts: with boxes; else for something present; of the absent ones, words from outside,
# and concepts that share a word with an object.
BOX_SHARE, PRESENT_SHARE, WORD_SHARE, NEAR_SHARE = 0.3, 0.65, 0.25, 0.6
# Of the prompts with boxes: with a negative box too, and without a text.
NEGATIVE_SHARE, VISUAL_SHARE = 0.4, 0.6


class NamingHead(nn.Module):
    """Tells texture, colour and shape of each pixel and of each exemplar box; dropped afterwards.

    It gives the vision tower something to learn long before any query finds an object, and the
    geometry encoder long before any query heeds a box.

    Args:
        width: C, channels of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [1 + len(words) for words in WORDS]
        self.levels = nn.ModuleList(nn.Conv2d(width, sum(self.sizes), 1) for _ in range(3))
        self.boxes = nn.Linear(width, sum(self.sizes))

    def pixels(self, features: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, summed over levels and questions.

        Args:
            features: of `Forward.encode`.
            labels: (I,3,S,S) uint8, texture, colour and shape from 1, 0 for the background.
        """
        losses = []
        for index, level in enumerate(self.levels):
            answers = level(features[f"fpn_{index}"].float())
            goal = F.interpolate(labels, size=answers.shape[-2:], mode="nearest-exact")
            losses.append(self._questions(answers, goal))
        return torch.stack(losses).sum()

    def exemplars(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, summed over questions.

        Args:
            tokens: (B,N+1,C) of the geometry encoder, the boxes first.
            labels: (B,N,3) uint8, texture, colour and shape from 1, 0 for no box.
        """
        shown = labels[..., 0] > 0
        answers, goal = self.boxes(tokens[:, : labels.shape[1]][shown]), labels[shown]
        return self._questions(answers, goal) if len(goal) else 0 * tokens.sum()

    def _questions(self, answers: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of answers (n,sum(sizes),...) with goals (n,3,...)."""
        goal = goal.long().to(answers.device)
        parts = enumerate(answers.split(self.sizes, dim=1))
        return torch.stack([F.cross_entropy(part, goal[:, i]) for i, part in parts]).sum()


class NamingForward:
    """`Forward` with the naming head's losses beside the outputs; see engine.py for the protocol.

    Args:
        forward: of the model that is trained.
        head: on the same device.
    """

    def __init__(self, forward: Forward, head: NamingHead) -> None:
        self.forward, self.head, self.tokens = forward, head, torch.empty(0)
        forward.model.geometry_encoder.register_forward_hook(self._keep)
        self.encode = forward.encode

    def _keep(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        """Keeps what the geometry encoder made of the boxes."""
        self.tokens = output.last_hidden_state

    def predict(
        self, features: dict[str, torch.Tensor], batch: dict[str, Any], rows: slice
    ) -> dict[str, torch.Tensor]:
        """As `Forward.predict` for all rows, and `pixels` and `exemplars`, the head's losses."""
        outputs = self.forward.predict(features, batch, rows)
        outputs["pixels"] = self.head.pixels(features, batch["labels"])
        outputs["exemplars"] = self.head.exemplars(self.tokens, batch["box_prompt_kinds"])
        return outputs


def criterion(
    outputs: dict[str, torch.Tensor], targets: list, counts: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Meta's terms in their form for random weights, and the naming head's."""
    losses = compute_losses(
        outputs, targets, counts, pos_weight=POS_WEIGHT, mask_loss="native",
        weights=WEIGHTS, from_scratch=True,
    )  # fmt: skip
    for name in ("pixels", "exemplars"):
        losses[name] = outputs[name]
        losses["loss"] = losses["loss"] + NAMING_WEIGHT * math.sqrt(counts["rows"]) * outputs[name]
    return losses


def scene_batches(
    seed: int, steps: int, side: int, box_share: float = BOX_SHARE, widen: bool = True
) -> Iterator[dict[str, Any]]:
    """Yields `steps` batches of random scenes with their prompts, as `dataset.collate_fn` does.

    Args:
        seed: of every choice.
        steps: batches.
        side: S, of the model's canvas, pixels.
        box_share: of the prompts for a scene with objects, those with boxes.
        widen: the vocabulary widens with the share of the steps that is done; else it is whole.
    """
    for step in range(steps):
        rng = np.random.default_rng((seed, step))
        progress = step / steps if widen else 1.0
        items = [scene_item(rng, progress, side, box_share) for _ in range(IMAGES)]
        batch = collate_fn(items)
        batch["labels"] = torch.stack([item["labels"] for item in items])
        boxes = [box for item in items for box in item["boxes"]]
        most = max(1, *(len(row) for row in boxes))
        batch["box_prompts_cxcywh"] = torch.zeros(len(boxes), most, 4)
        batch["box_prompt_labels"] = torch.full((len(boxes), most), PADDING_BOX)
        batch["box_prompt_kinds"] = torch.zeros(len(boxes), most, len(WORDS), dtype=torch.uint8)
        for row, prompts in enumerate(boxes):
            for column, (box, label, kind) in enumerate(prompts):
                batch["box_prompts_cxcywh"][row, column] = box
                batch["box_prompt_labels"][row, column] = label
                batch["box_prompt_kinds"][row, column] = kind
        yield batch


def scene_item(
    rng: np.random.Generator, progress: float, side: int, box_share: float = BOX_SHARE
) -> dict[str, Any]:
    """A scene with its rows, as `dataset.PromptDataset` gives them, and what pretraining adds.

    Returns:
        also `labels` (3,S,S) for the naming head, and `boxes`, for each row a list of (box (4,)
        cxcywh, label 1 or 0, kind (3,) as in `labels`).
    """
    scene = draw_shapes(rng)
    masks = place_on_canvas(torch.from_numpy(scene.masks).byte() * 255, side) > 127  # (G,S,S)
    boxes = boxes_of(masks)
    rows = [
        draw_prompt(rng, scene.kinds, progress, OUT_OF_DOMAIN_WORDS, box_share)
        for _ in range(PROMPTS)
    ]
    labels = torch.zeros(len(WORDS), side, side, dtype=torch.uint8)
    kinds = [
        torch.tensor([1 + w.index(word) for w, word in zip(WORDS, kind, strict=True)]).byte()
        for kind in scene.kinds
    ]
    for mask, kind in zip(masks, kinds, strict=True):
        labels[:, mask] = kind[:, None]
    wanted = [torch.tensor(row["objects"], dtype=torch.long) for row in rows]
    return {
        "image": place_on_canvas(torch.from_numpy(scene.image).permute(2, 0, 1), side),
        "image_id": 0,
        "original_size": scene.image.shape[:2],
        "texts": [row["text"] or VISUAL_PROMPT for row in rows],
        "category_ids": [0] * len(rows),
        "targets": [
            {
                "boxes_cxcywh": boxes[index],
                "masks": masks[index],
                "has_mask": torch.ones(len(index), dtype=torch.bool),
                "complete": torch.tensor(True),
            }
            for index in wanted
        ],
        "labels": labels,
        "boxes": [[(boxes[g], label, kinds[g]) for g, label in row["boxes"]] for row in rows],
    }


def draw_prompt(
    rng: np.random.Generator,
    kinds: list[tuple[str, ...]],
    progress: float,
    outside: tuple[str, ...],
    box_share: float = BOX_SHARE,
) -> dict[str, Any]:
    """One prompt for a scene of shapes: text, a box exemplar or both; present or absent.

    Args:
        kinds: of the scene's objects.
        progress: share of the training that is done; the vocabulary widens with it.
        outside: words that name nothing in any scene.
        box_share: of the prompts for a scene with objects, those with boxes.

    Returns:
        `text`, None for boxes alone; `objects`, indices of those it asks for; `boxes`, (index,
        label) of exemplars.
    """
    local = {*TEXTURES, *COLOURS}  # a patch alone shows them; shapes it does not
    vocabulary = [p for p in shape_prompts() if p in local or progress > SHAPES_FROM]
    present = sorted({p for kind in kinds for p in phrases(kind)} & set(vocabulary))
    if kinds and progress > BOXES_FROM and rng.random() < box_share:
        return _box_prompt(rng, kinds)
    absent = [p for p in vocabulary if p not in present]
    if present and rng.random() < PRESENT_SHARE:
        text = str(rng.choice(present))
    elif not absent or rng.random() < WORD_SHARE:
        text = str(rng.choice(outside))
    else:
        words = {word for kind in kinds for word in kind}
        near = [p for p in absent if words & set(p.split())]
        text = str(rng.choice(near if near and rng.random() < NEAR_SHARE else absent))
    objects = [g for g, kind in enumerate(kinds) if text in phrases(kind)]
    return {"text": text, "objects": objects, "boxes": []}


def _box_prompt(rng: np.random.Generator, kinds: list[tuple[str, ...]]) -> dict[str, Any]:
    """An exemplar's prompt: alone it asks for its kind; beside a text, for what the text names.

    A negative exemplar takes its kind out.
    """
    shown = int(rng.integers(len(kinds)))
    boxes = [(shown, 1)]
    others = [g for g, kind in enumerate(kinds) if kind != kinds[shown]]
    refused = int(rng.choice(others)) if others and rng.random() < NEGATIVE_SHARE else None
    if refused is not None:
        boxes.append((refused, 0))
    if rng.random() < VISUAL_SHARE:
        text = None
        objects = [g for g, kind in enumerate(kinds) if kind == kinds[shown]]
    else:
        text = str(rng.choice(phrases(kinds[shown])))
        objects = [
            g
            for g, kind in enumerate(kinds)
            if text in phrases(kind) and (refused is None or kind != kinds[refused])
        ]
    return {"text": text, "objects": objects, "boxes": boxes}


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """Boxes (G,4) cxcywh in 0 to 1 of masks (G,S,S) bool, none empty."""
    side = masks.shape[-1]
    ends = []
    for axis in (-2, -1):  # columns, then rows
        line = masks.any(axis).float()  # (G,S)
        ends.append((line.argmax(1) / side, 1 - line.flip(1).argmax(1) / side))
    (left, right), (top, bottom) = ends
    return torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=1)


def pretrain(
    folder: Path,
    start: Path | None,
    steps: int,
    learning_rate: float,
    seed: int,
    device: str,
    box_share: float = BOX_SHARE,
    renew: Sequence[str] = (),
) -> None:
    """Trains every weight of a model on endless scenes.

    Args:
        folder: where the weights go, every `SAVE_STEPS` too; as written by `make_tiny`, in the
            detector's layout.
        start: folder of a pretrained model of the same size to go on from, with the whole
            vocabulary at once; None for the random weights in `folder`.
        steps: optimizer steps; warm-up, then cosine.
        learning_rate: peak, of AdamW.
        seed: of the scenes.
        device: where to train.
        box_share: of the prompts for a scene with objects, those with boxes.
        renew: components that keep the random weights in `folder`, whatever `start` holds.
    """
    model, tokenizer = load_model(str(folder))
    if start:
        take_over(model, start, renew)
    model.to(choose_device(device))
    head = NamingHead(model.config.detr_decoder_config.hidden_size).to(model.device)
    records = engine.train_one_epoch(
        NamingForward(Forward(model, tokenizer, one_to_many=True), head),
        criterion,
        count_targets,
        scene_batches(seed, steps, image_size(model), box_share, widen=start is None),
        # Without dropout, as loaded: endless scenes cannot be learned by heart.
        build_optimizer(model, head, learning_rate),
        lambda step: engine.lr_factor("cosine", step, steps, WARMUP_STEPS),
        engine.Limits(IMAGES, IMAGES * PROMPTS),
        max_grad_norm=MAX_GRAD_NORM,
    )
    recent: deque = deque(maxlen=LOG_STEPS)
    for record in records:
        recent.append(record)
        if record["step"] % LOG_STEPS == 0:
            row = mean_record(list(recent), model.device)
            log.info("step %d: %s", row["step"], _terms(row))
        if record["step"] % SAVE_STEPS == 0:
            model.save_pretrained(folder)
    model.save_pretrained(folder)


def take_over(model: Sam3Model, start: Path, renew: Sequence[str]) -> None:
    """Gives a model the weights of the one in `start`, but for the components in `renew`."""
    earlier = load_model(str(start))[0].state_dict()
    kept = {k: v for k, v in earlier.items() if k.split(".")[0] not in renew}
    model.load_state_dict(model.state_dict() | kept)


def build_optimizer(model: Sam3Model, head: NamingHead, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over every weight, what reads the prompts at a smaller rate.

    At the same rate the text encoder learns first to tell words from unknown ones, and makes all
    words one; and the pooling of a box, which sums over 49 places, is thrown about.
    """
    model.requires_grad_(True)
    pooling = model.geometry_encoder.boxes_pool_project
    slow = nn.ModuleList([model.text_encoder, model.text_projection, pooling])
    slow.requires_grad_(False)
    optimizer = engine.build_optimizer(nn.ModuleList([model, head]), learning_rate, WEIGHT_DECAY)
    parameters = list(slow.requires_grad_(True).parameters())
    rate = PROMPT_RATE * learning_rate
    optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": WEIGHT_DECAY})
    return optimizer


def _terms(row: dict[str, Any]) -> str:
    """The log's terms for eyes."""
    names = ("loss", "train_iou", "loss_giou", "loss_ce", "presence_loss", "loss_dice")
    names += ("pixels", "exemplars", "it_per_s")
    return ", ".join(f"{name} {row[name]:.3f}" for name in names if name in row)
