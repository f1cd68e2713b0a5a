"""Loads SAM 3 and sets it up: device, precision, train and eval modes.

The only module that imports the library's SAM 3 code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import enable_progress_bars
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    Sam2VideoVideoProcessor,
    Sam3Config,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
    Sam3VideoModel,
    Sam3VideoProcessor,
)
from transformers.utils import logging as hf_logging

from lora_layers import LoRALinear
from sam3_lora import processes

log = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "sam3_tiny"

# The hub id of Meta's weights.
PUBLISHED = "facebook/sam3"
# Tokens of a prompt; CLIP's text encoder has this many positions (transformers processing_sam3.py).
CONTEXT_LENGTH = 32
# Of the letters of European languages in Latin script; beyond are other scripts.
LAST_LATIN = 0x24F
# Characters of a library's error in ours, and of a prompt.
MAX_REASON, MAX_SHOWN = 160, 60
# What no SAM 3 comes near: the detector has 0.84e9 parameters, 32 layers, 49,408 words. A
# configuration with more would fill the memory before its weights were looked at.
MAX_PARAMETERS, MAX_LAYERS, MAX_SIZE = 2 * 10**9, 200, 10**6
# What can be a name on the hub: all else names a folder.
HUB_ID = re.compile(r"(?=.{,96}$)\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
INDEX = "model.safetensors.index.json"
# Weights that no two SAM 3 models share and no precision casts: they tell one base from another.
FINGERPRINT_WEIGHTS = ("detr_decoder.query_embed.weight", "detr_decoder.reference_points.weight")
# Of a merged model's configuration: these two weights alone do not tell it from its base.
MERGED = "merged_adapter"


class ModelError(ValueError):
    """A base model that cannot be loaded or used; the message says how to get one that can."""


def load_model(name: str) -> tuple[Sam3Model, Any]:
    """Loads SAM 3 in fp32, frozen and in eval mode, with its tokenizer.

    Args:
        name: hub id, or a local folder as `save_pretrained` writes it. Both the detector's own
            config and the hub's layout (the video model's config, weights under `detector_model.`)
            are read.

    Returns:
        (model, tokenizer).

    Raises:
        ModelError: not found, not accessible, damaged, not SAM 3, or weights that do not fill the
            model.
    """
    _read_config(name)
    model = _load_weights(Sam3Model, name)
    with _quiet_library():
        return model, load_tokenizer(name)


def load_video_model(name: str) -> Sam3VideoModel:
    """Loads SAM 3's video model in fp32, frozen and in eval mode; `detector_model` is a Sam3Model.

    Args:
        name: hub id, or a local folder, in the hub's layout.

    Raises:
        ModelError: as for `load_model`, or without the tracker's weights.
    """
    if _read_config(name).model_type != "sam3_video":
        raise ModelError(
            f"{name}: expected SAM 3's video model, found the detector alone; name a base with a "
            "tracker, facebook/sam3 or a full copy of it"
        )
    return _load_weights(Sam3VideoModel, name)


def _load_weights(kind: type[PreTrainedModel], name: str) -> PreTrainedModel:
    """A model of a class, in fp32, frozen and in eval mode; ModelError unless all of it is read."""
    cached = (try_to_load_from_cache(name, file) for file in ("model.safetensors", INDEX))
    there = Path(name).is_dir() or any(isinstance(path, str) for path in cached)
    log.info("loading %s" if there else "downloading %s from the hub, once; SAM 3 has 3.4 GB", name)
    try:
        with _quiet_library():
            if not there and processes.shows_progress():  # minutes
                enable_progress_bars()
            model, report = kind.from_pretrained(
                name,
                dtype=torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    # All there are: a damaged file raises what its reader trips over; the cause shows by --debug.
    except Exception as error:
        raise ModelError(access_hint(name, error)) from error
    problems = {k: report[k] for k in ("missing_keys", "mismatched_keys") if report[k]}
    if problems:
        found = "; ".join(f"{len(v)} {k} (first: {sorted(v)[0]})" for k, v in problems.items())
        raise ModelError(f"{name}: expected every weight of SAM 3, found {found}; get a full copy")
    return model.requires_grad_(False).eval()


def save_model(model: PreTrainedModel, base: str, folder: Path, dtype: torch.dtype) -> bool:
    """Writes a model by `save_pretrained`, with the processor of its base.

    Args:
        model: detector or video model, without LoRA layers; it is cast in place.
        base: hub id or folder that it came from.
        folder: where to write.
        dtype: of the weights written.

    Returns:
        Whether the base has a processor; without one its tokenizer is written.
    """
    video = isinstance(model, Sam3VideoModel)
    with _quiet_library():
        model.to(dtype).save_pretrained(folder)
        for kind in (Sam3VideoProcessor, Sam3Processor) if video else (Sam3Processor,):
            try:
                kind.from_pretrained(base, trust_remote_code=False).save_pretrained(folder)
            except (OSError, ValueError, TypeError):  # what the library raises without one
                continue
            return True
        load_tokenizer(base).save_pretrained(folder)
    return False


def build_tracker(
    name: str, detector: Sam3Model, tokenizer: Any
) -> tuple[Sam3VideoModel, Sam3VideoProcessor]:
    """SAM 3's video model around a detector that is there already.

    Args:
        name: as for `load_video_model`.
        detector: in fp32, as `load_model` gives, with whatever adapter; it becomes the video
            model's own, weight for weight.
        tokenizer: the detector's.

    Returns:
        (model, processor); the model on the detector's device.

    Raises:
        ModelError: as for `load_video_model`.
    """
    model = load_video_model(name)
    del model.detector_model  # the given one may have no text encoder any more, and cannot be moved
    model.to(detector.detr_decoder.query_embed.weight.device)
    model.detector_model = detector
    # Not from the folder's files: frames are resized, and prompts cut, as everywhere else here.
    parts = Sam3ImageProcessor(), Sam2VideoVideoProcessor(), tokenizer
    return model, Sam3VideoProcessor(*parts)


def load_meta_model(name: str, local: bool = False) -> tuple[Sam3Model, bool]:
    """SAM 3's structure without weights, on the meta device, from its config.json alone.

    Args:
        name: as for `load_model`. Where the hub does not give facebook/sam3, the library's default
            configuration, which describes the same model, stands in.
        local: take a hub id's configuration from the hub's cache alone: nothing is downloaded.

    Returns:
        (model, whether the default stands in); frozen and in eval mode.

    Raises:
        ModelError: as for `load_model`, but for what only weights or tokenizer can show.
    """
    try:
        config, stands_in = _read_config(name, local), False
    except ModelError:
        if name != PUBLISHED:
            raise
        config, stands_in = Sam3Config(), True
    return _build_meta(config).requires_grad_(False).eval(), stands_in


def _read_config(name: str, local: bool = False) -> PretrainedConfig:
    """The configuration of a hub id or folder, of the detector or of the video model."""
    refuse_other_formats(name)
    try:
        with _quiet_library():
            # Code of a folder is never run, nor asked about.
            options = {"trust_remote_code": False, "local_files_only": local}
            config = AutoConfig.from_pretrained(name, **options)
    except Exception as error:  # as in `load_model`
        raise ModelError(access_hint(name, error)) from error
    if config.model_type not in ("sam3", "sam3_video"):
        raise ModelError(
            f"model.name: expected a SAM 3 model, found model_type {config.model_type!r} in "
            f"{name}; use facebook/sam3 or a local copy of it"
        )
    try:
        _check_sizes(config.to_dict())
        model = _build_meta(config)
        _check_sizes(
            {"parameters": sum(t.numel() for t in chain(model.parameters(), model.buffers()))}
        )
    except Exception as error:  # what sizes of any kind trip over
        raise ModelError(access_hint(name, error)) from error
    return config


def _check_sizes(values: Any, name: str = "") -> None:
    """Raises ValueError where a number of a configuration is larger than any SAM 3 has."""
    if isinstance(values, dict):
        for key, value in values.items():
            _check_sizes(value, str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            _check_sizes(value, name)
    elif isinstance(values, int | float):
        most = MAX_LAYERS if "layers" in name or "stages" in name else MAX_SIZE
        most = MAX_PARAMETERS if name == "parameters" else most
        if not -most <= values <= most:
            raise ValueError(f"expected {name} of at most {most}, found {values}")


def _build_meta(config: PretrainedConfig) -> Sam3Model:
    """The detector of a configuration, on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return Sam3Model(config)


def mark_merged(config: PretrainedConfig, adapter: str) -> None:
    """Writes into a merged model's configuration what was merged, so that no adapter of its base,
    nor the same one a second time, fits it.

    Args:
        config: of the merged model.
        adapter: its `checkpoint.adapter_fingerprint`.
    """
    setattr(config, MERGED, adapter)


def fingerprint(model: nn.Module) -> str:
    """A short name for a base model's weights: 16 hex digits of a SHA-256 over two of them and, of
    a merged model, what was merged. Empty for a model without weights."""
    if model.get_parameter(FINGERPRINT_WEIGHTS[0]).is_meta:
        return ""
    digest = hashlib.sha256()
    for name in FINGERPRINT_WEIGHTS:
        digest.update(model.get_parameter(name).detach().float().cpu().numpy().tobytes())
    digest.update(getattr(getattr(model, "config", None), MERGED, "").encode())
    return digest.hexdigest()[:16]


def load_tokenizer(name: str) -> Any:
    """Loads SAM 3's tokenizer alone.

    Args:
        name: hub id, or a local folder.

    Raises:
        ModelError: not found, not accessible, damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers' reader raises no narrower one
        raise ModelError(access_hint(name, error)) from error
    if tokenizer("a")["input_ids"] == tokenizer("b")["input_ids"]:
        # Without its files the library makes a tokenizer that knows no word.
        raise ModelError(f"{name}: expected a tokenizer, found no tokenizer.json; get a full copy")
    return tokenizer


def tokenize(tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of prompts, cut at 32 tokens as Meta does.

    Args:
        tokenizer: CLIP's, which lower-cases.
        texts: U prompts.

    Returns:
        input_ids (U, 32) long, attention_mask (U, 32) long with 1 for a token and 0 for padding.
    """
    for text in texts:
        _tell_unread(tokenizer, text)
    encoded = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=CONTEXT_LENGTH,
        return_tensors="pt",
    )
    return encoded["input_ids"], encoded["attention_mask"]


@cache
def _tell_unread(tokenizer: Any, text: str) -> None:
    """Warns, once, of a prompt of which the model reads a part only, or understands little."""
    count = len(tokenizer(text, verbose=False)["input_ids"])
    if count > CONTEXT_LENGTH:
        told = "the prompt %r has %d tokens, of which SAM 3 reads the first %d; shorten it"
        log.warning(told, text[:MAX_SHOWN], count, CONTEXT_LENGTH)
    if any(c.isalpha() and ord(c) > LAST_LATIN for c in text):
        told = "the prompt %r: expected English words, which SAM 3 was trained on; translate it"
        log.warning(told, text[:MAX_SHOWN])


def refuse_other_formats(name: str) -> None:
    """Names what a path is when it is something we know and cannot load."""
    path = Path(name)
    if "sam3.1" in path.name.lower():
        raise ModelError(
            f"model.name: {name} is SAM 3.1, whose weights do not fit Sam3Model; use facebook/sam3"
        )
    if not os.path.exists(path) and not HUB_ID.fullmatch(name):
        raise ModelError(
            f"model.name: expected a folder with config.json, or a hub id such as {PUBLISHED}, "
            f"found no folder {name!r:.200}; correct it, or download with `hf download {PUBLISHED} "
            "--local-dir DIR` and name DIR"
        )
    if path.is_file():
        raise ModelError(
            f"model.name: expected a hub id or a folder with config.json, found the file {path}; "
            "Meta's own sam3.pt is another format: use facebook/sam3 (transformers weights)"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(
            f"model.name: expected config.json in the folder {path}, found none; download with "
            "`hf download facebook/sam3 --local-dir DIR` and name DIR"
        )
    if (path / INDEX).is_file():
        _refuse_outside(path / INDEX)


def _refuse_outside(index: Path) -> None:
    """Raises ModelError where a list of a model's files names one outside its folder."""
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = sorted(file for file in files if Path(file).name != file)
    except Exception as error:  # any JSON may be in it
        raise ModelError(access_hint(str(index.parent), error)) from error
    if outside:
        raise ModelError(
            f"model.name: {index}: expected names of files in its folder, found {outside[0]!r}; "
            f"get a full copy of {PUBLISHED}"
        )


def access_hint(name: str, error: Exception) -> str:
    """One line for a model that could not be read, with both ways to get it."""
    first = re.split(r"[.!](?=\s)", " ".join(str(error).split()))[0]  # the others are advice
    reason = textwrap.shorten(first, MAX_REASON, placeholder=" ...").rstrip(".")
    if not isinstance(error, OSError):  # the library's own sentences, complete
        reason = f"{type(error).__name__}: {reason}"
    if Path(name).is_dir():
        return (
            f"model.name: the folder {name} could not be read as SAM 3: {reason}; get a full copy "
            "with `hf download facebook/sam3 --local-dir DIR` and name DIR"
        )
    return (
        f"model.name: no folder {name} in {Path.cwd()}, and the hub did not give it ({reason}). "
        "Online: ask for access at https://huggingface.co/facebook/sam3 and run `hf auth login`. "
        "Offline: name the folder of a copy with --model_name DIR. For a first try without it: "
        f"--model_name {DEMO_MODEL}, the small model that is here"
    )


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Holds back the library's progress bars, loading report and word of each retry; the error
    that comes in the end, or our report, says what there is to say."""
    verbosity = hf_logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        hub.setLevel(level)


def image_size(model: Sam3Model) -> int:
    """Side of the square input, pixels; SAM 3 runs at no other."""
    size = model.config.vision_config.backbone_config.image_size
    return size if isinstance(size, int) else size[0]


def num_queries(model: Sam3Model) -> int:
    """Number of DETR slots: the most objects one prompt can find in one image."""
    return model.config.detr_decoder_config.num_queries


def choose_device(name: str) -> torch.device:
    """The device for `hardware.device`: `auto` takes CUDA, then MPS, then the CPU; of several
    processes on a machine each takes a GPU of its own.

    Raises:
        ModelError: the device that is asked for is not there.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    device = torch.device(name)
    if device.type == "cuda" and processes.count() > 1:
        device = torch.device("cuda", processes.local_rank())
    there = {
        "cuda": torch.cuda.device_count() > (device.index or 0),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, device.type == "cpu"):
        raise ModelError(
            f"hardware.device: expected a device of this machine, found no {device}; use auto or "
            "cpu" + (", or a smaller --nproc_per_node" if processes.count() > 1 else "")
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose random state a checkpoint keeps
    return device


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for `hardware.mixed_precision`.

    Args:
        name: `auto`, `bf16`, `fp16` or `no`; `auto` is bf16 on a CUDA GPU that has it, fp16 on one
            that has not, fp32 on a CPU and on MPS, of which not every version has bf16.
        device: where the model runs.
    """
    if name == "no" or (name == "auto" and device.type != "cuda"):
        return torch.float32
    if name == "fp16":
        return torch.float16
    # Emulated bf16, which torch counts as supported unless told not to, is slower than fp32.
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        log.warning("this GPU has no bf16: using fp16 with a gradient scaler")
        return torch.float16
    return torch.bfloat16


def cast_towers(model: Sam3Model, dtype: torch.dtype) -> None:
    """Casts the frozen weights of vision tower, neck and text encoder, in place.

    LoRA's own weights stay fp32. Geometry encoder, DETR, scoring and mask decoder keep fp32
    weights: with bf16 weights boxes are off by up to 2 px at 1008 px.

    Args:
        model: an adapted or a base model.
        dtype: of the matrix products; fp32 changes nothing.
    """
    for tower in (model.vision_encoder, model.text_encoder, model.text_projection):
        for parameter in tower.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def train_adapted(model: Sam3Model) -> None:
    """Train mode (dropout) for the components that hold adapters, eval mode for all else."""
    model.eval()
    adapted = {n.split(".")[0] for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    for name in adapted:
        getattr(model, name).train()
