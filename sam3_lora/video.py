"""Video: frames one by one, detections that keep an identity, overlays, a GIF and one JSON file.

folder of frames or video file -> detections of a frame -> identities -> overlays, rows -> GIF, JSON

Identities come from the masks (`follow`), or from SAM 3's own tracker (`track_sam3`). A frame is in
memory while it is worked on, so a video may be of any length.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import nn

from sam3_lora import processes
from sam3_lora.coco import decode_mask, encode_mask, mask_iou
from sam3_lora.dataset import place_on_canvas
from sam3_lora.drawing import draw_overlay
from sam3_lora.files import check_writable, set_aside, write_atomically, write_picture
from sam3_lora.forward import PADDING_BOX, Forward, normalize
from sam3_lora.geometry import mask_box
from sam3_lora.images import DatasetError, image_size, read_image
from sam3_lora.metrics import Detections, coco_results
from sam3_lora.model import image_size as model_side
from sam3_lora.prediction import Prompts

log = logging.getLogger(__name__)

# The least mask IoU of one object in two frames: a square that moves by half its side has 1/3.
LINK_IOU = 0.3
# Frames in a row that an object may be missed in: longer, and its last mask no longer says where
# it is.
GAP = 5
FRAME_RATE = 10.0  # frames a second of a GIF of images, which have no rate of their own
GIF_SIDE = 640  # pixels; of its longest side
GIF_FRAMES = 200  # at most: they are in memory together, a byte a pixel, 80 MB at that size
GIF_SHORTEST = 20  # ms a frame; browsers show shorter ones for 100 ms
NEEDS_AV = "pip install av, or a folder of frames: ffmpeg -i {name} frames/%05d.jpg"


@dataclass(frozen=True)
class Clip:
    """Frames to read: those of a folder, or a video file's."""

    path: Path
    files: list[Path] | None  # of a folder, in order
    size: tuple[int, int]  # width, height, pixels as shown
    every: int  # each so many-th frame is taken
    rate: float  # of the taken frames, a second
    total: int | None  # of the taken frames; None: not known before the end

    @property
    def name(self) -> str:
        """What its outputs are named after."""
        return self.path.resolve().name if self.files else self.path.stem


@dataclass(frozen=True)
class Frame:
    """A frame that was taken."""

    index: int  # in the folder or file, from 0
    file_name: str
    photo: np.ndarray  # uint8 (H, W, 3)


@dataclass(frozen=True)
class Track:
    """An object's identity, and where it was last seen."""

    id: int
    category_id: int
    rle: dict[str, Any]
    frame: int


@dataclass(frozen=True)
class Outputs:
    """What a run on a video writes.

    Args:
        frames: folder of the overlays, `00001.png` on.
        masks: folder of a folder of masks for each frame, where they are asked for.
        gif: the overlays as one moving picture.
        json: COCO results, a row a detection, `image_id` counting the taken frames from 1; with
            `file_name`, `frame` (from 0, in the source), `prompt` and `track_id`.
    """

    frames: Path
    masks: Path
    gif: Path
    json: Path


Tracked = tuple[Frame, Detections, list[int]]


def natural_order(path: Path) -> list[str | int]:
    """A key that sorts frame2 before frame10."""
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def open_clip(path: Path, files: Sequence[Path] | None, every: int, rate: float | None) -> Clip:
    """What there is to read, checked before a weight is loaded.

    Args:
        path: a folder of frames, or a video file.
        files: the images of the folder, in any order; None for a video file.
        every: take each so many-th frame.
        rate: of the taken frames, a second; None: that of the video, `FRAME_RATE` of images.

    Raises:
        DatasetError: not a video, no frame in it, its reader is not installed; or frames of a
            folder that cannot be read or differ in size.
    """
    if not path.exists():
        raise DatasetError(f"--video: expected a folder of frames or a video, found no {path}")
    if files is not None:
        taken = sorted(files, key=natural_order)[::every]
        size = image_size(taken[0])
        for file in taken:
            _check_size(image_size(file), size, file)
        return Clip(path, list(taken), size, every, rate or FRAME_RATE, len(taken))
    first = next(_decode(path), None)
    if first is None:
        raise DatasetError(f"--video: expected a video, found no frame in {path}; name another")
    with _av(path).open(str(path)) as container:
        stream = container.streams.video[0]
        own = float(stream.average_rate or FRAME_RATE) / every
        total = math.ceil(stream.frames / every) or None
    height, width = first.shape[:2]
    return Clip(path, None, (width, height), every, rate or own, total)


def read_frames(clip: Clip) -> Iterator[Frame]:
    """The taken frames, in order.

    Raises:
        DatasetError: a frame is damaged, or of another size than the first.
    """
    if clip.files:
        for number, file in enumerate(clip.files):
            yield Frame(number * clip.every, file.name, read_image(file))
        return
    for number, photo in enumerate(islice(_decode(clip.path), 0, None, clip.every)):
        index = number * clip.every
        _check_size(photo.shape[1::-1], clip.size, f"frame {index} of {clip.path}")
        yield Frame(index, clip.path.name, photo)


def check_frames(clip: Clip) -> None:
    """Reads a video once, so that a damaged frame is told before the work and not in its middle.

    Raises:
        DatasetError: as `read_frames`.
    """
    for _ in read_frames(clip):
        pass


def _check_size(found: tuple[int, int], expected: tuple[int, int], where: Path | str) -> None:
    """Masks of two frames can be compared at one size only."""
    if found != expected:
        raise DatasetError(
            f"--video: expected frames of one size, {expected[0]} x {expected[1]} as the first, "
            f"found {found[0]} x {found[1]}: {where}; name a folder of one video's frames, or run "
            "unrelated images with --image"
        )


def _av(path: Path) -> Any:
    """PyAV, which reads video files."""
    try:
        import av  # optional
    except ImportError as error:
        hint = NEEDS_AV.format(name=path.name)
        raise DatasetError(f"--video: a video file needs PyAV: {hint}") from error
    return av


def _decode(path: Path) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) of a video file as shown, one at a time."""
    av = _av(path)
    try:
        with av.open(str(path)) as container:
            # The library also plays a text file.
            if not container.streams.video or container.format.name == "tty":
                message = f"--video: expected a video, found no picture in {path}; name another"
                raise DatasetError(message)
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(container.streams.video[0]):
                photo = frame.to_ndarray(format="rgb24")
                # A phone's video is stored lying and says by how much it is to be turned.
                turned = np.rot90(photo, round(frame.rotation / 90))
                yield np.ascontiguousarray(turned)
    except av.FFmpegError as error:
        raise DatasetError(
            f"--video: expected a folder of frames or a video that PyAV reads, found {path} "
            f"({error.strerror}); name another"
        ) from error


def link_identities(
    tracks: Sequence[Track], found: Detections, frame: int, first_free: int
) -> list[Track]:
    """Gives each detection of a frame an identity: that of an earlier object, or a new one.

    Pairs are those with the largest sum of mask IoU, each of one prompt and of at least
    `LINK_IOU`. Two objects that swap places behind each other may swap identities too: a mask does
    not say what it shows.

    Args:
        tracks: earlier objects, where they were last seen.
        found: detections, with `rles`.
        frame: number of the frame.
        first_free: the id of the first new object.

    Returns:
        A track for each detection, in their order.
    """
    rles, categories = found["rles"], np.asarray(found["category_id"])
    iou = mask_iou(rles, [track.rle for track in tracks])  # (n, m)
    same = categories[:, None] == np.array([track.category_id for track in tracks])
    # Below the floor a pair must not outweigh another that counts.
    iou = np.where(same & (iou >= LINK_IOU), iou, 0.0)
    pairs = zip(*linear_sum_assignment(-iou), strict=True)
    known = {row: tracks[column].id for row, column in pairs if iou[row, column]}
    seen = []
    for row, rle in enumerate(rles):
        if row not in known:
            known[row], first_free = first_free, first_free + 1
        seen.append(Track(known[row], int(categories[row]), rle, frame))
    return seen


def follow(
    frames: Iterable[Frame], detect: Callable[[np.ndarray], Detections]
) -> Iterator[Tracked]:
    """Detections of each frame, with identities from 1 by `link_identities`.

    Args:
        frames: in order.
        detect: an image (H, W, 3) to its detections.
    """
    tracks: dict[int, Track] = {}
    first_free = 1
    for number, frame in enumerate(frames):
        found = detect(frame.photo)
        alive = [track for track in tracks.values() if number - track.frame <= GAP + 1]
        seen = link_identities(alive, found, number, first_free)
        first_free = max([first_free, *(track.id + 1 for track in seen)])
        tracks = {track.id: track for track in [*alive, *seen]}
        yield frame, found, [track.id for track in seen]


def track_sam3(
    model: nn.Module,
    processor: Any,
    forward: Forward,
    texts: Sequence[str],
    thresholds: Sequence[float],
    frames: Iterable[Frame],
) -> Iterator[Tracked]:
    """Detections and identities of SAM 3's video model, which looks at frames as they come.

    It carries each object's mask along by a memory of what it looked like, and adds what the
    detector finds beside. An object's score is that of its first detection. Without future frames
    the library takes no object back: one that proves wrong stays, and one that has left still
    costs its time. An adapter of the vision tower also shifts what the tracker sees, on which the
    tracker was not trained.

    Args:
        model: as `model.build_tracker` gives, around `forward.model`.
        processor: likewise.
        forward: the detector, in fp32; its `geometry_cls` holds here too.
        texts: prompts.
        thresholds: lowest score of each text's objects; a new one also needs the model's own.
        frames: in order, of one size.
    """
    lowest = min(thresholds)  # one for all prompts; `_detections` leaves out what is below its own
    model.score_threshold_detection = lowest
    model.new_det_thresh = max(model.new_det_thresh, lowest)
    session = processor.init_video_session(inference_device=forward.device)
    forward.remember_texts(texts)
    for text in texts:
        key = session.add_prompt(text)
        features, mask = forward.texts[text]
        session.prompt_embeddings[key] = SimpleNamespace(pooler_output=features[None])
        session.prompt_attention_masks[key] = mask[None]
    handle = None
    if forward.geometry_cls == "meta":
        handle = forward.model.register_forward_pre_hook(_add_padding_box, with_kwargs=True)
    try:
        for number, frame in enumerate(frames):
            session.video_height, session.video_width = frame.photo.shape[:2]
            photo = torch.from_numpy(frame.photo).permute(2, 0, 1)
            pixels = place_on_canvas(photo, model_side(forward.model))
            pixels = normalize(pixels.to(forward.device))
            outputs = model(inference_session=session, frame=pixels, frame_idx=number)
            found = processor.postprocess_outputs(session, outputs)
            yield frame, *_detections(session, found, thresholds)
            _forget(session, number, model.tracker_model)
    finally:
        if handle:
            handle.remove()


def _add_padding_box(model: nn.Module, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict]:
    """Has the detector run the geometry encoder without a box, as SAM 3 was trained."""
    rows = len(inputs["attention_mask"])
    device = inputs["attention_mask"].device
    inputs["input_boxes"] = torch.zeros(rows, 1, 4, device=device)
    inputs["input_boxes_labels"] = torch.full((rows, 1), PADDING_BOX, device=device)
    return args, inputs


def _detections(
    session: Any, found: dict[str, Any], thresholds: Sequence[float]
) -> tuple[Detections, list[int]]:
    """A frame's objects as detections of our own, and their identities from 1."""
    ids, rles, boxes, scores, categories = [], [], [], [], []
    for key, score, mask in zip(
        *(found[k] for k in ("object_ids", "scores", "masks")), strict=True
    ):
        prompt = session.obj_id_to_prompt_id[int(key)]
        rle = encode_mask(mask.cpu().numpy())
        # Overlaps were divided after the processor had drawn its boxes.
        box = mask_box(rle, *mask.shape)
        if box is None or score < thresholds[prompt]:
            continue
        ids.append(int(key) + 1)
        rles.append(rle)
        boxes.append(box)
        scores.append(float(score))
        categories.append(prompt + 1)
    columns = {"score": np.array(scores), "boxes_xyxy": np.array(boxes).reshape(-1, 4)}
    return {"category_id": np.array(categories, dtype=int), **columns, "rles": rles}, ids


def _forget(session: Any, frame: int, tracker: nn.Module) -> None:
    """Drops what no later frame reads: at 1008 px a session would keep 6 MB an object and frame."""
    session.processed_frames[frame] = None  # its place counts the frames
    session.obj_id_to_tracker_score_frame_wise.pop(frame, None)
    reach = max(tracker.num_maskmem, tracker.config.max_object_pointers_in_encoder)
    for outputs in session.output_dict_per_obj.values():
        outputs["non_cond_frame_outputs"].pop(frame - reach, None)
        for stored in outputs.values():
            if frame in stored:
                stored[frame].update(high_res_masks=None, pred_masks=None)


def plan_outputs(clip: Clip, folder: Path, json_file: Path | None) -> Outputs:
    """What a video's run writes; `json_file` None: into the folder.

    Raises:
        DatasetError: the folder is none, or an output would replace the input or another one.
        PermissionError: it cannot be written.
    """
    if folder.is_file() or (folder.suffix and not folder.is_dir()):
        raise DatasetError(
            f"--output: expected a folder for a video, found {folder}; the GIF and all else go "
            "into it, and one whose name has a dot must exist"
        )
    endings = ("_frames", "_masks", ".gif", "_detections.json")
    frames, masks, gif, rows = (folder / f"{clip.name}{ending}" for ending in endings)
    rows = json_file or rows
    source = clip.path.resolve()
    replaced = any(source.is_relative_to(path.resolve()) for path in (frames, masks, gif, rows))
    if replaced or rows.is_dir() or rows.resolve() == gif.resolve():
        raise DatasetError(
            f"--output, --json: {folder} and {rows} would replace the input, a folder, or each "
            "other; name other places"
        )
    check_writable(folder, "--output")
    check_writable(rows.parent, "--json")
    return Outputs(frames, masks, gif, rows)


def write_video(
    clip: Clip,
    tracked: Iterable[Tracked],
    prompts: Prompts,
    outputs: Outputs,
    write_masks: Callable[[Path, Detections], None] | None = None,
) -> str:
    """Writes the overlays, the GIF and the JSON file of a video.

    Args:
        clip: the video.
        tracked: its frames with detections and identities, read once.
        prompts: texts for the tags; boxes are drawn dashed.
        outputs: where to. Earlier ones are renamed. The JSON file is written whole or not at all.
        write_masks: writes the masks of a frame into a folder; None: no masks.

    Returns:
        A line: identities of each prompt, frames, and the GIF's path.
    """
    masks = [outputs.masks] if write_masks else []
    for place in (outputs.frames, outputs.gif, outputs.json, *masks):
        if moved := set_aside(place):
            log.warning("%s is of an earlier run: renamed to %s", place, moved)
    pictures: list[Path] = []
    identities: dict[int, set[int]] = defaultdict(set)

    def save(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as stream:
            comma = "["
            for frame, found, ids in processes.progress(tracked, "frames", clip.total):
                name = f"{len(pictures) + 1:05d}"
                pictures.append(outputs.frames / f"{name}.png")
                write_picture(pictures[-1], _draw(frame.photo, found, ids, prompts))
                if write_masks:
                    write_masks(outputs.masks / name, found)
                for row in _rows(len(pictures), frame, found, ids, prompts.texts):
                    identities[row["category_id"]].add(row["track_id"])
                    stream.write(f"{comma}\n{json.dumps(row, ensure_ascii=False)}")
                    comma = ","
            stream.write("[]\n" if comma == "[" else "\n]\n")

    write_atomically(outputs.json, save)
    _write_gif(outputs.gif, pictures, clip.rate)
    counts = (f"{text} {len(identities[i])}" for i, text in enumerate(prompts.texts, start=1))
    return f"{clip.name}: {', '.join(counts)} in {len(pictures)} frames, {outputs.gif}"


def _rows(
    number: int, frame: Frame, found: Detections, ids: Sequence[int], texts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows of the taken frame of that number."""
    place = {"file_name": frame.file_name, "frame": frame.index}
    for row, key in zip(coco_results(number, found), ids, strict=True):
        yield {**row, **place, "prompt": texts[row["category_id"] - 1], "track_id": key}


def _draw(photo: np.ndarray, found: Detections, ids: Sequence[int], prompts: Prompts) -> np.ndarray:
    """The detections over a frame, a colour an identity."""
    words = zip(found["category_id"].tolist(), ids, found["score"], strict=True)
    return draw_overlay(
        photo,
        (decode_mask(rle, *photo.shape[:2]) for rle in found["rles"]),
        found["boxes_xyxy"],
        [f"{prompts.texts[category - 1]} #{key} {score:.2f}" for category, key, score in words],
        [key - 1 for key in ids],
        prompts.boxes_xyxy,
        prompts.labels,
    )


def _write_gif(path: Path, pictures: Sequence[Path], rate: float) -> None:
    """Writes a GIF of at most `GIF_FRAMES` of the pictures, evenly spaced, none shown for less than
    `GIF_SHORTEST`, at their rate a second; it lasts as long as all of them."""
    stride = max(math.ceil(len(pictures) / GIF_FRAMES), math.ceil(rate * GIF_SHORTEST / 1000))
    if stride > 1:
        log.info("%s: one frame in %d of %d", path, stride, len(pictures))
    first, *rest = (_small(picture) for picture in pictures[::stride])
    duration = round(1000 * stride / rate)
    options = {"save_all": True, "append_images": rest, "duration": duration, "loop": 0}
    write_atomically(path, lambda temporary: first.save(temporary, "GIF", **options))


def _small(path: Path) -> Image.Image:
    """A picture of at most `GIF_SIDE` pixels a side, in 256 colours of its own."""
    with Image.open(path) as picture:
        picture.thumbnail((GIF_SIDE, GIF_SIDE))
        return picture.quantize()
