"""Adapter files and resume state: self-describing, written atomically, loaded strictly.

    <run>/best_model/lora_weights.pt     the adapter with the best validation figure
    <run>/last_model/lora_weights.pt     the adapter as the run ended
    <run>/checkpoint-<step>/             lora_weights.pt + training_state.pt, to go on from

Both files hold tensors, numbers, strings and containers of them, and load with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_layers import (
    AdapterError,
    LoRAConfig,
    apply_lora,
    load_lora_state_dict,
    lora_state_dict,
    remove_lora,
)
from sam3_lora.files import check_writable, discard, remove, sync, write_atomically
from sam3_lora.model import fingerprint

ADAPTER_FILE = "lora_weights.pt"
STATE_FILE = "training_state.pt"
FORMAT = "sam3-lora-adapter"
# What makes an adapter of another project one of ours.
IMPORT = "run `python export_sam3_lora.py import --source PATH --output adapter.pt`"
VERSION = 1
# What a file must hold to be used at all.
ENTRIES = {
    "version": int,
    "lora_config": dict,
    "lora": dict,
    "base_model": str,
    "base_fingerprint": str,
}
# What a file may say of its adapter.
DESCRIPTION = {"base_model": str, "base_fingerprint": str, "geometry_cls": str, "step": int}
DESCRIPTION |= dict.fromkeys(("categories", "metrics", "thresholds", "calibration"), dict)
# What reading or loading the content of another file as a state can raise.
NOT_A_STATE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def adapter_fingerprint(content: dict[str, Any]) -> str:
    """A short name for an adapter, from `read_adapter`'s content: 16 hex digits of a SHA-256 over
    its base's `fingerprint`, its scaling and its tensors."""
    lora, tensors = content["lora_config"], content["lora"]
    digest = hashlib.sha256(f"{content['base_fingerprint']} {lora.alpha / lora.rank}".encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(path: Path, model: nn.Module, lora: LoRAConfig, **description: Any) -> None:
    """Writes an adapter that carries what re-creates it.

    Args:
        path: file to write; folders are made, an older file is replaced in one move.
        model: the adapted model.
        lora: the configuration it was adapted with.
        description: entries of `DESCRIPTION`: `base_model`, `geometry_cls`, `categories` (name ->
            prompt), `step`, `metrics`; numbers, strings and containers of them.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "lora_config": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(lora).items()},
        "lora": lora_state_dict(model),
        "base_fingerprint": fingerprint(model),
        **description,
    }
    _write(content, path)


def read_adapter(path: Path) -> dict[str, Any]:
    """Reads an adapter file, without a model.

    Args:
        path: the file, or a folder that holds `lora_weights.pt`.

    Returns:
        What `save_adapter` wrote, with `lora_config` as a `LoRAConfig`.

    Raises:
        AdapterError: absent, not an adapter of this project, damaged, or from a later version.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ADAPTER_FILE
    content = _read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AdapterError(
            f"{path}: expected an adapter written by train_sam3_lora.py, found another .pt file; "
            f"name {ADAPTER_FILE}, or if this holds LoRA weights, {IMPORT}"
        )
    wrong = [k for k, kind in ENTRIES.items() if not isinstance(content.get(k), kind)]
    if wrong:
        raise AdapterError(
            f"{path}: expected a complete adapter, found no valid {', '.join(wrong)}; take the "
            "adapter from its run again"
        )
    if content["version"] > VERSION:
        raise AdapterError(
            f"{path}: expected adapter version <= {VERSION}, found {content['version']}; update "
            "this project"
        )
    tensors = content["lora"]
    odd = [k for k, v in tensors.items() if not isinstance(k, str) or not is_matrix(v)]
    odd += [k for k, v in tensors.items() if k not in odd and not v.isfinite().all()]
    if odd:
        raise AdapterError(
            f"{path}: expected matrices of finite numbers, found {odd[0]!r:.80} and "
            f"{len(odd) - 1} more; take the adapter from its run again"
        )
    check_description(content, path)
    return {**content, "lora_config": _read_lora_config(content["lora_config"], path)}


def _read_lora_config(written: dict[str, Any], path: Path) -> LoRAConfig:
    """A file's `lora_config`; AdapterError unless it is one."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in written.items()}
    known = {field.name: type(field.default) for field in dataclass_fields(LoRAConfig)}
    # LoRAConfig(alpha=16) is as good as 16.0.
    whole = [k for k, v in fields.items() if type(v) is int and known.get(k) is float]
    fields |= {k: float(fields[k]) for k in whole}
    odd = [k for k in known.keys() | fields.keys() if type(fields.get(k)) is not known.get(k)]
    texts = [text for value in fields.values() if isinstance(value, tuple) for text in value]
    odd += ["names"] if not all(isinstance(text, str) for text in texts) else []
    if odd:
        raise AdapterError(
            f"{path}: lora_config: expected {', '.join(known)} alone, of their types, found other "
            f"{', '.join(map(str, odd))}; take the adapter from its run again"
        )
    return LoRAConfig(**fields)


def check_description(content: dict[str, Any], path: Path) -> None:
    """Raises AdapterError where a file's entries of `DESCRIPTION` are not what is read of them."""
    is_sound = {
        "categories": _are_texts,
        "calibration": lambda made: _are_texts(made.get("prompts", {})),
        "geometry_cls": lambda kind: kind in ("meta", "hf"),
        "metrics": lambda own: all(isinstance(v, float | int | None) for v in own.values()),
        "thresholds": lambda own: all(
            isinstance(k, str) and type(v) in (int, float) and 0 <= v <= 1 for k, v in own.items()
        ),
    }
    odd = {k for k, v in content.items() if not isinstance(v, DESCRIPTION.get(k, object))}
    odd |= {k for k in is_sound.keys() & content.keys() - odd if not is_sound[k](content[k])}
    if odd:
        raise AdapterError(
            f"{path}: expected a description as this project writes it, found another "
            f"{', '.join(sorted(odd))}; take the adapter from its run again"
        )


def _are_texts(values: Any) -> bool:
    """Whether values are texts by name."""
    texts = [t for pair in values.items() for t in pair] if isinstance(values, dict) else [None]
    return all(isinstance(text, str) for text in texts)


def store_thresholds(path: Path, thresholds: dict[str, float], calibration: dict[str, Any]) -> None:
    """Writes thresholds into an adapter's file, in one move; all else in it stays.

    Args:
        path: as for `read_adapter`.
        thresholds: category name -> lowest score kept, 0 to 1.
        calibration: what they were chosen on: `split`, `images`, `iou`, `tile`; and `prompts`, the
            text that each category was asked with.

    Raises:
        AdapterError: no file that can be read is there.
    """
    path = path / ADAPTER_FILE if path.is_dir() else path
    _write({**_read(path), "thresholds": thresholds, "calibration": calibration}, path)


def is_matrix(value: Any) -> bool:
    """Whether a value, of a file of anyone's, can be A or B: of real numbers, each of them stored.
    A view of a few numbers can stand for more than fit in memory."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    real = value.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return real and value.ndim == 2 and value.nbytes <= value.untyped_storage().nbytes()


def load_adapter(
    path: Path, model: nn.Module, content: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Adapts a base model as a file describes, and loads its weights; all of them or none.

    Args:
        path: as for `read_adapter`.
        model: the base model the adapter was trained on.
        content: what `read_adapter` gave for the path; None reads it.

    Returns:
        The file's content, see `read_adapter`.

    Raises:
        AdapterError: trained on another base, or the names or shapes do not fit it.
    """
    content = content or read_adapter(path)
    check_base(content, model, path)
    try:
        apply_lora(model, content["lora_config"])
        try:
            load_lora_state_dict(model, content["lora"])
        except AdapterError:
            remove_lora(model)
            raise
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}; take the adapter from its run again") from error
    return content


def adapt(model: nn.Module, lora: LoRAConfig, start: Path | None) -> None:
    """Puts adapters into a base model for a run: fresh ones, or with the weights of a file.

    Args:
        model: the base model.
        lora: the run's settings.
        start: as for `read_adapter`; its settings must be the run's, but for dropout.

    Raises:
        AdapterError: nothing to adapt, or a file of another base or of other settings.
    """
    content = read_adapter(start) if start else None
    if content:
        check_base(content, model, start)
        _check_settings(content["lora_config"], lora, start)
    apply_lora(model, lora)
    if content:
        load_lora_state_dict(model, content["lora"])


def _check_settings(found: LoRAConfig, wanted: LoRAConfig, path: Path) -> None:
    """Raises AdapterError where two configurations differ in more than dropout."""
    theirs, ours = (
        {k: sorted(v) if isinstance(v, tuple) else v for k, v in vars(c).items() if k != "dropout"}
        for c in (found, wanted)
    )
    if odd := [f"{k} {v} (not {ours[k]})" for k, v in theirs.items() if v != ours[k]]:
        raise AdapterError(
            f"{path}: expected an adapter of this run's settings, found {', '.join(odd)}; set the "
            "lora section to these"
        )


def check_base(content: dict[str, Any], model: nn.Module, path: Path) -> None:
    """Raises AdapterError when an adapter was trained on other weights than a model's, if any."""
    found = fingerprint(model)
    if found and content["base_fingerprint"] != found:
        raise AdapterError(
            f"{path}: expected the base it was trained on, {content['base_model']} "
            f"({content['base_fingerprint']}), found a model with other weights ({found}); name "
            "the right one with --model_name"
        )


def save_checkpoint(
    run_dir: Path, step: int, state: dict[str, Any], adapter: dict[str, Any]
) -> Path:
    """Writes `checkpoint-<step>/`, complete or not at all.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        state: what resuming needs beside the adapter: optimizer, scaler, figures; `rng`, the
            `rng_state` of each process.
        adapter: keyword arguments of `save_adapter` but the path.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it cannot be written; the message names the one to go on from.
    """
    folder = run_dir / f"checkpoint-{step}"
    content = {**state, "step": step}
    for place in [*run_dir.glob(".*.tmp"), *run_dir.glob("*/.*.tmp")]:
        discard(place)  # a kill left it
    scratch = run_dir / f".checkpoint-{step}.tmp"
    try:
        # Saved again at a step, the tensors are the same: an evaluation may have come between.
        target = folder if folder.exists() else scratch
        save_adapter(target / ADAPTER_FILE, **adapter)
        _write(content, target / STATE_FILE)
        if target == scratch:
            os.replace(scratch, folder)
            sync(run_dir)
    except OSError as error:
        found = checkpoints(run_dir)
        go_on = f"; then --resume goes on from {found[-1]}" if found else ""
        raise type(error)(f"{error}{go_on}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The resume state in a checkpoint's folder, as given to `save_checkpoint`, with `step`.

    Raises:
        AdapterError: absent, damaged, or of another step than the folder's.
    """
    with _telling_damage(folder):
        state, step = _read(folder / STATE_FILE), _step(folder)
        if not isinstance(state, dict) or state.get("step") != step:
            raise AdapterError(f"{folder / STATE_FILE}: expected the state of step {step}")
        if not all(type(v) is float for k in ("best", "figure") for v in state[k] or ()):
            raise ValueError("figures that are no numbers")
    return state


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rank: int = 0,
) -> dict[str, Any]:
    """Puts back what a checkpoint holds: adapter, optimizer, gradient scaler, random state.

    Args:
        folder: of the checkpoint.
        model, optimizer, scaler: of the run.
        rank: which of the processes whose random states are kept; one beyond them keeps its own.

    Returns:
        As `read_checkpoint`.

    Raises:
        AdapterError: it is damaged, or the model is another one.
    """
    state = read_checkpoint(folder)
    with _telling_damage(folder):
        content = read_adapter(folder)
    check_base(content, model, folder)
    load_lora_state_dict(model, content["lora"])
    with _telling_damage(folder):
        optimizer.load_state_dict(state["optimizer"])
        for parameter, own in optimizer.state.items():
            if not own["exp_avg"].shape == own["exp_avg_sq"].shape == parameter.shape:
                raise ValueError("an optimizer of other shapes")
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())  # empty but of fp16
        states = state["rng"] if isinstance(state["rng"], list) else [state["rng"]]
        if rank < len(states):
            restore_rng(states[rank])
    return state


@contextmanager
def _telling_damage(folder: Path) -> Iterator[None]:
    """Has an error in reading a checkpoint say what to do about it."""
    try:
        yield
    except (AdapterError, *NOT_A_STATE) as error:
        older = [f.name for f in checkpoints(folder.parent) if _step(f) < _step(folder)]
        remedy = f"remove that folder to go on from {older[-1]}" if older else "drop --resume"
        text = f"--resume: expected a complete checkpoint in {folder}, found a damaged one"
        raise AdapterError(f"{text} ({error}); {remedy}") from error


def check_folder(folder: Path, resume: bool) -> None:
    """Refuses a run's folder whose files would be moved or replaced and are not a run's.

    Args:
        folder: of the run, there or not.
        resume: whether it must hold checkpoints.

    Raises:
        FileExistsError: it is a file, or holds other files.
        FileNotFoundError: there is no checkpoint to resume from.
        PermissionError: it cannot be written, or an earlier run there cannot be moved.
    """
    files = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    # Nor a link to nothing, nor a device, which would be renamed.
    is_other = os.path.lexists(folder) and not folder.is_dir()
    found = "a file" if is_other else f"other files ({', '.join(sorted(files)[:3])})"
    if is_other or (set(files) - {".gitkeep"} and not is_run(folder)):
        raise FileExistsError(
            f"output_dir: expected a new folder or an earlier run, found {found} at {folder}; name "
            "another with --output_dir"
        )
    if resume and not checkpoints(folder):
        raise FileNotFoundError(
            f"--resume: expected checkpoint-<step>/ in {folder}, found none; name the run's folder "
            "with --output_dir, or drop it to begin anew"
        )
    check_writable(folder, "--output_dir")
    if is_run(folder) and not resume:
        check_writable(folder.absolute().parent, "--output_dir")


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    """A checkpoint's step."""
    return int(folder.name.split("-")[1])


def remove_old_checkpoints(run_dir: Path, limit: int) -> list[Path]:
    """Keeps the newest checkpoint and the best `limit` of all; removes the others.

    Args:
        run_dir: the run's folder.
        limit: number of best ones to keep, >= 1, by the list `figure` in their state, higher is
            better; one without a figure ranks last.

    Returns:
        The removed folders.
    """
    found = checkpoints(run_dir)
    best = sorted(found, key=lambda folder: (_figure(folder), _step(folder)), reverse=True)[:limit]
    removed = [folder for folder in found if folder not in best and folder != found[-1]]
    for folder in removed:
        remove(folder)
    return removed


def _figure(folder: Path) -> list[float]:
    """A checkpoint's figure; empty, which ranks last, where it has none or is damaged."""
    try:
        # Mapped, the optimizer's tensors are not read.
        return _read(folder / STATE_FILE, mmap=True)["figure"] or []
    except (AdapterError, *NOT_A_STATE):
        return []


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training run, which may be set aside, replaced or continued."""
    return (folder / "train.log").is_file()


def rng_state() -> dict[str, Any]:
    """States of this process's generators, which dropout and point sampling draw from."""
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == 1:
        torch.cuda.set_rng_state(state["cuda"][0])


def _write(content: dict[str, Any], path: Path) -> None:
    """Writes a file, whole or not at all, and on the disk."""
    # Into memory first: torch tells of a full disk as a bug of its own.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, lambda place: place.write_bytes(buffer.getbuffer()), durable=True)


def _read(path: Path, mmap: bool = False) -> Any:
    """torch.load without code execution; AdapterError says what the file is instead."""
    if not path.is_file():
        inside = path.parent / "best_model" / ADAPTER_FILE
        hint = f"did you mean {inside}?" if inside.is_file() else "name another"
        if (path.parent / "adapter_config.json").is_file():
            hint = f"{path.parent} is PEFT's: {IMPORT}"
        raise AdapterError(f"expected an adapter file, found nothing at {path}; {hint}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # any bytes may be in the file; torch raises as many kinds
        raise AdapterError(
            f"{path}: expected a file written by train_sam3_lora.py, found one that cannot be "
            f"read safely (another kind, damaged, or with code in it); name a {ADAPTER_FILE}"
        ) from error
