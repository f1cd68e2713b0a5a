r"""Brings annotated images into the one layout that training reads, and checks it.

    python prepare_data.py create --output_dir data
    python prepare_data.py coco --coco_json annotations.json --images_dir images/ \
        --output_dir data --split train
    python prepare_data.py validate --data_dir data --split train
    python prepare_data.py split --data_dir data/all --output_dir data --fractions 0.8,0.1,0.1
    python prepare_data.py demo --output_dir data/demo

Also `yolo`, for YOLO boxes and polygons; `prepare_data.py yolo --help` lists its flags.

Outputs: `<output_dir>/<split>/annotations.json` (COCO) and `<output_dir>/<split>/images/`, copies
of the images or, with `--link`, hard links; data/README.md describes both. A split is written whole
or not at all, and left as it is where it already holds the same. `validate` writes nothing: it
prints a summary and the faults, and exits with 2 if one of them is an error.
"""

import argparse
import dataclasses
import json
import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from sam3_lora.coco import (
    CocoSplit,
    DatasetError,
    Fault,
    check_prompts,
    find_faults,
    find_split,
    read_coco,
    read_split,
    split_dir,
    write_splits,
)
from sam3_lora.config import ConfigError, FlagParser, setup_logging, user_errors
from sam3_lora.formats import read_yolo
from sam3_lora.scenes import IMAGES, TASKS, demo_split, write_scenes

logger = logging.getLogger("prepare_data")

SPLITS = ("train", "val", "valid", "test")
FAULTS_LISTED = 5  # of each kind
NAMES_LISTED = 5
EMPTY_LISTED = 10  # categories without an object; of more, the summary gives the number


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line, one subcommand an operation."""
    parser = FlagParser(description=__doc__, epilog="Each command has its own --help.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument(
        "--output_dir", type=Path, default=Path("data"), help="data folder (default: data)"
    )
    split = argparse.ArgumentParser(add_help=False)
    split.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    place = argparse.ArgumentParser(add_help=False, parents=[output])
    place.add_argument("--link", action="store_true", help="hard-link images instead of copying")
    place.add_argument("--overwrite", action="store_true", help="replace a split that has files")
    write = argparse.ArgumentParser(add_help=False, parents=[place, split])
    write.add_argument(
        "--prompts",
        metavar="JSON",
        help='phrases for category names, {"name": "phrase"}, or a file that holds them',
    )

    commands.add_parser("create", parents=[output], help="make the empty folders")
    coco = commands.add_parser("coco", parents=[write], help="COCO or Roboflow COCO")
    coco.add_argument("--coco_json", type=Path, required=True, help="annotation file")
    coco.add_argument("--images_dir", type=Path, required=True, help="folder of its images")
    yolo = commands.add_parser("yolo", parents=[write], help="YOLO boxes or polygons")
    yolo.add_argument("--yolo_dir", type=Path, required=True, help="folder of images and labels")
    yolo.add_argument("--classes", help='names of class 0, 1, ... as "person,car"; else data.yaml')
    divide = commands.add_parser("split", parents=[place], help="divide a split by image")
    divide.add_argument("--data_dir", type=Path, required=True, help="folder of the whole split")
    divide.add_argument(
        "--fractions",
        default="0.8,0.1,0.1",
        help="of the images for train,val,test; 0 leaves one out (default: 0.8,0.1,0.1)",
    )
    divide.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    demo = commands.add_parser("demo", parents=[output], help="a drawn data set, for a first try")
    demo.add_argument(
        "--task",
        choices=TASKS,
        default="parts",
        help="parts: defects on metal, new to the demo model; shapes: what it knows "
        "(default: parts)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of the drawings (default: 0)")
    demo.add_argument("--overwrite", action="store_true", help="replace splits that have files")
    check = commands.add_parser("validate", parents=[split], help="check a split")
    check.add_argument(
        "--data_dir", type=Path, default=Path("data"), help="data folder (default: data)"
    )
    return parser


def create_folders(output_dir: Path) -> None:
    """Makes train/, val/ and test/ with images/ in each; leaves what exists."""
    for split in ("train", "val", "test"):
        folder = split_dir(output_dir, split) / "images"
        folder.mkdir(parents=True, exist_ok=True)
        sys.stdout.write(f"{folder}\n")


def write_demo(output_dir: Path, task: str, seed: int, overwrite: bool) -> None:
    """Draws train/, val/ and test/ of a demo data set."""
    for split in IMAGES:
        folder = write_scenes(output_dir, split, *demo_split(task, split, seed), overwrite)
        sys.stdout.write(f"{folder}\n{summary(read_split(folder))}")


def read_source(args: argparse.Namespace) -> CocoSplit:
    """Returns the records that a conversion command reads."""
    if args.command == "coco":
        return skip_missing(read_coco(args.coco_json, args.images_dir))
    names = None
    if args.classes is not None:
        names = [name.strip() for name in args.classes.split(",")]
        if not all(names) or len(set(names)) < len(names):
            found = f"expected --classes as names that differ, found {args.classes!r}"
            raise DatasetError(f'{found}; write them as "person,car"')
    return read_yolo(args.yolo_dir, args.split, names)


def skip_missing(source: CocoSplit) -> CocoSplit:
    """Returns the records without the images that are not on disk, and reports those.

    An image of which the file alone, without the sub-folder that the JSON names, lies in the images
    folder is found there, unless two images would then be one.
    """
    bare = Counter(PurePosixPath(image["file_name"]).name for image in source.images)
    kept, missing = [], []
    for image in source.images:
        name = PurePosixPath(image["file_name"]).name
        if source.image_path(image).is_file():
            kept.append(image)
        elif bare[name] == 1 and (source.images_dir / name).is_file():
            kept.append(image | {"file_name": name})
        else:
            missing.append(image)
    if not kept:
        first = source.image_path(source.images[0])
        raise DatasetError(
            f"expected the images of {source.annotations_file} in {source.images_dir}, found none "
            f"of {len(missing)} (the first would be {first}); check --images_dir"
        )
    if missing:
        objects = sum(len(source.annotations[image["id"]]) for image in missing)
        names = ", ".join(image["file_name"] for image in missing[:NAMES_LISTED])
        logger.warning(
            "skipped %d of %d images, which are not in %s, and their %d objects: %s%s",
            len(missing),
            len(source.images),
            source.images_dir,
            objects,
            names,
            ", ..." if len(missing) > NAMES_LISTED else "",
        )
    annotations = {image["id"]: source.annotations[image["id"]] for image in kept}
    return dataclasses.replace(source, images=kept, annotations=annotations)


def read_prompts(text: str | None, source: CocoSplit) -> dict[str, str]:
    """Returns the source's prompts, with those of `--prompts` (JSON, or a file of it) over them."""
    if text is None:
        return source.prompts
    inline = text.lstrip().startswith("{")
    if not inline and not Path(text).is_file():
        found = f"expected --prompts as JSON or as a file of it, found {text!r}, neither"
        raise DatasetError(f'{found}; write {{"name": "phrase"}}')
    try:
        given = json.loads(text if inline else Path(text).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        found = f'expected --prompts as JSON, {{"name": "phrase"}}, found {text!r} ({error})'
        raise DatasetError(f"{found}; correct it") from error
    check_prompts(given, source.categories.values())
    return source.prompts | given


def convert(args: argparse.Namespace) -> None:
    """Reads the source, writes the split and prints what it holds."""
    source = read_source(args)
    source = dataclasses.replace(source, prompts=read_prompts(args.prompts, source))
    write_and_report({args.split: source}, args)
    logger.info(
        "check it with: python prepare_data.py validate --data_dir %s --split %s",
        args.output_dir,
        args.split,
    )


def write_and_report(splits: Mapping[str, CocoSplit], args: argparse.Namespace) -> None:
    """Writes splits and prints what each holds."""
    folders = write_splits(args.output_dir, splits, overwrite=args.overwrite, link=args.link)
    for folder, split in zip(folders, splits.values(), strict=True):
        sys.stdout.write(f"{folder}\n{summary(split)}")


def read_fractions(text: str) -> dict[str, float]:
    """Returns the fraction of each split of `--fractions 0.8,0.1,0.1`, without those of 0."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 3 or not min(values) >= 0 or not math.isclose(sum(values), 1, abs_tol=1e-6):
        found = f"expected --fractions for train,val,test, from 0 and with sum 1, found {text!r}"
        raise DatasetError(f"{found}; write such as 0.8,0.1,0.1")
    pairs = zip(("train", "val", "test"), values, strict=True)
    return {name: value for name, value in pairs if value > 0}


def divide_names(
    labels: Mapping[str, Collection[int]], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Divides names so that each label's share in a split is near the split's fraction.

    Iterative stratification: the names of the rarest label first, each to the split that lacks most
    of that label, of equal ones to that which lacks most names. Source: Sechidis, Tsoumakas and
    Vlahavas, On the Stratification of Multi-Label Data (2011), algorithm 1.

    Args:
        labels: Name -> its labels; their order does not matter.
        fractions: Split -> fraction of the names, above 0.
        seed: Of the order in which the names of a label are taken.

    Returns:
        Name -> split, for every name.
    """
    names = sorted(labels)
    random.Random(seed).shuffle(names)
    count = Counter(label for name in names for label in set(labels[name]))
    # Of each label, and under None of all names: how many a split still lacks.
    count[None] = len(names)
    lacks = {s: {key: f * number for key, number in count.items()} for s, f in fractions.items()}
    chosen: dict[str, str] = {}
    while left := [name for name in names if name not in chosen]:
        number = Counter(label for name in left for label in set(labels[name]))
        rarest = min(number, key=lambda label: (number[label], label), default=None)
        for name in left:
            if rarest is None or rarest in labels[name]:
                chosen[name] = max(fractions, key=lambda s: (lacks[s][rarest], lacks[s][None]))
                for key in {None, *labels[name]}:
                    lacks[chosen[name]][key] -= 1
    return chosen


def divide_split(args: argparse.Namespace) -> None:
    """Divides an annotated split by image, and writes all parts or none."""
    fractions = read_fractions(args.fractions)
    source = read_split(args.data_dir)
    labels: dict[str, set[int]] = {}
    for image in source.images:
        found = (item["category_id"] for item in source.annotations[image["id"]])
        labels.setdefault(image["file_name"], set()).update(found)
    chosen = divide_names(labels, fractions, args.seed)
    empty = sorted(set(fractions) - set(chosen.values()))
    if empty:
        found = f"expected an image for each split, found none of {len(labels)} for {empty[0]}"
        raise DatasetError(f"{found}; raise its part of --fractions {args.fractions}, or make it 0")
    parts = {}
    for split in fractions:
        images = [image for image in source.images if chosen[image["file_name"]] == split]
        annotations = {image["id"]: source.annotations[image["id"]] for image in images}
        parts[split] = dataclasses.replace(source, images=images, annotations=annotations)
    write_and_report(parts, args)


def summary(split: CocoSplit) -> str:
    """Returns the counts of a split, a line for the whole and one for each category.

    Categories without an object share one line where there are many.
    """
    objects = [item for items in split.annotations.values() for item in items]
    empty = sum(not items for items in split.annotations.values())
    masks = sum(item["segmentation"] is not None for item in objects)
    crowds = sum(item["iscrowd"] for item in objects)
    count = Counter(item["category_id"] for item in objects)
    lines = [
        f"images      {len(split.images)} ({empty} without an object)",
        f"objects     {len(objects)} ({masks} with a mask, {crowds} crowds)",
        f"categories  {len(split.categories)}",
    ]
    absent = sum(category_id not in count for category_id in split.categories)
    for category_id, name in split.categories.items():
        if absent > EMPTY_LISTED and category_id not in count:
            continue
        phrase = split.phrase(category_id)
        prompt = "" if phrase == name else f'  prompted as "{phrase}"'
        lines.append(f"  {count[category_id]:7d}  {name}{prompt}")
    if absent > EMPTY_LISTED:
        lines.append(f"  {absent} categories without an object")
    return "\n".join(lines) + "\n"


def fault_report(faults: list[Fault]) -> str:
    """Returns the faults, errors first, the first few of each kind, and their total."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: fault.level):
        groups.setdefault((fault.level, fault.kind), []).append(fault)
    lines = []
    for (level, kind), group in groups.items():
        lines.append(f"{level}: {kind} ({len(group)})")
        lines.extend(f"  {fault}" for fault in group[:FAULTS_LISTED])
        if len(group) > FAULTS_LISTED:
            lines.append(f"  ... and {len(group) - FAULTS_LISTED} more")
    errors = sum(fault.level == "error" for fault in faults)
    lines.append(f"errors {errors}, warnings {len(faults) - errors}")
    return "\n".join(lines) + "\n"


def validate(data_dir: Path, split: str) -> int:
    """Prints the summary and the faults of a split; returns 2 if one is an error, else 0."""
    annotations_file, images_dir = find_split(split_dir(data_dir, split))
    faults = find_faults(annotations_file, images_dir)
    sys.stdout.write(f"{annotations_file}\n")
    if not any(fault.fatal for fault in faults):
        sys.stdout.write(summary(read_coco(annotations_file, images_dir)))
    sys.stdout.write(fault_report(faults))
    return 2 if any(fault.level == "error" for fault in faults) else 0


@user_errors(DatasetError, ConfigError)
def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code."""
    args = build_parser().parse_args(argv)
    setup_logging(None, logging.INFO)
    if args.command == "create":
        create_folders(args.output_dir)
    elif args.command == "demo":
        write_demo(args.output_dir, args.task, args.seed, args.overwrite)
    elif args.command == "validate":
        return validate(args.data_dir, args.split)
    elif args.command == "split":
        divide_split(args)
    else:
        convert(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
