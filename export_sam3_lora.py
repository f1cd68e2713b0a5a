r"""Hands an adapter on: to PEFT, merged into its base, or from others into this project's file.

    python export_sam3_lora.py peft --output_dir outputs/peft \
        --lora_weights outputs/sam3_lora/best_model --license cc-by-4.0
    python export_sam3_lora.py merge --output_dir outputs/merged \
        --lora_weights outputs/sam3_lora/best_model
    python export_sam3_lora.py import --output a.pt --source outputs/peft

Writes:
    peft     PEFT's adapter_model.safetensors and adapter_config.json; README.md
    merge    a Sam3Model, or with --video a Sam3VideoModel, with its processor,
             by save_pretrained; README.md
    import   an adapter file of this project, from PEFT's folder, from one of
             ours, or from a .pt file with the layer names of Meta's own code
README.md is a model card. What is in the way is renamed, or with --overwrite replaced.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import sam3_lora.startup  # noqa: F401  # isort: skip

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from lora_layers import AdapterError, apply_lora, load_lora_state_dict, remove_lora
from sam3_lora import card, checkpoint
from sam3_lora.config import ConfigError, setup_logging, user_errors
from sam3_lora.evaluation import validation_figures
from sam3_lora.exchange import PEFT_CONFIG, fit, portable_name, read_source, write_peft
from sam3_lora.files import check_writable, set_aside
from sam3_lora.flags import FlagParser
from sam3_lora.model import (
    HUB_ID,
    PUBLISHED,
    ModelError,
    load_model,
    load_video_model,
    mark_merged,
    save_model,
)

log = logging.getLogger("export")

CARD = "README.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Characters of a server's answer in a message.
MAX_REASON = 200


class HubError(ValueError):
    """An upload that cannot be done, or that failed; the message says what to do by hand."""


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """The command line, one subcommand a direction."""
    parser = FlagParser(__doc__)
    shown = {"dest": "command", "metavar": "COMMAND", "help": "its --help lists its flags"}
    commands = parser.add_subparsers(title="commands", required=True, **shown)
    for name, purpose, add_flags in (
        ("peft", "write an adapter as stock PEFT reads it", add_folder_flags),
        ("merge", "write the base with an adapter inside", partial(add_folder_flags, merge=True)),
        ("import", "write an adapter of PEFT, or with Meta's names, as ours", add_import_flags),
    ):
        command = commands.add_parser(name, help=purpose, description=f"To {purpose}.")
        add = add_flags(command)
        add("--overwrite", action="store_true", help="replace what is there, else it is renamed")
        add("--push_to_hub", metavar="USER/NAME", help="upload to this model repository")
        add("--private", action="store_true", help="make a new repository private")
    return parser


def add_folder_flags(parser: FlagParser, merge: bool = False) -> Callable[..., Any]:
    """The flags of `peft` and `merge`; returns what adds more to those of what is written."""
    add = parser.add_argument_group("what to export").add_argument
    add("--lora_weights", type=Path, required=True, metavar="PATH",
        help="adapter: a file, or the folder that holds it")
    purpose = "to merge into" if merge else "to name in config and card"
    add("--model_name", metavar="NAME", help=f"base {purpose} (default: the adapter's own)")
    if merge:
        add("--dtype", choices=DTYPES, default="fp32", help="of the weights; the sum is fp32")
        add("--video", action="store_true",
            help="the whole Sam3VideoModel of a base that has a tracker")
    add = parser.add_argument_group("what to write").add_argument
    add("--output_dir", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--license", metavar="ID", help="licence of adapter and data, for the card")
    add("--metrics", type=Path, metavar="FILE", help="evaluation's metrics.json, for the card")
    add("--stock_metrics", type=Path, metavar="FILE",
        help="metrics.json of the same split by --model_geometry_cls hf: what stock calls give")
    return add


def add_import_flags(parser: FlagParser) -> Callable[..., Any]:
    """The flags of `import`; returns what adds more to those of what is written."""
    add = parser.add_argument_group("what to import").add_argument
    add("--source", type=Path, required=True, metavar="PATH", help="PEFT's folder, or a .pt file")
    add("--model_name", metavar="NAME",
        help=f"base to hold it against (default: the source's own, else {PUBLISHED})")
    add("--alpha", type=float, help="LoRA's alpha, which Meta-named files do not hold")
    add("--geometry_cls", choices=("meta", "hf"),
        help="how it was trained (default: as the source says; meta with Meta's names, hf of PEFT)")
    add = parser.add_argument_group("what to write").add_argument
    add("--output", type=Path, required=True, metavar="FILE", help=".pt file to write")
    return add
# fmt: on


def check_output(output: Path, overwrite: bool, inputs: list[Path]) -> Path:
    """The absolute path to write to.

    Raises:
        ConfigError: what is there is in use, or with `overwrite` is no earlier export.
    """
    place = Path(os.path.abspath(output))
    check_writable(place.parent, "--output_dir")
    used = [path.resolve() for path in (Path(), *inputs) if path.exists()]
    is_other = os.path.lexists(place) and not (place.is_dir() or place.is_file())
    if is_other or any(path.is_relative_to(place.resolve()) for path in used):
        found = "is a device or a broken link" if is_other else "holds files in use"
        raise ConfigError(f"--output_dir: {output} {found}, and is not renamed; name another place")
    names = {path.name for path in place.iterdir()} if place.is_dir() else set()
    is_export = CARD in names and names & {PEFT_CONFIG, "config.json"}
    if overwrite and (names or place.is_file()) and not is_export:
        found = "found other files; name another place, or leave it out to have them renamed"
        raise ConfigError(f"--overwrite: expected an earlier export in {output}, {found}")
    return place


def make_way(place: Path, overwrite: bool) -> None:
    """Removes an earlier export, or renames it."""
    if overwrite and place.is_dir():
        shutil.rmtree(place)
    elif not overwrite and (moved := set_aside(place)):
        log.warning("%s was there: renamed to %s", place, moved)


def write_folder(place: Path, overwrite: bool, fill: Callable[[Path], None]) -> None:
    """Has `fill` write into a folder beside the target that takes its place when it is whole."""
    scratch = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        fill(scratch)
        make_way(place, overwrite)
        shutil.rmtree(place, ignore_errors=True)  # empty, or with a .gitkeep
        os.replace(scratch, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def export_peft(args: argparse.Namespace) -> Path:
    """Writes the adapter for PEFT, with its card."""
    place = check_output(args.output_dir, args.overwrite, [args.lora_weights])
    content = checkpoint.read_adapter(args.lora_weights)
    base = portable_name(args.model_name or content["base_model"])
    text = build_card(args, content, base)

    def fill(folder: Path) -> None:
        write_peft(folder, content, base)
        (folder / CARD).write_text(text, encoding="utf-8")

    write_folder(place, args.overwrite, fill)
    return place


def merge(args: argparse.Namespace) -> Path:
    """Writes the base with the adapter inside, with its card."""
    content = checkpoint.read_adapter(args.lora_weights)
    name = args.model_name or content["base_model"]
    place = check_output(args.output_dir, args.overwrite, [args.lora_weights, Path(name)])
    text = build_card(args, content, portable_name(name))
    model = load_video_model(name) if args.video else load_model(name)[0]
    detector = model.detector_model if args.video else model
    checkpoint.load_adapter(args.lora_weights, detector, content)
    remove_lora(detector, keep_update=True)
    config = model.config.detector_config if args.video else model.config
    mark_merged(config, checkpoint.adapter_fingerprint(content))

    def fill(folder: Path) -> None:
        if not save_model(model, name, folder, DTYPES[args.dtype]):
            log.warning("%s has no processor: its tokenizer alone is written", name)
        (folder / CARD).write_text(text, encoding="utf-8")

    write_folder(place, args.overwrite, fill)
    return place


def import_adapter(args: argparse.Namespace) -> Path:
    """Writes an adapter of another format as ours, once all of it fits the base."""
    is_other = os.path.lexists(args.output) and not args.output.is_file()
    if args.output.suffix != ".pt" or is_other:
        raise ConfigError(f"--output: expected a file name that ends in .pt, found {args.output}")
    place = Path(os.path.abspath(args.output))
    check_writable(place.parent, "--output")
    foreign = read_source(args.source, args.alpha)
    told = dict(foreign.description)
    own_base = told.pop("base_model", None)
    name = args.model_name or own_base or PUBLISHED
    model, _ = load_model(name)
    if known := told.pop("base_fingerprint", None):
        described = {"base_fingerprint": known, "base_model": own_base}
        checkpoint.check_base(described, model, args.source)
    elif own_base and own_base != name:
        log.warning(
            "%s names %s as its base: that %s is it was not checked", args.source, own_base, name
        )
    lora, state = fit(foreign, model, args.source)
    apply_lora(model, lora)
    load_lora_state_dict(model, state)
    told = {"categories": {}, "step": 0, "metrics": {}, **told, "base_model": name}
    told["geometry_cls"] = args.geometry_cls or told["geometry_cls"]
    make_way(place, args.overwrite)
    checkpoint.save_adapter(place, model, lora, **told)
    return place


def build_card(args: argparse.Namespace, content: Mapping[str, Any], base: str) -> str:
    """The model card of what `peft` or `merge` writes."""
    name, output = args.model_name or content["base_model"], args.output_dir
    folder = output.name if output.is_absolute() else output.as_posix()
    return card.build_card(
        content,
        card_figures(args, content),
        base,
        args.push_to_hub or folder,
        is_local=Path(name).is_dir() or name != base or not HUB_ID.fullmatch(base),
        merged_dtype=args.dtype if args.command == "merge" else None,
        video=args.command == "merge" and args.video,
        license_id=args.license,
    )


def card_figures(
    args: argparse.Namespace, content: Mapping[str, Any]
) -> dict[str, dict[str, float | None]]:
    """Columns of figures for a card: of the evaluations that the flags name, else of the training
    run's validation."""
    if args.stock_metrics and not args.metrics:
        raise ConfigError("--stock_metrics: expected --metrics of the same split too; give both")
    if not args.metrics:
        return {f"validation, step {content.get('step', 0)}": content.get("metrics", {})}
    token = content.get("geometry_cls", "meta")
    split, figures = read_metrics("--metrics", args.metrics, content, token)
    columns = {f"as trained, {Path(split).name}": figures}
    if args.stock_metrics:
        other, figures = read_metrics("--stock_metrics", args.stock_metrics, content, "hf")
        columns[f"stock text-only call, {Path(split).name}"] = figures
        if other != split:
            raise ConfigError(
                "--metrics, --stock_metrics: expected evaluations of one split, found those of "
                f"{split} and {other}; evaluate both on the same"
            )
    return columns


def read_metrics(
    flag: str, path: Path, content: Mapping[str, Any], geometry_cls: str
) -> tuple[str, dict[str, Any]]:
    """The split's folder, with how it was asked and searched where that is not as ever, and the
    figures of an evaluation's metrics.json; ConfigError unless it is one of this adapter, with this
    `geometry_cls`."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        found = metrics["adapter"], metrics["geometry_cls"]
        split, asked = str(metrics["data"]), metrics.get("prompt_with", "text")
        split += f", asked with {asked}" if asked in ("box", "both") else ""
        split += f", tiles of {metrics['tile']:g}" if metrics.get("tile") else ""
        figures = validation_figures(metrics)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{flag}: expected metrics.json of evaluate_sam3_lora.py, found "
            f"{'another file' if path.is_file() else 'none'}: {path}; evaluate and name the file"
        ) from error
    if found != (checkpoint.adapter_fingerprint(content), geometry_cls):
        raise ConfigError(
            f"{flag}: expected an evaluation of this adapter with geometry_cls {geometry_cls}, "
            f"found one of {metrics['model']} with {found[1]} in {path}; evaluate it so"
        )
    return split, figures


def push(place: Path, repo_id: str, private: bool) -> str:
    """Uploads a file, or all of a folder, to a model repository of the hub.

    Args:
        place: what to upload.
        repo_id: `user/name`; made where there is none.
        private: whether one that is made is private.

    Returns:
        The repository's address.

    Raises:
        HubError: refused, offline, or without a token; what is on disk is as it was.
    """
    folder, files = (place, None) if place.is_dir() else (place.parent, [place.name])
    try:
        api = HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files)
    except Exception as error:  # the client's, the connection's, a token's: of many modules
        reason = " ".join(str(error).split())[:MAX_REASON].rstrip(". ") or type(error).__name__
        raise HubError(
            f"--push_to_hub: {place} is written, but not uploaded to {repo_id}: {reason}; run "
            f"`hf auth login`, then `hf upload {repo_id} {place}`"
        ) from error
    return str(address)


def check_hub(args: argparse.Namespace) -> None:
    """Raises before any work where a repository cannot have the name of --push_to_hub."""
    if args.private and not args.push_to_hub:
        raise ConfigError("--private: expected --push_to_hub USER/NAME with it, found none")
    try:
        if args.push_to_hub:
            validate_repo_id(args.push_to_hub)
    except ValueError as error:
        raise ConfigError(f"--push_to_hub: expected USER/NAME, found {error}") from error


@user_errors(ConfigError, AdapterError, ModelError, HubError)
def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code."""
    args = build_parser().parse_args(argv)
    setup_logging(None)
    check_hub(args)
    commands = {"peft": export_peft, "merge": merge, "import": import_adapter}
    place = commands[args.command](args)
    sys.stdout.write(f"{place}\n")
    if args.push_to_hub:
        sys.stdout.write(f"{push(place, args.push_to_hub, args.private)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
