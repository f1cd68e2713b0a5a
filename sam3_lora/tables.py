"""The figures of an evaluation as tables for a terminal; what a split lacks for some of them."""

from typing import Any

EMPTY_LISTED = 10  # categories without an object that a table lists; more are counted
# Without these images nothing can tell an adapter that finds its objects everywhere.
NONE_ABSENT = "no image lacks a category: keep images without the object to measure false alarms"


def format_summary(summary: dict[str, Any]) -> str:
    """The summary (`DetectionAccumulator.summary`) as a table; None reads "undefined"."""
    cg, counts = summary["cgf1"], summary["counts"]
    geometry = "masks" if cg["iou_type"] == "segm" else "boxes"
    pairs = f"{cg['positive_pairs']} positive and {cg['negative_pairs']} negative pairs"
    fired = f"{counts['false_positive_pairs']} of {counts['absent_pairs']} absent prompts fired"
    figures = [
        ("cgF1", cg["cgF1"], f"(pmF1 x IL_MCC, on {geometry}; {pairs})"),
        ("cgF1@0.5", cg["cgF1@0.5"], ""),
        ("pmF1", cg["pmF1"], ""),
        ("IL_MCC", cg["IL_MCC"], ""),
        ("mask IoU", summary["mask_iou"], ""),
        ("box IoU", summary["box_iou"], ""),
        ("false-positive rate", summary["false_positive_rate"], f"({fired})"),
    ]
    lines = [*_ap_rows(summary), "", f"at score >= {summary['score_threshold']:g}:"]
    lines += [f"{name:<19}  {_cell(value):>9}  {note}".rstrip() for name, value, note in figures]
    return "\n".join([*lines, *why_undefined(summary)])


def format_comparison(base: dict[str, Any], adapter: dict[str, Any]) -> str:
    """The main figures of two summaries (`DetectionAccumulator.summary`) side by side."""
    columns = [_main_figures(base), _main_figures(adapter)]
    width = max(map(len, columns[0]))
    lines = [f"{'':<{width}}" + "".join(f"  {t:>10}" for t in ("base", "adapter", "difference"))]
    for name, (a, b) in ((name, [c[name] for c in columns]) for name in columns[0]):
        # Adding 0 turns -0.0 into 0.0.
        change = "undefined" if a is None or b is None else f"{round(b - a, 3) + 0.0:+.3f}"
        lines.append(f"{name:<{width}}  {_cell(a):>10}  {_cell(b):>10}  {change:>10}")
    return "\n".join([*lines, *why_undefined(base)])


def why_undefined(summary: dict[str, Any]) -> list[str]:
    """What the split of a summary lacks for some of its figures, in a line, or no line."""
    counts, lacks = summary["counts"], []
    if not counts["objects"]:
        lacks.append("no image has an object")
    elif not counts["objects_with_mask"]:
        lacks.append("no object has a mask")
    if not counts["absent_pairs"]:
        lacks.append(NONE_ABSENT)
    return [f"undefined: {'; '.join(lacks)}"] if lacks else []


def _main_figures(summary: dict[str, Any]) -> dict[str, float | None]:
    """What a comparison shows of a summary."""
    blocks = {"box": summary["bbox"], "mask": summary["segm"] or {}}
    return {
        **{f"{kind} {m}": block.get(m) for kind, block in blocks.items() for m in ("AP", "AP50")},
        **{name: summary["cgf1"][name] for name in ("cgF1@0.5", "cgF1", "IL_MCC", "pmF1")},
        "mask IoU": summary["mask_iou"],
        "false positives on absent prompts": summary["false_positive_rate"],
    }


def _ap_rows(summary: dict[str, Any]) -> list[str]:
    """AP and AP50 of each category and of all, for boxes and, where there are, masks; more than
    `EMPTY_LISTED` categories without an object are counted instead."""
    blocks = {"box": summary["bbox"], "mask": summary["segm"]}
    blocks = {kind: block for kind, block in blocks.items() if block}
    rows = [("prompt", "objects", [f"{k} {m}" for k in blocks for m in ("AP", "AP50")])]
    empty = sum(not entry["objects"] for entry in summary["bbox"]["per_category"])
    for entries in zip(*(block["per_category"] for block in blocks.values()), strict=True):
        if empty > EMPTY_LISTED and not entries[0]["objects"]:
            continue
        cells = [_cell(entry[m]) for entry in entries for m in ("AP", "AP50")]
        rows.append((entries[0]["prompt"], entries[0]["objects"], cells))
    totals = [_cell(block[m]) for block in blocks.values() for m in ("AP", "AP50")]
    rows.append(("all", summary["counts"]["objects"], totals))
    width = max(len(prompt) for prompt, _, _ in rows)
    lines = [f"{p:<{width}}  {n:>7}" + "".join(f"  {c:>9}" for c in cells) for p, n, cells in rows]
    if empty > EMPTY_LISTED:
        lines.append(f"{empty} categories without an object: not listed")
    return lines


def _cell(value: float | None) -> str:
    """A metric as text."""
    return "undefined" if value is None else f"{value:.3f}"
