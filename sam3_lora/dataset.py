"""Images and prompts to model inputs and targets.

One row is one image and one prompt. Training asks an image for all its categories, for some absent
ones and for words from outside the data set; evaluation asks every image for every category.

    photo (H,W,3) -> square resize to s -> zero-pad to S at a random place    (training, s < S)
    photo (H,W,3) -> square resize to S                                       (evaluation)

Every random choice of an item comes from (seed, epoch, index), so the same step sees the same data
whatever the number of workers, and a run can go on where it stopped.

Source: the fine-tuning transforms of facebookresearch/sam3 @99d02f2 (roboflow_v100 configuration).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from sam3_lora.coco import CocoSplit, DatasetError, decode_mask
from sam3_lora.forward import VISUAL_PROMPT
from sam3_lora.geometry import box_apart, jitter_box
from sam3_lora.images import read_image
from sam3_lora.tiles import Window, choose_tiles, count_beyond, cut_objects, touches

log = logging.getLogger(__name__)

# Meta draws the side of the resized photo from these, of a 1008 px canvas; other canvases in
# proportion.
RESIZE_CANVAS = 1008
RESIZE_SIDES = range(480, 1008, 32)
# Category id of a row whose prompt is a word from outside the data set.
OUT_OF_DOMAIN = -1
# Prompts that should find nothing: things that few data sets show, none a part of another's phrase.
OUT_OF_DOMAIN_WORDS = (
    "accordion", "anvil", "bagpipes", "beehive", "bulldozer", "cactus", "camel", "canoe", "castle",
    "chandelier", "cello", "coral", "crocodile", "drum kit", "flamingo", "gondola", "harp",
    "hedgehog", "helicopter", "igloo", "jellyfish", "kangaroo", "lighthouse", "lobster", "moose",
    "octopus", "parachute", "peacock", "penguin", "piano", "pyramid", "rocket", "saxophone",
    "scarecrow", "seahorse", "sledge", "submarine", "telescope", "trombone", "volcano", "walrus",
    "windmill",
)  # fmt: skip

Item = dict[str, Any]
BoxPrompt = tuple[int, list[float]]  # 1 positive or 0 negative; the box
Place = tuple[int, int, int, bool]
# An item's objects that can be targets, all its annotations, its (height, width).
Visible = tuple[list[dict[str, Any]], list[dict[str, Any]], tuple[int, int]]


def other_words(words: Iterable[str], split: CocoSplit) -> list[str]:
    """The words that are no part of a category's phrase, nor it of them."""
    phrases = [split.phrase(c).lower() for c in split.categories]
    return [word for word in words if not any(word in p or p in word for p in phrases if p)]


class PromptDataset(Dataset):
    """The images of a split, or tiles of them, each with its prompts and targets.

    Args:
        split: from `coco.read_split`.
        image_size: S, side of the model's square canvas, pixels.
        num_queries: the most objects a prompt can find.
        train: augment and sample prompts; otherwise the whole photo and every category.
        prompts_per_image: training: present categories are all asked for; absent categories and
            out-of-domain words fill up to this number.
        out_of_domain_prompts: training: how many of the filling prompts are out-of-domain words.
        prompt_pool: training: an image is asked for prompts of a fixed list of this many, drawn
            once; None: for others each epoch.
        views: training: placements of an image, which the epochs take in turn; None: a new one
            each epoch.
        box_prompt_probability: that a prompt with objects comes with a box round one of them, 0 to
            1; in training the box is jittered, and drawn anew each epoch.
        box_prompt_text_probability: that its text stays; else it is `visual`.
        box_prompt_negative_probability: that it also comes with a negative box, which touches none
            of its objects: round one of another category, else on the background.
        augment: training: random resize and padding.
        flip_probability: training: of a left-right flip, 0 to 1.
        over_queries: training: of a prompt with more objects than queries, `cap` keeps the
            largest; `tile` cuts such a photo into tiles, each an item of its own; `error` refuses.
        seed: of every random choice.

    Raises:
        DatasetError: `over_queries` is `error` and a prompt has more objects than queries.
    """

    def __init__(
        self,
        split: CocoSplit,
        image_size: int,
        num_queries: int,
        *,
        train: bool,
        prompts_per_image: int = 8,
        out_of_domain_prompts: int = 1,
        prompt_pool: int | None = None,
        views: int | None = None,
        box_prompt_probability: float = 0.0,
        box_prompt_text_probability: float = 0.5,
        box_prompt_negative_probability: float = 0.0,
        augment: bool = True,
        flip_probability: float = 0.0,
        over_queries: str = "cap",
        seed: int = 0,
    ) -> None:
        self.split = split
        self.image_size = image_size
        self.num_queries = num_queries
        self.train = train
        self.prompts_per_image = prompts_per_image
        self.out_of_domain_prompts = out_of_domain_prompts
        self.prompt_pool = prompt_pool
        self.views = views
        self.box_prompt_probability = box_prompt_probability
        self.box_prompt_text_probability = box_prompt_text_probability
        self.box_prompt_negative_probability = box_prompt_negative_probability
        # What items hold beside their prompts; a cache of features is built without targets, and
        # trained from without images.
        self.parts = ("image", "targets")
        self.augment = augment
        self.flip_probability = flip_probability
        self.seed = seed
        self.words = other_words(OUT_OF_DOMAIN_WORDS, split)
        # Of each item: which image, and its tile, or None for the whole photo.
        self.items = self._list_items(over_queries if train else "")
        if train:
            self._report_same_prompts()
            self._report_boxes_alone()
            self._report_left_out()
        elif any(split.annotations.values()) and not self.has_masks():
            log.warning("the split has no masks: box metrics only")

    def __len__(self) -> int:
        """Number of items: of images, where none is cut into tiles."""
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        """One image, or tile of one, with its prompts.

        Args:
            key: (epoch, index of the item).

        Returns:
            `image` (3,S,S) uint8, `view` (index, number of its placement), `image_id`,
            `original_size` (H, W), and lists with one entry a prompt: `texts`, `category_ids`,
            `box_prompts`, lists of (label, cxcywh in 0 to 1 of the canvas), `targets` of
            `boxes_cxcywh` (G,4), likewise, `has_mask` (G,) bool, `masks` (G,S,S) bool, empty for an
            object without one, (0,S,S) where no object has one; and `complete` () bool, no object
            was left out.

        Raises:
            DatasetError: the image file is missing or cannot be read.
        """
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        view = epoch % self.views if self.views else epoch
        place = self.placement(index, view) if self.views else self._place(rng)
        visible = objects, annotations, size = self._visible(index)
        if self.prompt_pool:  # the same draw whether a view was placed before or now
            rng = np.random.default_rng((self.seed, epoch, index, 1))
        categories = self._choose_prompts(index, objects, annotations, rng)
        # As in Meta's data a crowd is no object, and background to the union of masks.
        annotated = Counter(a["category_id"] for a in annotations if not a["iscrowd"])
        own = [self._largest(objects, c) for c, _ in categories]
        boxes_rng = np.random.default_rng((self.seed, epoch, index, 2))
        boxes, visual = self._draw_boxes(own, visible, index, place, boxes_rng)
        asked = zip(categories, visual, strict=True)
        targets = [
            self._target(mine, annotated[c], size, place)
            for (c, _), mine in zip(categories, own, strict=True)
            if "targets" in self.parts
        ]
        image = {"image": self._draw(index, place)} if "image" in self.parts else {}
        return image | {
            "view": (index, view),
            "image_id": self._record(index)["id"],
            "original_size": size,
            "texts": [VISUAL_PROMPT if alone else self._text(c) for c, alone in asked],
            "category_ids": [c for c, _ in categories],
            "box_prompts": boxes,
            "targets": targets,
        }

    def all_texts(self) -> list[str]:
        """Every prompt that an item may have."""
        phrases = [self.split.phrase(category) for category in self.split.categories]
        visual = [VISUAL_PROMPT] if self.box_prompt_probability > 0 else []
        return phrases + (self.words if self.train else []) + visual

    def pool(self, index: int) -> list[str]:
        """The texts that an item can be asked for in training, where they are a fixed list."""
        objects, annotations, _ = self._visible(index)
        return [self._text(category) for category in self._pool(index, objects, annotations)]

    def placement(self, index: int, view: int) -> Place:
        """Side of the resized image, left and top of it on the canvas (pixels), flip: of a view."""
        return self._place(np.random.default_rng((self.seed, view, index)))

    def image_of(self, index: int) -> tuple[Path, Window | None]:
        """An item's image file, and its tile."""
        return self.split.image_path(self._record(index)), self.items[index][1]

    def _record(self, index: int) -> dict[str, Any]:
        """The record of an item's image."""
        return self.split.images[self.items[index][0]]

    def _text(self, category: tuple[int, str]) -> str:
        """The prompt of a (category id, word)."""
        return category[1] if category[0] == OUT_OF_DOMAIN else self.split.phrase(category[0])

    def _visible(self, index: int) -> Visible:
        """An item's objects that can be targets, all its annotations, its (height, width)."""
        record, tile = self._record(index), self.items[index][1]
        objects, annotations = self._objects(record), self.split.annotations[record["id"]]
        height, width = record["height"], record["width"]
        if tile:
            objects = cut_objects(objects, tile, width, height)
            annotations = [a for a in annotations if touches(a["bbox"], tile)]
            height, width = tile[3] - tile[1], tile[2] - tile[0]
        return objects, annotations, (height, width)

    def _draw(self, index: int, place: Place) -> torch.Tensor:
        """An item's photo or tile on the canvas, (3,S,S) uint8."""
        photo = self._read_photo(self._record(index))
        if tile := self.items[index][1]:
            photo = photo[tile[1] : tile[3], tile[0] : tile[2]]
        image = torch.from_numpy(photo).permute(2, 0, 1)
        return place_on_canvas(image, self.image_size, *place)

    def has_masks(self) -> bool:
        """Whether any object that can be a target has a mask."""
        return any(o["segmentation"] for r in self.split.images for o in self._objects(r))

    def _read_photo(self, record: dict[str, Any]) -> np.ndarray:
        """The pixels of an image; DatasetError where their number is not the record's."""
        photo = read_image(self.split.image_path(record))
        height, width = photo.shape[:2]
        if (height, width) != (record["height"], record["width"]):
            raise DatasetError(
                f"{record['file_name']} (image id {record['id']}): annotations.json says "
                f"{record['width']}x{record['height']}, the file has {width}x{height} pixels; run "
                "`python prepare_data.py validate`"
            )
        return photo

    def _objects(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The image's objects that can be targets, cut at its border: no crowds, none empty."""
        objects = []
        for entry in self.split.annotations[record["id"]]:
            x, y, w, h = entry["bbox"]
            left, top = max(x, 0.0), max(y, 0.0)
            right, bottom = min(x + w, record["width"]), min(y + h, record["height"])
            if not entry["iscrowd"] and right > left and bottom > top:
                objects.append({**entry, "bbox": [left, top, right - left, bottom - top]})
        return objects

    def _place(self, rng: np.random.Generator) -> Place:
        """A placement, drawn."""
        size = self.image_size
        if not self.train:
            return size, 0, 0, False
        flip = bool(rng.random() < self.flip_probability)
        if not self.augment:
            return size, 0, 0, flip
        side = round(rng.choice(list(RESIZE_SIDES)) * size / RESIZE_CANVAS)
        left, top = (int(v) for v in rng.integers(0, size - side + 1, 2))
        return side, left, top, flip

    def _choose_prompts(
        self,
        index: int,
        objects: list[dict[str, Any]],
        annotations: list[dict[str, Any]],
        rng: np.random.Generator,
    ) -> list[tuple[int, str]]:
        """(category id, word) of each prompt; the word counts for out-of-domain prompts only."""
        if not self.train:
            return [(c, "") for c in self.split.categories]
        if self.prompt_pool is None:
            return self._draw_prompts(objects, annotations, rng, self.prompts_per_image)
        present = {o["category_id"] for o in objects}
        pool = self._pool(index, objects, annotations)
        chosen = [c for c in pool if c[0] in present]
        others = [c for c in pool if c[0] not in present]
        free = max(self.prompts_per_image - len(chosen), 0 if chosen else 1)
        return chosen + [others[i] for i in sorted(rng.permutation(len(others))[:free])]

    def _pool(
        self, index: int, objects: list[dict[str, Any]], annotations: list[dict[str, Any]]
    ) -> list[tuple[int, str]]:
        """The fixed list of an item's prompts."""
        rng = np.random.default_rng((self.seed, index))
        return self._draw_prompts(objects, annotations, rng, self.prompt_pool)

    def _draw_prompts(
        self,
        objects: list[dict[str, Any]],
        annotations: list[dict[str, Any]],
        rng: np.random.Generator,
        most: int,
    ) -> list[tuple[int, str]]:
        """All present categories, absent ones and words up to `most` prompts."""
        present = {o["category_id"] for o in objects}
        # A category of which only a crowd, or too little, shows is neither a target nor absent.
        shown = {a["category_id"] for a in annotations}
        absent = [c for c in self.split.categories if c not in shown]
        chosen = [(c, "") for c in self.split.categories if c in present]
        free = max(most - len(chosen), 0)
        words = min(self.out_of_domain_prompts, free, len(self.words))
        negatives = rng.permutation(len(absent))[: free - words]
        chosen += [(absent[i], "") for i in negatives]
        # Without any category in the image and without absent ones, words keep it a negative.
        words = max(words, 1) if not chosen else words
        chosen += [(OUT_OF_DOMAIN, self.words[i]) for i in rng.permutation(len(self.words))[:words]]
        return chosen

    def _largest(self, objects: list[dict[str, Any]], category_id: int) -> list[dict[str, Any]]:
        """A category's objects, largest first, as many as a prompt can find."""
        own = [o for o in objects if o["category_id"] == category_id]
        return sorted(own, key=lambda o: -o["bbox"][2] * o["bbox"][3])[: self.num_queries]

    def _draw_boxes(
        self,
        own: list[list[dict[str, Any]]],
        visible: Visible,
        index: int,
        place: Place,
        rng: np.random.Generator,
    ) -> tuple[list[list[BoxPrompt]], list[bool]]:
        """The box prompts of each prompt, given its `own` objects; and whether they stand alone."""
        objects, annotations, size = visible
        left, top = (self.items[index][1] or (0, 0))[:2]  # annotations lie on the photo, not a tile
        boxes: list[list[BoxPrompt]] = [[] for _ in own]
        alone = [False] * len(own)
        for row, mine in enumerate(own):
            if not mine or rng.random() >= self.box_prompt_probability:
                continue
            alone[row] = rng.random() >= self.box_prompt_text_probability
            chosen = mine[rng.integers(len(mine))]
            bbox, category = chosen["bbox"], chosen["category_id"]
            drawn = [(1, jitter_box(bbox, size, rng) if self.train else bbox)]
            if rng.random() < self.box_prompt_negative_probability:
                others = [o["bbox"] for o in objects if o["category_id"] != category]
                taken = [a["bbox"] for a in annotations if a["category_id"] == category]
                taken = [[x - left, y - top, w, h] for x, y, w, h in taken]
                if away := box_apart(taken, others, bbox[2:], size, rng):
                    drawn.append((0, away))
            boxes[row] = [(label, self._on_canvas(box, size, place)) for label, box in drawn]
        return boxes, alone

    def _on_canvas(self, bbox: list[float], size: tuple[int, int], place: Place) -> list[float]:
        """A box (xywh, pixels of a photo of `size`) as cxcywh in 0 to 1 of the canvas."""
        (x, y, w, h), (height, width), (side, left, top, flip) = bbox, size, place
        centre_x = (x + w / 2) / width
        centre_x = 1 - centre_x if flip else centre_x
        return [
            (centre_x * side + left) / self.image_size,
            ((y + h / 2) / height * side + top) / self.image_size,
            w / width * side / self.image_size,
            h / height * side / self.image_size,
        ]

    def _target(
        self,
        objects: list[dict[str, Any]],
        annotated: int,
        original_size: tuple[int, int],
        place: Place,
    ) -> dict[str, torch.Tensor]:
        """Boxes and masks of one prompt's objects, of `annotated` ones, on the canvas."""
        complete = torch.tensor(len(objects) == annotated)
        size = self.image_size
        boxes = torch.zeros(len(objects), 4)
        has_mask = torch.tensor([bool(o["segmentation"]) for o in objects], dtype=torch.bool)
        count = len(objects) if has_mask.any() else 0
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        for i, entry in enumerate(objects):
            boxes[i] = torch.tensor(self._on_canvas(entry["bbox"], original_size, place))
            if entry["segmentation"]:
                mask = decode_mask(entry["segmentation"], *original_size)
                # 0 and 255, so that half coverage rounds as Meta's uint8 resize does.
                pixels = torch.from_numpy(mask.astype(np.uint8) * 255)[None]
                masks[i] = place_on_canvas(pixels, size, *place)[0] > 127
                if not masks[i].any():
                    # Smaller than a pixel of the canvas: that pixel, not "nothing is here".
                    column, row = (boxes[i, :2] * size).long().clamp(max=size - 1)
                    masks[i, row, column] = True
        return {"boxes_cxcywh": boxes, "masks": masks, "has_mask": has_mask, "complete": complete}

    def _list_items(self, over_queries: str) -> list[tuple[int, Window | None]]:
        """The items; warns of, or refuses, images with more objects of a prompt than queries."""
        items: list[tuple[int, Window | None]] = []
        crowded, beyond, still = [], 0, 0
        for position, record in enumerate(self.split.images):
            objects, tiles = self._objects(record), [None]
            if excess := count_beyond(objects, self.num_queries):
                crowded.append(record["file_name"])
                beyond += excess
                if over_queries == "tile":
                    size = record["width"], record["height"]
                    tiles, too_full = choose_tiles(objects, *size, self.num_queries)
                    still += too_full
            items += [(position, tile) for tile in tiles]
        if not crowded:
            return items
        names = ", ".join(crowded[:3]) + (", ..." if len(crowded) > 3 else "")
        found = (
            f"{len(crowded)} images have more than {self.num_queries} objects of one category, the "
            f"most a prompt can find ({names})"
        )
        kept = f"only the largest {self.num_queries} are used"
        done = {
            "": f"no prediction can reach {beyond} of their objects",
            "cap": f"{kept}, {beyond} are not; --over_queries tile cuts such images",
            "tile": f"cut into {sum(tile is not None for _, tile in items)} tiles"
            + (f"; of {still} that still have more {kept}" if still else ""),
        }
        if over_queries == "error":
            raise DatasetError(f"{found}; set --over_queries tile or cap")
        log.warning("%s: %s", found, done[over_queries])
        return items

    def _report_boxes_alone(self) -> None:
        """Warns where words without a box are only asked for in vain."""
        if self.box_prompt_probability == 1:
            log.warning(
                "box_prompt_probability is 1: words alone are asked for only where they find "
                "nothing, and will find nothing; lower it unless boxes are all that will be used"
            )

    def _report_left_out(self) -> None:
        """Warns of objects, crowds apart, that `_objects` leaves out."""
        rows = self.split.annotations.values()
        single = sum(not entry["iscrowd"] for annotations in rows for entry in annotations)
        left_out = single - sum(len(self._objects(record)) for record in self.split.images)
        if left_out:
            log.warning(
                "%d objects have boxes that are empty or outside their image and are not trained; "
                "`python prepare_data.py validate` lists them",
                left_out,
            )

    def _report_same_prompts(self) -> None:
        """Warns of categories with one prompt: an image may hold it as present and as absent."""
        names: dict[str, list[str]] = {}
        for category_id, name in self.split.categories.items():
            names.setdefault(self.split.phrase(category_id).lower(), []).append(name)
        same = [
            f"{' and '.join(map(repr, group))} as {phrase!r}"
            for phrase, group in names.items()
            if len(group) > 1
        ]
        if same:
            log.warning(
                "categories with one prompt contradict each other in training (%s): merge them, or "
                "give each a prompt of its own with `python prepare_data.py coco --prompts`",
                "; ".join(same),
            )


def place_on_canvas(
    pixels: torch.Tensor,
    size: int,
    side: int | None = None,
    left: int = 0,
    top: int = 0,
    flip: bool = False,
) -> torch.Tensor:
    """Resizes an image to a square and sets it on a canvas of zeros.

    Args:
        pixels: (c,H,W) uint8.
        size: S, side of the canvas, pixels.
        side: of the resized image, pixels, at most S; None fills the canvas, as evaluation does.
        left: of the resized image on the canvas, pixels.
        top: likewise.
        flip: mirror the image left to right.

    Returns:
        (c,S,S) uint8.
    """
    side = side or size
    square = transforms.resize(pixels, [side, side], antialias=True)
    if flip:
        square = square.flip(-1)
    if side == size:
        return square
    canvas = pixels.new_zeros(pixels.shape[0], size, size)
    canvas[:, top : top + side, left : left + side] = square
    return canvas
