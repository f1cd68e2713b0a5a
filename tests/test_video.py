"""Video: frames in, identities of objects, outputs, and what is refused."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from sam3_lora import video
from sam3_lora.coco import decode_mask, encode_mask, mask_iou
from sam3_lora.images import DatasetError
from sam3_lora.prediction import Prompts

SIZE = (96, 64)  # width, height


def boxes_found(*rows: tuple[int, tuple[int, int, int, int]], side: int = 40) -> dict:
    """Detections (category, box) on a square image, each mask its box."""
    masks = np.zeros((len(rows), side, side), dtype=bool)
    for mask, (_, (x1, y1, x2, y2)) in zip(masks, rows, strict=True):
        mask[y1:y2, x1:x2] = True
    return {
        "category_id": np.array([category for category, _ in rows], dtype=int),
        "score": np.full(len(rows), 0.9),
        "boxes_xyxy": np.array([box for _, box in rows], dtype=float).reshape(-1, 4),
        "rles": [encode_mask(mask) for mask in masks],
    }


def identities(sequence: list[dict]) -> list[list[int]]:
    """What `follow` makes of detections, frame by frame."""
    frames = [video.Frame(i, f"{i}.png", np.full((1, 1, 3), i)) for i in range(len(sequence))]
    return [ids for *_, ids in video.follow(frames, lambda photo: sequence[int(photo[0, 0, 0])])]


def square(x: int, y: int = 0, side: int = 10) -> tuple[int, int, int, int]:
    return (x, y, x + side, y + side)


def test_crossing_objects_keep_their_identities():
    # One moves right, one left, half a side lower: where they meet, each mask is nearer its own.
    sequence = [boxes_found((1, square(3 * i, 0)), (1, square(30 - 3 * i, 5))) for i in range(11)]
    assert identities(sequence) == [[1, 2]] * 11
    # Detections come best first: the order of a frame says nothing.
    turned = [boxes_found((1, square(30 - 3 * i, 5)), (1, square(3 * i, 0))) for i in range(11)]
    mixed = [turned[i] if i % 2 else frame for i, frame in enumerate(sequence)]
    assert identities(mixed) == [[2, 1] if i % 2 else [1, 2] for i in range(11)]


def test_an_object_returns_as_itself_within_the_gap():
    there, away = boxes_found((1, square(5))), boxes_found()
    assert identities([there, *[away] * video.GAP, there]) == [[1], *[[]] * video.GAP, [1]]
    assert identities([there, *[away] * (video.GAP + 1), there])[-1] == [2]
    # An id of an object that is gone is not given again.
    other = boxes_found((1, square(25)))
    assert identities([there, other, there, other]) == [[1], [2], [1], [2]]
    assert identities([there, *[away] * 9, other, *[away] * 9, there])[-1] == [3]


def test_prompts_have_identities_of_their_own():
    both = boxes_found((1, square(5)), (2, square(5)))
    swapped = boxes_found((2, square(5)), (1, square(5)))
    assert identities([both, swapped, boxes_found((2, square(5)))]) == [[1, 2], [2, 1], [2]]


def test_a_pair_below_the_floor_is_none_and_takes_no_other_pairs_place():
    assert identities([boxes_found((1, square(0))), boxes_found((1, square(5)))]) == [[1], [1]]
    assert identities([boxes_found((1, square(0))), boxes_found((1, square(6)))]) == [[1], [2]]
    # IoUs: a-A 0.4, a-B 0.29, b-A 0.29. Their sum is largest with both pairs below the floor.
    tracks = [
        video.Track(1, 1, boxes_found((1, (0, 0, 7, 1)))["rles"][0], 0),
        video.Track(2, 1, boxes_found((1, (3, 0, 12, 1)))["rles"][0], 0),
    ]
    found = boxes_found((1, (3, 0, 10, 1)), (1, (5, 0, 9, 1)))
    iou = mask_iou(found["rles"], [track.rle for track in tracks])
    assert (iou[0] >= video.LINK_IOU).all()
    ids = [track.id for track in video.link_identities(tracks, found, 1, 3)]
    assert ids == [1, 2] and iou[0, 0] + iou[1, 1] > iou[0, 1]


def save_frames(folder: Path, count: int, size: tuple[int, int] = SIZE) -> Path:
    """A folder of frames, named without zeros, each of one grey value."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", size, (10 * i,) * 3).save(folder / f"frame{i + 1}.png")
    return folder


def open_folder(folder: Path, every: int = 1) -> video.Clip:
    return video.open_clip(folder, list(folder.glob("*.png")), every, None)


def test_a_folder_is_read_in_natural_order(tmp_path):
    clip = open_folder(save_frames(tmp_path / "clip", 11), every=3)
    frames = list(video.read_frames(clip))
    assert [frame.file_name for frame in frames] == [f"frame{i}.png" for i in (1, 4, 7, 10)]
    assert [frame.index for frame in frames] == [0, 3, 6, 9]
    assert [int(frame.photo[0, 0, 0]) for frame in frames] == [0, 30, 60, 90]
    assert (clip.name, clip.size, clip.total, clip.rate) == ("clip", SIZE, 4, video.FRAME_RATE)


def test_frames_of_two_sizes_are_refused(tmp_path):
    folder = save_frames(tmp_path / "clip", 2)
    Image.new("RGB", (64, 96)).save(folder / "frame3.png")
    with pytest.raises(DatasetError, match=r"one size, 96 x 64 as the first, found 64 x 96: .*e3"):
        open_folder(folder)


def write_clip(path: Path, count: int = 7, size: tuple[int, int] = SIZE) -> Path:
    """A video file, ever lighter, 12 frames a second."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), 30 * i, dtype=np.uint8)
            pixels[: size[1] // 2, : size[0] // 2] = 255  # top left
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_video_file_is_read_frame_by_frame(tmp_path):
    clip = video.open_clip(write_clip(tmp_path / "clip.mp4"), None, 2, None)
    assert (clip.name, clip.size, clip.total, clip.rate) == ("clip", SIZE, 4, 6.0)
    frames = list(video.read_frames(clip))
    assert [frame.index for frame in frames] == [0, 2, 4, 6]
    assert {frame.file_name for frame in frames} == {"clip.mp4"}
    values = [float(frame.photo[50, 80].mean()) for frame in frames]
    assert np.allclose(values, [0, 60, 120, 180], atol=12)
    assert all(frame.photo[5, 5].min() > 230 for frame in frames)
    assert video.open_clip(clip.path, None, 1, 3).rate == 3


def test_a_video_of_a_turned_camera_stands_upright(tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    content = path.read_bytes()
    upright = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    # To be shown turned by 90 degrees clockwise, as phones write it (ISO 14496-12, tkhd).
    turned = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    track = content.index(b"tkhd")
    where = content.index(upright, track)
    path.write_bytes(content[:where] + turned + content[where + len(turned) :])
    clip = video.open_clip(path, None, 1, None)
    assert clip.size == SIZE[::-1]
    photo = next(video.read_frames(clip)).photo
    assert photo[5, -5].min() > 230 > 40 > photo[5, 5].max()  # top left is now top right


def test_what_is_no_video_is_refused(tmp_path, monkeypatch):
    text = tmp_path / "notes.txt"
    text.write_text("not a video\n" * 50, encoding="utf-8")
    junk = tmp_path / "junk.mp4"
    junk.write_bytes(bytes(range(256)) * 20)
    cut = write_clip(tmp_path / "cut.mp4")
    cut.write_bytes(cut.read_bytes()[:200])
    for path in (text, junk, cut):
        with pytest.raises(DatasetError, match=f"expected a .*video.*{path.name}.*; name another"):
            video.open_clip(path, None, 1, None)
    with pytest.raises(DatasetError, match="a folder of frames or a video, found no .*none.mp4"):
        video.open_clip(tmp_path / "none.mp4", None, 1, None)
    monkeypatch.setitem(sys.modules, "av", None)
    message = r"pip install av, or a folder of frames: ffmpeg -i junk.mp4 frames/%05d.jpg"
    with pytest.raises(DatasetError, match=message):
        video.open_clip(junk, None, 1, None)


def tracked_squares(count: int, size: tuple[int, int]) -> list[video.Tracked]:
    """Frames with one object of prompt 2 that moves right."""
    width, height = size
    tracked = []
    for i in range(count):
        mask = np.zeros((height, width), dtype=bool)
        mask[10:30, 2 * i : 2 * i + 20] = True
        found = {
            "category_id": np.array([2]),
            "score": np.array([0.75]),
            "boxes_xyxy": np.array([[2 * i, 10, 2 * i + 20, 30]]),
            "rles": [encode_mask(mask)],
        }
        photo = np.full((height, width, 3), 200, dtype=np.uint8)
        tracked.append((video.Frame(3 * i, f"f{i}.png", photo), found, [7]))
    return tracked


def test_a_fast_gif_lasts_as_long_as_its_video(tmp_path):
    pictures = [tmp_path / f"{i}.png" for i in range(10)]
    for i, picture in enumerate(pictures):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(picture)
    video._write_gif(tmp_path / "clip.gif", pictures, 100.0)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (5, 20)


def test_outputs_of_a_video(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(video, "GIF_FRAMES", 4)
    monkeypatch.setattr(video, "GIF_SIDE", 48)
    caplog.set_level("INFO")
    clip = open_folder(save_frames(tmp_path / "clip", 9))
    outputs = video.plan_outputs(clip, tmp_path / "out", None)
    prompts = Prompts(["cat", "dog"], [], [])
    line = video.write_video(clip, tracked_squares(9, SIZE), prompts, outputs)
    assert line == f"clip: cat 0, dog 1 in 9 frames, {tmp_path / 'out' / 'clip.gif'}"
    pictures = sorted((tmp_path / "out" / "clip_frames").iterdir())
    assert [path.name for path in pictures] == [f"{i:05d}.png" for i in range(1, 10)]
    drawn = np.asarray(Image.open(pictures[-1]))
    assert drawn.shape == (64, 96, 3) and (drawn[20, 26] != 200).any()
    assert "one frame in 3 of 9" in caplog.text
    with Image.open(outputs.gif) as gif:
        # 0, 3 and 6; each as long as three frames of a folder.
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (3, (48, 32), 300)
        assert gif.info["loop"] == 0
    rows = json.loads(outputs.json.read_text(encoding="utf-8"))
    assert len(rows) == 9
    expected = {"image_id": 2, "category_id": 2, "bbox": [2, 10, 20, 20], "score": 0.75}
    expected |= {"file_name": "f1.png", "frame": 3, "prompt": "dog", "track_id": 7}
    assert {k: v for k, v in rows[1].items() if k != "segmentation"} == expected
    assert decode_mask(rows[1]["segmentation"], 64, 96).sum() == 400


def test_colours_are_of_identities():
    frame, found, _ = tracked_squares(1, SIZE)[0]
    prompts = Prompts(["cat", "dog"], [], [])
    first, second, again = (video._draw(frame.photo, found, [key], prompts) for key in (1, 2, 13))
    assert not np.array_equal(first[15, 5], second[15, 5])
    assert np.array_equal(first[15, 5], again[15, 5])


def test_an_earlier_run_is_renamed_and_a_failed_one_writes_no_json(tmp_path):
    clip = open_folder(save_frames(tmp_path / "clip", 2))
    outputs = video.plan_outputs(clip, tmp_path / "out", None)
    prompts = Prompts(["cat", "dog"], [], [])
    video.write_video(clip, tracked_squares(2, SIZE), prompts, outputs)
    before = outputs.json.read_bytes()

    def broken():
        yield tracked_squares(1, SIZE)[0]
        raise DatasetError("a damaged frame")

    with pytest.raises(DatasetError, match="a damaged frame"):
        video.write_video(clip, broken(), prompts, outputs)
    assert (tmp_path / "out" / "clip_detections.json.1").read_bytes() == before
    assert len(list((tmp_path / "out" / "clip_frames.1").iterdir())) == 2
    names = {"clip.gif.1", "clip_detections.json.1", "clip_frames", "clip_frames.1"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_no_output_replaces_the_input(tmp_path):
    folder = tmp_path / "clip_frames" / "clip"
    folder.parent.mkdir()
    clip = open_folder(save_frames(folder, 1))
    for output, json_file in (
        (tmp_path, None),
        (tmp_path / "out", tmp_path / "out" / "clip.gif"),
        (tmp_path / "out", tmp_path),
    ):
        with pytest.raises(DatasetError, match="would replace the input, a folder, or each other"):
            video.plan_outputs(clip, output, json_file)
    with pytest.raises(DatasetError, match="expected a folder for a video, found .*r.png"):
        video.plan_outputs(clip, tmp_path / "r.png", None)


@pytest.fixture
def run(tiny_model_dir, capsys):
    """Runs inference.py on the CPU, keeping every detection; returns (exit code, lines of stdout,
    stderr)."""

    def call(*words, base=tiny_model_dir):
        argv = ["--threshold", "0", "--device", "cpu", "--model_name", base, *words]
        code = inference.main([*map(str, argv)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return call


def test_a_folder_of_frames_through_the_script(run, tmp_path):
    folder = save_frames(tmp_path / "clip", 5)
    words = ["--video", folder, "--text_prompt", "x", "y", "--output", tmp_path / "out"]
    words += ["--every", 2, "--fps", 4, "--nms_iou", 0.5, "--save_masks"]
    code, lines, err = run(*words)
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "clip_detections.json").read_text(encoding="utf-8"))
    assert {row["frame"] for row in rows} == {0, 2, 4}
    ids = [{row["track_id"] for row in rows if row["prompt"] == text} for text in ("x", "y")]
    gif = tmp_path / "out" / "clip.gif"
    assert lines == [f"clip: x {len(ids[0])}, y {len(ids[1])} in 3 frames, {gif}"]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    with Image.open(gif) as image:
        assert image.info["duration"] == 250
    # Grey frames of nearly one value: what is found stays, and keeps its identity.
    per_frame = [{row["track_id"] for row in rows if row["frame"] == f} for f in (0, 2, 4)]
    assert len(per_frame[0] & per_frame[1] & per_frame[2]) >= len(per_frame[0]) / 2
    for number in (1, 2, 3):
        own = [row for row in rows if row["image_id"] == number]
        masks = sorted((tmp_path / "out" / "clip_masks" / f"{number:05d}").iterdir())
        for path, row in zip(masks, own, strict=True):
            mask = decode_mask(row["segmentation"], *SIZE[::-1])
            assert np.array_equal(np.asarray(Image.open(path)) > 0, mask)
    code, _, err = run(*words, "--json", tmp_path / "rows.json", "--bboxes", "[[9, 9, 50, 40]]")
    assert code == 0 and "clip_frames is of an earlier run: renamed to" in err
    assert "nothing found" not in err
    assert "clip_masks is of an earlier run" in err and (tmp_path / "rows.json").is_file()


def test_of_a_video_without_a_find_the_best_score_is_told(run, tmp_path):
    folder, out = save_frames(tmp_path / "clip", 2), tmp_path / "out"
    words = ["--video", folder, "--text_prompt", "x", "--output", out, "--threshold", 1]
    code, lines, err = run(*words)
    assert code == 0 and lines[0].startswith("clip: x 0 in 2 frames, ")
    assert re.search(r"nothing found: x 0 \(best score 0\.\d+, below 1\); --threshold keeps", err)


def bad_video(kind: str, folder: Path) -> Path:
    """A path that cannot be run, named after what is wrong."""
    if kind in ("gone", "notes.txt"):
        path = folder / kind
        if kind == "notes.txt":
            path.write_text("not a video", encoding="utf-8")
        return path
    path = save_frames(folder / kind, 0 if kind == "empty" else 3)
    if kind == "unreadable":
        (path / "frame2.png").write_bytes(b"x")
    if kind == "damaged":
        photo = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
        Image.fromarray(photo).save(path / "frame2.png")
        (path / "frame2.png").write_bytes((path / "frame2.png").read_bytes()[:-600])
    return path


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("gone", [], "--video: expected a folder of frames or a video, found no .*gone"),
        ("notes.txt", [], "--video: expected a"),
        ("empty", [], r"--video: expected images \(.bmp, .*\) directly in .*empty, found none"),
        ("unreadable", [], "expected an image that PIL reads, found .*frame2.png"),
        ("both", ["--image", "x.png"], "--image: not allowed with argument --video"),
        ("every", ["--every", "0"], "--every: expected a whole number from 1 up, found '0'"),
        ("boxes", ["--bboxes", "[[9, 9, 99, 40]]"], r"expected boxes inside .*\(96 x 64 pixels\)"),
        ("sam3", ["--tracker", "sam3"], "expected SAM 3's video model, found the detector"),
        ("sam3 boxes", ["--tracker", "sam3", "--bboxes", "[[1, 1, 9, 9]]"], "takes texts alone"),
        ("sam3 compiled", ["--tracker", "sam3", "--use_compile"], "is not compiled"),
        ("file", ["--output", "r.png"], "--output: expected a folder for a video, found r.png"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(run, tmp_path, kind, words, message):
    path, out = bad_video(kind, tmp_path), tmp_path / "out"
    code, lines, err = run("--video", path, "--text_prompt", "x", "--output", out, *words)
    assert code == 2 and lines == [] and not out.exists()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]) and "Traceback" not in err


def test_a_damaged_frame_is_told_by_its_name_before_the_work(run, tmp_path):
    path, out = bad_video("damaged", tmp_path), tmp_path / "out"
    code, _, err = run("--video", path, "--text_prompt", "x", "--output", out)
    assert code == 2 and re.search("error: expected an image .*frame2.png", err)
    assert not out.exists()


def test_flags_of_a_video_need_one(run, tmp_path):
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    words = ["--image", tmp_path / "a.png", "--text_prompt", "x", "--output", tmp_path / "r.png"]
    for flags in (["--every", 2], ["--fps", 1], ["--tracker", "sam3"]):
        code, _, err = run(*words, *flags)
        assert code == 2 and ": expected --video, found --image" in err
    code, _, err = run("--text_prompt", "x")
    assert code == 2 and "expected one of --image --video, found none" in err
