"""How fast, and in how much memory, does a large COCO set convert and validate?

Makes a set from a seed: IMAGES names in folders of a thousand, each a hard link to one of a few
distinct JPEGs (the disk then holds few pictures, yet each name is opened and decoded), and
polygons of about 20 points in one COCO file. Then runs prepare_data.py on it:

    python benchmarks/data_scale.py --images 2000 --output_dir outputs/data_scale
    python benchmarks/data_scale.py --output_dir outputs/data_scale

Prints a line a command: seconds, of which of CPU; images and annotations a second; peak resident
memory. `again` is the conversion once more, which finds everything there. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# A script in a folder of its own: the package lies one level up.
sys.path.insert(0, str(ROOT))

from sam3_lora.config import ConfigError, user_errors  # noqa: E402
from sam3_lora.flags import FlagParser  # noqa: E402
from sam3_lora.prompts import parse_count  # noqa: E402

WIDTH, HEIGHT = 320, 240
PICTURES = 64  # distinct; a file system such as ext4 allows 65,000 links of one
CATEGORIES = 80
POINTS = (15, 26)  # of a polygon, from and below
FOLDER = 1000  # images


def make_set(folder: Path, images: int, objects: int, seed: int) -> None:
    """Writes `folder/images` and, row by row, `folder/annotations.json`."""
    rng = np.random.default_rng(seed)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for number in range(PICTURES):
        coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        photo = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        photo.save(pictures / f"{number}.jpg", quality=90)
    names = [f"{number // FOLDER:04d}/{number:07d}.jpg" for number in range(images)]
    for number, name in enumerate(names):
        path = folder / "images" / name
        if number % FOLDER == 0:
            path.parent.mkdir(parents=True)
        os.link(pictures / f"{number % PICTURES}.jpg", path)
    size = {"width": WIDTH, "height": HEIGHT}
    with (folder / "annotations.json").open("w", encoding="utf-8") as stream:
        rows = [{"id": 1 + i, "file_name": name, **size} for i, name in enumerate(names)]
        stream.write(f'{{"images": {json.dumps(rows)}, "annotations": [')
        for number in range(images * objects):
            row = {"id": 1 + number, "image_id": 1 + number // objects, **random_object(rng)}
            stream.write((",\n" if number else "\n") + json.dumps(row))
        rows = [{"id": 1 + i, "name": f"thing {i}"} for i in range(CATEGORIES)]
        stream.write(f'], "categories": {json.dumps(rows)}}}')


def random_object(rng: np.random.Generator) -> dict:
    """A star-shaped polygon inside the image, in hundredths of a pixel, with its box and area."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(*POINTS)))
    radii = rng.uniform(8, 30) * rng.uniform(0.7, 1, len(angles))
    x = np.round(rng.uniform(31, WIDTH - 31) + radii * np.cos(angles), 2)
    y = np.round(rng.uniform(31, HEIGHT - 31) + radii * np.sin(angles), 2)
    left, top = x.min(), y.min()
    box = np.round([left, top, x.max() - left, y.max() - top], 2)
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
    return {
        "category_id": int(rng.integers(CATEGORIES)) + 1,
        "segmentation": [np.stack([x, y], 1).ravel().tolist()],
        "bbox": box.tolist(),
        "area": round(float(area), 2),
        "iscrowd": 0,
    }


def measure(name: str, flags: list[str | Path], images: int, objects: int) -> None:
    """Runs a command of prepare_data.py and prints its line."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        found = f"found exit code {process.returncode}: {' '.join(command)}"
        raise ConfigError(f"expected {name} to succeed, {found}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB
    rates = f"{images / seconds:7.0f} images/s {images * objects / seconds:7.0f} annotations/s"
    cpu = usage.ru_utime + usage.ru_stime
    line = f"{name:9} {seconds:6.1f} s ({cpu:.1f} s CPU) {rates}  peak {peak / 1e9:.2f} GB"
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = FlagParser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--output_dir", type=Path, default=Path("outputs/data_scale"), help="for the data")
    add("--images", type=parse_count, default=100_000, help="of the data set")
    add("--objects", type=parse_count, default=10, help="an image")
    add("--seed", type=int, default=0, help="of the drawings")
    return parser


@user_errors()
def main(argv: list[str] | None = None) -> int:
    """Makes the set where it is not there yet, then measures each command on it."""
    args = build_parser().parse_args(argv)
    folder = args.output_dir.resolve() / f"{args.images}x{args.objects}_seed{args.seed}"
    source, data = folder / "source", folder / "data"
    if not (source / "annotations.json").is_file():
        make_set(source, args.images, args.objects, args.seed)
    size = args.images, args.objects
    place = ["--output_dir", data, "--split", "train"]
    convert = ["coco", "--coco_json", source / "annotations.json", "--images_dir"]
    convert += [source / "images", *place, "--link"]
    measure("convert", [*convert, "--overwrite"], *size)
    measure("again", convert, *size)
    measure("validate", ["validate", "--data_dir", data, "--split", "train"], *size)
    measure("split", ["split", "--data_dir", data / "train", "--output_dir", folder / "divided",
                      "--link", "--overwrite"], *size)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
