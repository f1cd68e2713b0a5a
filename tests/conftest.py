"""What the tests share: no network, two threads, the tiny model and the folder of public data."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

# Before any import of transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def demo_model() -> ModuleType:
    """The script that writes tiny models, as a module."""
    path = ROOT / "demo" / "make_sam3_tiny.py"
    spec = importlib.util.spec_from_file_location("make_sam3_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_model_dir(demo_model: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random SAM 3 of the smallest size, written once per test run."""
    return demo_model.make_tiny(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_hub_dir(demo_model: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in the hub's layout: the video model's config and weight names."""
    return demo_model.make_tiny(tmp_path_factory.mktemp("tiny_hub"), hub_layout=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public data sets; the test is skipped where there is none."""
    folder = Path(os.environ.get("SAM3_LORA_REAL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no public data sets at {folder}; set SAM3_LORA_REAL_DATA to their folder")
    return folder
