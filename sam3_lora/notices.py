"""What a run's data and options mean for it, for warnings: before it starts, and in its log."""

from sam3_lora.coco import CocoSplit
from sam3_lora.loader import Plan
from sam3_lora.options import KEYS, Config
from sam3_lora.tables import NONE_ABSENT

# A training split of fewer images, or a higher learning rate, is worth a word.
FEW_IMAGES, HIGH_LEARNING_RATE = 100, 1e-2


def find_notices(
    config: Config,
    train: CocoSplit,
    plan: Plan,
    *,
    masks: bool,
    validation: bool,
    val: CocoSplit | None = None,
) -> list[str]:
    """What the data does not allow, or makes of the options; for warnings.

    Args:
        config: the resolved configuration.
        train: the training split.
        plan: the run's length.
        masks: whether training compares masks.
        validation: whether there is a validation split.
        val: that split; None where it cannot be read.
    """
    training, count, words = config.training, len(train.images), []
    if not validation:
        words.append("no validation split: the last adapter will be the best_model")
    words += _find_undefined(val) if val else []
    if not any(train.annotations.values()):
        words.append("the training split has no object: every prompt is trained as absent")
    elif not masks:
        words.append("the training split has no masks: training on boxes, without the mask loss")
    if count < FEW_IMAGES:
        words.append(
            f"{count} images to train on: with under {FEW_IMAGES}, watch the validation figures, "
            "which may fall while the loss falls too; more photos help most"
        )
    if training.batch_size > plan.images:
        words.append(f"batch_size {training.batch_size}: the training split fills {plan.images}")
    if training.learning_rate > HIGH_LEARNING_RATE:
        words.append(
            f"learning_rate {training.learning_rate:g}: SAM 3 takes {KEYS['learning_rate'].default}"
            "; much more, and the loss may not fall or be NaN"
        )
    idle = find_idle(config, plan.evaluations(training.eval_steps))
    words += [f"without effect: {item}" for item in idle]
    if plan.warmup_steps < training.warmup_steps:
        words.append(f"warmup_steps: {plan.warmup_steps}, a tenth of this short run")
    return words


def _find_undefined(val: CocoSplit) -> list[str]:
    """Figures that a validation split has nothing to count for."""
    present = [{a["category_id"] for a in val.annotations[image["id"]]} for image in val.images]
    if not any(present):
        figures = "ap, ap50, cgf1 and iou cannot be measured, and the loss chooses the best_model"
        return [f"the validation split has no object: {figures}"]
    if any(len(own) < len(val.categories) for own in present):
        return []
    return [f"validation: cgf1 and false_positive_rate cannot be measured, as {NONE_ABSENT}"]


def find_idle(config: Config, evaluations: int) -> list[str]:
    """Options that were changed, and change nothing as the others are; for a warning.

    Args:
        config: the resolved configuration.
        evaluations: those that the run will make.
    """
    training = config.training
    changed = [name for name, value in vars(training).items() if value != KEYS[name].default]
    idle = []
    if not training.box_prompt_probability:
        names = [name for name in changed if name.startswith("box_prompt_")]
        idle += [f"{name} without box_prompt_probability" for name in names]
    if training.cache_features == "off":
        names = [name for name in changed if name.startswith("cache_")]
        idle += [f"{name} with cache_features off" for name in names]
    elif training.cache_features == "ram" and "cache_dir" in changed:
        idle.append("cache_dir with cache_features ram")
    if training.early_stopping_patience and training.early_stopping_patience >= evaluations:
        idle.append(f"early_stopping_patience with {evaluations} evaluations in all")
    return idle
