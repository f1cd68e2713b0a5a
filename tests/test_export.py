"""export_sam3_lora.py: stock libraries give what our forward gives; what it writes and refuses."""

import contextlib
import copy
import io
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import Sam3Model, Sam3Processor, Sam3VideoConfig, Sam3VideoModel

import export_sam3_lora
from lora_layers import LoRAConfig
from sam3_lora import checkpoint
from sam3_lora.forward import Forward, predict_masks
from sam3_lora.model import image_size, load_model, num_queries, tokenize

pytestmark = pytest.mark.scripts  # whole exports

DEMO = Path(__file__).resolve().parents[1] / "demo" / "sam3_tiny"
TEXTS = ["cat", "a red bus"]
LORA = LoRAConfig(
    rank=3,
    alpha=5.0,
    dropout=0.1,
    target_modules=("q_proj", "v_proj", "o_proj", "fc1", "box_head.layer2"),
    components=(
        "vision_encoder",
        "text_encoder",
        "geometry_encoder",
        "detr_encoder",
        "detr_decoder",
        "mask_decoder",
    ),
)
CATEGORIES = {"cat": "cat", "bus|2": "a red bus"}
DESCRIPTION = {"categories": CATEGORIES, "step": 7, "metrics": {"ap": 0.5, "cgf1": None}}
DESCRIPTION |= {"thresholds": {"bus|2": 0.35}}


@pytest.fixture(scope="module")
def base(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model with livelier heads, so that every output moves, and its processor."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
    model, _ = load_model(str(folder))
    torch.manual_seed(1)
    for module in (model.detr_decoder.box_head, model.mask_decoder.mask_embedder):
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video_base(base, tmp_path_factory) -> Path:
    """The same detector with a small random tracker, in the hub's layout."""
    folder = tmp_path_factory.mktemp("video")
    detector = load_model(str(base))[0]
    width = 64
    tracker = {
        "model_type": "sam3_tracker_video",
        "vision_config": detector.config.vision_config.to_dict(),
        "image_size": image_size(detector),
        "prompt_encoder_config": {
            "hidden_size": width, "image_size": 112, "mask_input_channels": 4,
        },
        "mask_decoder_config": {
            "hidden_size": width, "mlp_dim": width, "num_hidden_layers": 1,
            "num_attention_heads": 2, "iou_head_hidden_dim": 32,
        },
        "memory_attention_hidden_size": width, "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": width,
        "memory_attention_rope_feat_sizes": [8, 8],
        "memory_encoder_hidden_size": width, "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": width, "memory_fuser_num_layers": 1,
        "memory_fuser_embed_dim": width, "memory_fuser_intermediate_dim": width,
    }  # fmt: skip
    config = Sam3VideoConfig(detector_config=detector.config.to_dict(), tracker_config=tracker)
    torch.manual_seed(2)
    model = Sam3VideoModel(config)
    model.detector_model.load_state_dict(detector.state_dict())
    model.save_pretrained(folder)
    Sam3Processor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base, save_random_adapter, tmp_path_factory) -> Path:
    """meta.pt and hf.pt of the tiny model, trained (as they say) with either geometry_cls."""
    folder = tmp_path_factory.mktemp("adapters")
    for cls in ("meta", "hf"):
        save_random_adapter(folder / f"{cls}.pt", base, LORA, 0.3, geometry_cls=cls, **DESCRIPTION)
    return folder


@pytest.fixture(scope="module")
def demo_adapters(adapters, save_random_adapter) -> None:
    """demo_meta.pt and demo_hf.pt beside them, of the demo model."""
    for cls in ("meta", "hf"):
        path = adapters / f"demo_{cls}.pt"
        about = {"geometry_cls": cls, **DESCRIPTION}
        save_random_adapter(path, DEMO, LoRAConfig(rank=4), 0.02, **about)


@pytest.fixture
def export(capsys):
    """Runs the script; returns (exit code, stdout, stderr)."""

    def call(*words):
        code = export_sam3_lora.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def exported(adapters, tmp_path_factory) -> Callable[..., Path]:
    """The folder that a command writes of an adapter, once for all tests."""

    @cache
    def call(command: str, adapter: str) -> Path:
        out = tmp_path_factory.mktemp("exported") / command
        words = [command, "--lora_weights", str(adapters / f"{adapter}.pt")]
        words += ["--license", "cc-by-4.0", "--output_dir", str(out)]
        assert export_sam3_lora.main(words) == 0
        return out

    return call


@pytest.fixture(scope="module")
def load_base(base) -> Callable[[str], tuple[Any, Any]]:
    """The base model of an adapter, and its tokenizer; read once, copied for each use."""
    read = cache(lambda demo: load_model(str(DEMO if demo else base)))

    def call(adapter: str) -> tuple[Any, Any]:
        model, tokenizer = read(adapter.startswith("demo"))
        return copy.deepcopy(model), tokenizer

    return call


@pytest.fixture(scope="module")
def ours(load_base, adapters) -> Callable[..., dict[str, torch.Tensor]]:
    """Outputs of our forward, one row an image, with an adapter or with its base alone."""

    @cache
    @torch.no_grad()
    def call(adapter: str, cls: str, without: bool = False) -> dict[str, torch.Tensor]:
        model, tokenizer = load_base(adapter)
        if not without:
            checkpoint.load_adapter(adapters / f"{adapter}.pt", model)
            model.eval()
        batch = {"images": images(model), "texts": TEXTS, "image_index": torch.arange(2)}
        outputs = Forward(model, tokenizer, cls)(batch)
        queries = torch.arange(num_queries(model))
        centre, size = outputs["boxes_cxcywh"][-1].split(2, dim=-1)
        return {
            "pred_logits": outputs["logits"][-1],
            "presence_logits": outputs["presence"][-1][:, None].clamp(-10, 10),
            "pred_boxes": torch.cat([centre - size / 2, centre + size / 2], dim=-1),
            "pred_masks": torch.stack([predict_masks(outputs, r, queries) for r in range(2)]),
        }

    return call


def images(model: Any) -> torch.Tensor:
    """Two images of noise, (2,3,S,S) uint8."""
    side, generator = image_size(model), torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, side, side), generator=generator).to(torch.uint8)


@torch.no_grad()
def stock(model: Any, tokenizer: Any, pixels: torch.Tensor, cls: str) -> dict[str, Any]:
    """The same of a stock model, fed alike: under `meta` with a padding box."""
    ids, mask = tokenize(tokenizer, TEXTS)
    box = {"input_boxes": torch.zeros(2, 1, 4), "input_boxes_labels": torch.full((2, 1), -10)}
    return model.eval()(
        pixel_values=(pixels.float() - 127.5) / 127.5,
        input_ids=ids,
        attention_mask=mask,
        **(box if cls == "meta" else {}),
    )


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Largest difference of each output, over its largest value where that is above 1: the demo
    model's mask logits reach 30, where fp32 alone steps by 2e-6."""
    names = ("pred_logits", "presence_logits", "pred_boxes", "pred_masks")
    scales = {name: max(1.0, float(one[name].abs().max())) for name in names}
    return {name: float((one[name] - other[name]).abs().max()) / scales[name] for name in names}


def stock_model(kind: str, base: Any, folder: Path) -> Any:
    """What a user of stock libraries loads, from the base model and an export."""
    if kind == "merged":
        return Sam3Model.from_pretrained(folder)
    if kind == "peft":
        return PeftModel.from_pretrained(base, folder)
    base.load_adapter(str(folder))
    return base


@pytest.mark.parametrize("adapter", ["meta", "hf", "demo_meta", "demo_hf"])
@pytest.mark.parametrize("kind", ["peft", "load_adapter", "merged"])
def test_stock_libraries_give_our_outputs(
    exported, load_base, ours, request, kind, adapter
) -> None:
    if adapter.startswith("demo"):
        request.getfixturevalue("demo_adapters")
    cls = adapter.removeprefix("demo_")
    base, tokenizer = load_base(adapter)
    pixels = images(base)
    model = stock_model(kind, base, exported("merge" if kind == "merged" else "peft", adapter))
    expected = ours(adapter, cls)
    assert max(differences(expected, stock(model, tokenizer, pixels, cls)).values()) <= 1e-5
    # The adapter moves every output by far more, or nothing would be proved.
    assert min(differences(expected, ours(adapter, cls, without=True)).values()) > 1e-4
    # And the token counts, or feeding both alike would not be needed.
    other = ours(adapter, {"meta": "hf", "hf": "meta"}[cls])
    assert differences(expected, other)["pred_masks"] > 1e-4


def test_merging_is_fp32_and_bf16_is_only_written(export, base, adapters, tmp_path) -> None:
    words = ["merge", "--lora_weights", adapters / "hf.pt", "--output_dir"]
    assert export(*words, tmp_path / "fp32")[0] == 0
    assert export(*words, tmp_path / "bf16", "--dtype", "bf16")[0] == 0
    full = Sam3Model.from_pretrained(tmp_path / "fp32", dtype="auto").state_dict()
    half = Sam3Model.from_pretrained(tmp_path / "bf16", dtype="auto").state_dict()
    assert full.keys() == half.keys()
    for name, tensor in full.items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor.to(half[name].dtype), half[name])
    name = "detr_decoder.layers.0.self_attn.q_proj"
    assert half[f"{name}.weight"].dtype == torch.bfloat16
    lora = torch.load(adapters / "hf.pt", weights_only=True)["lora"]
    delta = LORA.alpha / LORA.rank * (lora[f"{name}.lora_B"] @ lora[f"{name}.lora_A"])
    before = load_model(str(base))[0].get_parameter(f"{name}.weight")
    assert torch.equal(full[f"{name}.weight"], before + delta)
    for folder in ("fp32", "bf16"):
        assert Sam3Processor.from_pretrained(tmp_path / folder).tokenizer("cat") is not None


def test_video_model_holds_the_merged_detector_bit_for_bit(
    export, base, video_base, adapters, tmp_path
) -> None:
    words = ["merge", "--lora_weights", adapters / "hf.pt", "--output_dir"]
    assert export(*words, tmp_path / "image")[0] == 0
    code, _, err = export(*words, tmp_path / "video", "--video", "--model_name", video_base)
    assert code == 0, err
    assert export(*words, tmp_path / "alone", "--model_name", video_base)[0] == 0
    detector = Sam3Model.from_pretrained(tmp_path / "image").state_dict()
    before = Sam3VideoModel.from_pretrained(video_base).state_dict()
    whole, report = Sam3VideoModel.from_pretrained(tmp_path / "video", output_loading_info=True)
    assert not any(report.values())
    weights = whole.state_dict()
    assert weights.keys() == before.keys()
    for name, tensor in weights.items():
        own = name.removeprefix("detector_model.")
        assert torch.equal(tensor, detector[own] if own != name else before[name]), name
    # Nothing is merged twice, nor put on what it was merged into.
    for name in ("image", "video", "alone"):
        code, _, err = export(*words, tmp_path / "twice", "--model_name", tmp_path / name)
        assert code == 2 and "expected the base it was trained on" in err
    for folder in ("video", "alone"):
        weights = Sam3Model.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in detector.items())
    card = (tmp_path / "video" / "README.md").read_text(encoding="utf-8")
    assert "16 layers are adapted: the adapter also shifts what the tracker sees" in card
    assert Sam3Processor.from_pretrained(tmp_path / "video")


def test_video_needs_a_tracker(export, base, tiny_hub_dir, adapters, tmp_path) -> None:
    words = ["merge", "--lora_weights", adapters / "hf.pt", "--output_dir", tmp_path / "out"]
    for name, message in (
        (base, "expected SAM 3's video model, found the detector alone"),
        (tiny_hub_dir, "get a full copy"),
    ):
        code, printed, err = export(*words, "--video", "--model_name", name)
        assert (code, printed) == (2, "") and message in err
    assert not (tmp_path / "out").exists()


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card."""
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def run_snippet(folder: Path, where: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a card's Python as it is written, beside photo.jpg; returns what it prints."""
    (code,) = re.findall(r"```python\n(.*?)```", read_card(folder)[1], re.DOTALL)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(where / "photo.jpg")
    monkeypatch.chdir(where)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    return printed.getvalue()


@pytest.mark.parametrize("cls", ["meta", "hf"])
@pytest.mark.parametrize("command", ["peft", "merge"])
def test_the_card(exported, base, tmp_path, monkeypatch, command, cls) -> None:
    out = shutil.copytree(exported(command, cls), tmp_path / command)
    head, body = read_card(out)
    assert (head["license"], head["base_model"]) == ("cc-by-4.0", base.name)
    assert head["library_name"] == {"peft": "peft", "merge": "transformers"}[command]
    for text in (
        "| bus\\|2 | a red bus | 0.35 |",
        "| cat | cat | - |",
        "| ap | 0.5 |",
        "| cgf1 | undefined |",
        "| rank | 3 |",
        "| alpha | 5 |",
        f"`geometry_cls: {cls}`",
        f"`{base.name}`, a local folder",
    ):
        assert text in body, text
    assert ("--model_geometry_cls hf" in body) == ("input_boxes" in body) == (cls == "meta")
    # No path of this machine travels, whatever the base was.
    for path in out.iterdir():
        if path.suffix in (".md", ".json"):
            assert str(base.parent) not in path.read_text(encoding="utf-8")
    if command == "peft":
        config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == base.name
        shutil.copytree(base, tmp_path / base.name)
    assert run_snippet(out, tmp_path, monkeypatch).startswith("tensor([")


def write_metrics(path: Path, adapter: str, ap: float, split: str = "test", **more) -> Path:
    content = {"data": f"data/{split}", "split": split, "losses": {"loss": 1.0, "iou": 0.8}}
    content |= {"model": "some base", "adapter": adapter, "geometry_cls": "meta"}
    content |= {"segm": None, "bbox": {"AP": ap, "AP50": 0.9}, "cgf1": {"cgF1": None}}
    content |= {"false_positive_rate": 0.0, "prompt_with": "text", **more}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_measured_figures_stand_side_by_side_on_the_card(export, adapters, tmp_path) -> None:
    words = ["peft", "--lora_weights", adapters / "meta.pt", "--output_dir", tmp_path / "out"]
    own = checkpoint.adapter_fingerprint(checkpoint.read_adapter(adapters / "meta.pt"))
    words += ["--metrics", write_metrics(tmp_path / "a.json", own, 0.75)]
    stock_words = [
        "--stock_metrics",
        write_metrics(tmp_path / "b.json", own, 0.74, geometry_cls="hf"),
    ]
    code, _, err = export(*words[:-2], *stock_words)
    assert code == 2 and "--stock_metrics: expected --metrics" in err
    assert export(*words, *stock_words)[0] == 0
    _, body = read_card(tmp_path / "out")
    assert "|  | as trained, test | stock text-only call, test |" in body
    assert "| ap | 0.75 | 0.74 |" in body and "was not measured" not in body
    write_metrics(tmp_path / "b.json", own, 0.74, "val", geometry_cls="hf")
    code, _, err = export(*words, *stock_words)
    assert code == 2 and "expected evaluations of one split" in err
    tiled = {"losses": {}, "tile": 0.5}  # no tile has targets
    write_metrics(tmp_path / "b.json", own, 0.74, geometry_cls="hf", **tiled)
    code, _, err = export(*words, *stock_words)
    assert code == 2 and "data/test and data/test, tiles of 0.5" in err
    write_metrics(tmp_path / "a.json", own, 0.75, prompt_with="both", **tiled)
    assert export(*words)[0] == 0
    _, body = read_card(tmp_path / "out")
    assert "| as trained, test, asked with both, tiles of 0.5 |" in body
    assert "| ap | 0.75 |" in body and "| loss |" not in body
    (tmp_path / "b.json").write_text("{}", encoding="utf-8")
    code, _, err = export(*words, *stock_words)
    assert code == 2 and "--stock_metrics: expected metrics.json of evaluate_sam3_lora.py" in err


@pytest.mark.parametrize("flag, tested", [("metrics", None), ("stock", "own")])
def test_figures_of_something_else_are_refused(export, adapters, tmp_path, flag, tested) -> None:
    """Of the base; of the stock call those of an evaluation as trained."""
    own = checkpoint.adapter_fingerprint(checkpoint.read_adapter(adapters / "meta.pt"))
    words = ["--lora_weights", adapters / "meta.pt", "--output_dir", tmp_path / "out"]
    words += ["--metrics", write_metrics(tmp_path / "a.json", {"own": own}.get(tested), 0.75)]
    words += ["--stock_metrics", write_metrics(tmp_path / "b.json", own, 0.74)]
    code, _, err = export("peft", *words)
    assert code == 2 and f"--{flag}" in err and "expected an evaluation of this adapter" in err
    assert "found one of some base with meta in" in err and not (tmp_path / "out").exists()


def test_ours_to_peft_to_ours_is_bit_for_bit(export, exported, base, adapters, tmp_path) -> None:
    words = ["import", "--source", exported("peft", "meta"), "--model_name", base]
    back = tmp_path / "back.pt"
    code, _, err = export(*words, "--output", back)
    assert code == 0, err
    first, last = (torch.load(p, weights_only=True) for p in (adapters / "meta.pt", back))
    for name, tensor in first.pop("lora").items():
        assert torch.equal(tensor, last["lora"].pop(name))
    assert last.pop("lora") == {} and first == last


def test_nothing_is_lost_in_the_output(export, adapters, tmp_path) -> None:
    out = tmp_path / "out"
    words = ["peft", "--lora_weights", adapters / "hf.pt", "--output_dir", out]
    assert export(*words)[0] == 0
    code, _, err = export(*words)
    assert code == 0 and "renamed to" in err and (tmp_path / "out.1" / "README.md").is_file()
    assert export(*words, "--overwrite")[0] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.1"}
    (out / "README.md").unlink()
    code, _, err = export(*words, "--overwrite")
    assert code == 2 and "--overwrite: expected an earlier export" in err
    assert "found other files; name another place, or leave it out" in err
    code, _, err = export(*words[:-1], adapters)
    assert code == 2 and "holds files in use" in err
    code, _, err = export(*words[:-1], out / "adapter_config.json", "--overwrite")
    assert code == 2 and "--overwrite: expected an earlier export" in err
    assert list(tmp_path.glob(".*")) == []


def test_nothing_is_lost_at_a_file(export, adapters, tmp_path) -> None:
    words = ["import", "--source", adapters / "hf.pt", "--output", tmp_path / "a.pt"]
    assert export(*words)[0] == 0
    assert "renamed to" in export(*words)[2] and (tmp_path / "a.pt.1").is_file()
    assert export(*words, "--overwrite")[0] == 0 and not (tmp_path / "a.pt.2").exists()
    code, _, err = export(*words[:-1], tmp_path / "a")
    assert code == 2 and "--output: expected a file name that ends in .pt" in err
    assert list(tmp_path.glob(".*")) == []


def bad_run(kind: str, adapters: Path, base: Path, folder: Path) -> tuple[list, str]:
    """A command that must be refused, and the words of the refusal."""
    merge = ["merge", "--output_dir", folder / "out", "--lora_weights"]
    take = ["import", "--output", folder / "out.pt", "--model_name", base, "--source"]
    content = torch.load(adapters / "hf.pt", weights_only=True)
    own = folder / "own.pt"
    sam3, sam31 = folder / "sam3.pt", folder / "sam3.1_multiplex.pt"
    torch.save({"detector.backbone.x.weight": torch.zeros(1)}, sam3)
    torch.save({"x": torch.zeros(1)}, sam31)
    torch.save({"detector.backbone.vision_backbone.propagation_convs.0": torch.zeros(1)}, own)
    if kind in ("base", "import base"):
        content["base_fingerprint"] = "0" * 16
        torch.save(content, own)
    if kind == "rank":
        content["lora_config"]["rank"] = 4
        torch.save(content, own)
    if kind == "missing":
        content["lora"].popitem()
        torch.save(content, own)
    hf = adapters / "hf.pt"
    return {
        "base": ([*merge, own], "expected the base it was trained on"),
        "import base": ([*take, own], "expected the base it was trained on"),
        "rank": ([*merge, own], "misshapen .* where the model has"),
        "missing": ([*take, own], "1 layers with A or B alone"),
        "sam3.pt as source": ([*take, sam3], "Meta's own sam3.pt, a whole model"),
        "sam3.1 as source": ([*take, sam31], "of SAM 3.1, another model; name the adapter"),
        "3.1 by its keys": ([*take, own], "is a SAM 3.1 checkpoint"),
        "sam3.pt as base": ([*merge, hf, "--model_name", sam3], "Meta's own sam3.pt is another"),
        "sam3.1 as base": ([*merge, hf, "--model_name", sam31], "is SAM 3.1, whose weights do"),
        "private": ([*merge, hf, "--private"], "--private: expected --push_to_hub"),
        "repository": ([*merge, hf, "--push_to_hub", "a/b/c"], "--push_to_hub: expected USER/NAME"),
    }[kind]


KINDS = ["base", "import base", "rank", "missing", "sam3.pt as source", "sam3.1 as source"]
KINDS += ["3.1 by its keys", "sam3.pt as base", "sam3.1 as base", "private", "repository"]


@pytest.mark.parametrize("kind", KINDS)
def test_refusals_are_one_line_and_write_nothing(export, adapters, base, tmp_path, kind) -> None:
    words, message = bad_run(kind, adapters, base, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    code, printed, err = export(*words)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, printed, len(errors)) == (2, "", 1) and "Traceback" not in err
    assert re.search(message, errors[0])
    assert {path.name for path in tmp_path.iterdir()} == before
