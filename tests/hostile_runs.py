"""Hostile command lines, configurations, outputs and runs to resume, as a table.

test_hostile.py runs the cases: each must be refused in one line, with exit code 2, and write
nothing.
"""

import os
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train_sam3_lora
from sam3_lora import checkpoint
from sam3_lora.config import config_from_args, save_config

Places = dict[str, Path]
Make = Callable[[Path, Places], object]


class Case(NamedTuple):
    """One hostile input.

    Attributes:
        name: unique over all tables.
        script: the module whose `main(argv)` runs, such as `train_sam3_lora`.
        argv: its command line, formatted with the places and split as a shell does; `{{` is `{`.
        message: a piece of the error line that is expected.
        make: writes the hostile thing into the case's folder, which is the working directory.
        writes: patterns of files under the case's folder that may be new or changed after all.

    The places are absolute paths without spaces: `folder`, the case's own, empty; `out`, a folder
    in it that is not there; and, good and shared by all cases, never to be changed: `model`, the
    tiny base; `data`, a data set with `train/` and `val/`, each of `annotations.json` and
    `images/`; `adapter`, a file trained on `model`; `image`, a photo of 96 x 64 pixels.
    """

    name: str
    script: str
    argv: str
    message: str
    make: Make | None = None
    writes: tuple[str, ...] = ()


TRAIN, EVALUATE = "train_sam3_lora", "evaluate_sam3_lora"
INFERENCE, EXPORT = "inference", "export_sam3_lora"

# Command lines that are good but for what a case adds; one step, where it is let through.
RUN = "--model_name {model} --train_data_path {data}/train --output_dir {out} --num_workers 0 "
RUN += "--max_steps 1 --lora_apply_to_vision_encoder false --lora_apply_to_detr_encoder false "
FIND = "--image {image} --text_prompt car --output {out} --device cpu "
MEASURE = "--data_dir {data} --output_dir {out} --num_workers 0 --device cpu "
WHOLE_LINE = 10_000  # characters


class Payload:
    """A pickle of it makes a folder, where it is run."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("pickle_was_run",)


def put(name: str, content: str | bytes) -> Make:
    """Writes a file."""

    def make(folder: Path, _: Places) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def both(*makes: Make) -> Make:
    """One maker after the other."""
    return lambda folder, places: [make(folder, places) for make in makes]


# --- configuration files: name, content, message -------------------------------------------------
CONFIGS: list[tuple[str, str | bytes, str]] = [
    ("alias bomb", "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "an alias (*name) is not"),
    ("alias of itself", "training: &a\n  batch_size: *a\n", "an alias (*name) is not"),
    ("python object", "training:\n  seed: !!python/object/apply:os.system [ls]\n", "python/object"),
    ("python name", "model:\n  name: !!python/name:os.system\n", "python/name"),
    ("own tag", "lora:\n  rank: !rank 4\n", "lora.rank is {'!rank'}"),
    ("tag of a section", "lora: !!python/object:os.x {rank: 4}\n", "lora"),
    ("binary tag", "model:\n  name: !!binary aGVsbG8=\n", "model.name is {'binary'}"),
    ("set", "lora:\n  target_modules: !!set {q_proj, k_proj}\n", "target_modules is {'set'}"),
    ("merge key", "training:\n  <<: {batch_size: 2}\n", "unknown key <<"),
    ("deep nesting", "[" * 20_000, "expected a short YAML file"),
    ("deep nesting of a value", "lora:\n  rank: " + "[" * 300 + "]" * 300, "lora.rank is"),
    ("two megabytes", "#" * 2_000_000, "at most 1000000 bytes"),
    ("binary", bytes(range(256)) * 8, "expected a short YAML file in UTF-8"),
    ("UTF-16", "lora:\n  rank: 4\n".encode("utf-16"), "expected a short YAML file in UTF-8"),
    ("NUL", "model:\n  name: \x00\n", "expected a short YAML file in UTF-8"),
    ("escape character", "model:\n  name: \x1b[31m\n", "expected a short YAML file in UTF-8"),
    ("tab", "lora:\n\trank: 4\n", "run.yaml:2: broken YAML"),
    ("two documents", "lora:\n---\nlora:\n", "broken YAML"),
    ("unclosed quote", "model:\n  name: 'x\n", "broken YAML"),
    ("duplicate key", "lora:\n  rank: 4\n  rank: 400\n", "lora.rank is set again"),
    ("list for the file", "- lora\n- training\n", "expected the sections"),
    ("word for the file", "lora", "expected the sections"),
    ("number for the file", "4", "expected the sections"),
    ("scalar for a section", "training: 4\n", "expected indented `key: value` lines under"),
    ("list for a section", "training: [4]\n", "expected indented `key: value` lines under"),
    ("unknown section", "trainer:\n  batch_size: 4\n", "unknown section 'trainer', did you"),
    ("list for a section's name", "? [lora]\n: 4\n", "unknown section"),
    ("unknown key", "training:\n  batchsize: 4\n", "unknown key batchsize, did you mean batch"),
    ("key of another section", "training:\n  rank: 4\n", "did you mean rank in section lora?"),
    ("line break in a key", 'training:\n  "batch\\nsize": 4\n', "unknown key"),
    ("long key", f"training:\n  {'k' * 900}: 4\n", "unknown key kkk"),
    ("list for a number", "lora:\n  rank: [4, 5]\n", "lora.rank is ['4', '5']"),
    ("mapping for a number", "lora:\n  rank: {a: 4}\n", "lora.rank is {'map'}"),
    ("NaN", "training:\n  learning_rate: .nan\n", "learning_rate is '.nan'"),
    ("nan as a word", "lora:\n  alpha: nan\n", "lora.alpha is 'nan'"),
    ("infinity", "training:\n  weight_decay: .inf\n", "weight_decay is '.inf'"),
    ("1e999", "training:\n  max_grad_norm: 1e999\n", "max_grad_norm is '1e999'"),
    ("hexadecimal", "training:\n  seed: 0xff\n", "training.seed is '0xff'"),
    ("octal", "training:\n  save_steps: 0o17\n", "save_steps is '0o17'"),
    ("sexagesimal", "training:\n  eval_steps: 1:30\n", "eval_steps is '1:30'"),
    ("huge integer", f"training:\n  num_epochs: {'9' * 400}\n", "num_epochs is '9999"),
    ("more than exact", f"hardware:\n  num_workers: {2**60}\n", "num_workers is '115292"),
    ("long text", f"training:\n  warmup_steps: {'1' * 9000}x\n", "warmup_steps is '1111"),
    ("boolean for a number", "training:\n  batch_size: true\n", "batch_size is 'true'"),
    ("number for a boolean", "training:\n  augment: 2\n", "training.augment is '2'"),
    ("null for a number", "lora:\n  dropout: null\n", "lora.dropout is null"),
    ("null for a name", "model:\n  name: ~\n", "model.name is null"),
    ("empty name", "model:\n  name: ''\n", "model.name is ''"),
    ("blank path", "output:\n  output_dir: '   '\n", "output.output_dir is ' '"),
    ("null for a list", "lora:\n  target_modules: null\n", "target_modules is null"),
    ("empty list", "lora:\n  target_modules: []\n", "target_modules is []"),
    ("nested list", "lora:\n  target_modules: [[q_proj]]\n", "target_modules is [['q_proj']]"),
    ("null in a list", "lora:\n  target_modules: [q_proj, null]\n", "target_modules is ['q_pr"),
    ("list for a path", "training:\n  train_data_path: [a, b]\n", "train_data_path is ['a', 'b']"),
    ("list for a choice", "training:\n  lr_schedule: [cosine]\n", "lr_schedule is ['cosine']"),
    ("a choice there is not", "evaluation:\n  best_metric: map\n", "expected one of ap, ap50"),
    ("line break in a path", 'output:\n  output_dir: "a\\nb"\n', "output.output_dir is 'a\\nb'"),
    ("NUL in a path", 'output:\n  output_dir: "a\\0b"\n', "output.output_dir is 'a\\x00b'"),
    ("NUL in a name", 'model:\n  name: "a\\0b"\n', "model.name is 'a\\x00b'"),
    ("surrogate in a path", 'output:\n  output_dir: "\\uD800"\n', "output.output_dir is"),
    ("out of range", "training:\n  flip_probability: 1.01\n", "flip_probability is '1.01'"),
    ("negative", "evaluation:\n  max_detections: -1\n", "max_detections is '-1'"),
    ("device", "hardware:\n  device: cuda:-1\n", "hardware.device is 'cuda:-1'"),
    ("device of a letter", "hardware:\n  device: 'cuda:\u0663'\n", "hardware.device is 'cuda:"),
    ("nothing adapted", "lora:\n  apply_to_vision_encoder: false\n", "no component is adapted"),
]
CASES = [
    Case(f"config: {name}", TRAIN, "--config run.yaml", message, put("run.yaml", content))
    for name, content, message in CONFIGS
]
CASES += [
    Case("config: a folder", TRAIN, RUN + "--config {folder}", "cannot be read: Is a directory"),
    Case("config: an endless device", TRAIN, RUN + "--config /dev/zero", "at most 1000000 bytes"),
    Case("config: none there", TRAIN, RUN + "--config no.yaml", "cannot be read: No such file"),
    Case("config: NUL in its name", TRAIN, RUN + "--config a\0b", "expected text in UTF-8, found"),
    Case("config: long name", TRAIN, RUN + f"--config {'x' * WHOLE_LINE}", "File name too long"),
    Case("config: no name", TRAIN, RUN + "--config ''", "--config: expected a path, found ''"),
    Case("config: of inference", INFERENCE, FIND + "--config run.yaml", "unknown section",
        put("run.yaml", "nope:\n  a: 1\n")),
    Case("config: of evaluation", EVALUATE, MEASURE + "--base --config run.yaml", "score_thr",
        put("run.yaml", "evaluation:\n  score_threshold: high\n")),
]  # fmt: skip

# --- flags: script, argv, message ----------------------------------------------------------------
LONG = "x" * WHOLE_LINE
FLAGS = [
    (TRAIN, RUN + "--lerning_rate 1", "did you mean --learning_rate?"),
    (TRAIN, RUN + "--zzz", "unknown flag --zzz"),
    (TRAIN, RUN + "--batch 4", "unknown flag --batch"),
    (TRAIN, RUN + f"--{LONG}", "unknown flag"),
    (TRAIN, RUN + "stray", "unrecognized arguments: stray"),
    (TRAIN, RUN + "--batch_size", "--batch_size: expected one argument"),
    (TRAIN, RUN + "--batch_size=", "batch_size is ''"),
    (TRAIN, RUN + "--batch_size ''", "batch_size is ''"),
    (TRAIN, RUN + "--batch_size -1", "batch_size is '-1'"),
    (TRAIN, RUN + "--batch_size 2 --batch_size x", "batch_size is 'x'"),
    (TRAIN, RUN + f"--seed {LONG}", "training.seed is 'xxx"),
    (TRAIN, RUN + "--learning_rate=-1e-4", "learning_rate is '-1e-4'"),
    (TRAIN, RUN + "--learning_rate nan", "learning_rate is 'nan'"),
    (TRAIN, RUN + "--augment maybe", "augment is 'maybe'"),
    (TRAIN, RUN + "--overwrite --resume", "output.overwrite and output.resume are both on"),
    (TRAIN, RUN + "--device cuda:99", "found no cuda:99"),
    (
        TRAIN,
        RUN + "--early_stopping_patience 2 --train_data_path {data}/val --val_data_path ''",
        "val_data_path is ''",
    ),
    (TRAIN, RUN + "--lora_target_modules nothing_here", "matched no Linear layer"),
    (TRAIN, RUN + "--lora_target_modules '(a+)+$'", "target '(a+)+$' matched no Linear layer"),
    (TRAIN, RUN + f"--lora_target_modules {LONG}", "matched no Linear layer"),
    (TRAIN, RUN + "--lora_rank 1000000000", "lora.rank: expected at most"),
    (TRAIN, RUN + "--cache_features ram --lora_apply_to_vision_encoder", "frozen vision encoder"),
    (TRAIN, RUN + "--train_data_path {folder}/none", "no such folder"),
    (TRAIN, RUN + "--train_data_path {image}", "expected"),
    (TRAIN, RUN + "--val_data_path {folder}/none", "no such folder"),
    (EVALUATE, MEASURE, "expected an adapter, found none"),
    (EVALUATE, MEASURE + "--base --compare", "--compare: expected --lora_weights FILE alone"),
    (EVALUATE, MEASURE + "--lora_weights {adapter} --report {out}", "--report: expected without"),
    (EVALUATE, MEASURE + "--lora_weights {adapter} --bootstrap 5", "--bootstrap: expected with"),
    (EVALUATE, MEASURE + "--lora_weights {adapter} --bootstrap -5", "expected a whole number"),
    (EVALUATE, MEASURE + "--lora_weights {adapter} --split nope", "no such folder"),
    (
        EVALUATE,
        MEASURE + "--lora_weights {adapter} --split ''",
        "--split: expected train, val, test",
    ),
    (
        EVALUATE,
        MEASURE + "--lora_weights {adapter} --split ../data/val",
        "--split: expected train, val, test",
    ),
    (EVALUATE, MEASURE + "--lora_weights {adapter} --tile 2", "expected a number from"),
    (EVALUATE, MEASURE + "--lora_weights {adapter} --tile 0.5 --prompt_with box", "--prompt_with"),
    (EVALUATE, MEASURE + "--lora_weights {adapter} --calibrate --prompt_with both", "--calibrate"),
    (EVALUATE, MEASURE + "--base --calibrate", "the thresholds are those of an adapter"),
    (
        EVALUATE,
        "--data_dir {data} --lora_weights {adapter} --report {folder}/r --probe_dir no",
        "--probe_dir",
    ),
    (EVALUATE, "--data_dir {data} --lora_weights {adapter} --probe_dir {data}", "--report DIR"),
    (EVALUATE, MEASURE + "--base --max_detections 0", "max_detections is '0'"),
    (INFERENCE, "--text_prompt car", "expected one of --image --video, found none"),
    (INFERENCE, FIND + "--video {data}", "not allowed with argument"),
    (INFERENCE, FIND + "--threshold 1.5", "expected a number from 0 to 1, found '1.5'"),
    (INFERENCE, FIND + "--threshold=", "expected a number from 0 to 1, found ''"),
    (INFERENCE, FIND + "--nms_iou nan", "expected a number from 0 to 1, found 'nan'"),
    (INFERENCE, FIND + "--route car", "expected 'TEXT=NAME'"),
    (INFERENCE, FIND + "--route car=a:1e9", "expected 'TEXT=NAME'"),
    (INFERENCE, FIND + "--route car=base car=base", "more for 'car'"),
    (INFERENCE, FIND + "--route car=nobody", "nobody"),
    (INFERENCE, FIND + "--every 0", "expected a whole number from 1 up, found '0'"),
    (INFERENCE, FIND + "--every 2 --fps 3", "--every, --fps: expected --video, found --image"),
    (INFERENCE, FIND + "--fps \u00b2", "expected a whole number from 1 up"),
    (INFERENCE, FIND + f"--fps {'9' * 5000}", "expected a whole number from 1 up"),
    (INFERENCE, FIND + "--output {folder}/a.txt", "--output: expected an image file"),
    (INFERENCE, FIND + "--json {image}", "is a folder or device, an input"),
    (INFERENCE, FIND + "--output /dev/null/x", "--output"),
    (INFERENCE, FIND + "--tracker sam3", "--tracker: expected --video, found --image"),
    (INFERENCE, FIND + "--lora_weights {adapter} {adapter}", "adapters of different names"),
    (INFERENCE, FIND + "--lora_weights base={adapter} --route car=base", "none of them base"),
    (INFERENCE, FIND + "--lora_weights ''", "expected an adapter file, found nothing at"),
    (INFERENCE, FIND + "--lora_weights a\0b", "expected text in UTF-8"),
    (INFERENCE, FIND + "--only_boxed", "--only_boxed: expected a positive box"),
    (INFERENCE, FIND + "--bbox_labels [1]", "--bbox_labels: expected one for each box"),
    (EXPORT, "", "expected COMMAND, found none"),
    (EXPORT, "steal --lora_weights {adapter}", "invalid choice: 'steal'"),
    (EXPORT, "peft --lora_weights {adapter}", "--output_dir"),
    (EXPORT, "peft --lora_weights {adapter} --output_dir .", "--output_dir: . holds files in use"),
    (EXPORT, "peft --lora_weights {adapter} --output_dir {out} --private", "--private: expected"),
    (
        EXPORT,
        "peft --lora_weights {adapter} --output_dir {out} --push_to_hub a/b/c",
        "--push_to_hub: expected USER/NAME",
    ),
    (EXPORT, "peft --lora_weights {adapter} --output_dir {out} --push_to_hub ../x", "USER/NAME"),
    (EXPORT, "peft --lora_weights {adapter} --output_dir {out} --metrics /dev/null", "--metrics"),
    (
        EXPORT,
        "peft --lora_weights {adapter} --output_dir {data} --overwrite",
        "--overwrite: expected an earlier export",
    ),
    (EXPORT, "merge --lora_weights {adapter} --output_dir {model}", "holds files in use"),
    (EXPORT, "merge --lora_weights {adapter} --output_dir {out} --dtype int4", "--dtype"),
    (EXPORT, "merge --lora_weights {adapter} --output_dir {out} --video", "video model"),
    (EXPORT, "import --source {adapter} --output {folder}/a.bin", "ends in .pt"),
    (EXPORT, "import --source {adapter} --output {folder}/a.pt --alpha nan", "--alpha"),
    (EXPORT, "import --source {adapter} --output {folder}/a.pt --alpha 16", "stores its own alp"),
    (EXPORT, "import --source {folder}/none --output {folder}/a.pt", "found nothing at"),
]
CASES += [
    Case(f"flags: {number} of {script}", script, argv, message)
    for number, (script, argv, message) in enumerate(FLAGS, start=1)
]


# --- where a run goes, and what it goes on from ---------------------------------------------------
def fifo(name: str) -> Make:
    """What is neither a file nor a folder, as a device is."""
    return lambda folder, _: os.mkfifo(folder / name)


def link(name: str, target: str) -> Make:
    """A link, to nothing or to itself."""
    return lambda folder, _: (folder / name).symlink_to(target)


OUTPUTS = [
    (TRAIN, RUN, put("out", "x"), "output_dir: expected a new folder or an earlier run, found a f"),
    (TRAIN, RUN, fifo("out"), "output_dir: expected a new folder or an earlier run"),
    (TRAIN, RUN, link("out", "gone"), "output_dir: expected a new folder or an earlier run"),
    (TRAIN, RUN, link("out", "out"), "output_dir: expected a new folder or an earlier run"),
    (TRAIN, RUN, put("out/notes.txt", "x"), "found other files (notes.txt)"),
    (TRAIN, RUN + "--overwrite", put("out/notes.txt", "x"), "found other files (notes.txt)"),
    (TRAIN, RUN + "--output_dir {data}", None, "found other files"),
    (TRAIN, RUN + "--output_dir {data}/train", None, "expected a folder outside the data"),
    (TRAIN, RUN + "--output_dir {data}/train/run", None, "expected a folder outside the data"),
    (TRAIN, RUN + "--output_dir {data}/train/../train/x", None, "outside the data"),
    (TRAIN, RUN + "--output_dir {adapter}/run", None, "output_dir"),
    (EVALUATE, MEASURE + "--base", put("out", "x"), "--output_dir: expected a folder, found the f"),
    (EVALUATE, MEASURE + "--base", fifo("out"), "--output_dir: expected a folder, found the file"),
    (EVALUATE, MEASURE + "--base", link("out", "gone"), "--output_dir"),
    (INFERENCE, FIND, link("out", "gone"), "--output"),
    (INFERENCE, FIND + "--json pipe", fifo("pipe"), "--json: pipe is a folder or device"),
    (INFERENCE, FIND + "--output {image}", None, "is a folder or device, an input"),
    (EXPORT, "peft --lora_weights {adapter} --output_dir pipe", fifo("pipe"), "is a device or a"),
    (EXPORT, "peft --lora_weights {adapter} --output_dir x", link("x", "x"), "is a device or a b"),
    (EXPORT, "merge --lora_weights {adapter} --output_dir x", link("x", "no"), "is a device or a"),
    (EXPORT, "import --source {adapter} --output a.pt", fifo("a.pt"), "ends in .pt"),
    (EXPORT, "import --source {adapter} --output {adapter}/a.pt", None, "--output: expected a"),
]
CASES += [
    Case(f"output: {number} of {script}", script, argv, message, make)
    for number, (script, argv, make, message) in enumerate(OUTPUTS, start=1)
]

SETTINGS = "--model_name {model} --train_data_path {data}/train --output_dir {out} "
SETTINGS += "--num_workers 0 --max_steps 2 --lora_rank 4 --lora_alpha 8 --resume "
SETTINGS += "--lora_apply_to_vision_encoder false --lora_apply_to_detr_encoder false"


def run(
    state: Callable[[dict[str, Any]], object] = lambda _: None,
    text: str | None = None,
    adapter: bytes | None = None,
    name: str = "checkpoint-1",
) -> Make:
    """A run to resume, of the good adapter, with another state, config.yaml or adapter."""

    def make(folder: Path, places: Places) -> None:
        words = shlex.split(SETTINGS.format(**places))
        args = train_sam3_lora.build_parser().parse_args(words)
        place = folder / "out" / name
        place.mkdir(parents=True)
        save_config(config_from_args(args), folder / "out" / "config.yaml")
        if text is not None:
            (folder / "out" / "config.yaml").write_text(text)
        (folder / "out" / "train.log").write_text("")
        (place / checkpoint.ADAPTER_FILE).write_bytes(adapter or places["adapter"].read_bytes())
        weights = torch.load(places["adapter"], weights_only=True)["lora"].values()
        optimizer = torch.optim.AdamW([torch.nn.Parameter(value) for value in weights])
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        content = {"optimizer": optimizer.state_dict(), "scaler": {}, "best": None, "figure": None}
        content |= {"step": 1, "stale": 0, "rng": {}}
        torch.save(state(content) or content, place / checkpoint.STATE_FILE)

    return make


RESUMED = [
    ("nothing", None, "--resume: expected checkpoint-<step>/"),
    ("a folder of others", put("out/a.txt", "x"), "found other files (a.txt)"),
    ("no checkpoint", put("out/train.log", ""), "--resume: expected checkpoint-<step>/"),
    ("no state", both(run(), lambda f, _: (f / "out/checkpoint-1/training_state.pt").unlink()),
        "training_state.pt"),
    ("code", run(lambda state: {**state, "best": Payload()}), "cannot be read safely"),
    ("a list", run(lambda _: [1]), "expected the state of step 1"),
    ("no optimizer", run(lambda state: state.pop("optimizer") and None), "('optimizer')"),
    ("an optimizer of text", run(lambda state: state.update(optimizer="x")), "has no attribute"),
    ("another optimizer", run(lambda state: state["optimizer"]["param_groups"][0].update(
        params=[0])), "parameter group that doesn't match"),
    ("other shapes", run(lambda state: state["optimizer"]["state"][0].update(
        exp_avg=torch.ones(3))), "an optimizer of other shapes"),
    ("step 7", run(lambda state: state.update(step=7)), "expected the state of step 1"),
    ("step of text", run(lambda state: state.update(step="1")), "expected the state of step 1"),
    ("best of text", run(lambda state: state.update(best=["a"])), "figures that are no numbers"),
    ("no random state", run(), "('python')"),
    ("a random state of text", run(lambda state: state.update(rng="x")), "a damaged one (string"),
    ("an adapter with code", run(adapter=pickle.dumps(Payload())), "cannot be read safely"),
    ("a config with a tag", run(text="lora: !!python/object:os.x {rank: 4}\n"), "under lora"),
    ("a config with an alias", run(text="a: &a 1\nb: *a\n"), "an alias (*name) is not accepted"),
    ("no config", both(run(), lambda f, _: (f / "out/config.yaml").unlink()), "cannot be read"),
    ("other settings", run(text="lora:\n  rank: 5\n"), "expected the settings that the run began"),
    ("a number of 200 digits", run(name=f"checkpoint-{'9' * 200}"), "expected the state of step 9"),
]  # fmt: skip
CASES += [
    Case(f"resume: {name}", TRAIN, SETTINGS, message, make) for name, make, message in RESUMED
]
