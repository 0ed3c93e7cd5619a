"""What each publisher calls the tensors that `model` calls otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How a publisher calls the tensors; the names within a block are the same in both towers."""

    image: Mapping[str, str]
    text: Mapping[str, str]
    image_blocks: str
    text_blocks: str
    block: Mapping[str, tuple[str, ...]]  # several are stacked
    projections_transposed: bool


def _with_biases(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        f"{ours}.{part}": tuple(f"{name}.{part}" for name in theirs)
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }


OPENAI = Naming(
    image={
        "patches.weight": "visual.conv1.weight",
        "class_token": "visual.class_embedding",
        "positions": "visual.positional_embedding",
        "norm_pre.weight": "visual.ln_pre.weight",
        "norm_pre.bias": "visual.ln_pre.bias",
        "norm_post.weight": "visual.ln_post.weight",
        "norm_post.bias": "visual.ln_post.bias",
        "projection.weight": "visual.proj",
    },
    text={
        "tokens": "token_embedding.weight",
        "positions": "positional_embedding",
        "norm_post.weight": "ln_final.weight",
        "norm_post.bias": "ln_final.bias",
        "projection.weight": "text_projection",
    },
    image_blocks="visual.transformer.resblocks.",
    text_blocks="transformer.resblocks.",
    block=_with_biases(
        {
            "norm_1": ("ln_1",),
            "out": ("attn.out_proj",),
            "norm_2": ("ln_2",),
            "widen": ("mlp.c_fc",),
            "narrow": ("mlp.c_proj",),
        }
    )
    | {"qkv.weight": ("attn.in_proj_weight",), "qkv.bias": ("attn.in_proj_bias",)},
    projections_transposed=True,
)
TRANSFORMERS = Naming(
    image={
        "patches.weight": "vision_model.embeddings.patch_embedding.weight",
        "class_token": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "norm_pre.weight": "vision_model.pre_layrnorm.weight",
        "norm_pre.bias": "vision_model.pre_layrnorm.bias",
        "norm_post.weight": "vision_model.post_layernorm.weight",
        "norm_post.bias": "vision_model.post_layernorm.bias",
        "projection.weight": "visual_projection.weight",
    },
    text={
        "tokens": "text_model.embeddings.token_embedding.weight",
        "positions": "text_model.embeddings.position_embedding.weight",
        "norm_post.weight": "text_model.final_layer_norm.weight",
        "norm_post.bias": "text_model.final_layer_norm.bias",
        "projection.weight": "text_projection.weight",
    },
    image_blocks="vision_model.encoder.layers.",
    text_blocks="text_model.encoder.layers.",
    block=_with_biases(
        {
            "norm_1": ("layer_norm1",),
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "out": ("self_attn.out_proj",),
            "norm_2": ("layer_norm2",),
            "widen": ("mlp.fc1",),
            "narrow": ("mlp.fc2",),
        }
    ),
    projections_transposed=False,
)

# What the publishers' programs store beside the weights and compute anew.
NO_WEIGHT = re.compile(r"(.*\.)?(position_ids|attn_mask|input_resolution|context_length|vocab_size)")
