"""Prompts on a photo: texts and boxes in, detections of the photo's size out.

photo -> canvas -> one pass of the vision tower -> heads, a row for each text -> best detections

and the same for each tile of a photo, where it is cut into tiles.

Several adapters share one base: a route names the prompts that one of them, or a blend, answers.
An image goes through the routes in turn; between two of them the adapter is changed in memory, and
the vision tower's pass is shared by those that leave the tower as it is.
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lora_layers import (
    AdapterError,
    LoRAConfig,
    LoRALinear,
    apply_lora,
    blend_lora,
    load_lora_state_dict,
    lora_modules,
    remove_lora,
    restore_lora,
)
from sam3_lora import coco
from sam3_lora.checkpoint import load_adapter
from sam3_lora.dataset import place_on_canvas
from sam3_lora.evaluation import detect_more, join_detections, resolve_model, summarize
from sam3_lora.forward import PER_ROW, VISUAL_PROMPT, Forward
from sam3_lora.images import read_image
from sam3_lora.metrics import Detections
from sam3_lora.model import image_size
from sam3_lora.tiles import merge_views, view_windows

log = logging.getLogger(__name__)

# The name, in a route, of the base model without an adapter.
BASE = "base"
# The share of a detection's box inside a positive box prompt from which `keep_boxed` keeps it.
BOXED_SHARE = 0.5
MOST_NAMED = 6  # prompts that a line of the log lists

# By name, what `checkpoint.read_adapter` gives and the file's `path`.
Adapters = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Route:
    """The prompts that one adapter answers, or the base alone."""

    rows: list[int]  # which of the prompts
    adapter: tuple[LoRAConfig, Mapping[str, torch.Tensor]] | None
    # What its text encoder made of them, see `Forward.texts`, which is this one's while it is on.
    texts: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)
    # The adapter's layers by name, once they have been on.
    layers: dict[str, LoRALinear] = field(default_factory=dict, repr=False)

    @property
    def leaves_vision(self) -> bool:
        """Whether the vision tower is the base's."""
        return self.adapter is None or "vision_encoder" not in self.adapter[0].components


@dataclass(frozen=True)
class Prompts:
    """What every image is asked: a row for each text; the boxes (pixels as shown) go with all."""

    texts: list[str]
    boxes_xyxy: list[list[float]]
    labels: list[int]  # one a box: 1 positive, 0 negative
    routes: Sequence[Route] = ()  # which share out the rows; none: all go to the model as it is


def make_batch(photo: np.ndarray, prompts: Prompts, side: int) -> dict[str, Any]:
    """One image (H, W, 3) on a canvas of `side` pixels, and its R rows, as `Forward` takes them."""
    height, width = photo.shape[:2]
    count = len(prompts.texts)
    pixels = torch.from_numpy(photo).permute(2, 0, 1)
    batch = {
        "images": place_on_canvas(pixels, side)[None],
        "texts": prompts.texts,
        "image_index": torch.zeros(count, dtype=torch.long),
    }
    if prompts.labels:
        corners = torch.tensor(prompts.boxes_xyxy) / torch.tensor([width, height] * 2)  # (N,4)
        low, high = corners[:, :2], corners[:, 2:]
        boxes = torch.cat([(low + high) / 2, high - low], dim=1)
        batch["box_prompts_cxcywh"] = boxes.expand(count, -1, -1)
        batch["box_prompt_labels"] = torch.tensor(prompts.labels).expand(count, -1)
    return batch


def choose_model(
    configured: Mapping[str, str], flags: Mapping[str, Any], adapters: Adapters
) -> tuple[str, str]:
    """Base model and geometry_cls for all adapters, as `evaluation.resolve_model` for one.

    Raises:
        AdapterError: they were trained on different bases, or with different geometry_cls and no
            flag chooses one.
    """
    own = list(adapters.values())
    models = [resolve_model(configured, flags, adapter) for adapter in own or [{}]]
    bases = [adapter["base_fingerprint"] for adapter in own]
    kinds = [geometry_cls for _, geometry_cls in models[: len(own)]]
    named = [f"{a['base_model']} ({a['base_fingerprint']})" for a in own]
    for what, values, shown, remedy in (
        ("base", bases, named, "run those of each base by themselves"),
        ("geometry_cls", kinds, kinds, "choose with --model_geometry_cls"),
    ):
        if len(set(values)) > 1:
            found = ", ".join(f"{name}: {text}" for name, text in zip(adapters, shown, strict=True))
            raise AdapterError(
                f"--lora_weights: expected adapters of one {what}, found {found}; {remedy}"
            )
    return models[0]


def share_out(
    texts: Sequence[str], wanted: Mapping[str, Mapping[str, float]], adapters: Adapters
) -> tuple[list[str], list[dict[str, float]]]:
    """Which adapters answer each prompt, and in which words.

    A class name of an adapter stands for the phrase that it was trained with.

    Args:
        texts: the prompts.
        wanted: of some prompts, the weight of each adapter; `BASE` is none. Of the others, those
            that adapters were trained on go to these in equal shares, the rest to the only
            adapter, or where there are several to the base: half an adapter may know nothing.
        adapters: by name.

    Returns:
        (texts, weights of the adapters by name, empty for the base alone), one a row; prompts that
        have become the same are one.

    Raises:
        AdapterError: `wanted` names another prompt or adapter.
    """
    named = {name for weights in wanted.values() for name in weights}
    strangers = sorted({*wanted} - {*texts}) + sorted(named - {BASE, *adapters})
    if strangers:
        raise AdapterError(
            f"--route: expected the prompts {', '.join(map(repr, texts))} and the adapters "
            f"{', '.join([*adapters, BASE])}, found {', '.join(map(repr, strangers))}; an adapter "
            "gets a name by --lora_weights NAME=PATH"
        )
    wanted = {t: {n: w for n, w in own.items() if n != BASE and w} for t, own in wanted.items()}
    phrases = {name: adapter.get("categories", {}) for name, adapter in adapters.items()}
    rows: list[tuple[str, dict[str, float]]] = []
    for text in texts:
        trained = [name for name, own in phrases.items() if _trained_phrase(text, own)]
        if "," in text and not trained:
            _tell_list(text)
        chosen = trained or (adapters if len(adapters) == 1 else ())
        equal = dict.fromkeys(chosen, 1 / max(len(chosen), 1))
        weights = wanted.get(text, equal)
        if wanted or len(adapters) > 1:
            shown = " + ".join(f"{weight:.3g} x {name}" for name, weight in weights.items())
            log.info("prompt %r goes to %s", text, shown or "the base model alone")
        phrase = _trained_phrase(text, ChainMap(*map(phrases.get, weights)))
        if phrase not in (None, text):
            log.info("prompt %r: the adapter was trained with %r, which is used", text, phrase)
        row = phrase or text, weights
        rows += [row] if row not in rows else []
    _tell_answers(rows, phrases)
    return [text for text, _ in rows], [weights for _, weights in rows]


def _trained_phrase(text: str, phrases: Mapping[str, str]) -> str | None:
    """The phrase of an adapter's training, of `phrases` by class name, that a prompt is or is the
    class name of, in large letters or small, which SAM 3 reads as one; None for another prompt."""
    if text in phrases.values():
        return text
    small = {name.lower(): phrase for name, phrase in phrases.items()}
    small |= {phrase.lower(): phrase for phrase in phrases.values()}
    return phrases.get(text) or small.get(text.lower())


def tell_unknown(texts: Iterable[str], adapter: str, phrases: Mapping[str, str]) -> None:
    """Says which prompts an adapter was not trained on.

    Args:
        texts: the prompts.
        adapter: what to call it.
        phrases: those that it was trained on, by class name; nothing is said without any.
    """
    unknown = [t for t in texts if t != VISUAL_PROMPT and not _trained_phrase(t, phrases)]
    if unknown and phrases:
        trained = name_some(phrases.values())
        log.info(
            "%s: not among the prompts that %s was trained on (%s); what the base model knows of "
            "such words answers", name_some(map(repr, unknown)), adapter, trained
        )  # fmt: skip


def _tell_answers(
    rows: Sequence[tuple[str, Mapping[str, float]]], phrases: Mapping[str, Mapping[str, str]]
) -> None:
    """`tell_unknown` of all prompts that the same adapters answer."""
    answered: dict[tuple[str, ...], list[str]] = {}
    for text, weights in rows:
        answered.setdefault(tuple(weights), []).append(text)
    for names, texts in answered.items():
        if all(phrases[name] for name in names):  # an adapter from elsewhere may not say
            tell_unknown(texts, ", ".join(names), ChainMap(*map(phrases.get, names)))


def name_some(words: Iterable[str], most: int = MOST_NAMED) -> str:
    """The first of some words, and how many there are beyond."""
    words = list(words)
    more = f", ... and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _tell_list(text: str) -> None:
    """Warns of a prompt that may have been meant as several."""
    parts = (part.strip() for part in text.split(","))
    parts = [f'"{part}"' if " " in part else part for part in parts if part]
    log.warning(
        "--text_prompt: %r is one prompt, with a comma in it; several are separate words: "
        "--text_prompt %s", text, " ".join(parts)
    )  # fmt: skip


def plan_routes(
    forward: Forward, blends: Sequence[Mapping[str, float]], adapters: Adapters
) -> list[Route]:
    """One route for all prompts that the same adapters answer with the same weights.

    Args:
        forward: of the base model.
        blends: of each prompt, the weights of the adapters, as `share_out` gives.
        adapters: by name.

    Raises:
        AdapterError: an adapter does not fit the base.
    """
    for name, adapter in adapters.items():
        try:
            load_adapter(adapter["path"], forward.model, adapter)
        except AdapterError as error:
            raise AdapterError(f"--lora_weights, {name}: {error}") from error
        remove_lora(forward.model)
    rows: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for row, weights in enumerate(blends):
        rows.setdefault(tuple(sorted(weights.items())), []).append(row)
    return [Route(own, _blend(dict(shares), adapters)) for shares, own in rows.items()]


def _blend(
    weights: Mapping[str, float], adapters: Adapters
) -> tuple[LoRAConfig, Mapping[str, torch.Tensor]] | None:
    """One adapter for the weighted ones of a route; None for none."""
    parts = [(adapters[name]["lora_config"], adapters[name]["lora"]) for name in weights]
    if list(weights.values()) in ([], [1]):  # as it is, to the last bit
        return parts[0] if parts else None
    return blend_lora(parts, list(weights.values()))


def switch(forward: Forward, route: Route) -> None:
    """Puts a route's adapter on the base in place of the one that is on, from memory.

    In fp32 it is merged. Below, the base's rounded weights would swallow a small update, so it
    stays beside them in fp32, as in training.

    Raises:
        AdapterError: the adapter does not fit the base.
    """
    if forward.texts is route.texts:
        return
    model = forward.model
    remove_lora(model)
    if route.layers:
        restore_lora(model, route.layers)
    elif route.adapter:
        lora, state = route.adapter
        apply_lora(model, lora)
        load_lora_state_dict(model, state)
        model.requires_grad_(False).eval()
        route.layers.update(lora_modules(model))
    if forward.dtype == torch.float32:
        for layer in route.layers.values():
            layer.merge()
    forward.texts = route.texts


def read_texts(forward: Forward, prompts: Prompts) -> None:
    """Has each route's text encoder read its prompts, then frees the encoder's weights."""
    for route in prompts.routes:
        switch(forward, route)
        forward.remember_texts([prompts.texts[row] for row in route.rows])
    forward.release_text_encoder([])
    for route in prompts.routes:  # made anew at the next change: the text encoder's hold nothing
        route.layers.clear()


def find(
    forward: Forward,
    photo: np.ndarray,
    prompts: Prompts,
    thresholds: Sequence[float],
    max_rows: int,
    tile: float | None = None,
) -> tuple[Detections, tuple[int, float]]:
    """Runs all prompts on one image, with one pass of the vision tower for each of its views, or
    one for each view and route that adapts it.

    Args:
        forward: the model.
        photo: uint8 (H, W, 3).
        prompts: texts and boxes; with tiles, no boxes.
        thresholds: the lowest score kept, of each text.
        max_rows: prompts in one pass of the heads.
        tile: as for `search`.

    Returns:
        (detections as `join_detections`, best first; of the best one, kept or not, which prompt's
        it is, from 0, and its score).
    """
    # The best one stays whatever its score, to be named.
    found = search(forward, photo, prompts, max_rows, 1, min(thresholds), tile)
    kept = found["score"] >= np.asarray(thresholds)[found["category_id"] - 1]
    best = found["category_id"][0] - 1, found["score"][0]
    return take(found, np.flatnonzero(kept)), best


@torch.no_grad()
def search(
    forward: Forward,
    photo: np.ndarray,
    prompts: Prompts,
    max_rows: int,
    max_detections: int,
    score_threshold: float,
    tile: float | None = None,
) -> Detections:
    """The detections of all prompts on one image (H, W, 3); `category_id` 1 is the first text.

    Args:
        forward, photo, prompts, max_rows: as for `find`.
        max_detections: so many of the best are kept, over all prompts,
        score_threshold: and every one of at least this score.
        tile: None takes the photo as it is; else it is also cut into tiles whose sides are at most
            this share of its own, see `tiles.view_windows`, and what its views show is merged.

    Returns:
        As `evaluation.join_detections`.
    """
    limits = max_detections, score_threshold
    if tile is None:
        return _search_view(forward, photo, prompts, max_rows, *limits)
    if prompts.labels:
        # An example is read from the view that it is in; most tiles do not show it.
        raise ValueError("expected no box prompts with tiles, found some")
    height, width = photo.shape[:2]
    views = []
    for window in view_windows(width, height, tile):
        left, top, right, bottom = window
        # No object of the best so many is worse than that in a view: each holds it once at most.
        seen = _search_view(forward, photo[top:bottom, left:right], prompts, max_rows, *limits)
        views.append((window, seen))
    return join_detections([merge_views(views, width, height)], *limits)


def _search_view(
    forward: Forward, photo: np.ndarray, prompts: Prompts, max_rows: int, *limits: float
) -> Detections:
    """`search` on one view."""
    batch = make_batch(photo, prompts, image_size(forward.model))
    everything = Route(list(range(len(prompts.texts))), None, forward.texts)
    routes = prompts.routes or [everything]
    sharing = sum(route.leaves_vision for route in routes) > 1
    trunk, found = {}, None
    # The one that is on comes first, which saves a change.
    for route in sorted(routes, key=lambda route: route.texts is not forward.texts):
        switch(forward, route)
        own = batch | {k: batch[k][route.rows] for k in PER_ROW if k in batch}
        own["texts"] = [prompts.texts[row] for row in route.rows]
        if sharing and route.leaves_vision:
            trunk = trunk or {"trunk": forward.encode_trunk(batch["images"].to(forward.device))}
            own |= trunk
        features = forward.encode(own)
        for start in range(0, len(route.rows), max_rows):
            ids = [row + 1 for row in route.rows[start : start + max_rows]]
            outputs = forward.predict(features, own, slice(start, start + max_rows))
            rows = list(range(len(ids)))
            found = detect_more(found, outputs, rows, ids, photo.shape[:2], *limits)
    if len(routes) > 1:  # of the same score the first prompt's comes first
        found = take(found, np.lexsort((found["category_id"], -found["score"])))
    return found


def evaluate_tiles(
    forward: Forward,
    split: coco.CocoSplit,
    images: Iterable[dict[str, Any]],
    tile: float | None,
    *,
    max_rows: int,
    max_detections: int,
    score_threshold: float,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of a split whose photos are searched in tiles; arguments as for `search` but:

    Args:
        split: the ground truth.
        images: all of `split.images`, or this process's part of them.

    Returns:
        (summary, results) as of `evaluation.evaluate_split`, with `tile`; no tile has targets, so
        there are no `losses`.
    """
    limits = max_detections, score_threshold
    by_image: dict[int, Detections] = {}
    categories = np.array(list(split.categories))
    prompts = Prompts([split.phrase(category) for category in split.categories], [], [])
    for image in images:
        photo = read_image(split.image_path(image))
        found = search(forward, photo, prompts, max_rows, *limits, tile)
        found["category_id"] = categories[found["category_id"] - 1]
        by_image[image["id"]] = found
    summary, results = summarize(by_image, split, *limits)
    return {**summary, "losses": {}, "tile": tile}, results


def keep_boxed(found: Detections, boxes_xyxy: np.ndarray) -> Detections:
    """The detections of whose box at least `BOXED_SHARE` lies in one of the given boxes (m, 4)."""
    own = found["boxes_xyxy"][:, None]  # (n,1,4)
    low = np.maximum(own[..., :2], boxes_xyxy[:, :2])
    high = np.minimum(own[..., 2:], boxes_xyxy[:, 2:])
    shared = (high - low).clip(min=0).prod(axis=-1)  # (n,m)
    areas = (own[..., 2:] - own[..., :2]).prod(axis=-1)  # (n,1)
    boxed = (shared > 0) & (shared >= BOXED_SHARE * areas)
    return take(found, np.flatnonzero(boxed.any(axis=1)))


def suppress(found: Detections, limit: float) -> Detections:
    """The detections whose mask has an IoU of at most `limit` with each better one kept of the
    same prompt."""
    kept: list[int] = []
    for i, prompt in enumerate(found["category_id"]):
        better = [found["rles"][j] for j in kept if found["category_id"][j] == prompt]
        if not (coco.mask_iou([found["rles"][i]], better) > limit).any():
            kept.append(i)
    return take(found, kept)


def take(found: Detections, indices: Sequence[int]) -> Detections:
    """Some of the detections."""
    index = np.asarray(indices, dtype=int)
    chosen = {name: found[name][index] for name in ("category_id", "score", "boxes_xyxy")}
    return {**chosen, "rles": [found["rles"][i] for i in index]}
