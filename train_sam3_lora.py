"""Fine-tunes SAM 3 with LoRA on a COCO data set (see data/README.md for the layout).

    python train_sam3_lora.py --config configs/base_config.yaml
    python train_sam3_lora.py --config configs/base_config.yaml --lora_rank 16
    python train_sam3_lora.py --config configs/base_config.yaml --check
    python train_sam3_lora.py --config configs/base_config.yaml --resume

Every flag is a key of --config's YAML file, and overrides it; all have a default. Ctrl-C and
SIGTERM end a run after its step, with a checkpoint and the command to go on with (exit code 130 and
143). torchrun --nproc_per_node N train_sam3_lora.py ... trains in N processes: a step has
batch_size x gradient_accumulation_steps images for each, and a resumed run keeps their number.

Writes to output_dir:
    best_model/lora_weights.pt  the adapter with the best validation figure
    last_model/lora_weights.pt  the adapter as the run ended
    checkpoint-<step>/          adapter, optimizer, random state, for --resume
    config.yaml, train.log      also run.lock, held while the run is alive
    log.jsonl, metrics.csv      the figures of steps and validations
    curves.png                  the same, drawn anew at each validation
    val_panel.png               annotations and detections, on 4 images at most
    events.out.tfevents.*, wandb/   the figures, by --tensorboard and --wandb
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import sam3_lora.startup  # noqa: F401  # isort: skip

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lora_layers import AdapterError, apply_lora, count_parameters, lora_table
from sam3_lora import checkpoint, engine, memory, preflight, processes, runlog
from sam3_lora.coco import CocoSplit, DatasetError, read_splits
from sam3_lora.config import (
    Config,
    ConfigError,
    check_same_settings,
    check_stopping,
    check_trainable,
    config_from_args,
    load_saved,
    lora_config,
    plain_config,
    save_config,
    setup_logging,
    user_errors,
)
from sam3_lora.dataset import PromptDataset
from sam3_lora.evaluation import describe, evaluate_split, rank, validation_figures
from sam3_lora.features import FeatureCache, FeatureError, cacheable_parts
from sam3_lora.files import claim
from sam3_lora.flags import FlagParser, add_config_flags
from sam3_lora.forward import Forward
from sam3_lora.loader import LoaderError, Plan, build_loader, epoch_batches, rest_of_epoch
from sam3_lora.losses import compute_losses, count_targets
from sam3_lora.model import (
    ModelError,
    cast_towers,
    choose_device,
    compute_dtype,
    image_size,
    load_meta_model,
    load_model,
    num_queries,
    train_adapted,
)
from sam3_lora.notices import find_notices
from sam3_lora.options import MOST_USED, OutputSection, TrainingSection
from sam3_lora.overview import detections_panel

log = logging.getLogger("train")

# What comes up between two steps, so that the run can be saved as it stands.
BETWEEN_STEPS = (DatasetError, FeatureError, LoaderError)
# What a user can cause, beside what `user_errors` knows.
ERRORS = (*BETWEEN_STEPS, AdapterError, ModelError, runlog.RunLogError)
ERRORS += (engine.LossError, engine.TooLargeError)
# Keys of the training section that `PromptDataset` takes as they are.
OF_DATASET = ("prompts_per_image", "out_of_domain_prompts", "augment", "flip_probability")
OF_DATASET += ("box_prompt_probability", "box_prompt_text_probability", "over_queries", "seed")
OF_DATASET += ("box_prompt_negative_probability",)


@dataclass
class Run:
    """What the loop reads and writes: one run's parts and where it stands."""

    config: Config
    folder: Path
    forward: Forward
    criterion: engine.Criterion
    train_set: PromptDataset
    val_set: PromptDataset | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    limits: engine.Limits
    plan: Plan
    at: runlog.Progress
    skips: engine.Skips
    cache: FeatureCache | None = None
    runlog: runlog.RunLog | None = None  # open from `open_folder` on, in the main process
    signals: processes.SignalWatch = field(default_factory=processes.SignalWatch)


def build_parser() -> argparse.ArgumentParser:
    """The command line: one flag for each key of the configuration."""
    parser = FlagParser(__doc__, usage="%(prog)s [--config FILE] [--KEY VALUE ...]")
    add_config_flags(parser, first=MOST_USED)
    return parser


def build_datasets(
    config: Config, model: torch.nn.Module, splits: tuple[CocoSplit, CocoSplit | None]
) -> tuple[PromptDataset, PromptDataset | None]:
    """Training and validation sets for the model's canvas."""
    training, canvas = config.training, (image_size(model), num_queries(model))
    cached = training.cache_features != "off"
    moves = training.augment or training.flip_probability > 0
    train_set = PromptDataset(
        splits[0],
        *canvas,
        train=True,
        prompt_pool=training.prompt_pool or (training.prompts_per_image if cached else None),
        views=(training.cache_views if moves else 1) if cached else None,
        **{name: getattr(training, name) for name in OF_DATASET},
    )
    val_set = PromptDataset(splits[1], *canvas, train=False) if splits[1] else None
    check_trainable(config, train_set.has_masks())
    return train_set, val_set


def build_run(config: Config, splits: tuple[CocoSplit, CocoSplit | None]) -> Run:
    """Loads the model, adapts it, and makes all that the loop needs; writes nothing."""
    device = choose_device(config.hardware.device)
    training = config.training
    model, tokenizer = load_model(config.model.name)
    train_set, val_set = build_datasets(config, model, splits)
    checkpoint.adapt(model, lora_config(config), training.init_lora_weights)
    dtype = compute_dtype(config.hardware.mixed_precision, device)
    cast_towers(model, dtype)
    model.to(device)
    forward = build_forward(config, model, tokenizer, dtype, train_set.has_masks())
    asked = [text for split in (train_set, val_set) if split for text in split.all_texts()]
    forward.release_text_encoder(asked)
    cache = None
    if training.cache_features != "off":
        folder = training.cache_dir if training.cache_features == "disk" else None
        cache = FeatureCache(forward, train_set, folder, training.cache_limit_gb)
    loss = partial(compute_losses, pos_weight=training.pos_weight, mask_loss=training.mask_loss)
    # What it says of an earlier run in the folder held once.
    once = replace(config.output, overwrite=False, resume=False)
    return Run(
        config=replace(config, output=once),
        folder=config.output.output_dir,
        forward=forward,
        criterion=loss,
        train_set=train_set,
        val_set=val_set,
        optimizer=engine.build_optimizer(model, training.learning_rate, training.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        cache=cache,
        limits=engine.Limits(training.batch_size, config.hardware.max_rows_per_forward),
        plan=build_plan(training, len(train_set)),
        at=runlog.Progress(patience=training.early_stopping_patience),
        skips=engine.Skips(training.non_finite == "skip"),
    )


def build_plan(training: TrainingSection, images: int) -> Plan:
    """How many steps a run on so many images has."""
    per_step = training.batch_size * training.gradient_accumulation_steps * processes.count()
    length = training.num_epochs, training.max_steps, training.warmup_steps
    return Plan(images, per_step, *length)


def build_forward(
    config: Config, model: torch.nn.Module, tokenizer: Any, dtype: torch.dtype, masks: bool = True
) -> Forward:
    """The model's forward with this run's settings, `auto` checkpointing as the GPU needs it."""
    forward = Forward(
        model,
        tokenizer,
        config.model.geometry_cls,
        dtype,
        one_to_many=config.training.one_to_many,
        masks=masks,
        compiled=config.hardware.use_compile,
    )
    asked, settings = config.hardware.gradient_checkpointing, memory_settings(config, forward)
    chosen = memory.resolve_checkpointing(asked, forward, **settings)
    return replace(forward, checkpointing=chosen)


def memory_settings(config: Config, forward: Forward) -> dict[str, Any]:
    """The arguments of `memory.predict` for this configuration."""
    training, boxes = config.training, config.training.box_prompt_probability > 0
    cached = training.cache_features != "off" and cacheable_parts(forward, boxes)
    return {
        "images": training.batch_size,
        "prompts": training.prompts_per_image,
        "max_rows": config.hardware.max_rows_per_forward,
        "mask_loss": training.mask_loss,
        "cached": cached[-1] if cached else (),
    }


def describe_dry_run(config: Config) -> str:
    """What a run would train and the GPU memory it would take; needs no weights, data or GPU."""
    check_trainable(config, has_masks=True)
    device, precision = choose_device(config.hardware.device), config.hardware.mixed_precision
    precision = "bf16" if (precision, device.type) == ("auto", "cpu") else precision
    model, stands_in = load_meta_model(config.model.name)
    apply_lora(model, lora_config(config))
    log.info("tracing training steps of %s, without weights or data", config.model.name)
    forward = build_forward(config, model, None, compute_dtype(precision, device))
    return memory.dry_run_text(forward, stands_in=stands_in, **memory_settings(config, forward))


def open_folder(run: Run, output: OutputSection) -> None:
    """Makes the run's folder; an earlier run is set aside, replaced or (--resume) continued."""
    if output.resume:
        resume(run)
    processes.align(p for p in run.forward.model.parameters() if p.requires_grad)
    processes.wait()
    if not processes.is_main():
        return
    moved = claim(run.folder, output.overwrite, output.resume)
    setup_logging(run.folder / "train.log")
    save_config(run.config, run.folder / "config.yaml")
    forward = run.forward
    trainable, base = count_parameters(forward.model)
    place = f"{forward.device}, {forward.dtype}, checkpointing {forward.checkpointing}"
    share = f"{trainable:,} trainable of {base:,} ({100 * trainable / base:.3f} %)"
    log.info("%s, %s: %s", runlog.environment(Path(__file__)), place, share)
    if moved:
        log.warning("%s held an earlier run: renamed to %s", run.folder, moved)
    describe_run(run)
    run.runlog = runlog.RunLog(
        run.folder,
        run.at.step,
        evaluated=run.at.evaluated == run.at.step,
        logged=not run.at.records,
        tensorboard=output.tensorboard,
        wandb=output.wandb,
        settings=plain_config(run.config),
    )


def to_training(run: Run) -> None:
    """Train mode; a backbone whose features come from the cache leaves the GPU (0.9 GB in bf16)."""
    train_adapted(run.forward.model)
    if run.cache:
        run.forward.model.vision_encoder.backbone.to("cpu")


def describe_run(run: Run) -> None:
    """Logs what is trained, on what, and what the data does not allow."""
    log.info("adapters:\n%s", lora_table(run.forward.model))
    split = run.train_set.split
    items = f"{len(run.train_set)} images or tiles, {len(split.categories)} categories"
    log.info("%s, %s%s", items, run.plan, f", from {run.cache}" if run.cache else "")
    if run.val_set:
        times = run.plan.evaluations(run.config.training.eval_steps)
        log.info("validation: %d images, %d times", len(run.val_set), times)
    if run.forward.compiled:
        log.info("compiling: minutes at the first step, and at each new size of a batch")
    val = run.val_set.split if run.val_set else None
    has = {"masks": run.forward.masks, "validation": val is not None, "val": val}
    for words in find_notices(run.config, split, run.plan, **has):
        log.warning("%s", words)


def resume(run: Run) -> None:
    """Goes on from the newest checkpoint: adapter, optimizer, random state, best figure."""
    check_same_settings(run.config, load_saved(run.folder / "config.yaml"))
    newest = checkpoint.checkpoints(run.folder)[-1]
    parts = run.forward.model, run.optimizer, run.scaler
    state = checkpoint.restore(newest, *parts, rank=processes.rank())
    run.at.resume(state)
    run.plan.resume(state)
    run.skips.in_a_row, run.skips.total = state.get("skips", (0, 0))
    total = run.plan.total_steps
    log.info("resuming %s at step %d of %d%s", newest, run.at.step, total, run.at.ending(total))


def evaluate_now(run: Run) -> None:
    """Evaluates on the validation split, once a step, and keeps the adapter if it is the best."""
    if run.val_set is None or run.at.evaluated == run.at.step:
        return
    config = run.config
    forward = replace(run.forward, one_to_many=False, masks=run.val_set.has_masks())
    forward.model.eval()
    forward.model.vision_encoder.backbone.to(forward.device)
    batches = epoch_batches(len(run.val_set), 1, 0, 0, shuffle=False)
    loader = build_loader(run.val_set, processes.share(batches), config.hardware.num_workers)
    summary, results = evaluate_split(
        forward,
        run.criterion,
        count_targets,
        run.signals.between(loader, len(batches)),
        run.val_set.split,
        max_rows=run.limits.rows,
        max_detections=config.evaluation.max_detections,
        score_threshold=config.evaluation.score_threshold,
    )
    figures = validation_figures(summary)
    better = run.at.judge(figures, rank(figures, config.evaluation.best_metric))
    log.info("step %d, validation: %s", run.at.step, describe(figures))
    if run.runlog:
        run.runlog.add_row({"step": run.at.step, "val": run.at.val})
        if better:
            save_model(run, "best_model")
        panel = detections_panel(run.val_set.split, results, config.evaluation.score_threshold)
        run.runlog.show(run.at.step, panel)
    to_training(run)


def adapter_description(run: Run) -> dict[str, Any]:
    """Arguments of `save_adapter`: the adapter with all that re-creates it."""
    split = run.train_set.split
    return {
        "model": run.forward.model,
        "lora": lora_config(run.config),
        "base_model": run.config.model.name,
        "geometry_cls": run.config.model.geometry_cls,
        "categories": {name: split.phrase(c) for c, name in split.categories.items()},
        "step": run.at.step,
        "metrics": dict(run.at.val),
    }


def save_model(run: Run, name: str) -> None:
    """Writes the adapter and the configuration to a folder of the run."""
    folder = run.folder / name
    checkpoint.save_adapter(folder / checkpoint.ADAPTER_FILE, **adapter_description(run))
    save_config(run.config, folder / "config.yaml")


def save_now(run: Run) -> None:
    """Writes a checkpoint and removes those beyond the limit."""
    state = {
        **run.at.state(),
        **run.plan.state(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "skips": (run.skips.in_a_row, run.skips.total),
        "rng": processes.gather(checkpoint.rng_state()),
    }
    if not run.runlog:
        return
    checkpoint.save_checkpoint(run.folder, run.at.step, state, adapter_description(run))
    checkpoint.remove_old_checkpoints(run.folder, run.config.training.save_total_limit)
    if run.val_set is None:
        save_model(run, "best_model")
        run.runlog.show(run.at.step)


def step_records(run: Run) -> tuple[Iterator[dict[str, Any]], int]:
    """The rest of an epoch as `engine.train_one_epoch` takes it, and its number of steps."""
    training, hardware = run.config.training, run.config.hardware
    pin = run.forward.device.type == "cuda"
    order = run.at.step, training.batch_size, training.seed
    length = run.plan.total_steps, run.plan.warmup_steps
    loader, sizes = rest_of_epoch(run.train_set, run.plan, *order, hardware.num_workers, pin)
    records = engine.train_one_epoch(
        run.forward,
        run.criterion,
        count_targets,
        run.cache.filled(loader) if run.cache else loader,
        run.optimizer,
        lambda step: engine.lr_factor(training.lr_schedule, step, *length),
        run.limits,
        step=run.at.step,
        sizes=sizes,
        max_grad_norm=training.max_grad_norm,
        scaler=run.scaler,
        skips=run.skips,
    )
    return records, len(sizes)


def train_epoch(run: Run, epoch: int) -> None:
    """One epoch from where the run stands: steps, log lines, evaluations and checkpoints."""
    records, steps = step_records(run)
    to_training(run)
    label = f"epoch {epoch + 1}/{run.plan.epochs}"
    with tqdm(records, label, steps, disable=not processes.shows_progress()) as bar:
        for record in bar:
            run.at.step = record["step"]
            run.at.records.append(record)
            if run.plan.is_due(run.at.step, run.config.output.logging_steps):
                bar.set_postfix_str(log_steps(run, epoch))
            end_step(run)
            if run.at.stopped:
                break
            run.signals.check()


def log_steps(run: Run, epoch: int) -> str:
    """Logs the means of the steps since the last line; returns them for eyes."""
    row = runlog.mean_record(run.at.records, run.forward.device)
    run.at.records = []
    text = runlog.progress_text(row, run.at.seconds_left(run.plan.total_steps))
    if run.runlog:
        run.runlog.add_row({**row, "epoch": epoch + 1})
        log.info("step %d/%d: %s", run.at.step, run.plan.total_steps, text)
    return text


def end_step(run: Run) -> None:
    """What is due after a step: an evaluation, a checkpoint."""
    training = run.config.training
    if run.plan.evaluates(run.at.step, training.eval_steps):
        evaluate_now(run)
    due = run.plan.ends_epoch(run.at.step) or run.at.step % training.save_steps == 0
    if due or run.at.stopped:
        save_now(run)


def train(run: Run) -> None:
    """All epochs."""
    run.at.begin()
    if run.at.step:
        end_step(run)  # a checkpoint may have come before an evaluation of its step
    while run.at.step < run.plan.total_steps and not run.at.stopped:
        train_epoch(run, run.at.step // run.plan.steps_per_epoch)
    if run.at.records:
        log_steps(run, (run.at.step - 1) // run.plan.steps_per_epoch)


def train_or_save(run: Run) -> None:
    """Trains; a run that a signal or the data ends is saved as it stands, and says how to go on."""
    with processes.watch() as run.signals:
        try:
            train(run)
        except (processes.Stopped, *BETWEEN_STEPS) as error:
            # A process that is alone with its error cannot save: the others know nothing of it.
            if run.at.step and (isinstance(error, processes.Stopped) or processes.count() == 1):
                save_now(run)
            if checkpoint.checkpoints(run.folder):
                command = processes.resume_command(__file__, run.folder / "config.yaml")
                log.warning("stopped at step %d; to go on: %s", run.at.step, command)
            raise
        finally:
            if run.runlog:
                run.runlog.close()


@user_errors(*ERRORS)
def main(argv: list[str] | None = None) -> int:
    """Trains as the configuration and the flags say."""
    args = build_parser().parse_args(argv)
    setup_logging(None)
    config = config_from_args(args)
    if config.output.check:
        parts = preflight.Parts(build_datasets, build_plan, build_forward, memory_settings)
        report = preflight.Report((ConfigError, OSError, *ERRORS), partial(print, flush=True))
        return preflight.check(report, config, parts) if processes.is_main() else 0
    if config.output.dry_run:
        print(describe_dry_run(config))
        return 0
    with processes.joined():
        # 1. Packages, folder and data before weights: their faults show in seconds.
        output, data, most = config.output, config.training, config.evaluation.max_val_images
        runlog.check_optional_packages(tensorboard=output.tensorboard, wandb=output.wandb)
        checkpoint.check_folder(output.output_dir, output.resume)
        splits = read_splits(data.train_data_path, data.val_data_path, most)
        check_stopping(config, splits[1] is not None)
        # 2. Model, adapters, optimizer, features; the run's folder stays as it is until all stands.
        engine.seed_everything(data.seed)
        run = build_run(config, splits)
        if processes.rank():  # dropout and sampled points of its own
            engine.seed_everything((data.seed + processes.rank()) % 2**32)
        if run.cache:
            run.cache.fill(run.train_set, config.hardware.num_workers)
        open_folder(run, output)
        # 3. Epochs.
        with logging_redirect_tqdm():
            train_or_save(run)
        if run.runlog:
            save_model(run, "last_model")
            folders = [split.annotations_file.parent for split in splits if split]
            how = config.evaluation.best_metric, config.hardware.device, run.skips.total
            for line in runlog.describe_end(run.at, run.folder / "best_model", folders, *how):
                log.info("%s", line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
