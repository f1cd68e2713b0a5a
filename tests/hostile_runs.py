"""Hostile command lines, configurations, adapters, checkpoints and base models, as a table.

test_hostile.py runs the cases: each must be refused in one line, with exit code 2, and write
nothing.
"""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sam3_lora import checkpoint, exchange

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
    Case("config: NUL in its name", TRAIN, RUN + "--config a\0b", "expected text in UTF-8, found 'a\\x00b'"),
    Case("config: long name", TRAIN, RUN + f"--config {'x' * WHOLE_LINE}", "File name too long"),
    Case("config: empty name", TRAIN, RUN + "--config ''", "--config: expected a path, found ''"),
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
    (INFERENCE, "--text_prompt car", "--image --video is required"),
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
    (EXPORT, "", "the following arguments are required: COMMAND"),
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


# --- adapters: name, what is done to a good file's content or the bytes, script, message ----------
class Payload:
    """A pickle of it makes a folder, where it is run."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("pickle_was_run",)


def altered(change: Callable[[dict[str, Any]], object]) -> Make:
    """A good adapter's content, changed in place, or what the change gives, as bad.pt."""

    def make(folder: Path, places: Places) -> None:
        content = torch.load(places["adapter"], weights_only=True)
        torch.save(change(content) or content, folder / "bad.pt")

    return make


def entry(**values: Any) -> Make:
    """An adapter with other entries."""
    return altered(lambda content: content.update(values))


def lora(**values: Any) -> Make:
    """An adapter with another `lora_config`."""
    return altered(lambda content: content["lora_config"].update(values))


def tensor(change: Callable[[torch.Tensor], Any]) -> Make:
    """An adapter whose first tensor is another."""

    def alter(content: dict[str, Any]) -> None:
        name = next(iter(content["lora"]))
        content["lora"][name] = change(content["lora"][name])

    return altered(alter)


def cut(share: float) -> Make:
    """The beginning of a good adapter's file."""

    def make(folder: Path, places: Places) -> None:
        data = places["adapter"].read_bytes()
        (folder / "bad.pt").write_bytes(data[: int(len(data) * share)])

    return make


def zipped(folder: Path, _: Places) -> None:
    """A zip that is none of torch's."""
    with zipfile.ZipFile(folder / "bad.pt", "w") as file:
        file.writestr("../escaped.txt", "x")


SAFELY = "cannot be read safely"
LORA_TYPES = "lora_config: expected rank, alpha, dropout, target_modules, components alone"
MATRICES = "expected matrices of finite numbers, found"
ADAPTERS = [
    ("code", altered(lambda content: {**content, "step": Payload()}), SAFELY),
    ("bare pickle with code", put("bad.pt", pickle.dumps(Payload())), SAFELY),
    ("truncated", cut(0.5), SAFELY),
    ("almost whole", cut(0.99), SAFELY),
    ("empty", put("bad.pt", b""), SAFELY),
    ("random bytes", put("bad.pt", bytes(range(256)) * 40), SAFELY),
    ("another zip", zipped, SAFELY),
    ("text", put("bad.pt", "version https://git-lfs.github.com/spec/v1\n"), SAFELY),
    ("another project's", altered(lambda _: {"layer.weight": torch.ones(2)}), "found another .pt"),
    ("a list", altered(lambda _: [1, 2]), "found another .pt file"),
    ("version 99", entry(version=99), "expected adapter version <= 1, found 99"),
    ("version as text", entry(version="1"), "found no valid version"),
    ("no weights", altered(lambda content: content.pop("lora") and None), "found no valid lora"),
    ("weights as a list", entry(lora=[1]), "found no valid lora"),
    ("no weight", entry(lora={}), "does not fit the model"),
    ("NaN", tensor(lambda a: a * torch.nan), MATRICES),
    ("infinite", tensor(lambda a: a + torch.inf), MATRICES),
    ("integers", tensor(lambda a: a.long()), MATRICES),
    ("complex", tensor(lambda a: a.to(torch.complex64)), MATRICES),
    ("sparse", tensor(lambda a: a.to_sparse()), MATRICES),
    ("a view of a number", tensor(lambda a: torch.ones(1).expand(10**7, 10**7)), MATRICES),
    ("on no device", tensor(lambda a: a.to("meta")), MATRICES),
    ("number for a weight", tensor(lambda a: 3.0), MATRICES),
    ("a vector", tensor(lambda a: a[0]), MATRICES),
    ("shapes", tensor(lambda a: a[:, :-1].clone()), "misshapen"),
    ("names", altered(lambda c: c["lora"].update(a=torch.ones(1, 1))), "unexpected"),
    ("number for a name", altered(lambda c: c["lora"].update({7: torch.ones(1, 1)})), MATRICES),
    ("rank 10^9", lora(rank=10**9), "lora.rank: expected at most"),
    ("rank 0", lora(rank=0), "lora.rank: expected an integer >= 1, found 0"),
    ("rank as text", lora(rank="4"), LORA_TYPES),
    ("alpha NaN", lora(alpha=float("nan")), "lora.alpha: expected a number > 0"),
    ("dropout 2", lora(dropout=2.0), "lora.dropout: expected a number in [0, 1), found 2.0"),
    ("targets of numbers", lora(target_modules=[1, 2]), LORA_TYPES),
    ("a target that is a bomb", lora(target_modules=["(a+)+$"]), "'(a+)+$' matched no Linear"),
    ("components", lora(components=["nowhere"]), "found nowhere"),
    ("settings of later", lora(use_dora=True), LORA_TYPES),
    ("another base", entry(base_fingerprint="0" * 16), "expected the base it was trained on"),
    ("fingerprint of bytes", entry(base_fingerprint=b"0"), "found no valid base_fingerprint"),
    ("a base that is not there", entry(base_model="../../etc"), "found no folder '../../etc'"),
    ("a base that is an address", entry(base_model="https://x.org/a"), "found no folder 'https:"),
    ("a base with NUL", entry(base_model="a\0b"), "found no folder 'a\\x00b'"),
    ("categories of numbers", entry(categories={1: 2}), "found another categories"),
    ("categories as a list", entry(categories=["red"]), "found another categories"),
    ("thresholds beyond", entry(thresholds={"red_part": 2.0}), "thresholds: expected numbers from"),
    ("thresholds NaN", entry(thresholds={"red_part": float("nan")}), "thresholds: expected numbers"),
    ("geometry_cls", entry(geometry_cls="x"), "found another geometry_cls"),
    ("figures of text", entry(metrics={"ap": "high"}), "found another metrics"),
    ("step as text", entry(step="3"), "found another step"),
]  # fmt: skip
BAD = "--lora_weights bad.pt "
READERS = (
    (INFERENCE, FIND + BAD),
    (EVALUATE, MEASURE + BAD),
    (EXPORT, f"merge {BAD} --output_dir {{out}}"),
)
CASES += [
    Case(f"adapter: {name}", *READERS[number % 3], message, make)
    for number, (name, make, message) in enumerate(ADAPTERS)
]
START = RUN + "--init_lora_weights "
CASES += [
    Case("adapter: none there", INFERENCE, FIND + "--lora_weights no.pt", "found nothing at no.pt"),
    Case("adapter: a folder of others", EVALUATE, MEASURE + "--lora_weights {data}", "nothing at"),
    Case("adapter: a link to nothing", EXPORT, "peft --lora_weights bad.pt --output_dir {out}",
        "found nothing at bad.pt", lambda folder, _: (folder / "bad.pt").symlink_to("gone")),
    Case("adapter: a link to itself", EXPORT, "peft --lora_weights bad.pt --output_dir {out}",
        "found nothing at bad.pt", lambda folder, _: (folder / "bad.pt").symlink_to("bad.pt")),
    Case("adapter: two that are bad", INFERENCE, FIND + "--lora_weights a=bad.pt b=no.pt",
        "name another; expected an adapter file, found nothing", put("bad.pt", b"x")),
    Case("adapter: of two bases", INFERENCE, FIND + "--lora_weights a={adapter} b=bad.pt",
        "expected adapters of one base", entry(base_fingerprint="1" * 16)),
    Case("adapter: start with code", TRAIN, START + "bad.pt", SAFELY, ADAPTERS[0][1]),
    Case("adapter: start of other settings", TRAIN, START + "{adapter}", "of this run's settings"),
    Case("adapter: start of another base", TRAIN, START + "bad.pt --lora_rank 4 --lora_alpha 8",
        "expected the base it was trained on", entry(base_fingerprint="1" * 16)),
    Case("adapter: start with NaN", TRAIN, START + "bad.pt --lora_rank 4 --lora_alpha 8", MATRICES,
        tensor(lambda a: a * torch.nan)),
]  # fmt: skip


# --- PEFT's folders and Meta-named files to import ------------------------------------------------
IMPORT = "import --output {folder}/a.pt --model_name {model} --source "


def peft(config: Any = None, header: Any = None, weights: Callable[[bytes], bytes] | None = None):
    """A folder as PEFT writes it, with another configuration, header or weights' bytes: a
    dictionary changes some values, a text is all of it."""

    def make(folder: Path, places: Places) -> None:
        content = checkpoint.read_adapter(places["adapter"])
        source = folder / "peft"
        source.mkdir()
        exchange.write_peft(source, content, "facebook/sam3")
        path = source / exchange.PEFT_CONFIG
        text = json.dumps({**json.loads(path.read_text()), **config} if isinstance(config, dict)
            else config) if not isinstance(config, str) else config  # fmt: skip
        if config is not None:
            path.write_text(text)
        path = source / exchange.PEFT_WEIGHTS
        data = path.read_bytes()
        if header is not None:
            size = struct.unpack("<Q", data[:8])[0]
            told = json.loads(data[8 : 8 + size])
            head = header if isinstance(header, bytes) else json.dumps(header(told)).encode()
            data = struct.pack("<Q", len(head)) + head + data[8 + size :]
        path.write_bytes(weights(data) if weights else data)

    return make


def first(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A header whose first tensor says something else; `_offsets` moves where it ends."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in header if name != "__metadata__")
        return {**header, name: {**header[name], **values}}

    return change


def told(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A header with another description of the adapter."""
    return lambda header: {
        **header, "__metadata__": {"format": "pt", "sam3_lora": json.dumps(values)}
    }  # fmt: skip


def renamed(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A header in which the first layer has another name."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        layer = next(key for key in header if key.endswith(".lora_A.weight"))[:-14]
        return {key.replace(layer, f"base_model.model.{name}"): v for key, v in header.items()}

    return change


DAMAGED = "is damaged"
BOMB = "(a+)+"
PEFTS = [
    ("settings as a list", peft([1, 2]), DAMAGED),
    ("settings that are no JSON", peft("{"), "JSONDecodeError"),
    ("settings that are deep", peft("[" * 200_000), "RecursionError"),
    ("settings of 11 MB", peft(" " * 11_000_000), "of more than 10000000 bytes"),
    ("settings of nothing", peft("{}"), "KeyError('lora_alpha')"),
    ("another method", peft({"peft_type": "LOHA"}), "found peft_type 'LOHA'"),
    ("DoRA", peft({"use_dora": True}), "found use_dora True"),
    ("rank 0", peft({"r": 0}), "expected rank 0 of adapter_config.json, found 4"),
    ("rank -1", peft({"r": -1}), "expected rank -1 of"),
    ("rank of 1e999", peft('{"r": 1e999, "lora_alpha": 1, "lora_dropout": 0}'), "OverflowError"),
    ("alpha NaN", peft({"lora_alpha": float("nan")}), "whose alpha is not a number > 0"),
    ("alpha -1", peft({"lora_alpha": -1}), "whose alpha is not a number > 0"),
    ("dropout 5", peft({"lora_dropout": 5}), "lora_dropout 5.0"),
    ("pattern that is a bomb", peft({"rank_pattern": {f"{BOMB}$": 4}}, renamed("a" * 40)),
        "rank_pattern '(a+)+$'"),
    ("pattern of many repeats", peft({"alpha_pattern": {".*.*.*.*x": 4}}), "alpha_pattern '.*.*"),
    ("pattern that is broken", peft({"alpha_pattern": {"(": 4}}), DAMAGED),
    ("pattern to infinity", peft({"rank_pattern": {"q_proj": float("inf")}}), "rank_pattern"),
    ("patterns as a list", peft({"rank_pattern": ["q_proj"]}), "AttributeError"),
    ("base as a number", peft({"base_model_name_or_path": 5}), "base_model_name_or_path 5"),
    ("header of 10^15 bytes", peft(weights=lambda d: struct.pack("<Q", 10**15) + d[8:]), DAMAGED),
    ("header longer than the file", peft(weights=lambda d: struct.pack("<Q", len(d)) + d[8:]),
        DAMAGED),
    ("header that is no JSON", peft(header=b"\xff" * 64), DAMAGED),
    ("header as a list", peft(header=b"[1, 2]"), DAMAGED),
    ("offsets beyond the file", peft(header=first(data_offsets=[0, 10**12])), DAMAGED),
    ("negative offsets", peft(header=first(data_offsets=[-8, 8])), DAMAGED),
    ("overlapping offsets", peft(header=first(data_offsets=[4, 4])), DAMAGED),
    ("shape of 10^18", peft(header=first(shape=[10**9, 10**9])), DAMAGED),
    ("type there is not", peft(header=first(dtype="Q77")), DAMAGED),
    ("integers", peft(header=first(dtype="I32")), "no pair of matrices"),
    ("truncated", peft(weights=lambda d: d[:-100]), DAMAGED),
    ("empty", peft(weights=lambda d: b""), DAMAGED),
    ("a pickle", peft(weights=lambda d: pickle.dumps(Payload())), DAMAGED),
    ("values that are not finite", peft(weights=lambda d: d[:-4] + struct.pack("<f", float("nan"))),
        "not finite"),
    ("description of numbers", peft(header=told(categories={"a": 1})), "found another categories"),
    ("description with settings", peft(header=told(lora_config=[1])), DAMAGED),
    ("layers of no part", peft(header=renamed("../../etc.q_proj")), "that the base does not have"),
    ("layers of long names", peft(header=renamed("x" * 5000)), "that are none of a LoRA"),
]  # fmt: skip
CASES += [
    Case(f"peft: {name}", EXPORT, IMPORT + "peft", message, make) for name, make, message in PEFTS
]


def meta(**tensors: torch.Tensor) -> Make:
    """A file of Meta's names, `__` for a dot."""
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    return lambda folder, _: torch.save(named, folder / "meta.pt")


LAYER = "transformer__encoder__layers__0__self_attn__out_proj__lora__"
PAIR = {f"{LAYER}lora_A": torch.ones(64, 2), f"{LAYER}lora_B": torch.ones(2, 64)}
META = [
    ("no alpha", "", meta(**PAIR), "does not store the alpha"),
    ("alpha NaN", "--alpha nan", meta(**PAIR), "whose alpha is not a number > 0"),
    ("alpha below", "--alpha -3", meta(**PAIR), "whose alpha is not a number > 0"),
    ("A alone", "--alpha 3", meta(**{f"{LAYER}lora_A": torch.ones(64, 2)}), "with A or B alone"),
    ("a layer of nowhere", "--alpha 3", meta(x__lora_A=torch.ones(4, 2), x__lora_B=torch.ones(2, 4)),
        "no counterpart"),
    ("a whole model", "--alpha 3", meta(detector__x=torch.ones(1)), "a whole model"),
    ("a view of a number", "--alpha 3",
        meta(**PAIR | {f"{LAYER}lora_A": torch.ones(1).expand(10**7, 10**7)}), "no pair of matric"),
    ("code", "", lambda folder, _: torch.save({"a": Payload()}, folder / "meta.pt"), SAFELY),
]  # fmt: skip
CASES += [
    Case(f"meta: {name}", EXPORT, f"{IMPORT}meta.pt {more}", message, make)
    for name, more, make, message in META
]
