r"""Brings annotated images into the one layout that training reads, and checks it.

    python prepare_data.py create --output_dir data
    python prepare_data.py coco --coco_json annotations.json \
        --images_dir images/ --output_dir data --split train
    python prepare_data.py yolo --yolo_dir exported --split train
    python prepare_data.py split --data_dir data/all --fractions 0.8,0.1,0.1
    python prepare_data.py validate --data_dir data --split train
    python prepare_data.py demo --output_dir data/demo

Also `voc`, `labelme` and `via`, for those formats, and `masks`, for masks that are image files;
`prepare_data.py via --help` lists the flags of one.

Outputs: `<output_dir>/<split>/annotations.json` (COCO) and `<output_dir>/<split>/images/`, copies
of the images or, with `--link`, hard links; data/README.md describes both. A split is written whole
or not at all, and left as it is where it already holds the same. `validate` prints a summary and
the faults, and exits with 2 if one of them is an error; it leaves the split as it is: `--fix DIR`
writes a mended copy, `--preview PNG` a picture.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import sam3_lora.startup  # noqa: F401  # isort: skip

from sam3_lora.coco import CocoSplit, DatasetError, read_coco, read_split, write_splits
from sam3_lora.config import ConfigError, setup_logging, user_errors
from sam3_lora.faults import check_prompts, find_faults
from sam3_lora.files import write_picture
from sam3_lora.flags import FlagParser
from sam3_lora.formats import read_labelme, read_via, read_voc, read_yolo
from sam3_lora.geometry import shown
from sam3_lora.images import UNSAFE, listed
from sam3_lora.layout import find_split, parse_json, sibling_val, split_dir
from sam3_lora.mask_images import KINDS, read_masks
from sam3_lora.overview import divide_names, fault_report, json_report, preview, summary
from sam3_lora.repair import mend_split
from sam3_lora.scenes import IMAGES, TASKS, demo_split, write_scenes
from sam3_lora.shapes import check_class, files_in, report_missing

logger = logging.getLogger("prepare_data")

SEED_DIGITS = 18
SPLITS = ("train", "val", "valid", "test")
SEARCHED = ("yolo_dir", "voc_dir", "labelme_dir", "masks_dir")  # flags of folders read as a whole
SOURCES = (*SEARCHED, "coco_json", "via_json", "images_dir")
OUTPUT_FLAGS: dict[str, dict[str, Any]] = {
    "output_dir": {"type": Path, "default": Path("data"), "metavar": "DIR", "help": "data folder"},
    "split": {"choices": SPLITS, "default": "train", "help": "which split of it"},
    "prompts": {
        "metavar": "JSON",
        "help": 'phrases for category names, {"name": "phrase"}, or a file that holds them',
    },
    "link": {"action": "store_true", "help": "hard-link images instead of copying"},
    "overwrite": {"action": "store_true", "help": "replace a split that has files"},
}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line, one subcommand an operation."""
    parser = FlagParser(__doc__)
    words = {"title": "commands", "metavar": "COMMAND", "help": "its --help lists its flags"}
    commands = parser.add_subparsers(dest="command", required=True, **words)
    create = add_command(commands, "create", "make the empty folders")
    add_output(create, "output_dir")
    # fmt: off
    add, coco = add_reader(commands, "coco", "convert COCO or Roboflow COCO")
    add("--coco_json", type=Path, required=True, metavar="FILE", help="annotation file")
    add("--images_dir", type=Path, required=True, metavar="DIR", help="folder of its images")
    add("--classes", metavar="NAMES", help='categories in order as "person,car"; else the file\'s')
    add_output(coco, *OUTPUT_FLAGS)
    add, yolo = add_reader(commands, "yolo", "convert YOLO boxes or polygons")
    add("--yolo_dir", type=Path, required=True, metavar="DIR",
        help="folder of images/ and labels/, best with data.yaml")
    add("--classes", metavar="NAMES",
        help='names of class 0, 1, ... as "person,car"; else data.yaml\'s')
    add_output(yolo, *OUTPUT_FLAGS)
    add_labelling_tools(commands)
    add_masks_parser(commands)
    add, divide = add_reader(commands, "split", "divide a split by image")
    add("--data_dir", type=Path, required=True, metavar="DIR",
        help="the split to divide: a folder with annotations.json and images/")
    add("--fractions", default="0.8,0.1,0.1", metavar="A,B,C",
        help="of the images for train,val,test; 0 leaves one out")
    add("--seed", type=parse_seed, default=0, metavar="INT", help="of the draw")
    add_output(divide, "output_dir", "link", "overwrite")
    demo = add_command(commands, "demo", "a drawn data set, for a first try")
    add = demo.add_argument_group("what to draw").add_argument
    add("--task", choices=TASKS, default="parts",
        help="parts: defects on metal, new to the demo model; shapes: what it knows")
    add("--seed", type=parse_seed, default=0, metavar="INT", help="of the drawings")
    add_output(demo, "output_dir", "overwrite")
    # fmt: on
    add_validate_parser(commands)
    return parser


def add_command(commands: argparse._SubParsersAction, name: str, purpose: str) -> FlagParser:
    """Adds a subcommand, whose help says what it is for, and where that of the others is."""
    about = f"{purpose[0].upper()}{purpose[1:]}; prepare_data.py --help shows examples."
    return commands.add_parser(name, help=purpose, description=about)


def add_reader(
    commands: argparse._SubParsersAction, name: str, purpose: str
) -> tuple[Callable[..., argparse.Action], FlagParser]:
    """Adds a subcommand that reads data; returns what adds a flag of its input, and its parser."""
    parser = add_command(commands, name, purpose)
    return parser.add_argument_group("what to read").add_argument, parser


def add_output(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds those of `OUTPUT_FLAGS`."""
    add = parser.add_argument_group("what to write").add_argument
    for name in names:
        add(f"--{name}", **OUTPUT_FLAGS[name])


def add_validate_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand `validate`."""
    add, parser = add_reader(commands, "validate", "check a split")
    # fmt: off
    add("--data_dir", type=Path, default=Path("data"), metavar="DIR",
        help="data folder, which holds the split")
    add("--split", choices=SPLITS, default="train", help="which split of it")
    add("--model_name", metavar="DIR", help="count the tokens of prompts with its tokenizer")
    add = parser.add_argument_group("what to write").add_argument
    add("--json", action="store_true", help="print the report as JSON")
    add("--fix", type=Path, metavar="DIR", help="write a mended copy to this data folder")
    add("--preview", type=Path, metavar="PNG", help="draw images, with --fix of the copy")
    # fmt: on


def add_masks_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand `masks`."""
    add, parser = add_reader(commands, "masks", "convert masks that are image files")
    # fmt: off
    add("--images_dir", type=Path, required=True, metavar="DIR", help="folder of the photos")
    add("--masks_dir", type=Path, required=True, metavar="DIR", help="folder of the masks")
    add("--classes", metavar="NAMES",
        help='names of value 1, 2, ... as "road,car", or JSON, or a file of it: {"7": "road"} by '
        'value, {"road": "#804080"} or {"road": [128, 64, 128]} by colour')
    add("--kind", choices=KINDS,
        help="index: a value is a class; colour: a colour is a class; instance: a value is an "
        "object; object: a file is an object (default: index or colour where --classes has "
        "several names)")
    add("--pattern", default="{stem}",
        help='mask file of photo {stem}.jpg, such as "{stem}_mask.png", or photo and mask, such '
        'as "img{stem}:mask{stem}"')
    add("--whole", action="store_true",
        help="index, colour: all pixels of a class are one object, else each connected part is")
    add("--min_pixels", type=int, default=1, metavar="INT",
        help="index, colour: connected parts of fewer are left out")
    add("--void", metavar="VALUES",
        help='values or colours that are no class, as "255,0" (default: 255 of kind index)')
    # fmt: on
    add_output(parser, *OUTPUT_FLAGS)


def parse_seed(text: str) -> int:
    """Returns the value of --seed."""
    if not text.isdecimal() or len(text) > SEED_DIGITS:
        expected = f"expected a whole number from 0, of {SEED_DIGITS} digits at most"
        raise argparse.ArgumentTypeError(f"{expected}, found {shown(text)}")
    return int(text)


def add_labelling_tools(commands: argparse._SubParsersAction) -> None:
    """Adds the commands of formats that name the class of each object."""
    names = 'categories in order as "person,car"; else those of the objects, sorted by name'
    # fmt: off
    add, voc = add_reader(commands, "voc", "convert Pascal VOC boxes")
    add("--voc_dir", type=Path, required=True, metavar="DIR",
        help="folder of Annotations/ and JPEGImages/, or of XML files beside their images")
    add("--classes", metavar="NAMES", help=names)
    add_output(voc, *OUTPUT_FLAGS)
    add, labelme = add_reader(commands, "labelme", "convert LabelMe shapes")
    add("--labelme_dir", type=Path, required=True, metavar="DIR",
        help="folder of JSON files beside their images")
    add("--classes", metavar="NAMES", help=names)
    add_output(labelme, *OUTPUT_FLAGS)
    add, via = add_reader(commands, "via", "convert VGG Image Annotator 1 or 2")
    add("--via_json", type=Path, required=True, metavar="FILE", help="export or project")
    add("--images_dir", type=Path, required=True, metavar="DIR", help="folder of its images")
    add("--class_attribute", metavar="NAME",
        help="region attribute of the class; else the only one")
    add("--classes", metavar="NAMES", help=names)
    add_output(via, *OUTPUT_FLAGS)
    # fmt: on


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
        source = skip_missing(read_coco(args.coco_json, args.images_dir))
        return order_categories(source, class_names(args.classes))
    if args.command == "masks":
        return read_masks(
            args.images_dir,
            args.masks_dir,
            mask_classes(args.classes),
            args.kind,
            whole=args.whole,
            min_pixels=args.min_pixels,
            pattern=args.pattern,
            void=None if args.void is None else [v.strip() for v in args.void.split(",")],
        )
    names = class_names(args.classes)
    if args.command == "voc":
        return read_voc(args.voc_dir, args.split, names)
    if args.command == "labelme":
        return read_labelme(args.labelme_dir, names)
    if args.command == "via":
        return read_via(args.via_json, args.images_dir, names, args.class_attribute)
    return read_yolo(args.yolo_dir, args.split, names)


def class_names(text: str | None) -> list[str] | None:
    """Returns the names of `--classes "person,car"`; None without the flag."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names) or UNSAFE.search(text):
        found = f"expected --classes as names that differ, found {shown(text)}"
        raise DatasetError(f'{found}; write them as "person,car"')
    return names


def mask_classes(text: str | None) -> list[str] | dict[str, Any] | None:
    """Returns the names of `--classes`, or its table, as JSON or a file of it."""
    if not text or not (text.lstrip().startswith("{") or os.path.isfile(text)):
        return class_names(text)
    table = read_json("--classes", text, '{"7": "road"}')
    if not isinstance(table, dict):
        found = f"expected --classes as a JSON object, found {type(table).__name__}"
        raise DatasetError(f'{found}; write {{"7": "road"}} or {{"road": "#804080"}}')
    return table


def order_categories(source: CocoSplit, names: list[str] | None) -> CocoSplit:
    """Returns the records with just the categories of `--classes`, in that order; None keeps all.

    Raises:
        DatasetError: An object is of another category.
    """
    if names is None:
        return source
    number = {name: index for index, name in enumerate(names, start=1)}
    annotations = {}
    for image in source.images:
        annotations[image["id"]] = rows = []
        for item in source.annotations[image["id"]]:
            name = source.categories[item["category_id"]]
            check_class(name, number, f"{source.annotations_file}, {image['file_name']}")
            rows.append(item | {"category_id": number[name]})
    categories = {index: name for name, index in number.items()}
    prompts = {name: phrase for name, phrase in source.prompts.items() if name in number}
    return dataclasses.replace(
        source, annotations=annotations, categories=categories, prompts=prompts
    )


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
            missing.append((image["file_name"], len(source.annotations[image["id"]])))
    report_missing(source.annotations_file, source.images_dir, len(kept), missing)
    annotations = {image["id"]: source.annotations[image["id"]] for image in kept}
    return dataclasses.replace(source, images=kept, annotations=annotations)


def read_prompts(text: str | None, source: CocoSplit) -> dict[str, str]:
    """Returns the source's prompts, with those of `--prompts` (JSON, or a file of it) over them."""
    if text is None:
        return source.prompts
    given = read_json("--prompts", text, '{"name": "phrase"}')
    check_prompts(given, source.categories.values())
    return source.prompts | given


def read_json(flag: str, text: str, form: str) -> Any:
    """Returns the value of a flag that takes JSON or a file of it; `form` is an example."""
    inline = text.lstrip().startswith("{")
    if not inline and not os.path.isfile(text):  # Path.is_file raises of a text too long
        found = f"expected {flag} as JSON or as a file of it, found {shown(text)}, neither"
        raise DatasetError(f"{found}; write {form}")
    try:
        return parse_json(text if inline else Path(text).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        found = f"expected {flag} as JSON, {form}, found {shown(text)} ({error})"
        raise DatasetError(f"{found}; correct it") from error


def convert(args: argparse.Namespace) -> None:
    """Reads the source, writes the split and prints what it holds."""
    refuse_own_source(args)
    source = read_source(args)
    source = dataclasses.replace(source, prompts=read_prompts(args.prompts, source))
    write_and_report({args.split: source}, args)
    logger.info(
        "check it with: python prepare_data.py validate --data_dir %s --split %s",
        args.output_dir,
        args.split,
    )


def check_paths(args: argparse.Namespace) -> None:
    """Raises DatasetError where a flag for a file names a folder, or one for a folder a file."""
    for flag in (*SOURCES, "output_dir", "fix"):
        path = getattr(args, flag, None)
        if path is None:
            continue
        if path.is_dir() and flag.endswith("_json"):
            names = [str(file.relative_to(path)) for file in files_in(path, {".json"})]
            remedy = f"name a .json file of it{', such as ' * bool(names)}{listed(names)}"
            remedy = f"name {path / names[0]}" if len(names) == 1 else remedy
            raise DatasetError(f"expected a file at --{flag} {path}, found a folder; {remedy}")
        if path.is_file() and not flag.endswith("_json"):
            remedy = f"name its folder {path.parent}" if flag in SOURCES else "name a folder"
            raise DatasetError(f"expected a folder at --{flag} {path}, found a file; {remedy}")


def refuse_own_source(args: argparse.Namespace) -> None:
    """Raises DatasetError where the split would replace its source, or be part of it."""
    target = split_dir(args.output_dir, args.split).resolve()
    for flag in SOURCES:
        source = getattr(args, flag, None) and getattr(args, flag).resolve()
        inside = source and source.is_relative_to(target)
        if inside or (source and flag in SEARCHED and target.is_relative_to(source)):
            found = f"expected the split apart from --{flag} {source}, found {target}"
            raise DatasetError(f"{found}; name another --output_dir")


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
        wanted = "expected --fractions for train,val,test, from 0 and with sum 1"
        raise DatasetError(f"{wanted}, found {shown(text)}; write such as 0.8,0.1,0.1")
    pairs = zip(("train", "val", "test"), values, strict=True)
    return {name: value for name, value in pairs if value > 0}


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
    for split in ("train", "val", "test"):
        stays = split_dir(args.output_dir, split)
        if split not in fractions and stays.exists():
            logger.warning("%s stays as it is: its photos may be in the new splits too", stays)
    parts = {}
    for split in fractions:
        images = [image for image in source.images if chosen[image["file_name"]] == split]
        annotations = {image["id"]: source.annotations[image["id"]] for image in images}
        parts[split] = dataclasses.replace(source, images=images, annotations=annotations)
    write_and_report(parts, args)


def validate(args: argparse.Namespace) -> int:
    """Prints the summary and the faults of a split, mends a copy of it and draws it, as asked.

    Returns:
        2 if the split, or with `--fix` its copy, has an error, else 0.
    """
    annotations_file, images_dir = find_split(split_dir(args.data_dir, args.split))
    check_preview(args.preview, args.data_dir)
    count_tokens = token_counter(args.model_name)
    faults = find_faults(annotations_file, images_dir, count_tokens)
    fatal = any(fault.fatal for fault in faults)
    split = None if fatal else read_coco(annotations_file, images_dir, checked=True)
    report = json_report(annotations_file, split, faults)
    if not args.json:
        counts = "" if split is None else summary(split)
        sys.stdout.write(f"{annotations_file}\n{counts}{fault_report(faults)}")
    if args.fix is not None:
        folder, done = mend_split(annotations_file, images_dir, faults, args.fix, args.split)
        faults, split = find_faults(*find_split(folder), count_tokens), read_split(folder)
        report["mended"] = {"done": done, **json_report(split.annotations_file, split, faults)}
        if not args.json:
            lines = [f"{count:7d}  {words}\n" for words, count in done.items()]
            sys.stdout.write(f"\nmended copy {folder}\n{''.join(lines)}{fault_report(faults)}")
        if folder.name == "train" and (val := sibling_val(annotations_file.parent)):
            paths = f"--train_data_path {folder} --val_data_path {val}"
            logger.info("train on it with: python train_sam3_lora.py %s", paths)
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    if args.preview is not None:
        if split is None:
            reason = "its annotations cannot be read: mend the errors above first"
            raise DatasetError(f"expected a split to draw in {annotations_file}, {reason}")
        write_picture(args.preview, preview(split, faults))
        logger.info("preview: %s", args.preview)
    return 2 if any(fault.level == "error" for fault in faults) else 0


def check_preview(path: Path | None, data_dir: Path) -> None:
    """Raises ConfigError unless a picture can be written there without harm to the data."""
    folders = [split_dir(data_dir, split).resolve() for split in SPLITS]
    if path is None:
        return
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ConfigError(f"--preview: expected a file name that ends in .png, found '{path}'")
    if any(path.resolve().is_relative_to(folder) for folder in folders):
        raise ConfigError(f"--preview: expected a file outside the data, found {path}; move it")


def token_counter(model_name: str | None) -> Callable[[str], int] | None:
    """Returns what counts a prompt's tokens by a model's tokenizer; None without a model."""
    if model_name is None:
        return None
    from sam3_lora.model import ModelError, load_tokenizer  # slow to import

    try:
        tokenizer = load_tokenizer(model_name)
    except ModelError as error:
        raise ConfigError(f"--model_name: {error}") from error
    return lambda phrase: len(tokenizer(phrase)["input_ids"])


@user_errors(DatasetError, ConfigError)
def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code."""
    args = build_parser().parse_args(argv)
    setup_logging(None, logging.INFO)
    check_paths(args)
    if args.command == "create":
        create_folders(args.output_dir)
    elif args.command == "demo":
        write_demo(args.output_dir, args.task, args.seed, args.overwrite)
    elif args.command == "validate":
        return validate(args)
    elif args.command == "split":
        divide_split(args)
    else:
        convert(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
