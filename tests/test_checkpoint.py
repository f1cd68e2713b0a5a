"""Adapter files and checkpoints: what comes back, what is refused, what a crash leaves."""

import os
import pickle
import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from lora_layers import (
    AdapterError,
    LoRAConfig,
    LoRALinear,
    apply_lora,
    lora_modules,
    lora_state_dict,
)
from sam3_lora.checkpoint import (
    ADAPTER_FILE,
    STATE_FILE,
    checkpoints,
    fingerprint,
    load_adapter,
    read_adapter,
    read_checkpoint,
    remove_old_checkpoints,
    restore_rng,
    rng_state,
    save_adapter,
    save_checkpoint,
)
from sam3_lora.files import set_aside
from sam3_lora.forward import Forward

LORA = LoRAConfig(
    rank=2,
    alpha=4.0,
    target_modules=("q_proj", "fc1"),
    components=("vision_encoder", "detr_decoder"),
)
DESCRIPTION = {
    "base_model": "somewhere/sam3",
    "geometry_cls": "hf",
    "categories": {"bottle_cap": "red metal cap"},
    "step": 12,
    "metrics": {"ap": 0.25, "cgf1": None},
}


@pytest.fixture
def base(loaded):
    return deepcopy(loaded[0])


@pytest.fixture(scope="module")
def trained(loaded):
    """An adapted model with random weights."""
    model = deepcopy(loaded[0])
    torch.manual_seed(0)
    apply_lora(model, LORA)
    for _, module in lora_modules(model):
        module.lora_B.data.normal_(std=0.1)
    return model


@pytest.fixture
def file(trained, tmp_path):
    path = tmp_path / "run" / "best_model" / ADAPTER_FILE
    save_adapter(path, trained, LORA, **DESCRIPTION)
    return path


def outputs(loaded, model):
    generator = torch.Generator().manual_seed(0)
    batch = {
        "images": torch.randint(0, 256, (1, 3, 112, 112), generator=generator).to(torch.uint8),
        "texts": ["cat", "dog"],
        "image_index": torch.tensor([0, 0]),
    }
    with torch.no_grad():
        return Forward(model, loaded[1])(batch)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# The adapter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_folder", [False, True])
def test_round_trip(loaded, trained, base, file, by_folder):
    expected = outputs(loaded, trained)
    assert not torch.equal(outputs(loaded, base)["logits"], expected["logits"])
    content = load_adapter(file.parent if by_folder else file, base)
    found = outputs(loaded, base)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert content["lora_config"] == LORA
    assert {name: content[name] for name in DESCRIPTION} == DESCRIPTION
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trainable == set(content["lora"])


def test_the_file_is_plain_data_and_holds_the_adapter_alone(trained, file):
    content = torch.load(file, weights_only=True)
    assert content["format"] == "sam3-lora-adapter" and content["version"] == 1
    assert content["lora_config"]["target_modules"] == ["q_proj", "fc1"]
    assert content["lora"].keys() == lora_state_dict(trained).keys()
    size = 4 * sum(value.numel() for value in content["lora"].values())
    assert file.stat().st_size < 3 * size
    assert [p.name for p in file.parent.iterdir()] == [ADAPTER_FILE]  # no scratch left


def test_saving_replaces_an_older_file(trained, file):
    save_adapter(file, trained, LORA, **DESCRIPTION | {"step": 13})
    assert read_adapter(file)["step"] == 13


def test_a_whole_number_is_as_good_an_alpha(trained, file):
    save_adapter(file, trained, replace(LORA, alpha=4), **DESCRIPTION)
    assert read_adapter(file)["lora_config"] == LORA


def test_a_fingerprint_belongs_to_a_base(base, trained):
    name = fingerprint(base)
    assert len(name) == 16 and int(name, 16) >= 0
    assert fingerprint(trained) == name  # adapters leave it
    base.detr_decoder.query_embed.weight.data[0, 0] += 1e-6
    assert fingerprint(base) != name


# What is refused ----------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled by a loader that allows code."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def change(file, **changes):
    """Rewrites an adapter file with some entries replaced; None removes one."""
    content = torch.load(file, weights_only=True) | changes
    torch.save({k: v for k, v in content.items() if v is not None}, file)


def tampered(file, name):
    """The adapter's tensors with one fault."""
    tensors = torch.load(file, weights_only=True)["lora"]
    first = next(iter(tensors))
    if name == "shape":
        tensors[first] = torch.zeros(5, 7)
    elif name == "missing":
        del tensors[first]
    elif name == "renamed":
        tensors["detr_decoder.elsewhere.lora_A"] = tensors.pop(first)
    return tensors


def with_lora(**changes):
    return lambda file: change(
        file, lora_config=torch.load(file, weights_only=True)["lora_config"] | changes
    )


REFUSED = {
    "missing": (lambda file: file.unlink(), "found nothing at .*lora_weights.pt"),
    "PEFT's": (
        lambda file: file.rename(file.with_name("adapter_config.json")),
        "is PEFT's: run `python export_sam3_lora.py import",
    ),
    "another file": (
        lambda file: torch.save({"weight": torch.zeros(2)}, file),
        "expected an adapter written by train_sam3_lora.py, found another .pt file",
    ),
    "a bare tensor": (lambda file: torch.save(torch.zeros(2), file), "found another .pt file"),
    "not torch's": (
        lambda file: file.write_text('{"format": "sam3-lora-adapter"}'),
        "found one that cannot be read safely",
    ),
    "empty": (lambda file: file.write_bytes(b""), "found one that cannot be read safely"),
    "truncated": (
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "found one that cannot be read safely",
    ),
    "nearly whole": (
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        "found one that cannot be read safely",
    ),
    "later version": (
        lambda file: change(file, version=2),
        "expected adapter version <= 1, found 2; update this project",
    ),
    "no version": (lambda file: change(file, version=None), "lora_weights.pt: .*version"),
    "no tensors": (lambda file: change(file, lora=None), "lora_weights.pt: .*lora"),
    "no fingerprint": (
        lambda file: change(file, base_fingerprint=None),
        "lora_weights.pt: .*base_fingerprint",
    ),
    "unknown setting": (with_lora(bias="all"), "lora_weights.pt: .*bias"),
    "rank as text": (with_lora(rank="2"), "lora_weights.pt: .*rank"),
    "rank 0": (with_lora(rank=0), r"lora\.rank: expected an integer >= 1, found 0"),
    "other rank": (with_lora(rank=3), r"\d+ misshapen .* \(2, 64\) where the model has \(3, 64\)"),
    "other targets": (with_lora(target_modules=["fc1"]), r"does not fit the model: \d+ unexpected"),
    "other component": (with_lora(components=["tracker"]), "found tracker"),
    "shape": (
        lambda file: change(file, lora=tampered(file, "shape")),
        r"1 misshapen \(.*lora_A \(5, 7\) where the model has \(2, 64\)\)",
    ),
    "a tensor gone": (
        lambda file: change(file, lora=tampered(file, "missing")),
        r"does not fit the model: 1 missing \(vision_encoder.*lora_A\)",
    ),
    "a tensor renamed": (
        lambda file: change(file, lora=tampered(file, "renamed")),
        r"1 missing \(.*\); 1 unexpected \(detr_decoder.elsewhere.lora_A\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_file_leaves_the_model_as_it_was(base, file, case):
    spoil, message = REFUSED[case]
    spoil(file)
    before = snapshot(base)
    with pytest.raises(AdapterError, match=message):
        load_adapter(file, base)
    assert_unchanged(base, before)


def test_code_in_a_file_is_not_run(base, file, tmp_path):
    witness = tmp_path / "witness"
    content = torch.load(file, weights_only=True)
    spoilt = content | {"metrics": Evil(f"touch {witness}")}
    before = snapshot(base)
    for write in (lambda: torch.save(spoilt, file), lambda: file.write_bytes(pickle.dumps(spoilt))):
        write()
        with pytest.raises(AdapterError, match="found one that cannot be read safely"):
            load_adapter(file, base)
        assert_unchanged(base, before)
        assert not witness.exists()
    pickle.loads(file.read_bytes())  # what a careless loader would have done
    assert witness.exists()


def test_another_base_is_refused(base, file):
    base.detr_decoder.reference_points.weight.data += 1
    before = snapshot(base)
    with pytest.raises(AdapterError) as error:
        load_adapter(file, base)
    message = str(error.value)
    assert "expected the base it was trained on, somewhere/sam3" in message
    assert torch.load(file, weights_only=True)["base_fingerprint"] in message
    assert fingerprint(base) in message and "--model_name" in message
    assert_unchanged(base, before)


def test_an_adapted_model_is_refused_and_keeps_its_adapter(file, trained):
    model = deepcopy(trained)
    before = snapshot(model)
    with pytest.raises(AdapterError, match="adapted already"):
        load_adapter(file, model)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a",
        b"\x80\x02.",
        b"\x80\x02}q\x00.",
        b"rank: 8\n",
        b"\x00" * 64,
        b"a" * 300,
        b"(((",
        b"c\n",
    ],
)
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "other.pt"
    path.write_bytes(data)
    with pytest.raises(AdapterError, match="other.pt: expected"):
        read_adapter(path)


# Checkpoints --------------------------------------------------------------------------------------


def adapter_of(trained):
    return {"model": trained, "lora": LORA, **DESCRIPTION}


def test_checkpoint_round_trip(trained, base, tmp_path):
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    kept = {name: value.clone() for name, value in lora_state_dict(trained).items()}
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "best": [0.5, -1.0], "figure": None}
    random.seed(5)
    torch.manual_seed(5)
    random.gauss(0, 1)  # half a pair is kept inside
    state["rng"] = rng_state()
    folder = save_checkpoint(tmp_path / "run", 30, state, adapter_of(trained))
    expected = random.random(), random.gauss(0, 1), torch.rand(4)
    assert folder == tmp_path / "run" / "checkpoint-30"
    assert sorted(p.name for p in folder.iterdir()) == [ADAPTER_FILE, STATE_FILE]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-30"]

    found = read_checkpoint(folder)
    assert (found["step"], found["best"], found["figure"]) == (30, [0.5, -1.0], None)
    torch.rand(100)
    random.seed(77)
    restore_rng(found["rng"])
    again = random.random(), random.gauss(0, 1), torch.rand(4)
    assert again[:2] == expected[:2] and torch.equal(again[2], expected[2])

    load_adapter(folder, base)
    mine = lora_state_dict(base)
    assert all(torch.equal(mine[n], v) for n, v in lora_state_dict(trained).items())
    assert not all(torch.equal(mine[n], v) for n, v in kept.items())
    other = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-3)
    other.load_state_dict(found["optimizer"])
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a["step"] == b["step"] == 1
        assert torch.equal(a["exp_avg"], b["exp_avg"]) and float(a["exp_avg"].abs().max()) > 0


def fake_run(folder, figures):
    """Checkpoints at steps 10, 20, ... with these figures."""
    for number, figure in enumerate(figures, start=1):
        path = folder / f"checkpoint-{10 * number}"
        path.mkdir(parents=True)
        torch.save({"figure": figure}, path / STATE_FILE)


def steps_of(folders):
    return [int(folder.name.split("-")[1]) for folder in folders]


def test_checkpoints_are_in_the_order_of_steps(tmp_path):
    fake_run(tmp_path, [None] * 11)  # 10 to 110: the order of names would be another
    for stranger in ("checkpoint-x", ".checkpoint-5.tmp", "checkpoint-7.old", "best_model"):
        (tmp_path / stranger).mkdir()
    assert steps_of(checkpoints(tmp_path)) == list(range(10, 120, 10))
    assert checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("figures", "limit", "kept"),
    [
        ([[0.1, -2.0], [0.5, -3.0], [0.3, -1.0], [0.2, -1.0]], 2, [20, 30, 40]),
        ([[0.1, -2.0], [0.5, -3.0], [0.3, -1.0], [0.2, -1.0]], 1, [20, 40]),
        ([[0.1, -2.0], [0.2, -3.0], [0.3, -1.0]], 2, [20, 30]),  # the newest is among the best
        ([[0.0, -5.0], [0.0, -4.0], [0.0, -4.5], [-1.0, -1.0]], 1, [20, 40]),  # ties: lower loss
        ([None, [-1.0, -9.0], None, None], 1, [20, 40]),  # no figure ranks last
        ([None, None, None, None], 2, [30, 40]),
        ([[0.4, -1.0], [0.4, -1.0], [0.1, -1.0]], 1, [20, 30]),  # equal: the later one
        ([[0.4, -1.0]], 3, [10]),
    ],
)
def test_the_best_and_the_newest_are_kept(tmp_path, figures, limit, kept):
    fake_run(tmp_path, figures)
    removed = remove_old_checkpoints(tmp_path, limit)
    assert steps_of(checkpoints(tmp_path)) == kept
    assert sorted(steps_of(removed) + kept) == [10 * n for n in range(1, len(figures) + 1)]
    assert not any(folder.exists() for folder in removed)


def test_set_aside_takes_the_first_free_number(tmp_path):
    run = tmp_path / "run"
    assert set_aside(run) is None
    run.mkdir()
    (run / ".gitkeep").touch()
    assert set_aside(run) is None and run.exists()
    for number in (1, 2, 3):
        run.mkdir(exist_ok=True)
        (run / "log.jsonl").write_text(str(number))
        assert set_aside(run) == tmp_path / f"run.{number}"
        assert not run.exists()
        assert (tmp_path / f"run.{number}" / "log.jsonl").read_text() == str(number)
    (tmp_path / "run.2" / "log.jsonl").unlink()
    (tmp_path / "run.2").rmdir()
    run.mkdir()
    (run / "new").touch()
    assert set_aside(run) == tmp_path / "run.2"
    run.mkdir()
    (run / "new").touch()
    assert set_aside(run, replace=True) is None and not run.exists()


def fail(*_):
    raise OSError("the machine went down")


def test_a_checkpoint_saved_again_is_never_absent(trained, tmp_path, monkeypatch):
    """Between the old state and the new one there is no moment without either."""
    save_checkpoint(tmp_path, 10, {"best": None, "figure": [0.5]}, adapter_of(trained))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="went down"):
            save_checkpoint(tmp_path, 10, {"best": None, "figure": [0.6]}, adapter_of(trained))
    assert steps_of(checkpoints(tmp_path)) == [10]
    assert read_checkpoint(tmp_path / "checkpoint-10")["figure"] == [0.5]
    adapter = adapter_of(trained) | {"metrics": {"ap": 0.6}}
    save_checkpoint(tmp_path, 10, {"best": None, "figure": [0.6]}, adapter)
    assert read_checkpoint(tmp_path / "checkpoint-10")["figure"] == [0.6]
    assert read_adapter(tmp_path / "checkpoint-10")["metrics"] == {"ap": 0.6}
