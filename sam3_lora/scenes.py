"""Procedural scenes: the world of the demo base, and the demo task that it has to learn.

    draw_shapes   circles, squares, triangles, rings; four colours; plain or striped   (demo base)
    draw_part     a brushed metal plate with rust, oil leaks, burn marks, corrosion    (demo task)

A scene is drawn from a random generator alone, so a seed is a data set.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3_lora.coco import CocoSplit, encode_mask, write_splits
from sam3_lora.geometry import mask_box

# Side of a written scene, pixels: twice the demo model's canvas, so that pictures can be looked at.
SIDE = 224
SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = {
    "red": (205, 45, 40),
    "green": (50, 160, 60),
    "blue": (45, 85, 205),
    "yellow": (230, 205, 50),
}
TEXTURES = ("plain", "striped")
# What a shape's kind is made of, in this order.
WORDS = (TEXTURES, tuple(COLOURS), SHAPES)
DEFECTS = ("rust", "oil leak", "burn mark", "corrosion")
MOST_SHAPES, MOST_DEFECTS = 6, 4  # objects of a scene
TASKS = ("parts", "shapes")
# Images of a demo data set's splits. The training split of the parts has scenes of the base's own
# beside them, so that what it knows is not forgotten.
IMAGES = {"train": 480, "val": 40, "test": 120}
REPLAYED = 240
# Radius of an object as a share of the side: at the demo model's 8 x 8 patches, an object is two to
# three patches wide. The smaller ones are for crowded scenes.
RADII = (0.14, 0.2)
# Tries to find an object a free place, before the scene goes without it.
PLACEMENTS = 20


@dataclass
class Scene:
    """A picture and its objects.

    Args:
        image: (S,S,3) uint8 RGB.
        masks: (G,S,S) bool, none empty, no two overlapping.
        kinds: G tuples of words; objects of one kind look alike. A shape's kind is (texture,
            colour, shape).
    """

    image: np.ndarray
    masks: np.ndarray
    kinds: list[tuple[str, ...]]


def phrases(kind: tuple[str, ...]) -> list[str]:
    """The prompts that an object of a kind answers to: each word, and with the last the others.

    A shape ("striped", "red", "circle") answers to "striped", "red", "circle", "striped circle" and
    "red circle".
    """
    return [*kind, *(f"{word} {kind[-1]}" for word in kind[:-1])]


@cache
def shape_prompts() -> list[str]:
    """Every prompt that a shape answers to."""
    kinds = [(t, c, s) for t in TEXTURES for c in COLOURS for s in SHAPES]
    return sorted({prompt for kind in kinds for prompt in phrases(kind)})


def draw_shapes(rng: np.random.Generator, side: int = SIDE) -> Scene:
    """A scene of 0 to 6 coloured shapes, often several of one kind, on a varied background.

    Args:
        rng: source of every choice.
        side: S, pixels.
    """
    image = _background(rng, side)
    count = int(rng.integers(0, MOST_SHAPES + 1))
    pool = [
        (str(rng.choice(TEXTURES)), str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))
        for _ in range(int(rng.integers(2, 5)))
    ]
    masks, kinds = [], []
    for x, y, radius in _places(rng, side, count):
        kind = pool[int(rng.integers(len(pool)))]
        texture, colour, shape = kind
        window, across, down = _window(side, x, y, radius)
        mask = np.zeros((side, side), bool)
        angle = rng.uniform(0, 2 * np.pi) if shape == "triangle" else rng.uniform(-0.3, 0.3)
        inside = _inside(shape, *_turn(across, down, angle), radius)
        mask[window] = inside
        paint = np.array(COLOURS[colour]) * rng.uniform(0.8, 1.15) + rng.normal(0, 8, 3)
        if texture == "striped":
            along, _ = _turn(across, down, rng.uniform(0, np.pi))
            period = side * rng.uniform(0.055, 0.075)
            paint = np.where((along % period < period / 2)[..., None], paint, 0.35 * paint)
        image[window] = np.where(inside[..., None], paint, image[window])
        masks.append(mask)
        kinds.append(kind)
    return _scene(rng, image, masks, kinds)


def draw_part(rng: np.random.Generator, side: int = SIDE) -> Scene:
    """A metal plate with 0 to 4 defects, and a bolt that is none; see `draw_shapes`."""
    image = _plate(rng, side)
    masks, kinds = [], []
    places = _places(rng, side, int(rng.integers(0, MOST_DEFECTS + 1)) + 1)
    if places:
        _draw_bolt(rng, image, *places.pop())
    for x, y, radius in places:
        kind = str(rng.choice(DEFECTS))
        window, across, down = _window(side, x, y, radius)
        inside = _blob(rng, across, down, radius)
        covered = image[window]
        paint = _defect(rng, kind, covered, across, down, radius)
        image[window] = np.where(inside[..., None], paint, covered)
        mask = np.zeros((side, side), bool)
        mask[window] = inside
        masks.append(mask)
        kinds.append((kind,))
    return _scene(rng, image, masks, kinds)


def _plate(rng: np.random.Generator, side: int) -> np.ndarray:
    """Brushed metal (S,S,3) float32: streaks along the rows, and a light from one side."""
    streaks = rng.normal(0, 7, (side, 1)) + rng.normal(0, 4, (side, side // 16)).repeat(16, axis=1)
    light = rng.normal(0, 30) * np.linspace(-0.5, 0.5, side)[None]
    tint = np.array([1.0, 1.01, 1.03]) * rng.uniform(125, 185)
    return (tint + (streaks + light)[..., None]).astype(np.float32)


def _draw_bolt(
    rng: np.random.Generator, image: np.ndarray, x: float, y: float, radius: float
) -> None:
    """A bolt's head with its slot, in place."""
    window, across, down = _window(len(image), x, y, 0.7 * radius)
    distance = np.hypot(across, down) / (0.7 * radius)
    shade = 205 - 70 * distance**3 - 35 * (down / radius)
    slot, _ = _turn(across, down, rng.uniform(0, np.pi))
    shade = np.where(abs(slot) < 0.09 * radius, 60, shade)
    image[window] = np.where((distance <= 1)[..., None], shade[..., None], image[window])


def _blob(
    rng: np.random.Generator, across: np.ndarray, down: np.ndarray, radius: float
) -> np.ndarray:
    """Which pixels (h,w) an irregular spot covers that the disc just holds."""
    angle = np.arctan2(down, across)
    edge = np.full_like(angle, 0.82)
    for waves in (2, 3, 5):
        edge += rng.uniform(0, 0.06) * np.sin(waves * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(across, down) <= radius * edge


def _defect(
    rng: np.random.Generator,
    kind: str,
    surface: np.ndarray,
    across: np.ndarray,
    down: np.ndarray,
    radius: float,
) -> np.ndarray:
    """What a defect makes of the surface (h,w,3) under it."""
    distance = (np.hypot(across, down) / radius)[..., None]
    if kind == "rust":
        speckle = rng.uniform(0, 1, (*across.shape, 1)) ** 2
        return np.array([125, 60, 25]) + speckle * np.array([85, 60, 35])
    if kind == "oil leak":
        glint = np.exp(-8 * ((across / radius + 0.3) ** 2 + (down / radius + 0.3) ** 2))
        return np.array([34, 30, 28]) + 90 * glint[..., None]
    if kind == "burn mark":
        rings = 0.5 + 0.5 * np.cos(7 * distance + rng.uniform(-0.5, 0.5))
        tint = rings * np.array([110, 60, 150]) + (1 - rings) * np.array([200, 160, 95])
        return 0.85 * tint + 0.15 * surface
    crust = rng.uniform(0, 1, (*across.shape, 1)) ** 3
    return np.array([60, 170, 160]) + crust * np.array([170, 80, 85])


def demo_split(task: str, split: str, seed: int) -> tuple[Iterator[Scene], list[str]]:
    """The scenes of a demo data set's split, and the categories that they are labelled with.

    Args:
        task: of `TASKS`: `parts`, which the demo base does not know, or `shapes`, which it does.
        split: of `IMAGES`.
        seed: data sets of different seeds share no scene.
    """
    replayed = REPLAYED if (task, split) == ("parts", "train") else 0
    drawers = [(draw_part if task == "parts" else draw_shapes, IMAGES[split])]
    drawers += [(draw_shapes, replayed)] if replayed else []
    categories = list(DEFECTS) if task == "parts" else shape_prompts()
    categories += shape_prompts() if replayed else []
    key = (seed, TASKS.index(task), list(IMAGES).index(split))
    scenes = (
        draw(np.random.default_rng((*key, block, number)))
        for block, (draw, count) in enumerate(drawers)
        for number in range(count)
    )
    return scenes, categories


def write_scenes(
    output_dir: Path,
    split: str,
    scenes: Iterable[Scene],
    categories: list[str],
    overwrite: bool = False,
) -> Path:
    """Writes scenes as a split of a COCO data set; see `coco.write_splits`.

    Args:
        output_dir: the data folder.
        split: its name.
        scenes: the images.
        categories: an object is an annotation of each of them that it answers to.
        overwrite: replace a split that holds files.

    Raises:
        DatasetError: the split holds other files; nothing is changed.
    """
    ids = {name: number for number, name in enumerate(categories, start=1)}
    images, annotations = [], {}
    with tempfile.TemporaryDirectory() as drawn:
        for number, scene in enumerate(scenes, start=1):
            name = f"{number:05d}.jpg"
            Image.fromarray(scene.image).save(Path(drawn) / name, quality=95)
            height, width = scene.image.shape[:2]
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            annotations[number] = [
                {"category_id": ids[phrase], **to_annotation(mask)}
                for mask, kind in zip(scene.masks, scene.kinds, strict=True)
                for phrase in phrases(kind)
                if phrase in ids
            ]
        by_id = {number: name for name, number in ids.items()}
        source = CocoSplit(Path(drawn), Path(drawn), images, annotations, by_id, {})
        return write_splits(output_dir, {split: source}, overwrite=overwrite)[0]


def to_annotation(mask: np.ndarray) -> dict[str, Any]:
    """The COCO fields of an object from its mask (S,S) bool, not empty."""
    rle = encode_mask(mask)
    x1, y1, x2, y2 = mask_box(rle, *mask.shape)
    box = [x1, y1, x2 - x1, y2 - y1]
    return {"bbox": box, "area": int(mask.sum()), "iscrowd": 0, "segmentation": rle}


def _scene(
    rng: np.random.Generator,
    image: np.ndarray,
    masks: list[np.ndarray],
    kinds: list[tuple[str, ...]],
) -> Scene:
    """Adds the camera's noise and joins the parts."""
    side = len(image)
    noisy = image + rng.normal(0, rng.uniform(1, 6), (side, side, 1))
    stacked = np.stack(masks) if masks else np.zeros((0, side, side), bool)
    return Scene(noisy.clip(0, 255).astype(np.uint8), stacked, kinds)


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """A pale, dark or tinted surface (S,S,3) float32 with a gradient and patches."""
    base = rng.uniform(40, 220) + rng.normal(0, 14, 3)
    slope = rng.normal(0, 25, 2)
    ramp = np.linspace(-0.5, 0.5, side)
    light = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    light = light + rng.uniform(0, 18) * _cloud(rng, side, int(rng.integers(2, 14)))
    return (base + light[..., None]).astype(np.float32)


def _cloud(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Smooth noise (S,S) of about unit size, with so many bumps across."""
    coarse = rng.normal(0, 1, (cells + 1, cells + 1))
    at = np.linspace(0, cells - 1e-6, side)
    low, part = at.astype(int), at % 1
    rows = coarse[low] * (1 - part[:, None]) + coarse[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _places(rng: np.random.Generator, side: int, count: int) -> list[tuple[float, float, float]]:
    """Up to `count` discs (x, y, radius) in pixels that lie in the picture and apart."""
    largest = RADII[1] if count <= 4 else (RADII[0] + RADII[1]) / 2
    discs: list[tuple[float, float, float]] = []
    for _ in range(count):
        for _ in range(PLACEMENTS):
            radius = side * rng.uniform(RADII[0], largest)
            x, y = rng.uniform(radius, side - radius, 2)
            if all((x - u) ** 2 + (y - v) ** 2 > (radius + r + 2) ** 2 for u, v, r in discs):
                discs.append((x, y, radius))
                break
    return discs


def _window(
    side: int, x: float, y: float, radius: float
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """The square around a disc, and each pixel's (h,w) offsets across and down from its centre."""
    left, top = max(int(x - radius), 0), max(int(y - radius), 0)
    right, bottom = min(int(x + radius) + 2, side), min(int(y + radius) + 2, side)
    down, across = np.mgrid[top:bottom, left:right]
    return (slice(top, bottom), slice(left, right)), across - x, down - y


def _turn(across: np.ndarray, down: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Offsets in axes turned by an angle (radians)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * across + sin * down, cos * down - sin * across


def _inside(shape: str, across: np.ndarray, down: np.ndarray, radius: float) -> np.ndarray:
    """Which pixels (h,w) a shape of that circumradius covers."""
    if shape == "square":
        return np.maximum(abs(across), abs(down)) <= radius / np.sqrt(2)
    if shape == "triangle":
        slant = np.sqrt(3) / 2 * abs(across) - down / 2
        return np.maximum(slant, down) <= radius / 2
    distance = np.hypot(across, down)
    if shape == "ring":
        return (distance <= radius) & (distance >= 0.5 * radius)
    return distance <= radius
