"""`evaluate_sam3_lora.py --compare`: the base's figures, the two side by side, the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_sam3_lora
from lora_layers import LoRAConfig, lora_modules, remove_lora
from sam3_lora import checkpoint, evaluation, report
from sam3_lora.coco import CocoSplit
from sam3_lora.drawing import CELL_SIZE, GUTTER, PALETTE, draw_panel, to_cell
from sam3_lora.tables import format_comparison

LORA = LoRAConfig(
    rank=2,
    alpha=4.0,
    target_modules=("v_proj",),
    components=("vision_encoder", "text_encoder", "detr_decoder"),
)
HEIGHT, WIDTH = CELL_SIZE
FILES = {"metrics.json", "detections.json", "base_detections.json", "panel.png"}


@pytest.fixture(scope="module")
def adapter_file(tiny_model_dir, save_random_adapter, tmp_path_factory) -> Path:
    """An adapter that changes what the model finds."""
    path = tmp_path_factory.mktemp("adapter") / "lora_weights.pt"
    return save_random_adapter(path, tiny_model_dir, LORA, geometry_cls="hf")


@pytest.fixture(scope="module")
def data_dirs(write_split, tmp_path_factory) -> dict[str, Path]:
    """Three images of 96 x 64 pixels, of which two have objects: with masks, and boxes only."""
    root = tmp_path_factory.mktemp("data")
    return {k: write_split(root / k, 3, masks=k == "masks") for k in ("masks", "boxes")}


@pytest.fixture
def run(data_dirs, adapter_file, capsys):
    """Evaluates the adapter on the CPU; returns (exit code, stdout, stderr)."""

    def call(*words, data: str = "masks", weights: bool = True) -> tuple[int, str, str]:
        argv = ["--data_dir", data_dirs[data], "--device", "cpu", "--num_workers", "0", *words]
        argv += ["--lora_weights", adapter_file] if weights else []
        code = evaluate_sam3_lora.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call


def read(folder: Path, name: str = "metrics.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def columns_of(path: Path, rows: int, width: int) -> list[np.ndarray]:
    """The three columns of pictures of a panel, checked to be where they should."""
    panel = np.asarray(Image.open(path))
    assert panel.dtype == np.uint8 and panel.shape[1:] == (3 * width + 4 * GUTTER, 3)
    assert (panel[:, :GUTTER] == 255).all() and (panel[-GUTTER:] == 255).all()
    top = next(y for y in range(len(panel)) if (panel[y, GUTTER : GUTTER + width] < 250).all())
    bottom = top + rows * (HEIGHT + GUTTER) - GUTTER
    assert (panel[bottom : bottom + GUTTER] == 255).all() and bottom + GUTTER < len(panel)
    starts = [GUTTER + k * (width + GUTTER) for k in range(3)]
    return [panel[top:bottom, left : left + width] for left in starts]


@pytest.mark.scripts
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_removing_a_loaded_adapter_leaves_the_exact_base(precision, adapter_file) -> None:
    content = checkpoint.read_adapter(adapter_file)
    how = content["base_model"], "hf", "cpu", precision
    adapted, base = (evaluation.load_forward(*how, *w) for w in ((adapter_file, content), ()))
    assert all(m.merged == (precision == "no") for _, m in lora_modules(adapted.model))
    remove_lora(adapted.model)
    own, expected = adapted.model.state_dict(), base.model.state_dict()
    assert own.keys() == expected.keys()
    for name, value in own.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_both_read_as_if_evaluated_alone(precision, run, tmp_path) -> None:
    words = ["--score_threshold", "0.2", "--mixed_precision", precision, "--output_dir"]
    code, out, err = run("--compare", *words, tmp_path / "both")
    assert code == 0, err
    assert run("--base", *words, tmp_path / "base")[0] == 0
    alone = run(*words, tmp_path / "adapter")[1]
    assert out.startswith(alone)
    both = read(tmp_path / "both")
    base, adapter = both.pop("base"), read(tmp_path / "adapter")
    assert both == adapter and base["losses"] != adapter["losses"]
    expected = read(tmp_path / "base")
    assert base == {name: expected[name] for name in base}
    assert expected.keys() - base.keys() == {
        "model",
        "data",
        "split",
        "adapter",
        "geometry_cls",
        "prompt_with",
    }
    assert out == f"{alone}\n{format_comparison(base, adapter)}\n"
    assert {path.name for path in (tmp_path / "both").iterdir()} == FILES
    for name, other in (("base_detections.json", "base"), ("detections.json", "adapter")):
        assert read(tmp_path / "both", name) == read(tmp_path / other, "detections.json")


def test_the_panel_shows_annotations_base_and_adapter(run, tmp_path) -> None:
    assert run("--compare", "--score_threshold", "0", "--output_dir", tmp_path / "all")[0] == 0
    assert run("--compare", "--score_threshold", "1", "--output_dir", tmp_path / "none")[0] == 0
    truth, base, adapter = columns_of(tmp_path / "all" / "panel.png", 3, HEIGHT * 96 // 64)
    assert (truth != base).any() and (base != adapter).any()
    same, *photos = columns_of(tmp_path / "none" / "panel.png", 3, HEIGHT * 96 // 64)
    # Without detections: the photos. The images with most categories come first, the empty last.
    assert np.array_equal(truth, same) and np.array_equal(*photos)
    tops = [row * (HEIGHT + GUTTER) for row in range(3)]
    changed = [(same != photos[0])[y : y + HEIGHT].any() for y in tops]
    assert changed == [True, True, False]


def test_a_split_of_boxes(run, tmp_path) -> None:
    words = ["--compare", "--score_threshold", "0", "--output_dir", tmp_path / "boxes"]
    code, out, err = run(*words, data="boxes")
    assert code == 0 and err.count("no masks") == 1
    lines = {line[:30].strip(): line[30:].split() for line in out.splitlines()}
    assert lines["mask AP"] == lines["mask IoU"] == ["undefined"] * 3
    assert "segmentation" not in read(tmp_path / "boxes", "base_detections.json")[0]
    truth, _, _ = columns_of(tmp_path / "boxes" / "panel.png", 3, HEIGHT * 96 // 64)
    assert any((truth == color).all(axis=-1).any() for color in PALETTE[:2])


@pytest.mark.parametrize(
    ("words", "weights", "found"),
    [(["--base"], True, "found --base"), ([], False, "found no adapter")],
)
def test_a_comparison_needs_an_adapter(words, weights, found, run, tmp_path) -> None:
    code, out, err = run("--compare", *words, "--output_dir", tmp_path / "out", weights=weights)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: --compare: expected --lora_weights FILE") and found in err
    assert not (tmp_path / "out").exists()


def test_a_replaced_comparison_leaves_nothing_behind(run, tmp_path) -> None:
    output = tmp_path / "out"
    words = ["--max_val_images", "1", "--output_dir", output]
    output.mkdir()
    (output / "panel.png").write_text("a user's")
    assert run(*words)[0] == 0
    assert (output / "panel.png").read_text() == "a user's"
    assert run("--compare", *words)[0] == 0  # the earlier one is renamed
    assert {path.name for path in output.iterdir()} == FILES
    assert (tmp_path / "out.1" / "panel.png").read_text() == "a user's"
    assert run(*words, "--overwrite")[0] == 0
    assert {path.name for path in output.iterdir()} == {"metrics.json", "detections.json"}
    assert "base" not in read(output)


def test_the_images_with_the_most_categories_are_drawn(monkeypatch) -> None:
    counts = [0, 1, 3, 1, 2, 3]
    images = [
        {"id": i, "file_name": f"{i}.png", "width": 20, "height": 10} for i in range(len(counts))
    ]
    box = {"bbox": [1.0, 1.0, 8.0, 8.0], "segmentation": None, "iscrowd": 0}
    annotations = {i: [{**box, "category_id": c} for c in range(n)] for i, n in enumerate(counts)}
    annotations[0] = [{**box, "category_id": c, "iscrowd": 1} for c in range(3)]
    annotations[3] *= 9  # many objects are one category all the same
    names = {c: f"c{c}" for c in range(3)}
    split = CocoSplit(Path("a.json"), Path("."), images, annotations, names, {})
    drawn = []
    photo = np.full((10, 20, 3), 90, np.uint8)
    monkeypatch.setattr(report, "read_image", lambda p: drawn.append(p.name) or photo)
    panel, colors = evaluate_sam3_lora.draw_comparison(split, [], [], 0.5)
    assert drawn == ["2.png", "5.png", "4.png", "1.png"]
    assert panel.shape[1] == 3 * WIDTH + 4 * GUTTER and colors == {0: 0, 1: 1, 2: 2}


def test_the_table_of_both() -> None:
    figures = dict.fromkeys(("cgF1@0.5", "cgF1", "IL_MCC", "pmF1"), 0.5)
    base = {"bbox": {"AP": 0.25, "AP50": None}, "segm": None, "cgf1": figures, "mask_iou": None}
    base["false_positive_rate"] = 0.9
    base["counts"] = {"objects": 2, "objects_with_mask": 1, "absent_pairs": 3}
    adapter = {**base, "bbox": {"AP": 0.75, "AP50": 0.8}, "false_positive_rate": 0.1}
    lines = format_comparison(base, adapter).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 11
    rows = {line[:-36].strip(): line[-36:].split() for line in lines}
    assert rows[""] == ["base", "adapter", "difference"]
    assert rows["box AP"] == ["0.250", "0.750", "+0.500"]
    assert rows["box AP50"] == ["undefined", "0.800", "undefined"]
    assert rows["cgF1@0.5"] == ["0.500", "0.500", "+0.000"]
    assert rows["false positives on absent prompts"] == ["0.900", "0.100", "-0.800"]
    adapter["false_positive_rate"] = 0.9 - 1e-6
    assert format_comparison(base, adapter).endswith(" +0.000")
    base["counts"] |= {"objects_with_mask": 0, "absent_pairs": 0}
    assert format_comparison(base, adapter).splitlines()[11:] == [
        "undefined: no object has a mask; no image lacks a category: keep images without the "
        "object to measure false alarms"
    ]


def flat(height: int, width: int, color: int) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def test_a_panel_of_unequal_pictures() -> None:
    rows = [[flat(100, 100, 10), flat(1000, 500, 60)], [flat(50, 400, 110), flat(384, 384, 160)]]
    panel = draw_panel(rows, ["one", "two"])
    assert panel.dtype == np.uint8
    # Scaled: 384 x 384 and 384 x 192; the wide one, 96 x 768, and 384 x 384.
    assert panel.shape[1] == 768 + 384 + 3 * GUTTER
    top = int(np.flatnonzero((panel[:, GUTTER + 384] == 10).all(axis=-1))[0])
    assert panel.shape[0] == top + 2 * (384 + GUTTER)
    for color, area in ((10, 384 * 384), (60, 384 * 192), (110, 96 * 768), (160, 384 * 384)):
        assert (panel == color).all(axis=-1)[top:].sum() == area
    assert (panel[top : top + 384, GUTTER + 192 : GUTTER + 192 + 384] == 10).all()  # centred
    for left, right in ((0, 784), (784, 1176)):
        ink = np.flatnonzero((panel[:top, left:right] < 128).all(axis=-1).any(axis=0))
        assert abs(ink.mean() + left - (left + right) / 2) < 12  # a title over its column
    assert np.array_equal(panel, draw_panel(rows, ["one", "two"], {}))


def test_a_panel_needs_a_title_a_column() -> None:
    with pytest.raises(ValueError, match="zip"):
        draw_panel([[flat(9, 9, 0), flat(9, 9, 0)]], ["one"])


@pytest.mark.parametrize("count", [1, 30])
def test_a_legend_goes_below_on_as_many_lines_as_it_needs(count) -> None:
    rows = [[flat(100, 100, 10)]]
    plain = draw_panel(rows, ["one"])
    panel = draw_panel(rows, ["one"], {f"category {k}": k for k in range(count)})
    assert np.array_equal(panel[: len(plain)], plain) and panel.shape[1] == plain.shape[1]
    legend = panel[len(plain) :]
    for color in PALETTE[:count]:
        assert (legend == color).all(axis=-1).any()
    assert (legend[:, -GUTTER:] == 255).all() and (legend[-GUTTER:] == 255).all()
    assert (len(legend) > 100) == (count > 1)


def test_a_mask_is_scaled_as_its_photo() -> None:
    mask = np.zeros((64, 96), bool, order="F")  # as pycocotools decodes
    mask[16:32, 24:72] = True
    scaled = to_cell(mask)
    assert scaled.dtype == bool and scaled.shape == to_cell(flat(64, 96, 0)).shape[:2] == (384, 576)
    expected = np.zeros((384, 576), bool)
    expected[96:192, 144:432] = True
    assert np.array_equal(scaled, expected)
    assert to_cell(np.ones((3, 9000), bool)).shape == (1, 768)
