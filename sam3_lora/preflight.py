"""What a training run needs, looked at before it starts, for `--check`.

Each check says in one line what it found. None loads weights, writes a file or downloads one.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants as hub
from huggingface_hub import get_hf_file_metadata, hf_hub_url, model_info, try_to_load_from_cache
from safetensors import safe_open

from lora_layers import count_parameters, lora_table
from sam3_lora import checkpoint, files, memory, runlog
from sam3_lora.coco import CocoSplit
from sam3_lora.config import (
    Config,
    check_same_settings,
    check_stopping,
    load_saved,
    lora_config,
    one_line,
)
from sam3_lora.features import cache_bytes
from sam3_lora.forward import Forward
from sam3_lora.layout import sibling_val
from sam3_lora.model import (
    INDEX,
    ModelError,
    access_hint,
    cast_towers,
    choose_device,
    compute_dtype,
    load_meta_model,
    load_tokenizer,
    refuse_other_formats,
)
from sam3_lora.notices import find_notices
from sam3_lora.overview import check_split, plural
from sam3_lora.packages import Finding, check_packages, check_python

# Seconds that the hub has to answer.
TIMEOUT = 10
# RAM of a process on a CPU: Python and torch, and this many times what is predicted for a GPU.
# Measured: 7.0 GB where 4.8 are predicted (minimal preset, 1 image x 3 prompts, fp32), 1.0 GB where
# 0.05 are (the demo's model).
PROCESS_RAM, RAM_FACTOR = 10**9, 1.25
# Parameters of a model that a CPU trains in minutes; the demo's has 2 million, SAM 3 840.
SMALL = 10**8
# Measured, see README.md.
ON_CPU = "SAM 3 takes about a minute a step on a CPU (59 s measured, minimal preset, one core)"
GET_CUDA = "install a build of torch with CUDA: https://pytorch.org/get-started/locally/"


@dataclass
class Report:
    """The findings so far, each told as it comes.

    Args:
        errors: what a part may raise for the user's sake; it becomes a finding.
        tell: takes a line.
    """

    errors: tuple[type[Exception], ...]
    tell: Callable[[str], Any]
    findings: list[Finding] = field(default_factory=list)

    def add(self, *findings: Finding) -> None:
        """Takes findings."""
        for item in findings:
            clean = replace(item, found=one_line(item.found), remedy=one_line(item.remedy))
            self.findings.append(clean)
            self.tell(str(clean))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Turns an error in a part of the checks into a finding, so that the others go on."""
        try:
            yield
        except self.errors as error:
            self.add(Finding("error", name, str(error)))

    def close(self) -> int:
        """Tells the sum; returns the exit code."""
        counts = Counter(item.state for item in self.findings)
        parts = [plural(counts[state], state) for state in ("error", "warning")]
        verdict = "correct the errors and check again" if counts["error"] else "ready to train"
        self.tell(f"{', '.join(parts)}: {verdict}")
        return 2 if counts["error"] else 0


class Parts(NamedTuple):
    """The training script's own builders, so that what is looked at is what a run is made of."""

    datasets: Callable[..., tuple[Any, Any]]
    plan: Callable[..., Any]
    forward: Callable[..., Forward]
    memory_settings: Callable[..., dict[str, Any]]


@dataclass
class Known:
    """What the first checks leave for the others; None for what is not there or wrong."""

    model: Any = None
    device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    train: CocoSplit | None = None
    val: CocoSplit | None = None
    validates: bool = False  # also with a split that is wrong
    state: dict[str, Any] | None = None  # of the checkpoint to go on from
    download: int = 0  # bytes


def check(report: Report, config: Config, parts: Parts) -> int:
    """Goes through all checks, whatever they find.

    Args:
        report: takes the findings.
        config: the resolved configuration.
        parts: of the training script.

    Returns:
        The exit code: 2 where one of them is an error, else 0.
    """
    output, training, known = config.output, config.training, Known()
    report.add(check_python(), check_packages())
    with report.part("packages"):
        runlog.check_optional_packages(tensorboard=output.tensorboard, wandb=output.wandb)
    with suppress(ModelError):  # `check_weights` tells
        known.model, _ = load_meta_model(config.model.name, local=True)
    with report.part("device"):
        known.device = choose_device(config.hardware.device)
        known.dtype = compute_dtype(config.hardware.mixed_precision, known.device)
        report.add(*check_device(known.device, known.dtype, known.model))
    with report.part("weights"):
        found, known.download = check_weights(config.model.name, known.model)
        report.add(found)
    with report.part("data"):
        found, known.train = check_split("train", training.train_data_path)
        report.add(*found)
        if val_path := training.val_data_path or sibling_val(training.train_data_path):
            known.validates = True
            found, known.val = check_split("val", val_path, config.evaluation.max_val_images)
            report.add(*found)
    with report.part("output"):
        found, known.state = check_output(output.output_dir, output.overwrite, output.resume)
        report.add(found)
        if output.resume:
            check_same_settings(config, load_saved(output.output_dir / "config.yaml"))
    if known.model is None:
        words = "no check of adapters, memory and disk before the model's config.json is there"
        report.add(Finding("warning", "model", words, "see `weights`"))
        return report.close()
    with report.part("adapters"):
        checkpoint.adapt(known.model, lora_config(config), training.init_lora_weights)
        report.add(check_adapters(known.model))
    train_set = _check_run(report, config, parts, known) if known.train else None
    if count_parameters(known.model)[0]:  # the adapters are right
        cast_towers(known.model, known.dtype)
        _check_size(report, config, parts, known, train_set)
    return report.close()


def _check_run(report: Report, config: Config, parts: Parts, known: Known) -> Any:
    """The checks of data and settings together; returns the data set that is trained on."""
    with report.part("run"):
        train_set, _ = parts.datasets(config, known.model, (known.train, known.val))
        check_stopping(config, known.validates)
        plan = parts.plan(config.training, len(train_set))
        report.add(_check_length(plan, known.state))
        has = {"masks": train_set.has_masks(), "validation": known.validates, "val": known.val}
        for words in find_notices(config, known.train, plan, **has):
            report.add(Finding("warning", "run", words))
        return train_set


def _check_size(report: Report, config: Config, parts: Parts, known: Known, train_set: Any) -> None:
    """The checks of memory and disk."""
    training, kind, features = config.training, config.training.cache_features, 0
    masks = train_set is None or train_set.has_masks()
    forward = parts.forward(config, known.model, None, known.dtype, masks)
    if known.device is not None and train_set is not None and kind != "off":
        with report.part("features"):
            limit = training.cache_limit_gb
            features = cache_bytes(forward, train_set, limit, known.device.type)
    if known.device is not None:
        with report.part("memory"):
            asked = config.hardware.gradient_checkpointing, training.gradient_accumulation_steps
            settings = parts.memory_settings(config, forward)
            kept = features if kind == "ram" else 0
            report.add(*check_memory(forward, known.device, *asked, kept, **settings))
    size = run_bytes(count_parameters(known.model)[0], training.save_total_limit)
    wanted = {config.output.output_dir: ("adapters and checkpoints", size)}
    if kind == "disk" and features:
        wanted[training.cache_dir] = "features (less what an earlier run left)", features
    if known.download:
        wanted[Path(hub.HF_HUB_CACHE)] = "the weights", known.download
    with report.part("disk"):
        report.add(*check_disk(wanted))


def check_device(
    device: torch.device, dtype: torch.dtype, model: torch.nn.Module | None
) -> list[Finding]:
    """What a run computes on, and in which precision.

    Args:
        device: as `model.choose_device` gives.
        dtype: as `model.compute_dtype` gives.
        model: what is trained; None: not known.
    """
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16, with a gradient scaler"}
    small = model is not None and count_parameters(model)[1] < SMALL
    found = _check_gpu(device) if device.type == "cuda" else _without_gpu(device, small)
    return [found, Finding("ok", "precision", precision.get(dtype, "fp32"))]


def _check_gpu(device: torch.device) -> Finding:
    """A GPU's name and memory, and whether torch can compute on it."""
    name = torch.cuda.get_device_name(device)
    try:
        (torch.ones(2, device=device) @ torch.ones(2, device=device)).item()
    except RuntimeError as error:  # no kernels for it, or another process has all of it
        found = f"{device}: {name}, but torch fails on it: {error}"
        remedy = f"free it, or {GET_CUDA}; --device cpu does without"
        return Finding("error", "device", found, remedy)
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if wanted > there:
        found = f"expected {wanted} GPUs, one a process, found {there}"
        return Finding("error", "device", found, "use a smaller --nproc_per_node")
    return Finding("ok", "device", f"{device}: {name}, {free:.1f} of {total:.1f} GiB free")


def _without_gpu(device: torch.device, small: bool) -> Finding:
    """What a run without CUDA can do, and why there is none where there could be."""
    driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    if driver and device.type == "cpu" and not torch.cuda.is_available():
        found = "cpu: this machine has an NVIDIA driver, but torch"
        if torch.version.cuda is None:
            found = f"{found} {torch.__version__} is a build without CUDA"
            return Finding("warning", "device", found, GET_CUDA)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.is_available()
        reason = one_line(told[0].message) if told else "nvidia-smi may tell why"
        found = f"{found} finds no GPU ({reason})"
        remedy = f"update the driver, or install torch for a CUDA older than {torch.version.cuda}"
        return Finding("warning", "device", found, remedy)
    if small:
        return Finding("ok", "device", f"{device.type}: enough for a model of this size")
    remedy = "train SAM 3 on a GPU; the demo model (configs/demo_config.yaml) trains here"
    speed = ON_CPU if device.type == "cpu" else "no step of SAM 3 was measured on it"
    return Finding("warning", "device", f"{device.type}: {speed}", remedy)


def check_weights(name: str, model: torch.nn.Module | None) -> tuple[Finding, int]:
    """Where the weights are, whether they are whole, or whether the hub would give them.

    Args:
        name: as for `model.load_model`.
        model: its structure; files that hold fewer numbers are a part of it. None: not known.

    Returns:
        (finding, bytes that a run would download first).

    Raises:
        ModelError: as `model.load_model`, as far as it shows without loading.
    """
    refuse_other_formats(name)
    parameters = count_parameters(model)[1] if model else 0
    if Path(name).exists():
        return Finding("ok", "weights", f"{name}: {_check_files(Path(name), parameters)}"), 0
    cached = try_to_load_from_cache(name, "config.json")
    reason = "it is not in the hub's cache"
    if isinstance(cached, str):
        folder = Path(cached).parent
        try:
            found = f"{name}, in the hub's cache: {_check_files(folder, parameters)}"
            return Finding("ok", "weights", found), 0
        except ModelError as error:
            reason = str(error)
    if hub.HF_HUB_OFFLINE:
        raise ModelError(access_hint(name, OSError(f"HF_HUB_OFFLINE is set, and {reason}")))
    try:
        # The list of files is public, what is in them is not.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=TIMEOUT)
        listed = model_info(name, files_metadata=True, timeout=TIMEOUT).siblings or []
    except Exception as error:  # of the hub, of the network below it, of a proxy between
        raise ModelError(access_hint(name, error)) from error
    size = sum(f.size or 0 for f in listed if f.rfilename.endswith(".safetensors"))
    amount = f"{size / 1e9:.2f} GB" if size else "of a size that it does not tell"
    return Finding("ok", "weights", f"{name}: the hub gives them; a run downloads {amount}"), size


def _check_files(folder: Path, parameters: int) -> str:
    """What a model's folder holds; ModelError unless it is all there."""
    load_meta_model(str(folder))  # config.json
    files = ["model.safetensors"]
    numbers = size = 0
    try:
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        for file in files:
            if not (folder / file).is_file():
                raise FileNotFoundError(f"expected {file} in it, found none")
            size += (folder / file).stat().st_size
            with safe_open(folder / file, "pt") as weights:  # its table alone is read
                shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
            numbers += sum(torch.Size(shape).numel() for shape in shapes)
    except Exception as error:  # what a damaged file makes its reader raise
        raise ModelError(access_hint(str(folder), error)) from error
    if numbers < parameters:
        text = f"expected {parameters:,} numbers or more, found {numbers:,}"
        raise ModelError(access_hint(str(folder), OSError(text)))
    load_tokenizer(str(folder))
    return f"{numbers / 1e6:,.1f} million parameters, {size / 1e9:.2f} GB, whole"


def check_adapters(model: torch.nn.Module) -> Finding:
    """What `apply_lora` has adapted, on one line."""
    *rows, total = (line.split() for line in lora_table(model).splitlines()[1:])
    parts = ", ".join(f"{row[0]} {row[1]} layers" for row in rows)
    return Finding("ok", "adapters", f"{total[2]} parameters {' '.join(total[3:])}: {parts}")


def check_memory(
    forward: Forward,
    device: torch.device,
    asked: str,
    accumulation: int,
    features: int,
    **settings: Any,
) -> list[Finding]:
    """The predicted peak beside what the card has, or the machine.

    Args:
        forward: of a model without weights.
        device: where it would run.
        asked: `hardware.gradient_checkpointing`.
        accumulation: micro-batches a step.
        features: bytes that are kept in RAM.
        settings: as for `memory.predict`.
    """
    ram, weights = runlog.available_ram(), 4 * count_parameters(forward.model)[1]
    forward = replace(forward, checkpointing="off" if asked == "auto" else asked)
    if device.type != "cuda":
        parts = memory.predict(forward, **settings)
        peak = PROCESS_RAM + max(int(RAM_FACTOR * parts["peak"]), weights) + features
        words = f"about {_gb(peak)} of RAM at the peak ({_settings(forward, settings)})"
        remedy = _smaller(forward.checkpointing, accumulation, **settings)
        return [_compare("memory", words, peak, ram, f"less is had by, in this order: {remedy}")]
    free = torch.cuda.mem_get_info(device)[0]
    modes = {mode: replace(forward, checkpointing=mode) for mode in memory.CHECKPOINTING}
    if asked == "auto":
        chosen = memory.choose_checkpointing(
            lambda mode: memory.predict(modes[mode], **settings)["peak"], free
        )
        forward = modes[chosen]
    found = _check_card(forward, free, accumulation, **settings)
    words = f"{_gb(weights + features)} to load the weights" + " and keep features" * bool(features)
    remedy = "close other programs, or keep features with --cache_features disk"
    return [found, _compare("ram", words, weights + features, ram, remedy)]


def _check_card(forward: Forward, free: int, accumulation: int, **settings: Any) -> Finding:
    """The predicted peak beside a GPU's free memory."""
    peak, room = memory.predict(forward, **settings)["peak"], memory.usable(free)
    found = f"{_gb(peak)} predicted at the peak ({_settings(forward, settings)}), "
    found += f"{_gb(room)} of {_gb(free)} free to be filled"
    if peak <= room:
        return Finding("ok", "memory", found)
    least = settings | {"images": 1, "prompts": 1, "max_rows": 1, "mask_loss": "native"}
    smallest = memory.predict(replace(forward, checkpointing="full"), **least)["peak"]
    remedy = f"in this order: {_smaller(forward.checkpointing, accumulation, **settings)}"
    if smallest <= room:
        remedy = f"a run goes on in smaller parts; better {remedy}"
        return Finding("warning", "memory", found, remedy)
    remedy = f"even one image with one prompt takes {_gb(smallest)}: use a larger card, or {remedy}"
    return Finding("error", "memory", found, remedy)


def _smaller(
    mode: str, accumulation: int, *, images: int, max_rows: int, mask_loss: str, **_: Any
) -> str:
    """The flags that take less memory, in the order of TRAINING_GUIDE.md."""
    flags = ["--gradient_checkpointing full"] * (mode != "full")
    flags += [f"--max_rows_per_forward {max_rows // 2}"] * (max_rows > 1)
    if images > 1:
        parts = f"--gradient_accumulation_steps {2 * accumulation}"
        flags.append(f"--batch_size {images // 2} {parts}")
    flags += ["--mask_loss native"] * (mask_loss == "full")
    return "; ".join([*flags, "--config configs/minimal_lora_config.yaml"])


def _settings(forward: Forward, settings: dict[str, Any]) -> str:
    """What a prediction is for."""
    return (
        f"batch_size {settings['images']}, {settings['prompts']} prompts an image, "
        f"{settings['max_rows']} rows per forward, checkpointing {forward.checkpointing}"
    )


def _compare(name: str, words: str, needed: int, there: int | None, remedy: str) -> Finding:
    """A finding on bytes that are needed, beside those that are there, if that is known."""
    if there is None:
        return Finding("ok", name, f"{words}; how much is free, the system does not tell")
    found = f"{words}, {_gb(there)} free"
    return Finding("error" if needed > there else "ok", name, found, remedy * (needed > there))


def check_output(
    folder: Path, overwrite: bool, resume: bool
) -> tuple[Finding, dict[str, Any] | None]:
    """Whether a run can have its folder, and what becomes of what is there.

    Returns:
        (finding, state of the checkpoint to go on from, if one is).

    Raises:
        OSError: as `checkpoint.check_folder` and `files.claim`.
        AdapterError: the checkpoint to go on from is damaged.
    """
    checkpoint.check_folder(folder, resume)
    files.check_free(folder)
    if resume:
        newest = checkpoint.checkpoints(folder)[-1]
        found = Finding("ok", "output", f"{folder}: goes on from {newest.name}")
        return found, checkpoint.read_checkpoint(newest)
    found, remedy = f"{folder}: free, and can be written", ""
    if checkpoint.is_run(folder) and overwrite:
        found = f"{folder} holds an earlier run, which --overwrite will remove"
        remedy = "drop --overwrite to keep it"
    elif checkpoint.is_run(folder):
        found = (
            f"{folder} holds an earlier run, which will be renamed to {folder.name}.1, or .2, ..."
        )
    return Finding("warning" if remedy else "ok", "output", found, remedy), None


def _check_length(plan: Any, state: dict[str, Any] | None) -> Finding:
    """A run's steps, and what a checkpoint's state leaves of them."""
    if state is None:
        return Finding("ok", "run", str(plan))
    at = runlog.Progress()
    at.resume(state)
    plan.resume(state)
    ended = at.ending(plan.total_steps)
    return Finding("warning" if ended else "ok", "run", f"{plan}; step {at.step} is done{ended}")


def run_bytes(trainable: int, checkpoints: int) -> int:
    """The most bytes that a run's adapters and checkpoints take.

    Args:
        trainable: parameters.
        checkpoints: `training.save_total_limit`.
    """
    adapter = 4 * trainable  # fp32
    # AdamW has two numbers a parameter. Beside the best there are the newest one and, until older
    # ones are removed, the one before it; beside them best_model and last_model.
    return (checkpoints + 2) * 3 * adapter + 2 * adapter


def check_disk(wanted: dict[Path, tuple[str, int]]) -> list[Finding]:
    """The free room of each disk beside what a run will write there.

    Args:
        wanted: folder, there or not -> what is written there, and its bytes.
    """
    found = []
    for folders, free in files.by_disk(wanted):
        parts = [f"{wanted[f][0]} in {f}: at most {_gb(wanted[f][1])}" for f in folders]
        needed = sum(wanted[f][1] for f in folders)
        remedy = "make room, or name a folder on another disk"
        found.append(_compare("disk", "; ".join(parts), needed, free, remedy))
    return found


def _gb(size: float) -> str:
    """Bytes in GB, 10^9 of them."""
    return f"{size / 1e9:.2f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"
