"""The benchmarks at their smallest: ours and its rivals do the same sums, and the tables hold."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from test_docs import ROOT, load_script

from lora_layers import lora_modules, lora_state_dict
from sam3_lora.model import image_size, train_adapted

pytestmark = pytest.mark.scripts

CPU = torch.device("cpu")


def load(name: str) -> ModuleType:
    """A benchmark as a module."""
    return load_script(ROOT / "benchmarks" / f"{name}.py")


@pytest.fixture(scope="module")
def rivals():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    before = list(sys.path)
    yield importlib.import_module("rivals")
    sys.path[:] = before[1:]


def tables(text: str) -> list[list[dict[str, str]]]:
    """The markdown tables of a text, as rows by column."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if lines:
            header, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in lines)
            found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


@pytest.mark.parametrize("name", ["minimal", "balanced", "full"])
def test_rivals_have_the_same_loss_and_gradients(rivals, name):
    config, lora = rivals.strategy(name)
    model = rivals.build_model("tiny112", CPU)
    forward = rivals.adapt_ours(model, lora)
    train_adapted(model)
    other = rivals.build_model("tiny112", CPU)
    adapted = rivals.adapt_peft(other, lora, lora_state_dict(model))
    rivals.training_mode(other, lora.components)
    library = rivals.Library(adapted)
    batch = rivals.make_batch(2, 3, image_size(model))
    still = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.0)
        for m in (model, adapted)
    ]
    loss = rivals.ours_step(forward, config, still[0], batch)
    grads = {n: (m.lora_A.grad, m.lora_B.grad) for n, m in lora_modules(model)}
    for rows_at_once in (None, 1):
        other_loss = rivals.library_step(library, config, still[1], batch, rows_at_once)
        assert other_loss == pytest.approx(loss, rel=1e-4)
        moved = 0
        for layer, pair in grads.items():
            theirs = other.get_submodule(layer)
            weights = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
            for mine, weight in zip(pair, weights, strict=True):
                scale = float(weight.grad.abs().max())
                assert float((mine - weight.grad).abs().max()) <= 1e-4 * scale + 1e-9, layer
                moved += scale > 1e-9
        # Without a box the geometry encoder's q and k attend to one token, whatever its score.
        assert moved >= 2 * len(grads) - (4 if name == "full" else 0)


def test_train_step(rivals, capsys):
    script = load("train_step")
    args = ["--device", "cpu", "--model", "tiny112", "--batch_size", "1", "--prompts", "1", "2"]
    assert script.main([*args, "--repeats", "1", "--strategy", "minimal", "full"]) == 0
    times, counts = tables(capsys.readouterr().out)
    cases = [("minimal", "1"), ("minimal", "2"), ("full", "1"), ("full", "2")]
    assert [(row["strategy"], row["prompts"]) for row in times] == cases
    for row in times:
        assert float(row["losses apart"]) < 1e-4
        ratios = [float(value) for column, value in row.items() if " / " in column]
        assert len(ratios) == 2 and min(ratios) > 0
    assert [row["who"] for row in counts] == ["ours", "library"] * len(cases)
    assert all(int(row["operations"]) > int(row["value reads"]) for row in counts)


def test_inference(rivals, capsys):
    script = load("inference")
    args = ["--device", "cpu", "--model", "tiny112", "--prompts", "1", "3", "--repeats", "1"]
    assert script.main([*args, "--photo_size", "60", "90"]) == 0
    prompts, adapters, loading = tables(capsys.readouterr().out)
    assert [row["prompts"] for row in prompts] == ["1", "3"]
    for row in prompts:
        number = str(script.OBJECTS * int(row["prompts"]))
        assert row["found: ours, library"] == f"{number}, {number}"
        assert float(row["scores apart"]) < 1e-5 and float(row["least mask IoU"]) > 0.98
        assert float(row["library / ours"]) > 0 and float(row["prompt by prompt / ours"]) > 0
    assert len(adapters) == 5 and len(loading) == 3
    assert all(float(row["/ ours, base"]) > 0 for row in adapters)
    assert all(float(row["ms"]) > 0 for row in loading)


def test_operations_that_wait_are_counted(rivals):
    script = load("train_step")
    values = torch.tensor([1.0, 0.0, 2.0])

    def work():
        values[torch.tensor([0, 2])]
        values[values > 0]
        values.nonzero()
        values.sum().item()

    found = script.count_operations(work)
    assert found["value reads"] == 3, found
    assert found["which"].count(" 1") == 3


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 11, 16, 99])
def test_largest_batch_that_fits(rivals, limit):
    script = load("train_step")
    assert script.largest(lambda images: images <= limit, most=16) == min(limit, 16)


def test_cache(rivals, capsys):
    script = load("cache")
    args = ["--device", "cpu", "--model", "tiny112", "--batch_size", "2", "--prompts", "1", "3"]
    assert script.main([*args, "--repeats", "1", "--mask_loss", "points"]) == 0
    (rows,) = tables(capsys.readouterr().out)
    assert [row["prompts"] for row in rows] == ["1", "3"]
    for row in rows:
        assert row["kept"] == "memory, geometry, fpn_0, fpn_1"
        assert float(row["not cached / cached"]) > 0 and float(row["library / cached"]) > 0
        assert float(row["build, s an image"]) > 0


def test_kills_and_soak(tmp_path, capsys):
    script = load("kills")
    flags = ["--kills", "2", "--signals", "1", "--output_dir", str(tmp_path)]
    args = [*flags, "--train_flags", "--max_steps 7"]
    assert script.main(args) == 0
    killed, signals, asked = tables(capsys.readouterr().out)
    for rows in (killed, asked):
        found = {row["what"]: row["number"] for row in rows}
        assert int(found["figures compared"]) > 30 and int(found["finished runs compared"]) > 0
        assert found["faults"] == "0" and float(found["largest difference"]) == 0
    assert sum(int(row["number"]) for row in killed if row["what"].startswith("SIGKILL")) == 2
    assert [row["signal"] for row in signals] == ["SIGTERM", "SIGINT"]
    script = load("soak")
    # Of so few steps the growth and the speed say nothing.
    assert script.main(["--data_dir", str(tmp_path / "demo"), "--steps", "12"]) in (0, 1)
    (rows,) = tables(capsys.readouterr().out)
    found = {row["what"]: row for row in rows}
    assert found["steps"]["found"] == "12"
    assert found["open files"]["within the limit"] == "yes", found
    assert found["processes"]["found"] == "0 before, 0 after"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cache", "--prompts 0"),
        ("data_scale", "--images 0"),
        ("demo_exemplars", "--scenes 0"),
        ("inference", "--photo_size 0 9"),
        ("lora_linear", "--tokens 0"),
        ("memory", "--batch_size 0"),
        ("soak", "--steps 0"),
        ("tiles", "--pictures 0"),
        ("train_step", "--repeats 0"),
    ],
)
def test_a_size_of_nothing_is_refused(rivals, name, words, capsys):
    assert load(name).main(words.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    flag = words.split()[0]
    assert error.startswith(f"error: argument {flag}: expected a whole number from 1 up, found '0'")
