"""The evidence that an adapter is better than its base: figures with intervals, one HTML page.

evaluations of both models -> `build_report`, a dict for JSON -> `build_page`, which holds all it
shows: no script, no file beside it, nothing from a network. Names come from users: all are escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from sam3_lora.coco import CocoSplit
from sam3_lora.drawing import to_cell
from sam3_lora.images import read_image
from sam3_lora.intervals import (
    FEW_OBJECTS,
    Evaluated,
    compare_agreement,
    compare_models,
    compare_words,
    draw_weights,
    rank_images,
)
from sam3_lora.overview import draw_objects
from sam3_lora.tables import EMPTY_LISTED, why_undefined

PANEL_TITLES = ("annotation", "base model", "adapter")
EXAMPLES = 4  # images in each of the two lists, best and worst
JPEG_QUALITY = 80
WORDS_LISTED = 12  # of the words that find something
FEW_IMAGES = 20  # below, intervals from the images themselves are too narrow to lean on
# Things that any base model knows, to see whether an adapter still finds what its base found.
EVERYDAY_WORDS = (
    "person", "face", "hand", "dog", "cat", "bird", "tree", "flower", "car", "bicycle", "chair",
    "table", "bottle", "cup", "book", "phone", "window", "door", "shoe", "building",
)  # fmt: skip
COLORS = {"base": "#8792a2", "adapter": "#1f63cf"}
OUT_OF_DOMAIN = "detections of out-of-domain words"
ABSENT = "false positives on absent categories"
# By `--prompt_with`; else with their text.
ASKED_WITH = {"box": "a box in place of their text", "both": "a box and their text"}
LOWER_IS_BETTER = (ABSENT, OUT_OF_DOMAIN)
STYLE = """
:root{color-scheme:light;--ink:#1c2430;--soft:#5d6878;--line:#e2e6eb}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:58rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.45rem;line-height:1.25;margin:0 0 .9rem} h2{font-size:1.1rem;margin:2.6rem 0 .4rem}
p{margin:.4rem 0 .8rem} b{font-weight:650} svg{display:block;margin:.15rem 0 0 auto}
.verdict{font-size:1.08rem;border-left:4px solid #1f63cf;background:#f4f7fb;padding:.8rem 1rem}
.warn{border-left:4px solid #d08a00;padding-left:.8rem} .wide{overflow-x:auto}
.note,.facts,small,figcaption{color:var(--soft);font-size:.9rem} .facts{overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .7rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-size:.85rem;font-weight:600;vertical-align:bottom}
tbody th{font-weight:400} th:first-child{text-align:left;padding-left:0;min-width:6rem;
 max-width:16rem;overflow-wrap:break-word}
td small,th small{display:block;font-size:.8rem} td small{white-space:nowrap}
figure{margin:1rem 0 1.6rem} .row img{display:block;width:100%;height:auto}
.row{display:grid;grid-template-columns:repeat(3,1fr);gap:.5rem;margin-top:.3rem}
@media (max-width:40rem){main{padding:1.2rem .9rem 3rem} .spread{display:none}
 .row{grid-template-columns:1fr} th,td{padding:.35rem .3rem} th:first-child{min-width:5rem}
 body{font-size:15px} td small{white-space:normal}}
@media print{main{max-width:none;padding:0} figure,tr{break-inside:avoid} h2{break-after:avoid}}
"""
TERMS = """
<h2>How to read this</h2>
<p class="note">Brackets hold a 95 % interval by bootstrap over images ({resamples} resamples). Both
models are read on the same resamples, so that of a difference is paired; it is bold where its
interval leaves out 0. Intervals cover the choice of images, not that of a training run; [0, 0] or
[1, 1] says that no image here differs, not that none would.</p>
<p class="note"><b>AP</b> is COCO's, over IoU 0.50 to 0.95, from an image's best {most} detections;
AP50 and AP75 at one IoU. All else counts detections of score &ge; {threshold:g}. <b>cgF1</b> = pmF1
(how well the objects are detected where there are some) &times; IL_MCC (whether a prompt fires on
the right images, &minus;1 to 1). <b>{absent}</b>: the share of (image, category that is not in it)
pairs with a detection. <b>{words}</b>: the same share for words that no category is named after. An
<b>undefined</b> figure has nothing to be counted on.</p>
"""


def build_report(
    splits: Mapping[str, CocoSplit],
    base: Mapping[str, Evaluated],
    adapter: Mapping[str, Evaluated],
    out_of_domain: Sequence[str],
    *,
    most: int,
    resamples: int,
    trained: Iterable[str] = (),
) -> dict[str, Any]:
    """Every figure of base and adapter, with intervals.

    Args:
        splits: "split", the images with their objects; "words", the same images with words for
            categories; and perhaps "probe", other images with concepts that the base knows.
        base, adapter: summary and COCO results on each of the splits.
        out_of_domain: those of the words that should find nothing; the others are everyday ones.
        most: detections of an image that AP reads.
        resamples: of the bootstrap, 0 for none.
        trained: the adapter's training categories, names and phrases.

    Returns:
        `compare_models` of the split; "resamples"; "out_of_domain" (`compare_words`), its rate also
        among the "figures"; "forgetting" with "kind": "probe" (figures and categories of the probe,
        how many of these were "trained") or "agreement" (`compare_agreement`).
    """
    split = splits["split"]
    threshold = adapter["split"][0]["score_threshold"]
    weights = draw_weights(len(split.images), resamples)
    report = compare_models(split, base["split"], adapter["split"], most, weights)
    found = base["words"][1], adapter["words"][1]
    asked = compare_words(splits["words"], *found, out_of_domain, threshold, weights)
    report["figures"][OUT_OF_DOMAIN] = asked["rate"]
    report |= {"resamples": len(weights) - 1, "out_of_domain": asked}
    if "probe" in splits:
        probe = splits["probe"]
        own = draw_weights(len(probe.images), resamples)
        compared = compare_models(probe, base["probe"], adapter["probe"], most, own)
        concepts = probe.categories.items()
        known = [name for c, name in concepts if {name, probe.phrase(c)} & {*trained}]
        compared |= {"images": len(probe.images), "trained": known}
        del compared["per_image"]
        report["forgetting"] = {"kind": "probe", "data": str(probe.annotations_file), **compared}
    else:
        words = [w for w in splits["words"].categories.values() if w not in out_of_domain]
        kept = compare_agreement(splits["words"], *found, words, threshold, weights)
        report["forgetting"] = {"kind": "agreement", "asked": words, **kept}
    return report


def list_objects(split: CocoSplit, image: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An image's annotations but crowds: regions to ignore, as in the figures."""
    return [a for a in split.annotations[image["id"]] if not a["iscrowd"]]


def draw_rows(
    split: CocoSplit,
    images: Sequence[Mapping[str, Any]],
    base: list[dict[str, Any]],
    adapter: list[dict[str, Any]],
    threshold: float,
    colors: Iterable[int] = (),
) -> tuple[list[list[np.ndarray]], dict[int, int]]:
    """Images of a split with their annotations, and with two models' COCO results of score >=
    threshold: three pictures a row; and each category's colour, which those in `colors` have
    already, in that order."""
    columns = []
    for image in images:
        found = [
            [r for r in rows if r["image_id"] == image["id"] and r["score"] >= threshold]
            for rows in (base, adapter)
        ]
        columns.append([list_objects(split, image), *found])
    # The annotations come first: they get the colours that no two categories share.
    ordered = [row for kind in zip(*columns, strict=True) for rows in kind for row in rows]
    shown = dict.fromkeys([*colors, *(row["category_id"] for row in ordered)])
    colors = {category_id: k for k, category_id in enumerate(shown)}
    pictures = []
    for image, own in zip(images, columns, strict=True):
        photo = to_cell(read_image(split.image_path(image)))
        pictures.append([draw_objects(photo, rows, image, split, colors) for rows in own])
    return pictures, colors


def draw_examples(
    split: CocoSplit,
    base: list[dict[str, Any]],
    adapter: list[dict[str, Any]],
    per_image: list[dict[str, Any]],
    threshold: float,
    colors: Iterable[int] = (),
) -> dict[str, list[tuple[str, list[np.ndarray]]]]:
    """The adapter's best and worst images: title -> (caption, three pictures as `draw_rows`)."""
    rows = {row["image_id"]: row for row in per_image}
    images = {image["id"]: image for image in split.images}
    best, worst = rank_images(per_image, EXAMPLES)
    chosen = best + worst
    pictures, _ = draw_rows(split, [images[i] for i in chosen], base, adapter, threshold, colors)
    examples: dict[str, list] = {"Best images": [], "Worst images": []}
    for k, (image_id, own) in enumerate(zip(chosen, pictures, strict=True)):
        row = rows[image_id]
        values = [f"{m} {_change(row, m)}" for m in ("F1", "IoU") if row["adapter"][m] is not None]
        caption = f"{row['file_name']}: {', '.join(values)}"
        examples["Best images" if k < len(best) else "Worst images"].append((caption, own))
    return examples


def _change(row: Mapping[str, Any], name: str) -> str:
    """A figure of an image in base and adapter."""
    return " → ".join(_number(row[side][name]) for side in ("base", "adapter"))


def verdict(metrics: Mapping[str, Any]) -> str:
    """What moved, in a sentence, with the interval of each difference."""
    report, images = metrics["report"], metrics["counts"]["images"]
    kind = "mask" if metrics["segm"] else "box"
    named = {name: report["figures"][name] for name in (f"{kind} AP50", "cgF1", *LOWER_IS_BETTER)}
    # What the split lacks for the others is told under the figures.
    defined = [n for n, f in named.items() if {f["base"]["value"], f["adapter"]["value"]} != {None}]
    parts = [_moved(name, named[name]) for name in defined]
    kept = report["forgetting"]
    if kept["kind"] == "probe":
        name, where = _probe_figure(kept, "AP50"), _count(kept["images"], "probe image")
        parts.append(_moved(f"{name} on {where}", kept["figures"][name]))
    elif kept["base"]:
        share = _with_interval(kept["kept"])
        found = _count(kept["base"], "detection")
        parts.append(f"of the base's {found} of everyday words the adapter keeps {share}")
    return f"On {_count(images, 'image')}: {'; '.join(parts)}."


def _probe_figure(forgetting: Mapping[str, Any], name: str) -> str:
    """An AP of the probe, on masks where there are any."""
    masks = forgetting["figures"][f"mask {name}"]["adapter"]["value"] is not None
    return f"{'mask' if masks else 'box'} {name}"


def _moved(name: str, figure: Mapping[str, Any]) -> str:
    """A figure of both models, and whether it differs."""
    base, adapter, difference = (figure[k] for k in ("base", "adapter", "difference"))
    values = f"{_number(base['value'])} -> {_number(adapter['value'])}"
    if difference["interval"] and not _is_clear(difference):
        return f"no clear difference in {name} ({values})"
    if difference["value"] is None:
        return f"{name} {values}"
    return f"{name} {values} ({_with_interval(difference, signed=True)})"


def _is_clear(difference: Mapping[str, Any]) -> bool:
    """Whether a difference's interval leaves out 0."""
    limits = difference["interval"]
    return bool(limits) and not limits[0] <= 0 <= limits[1]


def _number(value: float | None, signed: bool = False) -> str:
    """A figure as text."""
    if value is None:
        return "undefined"
    return format(round(value, 3) + 0.0, "+.3f" if signed else ".3f")  # + 0.0: never -0.000


def _with_interval(figure: Mapping[str, Any], signed: bool = False) -> str:
    """A figure and its interval on one line."""
    return " ".join([_number(figure["value"], signed), *_limits(figure, signed)])


def _limits(figure: Mapping[str, Any], signed: bool) -> list[str]:
    """A figure's interval in brackets, or nothing without one."""
    limits = figure["interval"]
    return [f"[{', '.join(_number(v, signed) for v in limits)}]"] if limits else []


def _count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _figure_cell(figure: Mapping[str, Any], signed: bool = False) -> str:
    """A figure over its interval."""
    value = _number(figure["value"], signed)
    value = f"<b>{value}</b>" if signed and _is_clear(figure) else value
    return value + "".join(f"<small>{limits}</small>" for limits in _limits(figure, signed))


def _both_cells(figure: Mapping[str, Any]) -> list[str]:
    """Base, adapter, difference."""
    cells = [_figure_cell(figure[side]) for side in ("base", "adapter")]
    return [*cells, _figure_cell(figure["difference"], signed=True)]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of ready HTML; the first column names its row."""
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
        for first, *cells in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    return f'<div class="wide">{table}</div>\n'


def _spread(figure: Mapping[str, Any]) -> str:
    """Both models' values and intervals on a line from 0 to 1."""
    marks = ['<line x1="4" x2="136" y1="13" y2="13" stroke="#e2e6eb"/>']
    for y, (side, color) in zip((8, 18), COLORS.items(), strict=True):
        value, limits = figure[side]["value"], figure[side]["interval"]
        if value is None:
            continue
        low, high, x = (4 + 132 * min(max(v, 0), 1) for v in (*(limits or (value, value)), value))
        line = f'x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{color}"'
        marks.append(f'<line {line} stroke-width="2"/>')
        marks.append(f'<circle cx="{x:.1f}" cy="{y}" r="3.5" fill="{color}"/>')
    return f'<svg class="spread" width="140" height="26">{"".join(marks)}</svg>'


def build_page(
    metrics: Mapping[str, Any], examples: Mapping[str, Sequence[tuple[str, list[np.ndarray]]]]
) -> str:
    """The report as one HTML page.

    Args:
        metrics: the adapter's summary with "model", "data", "split", "prompt_with",
            "max_detections" (that AP reads), "report" (`build_report`) and "calibration"
            (`intervals.calibrate` with "chosen_on" and "stored"); "tile" where in tiles.
        examples: from `draw_examples`.
    """
    report, counts = metrics["report"], metrics["counts"]
    shown = _count(counts["images"], "image")
    few = f"{shown}: too few for intervals to lean on." if counts["images"] < FEW_IMAGES else ""
    asked = f"present categories asked with {ASKED_WITH.get(metrics['prompt_with'], 'their text')}"
    facts = [
        f"model {metrics['model']}",
        f"data {metrics['data']} ({metrics['split']})",
        f"{shown}, {_count(counts['objects'], 'object')} ({counts['objects_with_mask']} masks)",
        asked + (f", in tiles of {metrics['tile']:g}" if "tile" in metrics else ""),
    ]
    sections = [
        f'<p class="verdict">{escape(verdict(metrics).replace("->", "→"))}</p>',
        f'<p class="facts">{"<br>".join(map(escape, facts))}</p>',
        _warning(few),
        _figures_section(report["figures"], bool(metrics["segm"]), why_undefined(metrics)),
        _categories_section(report["per_category"], bool(metrics["segm"])),
        _words_section(report["out_of_domain"], counts["images"]),
        _forgetting_section(report["forgetting"]),
        _thresholds_section(metrics["calibration"], metrics["split"]),
        *(_examples_section(title, rows) for title, rows in examples.items()),
        TERMS.format(
            resamples=report["resamples"],
            most=metrics["max_detections"],
            threshold=metrics["score_threshold"],
            absent=ABSENT.capitalize(),
            words=OUT_OF_DOMAIN.capitalize(),
        ),
    ]
    title = f"Base model and adapter on {metrics['split']}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><main>\n<h1>{escape(title)}</h1>\n{''.join(sections)}</main></body></html>\n"
    )


def _warning(text: str) -> str:
    """A paragraph that is to be seen; none for no text."""
    return f'<p class="note warn">{escape(text)}</p>\n' if text else ""


def _figures_section(figures: Mapping[str, Any], has_masks: bool, lacks: list[str]) -> str:
    """Every figure of both models, over what the split `lacks` for some of them."""
    rows = []
    for name, figure in figures.items():
        if name.startswith("mask") and not has_masks:
            continue
        hint = "<small>lower is better</small>" if name in LOWER_IS_BETTER else ""
        rows.append([name + hint, *_both_cells(figure), _spread(figure)])
    note = _warning("" if has_masks else "The split has no masks: box figures only.")
    models = [f'<b style="color:{COLORS[side]}">&bull;</b>&nbsp;{side}' for side in COLORS]
    table = _table(["", *models, "difference", '<span class="spread">0 to 1</span>'], rows)
    return f"<h2>Figures</h2>\n{note}{table}{_warning(''.join(lacks))}"


def _categories_section(rows: Sequence[Mapping[str, Any]], has_masks: bool) -> str:
    """AP of each category."""
    empty = sum(not row["objects"] for row in rows)
    listed = [row for row in rows if row["objects"] or empty <= EMPTY_LISTED]
    cells = []
    for row in listed:
        prompt = "" if row["prompt"] == row["name"] else f"<small>{escape(row['prompt'])}</small>"
        fifty = [_number(row["AP50"][side]["value"]) for side in ("base", "adapter")]
        cells.append(
            [escape(row["name"]) + prompt, str(row["objects"]), *_both_cells(row["AP"]), *fifty]
        )
    heads = ["category", "objects", "AP base", "AP adapter", "difference"]
    heads += ["AP50 base", "AP50 adapter"]
    hidden = len(rows) - len(listed)
    note = (
        f'<p class="note">{hidden} categories without an object: not listed.</p>' if hidden else ""
    )
    kind = "masks" if has_masks else "boxes"
    return f"<h2>Categories, on {kind}</h2>\n{_table(heads, cells)}{note}"


def _words_section(asked: Mapping[str, Any], images: int) -> str:
    """The words that should find nothing and do."""
    fired = {w: n for w, n in asked["words"].items() if n["base"] or n["adapter"]}
    ranked = sorted(fired.items(), key=lambda item: -max(item[1].values()))
    intro = (
        f"{_count(len(asked['words']), 'word')} that no category is named after, asked of every "
        f"image: {len(fired) or 'none'} of them found something in one model or the other."
    )
    rows = [[escape(w), str(n["base"]), str(n["adapter"])] for w, n in ranked[:WORDS_LISTED]]
    heads = ["word", f"images of {images}, base", "adapter"]
    table = _table(heads, rows) if rows else ""
    return f'<h2>Words that should find nothing</h2>\n<p class="note">{intro}</p>{table}'


def _forgetting_section(kept: Mapping[str, Any]) -> str:
    """What the adapter still knows of the base's concepts."""
    if kept["kind"] == "probe":
        total = len(kept["per_category"])
        intro = (
            f"Measured on annotations: {_count(total, 'concept')} on "
            f"{_count(kept['images'], 'image')} of {escape(kept['data'])}."
        )
        names = [_probe_figure(kept, m) for m in ("AP", "AP50")] + ["cgF1", ABSENT]
        rows = [[name, *_both_cells(kept["figures"][name])] for name in names]
        table = _table(["", "base", "adapter", "difference"], rows)
        if kept["trained"]:
            table += _warning(
                f"The adapter was trained on {len(kept['trained'])} of the {total}: for these it "
                "shows what was kept in training, not what becomes of concepts left out."
            )
    else:
        intro = (
            f"Without annotations: {_count(len(kept['asked']), 'everyday word')} asked of the same "
            "images. What the base finds is taken for the truth, which it may not be. Share that "
            f"the adapter finds too, at mask IoU &ge; 0.5: {_with_interval(kept['kept'])}, of "
            f"{_count(kept['base'], 'detection')}; it adds {kept['new']} that the base has not."
        )
        heads = ["word", "found by the base", "still by the adapter", "new"]
        words = kept["words"].items()
        rows = [[escape(w), *(str(n[k]) for k in ("base", "found", "new"))] for w, n in words]
        table = _table(heads, rows) if rows else ""
    kind = "annotated probe" if kept["kind"] == "probe" else "agreement with the base"
    return f'<h2>Forgetting: {kind}</h2>\n<p class="note">{intro}</p>{table}'


def _thresholds_section(chosen: Mapping[str, Any], split: str) -> str:
    """Each category's threshold, and F1 without and with it."""
    known = [row for row in chosen["per_category"] if row["objects"]]
    rows = [
        [
            escape(row["name"])
            + (f"<small>fewer than {FEW_OBJECTS} objects</small>" if row["few"] else ""),
            str(row["objects"]),
            _number(row["threshold"]),
            _number(row["F1_before"]),
            _number(row["F1_after"]),
        ]
        for row in known
    ]
    objects = sum(row["objects"] for row in known)
    rows.append(
        ["<b>all</b>", str(objects), "", _number(chosen["F1_before"]), _number(chosen["F1_after"])]
    )
    default = f"{chosen['default']:g}"
    heads = ["category", "objects", "threshold", f"F1 at {default}", "F1 at the threshold"]
    state = "stored in the adapter" if chosen["stored"] else "not stored: --calibrate does"
    kind = "masks" if chosen["iou_type"] == "segm" else "boxes"
    intro = (
        f"Where F1 of the adapter's detections is highest, at IoU {chosen['iou']:g} of {kind}, "
        f"chosen on {escape(chosen['chosen_on'])} ({state}). A category without an object keeps "
        f"{default}."
    )
    warning = ""
    if chosen["chosen_on"] == split:
        warning = _warning(
            f"They were chosen on the images they are measured on here ({split}): on others F1 "
            "is likely to be lower. Measure another split with the thresholds stored."
        )
    return f'<h2>Thresholds</h2>\n<p class="note">{intro}</p>{warning}{_table(heads, rows)}'


def _examples_section(title: str, rows: Sequence[tuple[str, list[np.ndarray]]]) -> str:
    """Images with their annotations, and with what both models find."""
    figures = []
    for caption, pictures in rows:
        cells = "".join(
            f'<div><img alt="{name}" src="{_data_uri(picture)}"><small>{name}</small></div>'
            for name, picture in zip(PANEL_TITLES, pictures, strict=True)
        )
        caption = f"<figcaption>{escape(caption)}</figcaption>"
        figures.append(f'<figure>{caption}<div class="row">{cells}</div></figure>\n')
    return f"<h2>{title}</h2>\n{''.join(figures)}" if figures else ""


def _data_uri(picture: np.ndarray) -> str:
    """A picture as JPEG within the page."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
