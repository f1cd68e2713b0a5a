"""Readers of annotation formats other than COCO; each returns a `CocoSplit` for `write_splits`.

YOLO labels are one text file an image, one object a line, in fractions of the image's sides:

    class cx cy w h                      5 numbers: a box
    class x1 y1 x2 y2 x3 y3 ...          7 or more, an odd count: a polygon

and one number more is a confidence, which is dropped. A label file that is empty or absent is an
image without an object, a negative.

Pascal VOC (XML, boxes), LabelMe and VIA (JSON, shapes) name the class of each object. Images come
in the order of their names, objects in that of their file; see `shapes.py` for what becomes of
them. An image without an annotation file is left out, with a warning: it may hold objects.
"""

import logging
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree.ElementTree import Element

import yaml

from sam3_lora import shapes
from sam3_lora.coco import CocoSplit, DatasetError
from sam3_lora.faults import clean_name
from sam3_lora.images import image_size, listed
from sam3_lora.layout import are_keypoints, other_reader
from sam3_lora.shapes import Found, Item, Part, problem

logger = logging.getLogger(__name__)

# Fractions may pass 0 and 1 by this much, rounding of the tools; they are clipped.
FRACTION_TOLERANCE = 0.01
BOX_NUMBERS = 5  # class cx cy w h
POLYGON_NUMBERS = 7  # class and three points
NO_KEYPOINTS = "export boxes or polygons; the first 5 numbers of each line are a box"
NO_OBJECTS = ("point", "points", "line", "linestrip")  # of LabelMe
VIA_FIELDS = ("shape_attributes", "region_attributes")


def read_yolo(yolo_dir: Path, split: str, class_names: list[str] | None = None) -> CocoSplit:
    """Reads one split of a YOLO data set, boxes and polygons.

    Args:
        yolo_dir: Holds `images/<split>` and `labels/<split>`, or `<split>/images` and
            `<split>/labels`, or `images` and `labels` for a set of one split; else its data.yaml
            says where the images are.
        split: `train`, `val` (found as `valid` too) or `test`.
        class_names: Name of class 0, 1, ...; None takes the names of data.yaml.

    Returns:
        Every image, with or without objects. A category's id is its class plus 1. A box has no
        segmentation; a polygon's box is that of its points.

    Raises:
        DatasetError: No images or labels, keypoints, no names, names that differ from those of
            data.yaml, a line that is not a label. It names the file and the line.
    """
    yolo_dir = Path(yolo_dir)
    description_file, description = _read_data_yaml(yolo_dir)
    if "kpt_shape" in description:
        raise problem(description_file, "labels of boxes or polygons", "kpt_shape", NO_KEYPOINTS)
    names = _class_names(description, description_file, class_names, yolo_dir)
    images_dir, labels_dir = _yolo_folders(yolo_dir, split, description)
    label_files = {
        path: (labels_dir / path.relative_to(images_dir)).with_suffix(".txt")
        for path in shapes.images_in(images_dir)
    }
    _check_labels(label_files, images_dir, labels_dir)
    texts = (shapes.read_text(file) for file in label_files.values() if file.is_file())
    if are_keypoints(line for text in texts for line in text.splitlines()):
        found = "keypoints, x y v after each box"
        raise problem(labels_dir, "labels of boxes or polygons", found, NO_KEYPOINTS)
    records = {}
    for path, label_file in label_files.items():
        size = image_size(path)
        records[path] = size, _read_labels(label_file, names, *size) if label_file.is_file() else []
    categories = {class_index + 1: name for class_index, name in names.items()}
    return shapes.split_of(description_file or labels_dir, images_dir, records, categories)


def _twins(split: str) -> tuple[str, ...]:
    """The names that a split may have on disk, its own first."""
    return {"val": ("val", "valid"), "valid": ("valid", "val")}.get(split, (split,))


def _read_data_yaml(yolo_dir: Path) -> tuple[Path | None, dict[str, Any]]:
    """The data set's description, `data.yaml` or the only YAML with names; (None, {}) without."""
    if not yolo_dir.is_dir():
        raise DatasetError(f"expected the YOLO folder {yolo_dir}, found none; check --yolo_dir")
    found = {}
    for path in sorted([*yolo_dir.glob("*.yaml"), *yolo_dir.glob("*.yml")]):
        if path.name.startswith("._"):
            continue
        try:
            # The user's file, not one of our configs, which only config.py reads.
            content = yaml.safe_load(shapes.read_text(path))
        except (yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise DatasetError(f"expected YAML in {path}, found {reason}; correct it") from error
        if isinstance(content, dict) and "names" in content:
            found[path] = content
    chosen = [path for path in found if path.stem == "data"] or list(found)
    if len(chosen) > 1:
        names = listed([path.name for path in chosen])
        raise DatasetError(f"expected one data.yaml in {yolo_dir}, found {names}; keep one")
    return (chosen[0], found[chosen[0]]) if chosen else (None, {})


def _class_names(
    description: dict[str, Any], file: Path | None, given: list[str] | None, yolo_dir: Path
) -> dict[int, str]:
    """Class index -> name, from data.yaml or --classes, which must agree where both exist."""
    wanted = dict(enumerate(given)) if given else {}
    if file is None:
        if not wanted:
            found = f"expected class names for {yolo_dir}, found no data.yaml with names"
            raise DatasetError(f'{found}; pass --classes "first,second"')
        return wanted
    names = description["names"]
    if not isinstance(names, (list, dict)) or not names:
        found = f"expected names in {file}, found {names!r}"
        raise DatasetError(f"{found}; write a list of class names")
    table = {}
    for key, name in (dict(enumerate(names)) if isinstance(names, list) else names).items():
        is_name = type(name) in (str, int, float) and str(name).strip()
        if not str(key).isdecimal() or not is_name:
            # Not its repr: aliases in YAML make a value of a few lines as long as one likes.
            found = f"expected names in {file} as class: name, found {key!r}: {reprlib.repr(name)}"
            raise DatasetError(f"{found}; write a list, or 0: name, with quotes round yes and no")
        table[int(key)] = str(name).strip()
    if wanted and wanted != table:
        found = f"found {list(wanted.values())} and {table}"
        raise DatasetError(
            f"expected --classes to agree with {file}, {found}; leave --classes out "
            "(--prompts changes what a class is prompted with)"
        )
    return table


def _yolo_folders(yolo_dir: Path, split: str, description: dict) -> tuple[Path, Path]:
    """The folders of a split's images and labels, in the layouts that `read_yolo` lists."""
    pairs = []
    for name in _twins(split):
        pairs.append((yolo_dir / "images" / name, yolo_dir / "labels" / name))
        pairs.append((yolo_dir / name / "images", yolo_dir / name / "labels"))
    for name in _twins(split):
        pairs.extend(_described_folders(yolo_dir, description.get(name), description.get("path")))
    flat = yolo_dir / "images"
    if flat.is_dir() and not any(child.is_dir() for child in flat.iterdir()):
        pairs.append((flat, yolo_dir / "labels"))
    for images_dir, labels_dir in pairs:
        if os.path.isdir(images_dir) and shapes.images_in(images_dir):  # else raises if too long
            return images_dir, labels_dir
    looked = ", ".join(
        dict.fromkeys(str(images_dir) for images_dir, _ in pairs if images_dir != flat)
    )
    looked += f", or {flat} without folders in it, with {yolo_dir / 'labels'}"
    found = f"expected images of split {split!r} in one of {looked}, found none"
    raise DatasetError(f"{found}; check --yolo_dir and --split")


def _described_folders(yolo_dir: Path, entry: Any, root: Any) -> list[tuple[Path, Path]]:
    """Where data.yaml's `train: ../train/images` may lie: such paths are often off by a folder."""
    if not isinstance(entry, str):
        return []
    parts = [part for part in PureWindowsPath(entry).parts if part not in (".", "..")]
    tails = [Path(*parts[start:]) for start in range(len(parts))]
    roots = [yolo_dir / root] if isinstance(root, str) else []
    pairs = []
    # As written only if absolute: a path would else be taken from where the command is run.
    given = [Path(entry)] if Path(entry).is_absolute() else []
    for images_dir in [*given, *(base / t for base in [*roots, yolo_dir] for t in tails)]:
        # The labels are where the last `images` of the path reads `labels`.
        names = list(images_dir.parts)
        if "images" in names:
            names[len(names) - 1 - names[::-1].index("images")] = "labels"
            pairs.append((images_dir, Path(*names)))
    return pairs


def _check_labels(label_files: dict[Path, Path], images_dir: Path, labels_dir: Path) -> None:
    """Refuses a split none of whose images has a label file; reports labels without an image."""
    found = {path for path in labels_dir.rglob("*.txt") if not path.name.startswith(".")}
    if not any(path in found for path in label_files.values()):
        message = f"expected label files in {labels_dir}, one .txt an image of {images_dir}"
        raise DatasetError(f"{message}, found none for {len(label_files)} images; check --yolo_dir")
    orphans = sorted(found - set(label_files.values()) - {labels_dir / "classes.txt"})
    if orphans:
        names = listed([path.name for path in orphans])
        logger.warning("skipped %d label files without an image: %s", len(orphans), names)


def _read_labels(file: Path, names: dict[int, str], width: int, height: int) -> list[dict]:
    """The objects of one label file, without ids."""
    objects = []
    for line_number, line in enumerate(shapes.read_text(file).splitlines(), start=1):
        if line.strip():
            where = f"{file}:{line_number}"
            class_index, part = _read_label(line, where, names, width, height)
            item = shapes.geometry([part], width, height, where)
            objects.append({"category_id": class_index + 1} | item)
    return objects


def _read_label(
    line: str, where: str, names: dict[int, str], width: int, height: int
) -> tuple[int, Part]:
    """The class and the part of one line of a label file."""
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        numbers = []
    if len(numbers) < BOX_NUMBERS or not all(map(math.isfinite, numbers)):
        expected = "a label, class cx cy w h or class x1 y1 x2 y2 x3 y3"
        raise problem(where, expected, repr(line[:60]), "correct the line")
    class_index, fractions = numbers[0], numbers[1:]
    if class_index not in names:
        remedy = "add its name to data.yaml or --classes"
        raise problem(where, f"a class of {sorted(names)}", f"{class_index:g}", remedy)
    if len(numbers) >= POLYGON_NUMBERS - 1 and len(numbers) % 2 == 0:
        fractions = fractions[:-1]  # a confidence
    if min(fractions) < -FRACTION_TOLERANCE or max(fractions) > 1 + FRACTION_TOLERANCE:
        worst = f"{max(fractions, key=lambda value: abs(value - 0.5)):g}"
        remedy = "divide pixels by the width or height"
        raise problem(where, "fractions of the image's sides, 0 to 1", worst, remedy)
    is_box = len(fractions) == BOX_NUMBERS - 1
    if is_box:
        cx, cy, w, h = fractions
        if min(w, h) <= 0:
            expected = "an object with width and height > 0"
            raise problem(where, expected, repr(line[:60]), "remove the line")
        fractions = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    pixels = [min(max(value, 0.0), 1.0) for value in fractions]
    xs, ys = ([f * side for f in pixels[i::2]] for i, side in enumerate((width, height)))
    if is_box:
        return int(class_index), shapes.box(xs[0], ys[0], xs[1], ys[1])
    return int(class_index), ("polygon", list(zip(xs, ys, strict=True)))


def read_voc(voc_dir: Path, split: str, class_names: list[str] | None = None) -> CocoSplit:
    """Reads one split of a Pascal VOC data set: boxes.

    VOC counts pixels from 1 and includes both ends, so that xmin..xmax is xmin - 1 to xmax here.
    Files of tools that count from 0 look the same; their boxes come out a pixel larger at the left
    and top. The other reading would lose objects: a box of one pixel has xmin = xmax.

    Args:
        voc_dir: Holds `Annotations` and `JPEGImages`, or XML files with the images beside them.
        split: Read from `ImageSets/Main/<split>.txt`, or from every XML file if no split has one.
        class_names: The categories in order; None takes those of the objects, sorted.

    Returns:
        The images that are on disk. Objects marked difficult are kept.

    Raises:
        DatasetError: What cannot be read, by file and object; an object of another class.
    """
    voc_dir = Path(voc_dir)
    xml_dir, images_dir = voc_dir / "Annotations", voc_dir / "JPEGImages"
    xml_dir = xml_dir if xml_dir.is_dir() else voc_dir
    images_dir = images_dir if images_dir.is_dir() else xml_dir
    files = shapes.annotation_files(xml_dir, ".xml", "--voc_dir")
    chosen, images = _voc_listed(files, voc_dir, xml_dir, split), shapes.images_in(images_dir)
    items = _voc_items(chosen, xml_dir, images_dir, shapes.by_stem(images))
    expected = images if len(chosen) == len(files) else ()
    return shapes.assemble(xml_dir, images_dir, items, class_names, expected)


def _voc_listed(files: list[Path], voc_dir: Path, xml_dir: Path, split: str) -> list[Path]:
    """The files that the list of a split names; all of them where no split has a list."""
    folder = voc_dir / "ImageSets" / "Main"
    lists = [
        name for name in ("train", "val", "valid", "test") if (folder / f"{name}.txt").exists()
    ]
    chosen = next((folder / f"{name}.txt" for name in _twins(split) if name in lists), None)
    if chosen is None and lists:
        expected, found = f"ImageSets/Main/{split}.txt", f"lists of {', '.join(lists)}"
        raise problem(voc_dir, expected, found, "add the list or choose another --split")
    if chosen is None:
        return files
    known, stems = set(files), shapes.read_text(chosen).split("\n")
    named = [xml_dir / f"{stem.strip()}.xml" for stem in stems if stem.strip()]
    for file in named:
        if file not in known:
            expected = f"names of files in {xml_dir}"
            raise problem(chosen, expected, repr(file.stem), "remove the line or add the file")
    if not named:
        raise problem(chosen, "names of images, one a line", "none", "choose another --split")
    return sorted(set(named))


def _voc_items(
    files: list[Path], xml_dir: Path, images_dir: Path, by_stem: dict[Path, list[Path]]
) -> Iterator[Item]:
    """The images and objects of VOC files."""
    for file in files:
        root = shapes.read_xml(file)
        if root.tag != "annotation":
            raise problem(file, "<annotation> of Pascal VOC", f"<{root.tag}>", "move the file away")
        raw = (root.findtext("filename") or "").strip()
        name = clean_name(raw) if raw else file.stem
        if name is None:
            expected = f"a file name inside {images_dir}"
            raise problem(file, expected, repr(raw), "write the name without folders")
        path = shapes.image_of(by_stem, images_dir / file.relative_to(xml_dir).parent, name, file)
        sides = [root.findtext(f"size/{side}") or "0" for side in ("width", "height")]
        told = tuple(int(side[:9]) if side.isdecimal() else 0 for side in sides)
        objects = []
        for number, item in enumerate(root.findall("object"), start=1):
            where = f"{file}, object {number}"
            label = shapes.class_name(item.findtext("name"), where)
            objects.append((label, [_voc_part(item, where)], where))
        yield file, path, name, told if all(told) else None, objects


def _voc_part(item: Element, where: str) -> Part:
    """The box of a VOC object."""
    bounds, remedy = item.find("bndbox"), "correct it or remove the object"
    if bounds is None:
        raise problem(where, "a bndbox", "none", remedy)
    sides = ("xmin", "ymin", "xmax", "ymax")
    left, top, right, bottom = (
        shapes.coordinate(bounds.findtext(side), side, where) for side in sides
    )
    if right < left or bottom < top:
        found = f"{left:g}, {top:g} to {right:g}, {bottom:g}"
        raise problem(where, "xmin <= xmax and ymin <= ymax", found, remedy)
    return shapes.box(left - 1, top - 1, right, bottom)


def read_labelme(labelme_dir: Path, class_names: list[str] | None = None) -> CocoSplit:
    """Reads LabelMe files, one JSON an image, beside it: polygons, rectangles, circles, masks.

    Args:
        labelme_dir: Holds the files, sub-folders included.
        class_names: As in `read_voc`.

    Returns:
        The images that are on disk. A rectangle is a box. Shapes of one label and one `group_id`
        in a file are parts of one object. Points and lines are skipped and counted in a warning.

    Raises:
        DatasetError: As in `read_voc`; an image that is only embedded in its JSON.
    """
    folder = Path(labelme_dir)
    files = shapes.annotation_files(folder, ".json", "--labelme_dir")
    images = shapes.images_in(folder)
    items = _labelme_items(files, shapes.by_stem(images))
    return shapes.assemble(folder, folder, items, class_names, images)


def _labelme_items(files: list[Path], by_stem: dict[Path, list[Path]]) -> Iterator[Item]:
    """The images and objects of LabelMe files."""
    for file in files:
        content = shapes.read_json(file)
        rows = content.get("shapes") if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(shape, dict) for shape in rows):
            also = other_reader(file, "labelme", "")
            remedy = f"move the file away{', or ' * bool(also)}{also}"
            raise problem(file, "a list of shapes, as in LabelMe", "none", remedy)
        # The folder is that of the annotator's machine.
        name = PureWindowsPath(str(content.get("imagePath") or file.stem)).name
        path = shapes.image_of(by_stem, file.parent, name, file)
        if path is None and content.get("imageData"):
            remedy = "save imageData, an image file in base64, under that name"
            raise problem(file, f"the image {name} beside it", "it embedded", remedy)
        objects: dict[Any, Found] = {}
        for number, shape in enumerate(rows, start=1):
            where = f"{file}, shape {number}"
            kind, group = shape.get("shape_type") or "polygon", shape.get("group_id")
            if kind in NO_OBJECTS:
                objects[number] = kind, [], where
                continue
            label = shapes.class_name(shape.get("label"), where)
            part = shapes.labelme_part(kind, shape, where)
            key = number if group is None else (label, str(group))
            objects.setdefault(key, (label, [], where))[1].append(part)
        told = content.get("imageWidth"), content.get("imageHeight")
        known = all(isinstance(side, int) for side in told)
        yield file, path, name, told if known else None, list(objects.values())


def read_via(
    via_json: Path,
    images_dir: Path,
    class_names: list[str] | None = None,
    class_attribute: str | None = None,
) -> CocoSplit:
    """Reads a file of VGG Image Annotator 1 or 2, an export or a project.

    Args:
        via_json: The file.
        images_dir: Where its images are.
        class_names: As in `read_voc`; regions without attributes are of the only one.
        class_attribute: The attribute of regions that holds the class; None takes the only one.

    Returns:
        The images that are on disk. A rect is a box; a polyline is a polygon if it ends where it
        starts. Points and open polylines are skipped and counted in a warning.

    Raises:
        DatasetError: As in `read_voc`; regions of none or several attributes, or classes.
    """
    file, images_dir = Path(via_json), Path(images_dir)
    if not images_dir.is_dir():
        raise DatasetError(f"expected the folder {images_dir}, found none; check --images_dir")
    entries = _via_entries(file)
    attribute = class_attribute or _via_attribute(entries, class_names, file)
    only_class = None if attribute else (class_names or [None])[0]
    items = _via_items(entries, file, images_dir, attribute, only_class)
    return shapes.assemble(file, images_dir, items, class_names, shapes.images_in(images_dir))


def _via_entries(file: Path) -> list[tuple[str, list[dict[str, dict]]]]:
    """The file name and the regions of each image of a VIA file."""
    content = shapes.read_json(file)
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)
    rows = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "regions" in r for r in rows):
        remedy = other_reader(file, "via", "export the annotations from VIA 2 as JSON")
        raise problem(file, "images with regions, as in VIA 1 and 2", "others", remedy)
    entries = []
    for row in rows:
        name, regions = clean_name(row.get("filename")), row["regions"]
        if name is None:
            expected, found = "a file name inside --images_dir", repr(row.get("filename"))
            raise problem(file, expected, found, "write the name without folders")
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        if not isinstance(regions, list) or not all(map(_is_region, regions)):
            expected = f"regions with {' and '.join(VIA_FIELDS)}"
            raise problem(f"{file}, {name}", expected, "others", "export the annotations again")
        entries.append((name, regions))
    return entries


def _is_region(region: Any) -> bool:
    """Whether a value has the fields of a VIA region."""
    return isinstance(region, dict) and all(isinstance(region.get(f), dict) for f in VIA_FIELDS)


def _via_attribute(entries: list, class_names: list[str] | None, file: Path) -> str | None:
    """The only attribute of regions that has a value; None where --classes is the one class."""
    pairs = [
        pair
        for _, regions in entries
        for region in regions
        for pair in region["region_attributes"].items()
    ]
    filled = sorted({name for name, value in pairs if value not in ("", None, {})})
    if len(filled) > 1:
        remedy = "choose the one that holds the class with --class_attribute"
        raise problem(file, "one attribute of the regions", ", ".join(filled), remedy)
    if not filled and len(class_names or ()) != 1 and any(regions for _, regions in entries):
        expected = "an attribute of the regions that holds the class"
        raise problem(file, expected, "none", "name the only class with --classes")
    return filled[0] if filled else None


def _via_items(
    entries: list, file: Path, images_dir: Path, attribute: str | None, only_class: str | None
) -> Iterator[Item]:
    """The images and objects of a VIA file."""
    short_names = Counter(PureWindowsPath(name).name for name, _ in entries)
    for name, regions in entries:
        objects = []
        for number, region in enumerate(regions, start=1):
            where, shape = f"{file}, {name}, region {number}", region["shape_attributes"]
            parts = shapes.via_parts(shape, where)
            label = shape["name"] if not parts else only_class
            if parts and attribute is not None:
                label = _via_class(region, attribute, where)
            objects.append((label, parts, where))
        path, short = images_dir / name, PureWindowsPath(name).name
        if not path.is_file() and short_names[short] == 1:
            path = images_dir / short
        yield file, path if path.is_file() else None, name, None, objects


def _via_class(region: dict[str, dict], attribute: str, where: str) -> str:
    """The class of a VIA region; a checkbox holds name: true of what is checked."""
    value = region["region_attributes"].get(attribute)
    if isinstance(value, dict):
        checked = [name for name, is_on in value.items() if is_on]
        if len(checked) > 1:
            expected = f"one class in {attribute!r}"
            raise problem(where, expected, ", ".join(checked), "leave one checked")
        value = checked[0] if checked else None
    if value is None:
        attributes = sorted(region["region_attributes"])
        remedy = "set it, or choose another with --class_attribute"
        raise problem(where, f"attribute {attribute!r}", f"values of {attributes}", remedy)
    return shapes.class_name(value, where)
