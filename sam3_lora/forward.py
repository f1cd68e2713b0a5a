"""Our forward over the sub-modules of `transformers.Sam3Model`.

`Sam3Model.forward` runs the vision tower once per prompt, gives the last decoder layer only and
always draws every query's mask. Training needs the tower once per image, each distinct prompt's
text once, every layer's outputs, and masks for matched queries alone. The sums are the same (tests
hold them and their gradients equal):

    images (I,3,S,S) -> ViT + neck -> fpn (I,C,h,w) x 3 --[image_index]--.
    texts (U)        -> CLIP -> text (U,32,C) ------------[text_index]---+-> B rows -> DETR
    boxes (B,N,4)    -> geometry encoder -> (B,N+1,C) -------------------'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sam3_lora.model import num_queries

# Tokens of a prompt; CLIP's text encoder has this many positions (transformers processing_sam3.py).
CONTEXT_LENGTH = 32
# Label of a padding box in `input_boxes_labels` (transformers modeling_sam3.py).
PADDING_BOX = -10
# Clip of the argument of the inverse sigmoid (transformers modeling_sam3.py, `inverse_sigmoid`).
INVERSE_SIGMOID_EPS = 1e-3
# The word SAM 3 was trained to read with a box exemplar and no text.
VISUAL_PROMPT = "visual"

Outputs = dict[str, torch.Tensor]


def tokenize(tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of prompts, cut at 32 tokens as Meta does.

    Args:
        tokenizer: CLIP's, which lower-cases.
        texts: U prompts.

    Returns:
        input_ids (U, 32) long, attention_mask (U, 32) long with 1 for a token and 0 for padding.
    """
    encoded = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=CONTEXT_LENGTH,
        return_tensors="pt",
    )
    return encoded["input_ids"], encoded["attention_mask"]


@dataclass
class Forward:
    """SAM 3's forward, split where the work is shared: `encode` per image and text, `predict` per
    row.

    Args:
        model: base or adapted model.
        tokenizer: its tokenizer.
        geometry_cls: `meta` adds the geometry encoder's CLS token to text-only prompts, as SAM 3
            was trained; `hf` leaves it out, as `Sam3Model` does when it gets no box.
        dtype: of the matrix products of towers, DETR encoder, decoder attention and mask decoder.
        one_to_many: also run the queries without self-attention (training's second branch).
        masks: run the mask decoder.
    """

    model: nn.Module
    tokenizer: Any
    geometry_cls: str = "meta"
    dtype: torch.dtype = torch.float32
    one_to_many: bool = False
    masks: bool = True

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.detr_decoder.query_embed.weight.device

    def __call__(self, batch: dict[str, Any]) -> Outputs:
        """All rows of a batch at once: `predict` after `encode`."""
        return self.predict(self.encode(batch), batch, slice(None))

    def encode(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Vision features of the images and text features of the distinct prompts.

        Args:
            batch: `images` (I,3,S,S) uint8 and `texts`, a list of B prompts.

        Returns:
            `fpn_0`, `fpn_1`, `fpn_2` (I,C,h,w), finest first; `text` (U,32,C) fp32; `text_mask`
            (U,32) bool; `text_index` (B,) long, row -> distinct prompt.
        """
        distinct = list(dict.fromkeys(batch["texts"]))
        position = {text: index for index, text in enumerate(distinct)}
        input_ids, attention_mask = tokenize(self.tokenizer, distinct)
        features = encode_images(self.model, batch["images"].to(self.device))
        features["text"] = encode_texts(
            self.model, input_ids.to(self.device), attention_mask.to(self.device)
        )
        features["text_mask"] = attention_mask.bool().to(self.device)
        features["text_index"] = torch.tensor(
            [position[text] for text in batch["texts"]], device=self.device
        )
        return features

    def predict(
        self, features: dict[str, torch.Tensor], batch: dict[str, Any], rows: slice
    ) -> Outputs:
        """Heads for some rows of a batch.

        Args:
            features: from `encode` of the same batch.
            batch: `image_index` (B,), and `box_prompts_cxcywh` (B,N,4), `box_prompt_labels` (B,N)
                or None.
            rows: which of the B rows.

        Returns:
            With L decoder layers, b rows, Q queries, C channels, all fp32 but `pixel_embed`:
            `logits` (L,b,Q), `boxes_cxcywh` (L,b,Q,4) in 0 to 1, `presence` (L,b) unclamped;
            `mask_embed` (b,Q,C), `pixel_embed` (b,C,h,w), `semantic` (b,h,w) where `masks` is on;
            `o2m_logits`, `o2m_boxes_cxcywh`, `o2m_mask_embed` where `one_to_many` is on. The mask
            logits of query q of row r are `mask_embed[r, q] . pixel_embed[r]`.
        """
        image_index = batch["image_index"].to(self.device)[rows]
        text_index = features["text_index"][rows]
        levels = [features[f"fpn_{i}"] for i in range(3)]
        coarse = levels[-1].float().index_select(0, image_index)  # (b,C,h,w); sums grads in fp32
        position = _grid_position(self.model, coarse)  # (1,C,h,w)
        boxes = labels = None
        if batch.get("box_prompts_cxcywh") is not None:
            boxes = batch["box_prompts_cxcywh"].to(self.device)[rows]
            labels = batch["box_prompt_labels"].to(self.device)[rows]
        prompt, prompt_mask = self._join_prompts(
            features["text"].index_select(0, text_index),
            features["text_mask"].index_select(0, text_index),
            boxes,
            labels,
            coarse,
            position,
        )
        with self._autocast():
            memory = _encode_detr(self.model, coarse, position, prompt, prompt_mask)
        outputs, states = _decode(
            self.model,
            memory,
            position.flatten(2).transpose(1, 2),
            coarse.shape[-2:],
            prompt,
            prompt_mask,
            self.one_to_many,
            self._autocast,
        )
        if self.masks:
            outputs |= self._mask_outputs(states, levels, image_index, memory, prompt, prompt_mask)
        return outputs

    def _autocast(self) -> torch.autocast:
        """Mixed precision for the DETR and mask heads; off in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _join_prompts(
        self,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        boxes: torch.Tensor | None,
        labels: torch.Tensor | None,
        coarse: torch.Tensor,
        position: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text tokens, then geometry tokens: (b,32[+N+1],C) and a mask, True for a real token."""
        count = text.shape[0]
        if boxes is None:
            if self.geometry_cls == "hf":
                return text, text_mask
            boxes = text.new_zeros(count, 1, 4)
            labels = torch.full((count, 1), PADDING_BOX, device=text.device)
        valid = labels != PADDING_BOX
        geometry = self.model.geometry_encoder(
            box_embeddings=boxes.float(),
            box_mask=valid,
            box_labels=labels.clamp(min=0),
            img_feats=(coarse,),
            img_pos_embeds=(position.expand_as(coarse),),
        )
        geometry_mask = geometry.attention_mask
        if self.geometry_cls == "hf":
            geometry_mask = geometry_mask & valid.any(1, keepdim=True)
        prompt = torch.cat([text, geometry.last_hidden_state], dim=1)
        return prompt, torch.cat([text_mask, geometry_mask], dim=1)

    def _mask_outputs(
        self,
        states: torch.Tensor,
        levels: list[torch.Tensor],
        image_index: torch.Tensor,
        memory: torch.Tensor,
        prompt: torch.Tensor,
        prompt_mask: torch.Tensor,
    ) -> Outputs:
        """The mask decoder up to the dot product: embeddings of queries and pixels."""
        decoder = self.model.mask_decoder
        with self._autocast():
            attended, _ = decoder.prompt_cross_attn(
                query=decoder.prompt_cross_attn_norm(memory),
                key=prompt,
                value=prompt,
                attention_mask=prompt_mask[:, None, None, :],
            )
            memory = memory + decoder.prompt_cross_attn_dropout(attended)
            height, width = levels[-1].shape[-2:]
            pixels = memory.transpose(1, 2).unflatten(2, (height, width))  # (b,C,h,w)
            # The third convolution of the published weights has no level to work on.
            fine = levels[-2::-1]
            convs = decoder.pixel_decoder.conv_layers[: len(fine)]
            norms = decoder.pixel_decoder.norms[: len(fine)]
            for level, conv, norm in zip(fine, convs, norms, strict=True):
                pixels = F.interpolate(pixels, size=level.shape[-2:], mode="nearest")
                pixels = F.relu(norm(conv(pixels + level.index_select(0, image_index))))
            outputs = {
                "pixel_embed": decoder.instance_projection(pixels),
                "semantic": decoder.semantic_projection(pixels)[:, 0].float(),
            }
        mask_embed = decoder.mask_embedder(states)
        queries = num_queries(self.model)
        outputs["mask_embed"] = mask_embed[:, :queries]
        if self.one_to_many:
            outputs["o2m_mask_embed"] = mask_embed[:, queries:]
        return outputs


def encode_images(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """ViT and neck, without the coarsest level that nothing reads.

    Args:
        model: base or adapted model.
        images: (I,3,S,S) uint8, S the model's image size.

    Returns:
        `fpn_0`, `fpn_1`, `fpn_2`: (I,C,4h,4w), (I,C,2h,2w), (I,C,h,w) with h = w = S / 14.
    """
    vision = model.vision_encoder
    dtype = vision.neck.fpn_layers[0].proj1.weight.dtype
    # Mean and std 0.5 on 0..1, as the image processor's: 0..255 becomes -1..1.
    pixels = ((images.float() - 127.5) / 127.5).to(dtype)
    tokens = vision.backbone(pixels).last_hidden_state  # (I, h*w, D)
    grid = images.shape[-1] // vision.config.backbone_config.patch_size
    spatial = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    return {f"fpn_{i}": layer(spatial) for i, layer in enumerate(vision.neck.fpn_layers[:-1])}


def encode_texts(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Text features of prompts: (U, 32) ids and mask to (U, 32, C) fp32."""
    text = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    return text.pooler_output.float()


def predict_masks(outputs: Outputs, row: int, queries: torch.Tensor) -> torch.Tensor:
    """Mask logits (n,h,w) fp32 of chosen queries (n,) of one row, at the mask decoder's
    resolution."""
    pixels = outputs["pixel_embed"][row]
    embed = outputs["mask_embed"][row, queries].to(pixels.dtype)
    return torch.einsum("nc,chw->nhw", embed, pixels).float()


def _grid_position(model: nn.Module, coarse: torch.Tensor) -> torch.Tensor:
    """Sine position encoding of the coarsest level used, (1,C,h,w) fp32."""
    shape = torch.Size((1, *coarse.shape[1:]))
    return model.vision_encoder.neck.position_encoding(shape, coarse.device, torch.float32)


def _encode_detr(
    model: nn.Module,
    coarse: torch.Tensor,
    position: torch.Tensor,
    prompt: torch.Tensor,
    prompt_mask: torch.Tensor,
) -> torch.Tensor:
    """DETR encoder: image tokens conditioned on the prompt, (b, h*w, C)."""
    hidden = coarse.flatten(2).transpose(1, 2)
    pos = position.flatten(2).transpose(1, 2)
    for layer in model.detr_encoder.layers:
        hidden = layer(
            hidden,
            prompt_feats=prompt,
            vision_pos_encoding=pos,
            prompt_cross_attn_mask=prompt_mask[:, None, None, :],
        )
    return hidden


def inverse_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """log(x / (1 - x)) with both arguments of the quotient clipped from below at 1e-3."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=INVERSE_SIGMOID_EPS) / (1 - x).clamp(min=INVERSE_SIGMOID_EPS))


def _decode(
    model: nn.Module,
    memory: torch.Tensor,
    position: torch.Tensor,
    grid: tuple[int, int],
    prompt: torch.Tensor,
    prompt_mask: torch.Tensor,
    one_to_many: bool,
    autocast: Any,
) -> tuple[Outputs, torch.Tensor]:
    """DETR decoder: outputs of every layer, and the last layer's query states (b, Q or 2Q, C).

    With `one_to_many` the queries stand twice; the second half takes no part in self-attention.
    """
    decoder = model.detr_decoder
    count, queries = memory.shape[0], decoder.query_embed.num_embeddings
    copies = 2 if one_to_many else 1
    embed = decoder.query_embed.weight.repeat(copies, 1)
    hidden = torch.cat([decoder.presence_token.weight, embed])[None].expand(count, -1, -1)
    start = decoder.reference_points.weight.sigmoid().repeat(copies, 1)[None]
    # What the next layer reads, without a gradient; and the same with the graph that made it.
    reference = stored = start.expand(count, -1, -1)
    states, boxes, presence = [], [], []
    for layer in decoder.layers:
        hidden = _decoder_layer(
            layer,
            hidden,
            *_query_geometry(decoder, reference, grid),
            memory.float(),
            position,
            prompt,
            prompt_mask[:, None, None, :],
            1 + queries,
            autocast,
        )
        state = decoder.output_layer_norm(hidden[:, 1:])
        delta = decoder.box_head(state)
        boxes.append((inverse_sigmoid(stored) + delta).sigmoid())
        stored = (inverse_sigmoid(reference) + delta).sigmoid()
        reference = stored.detach()
        # Not clamped at +-10 as in the library, which would stop the gradient there.
        presence.append(decoder.presence_head(decoder.presence_layer_norm(hidden[:, 0]))[:, 0])
        states.append(state)
    logits = model.dot_product_scoring(torch.stack(states), prompt, prompt_mask).squeeze(-1)
    outputs = {"presence": torch.stack(presence)}
    halves = {"": slice(0, queries), "o2m_": slice(queries, None)}
    for prefix, half in list(halves.items())[:copies]:
        outputs[prefix + "logits"] = logits[:, :, half]
        outputs[prefix + "boxes_cxcywh"] = torch.stack([b[:, half] for b in boxes])
    return outputs, states[-1]


def _query_geometry(
    decoder: nn.Module, reference: torch.Tensor, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (b,1+q,C) of the tokens and their bias (b,heads,1+q,h*w) on the image's tokens.

    Both come from the boxes (b,q,4) that the layer reads; the presence token, first, has neither.
    """
    query_pos = decoder.ref_point_head(decoder.position_encoding.encode_boxes(reference))
    bias = decoder._get_rpb_matrix(reference, (int(grid[0]), int(grid[1])))
    return F.pad(query_pos, (0, 0, 1, 0)), F.pad(bias, (0, 0, 1, 0))


def _decoder_layer(
    layer: nn.Module,
    hidden: torch.Tensor,
    query_pos: torch.Tensor,
    bias: torch.Tensor,
    memory: torch.Tensor,
    position: torch.Tensor,
    prompt: torch.Tensor,
    prompt_mask: torch.Tensor,
    attending: int,
    autocast: Any,
) -> torch.Tensor:
    """One decoder layer; only the first `attending` tokens take part in self-attention."""
    head, rest = hidden[:, :attending], hidden[:, attending:]
    query = head + query_pos[:, :attending]
    with autocast():
        attended, _ = layer.self_attn(query=query, key=query, value=head)
        head = head + layer.self_attn_dropout(attended)
        hidden = layer.self_attn_layer_norm(torch.cat([head, rest], dim=1))
        attended, _ = layer.text_cross_attn(
            query=hidden + query_pos, key=prompt, value=prompt, attention_mask=prompt_mask
        )
        hidden = hidden + layer.text_cross_attn_dropout(attended)
        hidden = layer.text_cross_attn_layer_norm(hidden)
        attended, _ = layer.vision_cross_attn(
            query=hidden + query_pos, key=memory + position, value=memory, attention_mask=bias
        )
        hidden = hidden + layer.vision_cross_attn_dropout(attended)
        hidden = layer.vision_cross_attn_layer_norm(hidden).float()
    # As in Meta's decoder the feed-forward stays in fp32.
    hidden = hidden + layer.mlp_dropout(layer.mlp(hidden))
    return layer.mlp_layer_norm(hidden)
