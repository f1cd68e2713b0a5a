"""What the tests share: no network, one thread, the tiny model and the folder of public data."""

import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# Before any import of transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch.autograd.profiler import profile

ROOT = Path(__file__).resolve().parent.parent

# What reads of values come down to; a boolean index calls nonzero.
READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}
READS = {f"aten::{name}" for name in READS | {"_unique2", "unique_dim", "unique_consecutive"}}

torch.set_num_threads(1)
# A shell's background job ignores SIGINT, and nohup SIGHUP: tests send both, and children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests whose `run` fixture runs a whole script into the scripts tier."""
    for item in items:
        if "run" in getattr(item, "fixturenames", ()):
            item.add_marker("scripts")


@pytest.fixture(scope="session")
def demo_model() -> ModuleType:
    """The script that writes tiny models, as a module."""
    path = ROOT / "demo" / "make_sam3_tiny.py"
    spec = importlib.util.spec_from_file_location("make_sam3_tiny", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as if it had been imported by name
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
def hub_cache(tiny_hub_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub's in which that model is facebook/sam3, as a download leaves it."""
    root, revision = tmp_path_factory.mktemp("hub_cache"), "0" * 40
    repository = root / "models--facebook--sam3"
    shutil.copytree(tiny_hub_dir, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return root


@pytest.fixture(scope="module")
def published(hub_cache: Path) -> Iterator[None]:
    """facebook/sam3 is found, offline, and is the tiny model; for all tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
        yield


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> tuple[Any, Any]:
    """The tiny model with livelier heads, and its tokenizer; one for each test file."""
    from sam3_lora.model import load_model  # after the environment above is set

    model, tokenizer = load_model(str(tiny_model_dir))
    # The random base barely moves its boxes; larger heads make every term count.
    torch.manual_seed(1)
    for module in (model.detr_decoder.box_head, model.mask_decoder.mask_embedder):
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, tokenizer


@pytest.fixture(scope="session")
def save_random_adapter() -> Callable[..., Path]:
    """Writes an adapter: `save_random_adapter(path, base, lora, spread=1.0, **description)`."""
    return _save_random_adapter


def _save_random_adapter(
    path: Path, base: Path, lora: Any, spread: float = 1.0, **description: Any
) -> Path:
    """An adapter whose A and B are drawn, so that it moves what the model finds; of a seed, so that
    no test depends on those before."""
    from lora_layers import apply_lora, lora_modules  # after the environment above is set
    from sam3_lora.checkpoint import save_adapter
    from sam3_lora.model import load_model

    model, _ = load_model(str(base))
    torch.manual_seed(0)
    apply_lora(model, lora)
    for _, layer in lora_modules(model):
        layer.lora_B.data = torch.randn_like(layer.lora_B) * spread
    save_adapter(path, model, lora, **{"base_model": str(base), "categories": {}} | description)
    return path


@contextmanager
def _value_reads() -> Iterator[list[str]]:
    """Lists, when it ends, each operation within that read a tensor's values for a number or a
    shape: a GPU would have been waited for."""
    found: list[str] = []
    # Not a TorchDispatchMode, under which some gradients go other ways, those of `prod` for one.
    with profile() as profiler:
        yield found
    found += [event.name for event in profiler.function_events if event.name in READS]


@pytest.fixture(scope="session")
def value_reads() -> Callable[[], AbstractContextManager[list[str]]]:
    """Finds reads of values: `with value_reads() as found:`."""
    return _value_reads


@pytest.fixture(scope="session")
def run_data(write_split: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 5 images to train on and 3 to validate on."""
    root = tmp_path_factory.mktemp("run_data")
    write_split(root, 5, "train")
    return write_split(root, 3)


@pytest.fixture
def train_args(tiny_model_dir: Path, run_data: Path) -> Callable[..., list[str]]:
    """`train_args(output, *more)`: flags of a run of 6 steps in 3 epochs, every second of one
    image."""

    from runs import run_flags  # after the environment above is set

    def build(output: Path, *more: str) -> list[str]:
        own = ["--lora_apply_to_mask_decoder", "true", "--learning_rate", "1e-3"]
        own += ["--batch_size", "4", "--num_epochs", "3"]
        return run_flags(tiny_model_dir, run_data, output, *own, *more)

    return build


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public data sets; the test is skipped where there is none."""
    folder = Path(os.environ.get("SAM3_LORA_REAL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no public data sets at {folder}; set SAM3_LORA_REAL_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def write_split(write_source: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a split of `write_source`: `write_split(folder, count, split="val", masks=True)`;
    returns the data folder."""
    import prepare_data

    def write(folder: Path, count: int, split: str = "val", masks: bool = True) -> Path:
        source = write_source(folder / "sources" / split, count, masks)
        args = ["coco", "--coco_json", str(source / "source.json"), "--images_dir", str(source)]
        data = folder / "data"
        assert prepare_data.main([*args, "--output_dir", str(data), "--split", split]) == 0
        return data

    return write


@pytest.fixture(scope="session")
def write_source() -> Callable[..., Path]:
    """Writes a COCO export to convert: `write_source(folder, count, masks=True) -> folder`."""
    return _write_source


def _write_source(folder: Path, count: int, masks: bool = True) -> Path:
    """A COCO export of flat images with a red and a blue rectangle; the last image is empty."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(count):
        photo = np.full((64, 96, 3), 128, np.uint8)
        images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 64})
        for category, colour in ((1, (220, 30, 30)), (2, (30, 30, 220))):
            if number == count - 1:
                break
            x, y = int(rng.integers(0, 96 - 34)), int(rng.integers(0, 64 - 26))
            photo[y : y + 24, x : x + 32] = colour
            polygon = [x, y, x + 32, y, x + 32, y + 24, x, y + 24]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x, y, 32, 24],
                    "area": 768,
                    "iscrowd": 0,
                    "segmentation": [polygon] if masks else [],
                }
            )
        Image.fromarray(photo).save(folder / f"{number}.png")
    categories = [{"id": 1, "name": "red_part"}, {"id": 2, "name": "blue_part"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "source.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
