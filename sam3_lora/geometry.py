"""Polygons, RLE and boxes as plain numbers: what makes them unusable, where they lie, and boxes as
a hand would draw them.

Nothing here decodes a mask or opens a file, so a hostile annotation costs no more than its length.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Pixels. pycocotools allocates in proportion to an edge's length: 1e9 would exhaust the memory.
COORDINATE_LIMIT = 1e5
# Pixels along a polygon, for the same reason: it takes some 40 bytes for each.
OUTLINE_LIMIT = 4e6
POINT_LIMIT = 100_000  # of a polygon; a contour of a 10-megapixel object has some 10,000
# Pixels a box may pass the image's edge: annotation tools round corners to whole pixels.
BOX_TOLERANCE = 1.0
FRACTION_SIDE = 2  # pixels; on a larger image, a box of numbers up to 1 is in fractions of it
# A mask's box may differ from the annotated one by so many pixels and this share of its side.
BOX_MASK_PIXELS = 5.0
BOX_MASK_SHARE = 0.1
# Pixels of an image, PIL's own limit, above which it warns of a decompression bomb.
PIXEL_LIMIT = 89_478_485
# Characters of one number in a compressed RLE, 5 bits each: more cannot be a run of an image.
RLE_NUMBER_LENGTH = 8
CROSSING_LIMIT = 500  # points; each edge is held against each, so longer polygons are not searched
FLAT = 1e-6  # pixels; a polygon whose points lie this close to a line has no area
# A drawn box's sides move by a normal share of its own, at most by this share of the photo's: 20 of
# SAM 3's 1008 pixels. Source: point_sampling.py of facebookresearch/sam3 @99d02f2.
JITTER, MOST_JITTER = 0.1, 20 / 1008
PLACES = 20  # on the background, at which `box_apart` tries a box
MESSAGE_LENGTH = 80  # characters of a found value in a message


def shown(value: Any) -> str:
    """Returns a value as a message shows it, short whatever a file holds."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, an int of too many digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= MESSAGE_LENGTH else f"{text[: MESSAGE_LENGTH - 3]}..."


def annotation_problems(
    row: dict, image: dict, thorough: bool = False
) -> Iterator[tuple[str, str, str, str]]:
    """Yields what is wrong with one annotation.

    Args:
        row: COCO's.
        image: The row of its image; problems of its own are not told here.
        thorough: Also what training survives: the shapes of masks, which takes longer.

    Yields:
        Level ("fatal" where the annotation cannot be read, "error", "warning"), kind, message,
        remedy.
    """
    bbox, segmentation = row.get("bbox"), segmentation_of(row)
    sides = image.get("width"), image.get("height")
    known = all(map(is_finite, sides)) and min(sides) >= 1
    if bbox is not None or segmentation is None:
        yield from _box_problems(bbox, sides if known else None)
    if row.get("area") is not None and not is_finite(row["area"]):
        message = f"expected a finite area, found {shown(row['area'])}"
        yield "fatal", "not a number", message, "remove the key: it is then computed"
    if row.get("iscrowd") not in (0, 1, None):
        message = f"expected iscrowd to be 0 or 1, found {shown(row['iscrowd'])}"
        yield "fatal", "iscrowd", message, "write 0 for a single object"
    if segmentation is None or not known:
        return
    problem = mask_problem(segmentation, int(sides[1]), int(sides[0]))
    if problem:
        remedy = 'draw it again, or set "segmentation" to [] to use the box alone'
        yield "fatal", "polygon" if isinstance(segmentation, list) else "RLE", problem, remedy
    elif thorough:
        yield from _shape_problems(segmentation, bbox, sides)


def _box_problems(bbox: Any, sides: tuple | None) -> Iterator[tuple[str, str, str, str]]:
    """Problems of one box, with its image's width and height, if they are known."""
    if not is_box(bbox):
        message = f"expected bbox [x, y, width, height] of finite numbers, found {shown(bbox)}"
        yield "fatal", "bbox", message, "write the box or remove the annotation"
        return
    x, y, width, height = bbox
    if width <= 0 or height <= 0:
        message = f"expected a box with width and height > 0, found {bbox}"
        yield "error", "empty box", message, "remove the annotation"
    if sides is None:
        return
    beyond = max(-x, -y, x + width - sides[0], y + height - sides[1])
    apart = x >= sides[0] or y >= sides[1] or x + width <= 0 or y + height <= 0
    if beyond > BOX_TOLERANCE or (apart and min(width, height) > 0):
        message = (
            f"expected a box inside the {sides[0]} x {sides[1]} image, found {bbox}, "
            f"{beyond:g} px beyond its edge"
        )
        remedy = "clip it, and check that its units are pixels and its form x, y, width, height"
        yield "error", "box outside", message, remedy


def _shape_problems(
    segmentation: list | dict, bbox: Any, sides: tuple
) -> Iterator[tuple[str, str, str, str]]:
    """Problems of a mask that can be read: no area, crossing edges, another place than its box."""
    box = mask_box(segmentation, int(sides[1]), int(sides[0]))
    if box is None:
        message = "expected a mask with an area inside the image, found none"
        yield "error", "empty mask", message, "remove the annotation"
        return
    for part in segmentation if isinstance(segmentation, list) else ():
        if is_flat(part):
            message = f"one part of the mask has no area: {shown(part)}"
            yield "warning", "flat polygon", message, "remove the part"
        elif crosses_itself(part):
            message = f"a polygon of {len(part) // 2} points crosses itself"
            remedy = "its mask may have holes: see it with --preview, draw it again"
            yield "warning", "crossing polygon", message, remedy
    if is_box(bbox) and min(bbox[2:]) > 0 and (apart := box_offset(bbox, box, sides)):
        message = f"the box {bbox} is {apart:.0f} px off its mask, whose box is "
        message += f"{[round(v, 1) for v in (*box[:2], box[2] - box[0], box[3] - box[1])]}"
        remedy = "see which is right with --preview; --fix takes that of the mask"
        yield "warning", "box off mask", message, remedy


def box_offset(bbox: list[float], box_xyxy: list[float], sides: tuple) -> float:
    """Returns by how many pixels a box (xywh) is off its mask's; 0 within the tolerance."""
    edges = (bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3])
    edges = [max(0, min(edge, limit)) for edge, limit in zip(edges, sides * 2, strict=True)]
    apart = max(abs(a - b) for a, b in zip(edges, box_xyxy, strict=True))
    side = max(box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1])
    return apart if apart > max(BOX_MASK_PIXELS, BOX_MASK_SHARE * side) else 0.0


def in_fractions(row: dict, image: dict) -> bool:
    """Returns whether an annotation's box looks like fractions of the image, as YOLO has them."""
    bbox, sides = row.get("bbox"), [image.get(key) for key in ("width", "height")]
    if not is_box(bbox) or not all(map(is_finite, sides)) or min(sides) <= FRACTION_SIDE:
        return False
    # Of an RLE, that of the pixel in the corner is no fraction.
    is_pixel = bbox == [0, 0, 1, 1] and isinstance(row.get("segmentation"), dict)
    return max(map(abs, bbox)) <= 1 and min(bbox[2:]) > 0 and not is_pixel


def is_box(value: Any) -> bool:
    """Returns whether a value is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_finite, value))


def is_finite(value: Any) -> bool:
    """Returns whether a value is a number that a float holds; JSON has NaN and any whole number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def segmentation_of(row: Mapping[str, Any]) -> Any:
    """Returns an annotation's polygons without empty parts, or its RLE; None for a box alone."""
    value = row.get("segmentation")
    if isinstance(value, list) and value and not any(isinstance(v, (list, dict)) for v in value):
        return [value]
    if isinstance(value, list):
        value = [part for part in value if part != []]
    return None if value in (None, [], {}) else value


def mask_problem(segmentation: Any, height: int, width: int) -> str | None:
    """Returns what makes polygons or an RLE unusable on an image of this size, or None.

    Beyond good messages this guards pycocotools, which reads 4 numbers as a box, and outside
    its memory where an RLE's runs do not add up to height * width.
    """
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, height, width)
    if not isinstance(segmentation, list):
        return f"expected polygons or an RLE, found {type(segmentation).__name__}"
    if not segmentation:
        return "expected polygons, found none"
    for part in segmentation:
        if not isinstance(part, list) or not set(map(type, part)) <= {int, float}:
            return f"expected polygons as lists of numbers, found {shown(part)}"
        if len(part) < 6 or len(part) % 2:
            return f"expected polygons of x, y pairs, 3 points or more, found {len(part)} numbers"
        if len(part) > 2 * POINT_LIMIT:
            return f"expected polygons of at most {POINT_LIMIT} points, found {len(part) // 2}"
        beyond = [value for value in part if not abs(value) <= COORDINATE_LIMIT]  # NaN included
        if beyond:
            return f"expected finite coordinates in pixels, found {shown(beyond[0])}"
        if len(part) * COORDINATE_LIMIT > OUTLINE_LIMIT:  # else it cannot be so long
            points = np.asarray(part, dtype=np.float64).reshape(-1, 2)
            length = np.abs(points - np.roll(points, -1, axis=0)).max(axis=1).sum()
            if length > OUTLINE_LIMIT:
                return (
                    f"expected an outline of at most {OUTLINE_LIMIT:.0f} px, found {length:.0f} px"
                )
    return None


def _rle_problem(rle: dict, height: int, width: int) -> str | None:
    """What makes an RLE unusable."""
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        return f"expected an RLE of the image's size [{height}, {width}], found {shown(size)}"
    runs = _runs(counts)
    if runs is None:
        return f"expected RLE counts, whole numbers from 0 or COCO text, found {shown(counts)}"
    if sum(runs) != height * width:
        return f"expected RLE runs that sum to {height} x {width}, found {shown(sum(runs))}"
    return None


def _runs(counts: Any) -> list[int] | None:
    """The runs of an RLE, or None where they are none. Source: rleFrString in cocoapi maskApi.c."""
    if isinstance(counts, list):
        fine = all(isinstance(run, int) and not isinstance(run, bool) for run in counts)
        return counts if fine and min(counts, default=0) >= 0 else None
    if isinstance(counts, str) and counts.isascii():
        counts = counts.encode("ascii")
    if not isinstance(counts, bytes):
        return None
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 0x20 == 0)
    if digits.size == 0 or digits.min() < 0 or digits.max() > 63 or ends.size == 0:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if ends[-1] != digits.size - 1 or lengths.max() > RLE_NUMBER_LENGTH:
        return None
    place = np.arange(digits.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 0x1F) << (5 * place), starts)
    runs -= np.where(digits[ends] & 0x10, np.int64(1) << (5 * lengths), 0)
    # From the fourth on, a number is the difference to the run two before.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist() if runs.min() >= 0 else None


def mask_box(segmentation: list | dict, height: int, width: int) -> list[float] | None:
    """Returns the box, xyxy in pixels, of a mask that `mask_problem` passes; None of an empty one.

    That of polygons is of their points, clipped to the image; that of an RLE of its pixels.
    """
    if isinstance(segmentation, list):
        parts = [part for part in segmentation if not is_flat(part)]
        if not parts:
            return None
        xs = [x for part in parts for x in (min(part[0::2]), max(part[0::2]))]
        ys = [y for part in parts for y in (min(part[1::2]), max(part[1::2]))]
        box = [max(0, min(xs)), max(0, min(ys)), min(width, max(xs)), min(height, max(ys))]
        return box if box[0] < box[2] and box[1] < box[3] else None
    starts, ends = _runs_of_ones(segmentation)
    if not starts.size:
        return None
    ends = ends - 1
    columns = starts // height, ends // height
    spans = columns[0] < columns[1]  # such a run holds the last row of one column, the next's first
    top = 0 if spans.any() else (starts % height).min()
    bottom = height if spans.any() else (ends % height).max() + 1
    return [float(v) for v in (columns[0].min(), top, columns[1].max() + 1, bottom)]


def mask_runs(rle: dict) -> np.ndarray:
    """Returns the vertical runs of ones of an RLE that `mask_problem` passes.

    Returns:
        (n, 3) int64: column, first row, row after the last; from left to right and downwards.
    """
    height = rle["size"][0]
    starts, ends = _runs_of_ones(rle)
    first = starts // height
    spans = (ends - 1) // height - first + 1  # columns
    column = np.repeat(first, spans)
    column += np.arange(column.size) - np.repeat(np.cumsum(spans) - spans, spans)
    top = np.maximum(np.repeat(starts, spans) - column * height, 0)
    bottom = np.minimum(np.repeat(ends, spans) - column * height, height)
    return np.stack([column, top, bottom], axis=1)


def _runs_of_ones(rle: dict) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of ones of an RLE begin and end, counted down the columns; none is empty."""
    ends = np.cumsum(np.asarray(_runs(rle["counts"]), dtype=np.int64))
    starts, ends = ends[0:-1:2], ends[1::2]
    return starts[ends > starts], ends[ends > starts]


def is_flat(part: list[float]) -> bool:
    """Returns whether the points of a polygon lie on one line, so that it has no area."""
    x, y, (x1, y1, x2, y2) = part[0], part[1], part[2:6]
    if abs((x1 - x) * (y2 - y) - (x2 - x) * (y1 - y)) > 1:  # most are told by their first corner
        return False
    points = np.asarray(part, dtype=np.float64).reshape(-1, 2)
    points = points - points[0]
    far = points[np.argmax((points**2).sum(axis=1))]
    off = np.abs(points[:, 0] * far[1] - points[:, 1] * far[0])  # distance from the line x length
    return bool(off.max() <= FLAT * np.hypot(*far))


def crosses_itself(part: list[float]) -> bool:
    """Returns whether edges of a polygon cross; touching is no crossing. See CROSSING_LIMIT."""
    points = np.asarray(part, dtype=np.float64).reshape(-1, 2)
    if len(points) > CROSSING_LIMIT:
        return False
    x, y = points.T
    following = np.arange(1, len(points) + 1) % len(points)
    edge_x, edge_y = x[following] - x, y[following] - y
    # side[i, j]: on which side of the line through edge i point j is; 0 on it.
    side = edge_x[:, None] * (y - y[:, None]) - edge_y[:, None] * (x - x[:, None])
    left, right = side > 0, side < 0
    # The ends of edge j lie apart, by the line of edge i.
    parted = left & right[:, following] | right & left[:, following]
    return bool((parted & parted.T).any())


def jitter_box(
    bbox: Sequence[float], size: tuple[int, int], rng: np.random.Generator
) -> list[float]:
    """A box as a hand would draw it.

    Args:
        bbox: xywh, pixels of a photo.
        size: (height, width) of the photo.
        rng: gives four numbers.

    Returns:
        xywh, inside the photo: each side moved by N(0, 0.1) of the box's own side, at most by 20 of
        1008 parts of the photo's; `bbox` where nothing would be left of it.
    """
    far = np.tile(size[::-1], 2)
    corners = np.add(bbox, [0, 0, *bbox[:2]])  # xyxy
    moves = JITTER * np.tile(bbox[2:], 2) * rng.standard_normal(4)
    corners = (corners + moves.clip(-MOST_JITTER * far, MOST_JITTER * far)).clip(0, far)
    left, top, right, bottom = corners.tolist()
    if right <= left or bottom <= top:
        return list(bbox)
    return [left, top, right - left, bottom - top]


def box_apart(
    taken: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]],
    side: Sequence[float],
    size: tuple[int, int],
    rng: np.random.Generator,
) -> list[float] | None:
    """A box that touches none of some boxes; all are xywh in pixels of a photo.

    Args:
        taken: not to be touched.
        others: boxes to choose from, as a hand would draw them.
        side: (width, height) of a box on the background, where each of these touches.
        size: (height, width) of the photo.
        rng: of every choice.

    Returns:
        The box; None where no place was found.
    """
    corners = rng.random((PLACES, 2)) * (size[1] - side[0], size[0] - side[1])
    background = [[*corner, *side] for corner in corners.tolist()]
    for boxes in ([jitter_box(box, size, rng) for box in others], background):
        free = [box for box in boxes if not any(_touch(box, other) for other in taken)]
        if free:
            return free[rng.integers(len(free))]
    return None


def _touch(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (xywh) share an area."""
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))
