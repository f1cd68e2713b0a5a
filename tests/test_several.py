"""Several adapters on one base: blends, routes, and what inference.py makes of them."""

import json
import logging
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inference
from lora_layers import (
    LoRAConfig,
    apply_lora,
    blend_lora,
    load_lora_state_dict,
    lora_modules,
    lora_state_dict,
    remove_lora,
)
from sam3_lora import checkpoint, prediction
from sam3_lora.forward import Forward
from sam3_lora.model import load_model
from sam3_lora.prediction import Prompts, choose_model, find, plan_routes, read_texts, share_out
from sam3_lora.prompts import parse_route

# They differ in rank, scaling, targets and components, and share some layers.
CONFIGS = {
    "cracks": LoRAConfig(2, 4.0, 0.5, ("q_proj", "v_proj"), ("vision_encoder", "detr_decoder")),
    "leaks": LoRAConfig(3, 3.0, 0.0, ("v_proj", "fc1"), ("text_encoder", "detr_decoder")),
    "rust": LoRAConfig(1, 2.0, 0.0, ("fc2",), ("detr_decoder",)),
}
PHRASES = {
    "cracks": {"crack_1": "crack", "both": "both"},
    "leaks": {"oil_leak": "oil leak", "both": "both"},
    "rust": {},
}
PROMPTS = Prompts(["crack", "rusty", "oil leak", "car", "both"], [[10.0, 8, 50, 40]], [0])
BLENDS = [{"cracks": 1.0}, {"rust": 1.0}, {"leaks": 1.0}, {}, {"leaks": -0.25, "cracks": 1.5}]


@pytest.fixture(scope="module")
def adapters(loaded, tmp_path_factory) -> dict[str, dict]:
    """Three adapters with random updates, as inference.py reads them."""
    folder, model = tmp_path_factory.mktemp("runs"), deepcopy(loaded[0])
    torch.manual_seed(0)
    found = {}
    for name, config in CONFIGS.items():
        apply_lora(model, config)
        for _, layer in lora_modules(model):
            layer.lora_B.data.normal_(std=1.0)
        path = folder / name / "best_model" / "lora_weights.pt"
        description = {"base_model": "no/such/base", "geometry_cls": "meta"}
        description |= {"categories": PHRASES[name], "step": 1, "metrics": {}}
        checkpoint.save_adapter(path, model, config, **description)
        remove_lora(model)
        found[name] = {**checkpoint.read_adapter(path), "path": path}
    return found


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture
def forward(loaded) -> Forward:
    """The base, which a test may change."""
    return Forward(deepcopy(loaded[0]), loaded[1])


def parts_of(adapters: dict, *names: str) -> list[tuple]:
    return [(adapters[name]["lora_config"], adapters[name]["lora"]) for name in names]


def updates(model, config: LoRAConfig, state: dict) -> dict[str, torch.Tensor]:
    """The update of each layer that an adapter has."""
    apply_lora(model, config)
    load_lora_state_dict(model, state)
    found = {name: layer.delta_weight().detach() for name, layer in lora_modules(model)}
    remove_lora(model)
    return found


def merge_by_hand(model, adapters: dict, weights: dict[str, float]) -> None:
    """Adds weighted updates to the base weights."""
    with torch.no_grad():
        for name, weight in weights.items():
            for layer, update in updates(model, *parts_of(adapters, name)[0]).items():
                model.get_submodule(layer).weight += weight * update


def keep_all(forward: Forward, photo: np.ndarray, prompts: Prompts, max_rows: int = 8) -> dict:
    """Every detection."""
    return find(forward, photo, prompts, [0.0] * len(prompts.texts), max_rows)[0]


# Blends -------------------------------------------------------------------------------------------


def test_a_blend_is_the_weighted_sum_of_its_updates(forward, adapters) -> None:
    weights = dict(zip(adapters, (0.7, -0.3, 2.0), strict=True))
    config, state = blend_lora(parts_of(adapters, *adapters), list(weights.values()))
    assert (config.rank, config.alpha, config.dropout) == (6, 6.0, 0.0)
    found = updates(forward.model, config, state)
    single = {n: updates(forward.model, *parts_of(adapters, n)[0]) for n in adapters}
    assert found.keys() == {layer for own in single.values() for layer in own}
    assert any(layer in single["cracks"] and layer in single["leaks"] for layer in found)
    assert not single["rust"].keys() & single["cracks"].keys()
    for layer, update in found.items():
        own = [weights[n] * single[n][layer] for n in adapters if layer in single[n]]
        torch.testing.assert_close(update, sum(own), rtol=1e-5, atol=1e-6)


def test_a_blend_of_one_is_that_adapter(forward, adapters) -> None:
    [(config, state)] = parts_of(adapters, "leaks")
    blended, tensors = blend_lora([(config, state)], [1.0])
    expected = updates(forward.model, config, state)
    found = updates(forward.model, blended, tensors)
    assert list(found) == list(expected)
    assert all(torch.allclose(found[n], expected[n], atol=1e-7) for n in expected)
    assert torch.equal(tensors[f"{next(iter(found))}.lora_A"], next(iter(state.values())))


# Routes -------------------------------------------------------------------------------------------


@pytest.mark.scripts
@pytest.mark.parametrize("boxed", [False, True])
def test_routes_in_one_run_equal_runs_by_themselves(
    loaded, forward, adapters, photo, boxed
) -> None:
    prompts = PROMPTS if boxed else Prompts(PROMPTS.texts, [], [])
    routes = plan_routes(forward, BLENDS, adapters)
    routed = Prompts(prompts.texts, prompts.boxes_xyxy, prompts.labels, routes)
    read_texts(forward, routed)
    first, again = (keep_all(forward, photo, routed, max_rows=1) for _ in range(2))
    assert np.array_equal(first["category_id"], again["category_id"])
    assert np.array_equal(first["score"], again["score"])
    assert set(first["category_id"]) == {1, 2, 3, 4, 5}
    assert (np.diff(first["score"]) <= 0).all()
    for row, weights in enumerate(BLENDS):
        alone = Forward(deepcopy(loaded[0]), loaded[1])
        merge_by_hand(alone.model, adapters, weights)
        one = Prompts([prompts.texts[row]], prompts.boxes_xyxy, prompts.labels)
        expected = keep_all(alone, photo, one)
        found = prediction.take(first, np.flatnonzero(first["category_id"] == row + 1))
        assert len(found["score"]) == len(expected["score"]) > 0
        np.testing.assert_allclose(found["score"], expected["score"], atol=1e-6)
        np.testing.assert_allclose(found["boxes_xyxy"], expected["boxes_xyxy"], atol=1e-3)
        base = keep_all(Forward(*loaded), photo, one)["score"]
        assert (np.abs(base - expected["score"]).max() > 2e-5) == bool(weights)


def test_the_base_route_leaves_the_base_bit_by_bit(loaded, forward, adapters, photo) -> None:
    routes = plan_routes(forward, [{"cracks": 0.5}, {}], adapters)
    for route in routes:
        prediction.switch(forward, route)
    before = loaded[0].state_dict()
    assert all(torch.equal(v, before[k]) for k, v in forward.model.state_dict().items())
    prediction.switch(forward, routes[0])
    assert not any(p.requires_grad for p in forward.model.parameters())
    assert not any(module.training for module in forward.model.modules())


def test_below_fp32_the_update_stays_beside_the_weights(forward, adapters) -> None:
    forward.dtype = torch.bfloat16
    [route] = plan_routes(forward, [{"rust": 1.0}], adapters)
    prediction.switch(forward, route)
    layers = [layer for _, layer in lora_modules(forward.model)]
    assert layers and not any(layer.merged for layer in layers)
    assert all(layer.lora_B.dtype == torch.float32 for layer in layers)
    state = lora_state_dict(forward.model)
    assert all(torch.equal(state[name], value) for name, value in route.adapter[1].items())


@pytest.mark.scripts
def test_changes_and_vision_passes_are_as_few_as_can_be(
    forward, adapters, photo, monkeypatch
) -> None:
    routes = plan_routes(forward, BLENDS, adapters)
    prompts = Prompts(PROMPTS.texts, [], [], routes)
    read_texts(forward, prompts)
    calls = []
    spied = ((prediction, "remove_lora"), (prediction, "apply_lora"), (Forward, "encode_trunk"))
    for owner, name in spied:
        real = getattr(owner, name)
        spy = lambda *args, name=name, real=real: calls.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(owner, name, spy)
    for _ in range(3):
        keep_all(forward, photo, prompts)
    # Of the five routes two adapt the vision tower; each image begins with the one that is on.
    assert calls.count("encode_trunk") == 3 * 3
    assert calls.count("remove_lora") == 3 * 4
    assert calls.count("apply_lora") == sum(map(bool, BLENDS))


def test_one_route_serves_the_prompts_of_one_blend(forward, adapters) -> None:
    blends = [{"cracks": 0.5, "leaks": 0.5}, {}, {"leaks": 0.5, "cracks": 0.5}, {"cracks": 0.5}]
    assert [r.rows for r in plan_routes(forward, blends, adapters)] == [[0, 2], [1], [3]]


def test_prompts_go_to_those_that_were_trained_on_them(adapters, caplog) -> None:
    caplog.set_level(logging.INFO)
    wanted = {"rusty": {"rust": 2.0, "base": 1.0}, "dog": {"base": 1.0}}
    asked = ["oil_leak", "crack", "both", "rusty", "dog", "car", "oil leak"]
    texts, blends = share_out(asked, wanted, adapters)
    assert texts == ["oil leak", "crack", "both", "rusty", "dog", "car"]
    half = {"cracks": 0.5, "leaks": 0.5}
    assert blends == [{"leaks": 1.0}, {"cracks": 1.0}, half, {"rust": 2.0}, {}, {}]
    log = caplog.text
    assert "prompt 'oil_leak': the adapter was trained with 'oil leak', which is used" in log
    assert "prompt 'both' goes to 0.5 x cracks + 0.5 x leaks" in log
    assert "prompt 'dog' goes to the base model alone" in log
    assert "prompt 'car' goes to the base model alone" in log
    assert "not among" not in log  # the base alone answers; what rust was trained on is not known
    # A class name is the phrase of the adapter that answers, not of another.
    texts, _ = share_out(["oil_leak"], {"oil_leak": {"cracks": 1.0}}, adapters)
    assert texts == ["oil_leak"]
    told = "'oil_leak': not among the prompts that cracks was trained on (crack, both); "
    assert told in caplog.text
    # The same words by two ways stay two prompts.
    texts, blends = share_out(["oil_leak", "oil leak"], {"oil leak": {"base": 1.0}}, adapters)
    assert (texts, blends) == (["oil leak"] * 2, [{"leaks": 1.0}, {}])
    assert share_out(["car"], {}, {}) == (["car"], [{}])
    only = {"base": adapters["rust"]}  # of a run in a folder of that name
    assert share_out(["car"], {}, only) == (["car"], [{"base": 1.0}])


def test_prompts_that_no_training_knew_are_named_once(adapters, caplog) -> None:
    caplog.set_level(logging.INFO)
    phrases = {name: f"{name} thing" for name in "abcdefgh"}
    only = {"own": {"categories": phrases}}
    assert share_out(["A", "x", "B Thing", "y"], {}, only)[0] == ["a thing", "x", "b thing", "y"]
    named = "a thing, b thing, c thing, d thing, e thing, f thing, ... and 2 more"
    told = f"'x', 'y': not among the prompts that own was trained on ({named}); what the base"
    assert caplog.text.count(told) == 1
    caplog.clear()
    share_out(["visual", "a"], {}, only)  # an example box alone has no words
    share_out(["x"], {}, {"own": {}})
    assert "not among" not in caplog.text
    # A phrase with a comma is one prompt.
    share_out(["nut, bolt"], {}, {"own": {"categories": {"nut": "nut, bolt"}}})
    assert "comma" not in caplog.text
    share_out(["nut, long bolt"], {}, {})
    assert 'are separate words: --text_prompt nut "long bolt"' in caplog.text


def test_adapters_of_two_kinds_are_refused(adapters) -> None:
    configured = {"name": "facebook/sam3", "geometry_cls": "meta"}
    assert choose_model(configured, {}, {}) == ("facebook/sam3", "meta")
    assert choose_model(configured, {}, adapters) == ("no/such/base", "meta")
    other = adapters | {"x": adapters["rust"] | {"geometry_cls": "hf"}}
    with pytest.raises(ValueError, match=r"one geometry_cls, found cracks: meta, .*, x: hf; choo"):
        choose_model(configured, {}, other)
    flags = {"model_geometry_cls": "meta"}
    assert choose_model(configured, flags, other) == ("no/such/base", "meta")
    other = adapters | {"x": adapters["rust"] | {"base_fingerprint": "0" * 16}}
    with pytest.raises(ValueError, match=r"one base, found .*, x: no/such/base \(0000000000000000"):
        choose_model(configured, flags, other)


def test_an_adapter_that_does_not_fit_is_named(forward, adapters) -> None:
    bad = adapters["rust"] | {"lora": {}}
    with pytest.raises(
        ValueError, match="--lora_weights, bad: .*the adapter does not fit the model"
    ):
        plan_routes(forward, [{}], adapters | {"bad": bad})


# The command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=b:0.7,c:-1e-1", ("a", {"b": 0.7, "c": -0.1})),
        (" a  b =c", ("a b", {"c": 1.0})),
        ("x=1=c:0", ("x=1", {"c": 0.0})),
    ],
)
def test_a_route_is_read(word, expected) -> None:
    assert parse_route(word) == expected


@pytest.mark.parametrize(
    "word", ["a", "=b", "a=", "a=b:", "a=b:x", "a=b,c", "a=b:1,b:2", "a=b:nan", "a=b:11", "a=:1"]
)
def test_a_wrong_route_is_refused(word) -> None:
    with pytest.raises(
        Exception, match=rf"expected 'TEXT=NAME' or .* found {re.escape(repr(word))}"
    ):
        parse_route(word)


def test_names_of_adapters(adapters, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = adapters["rust"]["path"].read_bytes()
    paths = ["a/best_model", "b/last_model", "c/checkpoint-5", "lr=1e-4/best_model", "d.v2"]
    for name in paths:
        Path(name).mkdir(parents=True)
        (Path(name) / "lora_weights.pt").write_bytes(content)
    Path("e.pt").write_bytes(content)
    words = ["a/best_model", "b/last_model/lora_weights.pt", "c/checkpoint-5", "lr=1e-4/best_model"]
    words += ["d.v2", "e.pt", "x=lr=1e-4/best_model"]
    found = inference.read_adapters(words, routed=True)
    assert list(found) == ["a", "b", "checkpoint-5", "lr=1e-4", "d.v2", "e", "x"]
    assert [found[n]["path"] for n in ("lr=1e-4", "x")] == [Path("lr=1e-4/best_model")] * 2
    assert list(inference.read_adapters(["base=e.pt"], routed=False)) == ["base"]
    with pytest.raises(ValueError, match="none of them base, found 'base'"):
        inference.read_adapters(["base=e.pt"], routed=True)
    for wrong, shown in (
        (["a/best_model", "a=e.pt"], "found 'a' for e.pt; give another by NAME=e.pt"),
        (["base=e.pt", "e.pt"], "none of them base, found 'base'"),
        (["=e.pt"], "found '' for e.pt"),
        (["no/lr=1/f.pt"], "found nothing at no/lr=1/f.pt"),
        (["n=f.pt"], "found nothing at f.pt"),
        (["n="], "found nothing at n="),
    ):
        with pytest.raises(ValueError, match=re.escape(shown)):
            inference.read_adapters(wrong, routed=False)


@pytest.fixture
def run(tiny_model_dir, tmp_path, photo, capsys):
    """Runs the script on a photo; returns (exit code, stdout, stderr, detections)."""
    Image.fromarray(photo).save(tmp_path / "photo.png")

    def call(*words):
        argv = ["--image", tmp_path / "photo.png", "--output", tmp_path / "r.png", *words]
        code = inference.main(list(map(str, [*argv, "--device", "cpu", "--threshold", 0])))
        printed, target = capsys.readouterr(), tmp_path / "r_detections.json"
        rows = json.loads(target.read_text(encoding="utf-8")) if target.exists() else []
        return code, printed.out, printed.err, rows

    return call


@pytest.fixture
def words(adapters, tiny_model_dir, tmp_path) -> dict[str, list[str]]:
    """Adapters of the random base on disk: the flag with both, and with each."""
    base, _ = load_model(str(tiny_model_dir))
    paths = {}
    for name in ("cracks", "leaks"):
        content = torch.load(adapters[name]["path"], weights_only=True)
        content |= {"base_model": str(tiny_model_dir)}
        content |= {"base_fingerprint": checkpoint.fingerprint(base)}
        paths[name] = tmp_path / f"{name}.pt"
        torch.save(content, paths[name])
    flag = {name: ["--lora_weights", str(path)] for name, path in paths.items()}
    return {"both": ["--lora_weights", *map(str, paths.values())], **flag}


def test_a_run_with_two_adapters_equals_two_runs(run, words, tiny_model_dir, monkeypatch) -> None:
    loads = []
    real = inference.load_forward
    monkeypatch.setattr(inference, "load_forward", lambda *a: loads.append(a) or real(*a))
    asked = ["--text_prompt", "crack_1", "oil leak", "crack", "car"]
    routes = ["--route", "crack=base", "car=cracks:0.5,leaks:0.5"]
    code, out, err, rows = run(*words["both"], *asked, *routes)
    assert code == 0 and len(loads) == 1, err
    names = ["crack", "oil leak", "crack", "car"]
    counts = [sum(row["category_id"] == i for row in rows) for i in (1, 2, 3, 4)]
    shown = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    assert f"photo.png: {shown}, best score" in out
    for line in ("'crack_1' goes to 1 x cracks", "'oil leak' goes to 1 x leaks"):
        assert line in err
    base = ["--model_name", str(tiny_model_dir)]
    for category, flags in ((1, words["cracks"]), (2, words["leaks"]), (3, base)):
        _, _, err, alone = run(*flags, "--text_prompt", names[category - 1])
        assert "goes to" not in err
        own = [row for row in rows if row["category_id"] == category]
        assert len(own) == len(alone) > 0
        for found, expected in zip(own, alone, strict=True):
            assert found["prompt"] == expected["prompt"]
            assert found["score"] == pytest.approx(expected["score"], abs=1e-6)
            assert found["bbox"] == pytest.approx(expected["bbox"], abs=1e-3)


REFUSED = {
    "adapter": (
        ["--route", "a=x"],
        r"prompts 'a', 'b' and the adapters cracks, leaks, base, found 'x'",
    ),
    "prompt": (["--route", "c=cracks"], "found 'c'; an adapter gets a name by"),
    "twice": (
        ["--route", "a=cracks", "a=leaks"],
        "expected one for each prompt, found more for 'a'",
    ),
    "weight": (["--route", "a=cracks:much"], "argument --route: expected 'TEXT=NAME'"),
    "compiled": (
        ["--use_compile", "--route", "a=base", "b=cracks"],
        "--use_compile: expected all prompts to go one way, found several",
    ),
    "name": (["--lora_weights", "base=x.pt"], "different names, none of them base, found 'base'"),
    "missing": (["--lora_weights", "x=y.pt"], "expected an adapter file, found nothing at y.pt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_words_are_refused_before_the_base_is_looked_for(
    run, adapters, tmp_path, case
) -> None:
    extra, message = REFUSED[case]
    paths = [str(adapters[name]["path"].parent) for name in ("cracks", "leaks")]
    code, out, err, rows = run("--lora_weights", *paths, "--text_prompt", "a", "b", *extra)
    assert (code, out, rows) == (2, "", [])
    [error] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(message, error) and "no/such/base" not in error
