"""The model card of an export: prompts, figures, what a stock call reads, Python to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3_lora.model import HUB_ID

# Targets that a card lists: an imported adapter may name each layer.
MAX_TARGETS = 12
TAGS = ["sam3", "lora", "instance-segmentation"]

TOKEN_NOTES = {
    "meta": """\
Trained as SAM 3 itself was, with the geometry encoder's image token beside the text
(`geometry_cls: meta`). A stock text-only call of `Sam3Model`, and `Sam3VideoModel`, leave that
token out, so the model then reads other inputs than it was trained on and may find less.
""",
    "hf": """\
Trained without the geometry encoder's image token (`geometry_cls: hf`), as stock text-only calls of
`Sam3Model` and `Sam3VideoModel` run: they give what was trained.
""",
}
PADDING_BOX_NOTE = "One padding box, as in the snippet below, brings the token back.\n"
HOW_TO_MEASURE = """
The difference was not measured here. Evaluate the adapter twice on one split, as trained and with
`--model_geometry_cls hf`, and export it again with both `metrics.json`:

    python evaluate_sam3_lora.py --lora_weights ADAPTER --output_dir as_trained
    python evaluate_sam3_lora.py --lora_weights ADAPTER --output_dir stock --model_geometry_cls hf
    python export_sam3_lora.py COMMAND --lora_weights ADAPTER --output_dir DIR \\
        --metrics as_trained/metrics.json --stock_metrics stock/metrics.json
"""

VIDEO_SNIPPET = """\
from transformers import Sam3VideoModel, Sam3VideoProcessor
model = Sam3VideoModel.from_pretrained({place}).eval()
# The processor needs the base's video processor; where it has none, name facebook/sam3.
processor = Sam3VideoProcessor.from_pretrained({place})"""
LOAD_MERGED = """\
from transformers import Sam3Model, Sam3Processor

model = Sam3Model.from_pretrained({place}, dtype=torch.float32).eval()
processor = Sam3Processor.from_pretrained({place})"""
LOAD_PEFT = """\
from peft import PeftModel
from transformers import Sam3Model, Sam3Processor

base = Sam3Model.from_pretrained({base}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, {place}).eval()
processor = Sam3Processor.from_pretrained({base})"""
PADDING_BOX = """\
# One padding box: without it the model runs otherwise than it was trained.
inputs |= {
    "input_boxes": torch.zeros(1, 1, 4),
    "input_boxes_labels": torch.full((1, 1), -10),
}
"""
PHOTO_SNIPPET = """\
import torch
from PIL import Image
{load}
image = Image.open("photo.jpg").convert("RGB")
prompt = {prompt}
inputs = dict(processor(images=image, text=prompt, return_tensors="pt"))
{padding_box}with torch.no_grad():
    outputs = model(**inputs)
found = processor.post_process_instance_segmentation(
    outputs, threshold={threshold:.3g}, target_sizes=[image.size[::-1]]
)[0]
print(found["scores"], found["boxes"])"""


def build_card(
    content: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, float | None]],
    base: str,
    place: str,
    *,
    is_local: bool = False,
    merged_dtype: str | None = None,
    video: bool = False,
    license_id: str | None = None,
) -> str:
    """The card, as Markdown with front matter.

    Args:
        content: of `checkpoint.read_adapter`.
        figures: columns of figures by name, None for one that is undefined; a second column is
            that of stock text-only calls.
        base: the base model's name, without a path of this machine.
        place: where the card's Python finds the export: a repository of the hub, or a folder.
        is_local: whether the base is a folder, which the reader has not.
        merged_dtype: `fp32` or `bf16`, of a merged model's weights; None: an adapter for PEFT.
        video: whether the merged model is SAM 3's video model.
        license_id: of adapter and data; None: not told.
    """
    token = content.get("geometry_cls", "meta")
    calls = TOKEN_NOTES[token]
    if token == "meta":
        calls += "" if video else PADDING_BOX_NOTE
        calls += HOW_TO_MEASURE if len(figures) < 2 else ""
    python = VIDEO_SNIPPET.format(place=_quoted(place))
    if not video:
        python = _photo_use(content, base, place, is_peft=not merged_dtype)
    sections = {
        "Prompts": _prompt_table(content),
        "Figures": _figure_table(figures),
        "Text-only calls": calls,
        "Video": _video_note(content) if video else None,
        "Use": f"```python\n{python}\n```\n",
        "Adapter": _adapter_table(content),
    }
    link = f"[{base}](https://huggingface.co/{base})"
    of_base = f"`{base}`, a local folder of whoever exported it" if is_local else link
    title, about = "A LoRA adapter of SAM 3", f"Base model: {of_base}.\n"
    if merged_dtype:
        title = "SAM 3 with a LoRA adapter merged into it"
        written = merged_dtype + (" (the sum is fp32)" if merged_dtype != "fp32" else "")
        about += f"The weights, in {written}, hold the base's: its licence applies to them too.\n"
    head = f"{_front_matter(base, bool(merged_dtype), license_id)}\n# {title}\n\n{about}"
    return head + "".join(f"\n## {name}\n\n{text}" for name, text in sections.items() if text)


def _front_matter(base: str, merged: bool, license_id: str | None) -> str:
    """The card's YAML; strings in JSON's form, which YAML reads."""
    fields = {"base_model": base if HUB_ID.fullmatch(base) else Path(base).name}
    fields["library_name"] = "transformers" if merged else "peft"
    if merged:
        fields["base_model_relation"] = "finetune"
    if license_id:
        fields["license"] = license_id
    rows = [f"{name}: {json.dumps(value)}\n" for name, value in (fields | {"tags": TAGS}).items()]
    return "".join(["---\n", *rows, "---\n"])


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def _prompt_table(content: Mapping[str, Any]) -> str:
    """The categories with their prompts and, where they were chosen, thresholds."""
    categories, thresholds = content.get("categories", {}), content.get("thresholds")
    if not categories:
        return "The adapter's file names none.\n"
    if not thresholds:
        return _table(["category", "prompt"], [list(pair) for pair in categories.items()])
    chosen = {name: f"{value:.3g}" for name, value in thresholds.items()}
    rows = [[name, phrase, chosen.get(name, "-")] for name, phrase in categories.items()]
    return _table(["category", "prompt", "threshold"], rows)


def _figure_table(columns: Mapping[str, Mapping[str, float | None]]) -> str:
    """A line a figure; one that is undefined says so."""
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    if not names:
        return "The adapter's file holds none.\n"
    found = [[figures.get(name) for figures in columns.values()] for name in names]
    shown = [["undefined" if f is None else f"{f:.4g}" for f in row] for row in found]
    return _table(["", *columns], [[name, *row] for name, row in zip(names, shown, strict=True)])


def _video_note(content: Mapping[str, Any]) -> str:
    """What the merged adapter means for the tracker."""
    vision = len({n.rsplit(".", 1)[0] for n in content["lora"] if n.startswith("vision_encoder.")})
    if not vision:
        return "The tracker is the base's, and so is the vision tower that it reads.\n"
    return (
        "The tracker's weights are the base's, but it reads the same vision tower as the detector, "
        f"in which {vision} layers are adapted: the adapter also shifts what the tracker sees.\n"
    )


def _photo_use(content: Mapping[str, Any], base: str, place: str, is_peft: bool) -> str:
    """Python that loads the export with stock libraries and runs a prompt on photo.jpg."""
    category, prompt = next(iter(content.get("categories", {}).items()), ("", "car"))
    load = LOAD_PEFT if is_peft else LOAD_MERGED
    return PHOTO_SNIPPET.format(
        load=load.format(place=_quoted(place), base=_quoted(base)),
        prompt=_quoted(prompt),
        padding_box=PADDING_BOX if content.get("geometry_cls", "meta") == "meta" else "",
        threshold=content.get("thresholds", {}).get(category, 0.5),
    )


def _quoted(text: str) -> str:
    """A text as Python writes it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _adapter_table(content: Mapping[str, Any]) -> str:
    """What was adapted, and how."""
    lora = content["lora_config"]
    targets = ", ".join(lora.target_modules[:MAX_TARGETS])
    rows = {
        "rank": lora.rank,
        "alpha": f"{lora.alpha:g}",
        "dropout in training": f"{lora.dropout:g}",
        "layers": len(content["lora"]) // 2,
        "target_modules": targets + (", ..." if len(lora.target_modules) > MAX_TARGETS else ""),
        "components": ", ".join(lora.components),
        "step": content.get("step", 0),
    }
    return _table(["", ""], [[name, str(value)] for name, value in rows.items()])
