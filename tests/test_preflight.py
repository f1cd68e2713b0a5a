"""What `--check` says of packages, device, weights, memory, disk and folder: good and bad."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import get_session

from lora_layers import AdapterError, LoRAConfig, apply_lora
from sam3_lora import files, memory, packages, preflight, runlog
from sam3_lora.config import setup_logging
from sam3_lora.forward import Forward
from sam3_lora.model import ModelError, load_meta_model
from sam3_lora.packages import Finding, check_packages, check_python

GIB = 2**30


def states(findings) -> list[str]:
    return [finding.state for finding in findings]


@pytest.fixture
def structure(tiny_model_dir):
    """The tiny model without weights, its decoder adapted."""
    model, _ = load_meta_model(str(tiny_model_dir))
    components = ("detr_decoder",)
    apply_lora(model, LoRAConfig(4, 8.0, 0.0, ("q_proj",), components))
    return model


@pytest.fixture
def forward(structure):
    return Forward(structure, None)


# What is installed --------------------------------------------------------------------------------


def test_python_has_a_floor():
    assert check_python((3, 11, 0)).state == "ok"
    assert sys.executable in check_python().found
    old = check_python((3, 10, 14))
    assert old.state == "error" and "expected 3.11 or newer, found 3.10.14" in old.found


def test_packages_of_the_product_are_there():
    found = check_packages()
    assert found.state == "ok" and f"torch {torch.__version__.split('+')[0]}" in found.found


def test_packages_missing_and_too_old_come_together(tmp_path):
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("# a comment\nnumpy>=999.1\nno-such-package-here>=2.0\nscipy>=1.0\n")
    found = check_packages(wanted)
    assert found.state == "error"
    assert "numpy>=999.1 (found " in found.found
    assert "no-such-package-here>=2.0 (found none)" in found.found
    assert "scipy" not in found.found and "pip install -r requirements.txt" in found.remedy


@pytest.mark.parametrize(
    ("needed", "state"),
    [
        ("torch==2.14.1", "ok"),
        ("torch (==2.13.0)", "error"),
        ("torch (>=2.14.0)", "ok"),
        ("torch>=2.15.0", "error"),
        ("torchao==1.0", "ok"),
    ],
)
def test_torchvision_was_built_for_this_torch(monkeypatch, needed, state):
    versions = {"torch": "2.14.1+cu130", "torchvision": "0.29.1"}
    monkeypatch.setattr(packages, "installed_version", lambda name: versions.get(name, "999"))
    monkeypatch.setattr(packages, "_needs", lambda name: ["numpy", needed])
    found = check_packages()
    assert found.state == state
    assert (state == "ok") or "for torchvision 0.29.1 (found 2.14.1+cu130)" in found.found


# The device ---------------------------------------------------------------------------------------


def check_cpu(model=None) -> Finding:
    return preflight.check_device(torch.device("cpu"), torch.float32, model)[0]


@pytest.fixture
def driver(monkeypatch):
    """A machine with an NVIDIA driver on which torch finds no GPU."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_cpu_is_enough_for_a_small_model_alone(structure, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert check_cpu(structure).state == "ok"
    large = check_cpu()
    assert large.state == "warning"
    assert "59 s measured" in large.found and "configs/demo_config.yaml" in large.remedy


def test_torch_without_cuda_beside_a_driver(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    found = check_cpu()
    assert found.state == "warning" and "build without CUDA" in found.found
    assert "https://pytorch.org" in found.remedy


def test_a_driver_that_is_too_old(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = check_cpu()
    assert found.state == "warning" and "torch finds no GPU" in found.found
    assert "older than 13.0" in found.remedy


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 24 GiB, 20 of them free; what is computed on it is computed here."""
    ones = torch.ones
    monkeypatch.setattr(preflight.torch, "ones", lambda count, device=None: ones(count))
    for name, value in {
        "get_device_name": "NVIDIA Test",
        "mem_get_info": (20 * GIB, 24 * GIB),
        "device_count": 1,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    return torch.device("cuda")


def test_a_gpu_is_named_with_its_memory(gpu):
    found, precision = preflight.check_device(gpu, torch.bfloat16, None)
    assert str(found) == "ok       device     cuda: NVIDIA Test, 20.0 of 24.0 GiB free"
    assert precision.found == "bf16"
    assert "gradient scaler" in preflight.check_device(gpu, torch.float16, None)[1].found


def test_a_gpu_that_torch_cannot_use(gpu, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(preflight.torch, "ones", fail)
    found = preflight.check_device(gpu, torch.bfloat16, None)[0]
    assert found.state == "error" and "no kernel image" in found.found


def test_fewer_gpus_than_processes(gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = preflight.check_device(gpu, torch.bfloat16, None)[0]
    assert found.state == "error" and "expected 4 GPUs" in found.found


# The weights --------------------------------------------------------------------------------------


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def test_a_whole_folder_is_good(tiny_model_dir, tiny_hub_dir, structure):
    found, download = preflight.check_weights(str(tiny_model_dir), structure)
    assert (found.state, download) == ("ok", 0) and "whole" in found.found
    # The hub's layout has the tracker's weights too.
    assert preflight.check_weights(str(tiny_hub_dir), structure)[0].state == "ok"


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def list_shards(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_type(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "bert"}))


def remove(name):
    return lambda folder: (folder / name).unlink()


SPOILT = {
    "cut short": (cut_short, "could not be read as SAM 3"),
    "a shard is missing": (list_shards, "expected model-00002-of-00002.safetensors in it"),
    "no weights": (remove("model.safetensors"), "expected model.safetensors in it, found none"),
    "no configuration": (remove("config.json"), "expected config.json"),
    "no tokenizer": (remove("tokenizer.json"), "okenizer"),
    "another model": (change_type, "expected a SAM 3 model, found model_type 'bert'"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_folder_that_is_not_whole(model_dir, structure, case):
    spoil, message = SPOILT[case]
    spoil(model_dir)
    with pytest.raises(ModelError, match=message):
        preflight.check_weights(str(model_dir), structure)


def test_a_folder_with_a_part_of_the_weights(tiny_model_dir):
    large = torch.nn.Linear(10_000, 10_000, device="meta")
    with pytest.raises(ModelError, match="expected 100,010,000 numbers or more, found"):
        preflight.check_weights(str(tiny_model_dir), large)


@pytest.fixture
def uncached(monkeypatch):
    monkeypatch.setattr(preflight, "try_to_load_from_cache", lambda *_: None)


def test_a_hub_id_that_is_cached(tiny_model_dir, structure, monkeypatch):
    cached = str(tiny_model_dir / "config.json")
    monkeypatch.setattr(preflight, "try_to_load_from_cache", lambda *_: cached)
    found, download = preflight.check_weights("someone/sam3", structure)
    assert download == 0 and "in the hub's cache" in found.found


def test_offline_and_not_cached_names_both_ways(uncached, monkeypatch):
    monkeypatch.setattr(preflight.hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as error:
        preflight.check_weights("facebook/sam3", None)
    for words in ("HF_HUB_OFFLINE is set", "hf auth login", "--model_name DIR"):
        assert words in str(error.value)


def test_online_the_hub_is_asked_and_nothing_downloaded(uncached, monkeypatch):
    asked = []
    listed = [("model.safetensors", 3_000_000_000), ("config.json", 9), ("sam3.pt", 10)]
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in listed]
    monkeypatch.setattr(preflight.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        preflight, "get_hf_file_metadata", lambda url, timeout: asked.append((url, timeout))
    )
    monkeypatch.setattr(
        preflight, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings)
    )
    found, download = preflight.check_weights("facebook/sam3", None)
    assert (found.state, download) == ("ok", 3_000_000_000) and "3.00 GB" in found.found
    ((url, timeout),) = asked
    assert url.endswith("facebook/sam3/resolve/main/config.json") and timeout <= 10


def test_a_gate_that_is_closed(uncached, monkeypatch):
    def refuse(*_, **__):
        raise OSError("401: access to model facebook/sam3 is restricted")

    monkeypatch.setattr(preflight.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(preflight, "get_hf_file_metadata", refuse)
    with pytest.raises(ModelError, match="access to model facebook/sam3 is restricted.*hf auth"):
        preflight.check_weights("facebook/sam3", None)


# Memory and disk ----------------------------------------------------------------------------------

SETTINGS = {"images": 4, "prompts": 8, "max_rows": 8, "mask_loss": "full"}


@pytest.fixture
def peaks(monkeypatch):
    """Predictions as these GB say, by checkpointing; `least` is of one row of one image."""
    gb = {"off": 30.0, "mlp": 20.0, "full": 8.0, "least": 2.0}

    def predict(forward, images, **_):
        return {"peak": int(1e9 * gb["least" if images == 1 else forward.checkpointing])}

    monkeypatch.setattr(memory, "predict", predict)
    return gb


def test_auto_takes_the_checkpointing_that_fits(gpu, forward, peaks):
    card, ram = preflight.check_memory(forward, gpu, "auto", 1, 0, **SETTINGS)
    assert (card.state, ram.state) == ("ok", "ok")
    assert "8.00 GB predicted" in card.found and "checkpointing full" in card.found
    peaks["mlp"] = 12.0
    card, _ = preflight.check_memory(forward, gpu, "auto", 1, 0, **SETTINGS)
    assert "checkpointing mlp" in card.found


def test_too_large_for_the_card_names_what_takes_less_in_the_guides_order(gpu, forward, peaks):
    card, _ = preflight.check_memory(forward, gpu, "off", 3, 0, **SETTINGS)
    assert card.state == "warning"
    flags = ("full; ", "rows_per_forward 4; ", "batch_size 2 --gradient_accumulation_steps 6; ")
    flags += ("--mask_loss native; ", "configs/minimal_lora_config.yaml")
    places = [card.remedy.index(flag) for flag in flags]
    assert places == sorted(places)
    peaks["least"] = 25.0
    card, _ = preflight.check_memory(forward, gpu, "off", 1, 0, **SETTINGS)
    assert card.state == "error" and "one image with one prompt takes 25.00 GB" in card.remedy


def test_what_takes_less_already_is_not_advised(gpu, forward, peaks):
    peaks["full"] = 30.0
    smallest = {"images": 1, "prompts": 8, "max_rows": 1, "mask_loss": "native"}
    peaks["least"] = 30.0
    card, _ = preflight.check_memory(forward, gpu, "full", 1, 0, **smallest)
    for flag in ("--gradient_checkpointing", "--max_rows", "--batch_size", "--mask_loss"):
        assert flag not in card.remedy


def test_on_a_cpu_the_ram_is_compared(forward, peaks, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(runlog, "available_ram", lambda: 64 * GIB)
    assert states(preflight.check_memory(forward, cpu, "auto", 1, 0, **SETTINGS)) == ["ok"]
    (found,) = preflight.check_memory(forward, cpu, "auto", 1, 30 * GIB, **SETTINGS)
    assert found.state == "error" and "--gradient_checkpointing full" in found.remedy
    monkeypatch.setattr(runlog, "available_ram", lambda: None)
    (found,) = preflight.check_memory(forward, cpu, "auto", 1, 0, **SETTINGS)
    assert found.state == "ok" and "the system does not tell" in found.found


def test_features_in_ram_count_beside_a_gpu(gpu, forward, peaks, monkeypatch):
    monkeypatch.setattr(runlog, "available_ram", lambda: 16 * GIB)
    _, ram = preflight.check_memory(forward, gpu, "auto", 1, 20 * GIB, **SETTINGS)
    assert ram.state == "error" and "--cache_features disk" in ram.remedy


def test_ram_that_is_free_is_known_and_sane():
    free = runlog.available_ram()
    assert free is None or 10**8 < free < 10**14


def test_what_a_run_writes():
    # 3 best checkpoints, the newest and the one before it, each adapter and two moments; best_model
    # and last_model.
    assert preflight.run_bytes(1000, 3) == 4 * 1000 * (5 * 3 + 2)


def test_a_full_disk(tmp_path, monkeypatch):
    wanted = {tmp_path / "a" / "b": ("adapters", 10**9), tmp_path / "c": ("features", 10**9)}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=3 * 10**9))
    assert states(preflight.check_disk(wanted)) == ["ok"]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**9))
    (found,) = preflight.check_disk(wanted)
    assert found.state == "error" and "1.00 GB free" in found.found
    assert "adapters in" in found.found and "features in" in found.found
    assert list(tmp_path.iterdir()) == []


# The run's folder ---------------------------------------------------------------------------------


def test_a_folder_that_is_free_held_or_replaced(tmp_path):
    place = tmp_path / "run"
    assert preflight.check_output(place, False, False)[0].found.endswith("can be written")
    place.mkdir()
    (place / "train.log").write_text("")
    assert "will be renamed to run.1" in preflight.check_output(place, False, False)[0].found
    replaced = preflight.check_output(place, True, False)[0]
    assert replaced.state == "warning" and "--overwrite will remove" in replaced.found
    with pytest.raises(FileNotFoundError, match="expected checkpoint-<step>/"):
        preflight.check_output(place, False, True)
    (place / "train.log").unlink()
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        preflight.check_output(place, False, False)


@pytest.mark.skipif(files.fcntl is None, reason="Windows has no such locks")
def test_a_folder_that_a_run_writes_to_now(tmp_path):
    place = tmp_path / "run"
    lines = "import sys, pathlib; from sam3_lora import files; files.claim(pathlib.Path("
    lines += "sys.argv[1]), False, False); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", lines, str(place)],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="no other run writes to"):
            files.check_free(place)
        other.stdin.close()
    files.check_free(place)


# The report ---------------------------------------------------------------------------------------


def test_an_error_is_a_line_and_the_others_go_on():
    told: list[str] = []
    report = preflight.Report((AdapterError,), told.append)
    with report.part("adapters"):
        raise AdapterError("expected this,\nfound that")
    report.add(Finding("warning", "run", "odd", "even it"))
    assert told == [
        "error    adapters   expected this, found that",
        "warning  run        odd; even it",
    ]
    assert report.close() == 2
    assert told[-1] == "1 error, 1 warning: correct the errors and check again"
    with pytest.raises(KeyError), report.part("adapters"):
        raise KeyError("a bug")


def test_warnings_leave_the_exit_code_0():
    told: list[str] = []
    report = preflight.Report((), told.append)
    report.add(Finding("warning", "run", "odd"))
    assert report.close() == 0 and told[-1] == "0 errors, 1 warning: ready to train"


def test_the_hubs_client_does_not_log_each_request():
    """Its library has been renamed before."""
    library = type(get_session()).__mro__[-2].__module__.split(".")[0]
    assert library.startswith("httpx")
    setup_logging()
    assert not logging.getLogger(library).isEnabledFor(logging.INFO)
