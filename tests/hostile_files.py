"""Hostile adapters, of this project and of others, and base models, as a table; see hostile_runs.py
for its form."""

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile_runs import (
    EVALUATE,
    EXPORT,
    FIND,
    INFERENCE,
    MEASURE,
    RUN,
    TRAIN,
    WHOLE_LINE,
    Case,
    Make,
    Payload,
    Places,
    put,
)

from sam3_lora import checkpoint, exchange


# --- adapters: name, what is done to a good file's content or the bytes, script, message ----------
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
    ("thresholds beyond", entry(thresholds={"red_part": 2.0}), "found another thresholds"),
    ("thresholds NaN", entry(thresholds={"red_part": float("nan")}), "found another thresholds"),
    ("geometry_cls", entry(geometry_cls="x"), "found another geometry_cls"),
    ("figures of text", entry(metrics={"ap": "high"}), "found another metrics"),
    ("step as text", entry(step="3"), "found another step"),
]  # fmt: skip
BAD = "--lora_weights bad.pt "
USERS = ((INFERENCE, FIND + "--model_name base"), (EVALUATE, MEASURE + "--base --model_name base"))
READERS = (
    (INFERENCE, FIND + BAD),
    (EVALUATE, MEASURE + BAD),
    (EXPORT, f"merge {BAD} --output_dir {{out}}"),
)
CASES = [
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
        "name a lora_weights.pt; expected an adapter file, found nothing", put("bad.pt", b"x")),
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


def peft(
    config: dict[str, Any] | str | None = None,
    header: Callable[[dict[str, Any]], dict[str, Any]] | bytes | None = None,
    weights: Callable[[bytes], bytes] | None = None,
) -> Make:
    """A folder as PEFT writes it, with another configuration, header or weights' bytes: a
    dictionary changes some values, a text is all of it."""

    def make(folder: Path, places: Places) -> None:
        content = checkpoint.read_adapter(places["adapter"])
        source = folder / "peft"
        source.mkdir()
        exchange.write_peft(source, content, "facebook/sam3")
        path = source / exchange.PEFT_CONFIG
        if isinstance(config, dict):
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        elif config is not None:
            path.write_text(config)
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
    """A header whose first tensor says something else."""

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
    ("settings as a list", peft("[1, 2]"), DAMAGED),
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
    ("a layer of nowhere", "--alpha 3",
        meta(x__lora_A=torch.ones(4, 2), x__lora_B=torch.ones(2, 4)), "no counterpart"),
    ("a whole model", "--alpha 3", meta(detector__x=torch.ones(1)), "a whole model"),
    ("a view of a number", "--alpha 3",
        meta(**PAIR | {f"{LAYER}lora_A": torch.ones(1).expand(10**7, 10**7)}), "no pair of matric"),
    ("code", "", lambda folder, _: torch.save({"a": Payload()}, folder / "meta.pt"), SAFELY),
]  # fmt: skip
CASES += [
    Case(f"meta: {name}", EXPORT, f"{IMPORT}meta.pt {more}", message, make)
    for name, more, make, message in META
]


# --- base models ----------------------------------------------------------------------------------
def base(*without: str, **files: Any) -> Make:
    """A copy of the tiny base without some files, and with others' contents: a dictionary changes
    some entries of config.json, a function the bytes of a file; `__` stands for a dot."""

    def make(folder: Path, places: Places) -> None:
        shutil.copytree(places["model"], folder / "base")
        for name in without:
            (folder / "base" / name).unlink()
        for name, content in files.items():
            path = folder / "base" / name.replace("__", ".")
            if callable(content):
                content = content(path.read_bytes())
            elif isinstance(content, dict):
                content = json.dumps({**json.loads(path.read_text()), **content})
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def decoder(**values: Any) -> dict[str, Any]:
    """A configuration with other sizes of the decoder."""
    sizes = {"model_type": "sam3_detr_decoder", "hidden_size": 64, "num_layers": 2}
    return {"detr_decoder_config": {**sizes, "num_queries": 16, **values}}


def index(name: str) -> str:
    """A list of weight files with one name in it."""
    return json.dumps({"metadata": {}, "weight_map": {"detr_decoder.query_embed.weight": name}})


FULL = "get a full copy"
WEIGHTS, LIST = "model.safetensors", "model__safetensors__index__json"
CODE = "import os\nos.mkdir('code_was_run')\nclass C: pass\n"
AUTO = {"AutoConfig": "code.C", "AutoModel": "code.C", "AutoTokenizer": ["code.C", None]}
BASES = [
    ("no config", base("config.json"), "expected config.json in the folder base, found none"),
    ("config that is no JSON", base(config__json="{"), FULL),
    ("config that is a list", base(config__json="[1]"), FULL),
    ("config of nothing", base(config__json="{}"), FULL),
    ("config that is deep", base(config__json="[" * 200_000), FULL),
    ("config of bytes", base(config__json=b"\xff\xfe\x00"), FULL),
    ("another architecture", base(config__json={"model_type": "bert"}), "model_type 'bert'"),
    ("code of an unknown kind", base(config__json={"model_type": "own", "auto_map": AUTO},
        code__py=CODE), FULL),
    ("width of 10^9", base(config__json=decoder(hidden_size=10**9)), "hidden_size of at most"),
    ("width of 10^6", base(config__json=decoder(hidden_size=10**6)), "parameters of at most"),
    ("width of -1", base(config__json=decoder(hidden_size=-1)), FULL),
    ("width of text", base(config__json=decoder(hidden_size="wide")), FULL),
    ("layers of 10^9", base(config__json=decoder(num_layers=10**9)), "num_layers of at most 200"),
    ("queries of 10^9", base(config__json=decoder(num_queries=10**9)), "num_queries of at most"),
    ("other sizes", base(config__json=decoder(num_queries=17)), "mismatched_keys"),
    ("no weights", base(WEIGHTS), FULL),
    ("weights that are truncated", base(model__safetensors=lambda d: d[:-1000]), FULL),
    ("weights that are empty", base(model__safetensors=b""), FULL),
    ("weights of 10^15 bytes", base(model__safetensors=struct.pack("<Q", 10**15)), FULL),
    ("weights of another", base(model__safetensors=struct.pack("<Q", 2) + b"{}"), "missing_keys"),
    ("weights with code", base(WEIGHTS, pytorch_model__bin=pickle.dumps(Payload())), FULL),
    ("a list to outside", base(WEIGHTS, **{LIST: index("../x.safetensors")}),
        "expected names of files in its folder, found '../x.safetensors'"),
    ("a list to the root", base(WEIGHTS, **{LIST: index("/etc/passwd")}), "found '/etc/passwd'"),
    ("a list of no file", base(WEIGHTS, **{LIST: index("x.safetensors")}), FULL),
    ("a list that is none", base(WEIGHTS, **{LIST: "[]"}), FULL),
    ("no tokenizer", base("tokenizer.json"), "found no tokenizer.json"),
    ("a tokenizer that is none", base(tokenizer__json="[]"), FULL),
    ("a tokenizer of code", base("tokenizer.json", tokenizer_config__json=json.dumps(
        {"tokenizer_class": "C", "auto_map": AUTO}), code__py=CODE), FULL),
]  # fmt: skip
CASES += [
    Case(f"base: {name}", *USERS[number % 2], message, make)
    for number, (name, make, message) in enumerate(BASES)
]
NAMES = [
    ("a path that is not there", "./nodir", "found no folder './nodir'"),
    ("a home that is not there", "~/sam3", "found no folder '~/sam3'"),
    ("an address", "https://huggingface.co/facebook/sam3", "found no folder 'https:"),
    ("a path upwards", "../../etc/passwd/x", "found no folder '../../etc"),
    ("three parts", "a/b/c", "found no folder 'a/b/c'"),
    ("nothing", "''", "model.name is ''"),
    ("a file", "{adapter}", "found the file"),
    ("the data", "{data}", "found none; download with"),
    ("SAM 3.1", "facebook/sam3.1", "is SAM 3.1"),
    ("a hub id there is not", "nobody/nothing", "the hub did not give it"),
    ("long", "x" * WHOLE_LINE, "model.name"),
]
CASES += [
    Case(f"base named: {name}", INFERENCE, FIND + f"--model_name {value}", message)
    for name, value, message in NAMES
]
CASES += [
    Case("base named: no folder, dry run", TRAIN, "--dry_run --model_name ./no", "no folder './"),
    Case("base: width of 10^9, dry run", TRAIN, "--dry_run --model_name base", "of at most",
        base(config__json=decoder(hidden_size=10**9))),
]  # fmt: skip
