"""Pictures: detections over an image, panels of such pictures, training curves.

Images are uint8 (H, W, 3) RGB, boxes xyxy in pixels. Line width and text follow the image's
size, so that a thumbnail and a 20-megapixel photo read alike.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sam3_lora.files import write_atomically

log = logging.getLogger(__name__)

# One colour a prompt; neighbours differ in hue and in lightness.
PALETTE = (
    (40, 120, 240),
    (245, 180, 0),
    (160, 60, 210),
    (0, 185, 185),
    (250, 115, 20),
    (235, 70, 165),
    (125, 180, 20),
    (90, 60, 235),
    (150, 95, 45),
    (75, 180, 250),
    (0, 130, 100),
    (230, 60, 60),
)
BOX_PROMPT_COLORS = ((235, 30, 30), (0, 200, 60))  # negative, positive
MASK_OPACITY = 0.4
LINE_WIDTH = 0.003  # of the image's side, the square root of its area
FONT_SIZE = 0.026  # likewise
MIN_FONT_SIZE = 8  # pixels; smaller is unreadable
TAG_CHARACTERS = 200  # each is measured, again and again, to cut what does not fit
CROWDED = 15  # detections; above, text is set smaller
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
LIGHT = 140  # of 255; on lighter tags the text is black
CELL_SIZE = (384, 768)  # height of a panel's pictures, pixels; the width of those too wide
GUTTER = 8  # pixels between them
TITLE_SIZE = 20  # of the font, pixels; the legend's is smaller
LEGEND_SIZE = 15
SHEET_CELL = (340, 420)  # height and width of a contact sheet's pictures, pixels
SHEET_COLUMNS = 4
BAR_SIZE = (32, 240)  # height and width of a category's bar with its name, pixels
QUALITY_KEYS = ("ap", "ap50", "cgf1")  # of a validation
LEGEND_INSIDE = 6  # curves; a legend of more hides them
LOG_SPAN = 2  # largest value over smallest; below it a logarithmic axis has too few ticks


def draw_overlay(
    image: np.ndarray,
    masks: Iterable[np.ndarray],
    boxes_xyxy: np.ndarray,
    labels: Sequence[str],
    colors: Sequence[int],
    box_prompts_xyxy: Iterable[Sequence[float]] = (),
    box_prompt_labels: Iterable[int] = (),
    outlined: Sequence[bool] | None = None,
) -> np.ndarray:
    """Draws detections over an image.

    Args:
        image: uint8 (H, W, 3).
        masks: n of bool (H, W); an empty one is not drawn. A colour tints a pixel once, however
            many of its masks overlap there.
        boxes_xyxy: (n, 4) pixels; may reach beyond the image.
        labels: n texts such as "crack 0.87"; an empty one gets no tag.
        colors: n indices into PALETTE, counted round; one a prompt.
        box_prompts_xyxy: the user's boxes, drawn dashed.
        box_prompt_labels: 1 positive (green) or 0 negative (red), one a box.
        outlined: whether each box is drawn, beside its label; None: all.

    Returns:
        uint8 (H, W, 3), a copy.
    """
    height, width = image.shape[:2]
    boxes = [_inside(box, width, height) for box in boxes_xyxy]
    colors = [int(c) % len(PALETTE) for c in colors]
    palette = [PALETTE[k] for k in colors]
    line = max(1, round(LINE_WIDTH * math.sqrt(height * width)))
    picture = Image.fromarray(np.array(image, dtype=np.uint8))
    _paint_masks(picture, masks, colors, line)
    draw = ImageDraw.Draw(picture)
    outlined = [True] * len(boxes) if outlined is None else outlined
    for box, color, drawn in zip(boxes, palette, outlined, strict=True):
        if box and drawn:
            draw.rectangle(box, outline=color, width=max(1, line // 2))
    for prompt, label in zip(box_prompts_xyxy, box_prompt_labels, strict=True):
        if box := _inside(prompt, width, height):
            _dashed_box(draw, box, BOX_PROMPT_COLORS[label], line)
    _draw_tags(draw, (width, height), boxes, labels, palette)
    return np.array(picture)


def _paint_masks(
    picture: Image.Image, masks: Iterable[np.ndarray], colors: Sequence[int], line: int
) -> None:
    """Tints what the masks of each colour cover, once where they overlap, and draws each mask's
    contour over all tints; in place. Masks are read one at a time."""
    shape = picture.height, picture.width
    covers = np.zeros(shape, dtype=np.uint16)  # bit k: in a mask of PALETTE[k]
    contours = np.zeros(shape, dtype=np.uint8)  # 1 + k: on a contour of PALETTE[k]
    windows: dict[int, list[int]] = {}  # k -> xyxy around its masks
    for mask, k in zip(masks, colors, strict=True):
        mask = np.asarray(mask, dtype=bool)
        rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            continue
        x1, y1, x2, y2 = (int(v) for v in (cols[0], rows[0], cols[-1] + 1, rows[-1] + 1))
        inside = np.ascontiguousarray(mask[y1:y2, x1:x2])  # COCO's masks come by columns
        covers[y1:y2, x1:x2] |= inside * np.uint16(1 << k)
        contours[y1:y2, x1:x2][inside & ~_eroded(inside, line)] = k + 1
        box = windows.get(k, [x1, y1, x2, y2])
        windows[k] = [min(box[0], x1), min(box[1], y1), max(box[2], x2), max(box[3], y2)]
    for k, (x1, y1, x2, y2) in windows.items():
        covered = (covers[y1:y2, x1:x2] & np.uint16(1 << k)) > 0
        _tint(picture, covered, (x1, y1), PALETTE[k], MASK_OPACITY)
    for k, (x1, y1, x2, y2) in windows.items():
        _tint(picture, contours[y1:y2, x1:x2] == k + 1, (x1, y1), PALETTE[k], 1.0)


def _tint(
    picture: Image.Image, area: np.ndarray, corner: tuple[int, int], color: tuple, opacity: float
) -> None:
    """Blends a colour into the area (h, w), bool, whose top left is at a corner, in place."""
    weights = area.view(np.uint8) * np.uint8(round(255 * opacity))
    picture.paste(color, corner, Image.fromarray(weights))


def _eroded(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask less `radius` pixels along its edge; outside the array is background."""
    span = 2 * radius + 1
    for _ in range(2):  # along one axis, then, transposed, along the other
        mask = np.pad(mask, ((radius, radius), (0, 0)))
        length = 1  # of the runs of True that `mask` marks the starts of
        while length < span:
            step = min(length, span - length)
            mask = mask[:-step] & mask[step:]
            length += step
        mask = mask.T
    return mask


def _inside(box: Sequence[float], width: int, height: int) -> list[int] | None:
    """The first and last pixels of a box inside the image, or None where there are none."""
    x1, y1, x2, y2 = (float(v) for v in box)
    # Written so that NaN is outside too.
    if not (max(0, x1) < min(x2, width) and max(0, y1) < min(y2, height)):
        return None
    left, top = min(round(max(0, x1)), width - 1), min(round(max(0, y1)), height - 1)
    right, bottom = round(min(width, x2)) - 1, round(min(height, y2)) - 1
    return [left, top, max(left, right), max(top, bottom)]


def _dashed_box(draw: ImageDraw.ImageDraw, box: list[int], color: tuple, line: int) -> None:
    """Outlines a box in dashes over a white line, which shows on any background."""
    x1, y1, x2, y2 = box
    line += 1
    dash = max(3, 4 * line)
    draw.rectangle(box, outline=(255, 255, 255), width=line)
    for x in range(x1, x2 + 1, 2 * dash):
        end = min(x + dash - 1, x2)
        draw.rectangle([x, y1, end, min(y1 + line - 1, y2)], fill=color)
        draw.rectangle([x, max(y2 - line + 1, y1), end, y2], fill=color)
    for y in range(y1, y2 + 1, 2 * dash):
        end = min(y + dash - 1, y2)
        draw.rectangle([x1, y, min(x1 + line - 1, x2), end], fill=color)
        draw.rectangle([max(x2 - line + 1, x1), y, x2, end], fill=color)


def _draw_tags(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], boxes: list, labels: list, palette: list
) -> None:
    """Draws each label on a filled tag at its box, inside the image, off the other tags."""
    shrink = min(1.0, max(0.6, math.sqrt(CROWDED / max(1, len(labels)))))
    font_size = max(MIN_FONT_SIZE, round(shrink * FONT_SIZE * math.sqrt(size[0] * size[1])))
    placed: list[tuple] = []  # xyxy of the tags so far
    for box, label, color in zip(boxes, labels, palette, strict=True):
        if not box or not label:
            continue
        text, font = _fitted(label, font_size, size[0])
        tag = _tag_size(text, font)
        x, y = _tag_position(box, tag, size, placed)
        placed.append((x, y, x + tag[0], y + tag[1]))
        _draw_tag(draw, placed[-1], text, font, color)


def _tag_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height of a tag."""
    left, _, right, _ = font.getbbox(text)
    pad = max(1, font.size // 6)
    return right - left + 2 * pad, sum(font.getmetrics()) + pad


def _draw_tag(
    draw: ImageDraw.ImageDraw, box: tuple, text: str, font: ImageFont.FreeTypeFont, color: tuple
) -> None:
    """Fills a box of `_tag_size` and writes the text in it."""
    x, y, right, bottom = box
    pad = max(1, font.size // 6)
    draw.rectangle([x, y, right - 1, bottom - 1], fill=color)
    ink = (0, 0, 0) if np.dot(color, LUMA) > LIGHT else (255, 255, 255)
    draw.text((x + pad - font.getbbox(text)[0], y + pad / 2), text, fill=ink, font=font)


def _fitted(text: str, font_size: int, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text, cut short where even the smallest font is wider than the image, and its font."""
    room = width - 2 * max(1, font_size // 6)
    if len(text) > TAG_CHARACTERS:
        text = text[: TAG_CHARACTERS - 1] + "."
    font = _font(font_size, text)
    if font.getlength(text) > room:
        font_size = max(MIN_FONT_SIZE, int(font_size * room / font.getlength(text)))
        font = _font(font_size, text)
    while len(text) > 1 and font.getlength(text) > room:
        text = text[:-2] + "." if text.endswith(".") else text[:-1] + "."
    return text, font


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """A font that has the letters of a text, or a part of them where none has them all."""
    return _load_font(_find_font(frozenset(map(ord, text)) - _letters(_own_font())), size)


_load_font = cache(ImageFont.truetype)


@cache
def _own_font() -> str:
    """matplotlib's DejaVu Sans, which has Latin, Cyrillic, Greek, Arabic and more; PIL's own font
    has Latin alone."""
    import matplotlib  # slow to import

    return str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))


@cache
def _letters(font: str) -> frozenset[int]:
    """The code points that a font's file has."""
    from matplotlib.ft2font import FT2Font  # slow to import

    return frozenset(FT2Font(font).get_charmap())


@cache
def _find_font(missing: frozenset[int]) -> str:
    """The first font of this machine that has letters which ours lacks, such as Chinese ones, and
    Latin ones beside; ours where there are none, or no such font."""
    from matplotlib.font_manager import findSystemFonts  # slow to import

    wanted = missing | set(map(ord, "a0"))
    for font in sorted(findSystemFonts()) if missing else ():
        with suppress(RuntimeError, OSError):  # a damaged one
            if wanted <= _letters(font):
                return font
    if missing:
        letters = "".join(map(chr, sorted(missing)))
        log.warning(
            "no installed font has %s, drawn as boxes; install one, such as Noto Sans CJK", letters
        )
    return _own_font()


def _tag_position(
    box: list[int], tag: tuple[int, int], size: tuple[int, int], placed: list[tuple]
) -> tuple[int, int]:
    """Top left corner for a tag: the first place at its box that is free, else the freest."""
    x1, y1, x2, y2 = box
    tag_w, tag_h = tag
    lines = (y1 - tag_h, y1, y2 + 1, y2 - tag_h + 1, (y1 + y2 - tag_h) // 2)
    places = [
        (max(0, min(x, size[0] - tag_w)), max(0, min(y, size[1] - tag_h)))
        for y in lines
        for x in (x1, x2 - tag_w + 1)
    ]

    def covered(place: tuple[int, int]) -> int:
        x, y = place
        return sum(
            max(0, min(x + tag_w, right) - max(x, left))
            * max(0, min(y + tag_h, bottom) - max(y, top))
            for left, top, right, bottom in placed
        )

    return min(places, key=covered)


def to_cell(image: np.ndarray, cell: tuple[int, int] = CELL_SIZE) -> np.ndarray:
    """An image, uint8 (H, W, 3), or a mask, bool (H, W), scaled into a cell (height, width)."""
    height, width = image.shape[:2]
    scale = min(cell[0] / height, cell[1] / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.array(Image.fromarray(image).resize(size))  # bicubic; of a mask the nearest pixel


def draw_panel(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    legend: Mapping[str, int] | None = None,
) -> np.ndarray:
    """Puts pictures side by side on white.

    Args:
        rows: a picture, uint8 (H, W, 3), for each title in each row; scaled by `to_cell`.
        titles: of the columns.
        legend: text -> index into PALETTE, counted round; tags below the pictures.

    Returns:
        uint8 (H, W, 3).
    """
    cells = [[to_cell(picture) for picture in row] for row in rows]
    widths = [max(c.shape[1] for c in column) for column in zip(*cells, strict=True)]
    font = _font(TITLE_SIZE)
    tops = [sum(font.getmetrics()) + GUTTER]
    tops += [max(c.shape[0] for c in row) + GUTTER for row in cells]
    *tops, top = np.cumsum(tops).tolist()
    *lefts, right = np.cumsum([GUTTER, *(w + GUTTER for w in widths)]).tolist()
    tags, bottom = _place_legend(legend or {}, top, right)
    panel = Image.new("RGB", (right, bottom), (255, 255, 255))
    draw = ImageDraw.Draw(panel)
    for title, left, width in zip(titles, lefts, widths, strict=True):
        text, fitted = _fitted(title, TITLE_SIZE, width)
        draw.text((left + width / 2, GUTTER / 2), text, (0, 0, 0), fitted, anchor="ma")
    for top, row in zip(tops, cells, strict=True):
        for left, width, cell in zip(lefts, widths, row, strict=True):
            panel.paste(Image.fromarray(cell), (left + (width - cell.shape[1]) // 2, top))
    for box, text, color in tags:
        _draw_tag(draw, box, text, _font(LEGEND_SIZE, text), color)
    return np.array(panel)


def _place_legend(legend: Mapping[str, int], top: int, right: int) -> tuple[list[tuple], int]:
    """The legend's tags, (xyxy, text, colour), in as many lines as they need, and their end."""
    x, tags = GUTTER, []
    for text, color in legend.items():
        width, height = _tag_size(text, _font(LEGEND_SIZE, text))
        if x > GUTTER and x + width + GUTTER > right:
            x, top = GUTTER, top + height + GUTTER
        tags.append(((x, top, x + width, top + height), text, PALETTE[color % len(PALETTE)]))
        x += width + GUTTER
    return tags, tags[-1][0][3] + GUTTER if tags else top


def draw_sheet(
    pictures: Sequence[np.ndarray], captions: Sequence[str], counts: Mapping[str, tuple[int, int]]
) -> np.ndarray:
    """Puts pictures in a grid on white, with a bar for each category beside them.

    Args:
        pictures: uint8 (H, W, 3) each, of at most SHEET_CELL.
        captions: below the pictures.
        counts: category -> its number of objects and its index into PALETTE, counted round.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = (side + GUTTER for side in SHEET_CELL)
    height += LEGEND_SIZE + GUTTER
    across = min(SHEET_COLUMNS, max(1, len(pictures)))
    down = max(1, math.ceil(len(pictures) / across))
    lines = max(1, (down * height - GUTTER) // BAR_SIZE[0])  # of bars in a column of them
    left = across * width + GUTTER
    right = left + math.ceil(max(1, len(counts)) / lines) * (BAR_SIZE[1] + GUTTER) + GUTTER
    sheet = Image.new("RGB", (right, down * height + GUTTER), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = GUTTER + number % across * width, GUTTER + number // across * height
        middle = x + SHEET_CELL[1] // 2
        top = y + SHEET_CELL[0] - picture.shape[0]
        sheet.paste(Image.fromarray(picture), (middle - picture.shape[1] // 2, top))
        text, font = _fitted(caption, LEGEND_SIZE, SHEET_CELL[1])
        draw.text((middle, y + SHEET_CELL[0] + 2), text, (0, 0, 0), font, anchor="ma")
    longest = max((count for count, _ in counts.values()), default=0)
    for number, (name, (count, color)) in enumerate(counts.items()):
        x, y = (
            left + number // lines * (BAR_SIZE[1] + GUTTER),
            GUTTER + number % lines * BAR_SIZE[0],
        )
        _draw_bar(draw, (x, y), name, count, longest, PALETTE[color % len(PALETTE)])
    return np.array(sheet)


def _draw_bar(
    draw: ImageDraw.ImageDraw, corner: tuple, name: str, count: int, longest: int, color: tuple
) -> None:
    """A category's name and count over a bar, as long as its share of the largest count."""
    (x, y), (_, width) = corner, BAR_SIZE
    text, font = _fitted(name, LEGEND_SIZE, width - 5 * LEGEND_SIZE)
    draw.text((x, y), text, (0, 0, 0) if count else (130, 130, 130), font)
    draw.text((x + width, y), str(count), (0, 0, 0), _font(LEGEND_SIZE), anchor="ra")
    top = y + LEGEND_SIZE + 5
    draw.rectangle([x, top, x + width - 1, top + 6], fill=(235, 235, 235))
    if count:
        draw.rectangle(
            [x, top, x + max(2, round(width * count / longest)) - 1, top + 6], fill=color
        )


def draw_curves(log_rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Draws loss, loss terms, learning rate and quality over the steps, and saves the picture.

    Args:
        log_rows: rows with "step" and any of "loss", "loss_<term>", "lr", "train_iou", and
            "val", a dict with any of "loss", "iou" and QUALITY_KEYS. What is missing, None or not
            finite is left out.
        path: a .png; written whole or not at all.
    """
    from matplotlib.figure import Figure  # slow to import; needs no display, unlike pyplot

    rows = [row for row in log_rows if _finite(row.get("step"))]
    figure = Figure(figsize=(15, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True).flat
    for axis, (title, curves) in zip(axes, _curves(rows).items(), strict=True):
        _draw_axis(axis, title, curves)
    _save(figure, path)


def _curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[list[dict], str, str]]]:
    """Title -> curves (rows, key, label).

    Training's loss has terms that validation's has not (the one-to-many branch), and the two are
    means over other things: each has an axis of its own. IoU is the same figure in both.
    """
    validation = [{**row["val"], "step": row["step"]} for row in rows if "val" in row]
    names = {key for row in rows for key in row}
    terms = sorted(n for n in names if n.startswith("loss_") or n == "presence_loss")
    return {
        "training loss": [(rows, "loss", "loss")],
        "training loss terms": [(rows, term, term.removeprefix("loss_")) for term in terms],
        "learning rate": [(rows, "lr", "lr")],
        "validation loss": [(validation, "loss", "loss")],
        "validation quality": [(validation, name, name) for name in QUALITY_KEYS],
        "matched IoU": [(rows, "train_iou", "training"), (validation, "iou", "validation")],
    }


def _draw_axis(axis: Any, title: str, curves: list[tuple[list[dict], str, str]]) -> None:
    """Draws the curves of one panel, losses that fall far on a logarithmic axis."""
    from matplotlib import colormaps  # slow to import
    from matplotlib.ticker import LogLocator, MaxNLocator

    axis.set_prop_cycle(color=colormaps["tab10" if len(curves) <= 10 else "tab20"].colors)
    drawn = [_plot(axis, *curve) for curve in curves]
    values = [value for curve in drawn for value in curve]
    axis.set(title=title, xlabel="step")
    axis.tick_params(labelbottom=True)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.ticklabel_format(useOffset=False)  # no "1e-3+8.055e2" beside the axis
    axis.grid(alpha=0.3)
    if not values:
        axis.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axis.transAxes)
    elif len(drawn) > LEGEND_INSIDE:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    elif len(drawn) > 1:
        axis.legend(fontsize=8)
    if "loss" in title and values and 0 < LOG_SPAN * min(values) < max(values):
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    else:
        axis.ticklabel_format(axis="y", scilimits=(-3, 4))


def _plot(axis: Any, rows: list[dict], key: str, label: str) -> list[float]:
    """Plots the finite values of one key, with dots where they are few; returns them."""
    points = [(row["step"], row[key]) for row in rows if _finite(row.get(key))]
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, marker="o" if len(points) < 30 else None, ms=4, label=label)
    return [value for _, value in points]


def _finite(value: Any) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)


def _save(figure: Any, path: Path) -> None:
    """Writes a figure, whole or not at all."""
    write_atomically(path, lambda place: figure.savefig(place, format="png", dpi=110))
