"""SAM 3's own tracker around our detector, on the smallest video model that the library takes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam3VideoConfig, Sam3VideoModel

import inference
from lora_layers import LoRAConfig, lora_modules
from sam3_lora import video
from sam3_lora.coco import decode_mask, mask_iou
from sam3_lora.evaluation import load_forward
from sam3_lora.model import ModelError, build_tracker, load_model
from sam3_lora.prediction import Prompts, find

pytestmark = pytest.mark.scripts  # models of several kinds are loaded

SIZE = (96, 64)  # width, height
CONFIG = LoRAConfig(rank=2, alpha=4.0, target_modules=("v_proj",), components=("detr_decoder",))


@pytest.fixture(scope="module")
def video_base(demo_model, tmp_path_factory) -> Path:
    """A random SAM 3 in the hub's layout with a tracker: the smallest that the library's takes."""
    folder = tmp_path_factory.mktemp("video_base")
    tokenizer = demo_model.make_tokenizer()
    # The tracker's memory has 64 channels, and must have fewer than the features.
    size = {**demo_model.SIZES["tiny112"], "width": 128, "queries": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo_model.SIZES, "video112", size)
        detector = demo_model.tiny_config("video112", tokenizer).to_dict()
    tracker = {
        "vision_config": detector["vision_config"],
        "prompt_encoder_config": {"hidden_size": 128, "image_size": 112, "mask_input_channels": 4},
        "mask_decoder_config": {"hidden_size": 128, "mlp_dim": 64, "iou_head_hidden_dim": 128},
        "image_size": 112,
        "num_maskmem": 3,
        "max_object_pointers_in_encoder": 4,
        "memory_attention_hidden_size": 128,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 64,
        "memory_attention_rope_feat_sizes": [8, 8],
        "memory_encoder_hidden_size": 128,
        "mask_downsampler_embed_dim": 128,
        "memory_fuser_num_layers": 1,
        "memory_fuser_embed_dim": 128,
        "memory_fuser_intermediate_dim": 64,
    }
    config = Sam3VideoConfig(
        detector_config=detector,
        tracker_config=tracker,
        low_res_mask_size=32,
        new_det_thresh=0.0,
        max_num_objects=3,
    )
    torch.manual_seed(0)
    model = Sam3VideoModel(config)
    demo_model.spread_queries(model.detector_model)
    # A random tracker takes every object for hidden.
    head = model.tracker_model.mask_decoder.pred_obj_score_head.proj_out
    head.bias.data.fill_(10.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(video_base, save_random_adapter, tmp_path_factory) -> Path:
    """An adapter of the video model's detector that changes what it finds."""
    path = tmp_path_factory.mktemp("adapter") / "lora_weights.pt"
    return save_random_adapter(path, video_base, CONFIG, geometry_cls="meta")


@pytest.fixture(scope="module")
def noise() -> list[video.Frame]:
    """Frames of noise that moves."""
    photo = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    return [video.Frame(i, f"{i}.png", np.roll(photo, 2 * i, 1)) for i in range(8)]


def test_the_video_model_holds_the_merged_detector_bit_for_bit(video_base, adapter):
    forward = load_forward(str(video_base), "meta", "cpu", "no", adapter)
    model, _ = build_tracker(str(video_base), forward.model, forward.tokenizer)
    stock = Sam3VideoModel.from_pretrained(video_base)
    deltas = {name: layer.delta_weight() for name, layer in lora_modules(forward.model)}
    expected = dict(stock.named_parameters())
    found = {n.replace(".base.", "."): p for n, p in model.named_parameters() if "lora_" not in n}
    assert found.keys() == expected.keys() and len(deltas) > 1
    changed = 0
    for name, parameter in expected.items():
        layer = name.removeprefix("detector_model.").removesuffix(".weight")
        if name.startswith("detector_model.") and layer in deltas:
            assert torch.equal(found[name], parameter + deltas[layer]), name
            assert not torch.equal(found[name], parameter), name
            changed += 1
        else:
            assert torch.equal(found[name], parameter), name
    assert changed == len(deltas)


def test_the_tracker_starts_from_our_detections(video_base, adapter, noise):
    forward = load_forward(str(video_base), "meta", "cpu", "no", adapter)
    prompts = Prompts(["cat", "a red bus " * 40], [], [])  # longer than the text encoder reads
    forward.release_text_encoder(prompts.texts)
    parts = build_tracker(str(video_base), forward.model, forward.tokenizer)
    best = {}
    for geometry_cls in ("meta", "hf"):
        own = replace(forward, geometry_cls=geometry_cls)
        tracked = video.track_sam3(*parts, own, prompts.texts, [0.0, 0.0], noise)
        _, found, ids = next(tracked)
        tracked.close()
        ours, _ = find(own, noise[0].photo, prompts, [0.0, 0.0], 2)
        order = np.argsort(-found["score"])
        assert np.allclose(found["score"][order], ours["score"][:3], atol=1e-5)
        assert np.array_equal(found["category_id"][order], ours["category_id"][:3])
        assert sorted(ids) == [1, 2, 3]
        # The best object keeps its whole mask, whatever lies below it.
        assert mask_iou([found["rles"][order[0]]], [ours["rles"][0]])[0, 0] > 0.99
        best[geometry_cls] = ours["score"][0]
    assert abs(best["meta"] - best["hf"]) > 1e-5


def test_the_tracker_keeps_to_the_threshold_of_each_prompt(video_base, adapter, noise):
    forward = load_forward(str(video_base), "meta", "cpu", "no", adapter)
    parts = build_tracker(str(video_base), forward.model, forward.tokenizer)

    def run(*thresholds: float) -> list[tuple[int, float]]:
        tracked = video.track_sam3(*parts, forward, ["cat", "x"], thresholds, noise[:2])
        found = [found for _, found, _ in tracked]
        return [p for f in found for p in zip(f["category_id"], f["score"], strict=True)]

    everything = run(0.0, 0.0)
    prompt = everything[0][0]
    strict = [1.0 if prompt == number else 0.0 for number in (1, 2)]
    assert run(*strict) == [row for row in everything if row[0] != prompt]


def test_a_session_forgets_what_no_later_frame_reads(video_base, noise, monkeypatch):
    forward = load_forward(str(video_base), "hf", "cpu", "no")
    model, processor = build_tracker(str(video_base), forward.model, forward.tokenizer)
    sessions = []
    start = processor.init_video_session
    monkeypatch.setattr(
        processor, "init_video_session", lambda **kw: sessions.append(start(**kw)) or sessions[-1]
    )

    def run() -> list:
        tracked = video.track_sam3(model, processor, forward, ["cat"], [0.0], noise)
        return [(found["rles"], found["score"].tolist(), ids) for _, found, ids in tracked]

    short = run()
    monkeypatch.setattr(video, "_forget", lambda *_: None)
    assert run() == short and any(ids == [1, 2, 3] for *_, ids in short[1:])
    kept, all_kept = (
        [len(o["non_cond_frame_outputs"]) for o in session.output_dict_per_obj.values()]
        for session in sessions
    )
    assert all_kept == [7, 7, 7] and kept == [4, 4, 4]
    assert sum(frame is not None for frame in sessions[0].processed_frames.values()) == 0


def test_bases_without_a_tracker_are_refused(tiny_model_dir, tiny_hub_dir):
    model, tokenizer = load_model(str(tiny_hub_dir))
    with pytest.raises(ModelError, match="expected every weight of SAM 3.*get a full copy"):
        build_tracker(str(tiny_hub_dir), model, tokenizer)
    with pytest.raises(ModelError, match="expected SAM 3's video model, found the detector"):
        build_tracker(str(tiny_model_dir), model, tokenizer)


def test_sam3s_tracker_through_the_script(adapter, noise, tmp_path, capsys):
    (tmp_path / "clip").mkdir()
    for frame in noise[:3]:
        Image.fromarray(frame.photo).save(tmp_path / "clip" / frame.file_name)
    words = ["--video", tmp_path / "clip", "--text_prompt", "x", "y", "--threshold", 0]
    words += ["--output", tmp_path / "out", "--lora_weights", adapter, "--tracker", "sam3"]
    code = inference.main([*map(str, words), "--device", "cpu", "--save_masks"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    rows = json.loads((tmp_path / "out" / "clip_detections.json").read_text(encoding="utf-8"))
    assert {row["frame"] for row in rows} == {0, 1, 2}
    assert {row["track_id"] for row in rows} == {1, 2, 3}
    assert len({(row["track_id"], row["prompt"]) for row in rows}) == 3
    assert printed.out.endswith(f"in 3 frames, {tmp_path / 'out' / 'clip.gif'}\n")
    for row in rows:
        assert decode_mask(row["segmentation"], *SIZE[::-1]).any()
