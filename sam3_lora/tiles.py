"""Crowded photos in overlapping tiles: no prompt finds more objects than the model has queries.

A tile is a window of the photo, (left, top, right, bottom) in whole pixels. An object belongs to
every tile that shows a quarter of its width and of its height (of the tile's, where the object is
larger), and each object to one tile at least.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3_lora.coco import decode_mask, encode_mask

TILE_OVERLAP = 0.2  # of a tile's side, shared with the next one
TILE_SHARE = 0.25  # of an object's width, and of its height, that its tiles show at least
MOST_TILES = 6  # a side: smaller tiles would show little beside their objects

Window = tuple[int, int, int, int]
Objects = Sequence[dict[str, Any]]


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
        columns, rows = _cut_line(width, side), _cut_line(height, side)
        tiles = [(x[0], y[0], x[1], y[1]) for y, x in itertools.product(rows, columns)]
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
            if piece[2:] != entry["bbox"][2:]:
                rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
                if not len(rows):  # a part of the box without a part of the object
                    continue
                corner = [int(columns[0]), int(rows[0])]
                piece = [*corner, int(columns[-1]) + 1 - corner[0], int(rows[-1]) + 1 - corner[1]]
            segmentation = encode_mask(mask)
        found.append({**entry, "bbox": piece, "segmentation": segmentation})
    return found


def touches(bbox: Sequence[float], tile: Window) -> bool:
    """Whether any part of a box (xywh, pixels of the photo) is in a tile."""
    x, y, w, h = bbox
    return x < tile[2] and y < tile[3] and x + w > tile[0] and y + h > tile[1]


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
