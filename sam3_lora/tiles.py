"""Large and crowded photos in overlapping tiles, each as large on the canvas as a photo of its own;
no prompt finds more objects in one than the model has queries.

A tile is a window of the photo, (left, top, right, bottom) in whole pixels. In training an object
belongs to every tile that shows a quarter of its width and of its height (of the tile's, where the
object is larger), and each object to one tile at least. In inference the whole photo and its tiles
are views, and what they show twice is merged.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3_lora.coco import decode_mask, encode_mask, mask_iou, to_rle
from sam3_lora.geometry import mask_box, mask_runs

TILE_OVERLAP = 0.2  # of a tile's side, shared with the next one
TILE_SHARE = 0.25  # of an object's width, and of its height, that its tiles show at least
MOST_TILES = 6  # a side: smaller tiles would show little beside their objects
# IoU from which detections of two views are one object.
SAME_IOU = 0.5
# Of a tile's side: an object that ends so close to its border is taken to go on beyond.
CUT_MARGIN = 0.02
LEAST_SHARE = 0.01  # of a photo's side: 15,625 tiles

Window = tuple[int, int, int, int]
Objects = Sequence[dict[str, Any]]
Detections = dict[str, Any]


def count_beyond(objects: Objects, num_queries: int) -> int:
    """Number of objects, category by category, beyond the queries of a prompt."""
    counts = Counter(entry["category_id"] for entry in objects)
    return sum(max(count - num_queries, 0) for count in counts.values())


def choose_tiles(
    objects: Objects, width: int, height: int, num_queries: int
) -> tuple[list[Window], int]:
    """The fewest tiles, 2x2, 3x3, ... 6x6, that show a prompt no more objects than queries.

    Args:
        objects: of the photo: `category_id` and `bbox` (xywh, pixels, inside the photo).
        width, height: of the photo, pixels.
        num_queries: the most objects that a prompt can find.

    Returns:
        The tiles row by row, and how many of them hold more all the same: 0 but for 6x6.
    """
    tiles, crowded = [], 0
    for side in range(2, MOST_TILES + 1):
        tiles = _cut_photo(width, height, side)
        shown = ([entry for entry, _ in _pieces(objects, tile)] for tile in tiles)
        crowded = sum(count_beyond(own, num_queries) > 0 for own in shown)
        if not crowded:
            break
    return tiles, crowded


def cut_objects(objects: Objects, tile: Window, width: int, height: int) -> list[dict[str, Any]]:
    """The objects that belong to a tile, as if the tile were the photo.

    Args:
        objects: of the photo, `category_id`, `bbox` and `segmentation` as in `CocoSplit`.
        tile: which part.
        width, height: of the photo, pixels.

    Returns:
        Their records in the same order: `bbox` in pixels of the tile, around what the tile shows
        of the mask where it cuts an object that has one; `segmentation` an RLE of the tile.
    """
    left, top, right, bottom = tile
    found = []
    for entry, piece in _pieces(objects, tile):
        segmentation = entry["segmentation"]
        if segmentation:
            mask = decode_mask(segmentation, height, width)[top:bottom, left:right]
            segmentation = encode_mask(mask)
            if piece[2:] != entry["bbox"][2:]:
                edges = mask_box(segmentation, *mask.shape)
                if edges is None:  # a part of the box without a part of the object
                    continue
                piece = [*edges[:2], edges[2] - edges[0], edges[3] - edges[1]]
        found.append({**entry, "bbox": piece, "segmentation": segmentation})
    return found


def touches(bbox: Sequence[float], tile: Window) -> bool:
    """Whether any part of a box (xywh, pixels of the photo) is in a tile."""
    x, y, w, h = bbox
    return x < tile[2] and y < tile[3] and x + w > tile[0] and y + h > tile[1]


def view_windows(width: int, height: int, share: float) -> list[Window]:
    """The views of a photo: the whole of it, then its tiles row by row.

    Args:
        width, height: of the photo, pixels.
        share: less than 1; the fewest tiles are made whose sides are at most this share of the
            photo's.
    """
    # A side of the photo is n - (n - 1) * TILE_OVERLAP sides of its n tiles.
    count = math.ceil((1 / share - TILE_OVERLAP) / (1 - TILE_OVERLAP))
    return [(0, 0, width, height), *_cut_photo(width, height, count)]


def merge_views(views: Sequence[tuple[Window, Detections]], width: int, height: int) -> Detections:
    """The detections of all views of a photo, each object once.

    A view knows all of an object inside it; of one that its border cuts, the part in its window.
    Detections of two views are one object where their IoU is at least `SAME_IOU` in what both
    know. Objects are gathered from the best score on, with at most one detection of each view,
    that of the highest IoU x score first. An object has the highest score of its detections, and
    box and mask of the best of those that no border cuts; else it is all their parts together.

    Args:
        views: the window of each, and its detections as of `evaluation.join_detections`, in pixels
            of the window.
        width, height: of the photo, pixels.

    Returns:
        Likewise in pixels of the photo, best first. Without masks, boxes are compared.
    """
    seen = _place_views(views, width, height)
    windows = [window for window, _ in views]
    objects = []
    for prompt in np.unique(seen["category_id"]):
        own = np.flatnonzero(seen["category_id"] == prompt)
        objects += _gather(seen, own, _find_same(seen, own, windows))
    objects.sort(key=lambda members: -seen["score"][members[0]])
    best = [members[0] for members in objects]
    shown = [_best_whole(seen, members) for members in objects]
    merged = {name: seen[name][best] for name in ("category_id", "score")}
    boxes = [seen["boxes_xyxy"][members] for members in shown]  # (k,4) each
    corners = [np.append(b[:, :2].min(axis=0), b[:, 2:].max(axis=0)) for b in boxes]
    merged["boxes_xyxy"] = np.array(corners).reshape(-1, 4)
    merged["rles"] = None
    if seen["masks"]:
        masks = [[seen["shapes"][i] for i in members] for members in shown]
        merged["rles"] = [_unite(own, width, height) for own in masks]
    return merged


def _place_views(
    views: Sequence[tuple[Window, Detections]], width: int, height: int
) -> dict[str, Any]:
    """The detections of all views in pixels of the photo. `shapes` are their masks or, where there
    are none, boxes, as RLE of the photo; `edges` (n,4) xyxy and `area` of these; `view` (n,) whose
    they are; `cut` (n,) whether its border cuts them."""
    parts: dict[str, list] = defaultdict(list)
    shapes: list[dict[str, Any]] = []
    for number, (window, found) in enumerate(views):
        left, top, right, bottom = window
        boxes = np.reshape(found["boxes_xyxy"], (-1, 4)) + [left, top, left, top]
        if found["rles"] is None:
            inside = boxes.clip([left, top] * 2, [right, bottom] * 2).tolist()
            outlines = [[[a, b, c, b, c, d, a, d]] for a, b, c, d in inside]
            runs = [mask_runs(to_rle(outline, height, width)) for outline in outlines]
        else:
            runs = [mask_runs(rle) + [left, top, top] for rle in found["rles"]]
        shapes += [_encode_runs(own, width, height) for own in runs]
        edges = np.array([_edges(own) for own in runs]).reshape(-1, 4)
        margin = CUT_MARGIN * np.array([right - left, bottom - top])
        over = [edges[:, :2] <= [left, top] + margin, edges[:, 2:] >= [right, bottom] - margin]
        inner = [left > 0, top > 0, right < width, bottom < height]
        parts["cut"].append((np.hstack(over) & inner).any(axis=1))
        parts["edges"].append(edges)
        parts["area"].append(np.array([(own[:, 2] - own[:, 1]).sum() for own in runs]))
        parts["boxes_xyxy"].append(boxes)
        parts["view"].append(np.full(len(boxes), number))
        for name in ("category_id", "score"):
            parts[name].append(found[name])
    seen: dict[str, Any] = {name: np.concatenate(values) for name, values in parts.items()}
    return seen | {"shapes": shapes, "masks": views[0][1]["rles"] is not None}


def _edges(runs: np.ndarray) -> list[float]:
    """The box (xyxy) around the runs of a mask; nowhere around none."""
    if not len(runs):
        return [math.nan] * 4
    low, high = runs.min(axis=0), runs.max(axis=0)
    return [low[0], low[1], high[0] + 1, high[2]]


def _find_same(
    seen: dict[str, Any], own: np.ndarray, windows: Sequence[Window]
) -> dict[int, dict[int, float]]:
    """Of each detection of a prompt those of other views that are the same object, with the IoU."""
    same: dict[int, dict[int, float]] = defaultdict(dict)
    by_view = {view: own[seen["view"][own] == view] for view in np.unique(seen["view"][own])}
    for (a, first), (b, second) in itertools.combinations(by_view.items(), 2):
        left, top, right, bottom = windows[a]
        if touches([left, top, right - left, bottom - top], windows[b]):
            iou = _shared_iou(seen, first, second, windows[a], windows[b])
            for i, j in np.argwhere(iou >= SAME_IOU):
                same[first[i]][second[j]] = same[second[j]][first[i]] = iou[i, j]
    return same


def _shared_iou(
    seen: dict[str, Any], first: np.ndarray, second: np.ndarray, window: Window, other: Window
) -> np.ndarray:
    """IoU (n,m) of detections of two views with these windows, in what both know."""
    iou = mask_iou(*([seen["shapes"][i] for i in indices] for indices in (first, second)))
    areas = seen["area"][first][:, None], seen["area"][second][None]
    shared = np.rint(iou * sum(areas) / (1 + iou))  # pixels
    # Each is held against the other where the other is known.
    within = _areas_inside(seen, first, other)[:, None], _areas_inside(seen, second, window)[None]
    union = np.where(seen["cut"][second][None], within[0], areas[0]) - shared
    union = union + np.where(seen["cut"][first][:, None], within[1], areas[1])
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _areas_inside(seen: dict[str, Any], indices: np.ndarray, window: Window) -> np.ndarray:
    """The area (n,) of detections within a window, pixels."""
    left, top, right, bottom = window
    edges = seen["edges"][indices]
    inside = (edges >= [left, top] * 2).all(axis=1) & (edges <= [right, bottom] * 2).all(axis=1)
    areas = np.where(inside, seen["area"][indices], 0.0)
    apart = (edges[:, 2:] <= [left, top]) | (edges[:, :2] >= [right, bottom])
    for k in np.flatnonzero(~inside & ~apart.any(axis=1)):
        column, first, last = mask_runs(seen["shapes"][indices[k]]).T
        rows = (np.minimum(last, bottom) - np.maximum(first, top)).clip(min=0)
        areas[k] = rows[(column >= left) & (column < right)].sum()
    return areas


def _gather(
    seen: dict[str, Any], own: np.ndarray, same: dict[int, dict[int, float]]
) -> list[list[int]]:
    """The objects that a prompt's detections show, each as its detections, the best one first."""
    free, objects = set(own.tolist()), []
    for best in own[np.argsort(-seen["score"][own], kind="stable")].tolist():
        members: list[int] = []
        joining = best if best in free else None
        while joining is not None:
            free.remove(joining)
            members.append(joining)
            views = {seen["view"][i] for i in members}
            # Who knows the whole object speaks for it. A faint double, however like it, does not
            # take the place of what its view finds there.
            joinable = [
                (iou * seen["score"][j], -j)
                for i in _best_whole(seen, members)
                for j, iou in same[i].items()
                if j in free and seen["view"][j] not in views
            ]
            joining = -max(joinable)[1] if joinable else None
        objects += [members] if members else []
    return objects


def _best_whole(seen: dict[str, Any], members: list[int]) -> list[int]:
    """Of an object's detections the best one that no border cuts, else all."""
    whole = [i for i in members if not seen["cut"][i]]
    return [max(whole, key=lambda i: seen["score"][i])] if whole else members


def _unite(rles: list[dict[str, Any]], width: int, height: int) -> dict[str, Any]:
    """One mask of all."""
    if len(rles) == 1:
        return rles[0]
    return _encode_runs(np.concatenate([mask_runs(rle) for rle in rles]), width, height)


def _encode_runs(runs: np.ndarray, width: int, height: int) -> dict[str, Any]:
    """The compressed RLE of vertical runs as of `geometry.mask_runs`, in any order."""
    bounds = runs[:, :1] * height + runs[:, 1:]  # (n,2) begin and end, down the columns
    starts, ends = bounds[np.argsort(bounds[:, 0])].T
    ends = np.maximum.accumulate(ends)
    fresh = np.append(-1, ends[:-1])[: len(starts)] < starts  # touches none before
    last = np.append(fresh[1:], True)[: len(starts)]
    borders = np.stack([starts[fresh], ends[last]], axis=1).ravel()
    counts = np.diff(borders, prepend=0, append=width * height).tolist()
    counts = counts if counts[-1] else counts[:-1]  # as `encode_mask`: no empty run ends it
    return to_rle({"size": [height, width], "counts": counts}, height, width)


def _cut_photo(width: int, height: int, count: int) -> list[Window]:
    """A photo in count x count tiles, row by row."""
    columns, rows = _cut_line(width, count), _cut_line(height, count)
    return [(x[0], y[0], x[1], y[1]) for y, x in itertools.product(rows, columns)]


def _cut_line(length: int, count: int) -> list[tuple[int, int]]:
    """Begin and end of each of `count` overlapping parts of a side of the photo, pixels."""
    part = length / (count - (count - 1) * TILE_OVERLAP)
    begins = [k * part * (1 - TILE_OVERLAP) for k in range(count)]
    return [(math.floor(b), min(math.ceil(b + part), length)) for b in begins]


def _pieces(objects: Objects, tile: Window) -> list[tuple[dict[str, Any], list[float]]]:
    """Each object that belongs to a tile, with the part of its box there, pixels of the tile."""
    left, top, right, bottom = tile
    found = []
    for entry in objects:
        x, y, w, h = entry["bbox"]
        shown_w, shown_h = min(x + w, right) - max(x, left), min(y + h, bottom) - max(y, top)
        enough_w = shown_w >= TILE_SHARE * min(w, right - left)
        if enough_w and shown_h >= TILE_SHARE * min(h, bottom - top):
            # A side that is not cut stays as it is, to the last digit.
            inside = x >= left and x + w <= right, y >= top and y + h <= bottom
            size = w if inside[0] else shown_w, h if inside[1] else shown_h
            found.append((entry, [max(x, left) - left, max(y, top) - top, *size]))
    return found
