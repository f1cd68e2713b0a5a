"""Adapters in the formats of others, to and from ours.

    ours   lora_weights.pt             <layer>.lora_A                          (rank, in)
    PEFT   adapter_model.safetensors   base_model.model.<layer>.lora_A.weight  (rank, in)
           and adapter_config.json
    Meta   *.pt                        <layer in Meta's code>.lora.lora_A      (in, rank)

PEFT only warns of names that fit nothing and leaves the base as it is. Here every name and shape is
held against the base before anything is written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lora_layers import (
    COMPONENTS,
    UNUSED_LINEARS,
    AdapterError,
    LoRAConfig,
    match_modules,
    some_names,
)
from sam3_lora import checkpoint

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
# Layer, and A or B.
OUR_KEY = re.compile(rf"((?:{'|'.join(COMPONENTS)})\..+)\.lora_([AB])")
PEFT_KEY = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_([AB])\.weight")
# The weight of a Linear layer is (out, in) as ours, a bare parameter (in, out). `detector.` leads
# within the video model, `module.` within a data-parallel one.
META_KEY = re.compile(r"(?:module\.)?(?:detector\.)?(.+?)(?:\.lora)?\.lora_([AB])(\.weight)?")
# Our description of an adapter in the safetensors file's metadata, where PEFT does not look.
METADATA = "sam3_lora"
# PEFT's settings that change what the matrices mean; none has a counterpart here.
PEFT_REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication",
    "target_parameters", "fan_in_fan_out", "use_qalora", "use_bdlora", "megatron_config",
    "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config",
    "kasa_config",
)  # fmt: skip
# PEFT's starts that leave the base's weights as they are; the others change them.
PEFT_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Settings by which PEFT leaves out layers that `target_modules` names.
PEFT_SELECTORS = ("layers_to_transform", "layers_pattern", "exclude_modules")
# Bytes of adapter_config.json, of which a list of all layers' names takes a hundredth; repeats in
# an expression in it, each of which multiplies a search's time by a name's length; that length.
MAX_CONFIG_BYTES, MAX_REPEATS, MAX_NAME = 10**7, 2, 200
# What only SAM 3.1's checkpoints hold: the necks of its multiplex tracker.
SAM31_KEYS = ("propagation_convs", "interactive_convs", "multiplex")
LOAD_INSTEAD = (
    "name the adapter with --source, and facebook/sam3 (transformers weights) as its base"
)

# `#` stands for a layer's number. Source: the modules of facebookresearch/sam3 beside those that
# the library's conversion script, transformers models/sam3/convert_sam3_to_hf.py, makes of them.
_VIT = "backbone.vision_backbone.trunk.blocks.#"
_TEXT = "backbone.language_backbone.encoder.transformer.resblocks.#"
_ATTENTIONS = {
    f"{_VIT}.attn": "vision_encoder.backbone.layers.#.attention",
    f"{_TEXT}.attn": "text_encoder.text_model.encoder.layers.#.self_attn",
    "geometry_encoder.encode.#.self_attn": "geometry_encoder.layers.#.self_attn",
    "geometry_encoder.encode.#.cross_attn_image": "geometry_encoder.layers.#.cross_attn",
    "transformer.encoder.layers.#.self_attn": "detr_encoder.layers.#.self_attn",
    "transformer.encoder.layers.#.cross_attn_image": "detr_encoder.layers.#.cross_attn",
    "transformer.decoder.layers.#.self_attn": "detr_decoder.layers.#.self_attn",
    "transformer.decoder.layers.#.ca_text": "detr_decoder.layers.#.text_cross_attn",
    "transformer.decoder.layers.#.cross_attn": "detr_decoder.layers.#.vision_cross_attn",
    "segmentation_head.cross_attend_prompt": "mask_decoder.prompt_cross_attn",
}
_LINEARS = {
    f"{_VIT}.mlp.fc1": "vision_encoder.backbone.layers.#.mlp.fc1",
    f"{_VIT}.mlp.fc2": "vision_encoder.backbone.layers.#.mlp.fc2",
    f"{_TEXT}.mlp.c_fc": "text_encoder.text_model.encoder.layers.#.mlp.fc1",
    f"{_TEXT}.mlp.c_proj": "text_encoder.text_model.encoder.layers.#.mlp.fc2",
    "geometry_encoder.boxes_direct_project": "geometry_encoder.boxes_direct_project",
    "geometry_encoder.boxes_pos_enc_project": "geometry_encoder.boxes_pos_enc_project",
    "geometry_encoder.final_proj": "geometry_encoder.final_proj",
    "geometry_encoder.encode.#.linear1": "geometry_encoder.layers.#.mlp.fc1",
    "geometry_encoder.encode.#.linear2": "geometry_encoder.layers.#.mlp.fc2",
    "transformer.encoder.layers.#.linear1": "detr_encoder.layers.#.mlp.fc1",
    "transformer.encoder.layers.#.linear2": "detr_encoder.layers.#.mlp.fc2",
    "transformer.decoder.layers.#.linear1": "detr_decoder.layers.#.mlp.fc1",
    "transformer.decoder.layers.#.linear2": "detr_decoder.layers.#.mlp.fc2",
    "segmentation_head.mask_predictor.mask_embed.layers.#": "mask_decoder.mask_embedder.layers.#",
}
# Heads whose layers Meta counts from 0 and the library from 1.
_HEADS = {
    "transformer.decoder.bbox_embed.layers.#": "detr_decoder.box_head.layer",
    "transformer.decoder.presence_token_head.layers.#": "detr_decoder.presence_head.layer",
    "transformer.decoder.ref_point_head.layers.#": "detr_decoder.ref_point_head.layer",
    "transformer.decoder.boxRPB_embed_x.layers.#": "detr_decoder.box_rpb_embed_x.layer",
    "transformer.decoder.boxRPB_embed_y.layers.#": "detr_decoder.box_rpb_embed_y.layer",
}
# Query, key and value in one weight, in this order, in `nn.MultiheadAttention` and in the ViT.
_FUSED = ("qkv", "in_proj", "in_proj_weight")
_QKV = ("q_proj", "k_proj", "v_proj")


def library_names(name: str) -> tuple[str, ...]:
    """The layers of `Sam3Model` that a layer of Meta's SAM 3 is.

    Args:
        name: dotted name of a Linear layer, or of a weight that fuses three.

    Returns:
        One name; of a fused layer those of query, key and value, to which its output's thirds
        belong in this order; empty for a layer that has no counterpart.
    """
    number = "".join(re.findall(r"(?<=\.)\d+(?=\.|$)", name)[:1])
    shape = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)
    attention, _, leaf = shape.rpartition(".")
    if shape in _LINEARS:
        return (_LINEARS[shape].replace("#", number),)
    if shape in _HEADS:
        return (f"{_HEADS[shape]}{int(number) + 1}",)
    if attention not in _ATTENTIONS:
        return ()
    parent = _ATTENTIONS[attention].replace("#", number)
    if leaf in _FUSED:
        return tuple(f"{parent}.{one}" for one in _QKV)
    # Of the library's attentions only CLIP's names its output as Meta does.
    output = "out_proj" if parent.startswith("text_encoder.") else "o_proj"
    own = {one: one for one in _QKV} | {"out_proj": output, "proj": output}
    return (f"{parent}.{own[leaf]}",) if leaf in own else ()


@dataclass(frozen=True)
class Foreign:
    """An adapter as it was found, before it is held against its base.

    Args:
        layers: name in `Sam3Model` -> A (rank, in), B (out, rank), alpha; the ranks may differ.
        dropout: in training.
        selectors: `target_modules` and `components` that our own files tell; None: not told.
        targets: PEFT's, each of which must have its layers in the file; None: not told.
        description: of `save_adapter`, with `base_model` and `base_fingerprint` where told.
    """

    layers: dict[str, tuple[torch.Tensor, torch.Tensor, float]]
    dropout: float = 0.0
    selectors: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    targets: tuple[str, ...] | None = None
    description: dict[str, Any] = field(default_factory=dict)


def portable_name(base: str) -> str:
    """The name of a base model for a file that travels: of an absolute path its last folder."""
    absolute = Path(base).is_absolute() or PureWindowsPath(base).is_absolute()
    return PureWindowsPath(base).name if absolute else base


def write_peft(folder: Path, content: Mapping[str, Any], base: str) -> None:
    """Writes an adapter as stock PEFT, and `Sam3Model.load_adapter`, read it.

    Args:
        folder: to write into.
        content: of `checkpoint.read_adapter`.
        base: its base model's name, without a path of this machine.

    Raises:
        AdapterError: a layer lacks one of its two matrices, or their ranks are not the file's.
    """
    lora: LoRAConfig = content["lora_config"]
    pairs = _pair(content["lora"], OUR_KEY, "the adapter")
    odd = [n for n, (a, b) in pairs.items() if (a.shape[0], b.shape[1]) != (lora.rank, lora.rank)]
    if odd:
        found = f"{some_names(odd)}; take the adapter from its run again"
        raise AdapterError(f"the adapter: expected rank {lora.rank}, found others in {found}")
    told = {k: v for k, v in content.items() if k not in ("format", "version", "lora")}
    told |= {"base_model": base, "lora_config": vars(lora)}
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / PEFT_WEIGHTS, {"format": "pt", METADATA: json.dumps(told)})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "auto_mapping": {
            "base_model_class": "Sam3Model",
            "parent_library": "transformers.models.sam3.modeling_sam3",
        },
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        # Whole names: `o_proj` alone would miss the text encoder's `out_proj`, and match beyond
        # the adapted components.
        "target_modules": list(pairs),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_source(source: Path, alpha: float | None) -> Foreign:
    """Reads an adapter: PEFT's folder, our file or its folder, or a Meta-named .pt file.

    Args:
        source: file or folder.
        alpha: that of a Meta-named file, which does not store it; None for the others.

    Raises:
        AdapterError: something else, or what has no exact counterpart here, by name.
    """
    if "sam3.1" in source.name.lower() or "multiplex" in source.name.lower():
        raise AdapterError(f"--source: {source} is of SAM 3.1, another model; {LOAD_INSTEAD}")
    if not source.exists():
        raise AdapterError(f"--source: expected an adapter, found nothing at {source}; correct it")
    if source.is_dir() and not (source / checkpoint.ADAPTER_FILE).is_file():
        _refuse_alpha(alpha, source)
        return _read_peft(source)
    if source.suffix in (".safetensors", ".bin"):
        raise AdapterError(
            f"--source: expected PEFT's folder with {PEFT_CONFIG} and {PEFT_WEIGHTS}, a file of "
            f"ours or a Meta-named .pt, found {source}; name PEFT's folder"
        )
    try:
        path = source / checkpoint.ADAPTER_FILE if source.is_dir() else source
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any bytes may be in the file; torch raises as many kinds
        raise AdapterError(
            f"--source: {source} cannot be read safely: a damaged file, or one with code in it; "
            "name another, or save its tensors alone with torch.save"
        ) from error
    if isinstance(content, dict) and content.get("format") == checkpoint.FORMAT:
        _refuse_alpha(alpha, source)
        return _as_foreign(checkpoint.read_adapter(path), source)
    return _read_meta(content, source, alpha)


def _refuse_alpha(alpha: float | None, source: Path) -> None:
    """--alpha is for files that do not store it."""
    if alpha is not None:
        raise AdapterError(f"--alpha: {source} stores its own alpha; drop the flag")


def _as_foreign(content: dict[str, Any], source: Path) -> Foreign:
    """Our own file's content."""
    lora: LoRAConfig = content.pop("lora_config")
    pairs = _pair(content.pop("lora"), OUR_KEY, source)
    return Foreign(
        {name: (*pair, lora.alpha) for name, pair in pairs.items()},
        lora.dropout,
        (lora.target_modules, lora.components),
        description={k: v for k, v in content.items() if k not in ("format", "version")},
    )


def _check_files(folder: Path) -> None:
    """Raises AdapterError where a folder is none of PEFT's."""
    if not ((folder / PEFT_CONFIG).is_file() and (folder / PEFT_WEIGHTS).is_file()):
        hint = "name an adapter's folder"
        if (folder / "adapter_model.bin").is_file():
            hint = "adapter_model.bin can hold code: save it anew with safe_serialization=True"
        wanted = f"{PEFT_CONFIG} and {PEFT_WEIGHTS}, or {checkpoint.ADAPTER_FILE}"
        found = some_names(sorted(path.name for path in folder.iterdir())) or "no file"
        raise AdapterError(f"--source: expected {wanted}, in {folder}, found {found}; {hint}")


def _read_peft(folder: Path) -> Foreign:
    """A folder as PEFT's `save_pretrained` writes it."""
    _check_files(folder)
    try:
        if (folder / PEFT_CONFIG).stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{PEFT_CONFIG} of more than {MAX_CONFIG_BYTES} bytes")
        config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        alpha, dropout = float(config["lora_alpha"]), float(config["lora_dropout"])
        rank, ranks = int(config["r"]), _patterns(config, "rank_pattern")
        alphas = _patterns(config, "alpha_pattern")
        base = config.get("base_model_name_or_path")
        if not 0 <= dropout < 1 or not isinstance(base, str | None):
            raise ValueError(f"lora_dropout {dropout}, base_model_name_or_path {base!r}")
        with safe_open(folder / PEFT_WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = dict(json.loads((file.metadata() or {}).get(METADATA, "{}")))
        lora = told.pop("lora_config", None)
        own = ("target_modules", "components")
        selectors = tuple(tuple(map(str, lora[key])) for key in own) if lora else None
    except Exception as error:  # any JSON may be in the files, and any bytes
        raise AdapterError(f"--source: {folder} is damaged: {error!r}; get a full copy") from error
    _refuse_settings(config, folder)
    checkpoint.check_description(told, folder)
    pairs, rslora = _pair(tensors, PEFT_KEY, folder), config.get("use_rslora")
    layers = {}
    for name, (a, b) in pairs.items():
        # PEFT takes the first pattern that a name ends in.
        own_rank = next((int(v) for p, v in ranks if p.match(name)), rank)
        own_alpha = next((v for p, v in alphas if p.match(name)), alpha)
        if a.shape[0] != own_rank:
            raise AdapterError(
                f"--source: {folder}: expected rank {own_rank} of {PEFT_CONFIG}, found "
                f"{a.shape[0]} in {name}; the two files are not of one adapter"
            )
        # rsLoRA scales by alpha / sqrt(rank).
        layers[name] = (a, b, own_alpha * math.sqrt(own_rank) if rslora else own_alpha)
    targets = config.get("target_modules")
    whole = isinstance(targets, list) and not any(config.get(k) for k in PEFT_SELECTORS)
    known = {key: value for key, value in told.items() if key in checkpoint.DESCRIPTION}
    told = {"base_model": base, "geometry_cls": "hf"} | known
    return Foreign(layers, dropout, selectors, tuple(targets) if whole else None, told)


def _refuse_settings(config: Mapping[str, Any], folder: Path) -> None:
    """Raises AdapterError for PEFT settings that have no exact counterpart here."""
    odd = [f"{key} {config[key]!r}" for key in PEFT_REFUSED if config.get(key)]
    wanted = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": PEFT_STARTS}
    odd += [f"{k} {config.get(k)!r}" for k, good in wanted.items() if config.get(k) not in good]
    if odd:
        raise AdapterError(
            f"--source: {folder}: expected LoRA of Linear layers alone, found {', '.join(odd)}, "
            "which this project does not have; merge the adapter with peft instead"
        )


def _patterns(config: Mapping[str, Any], key: str) -> list[tuple[re.Pattern[str], float]]:
    """PEFT's rank_pattern or alpha_pattern: ends of names, as expressions, with their values;
    ValueError for one whose search may never end."""
    patterns = config.get(key) or {}
    for end, value in patterns.items():
        endless = re.search(r"\)[*+{]", end) or len(re.findall(r"[*+{]", end)) > MAX_REPEATS
        if endless or not math.isfinite(value):
            raise ValueError(f"{key} {end!r:.80}, {value}")
    return [(re.compile(rf"(.*\.)?({end})$"), float(v)) for end, v in patterns.items()]


def _read_meta(content: Any, source: Path, alpha: float | None) -> Foreign:
    """A file of tensors named as Meta's modules; B of a fused layer is cut in thirds, A shared."""
    content = content if isinstance(content, dict) else {}
    # A training run's file holds its weights one level down.
    inner = next((content[k] for k in ("model", "state_dict") if k in content), content)
    tensors = inner if isinstance(inner, dict) else {}
    if any(word in key for key in map(str, tensors) for word in SAM31_KEYS):
        raise AdapterError(
            f"--source: {source} is a SAM 3.1 checkpoint, no adapter; {LOAD_INSTEAD}"
        )
    if not any(".lora_A" in str(key) for key in tensors):
        is_model = any(re.match(r"(detector|tracker|backbone)\.", str(key)) for key in tensors)
        kind = "Meta's own sam3.pt, a whole model" if is_model else "another kind of file"
        raise AdapterError(f"--source: expected an adapter, found {kind}, {source}; {LOAD_INSTEAD}")
    pairs = _pair(tensors, META_KEY, source)
    if alpha is None:
        raise AdapterError(
            f"--alpha: {source} does not store the alpha that it was trained with; find it in that "
            "run's configuration and give --alpha 16"
        )
    unknown = [name for name in pairs if not library_names(name)]
    if unknown:
        raise AdapterError(
            f"--source: {source}: {len(unknown)} layers have no counterpart among the Linear "
            f"layers of Sam3Model: {some_names(unknown)}; train without them"
        )
    layers = {}
    for meta_name, (a, b) in pairs.items():
        names = library_names(meta_name)
        if b.shape[0] % len(names):
            found = f"found {b.shape[0]} outputs in {meta_name}; name another"
            raise AdapterError(f"--source: {source}: expected thirds of a fused layer, {found}")
        if twice := [name for name in names if name in layers]:
            found = f"found {some_names(twice)} in {meta_name} and in one more; name another"
            raise AdapterError(f"--source: {source}: expected each layer once, {found}")
        parts = zip(names, b.chunk(len(names)), strict=True)
        layers |= {name: (a, part, alpha) for name, part in parts}
    return Foreign(layers, description={"geometry_cls": "meta"})


def _pair(
    tensors: Mapping[str, torch.Tensor], keys: re.Pattern[str], source: object
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A (rank, in) and B (out, rank), fp32, of each layer; AdapterError lists all that is odd."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    odd, misshapen = [], []
    for key, tensor in tensors.items():
        match = keys.fullmatch(str(key))
        if match is None or len(key) > MAX_NAME or match[2] in found.get(match[1], {}):
            odd.append(str(key))
        elif not checkpoint.is_matrix(tensor):
            misshapen.append(str(key))
        else:
            transposed = keys is META_KEY and not match[3]
            found.setdefault(match[1], {})[match[2]] = (tensor.T if transposed else tensor).float()
    whole = {name: (s["A"], s["B"]) for name, s in found.items() if len(s) == 2}
    misshapen += [name for name, (a, b) in whole.items() if a.shape[0] != b.shape[1]]
    infinite = [n for n, pair in whole.items() if not all(t.isfinite().all() for t in pair)]
    _raise_faults(
        str(source),
        {
            "keys that are none of a LoRA adapter's, or stand twice": odd,
            "that are no pair of matrices of one rank (of a convolution?)": misshapen,
            "layers with A or B alone": [name for name in found if name not in whole],
            "layers with values that are not finite": infinite,
        },
    )
    return whole


def fit(
    adapter: Foreign, model: nn.Module, source: Path
) -> tuple[LoRAConfig, dict[str, torch.Tensor]]:
    """An adapter as this project describes it, after each layer was held against the base.

    Layers of a smaller rank get zeros up to the largest, and a scaling other than that layer's goes
    into B: the products stay what they were.

    Args:
        adapter: of `read_source`.
        model: the base model, not adapted.
        source: for messages.

    Returns:
        The configuration, and tensors as `load_lora_state_dict` takes them.

    Raises:
        AdapterError: lists the layers that are not the base's, misshapen, missing, or not of a
            component that can be adapted.
    """
    layers = {n: layer for n, layer in adapter.layers.items() if n not in UNUSED_LINEARS}
    _check_layers(layers, adapter.targets, model, source)
    rank, alpha = max(((len(a), alpha) for a, _, alpha in layers.values()), key=lambda p: p[0])
    state = {}
    for name, (a, b, own_alpha) in layers.items():
        missing = rank - len(a)
        if own_alpha * rank != alpha * len(a):
            b = b * (own_alpha * rank / (alpha * len(a)))
        state[f"{name}.lora_A"] = F.pad(a, (0, 0, 0, missing))
        state[f"{name}.lora_B"] = F.pad(b, (0, missing))
    components = tuple(c for c in COMPONENTS if any(n.split(".")[0] == c for n in layers))
    leaves = tuple(dict.fromkeys(name.split(".")[-1] for name in layers))
    choices = [(leaves, components), (tuple(layers), components)]
    # The shortest description that means these layers and no other.
    for targets, parts in [adapter.selectors, *choices] if adapter.selectors else choices:
        lora = LoRAConfig(rank, float(alpha), adapter.dropout, targets, parts)
        try:
            matched = match_modules(model, lora)
        except AdapterError:
            continue
        if set(matched) == set(layers):
            break
    return lora, state


def _check_layers(
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]],
    targets: tuple[str, ...] | None,
    model: nn.Module,
    source: Path,
) -> None:
    """Raises AdapterError with all layers that the base does not have as they are, or more."""
    modules = dict(model.named_modules())
    linears = {n: m for n, m in modules.items() if isinstance(m, nn.Linear)}
    ends = tuple(f".{target}" for target in targets or ())
    named = [n for n in linears if f".{n}".endswith(ends)] if targets else []
    outside = [n for n in layers if n in linears and n.split(".")[0] not in COMPONENTS]
    misshapen = [
        f"{n} A {tuple(a.shape)} B {tuple(b.shape)} where the base has {tuple(m.weight.shape)}"
        for n, (a, b, _) in layers.items()
        if (m := linears.get(n)) and (b.shape[0], a.shape[1]) != tuple(m.weight.shape)
    ]
    _raise_faults(
        f"{source} does not fit the base model",
        {
            "layers that the base does not have": [n for n in layers if n not in modules],
            "layers that are not Linear": [n for n in layers if n in modules and n not in linears],
            "layers of parts that are not adapted here": outside,
            "misshapen": misshapen,
            "whose alpha is not a number > 0": [
                f"{n}: {alpha}" for n, (_, _, alpha) in layers.items() if not 0 < alpha < math.inf
            ],
            "missing": [n for n in named if n not in layers and n not in UNUSED_LINEARS],
        },
    )
    if not layers:
        raise AdapterError(f"--source: {source}: expected LoRA layers, found none; name another")


def _raise_faults(subject: str, faults: Mapping[str, list[str]]) -> None:
    """Raises AdapterError that counts each kind of fault and shows its first ones."""
    parts = [
        f"{len(names)} {kind} ({some_names(names)})" for kind, names in faults.items() if names
    ]
    if parts:
        found = f"{'; '.join(parts)}; name another, or its own base with --model_name"
        raise AdapterError(f"{subject}: expected a LoRA adapter for it, found {found}")
