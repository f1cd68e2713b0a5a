"""The cache of frozen features: the same training to the last bit, and never a stale feature."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lora_layers import LoRAConfig, apply_lora, lora_state_dict, remove_lora
from sam3_lora import engine
from sam3_lora.coco import read_split
from sam3_lora.dataset import PromptDataset
from sam3_lora.features import ABANDONED, FeatureCache, FeatureError, cacheable_parts
from sam3_lora.forward import Forward
from sam3_lora.loader import build_loader, epoch_batches
from sam3_lora.losses import compute_losses, count_targets

IMAGES, VIEWS = 4, 2
HEADS = ("detr_encoder", "detr_decoder")
DECODER = ("detr_decoder",)


@pytest.fixture
def folder(write_source, tmp_path):
    """A split in the layout of a Roboflow export."""
    made = write_source(tmp_path / "train", IMAGES)
    (made / "source.json").rename(made / "_annotations.coco.json")
    return made


@pytest.fixture
def adapt(loaded):
    """`adapt(components) -> Forward` with fresh adapters, the same each time."""
    model, tokenizer = loaded

    def put(*components: str, **options) -> Forward:
        remove_lora(model)
        torch.manual_seed(0)
        apply_lora(model.requires_grad_(False), LoRAConfig(4, 8.0, components=components))
        return Forward(model, tokenizer, one_to_many=True, **options)

    yield put
    remove_lora(model)
    model.requires_grad_(False)


def make_set(folder, **options) -> PromptDataset:
    # Two categories and two words, of which three are asked for.
    settings = {"prompts_per_image": 3, "prompt_pool": 4, "out_of_domain_prompts": 2}
    settings |= {"views": VIEWS, "flip_probability": 0.5}
    return PromptDataset(read_split(folder), 112, 16, train=True, seed=3, **settings | options)


def make_cache(forward, dataset, folder=None, limit=1.0, most=None) -> FeatureCache:
    """A cache, of which at most so many missing views are built."""
    cache = FeatureCache(forward, dataset, folder, limit)
    wanted = [[(view, index)] for index, view in cache.missing()[:most]]
    dataset.parts = ("image",)
    assert len(list(cache.build(build_loader(dataset, wanted, 0)))) == len(wanted)
    dataset.parts = ("targets",)
    return cache


def train(forward, dataset, cache=None, epochs=3) -> dict[str, torch.Tensor]:
    """The adapters after some epochs of two-image steps."""
    optimizer = engine.build_optimizer(forward.model, 1e-2, 0.0)
    for epoch in range(epochs):
        batches = build_loader(dataset, epoch_batches(IMAGES, 3, epoch, 0, shuffle=True), 0)
        batches = cache.filled(batches) if cache else batches
        limits = engine.Limits(3, 4)
        records = engine.train_one_epoch(
            forward, compute_losses, count_targets, batches, optimizer, lambda step: 1.0, limits
        )
        assert len(list(records)) == 2
    return lora_state_dict(forward.model)


@pytest.mark.scripts
@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize("components", [DECODER, HEADS])
def test_training_from_the_cache_is_the_same_to_the_last_bit(
    adapt, folder, tmp_path, monkeypatch, components, where
):
    plain = train(adapt(*components), make_set(folder))
    forward, dataset = adapt(*components), make_set(folder)
    cache = make_cache(forward, dataset, tmp_path / "cache" if where == "disk" else None)
    monkeypatch.setattr(Forward, "encode_trunk", None)
    monkeypatch.setattr(PromptDataset, "_read_photo", None)
    cached = train(forward, dataset, cache)
    assert all(torch.equal(plain[name], cached[name]) for name in plain)
    assert any(name.endswith("lora_B") and value.any() for name, value in cached.items())


@pytest.mark.parametrize(
    ("components", "options", "expected"),
    [
        (DECODER, {}, [("memory", "geometry", "fpn_0", "fpn_1"), ("memory", "geometry", "trunk")]),
        (DECODER, {"geometry_cls": "hf", "masks": False}, [("memory",)]),
        (HEADS, {}, [("trunk",)]),
        (("text_encoder", "detr_decoder"), {}, [("trunk",)]),
        (("geometry_encoder",), {}, [("trunk",)]),
        (("vision_encoder",), {}, []),
    ],
)
def test_what_can_be_kept(adapt, components, options, expected):
    assert cacheable_parts(adapt(*components, **options)) == expected


def test_the_size_is_known_before_and_bounds_what_is_kept(adapt, folder):
    forward, dataset = adapt(*DECODER), make_set(folder)
    full = make_cache(forward, dataset)
    kept = sum(t.nbytes for content in full.in_ram.values() for t in content.values())
    assert full.bytes == kept
    # 8 views of 64 tokens of 64 channels, fp32: 4 prompts, one token, the levels 20 times as fine.
    assert kept == 8 * 4 * (4 * 64 * 64 + 64 + 20 * 64 * 64)
    small = FeatureCache(forward, dataset, None, kept / 2 / 1e9)
    assert small.parts == ("memory", "geometry", "trunk")
    with pytest.raises(FeatureError, match=r"cache_limit_gb: expected at most 1e-05 GB, found"):
        FeatureCache(forward, dataset, None, 1e-5)


def test_a_killed_build_goes_on(adapt, folder, tmp_path):
    where = tmp_path / "cache"
    cache = make_cache(adapt(*DECODER), make_set(folder), where, most=3)
    assert len(cache.missing()) == IMAGES * VIEWS - 3
    cut, *whole = sorted(where.iterdir())
    cut.write_bytes(cut.read_bytes()[:-9])
    left, fresh, foreign = (
        where / f".{name}.tmp"
        for name in (f"{'0' * 64}.safetensors.1", f"{'1' * 64}.safetensors.2", "precious")
    )
    for path in (left, fresh, foreign):
        path.write_bytes(b"half a file")
    # A file that another process finishes between the listing and the look at it.
    (where / ".gone.3.tmp").symlink_to("nowhere")
    past = left.stat().st_mtime - ABANDONED - 1
    for path in (left, foreign, *whole):
        os.utime(path, (past, past))
    again = make_cache(adapt(*DECODER), make_set(folder), where)
    assert again.missing() == []
    assert all(path.stat().st_mtime == past for path in whole)
    assert fresh.exists() and foreign.exists() and not left.exists()
    # The other run reads what this one wrote.
    assert cache.missing() == []


def test_what_has_changed_is_not_found(adapt, folder, tmp_path, loaded):
    where = tmp_path / "cache"
    make_cache(adapt(*DECODER), make_set(folder), where)

    def missing(**options) -> int:
        forward = adapt(*options.pop("components", DECODER), **options.pop("forward", {}))
        return len(FeatureCache(forward, make_set(folder, **options), where, 1.0).missing())

    assert missing() == 0
    assert missing(views=3) == IMAGES
    assert missing(components=HEADS) == IMAGES * VIEWS
    assert missing(augment=False, flip_probability=0.0) == IMAGES
    assert missing(prompt_pool=3) == IMAGES * VIEWS
    assert missing(forward={"geometry_cls": "hf"}) == IMAGES * VIEWS
    photo = Image.open(folder / "0.png").convert("RGB")
    photo.putpixel((0, 0), (1, 2, 3))
    photo.save(folder / "0.png")
    assert missing() == VIEWS
    # A name is not content.
    shutil.copy(folder / "1.png", folder / "2.png")
    assert missing() <= 2 * VIEWS
    for name in ("vision_encoder.neck.fpn_layers.0.proj1.bias", "text_projection.bias"):
        parameter = loaded[0].get_parameter(name)
        with torch.no_grad():
            parameter += 1
            assert missing() == IMAGES * VIEWS
            parameter -= 1


def test_a_file_with_a_broken_head_is_made_again(adapt, folder, tmp_path):
    make_cache(adapt(*DECODER), make_set(folder), tmp_path / "cache")
    broken = next((tmp_path / "cache").iterdir())
    broken.write_bytes(b"\xff" * broken.stat().st_size)
    cache = FeatureCache(adapt(*DECODER), make_set(folder), tmp_path / "cache", 1.0)
    assert len(cache.missing()) == 1


def test_a_folder_that_cannot_be_written(adapt, folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="--cache_dir: expected a folder that can be written"):
        make_cache(adapt(*DECODER), make_set(folder), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(FeatureError, match="GB free for features, found 1e-06 in .*; name another"):
        make_cache(adapt(*DECODER), make_set(folder), tmp_path / "small")
    assert list((tmp_path / "small").iterdir()) == []


def test_a_damaged_file_is_named(adapt, folder, tmp_path):
    forward, dataset = adapt(*DECODER), make_set(folder)
    cache = make_cache(forward, dataset, tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(FeatureError, match=r"[0-9a-f]{64}.safetensors: expected cached features"):
        train(forward, dataset, cache)


def test_prompts_come_from_the_fixed_list(folder):
    dataset = make_set(folder, prompts_per_image=3, prompt_pool=6, out_of_domain_prompts=3)
    for index in range(IMAGES):
        pool = dataset.pool(index)
        asked = [dataset[epoch, index]["texts"] for epoch in range(8)]
        assert all(len(texts) == 3 and set(texts) <= set(pool) for texts in asked)
        assert len({tuple(texts) for texts in asked}) > 1
        assert dataset[0, index]["view"] == dataset[VIEWS, index]["view"] == (index, 0)
        assert torch.equal(dataset[0, index]["image"], dataset[VIEWS, index]["image"])
