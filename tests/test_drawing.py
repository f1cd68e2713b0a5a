"""Overlays and curves: pixels where they belong, and nothing that makes them crash."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image

from sam3_lora import drawing, files
from sam3_lora.drawing import (
    BOX_PROMPT_COLORS,
    MASK_OPACITY,
    PALETTE,
    draw_curves,
    draw_overlay,
)

GREY = 100


def photo(height: int = 200, width: int = 300) -> np.ndarray:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def a_mask(shape, x1, y1, x2, y2) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def draw_boxes(boxes, labels, colors, size=(200, 300), **options) -> np.ndarray:
    """Boxes of objects without a mask on a grey photo."""
    masks = np.zeros((len(boxes), *size), dtype=bool)
    return draw_overlay(photo(*size), masks, np.array(boxes), labels, colors, **options)


def has_color(picture: np.ndarray, color) -> np.ndarray:
    return (picture == np.array(color)).all(axis=-1)


def test_mask_is_tinted_and_its_contour_is_pure():
    image = photo()
    masks = a_mask((200, 300), 100, 80, 200, 160)[None]
    picture = draw_overlay(image, masks, np.array([[100, 80, 200, 160]]), [""], [2])
    assert picture.shape == image.shape and picture.dtype == np.uint8
    assert (image == GREY).all(), "the given image was drawn on"
    tint = np.round(GREY * (1 - MASK_OPACITY) + np.array(PALETTE[2]) * MASK_OPACITY)
    assert picture[120, 150].tolist() == tint.tolist()
    for y, x in [(80, 150), (159, 150), (120, 100), (120, 199)]:
        assert picture[y, x].tolist() == list(PALETTE[2])
    outside = picture.copy()
    outside[80:160, 100:200] = GREY
    assert (outside == GREY).all()


def test_contour_follows_the_mask_not_the_box():
    yy, xx = np.mgrid[:200, :300]
    disk = np.hypot(yy - 100, xx - 150) < 50
    picture = draw_overlay(photo(), disk[None], np.array([[101, 51, 200, 150]]), [""], [0])
    pure = has_color(picture, PALETTE[0])
    assert pure[100, 101] and pure[51, 150]
    assert not pure[100, 105:195].any()
    assert picture[60, 110].tolist() == [GREY] * 3  # in the box, off the mask


def test_masks_of_one_prompt_tint_a_pixel_once():
    masks = [a_mask((200, 300), x, 50, x + 100, 150) for x in (60, 100, 20)]
    picture = draw_overlay(photo(), iter(masks), np.zeros((3, 4)), [""] * 3, [0, 1, 0])

    def tinted(value, k):
        return np.round(value * (1 - MASK_OPACITY) + np.array(PALETTE[k]) * MASK_OPACITY)

    assert picture[100, 80].tolist() == tinted(GREY, 0).tolist()  # two masks of one prompt
    assert picture[100, 140].tolist() == tinted(tinted(GREY, 0), 1).tolist()
    for x, k in [(60, 0), (100, 1), (119, 0), (20, 0)]:  # every contour, over all tints
        assert picture[100, x].tolist() == list(PALETTE[k])


def test_erosion_is_by_a_square():
    mask = np.random.default_rng(0).random((40, 30)) < 0.97
    for radius in (1, 2, 3):
        padded = np.pad(mask, radius)
        span = (2 * radius + 1,) * 2
        windows = np.lib.stride_tricks.sliding_window_view(padded, span)
        assert np.array_equal(drawing._eroded(mask, radius), windows.all(axis=(2, 3)))


def test_labels_in_other_scripts_are_readable():
    def ink(text):
        return bytes(drawing._font(40).getmask(text))

    assert len({ink(letter) for letter in "жщяΩשع\U0010ffff"}) == 7  # no two are the box


def test_letters_that_our_font_lacks_come_from_an_installed_one(monkeypatch, caplog):
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    junk, *others = (str(folder / f"{name}.ttf") for name in ("none", "cmr10", "STIXGeneral"))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [junk, *others])
    drawing._find_font.cache_clear()
    letter = "\u1d81"  # of STIX alone
    assert Path(drawing._font(20, f"crack {letter} 0.87").path).name == "STIXGeneral.ttf"
    assert Path(drawing._font(20, "crack 0.87").path).name == "DejaVuSans.ttf"
    assert not caplog.records
    for score in ("0.87", "0.86"):
        assert Path(drawing._font(20, f"裂缝 {score}").path).name == "DejaVuSans.ttf"
    assert [r.getMessage() for r in caplog.records] == [
        "no installed font has 缝裂, drawn as boxes; install one, such as Noto Sans CJK"
    ]
    drawing._find_font.cache_clear()


def test_boxes_alone_are_outlined_only():
    picture = draw_boxes([[50, 60, 150, 120]], [""], [1])
    box = has_color(picture, PALETTE[1])
    assert box[60, 50:150].all() and box[119, 50:150].all()
    assert box[60:120, 50].all() and box[60:120, 149].all()
    assert (picture[65:115, 55:145] == GREY).all()


def test_one_colour_a_prompt():
    boxes = [[10, 100, 40, 130], [60, 100, 90, 130], [110, 100, 140, 130]]
    picture = draw_boxes(boxes, ["", "", ""], [3, 3, len(PALETTE)])
    assert picture[100, 20].tolist() == picture[100, 70].tolist() == list(PALETTE[3])
    assert picture[100, 120].tolist() == list(PALETTE[0])  # the palette is counted round


def test_palette_is_well_separated():
    colors = np.array(PALETTE, dtype=float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1)
    np.fill_diagonal(distances, 999)
    assert len(PALETTE) >= 10 and distances.min() > 45


@pytest.mark.parametrize("box", [[0, 0, 20, 20], [280, 0, 300, 10], [270, 180, 400, 300]])
def test_tag_stays_inside_the_image(box):
    def tag_rows(box):
        picture = draw_boxes([box], ["bottle cap 0.87"], [1])
        widths = has_color(picture, PALETTE[1]).sum(axis=1)
        return widths.max(), (widths == widths.max()).sum()

    # Whole rows of the tag, which is wider than these boxes: as in the middle of the image.
    width, rows = tag_rows([100, 100, 120, 120])
    assert width > 40 and rows >= 2
    assert tag_rows(box) == (width, rows)


def test_tags_of_one_place_do_not_cover_each_other():
    boxes = [[100, 100, 180, 160]] * 2
    picture = draw_boxes(boxes, ["one 0.9", "two 0.8"], [0, 1])
    alone = [
        has_color(draw_boxes(boxes[:1], [label], [k]), PALETTE[k])[:99].sum()
        for k, label in enumerate(["one 0.9", "two 0.8"])
    ]
    assert has_color(picture, PALETTE[0])[:99].sum() == alone[0]
    assert has_color(picture, PALETTE[1]).sum() > alone[1]


def test_box_prompts_are_dashed_green_and_red():
    prompts = [[20, 20, 120, 120], [150, 50, 250, 150]]
    picture = draw_overlay(photo(), [], np.zeros((0, 4)), [], [], prompts, [1, 0])
    for (x1, y1, x2, y2), color in zip(prompts, reversed(BOX_PROMPT_COLORS), strict=True):
        dashes = has_color(picture, color)[y1, x1:x2]
        assert 0.3 < dashes.mean() < 0.8
        assert 8 < np.abs(np.diff(dashes.astype(int))).sum() < 40
        white = has_color(picture, (255, 255, 255))[y1, x1:x2]
        assert (dashes | white).all()
        assert (picture[y1 + 10 : y2 - 10, x1 + 10 : x2 - 10] == GREY).all()


def test_no_detection_leaves_the_image_as_it_is():
    assert (draw_overlay(photo(), [], np.zeros((0, 4)), [], []) == GREY).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (60, 60), (8, 500)])
def test_tiny_images(size):
    height, width = size
    masks = np.ones((1, height, width), dtype=bool)
    boxes = np.array([[0, 0, width, height]])
    picture = draw_overlay(
        photo(*size), masks, boxes, ["a very long prompt 0.87"], [0], boxes.tolist(), [0]
    )
    assert picture.shape == (height, width, 3)


def test_boxes_that_are_nowhere_are_skipped():
    nan, inf = float("nan"), float("inf")
    boxes = [[400, 10, 500, 20], [50, 50, 50, 60], [9, 9, 3, 3], [nan] * 4]
    picture = draw_boxes(boxes, ["x"] * 4, [0] * 4)
    assert (picture == GREY).all()
    everywhere = draw_boxes([[-inf, -inf, inf, inf]], [""], [0])
    assert has_color(everywhere, PALETTE[0])[0].all()


def test_lines_grow_with_the_image():
    def thickness(height, width):
        box = [width // 4, height // 4, width // 2, height // 2]
        picture = draw_boxes([box], [""], [0], (height, width))
        return has_color(picture, PALETTE[0])[:, width * 3 // 8].sum() // 2

    assert thickness(100, 100) == 1
    assert thickness(2400, 3200) == 4


@pytest.mark.scripts
def test_curves_are_written_from_whatever_was_logged(tmp_path):
    rows = [{"step": 1, "loss": 3.0, "loss_bbox": 1.0, "lr": 1e-4, "train_iou": 0.2}]
    rows += [{"step": 2, "loss": 2.0, "loss_bbox": None, "lr": 1e-4}, {"step": 3}, {"note": "x"}]
    rows += [{"step": 4, "loss": float("nan"), "val": {"loss": 2.5, "ap": 0.3, "cgf1": None}}]
    rows += [{"step": 5, "val": {"loss": None, "ap": 0.4, "iou": 0.5}}]
    path = tmp_path / "runs" / "curves.png"
    draw_curves(rows, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 800
        full = np.asarray(picture.convert("RGB"))
    assert list(path.parent.iterdir()) == [path]
    draw_curves([], path)
    with Image.open(path) as picture:
        empty = np.asarray(picture.convert("RGB"))
    coloured = [(np.ptp(p.astype(int), axis=-1) > 60).sum() for p in (full, empty)]
    assert coloured[0] > 200 and coloured[1] == 0


def test_ticks_are_values_not_offsets(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(drawing, "_save", lambda figure, path: figures.append(figure))
    draw_curves([{"step": i, "loss": 805.5 + i / 1e5} for i in range(9)], tmp_path / "c.png")
    figures[0].canvas.draw()
    axis = figures[0].axes[0]
    assert axis.yaxis.get_offset_text().get_text() == ""
    assert any(label.get_text().startswith("805.5") for label in axis.get_yticklabels())


def test_training_and_validation_loss_have_axes_of_their_own(tmp_path, monkeypatch):
    """Training adds terms that validation has not: on one axis they would look like overfitting."""
    figures = []
    monkeypatch.setattr(drawing, "_save", lambda figure, path: figures.append(figure))
    val = {"loss": 2.5, "iou": 0.4, "ap": 0.3, "ap50": 0.5, "cgf1": 0.2, "lr": 9.0}
    rows = [{"step": 1, "loss": 9.0, "loss_bbox": 1.0, "lr": 1e-4, "train_iou": 0.2}]
    draw_curves([*rows, {"step": 2, "val": val}], tmp_path / "curves.png")
    drawn = {
        axis.get_title(): {line.get_label() for line in axis.lines} for axis in figures[0].axes
    }
    assert drawn == {
        "training loss": {"loss"},
        "training loss terms": {"bbox"},
        "learning rate": {"lr"},
        "validation loss": {"loss"},
        "validation quality": {"ap", "ap50", "cgf1"},
        "matched IoU": {"training", "validation"},
    }


def test_a_box_may_be_named_and_not_outlined():
    boxes = [[50, 60, 150, 120], [160, 60, 200, 120]]
    picture = draw_boxes(boxes, ["", ""], [1, 2], outlined=[False, True])
    assert not has_color(picture, PALETTE[1]).any() and has_color(picture, PALETTE[2]).any()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_sheet(count, tmp_path):
    color = (1, 2, 3)
    pictures = [np.full((100, 200, 3), color, np.uint8)] * count
    counts = {"long name " * 9: (10, 0), "rare": (1, 1), "absent": (0, 2)}
    sheet = drawing.draw_sheet(pictures, ["a.png"] * count, counts)
    assert has_color(sheet, color).sum() == count * 100 * 200
    drawn = [has_color(sheet, PALETTE[k]).any(axis=0).sum() for k in (0, 1, 2)]
    width = drawing.BAR_SIZE[1]
    assert drawn == [width, width / 10, 0]
    assert (sheet[-1] == 255).all() and (sheet[:, -1] == 255).all()
    files.write_picture(tmp_path / "new" / "sheet.png", sheet)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]
    with Image.open(tmp_path / "new" / "sheet.png") as saved:
        assert np.array_equal(np.asarray(saved), sheet)
