"""Our forward over the sub-modules of `transformers.Sam3Model`.

`Sam3Model.forward` runs the vision tower once per prompt, gives the last decoder layer only and
always draws every query's mask. Training needs the tower once per image, each distinct prompt's
text once, every layer's outputs, and masks for matched queries alone. The sums are the same (tests
hold them and their gradients equal):

    images (I,3,S,S) -> ViT -> trunk (I,h,w,D) -> neck -> fpn (I,C,h,w) x 3 -[image_index]-.
    texts (U)        -> CLIP -> text (U,32,C) -----------------------------[text_index]----+
    no box           -> geometry encoder -> geometry (I,1,C) --------------[image_index]---+-> B
    boxes (B,N,4)    -> geometry encoder -> (B,N+1,C) -------------------------------------' rows
                                                        -> DETR encoder -> memory (B,h*w,C) -> heads

A batch may bring `trunk`, `memory` and what else comes of frozen parts (see features.py): it is not
computed then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sam3_lora.model import image_size, num_queries, tokenize

# Label of a padding box in `input_boxes_labels` (transformers modeling_sam3.py).
PADDING_BOX = -10
# Clip of the argument of the inverse sigmoid (transformers modeling_sam3.py, `inverse_sigmoid`).
INVERSE_SIGMOID_EPS = 1e-3
# The word SAM 3 was trained to read with a box exemplar and no text.
VISUAL_PROMPT = "visual"

# The attributes of the model that read a prompt's text.
TEXT = ("text_encoder", "text_projection")
# What a batch may bring of frozen parts, already computed.
CACHED = ("trunk", "fpn_0", "fpn_1", "memory", "geometry")
# What a batch has for each row.
PER_ROW = ("image_index", "box_prompts_cxcywh", "box_prompt_labels")

Outputs = dict[str, torch.Tensor]


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
        checkpointing: what is computed again in the backward pass instead of kept: `off`, `mlp`
            (the ViT's MLPs, a third of its activations) or `full` (every layer of ViT, neck, DETR
            and pixel decoder).
        compiled: run vision tower and heads through `torch.compile`.
        texts: features (32,C) and masks (32,) of prompts that a frozen text encoder has read.
    """

    model: nn.Module
    tokenizer: Any
    geometry_cls: str = "meta"
    dtype: torch.dtype = torch.float32
    one_to_many: bool = False
    masks: bool = True
    checkpointing: str = "off"
    compiled: bool = False
    texts: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.compiled:
            self._see, self._heads = torch.compile(self._see), torch.compile(self._heads)
        for layer in self.model.vision_encoder.backbone.layers:
            # Another `Forward` of the model may have put its own there.
            layer.mlp.__dict__.pop("forward", None)
            if self.checkpointing == "mlp":
                layer.mlp.forward = partial(_recompute, layer.mlp.forward)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.detr_decoder.query_embed.weight.device

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the image's tokens."""
        config = self.model.vision_encoder.config.backbone_config
        return (image_size(self.model) // config.patch_size,) * 2

    def _position(self) -> torch.Tensor:
        """Sine position encoding of the image's tokens, (1,C,h,w) fp32."""
        shape = torch.Size((1, self.model.detr_decoder.query_embed.embedding_dim, *self.grid))
        neck = self.model.vision_encoder.neck
        return neck.position_encoding(shape, self.device, torch.float32)

    def __call__(self, batch: dict[str, Any]) -> Outputs:
        """All rows of a batch at once: `predict` after `encode`."""
        return self.predict(self.encode(batch), batch, slice(None))

    def encode(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Vision features of the images and text features of the distinct prompts.

        Args:
            batch: `texts`, a list of B prompts, and `images` (I,3,S,S) uint8 or, of frozen parts,
                `trunk` (I,h,w,D); or `memory` (B,h*w,C), `geometry` (I,1,C) under `meta` and, for
                masks, `trunk` or `fpn_0` and `fpn_1`.

        Returns:
            `fpn_2` (I,C,h,w) and, for masks, `fpn_1` (I,C,2h,2w), `fpn_0` (I,C,4h,4w); `text`
            (U,32,C) fp32; `text_mask` (U,32) bool; `text_index` (B,) long, row -> distinct prompt;
            `geometry` (I,1,C) of prompts without boxes under `meta`; the batch's `memory`, if any.
        """
        names = (*CACHED, "images")
        given = {k: batch[k].to(self.device, non_blocking=True) for k in names if k in batch}
        features = self._text_features(batch["texts"])
        features |= {k: given[k] for k in CACHED[1:] if k in given}
        if "memory" in given and ("fpn_0" in given or not self.masks):
            return features
        boxed = batch.get("box_prompts_cxcywh") is not None
        wants_token = self.geometry_cls == "meta" and not boxed and "geometry" not in given
        images = given.get("trunk", given.get("images"))
        groups = self._groups(images, "vision_encoder")
        parts = [self._see(group, "trunk" in given, wants_token) for group in groups]
        return features | {k: _join([part[k] for part in parts]) for k in parts[0]}

    def _see(self, images: torch.Tensor, is_trunk: bool, token: bool) -> dict[str, torch.Tensor]:
        """Levels and, if wanted, geometry token of images (I,3,S,S) or of their trunk."""
        levels = self._neck(images if is_trunk else self.encode_trunk(images))
        return levels | ({"geometry": self._geometry_token(levels["fpn_2"])} if token else {})

    def encode_trunk(self, images: torch.Tensor) -> torch.Tensor:
        """The ViT.

        Args:
            images: (I,3,S,S) uint8, S the model's image size.

        Returns:
            (I,h,w,D), h = w = S / 14, in the dtype of the tower's weights.
        """
        backbone = self.model.vision_encoder.backbone
        pixels = normalize(images)
        hidden = backbone.embeddings(pixels.to(backbone.layer_norm.weight.dtype))  # (I, h*w, D)
        hidden = backbone.layer_norm(hidden.unflatten(1, self.grid))
        for layer in backbone.layers:
            hidden = self._layer(layer)(hidden)
        return hidden

    def _neck(self, trunk: torch.Tensor) -> dict[str, torch.Tensor]:
        """The levels that are read: never the coarsest, the two finest for masks only."""
        spatial = trunk.permute(0, 3, 1, 2)  # (I,D,h,w)
        layers = self.model.vision_encoder.neck.fpn_layers
        levels = range(3) if self.masks else (2,)
        return {f"fpn_{i}": self._layer(layers[i])(spatial) for i in levels}

    def _layer(self, layer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A layer, or one whose activations are computed again in the backward pass."""
        return partial(_recompute, layer) if self.checkpointing == "full" else layer

    def _groups(self, tensor: torch.Tensor, component: str) -> Sequence[torch.Tensor]:
        """What goes through a component together: all; on a CPU, in training, what is frozen goes
        one by one. Then no bit depends on what stands beside, as none does in features.py."""
        alone = self.device.type == "cpu" and torch.is_grad_enabled()
        return tensor.split(1) if alone and self.is_frozen(component) else (tensor,)

    def is_frozen(self, *components: str) -> bool:
        """Whether no parameter of these attributes of the model is trained."""
        modules = (getattr(self.model, name) for name in components)
        return not any(p.requires_grad for module in modules for p in module.parameters())

    def _text_features(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """`text`, `text_mask`, `text_index` of a batch's prompts."""
        distinct = list(dict.fromkeys(texts))
        position = {text: index for index, text in enumerate(distinct)}
        if self.is_frozen(*TEXT):
            self.remember_texts(distinct)
            text, mask = (torch.stack(t) for t in zip(*map(self.texts.get, distinct), strict=True))
        else:
            text, mask = self._read_texts(distinct)
        index = torch.tensor([position[text] for text in texts]).to(self.device, non_blocking=True)
        return {"text": text, "text_mask": mask, "text_index": index}

    def _read_texts(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text encoder: features (U,32,C) fp32 and masks (U,32) bool."""
        if self.model.text_encoder.device.type == "meta":
            raise RuntimeError(f"the text encoder was released before it had read {texts}")
        ids, mask = (t.to(self.device) for t in tokenize(self.tokenizer, texts))
        # A token sees those before it. Given the mask (U,32) alone the library reads a value of it.
        seen = mask.new_ones(mask.shape[1:] * 2).tril().bool() & mask.bool()[:, None, None, :]
        text = self.model.get_text_features(input_ids=ids, attention_mask=seen)
        return text.pooler_output.float(), mask.bool()

    @torch.no_grad()
    def remember_texts(self, texts: Sequence[str]) -> None:
        """Reads prompts that were not read before.

        One at a time: what a prompt becomes must not depend, to the last bit, on those beside it.
        """
        for text in dict.fromkeys(texts):
            if text not in self.texts:
                features, mask = self._read_texts([text])
                self.texts[text] = features[0], mask[0]

    def release_text_encoder(self, texts: Sequence[str]) -> None:
        """Reads all prompts there will be and frees the text encoder's weights, 0.7 GB in bf16.

        Without effect where the text encoder is trained. Its modules stay, on the meta device.
        """
        if self.is_frozen(*TEXT):
            self.remember_texts(texts)
            self.model.text_encoder.to("meta")

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
        return self._heads(self._rows(features, batch, rows))

    def _rows(
        self, features: dict[str, torch.Tensor], batch: dict[str, Any], rows: slice
    ) -> dict[str, torch.Tensor]:
        """Features, and what belongs to rows of some of them."""
        given = {k: batch[k] for k in PER_ROW if batch.get(k) is not None}
        given |= {k: features[k] for k in ("text_index", "memory") if k in features}
        return features | {k: v[rows].to(self.device, non_blocking=True) for k, v in given.items()}

    def _heads(self, inputs: dict[str, torch.Tensor]) -> Outputs:
        """All after the vision tower, from what `_rows` gives."""
        memory, prompt, prompt_mask = self._fuse(inputs)
        outputs, states = self._decode(memory, prompt, prompt_mask)
        if self.masks:
            outputs |= self._mask_outputs(states, inputs, memory, prompt, prompt_mask)
        return outputs

    def fuse(
        self, features: dict[str, torch.Tensor], batch: dict[str, Any], rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image and prompt of some rows, as the decoder reads them; arguments as for `predict`.

        Returns:
            The DETR encoder's memory (b,h*w,C), prompt tokens (b,n,C), their mask (b,n) bool.
        """
        return self._fuse(self._rows(features, batch, rows))

    def _fuse(
        self, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`fuse`, from what `_rows` gives."""
        prompt = inputs["text"].index_select(0, inputs["text_index"])
        prompt_mask = inputs["text_mask"].index_select(0, inputs["text_index"])
        coarse = None
        if "fpn_2" in inputs:  # (b,C,h,w); sums gradients in fp32
            coarse = inputs["fpn_2"].float().index_select(0, inputs["image_index"])
        if "geometry" in inputs:
            token = inputs["geometry"].index_select(0, inputs["image_index"])
            prompt = torch.cat([prompt, token], dim=1)
            prompt_mask = F.pad(prompt_mask, (0, 1), value=True)
        elif "box_prompts_cxcywh" in inputs:
            boxes, labels = inputs["box_prompts_cxcywh"], inputs["box_prompt_labels"]
            tokens, mask = self._read_boxes(boxes, labels, coarse)
            prompt = torch.cat([prompt, tokens], dim=1)
            prompt_mask = torch.cat([prompt_mask, mask], dim=1)
        if "memory" in inputs:
            return inputs["memory"], prompt, prompt_mask
        groups = (self._groups(t, "detr_encoder") for t in (coarse, prompt, prompt_mask))
        memory = _join([self._encode_detr(*group) for group in zip(*groups, strict=True)])
        return memory, prompt, prompt_mask

    def _autocast(self) -> torch.autocast:
        """Mixed precision for the DETR and mask heads; off in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _geometry_token(self, coarse: torch.Tensor) -> torch.Tensor:
        """The geometry encoder's answer (I,1,C) to an image (I,C,h,w) without boxes: its CLS token.

        The library reads it beside a masked padding box, and a value from the GPU to find the mask.
        """
        encoder, image = self.model.geometry_encoder, coarse.float().flatten(2).transpose(1, 2)
        token = encoder.prompt_layer_norm(encoder.final_proj(encoder.cls_embed.weight))
        hidden = token.expand(len(coarse), 1, -1)
        position = self._position().flatten(2).transpose(1, 2)
        for layer in encoder.layers:
            hidden = layer(hidden, image, position.expand_as(image), None)
        return encoder.output_layer_norm(hidden)

    def _read_boxes(
        self, boxes: torch.Tensor, labels: torch.Tensor, coarse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Geometry encoder: tokens (b,N+1,C) and a mask (b,N+1), True for a real one."""
        valid = labels != PADDING_BOX
        geometry = self.model.geometry_encoder(
            box_embeddings=boxes.float(),
            box_mask=valid,
            box_labels=labels.clamp(min=0),
            img_feats=(coarse,),
            img_pos_embeds=(self._position().expand_as(coarse),),
        )
        mask = geometry.attention_mask
        if self.geometry_cls == "hf":
            mask = mask & valid.any(1, keepdim=True)
        return geometry.last_hidden_state, mask

    def _encode_detr(
        self, coarse: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor
    ) -> torch.Tensor:
        """DETR encoder: image tokens conditioned on the prompt, (b, h*w, C)."""
        hidden = coarse.flatten(2).transpose(1, 2)
        with self._autocast():
            for layer in self.model.detr_encoder.layers:
                hidden = self._layer(layer)(
                    hidden,
                    prompt_feats=prompt,
                    vision_pos_encoding=self._position().flatten(2).transpose(1, 2),
                    prompt_cross_attn_mask=prompt_mask[:, None, None, :],
                )
        return hidden

    def _mask_outputs(
        self,
        states: torch.Tensor,
        inputs: dict[str, torch.Tensor],
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
            pixels = memory.transpose(1, 2).unflatten(2, self.grid)  # (b,C,h,w)
            # The third convolution of the published weights has no level to work on.
            for number, name in enumerate(("fpn_1", "fpn_0")):
                fine = inputs[name].index_select(0, inputs["image_index"])
                pixels = self._layer(self._pixel_layer)(number, pixels, fine)
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

    def _pixel_layer(self, number: int, pixels: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        """One level of the pixel decoder: (b,C,h,w) and a level (b,C,2h,2w) to (b,C,2h,2w)."""
        decoder = self.model.mask_decoder.pixel_decoder
        pixels = F.interpolate(pixels, size=fine.shape[-2:], mode="nearest")
        return F.relu(decoder.norms[number](decoder.conv_layers[number](pixels + fine)))

    def _decode(
        self, memory: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor
    ) -> tuple[Outputs, torch.Tensor]:
        """DETR decoder: outputs of every layer, and the last layer's query states (b, Q or 2Q, C).

        With `one_to_many` the queries stand twice; the second half takes no part in self-attention.
        """
        decoder = self.model.detr_decoder
        count, queries = memory.shape[0], decoder.query_embed.num_embeddings
        copies = 2 if self.one_to_many else 1
        embed = decoder.query_embed.weight.repeat(copies, 1)
        hidden = torch.cat([decoder.presence_token.weight, embed])[None].expand(count, -1, -1)
        start = decoder.reference_points.weight.sigmoid().repeat(copies, 1)[None]
        # What the next layer reads, without a gradient; and the same with the graph that made it.
        reference = stored = start.expand(count, -1, -1)
        memory = memory.float()
        keys = memory + self._position().flatten(2).transpose(1, 2)
        attended = keys, memory, prompt, prompt_mask[:, None, None, :]
        states, boxes, presence = [], [], []
        for layer in decoder.layers:
            hidden = self._layer(self._decoder_layer)(layer, hidden, reference, *attended)
            state = decoder.output_layer_norm(hidden[:, 1:])
            delta = decoder.box_head(state)
            boxes.append((inverse_sigmoid(stored) + delta).sigmoid())
            stored = (inverse_sigmoid(reference) + delta).sigmoid()
            reference = stored.detach()
            # Not clamped at +-10 as in the library, which would stop the gradient there.
            presence.append(decoder.presence_head(decoder.presence_layer_norm(hidden[:, 0]))[:, 0])
            states.append(state)
        logits = self.model.dot_product_scoring(torch.stack(states), prompt, prompt_mask)
        outputs = {"presence": torch.stack(presence)}
        halves = {"": slice(0, queries), "o2m_": slice(queries, None)}
        for prefix, half in list(halves.items())[:copies]:
            outputs[prefix + "logits"] = logits.squeeze(-1)[:, :, half]
            outputs[prefix + "boxes_cxcywh"] = torch.stack([b[:, half] for b in boxes])
        return outputs, states[-1]

    def _decoder_layer(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        reference: torch.Tensor,
        keys: torch.Tensor,
        memory: torch.Tensor,
        prompt: torch.Tensor,
        prompt_mask: torch.Tensor,
    ) -> torch.Tensor:
        """One decoder layer (b,1+q,C); only the presence token and the first Q queries take part
        in self-attention."""
        query_pos, bias = self._query_geometry(reference)
        attending = 1 + num_queries(self.model)
        head, rest = hidden[:, :attending], hidden[:, attending:]
        query = head + query_pos[:, :attending]
        with self._autocast():
            attended, _ = layer.self_attn(query=query, key=query, value=head)
            head = head + layer.self_attn_dropout(attended)
            hidden = layer.self_attn_layer_norm(torch.cat([head, rest], dim=1))
            attended, _ = layer.text_cross_attn(
                query=hidden + query_pos, key=prompt, value=prompt, attention_mask=prompt_mask
            )
            hidden = hidden + layer.text_cross_attn_dropout(attended)
            hidden = layer.text_cross_attn_layer_norm(hidden)
            attended, _ = layer.vision_cross_attn(
                query=hidden + query_pos, key=keys, value=memory, attention_mask=bias
            )
            hidden = hidden + layer.vision_cross_attn_dropout(attended)
            hidden = layer.vision_cross_attn_layer_norm(hidden).float()
        # As in Meta's decoder the feed-forward stays in fp32.
        hidden = hidden + layer.mlp_dropout(layer.mlp(hidden))
        return layer.mlp_layer_norm(hidden)

    def _query_geometry(self, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (b,1+q,C) of the tokens and their bias (b,heads,1+q,h*w) on the image's tokens.

        Both come from the boxes (b,q,4) that the layer reads; the presence token, first, has
        neither.
        """
        decoder = self.model.detr_decoder
        query_pos = decoder.ref_point_head(decoder.position_encoding.encode_boxes(reference))
        bias = decoder._get_rpb_matrix(reference, self.grid)
        return F.pad(query_pos, (0, 0, 1, 0)), F.pad(bias, (0, 0, 1, 0))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Pixels 0 to 255 as -1 to 1, fp32: mean and std 0.5, as the image processor's."""
    return (images.float() - 127.5) / 127.5


def predict_masks(outputs: Outputs, row: int, queries: torch.Tensor) -> torch.Tensor:
    """Masks of some queries, at the mask decoder's resolution.

    Args:
        outputs: of `Forward.predict`.
        row: which of its rows.
        queries: (n,) long.

    Returns:
        Logits (n,h,w), fp32.
    """
    pixels = outputs["pixel_embed"][row]
    embed = outputs["mask_embed"][row, queries].to(pixels.dtype)
    return torch.einsum("nc,chw->nhw", embed, pixels).float()


def inverse_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """log(x / (1 - x)) with both arguments of the quotient clipped from below at 1e-3."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=INVERSE_SIGMOID_EPS) / (1 - x).clamp(min=INVERSE_SIGMOID_EPS))


def _recompute(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Calls a function whose activations are computed again in the backward pass, not kept."""
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor again of what went through a component in groups."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
