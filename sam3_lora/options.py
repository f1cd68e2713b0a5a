"""The options of every script: one list of keys, in six sections.

A key is a field of a section; its help, range and choices are the field's metadata. config.py reads
their values from YAML and from flags.
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

MAX_SEED = 2**32 - 1  # NumPy's limit
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt")
_OVER_QUERIES = ("cap", "tile", "error")
_CACHES = ("off", "ram", "disk")
_CHECKPOINTING = ("auto", "off", "mlp", "full")
_METRICS = ("ap", "ap50", "cgf1", "iou", "loss")
_DEVICES = r"auto|cpu|mps|cuda(:[0-9]{1,3})?"
# Flags that the training script's help shows first.
MOST_USED = ("train_data_path", "val_data_path", "output_dir", "model_name", "num_epochs")
MOST_USED += ("batch_size", "learning_rate", "lora_rank", "device", "check", "dry_run", "resume")
MOST_USED += ("overwrite",)
_NON_FINITE = ("stop", "skip")
_PRECISIONS = ("auto", "bf16", "fp16", "no")


def _key(default: Any, help_text: str, **limits: Any) -> Any:
    """A field; `limits`: low, high (inclusive), above, below (exclusive), choices, pattern."""
    return field(default=default, metadata={"help": help_text, **limits})


@dataclass(frozen=True)
class ModelSection:
    name: str = _key("facebook/sam3", "base model: a hub id or a local folder")
    geometry_cls: str = _key("meta", "geometry token of text-only prompts", choices=("meta", "hf"))


@dataclass(frozen=True)
class LoraSection:
    rank: int = _key(12, "rank of the update of each adapted layer", low=1)
    alpha: float = _key(24.0, "the update is scaled by alpha / rank", above=0)
    dropout: float = _key(0.0, "dropout on the input of the update", low=0, below=1)
    target_modules: tuple[str, ...] = _key(_ATTENTION, "names of the layers to adapt")
    apply_to_vision_encoder: bool = _key(True, "adapt the image backbone")
    apply_to_text_encoder: bool = _key(False, "adapt the text encoder")
    apply_to_geometry_encoder: bool = _key(False, "adapt the encoder of box prompts")
    apply_to_detr_encoder: bool = _key(True, "adapt the fusion of image and prompt")
    apply_to_detr_decoder: bool = _key(True, "adapt the decoder of the queries")
    apply_to_mask_decoder: bool = _key(False, "adapt the mask head")


@dataclass(frozen=True)
class TrainingSection:
    train_data_path: Path = _key(Path("data/train"), "folder of the training split")
    val_data_path: Path | None = _key(None, "validation split; null: val/ or valid/ beside, if any")
    batch_size: int = _key(4, "images per micro-batch", low=1)
    gradient_accumulation_steps: int = _key(1, "micro-batches per step", low=1)
    num_epochs: int = _key(10, "passes over the training split", low=1)
    max_steps: int | None = _key(None, "steps in all; null: num_epochs decides", low=1)
    learning_rate: float = _key(1e-4, "peak learning rate", above=0, high=1)
    weight_decay: float = _key(0.01, "AdamW weight decay on the adapter", low=0)
    max_grad_norm: float = _key(0.1, "gradients are clipped to this norm", above=0)
    non_finite: str = _key(
        "stop", "a step whose loss or gradient is NaN or infinite", choices=_NON_FINITE
    )
    lr_schedule: str = _key("cosine", "learning rate after the warm-up", choices=_SCHEDULES)
    warmup_steps: int = _key(100, "steps of linear warm-up", low=0)
    seed: int = _key(42, "seed of every random choice", low=0, high=MAX_SEED)
    prompts_per_image: int = _key(8, "most text prompts an image, absent ones included", low=1)
    out_of_domain_prompts: int = _key(1, "words from outside the data set, per image", low=0)
    prompt_pool: int | None = _key(None, "fixed prompts of an image to draw from; null: all", low=1)
    box_prompt_probability: float = _key(
        0.0, "chance that a present prompt comes with a box round one of its objects", low=0, high=1
    )
    box_prompt_text_probability: float = _key(
        0.5, "chance that its text stays; else it is `visual`", low=0, high=1
    )
    box_prompt_negative_probability: float = _key(
        0.25, "chance that it also comes with a box round none of its objects", low=0, high=1
    )
    augment: bool = _key(True, "random resize and placement")
    flip_probability: float = _key(0.0, "chance of a horizontal flip", low=0, high=1)
    mask_loss: str = _key("full", "where masks are compared", choices=("full", "native", "points"))
    one_to_many: bool = _key(True, "also train queries that share an object")
    pos_weight: float = _key(10.0, "weight of matched queries in classification", above=0)
    over_queries: str = _key("cap", "objects beyond the queries", choices=_OVER_QUERIES)
    cache_features: str = _key("off", "where frozen features are kept", choices=_CACHES)
    cache_dir: Path = _key(Path("outputs/feature_cache"), "folder of features kept on disk")
    cache_limit_gb: float = _key(32.0, "most features kept, GB (10^9 bytes)", above=0)
    cache_views: int = _key(1, "placements of an image whose features are kept", low=1)
    init_lora_weights: Path | None = _key(None, "adapter to start from; null: a fresh one")
    eval_steps: int | None = _key(
        None, "steps between two evaluations; null: each epoch ends with one", low=1
    )
    save_steps: int = _key(
        1000, "steps between two checkpoints; each epoch ends with one too", low=1
    )
    save_total_limit: int = _key(3, "best checkpoints kept, beside the newest", low=1)
    early_stopping_patience: int | None = _key(
        None, "evaluations in a row without a new best_model that end a run; null: never", low=1
    )


@dataclass(frozen=True)
class OutputSection:
    output_dir: Path = _key(Path("outputs/sam3_lora"), "folder of the run")
    logging_steps: int = _key(10, "steps between two lines of the log", low=1)
    check: bool = _key(False, "look at all that a run needs, say what is missing, then stop")
    dry_run: bool = _key(False, "say what would be trained and the memory it takes, then stop")
    overwrite: bool = _key(False, "replace an earlier run in output_dir")
    resume: bool = _key(False, "continue the run in output_dir from its last checkpoint")
    tensorboard: bool = _key(False, "also write figures for TensorBoard")
    wandb: bool = _key(False, "also send figures to Weights & Biases")


@dataclass(frozen=True)
class EvaluationSection:
    best_metric: str = _key("ap", "figure that chooses best_model", choices=_METRICS)
    max_val_images: int | None = _key(None, "first images of the evaluated split; null: all", low=1)
    score_threshold: float = _key(
        0.5, "score from which an object counts as found; AP takes all", low=0, high=1
    )
    max_detections: int = _key(100, "most detections an image, over all its prompts", low=1)


@dataclass(frozen=True)
class HardwareSection:
    device: str = _key("auto", "auto, cpu, mps, cuda or cuda:N", pattern=_DEVICES)
    mixed_precision: str = _key("auto", "arithmetic of the forward pass", choices=_PRECISIONS)
    gradient_checkpointing: str = _key(
        "auto", "activations computed again, not kept", choices=_CHECKPOINTING
    )
    use_compile: bool = _key(False, "compile the model: slow to start, then faster on a GPU")
    num_workers: int = _key(2, "processes that load images; 0: none", low=0)
    max_rows_per_forward: int = _key(8, "most image x prompt pairs in one forward", low=1)


@dataclass(frozen=True)
class Config:
    """Every option, resolved. Stops at the scripts: modules take flat arguments."""

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()
    output: OutputSection = OutputSection()
    evaluation: EvaluationSection = EvaluationSection()
    hardware: HardwareSection = HardwareSection()


class Key(NamedTuple):
    """One option: where it lives, what its value may be, its default."""

    section: str
    name: str
    kind: type
    optional: bool
    default: Any
    limits: dict[str, Any]


def _list_keys() -> dict[str, Key]:
    """Every option, by its flag without dashes."""
    keys = {}
    for section, section_class in get_type_hints(Config).items():
        hints = get_type_hints(section_class)
        for item in fields(section_class):
            hint, name = hints[item.name], item.name
            optional = type(None) in get_args(hint)
            kind = get_args(hint)[0] if optional else get_origin(hint) or hint
            flag = f"{section}_{name}" if section in ("lora", "model") else name
            keys[flag] = Key(section, name, kind, optional, item.default, dict(item.metadata))
    return keys


def find_clashes(config: Config) -> list[str]:
    """What is wrong with options that are each sound; empty for most."""
    problems, output = [], config.output
    components = [flag for flag in KEYS if flag.startswith("lora_apply_to_")]
    if not any(getattr(config.lora, KEYS[flag].name) for flag in components):
        problems.append(f"no component is adapted: set one of {', '.join(components)} to true")
    for one, two in (("overwrite", "resume"), ("check", "dry_run")):
        if getattr(output, one) and getattr(output, two):
            problems.append(f"output.{one} and output.{two} are both on: choose one")
    place = Path(os.path.abspath(output.output_dir))
    for name in ("train_data_path", "val_data_path"):
        data = getattr(config.training, name)
        # Data that lies where the scripts are run has outputs/ beside it.
        if data and place.is_relative_to(os.path.abspath(data)) and not _holds_cwd(data):
            problems.append(
                f"output.output_dir: expected a folder outside the data, found {output.output_dir} "
                f"in {name}; name another with --output_dir"
            )
    return problems


def _holds_cwd(folder: Path) -> bool:
    """Whether the working directory is a folder or in it."""
    return Path.cwd().is_relative_to(os.path.abspath(folder))


SECTIONS = tuple(item.name for item in fields(Config))
KEYS = _list_keys()
