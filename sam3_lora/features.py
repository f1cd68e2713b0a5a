"""The cache of frozen parts' features: an image goes through them once, then it is read.

    photo, placement --ViT--> trunk (h,w,D)                             10.6 MB in bf16 at 1008 px
    trunk --neck--> the levels that masks are drawn on: fpn_0, fpn_1                       53.1 MB
    trunk, P prompts --neck, geometry and DETR encoder--> memory (P,h*w,C)        2.65 MB a prompt
                                                          geometry (1,C)

What is kept is what no adapter stands in or before: the trunk where the vision encoder is frozen;
memory and geometry where all else before the decoder is, but for prompts with boxes, which differ
each epoch; and then, for masks, the levels on a CPU, which would be long at making them again, the
trunk on a GPU, which makes them sooner than it could copy them. An image is kept in a number of
views (placements) with a fixed list of prompts.

The key of a view is a SHA-256 over the image file, its tile, view and prompts, the weights of the
parts, precision and versions: what has changed is not found, and computed again. A file appears
whole or not at all, so any number of processes may read and fill one folder, and a build that was
killed goes on. Nothing removes what is no longer asked for; a folder of features may be deleted at
any time.

Under fp32 training from the cache is the same to the last bit (on a CPU); under bf16 and fp16
memory is rounded to that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from sam3_lora import processes
from sam3_lora.dataset import PromptDataset
from sam3_lora.files import check_writable, write_atomically
from sam3_lora.forward import Forward
from sam3_lora.loader import build_loader

log = logging.getLogger(__name__)

# Raised when what a key stands for, or the content of a file, changes.
FORMAT = 1
# Seconds after which an unfinished file belongs to a process that is no more; and its name.
ABANDONED = 3600
UNFINISHED = re.compile(r"\.[0-9a-f]{64}\.safetensors\.\d+\.tmp")

Batch = dict[str, Any]
View = tuple[int, int]  # index of the item, number of its placement


def cacheable_parts(
    forward: Forward, boxes: bool = False, device: str | None = None
) -> list[tuple[str, ...]]:
    """What of a batch can be cached: the best choice first.

    Args:
        forward: which parts are frozen.
        boxes: prompts come with boxes, drawn anew each epoch: what reads prompts is not kept.
        device: type of that which the model will be on; None: it is there already.

    Returns:
        Names of `forward.CACHED`; none where the vision encoder is trained.
    """
    if not forward.is_frozen("vision_encoder"):
        return []
    meta = forward.geometry_cls == "meta"
    before = ("text_encoder", "text_projection", "detr_encoder")
    if boxes or not forward.is_frozen(*before, *(("geometry_encoder",) if meta else ())):
        return [("trunk",)]
    parts = ("memory", "geometry") if meta else ("memory",)
    if not forward.masks:
        return [parts]
    levels = [(*parts, "fpn_0", "fpn_1")] if (device or forward.device.type) == "cpu" else []
    return [*levels, (*parts, "trunk")]


def cache_bytes(forward: Forward, dataset: PromptDataset, limit_gb: float, device: str) -> int:
    """Size of the cache that a run would fill; the model needs no weights.

    Args:
        forward, dataset, limit_gb: as for `FeatureCache`.
        device: as for `cacheable_parts`.

    Raises:
        FeatureError: as `FeatureCache`.
    """
    choices = cacheable_parts(forward, dataset.box_prompt_probability > 0, device)
    pooled = "memory" in choices[0]
    prompts = [len(dataset.pool(i)) if pooled else 0 for i in range(len(dataset))]
    parts = _choose_parts(forward, choices, prompts, dataset.views, limit_gb)
    return dataset.views * sum(_view_bytes(forward, parts, count) for count in prompts)


class FeatureError(ValueError):
    """Features that are too many to keep, or a file of theirs that cannot be read."""


class FeatureCache:
    """Features of a data set's views, in files or in RAM.

    Args:
        forward: parts that adapters stand in are not cached.
        dataset: with `views` and, for `memory`, `prompt_pool`.
        folder: of the files, made if absent; None keeps the features in RAM.
        limit_gb: most bytes kept, in 10^9.

    Raises:
        FeatureError: every choice of what to keep is larger.
    """

    def __init__(
        self, forward: Forward, dataset: PromptDataset, folder: Path | None, limit_gb: float
    ) -> None:
        self.forward = forward
        self.folder = folder
        self.in_ram: dict[str, dict[str, torch.Tensor]] = {}
        count = len(dataset)
        choices = cacheable_parts(forward, dataset.box_prompt_probability > 0)
        pooled = "memory" in choices[0]
        self.texts = [dataset.pool(i) if pooled else [] for i in range(count)]
        prompts = [len(texts) for texts in self.texts]
        self.parts = _choose_parts(forward, choices, prompts, dataset.views, limit_gb)
        forward.remember_texts([text for texts in self.texts for text in texts])
        self.keys = self._make_keys(dataset)

    def _make_keys(self, dataset: PromptDataset) -> dict[View, str]:
        """The key of each view."""
        model = _model_digest(self.forward, self.parts)
        # What the text encoder makes of a prompt stands for its weights.
        prompts = {text: _digest(self.forward.texts[text][0]) for t in self.texts for text in t}
        sources = [dataset.image_of(index) for index in range(len(dataset))]
        files = list(dict.fromkeys(file for file, _ in sources))
        with ThreadPoolExecutor() as pool:
            images = dict(zip(files, pool.map(_image_digest, files), strict=True))
        keys = {}
        for index, (file, tile) in enumerate(sources):
            texts = [(text, prompts[text]) for text in self.texts[index]]
            for view in range(dataset.views):
                words = (model, images[file], (tile, dataset.placement(index, view)), texts)
                keys[index, view] = hashlib.sha256(repr(words).encode()).hexdigest()
        return keys

    def __str__(self) -> str:
        """What is kept, where, and its size, for the log."""
        views = f"{len(self.keys)} views of {len(self.texts)} images"
        where = f"{self.bytes / 1e9:.3g} GB in {self.folder or 'RAM'}"
        return f"features ({', '.join(self.parts)}) of {views}, {where}"

    @property
    def bytes(self) -> int:
        """Size of the whole cache."""
        return sum(self._view_bytes(index) for index, _ in self.keys)

    def missing(self) -> list[View]:
        """The views that are not in the cache, each key once; of several processes that fill one
        folder, those in this one's part."""
        views = list(self.keys) if self.folder is None else processes.share(list(self.keys))
        return list({self.keys[view]: view for view in views if not self._has(view)}.values())

    def fill(self, dataset: PromptDataset, num_workers: int) -> None:
        """Computes what is missing, under a progress bar; the data set's items then need no image.

        Args:
            dataset: as given.
            num_workers: processes that read the images.

        Raises:
            OSError, FeatureError: as `build`.
        """
        missing = [[(view, index)] for index, view in self.missing()]
        log.info("%s, %d views to compute", self, len(missing))
        dataset.parts = ("image",)
        built = self.build(build_loader(dataset, missing, num_workers))
        for _ in processes.progress(built, "views", len(missing)):
            pass
        processes.wait()  # for what the others compute
        dataset.parts = ("targets",)

    @torch.no_grad()
    def build(self, batches: Iterable[Batch]) -> Iterator[View]:
        """Computes views, yielding each as it is kept.

        Args:
            batches: of one image each, with `images` and `views`: those of `missing`.

        Raises:
            OSError: the folder cannot be written.
            FeatureError: it has not the room.
        """
        if self.folder and (missing := self.missing()):
            self._make_room(sum(self._view_bytes(index) for index, _ in missing))
        for batch in batches:
            (view,) = batch["views"]
            self._keep(view, self._compute(batch["images"], self.texts[view[0]]))
            yield view

    def filled(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches with their cached features, read one batch ahead."""
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for batch in batches:
                ahead, ready = pool.submit(self._fill, batch), ahead
                if ready:
                    yield ready.result()
            if ahead:
                yield ahead.result()

    def _compute(self, image: torch.Tensor, texts: list[str]) -> dict[str, torch.Tensor]:
        """The parts of one image (1,3,S,S) and its prompts, on the CPU, without the batch axis."""
        forward = self.forward
        trunk = forward.encode_trunk(image.to(forward.device))
        found = {"trunk": trunk[0]}
        if "memory" in self.parts:
            index = torch.zeros(len(texts), dtype=torch.long)
            batch = {"trunk": trunk, "texts": texts, "image_index": index}
            features = forward.encode(batch)
            found |= {name: level[0] for name, level in features.items() if name in self.parts}
            # One prompt at a time: the bits of one must not depend on the others.
            rows = [forward.fuse(features, batch, slice(r, r + 1))[0] for r in range(len(texts))]
            found["memory"] = torch.cat(rows).to(forward.dtype)
        return {name: found[name].cpu().contiguous() for name in self.parts}

    def _fill(self, batch: Batch) -> Batch:
        """A batch with what is kept of its images, and with `memory` (B,h*w,C) of its rows."""
        contents = [self._load(view) for view in batch["views"]]
        found = {
            name: torch.stack([content[name] for content in contents])
            for name in self.parts
            if name != "memory"
        }
        if "memory" in self.parts:
            images = batch["image_index"].tolist()
            rows = zip(images, batch["texts"], strict=True)
            where = [(i, self.texts[batch["views"][i][0]].index(text)) for i, text in rows]
            found["memory"] = torch.stack([contents[i]["memory"][row] for i, row in where])
        if self.forward.device.type == "cuda":
            found = {name: tensor.pin_memory() for name, tensor in found.items()}
        return batch | found

    def _keep(self, view: View, content: dict[str, torch.Tensor]) -> None:
        """Keeps the features of a view."""
        if self.folder is None:
            self.in_ram[self.keys[view]] = content
        else:
            write_atomically(self._path(view), lambda place: place.write_bytes(save(content)))

    def _make_room(self, needed: int) -> None:
        """Makes the folder and sees to it that so many bytes go in."""
        check_writable(self.folder, "--cache_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise FeatureError(
                f"--cache_dir: expected {needed / 1e9:.3g} GB free for features, found "
                f"{free / 1e9:.3g} in {self.folder}; name another, or use --cache_features ram"
            )

    def _load(self, view: View) -> dict[str, torch.Tensor]:
        """The features of a view."""
        if self.folder is None:
            return self.in_ram[self.keys[view]]
        try:
            return load_file(self._path(view))
        except (OSError, SafetensorError) as error:
            raise FeatureError(
                f"{self._path(view)}: expected cached features, found {error}; delete the file and "
                "run again"
            ) from error

    def _has(self, view: View) -> bool:
        """Whether a view is kept, whole."""
        if self.folder is None:
            return self.keys[view] in self.in_ram
        path = self._path(view)
        try:
            if path.stat().st_size < self._view_bytes(view[0]):
                return False
            with safe_open(path, "pt") as file:
                return set(file.keys()) == set(self.parts)
        except (OSError, SafetensorError):
            return False

    def _path(self, view: View) -> Path:
        """The file of a view."""
        return self.folder / f"{self.keys[view]}.safetensors"

    def _view_bytes(self, index: int) -> int:
        """Bytes of the features of one view of an item."""
        return _view_bytes(self.forward, self.parts, len(self.texts[index]))


def _choose_parts(
    forward: Forward,
    choices: list[tuple[str, ...]],
    prompts: list[int],
    views: int,
    limit_gb: float,
) -> tuple[str, ...]:
    """The first choice of parts whose size, for so many prompts of each item, is in the limit."""
    for parts in choices:
        size = views * sum(_view_bytes(forward, parts, count) for count in prompts) / 1e9
        if size <= limit_gb:
            return parts
    raise FeatureError(
        f"training.cache_limit_gb: expected at most {limit_gb:g} GB, found at least {size:.3g} "
        "GB of features; lower --cache_views or the prompts (--prompt_pool, else "
        "--prompts_per_image), or raise it"
    )


def _view_bytes(forward: Forward, parts: tuple[str, ...], prompts: int) -> int:
    """Bytes of the features of one view of an item with so many prompts."""
    model, (height, width) = forward.model, forward.grid
    norm = model.vision_encoder.backbone.layer_norm.weight
    channels = model.detr_decoder.query_embed.embedding_dim
    token = channels * norm.element_size()
    sizes = {
        "trunk": height * width * norm.numel() * norm.element_size(),
        "fpn_0": 16 * height * width * token,
        "fpn_1": 4 * height * width * token,
        "memory": prompts * height * width * token,
        "geometry": channels * 4,  # fp32
    }
    return sum(sizes[name] for name in parts)


def _model_digest(forward: Forward, parts: tuple[str, ...]) -> str:
    """A digest of all that features depend on but the image: weights, precision, versions."""
    versions = [importlib.metadata.version(name) for name in ("torch", "torchvision")]
    versions.append(importlib.metadata.version("transformers"))
    config = forward.model.config
    shapes = (config.vision_config, config.geometry_encoder_config, config.detr_encoder_config)
    settings = (FORMAT, parts, versions, str(forward.dtype), forward.geometry_cls, forward.grid)
    settings += tuple(part.to_json_string() for part in shapes)
    digest = hashlib.sha256(repr(settings).encode())
    memory = ("geometry_encoder", "detr_encoder") if "memory" in parts else ()
    for name in ("vision_encoder", *memory):
        for key, tensor in getattr(forward.model, name).state_dict().items():
            digest.update(f"{key} {_digest(tensor)}".encode())
    return digest.hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    """A digest of a tensor's values."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()


def _image_digest(path: Path) -> str:
    """A digest of an image file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_abandoned(folder: Path) -> None:
    """Removes files that a killed process did not finish."""
    for path in filter(lambda path: UNFINISHED.fullmatch(path.name), folder.iterdir()):
        # Another process may finish or remove it meanwhile.
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
