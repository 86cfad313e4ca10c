"""Tiny configurations of every model type of transformers: the default one, its sizes made small by the fields' names.

One scale holds for all: a width is 32, which 4 heads of 8 share, so that towers and what joins them fit together.
What no rule can know is a row of ``overrides.py``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from overrides import CONFIGS
from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTH, HEADS, VOCABULARY = 32, 4, 96
LAYERS = re.compile(r"(?!num_feat)(\w+_)?(num_(\w+_)?layers|n_layers?|layers|depth|num_blocks)")
NUMBERS: tuple[tuple[str, int], ...] = (
    # the first that matches the whole name decides; no field grows
    (LAYERS.pattern, 2),
    (r"(\w+_)?vocab_size|num_embeddings|\w*vocabulary_size", VOCABULARY),
    (r"\w*codebook_size", 64),
    (r"(\w+_)?((key_value|kv)_heads|multi_query_group_num|num_kv_\w+)", 2),
    (r"(\w+_)?(num_(\w+_)?heads|n_heads?|attention_heads)", HEADS),
    (r"qk_head_dim", 16),
    (r"\w*(head_dim|dim_head|head_size|head_width)|d_kv|d_head|kv_channels", WIDTH // HEADS),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(\w+_)?experts", 4),
    (r"n_group|topk_groups?|num_expert_group|(\w+_)?n_groups", 1),
    (r"(\w+_)?(experts_per_tok(en)?|top_?k\w*|k_experts|moe_k)", 2),
    (r"rotary_dim", 4),
    (r"upsample_groups", WIDTH),
    (r"(\w+_)?(intermediate_(size|dim)|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|d_inner|inner_dim|n_inner)(\w*)", 48),
    (r"(\w+_)?(ffn?_?(dim|size)|feed_?forward_\w+|ffn_\w+_size)", 48),
    (r"\w*_rank", 8),
    (
        r"(\w+_)?(hidden_size|d_model|n_embd|embed_dim|embedding_(size|dim)|emb_dim|hidden_dim|embed_size|d_embed)",
        WIDTH,
    ),
    (r"(\w+_)?(projection_dim|projection_size|proj_dim|latent_dim|output_dim|out_dim|model_dim|codevector_dim)", WIDTH),
    (r"hidden_size_\w+|dim|d_latents|projector_hidden_\w+|pooler_output_size|\w+_hidden_size", WIDTH),
    (r"(\w+_)?(max_position_embeddings|n_positions|max_(source|target)_positions|max_seq(uence)?_len\w*)", 128),
    (r"model_max_length|n_ctx|seq_length|max_2d_position_embeddings|max_text_len", 128),
    (r"(\w+_)?image_size|crop_size", 32),
    (r"(\w+_)?patch_size|num_frames|frames_per_clip", 4),
    (r"\w*mel_bins", 16),
    (r"(\w+_)?(state_size|d_state)", 4),
    (r"(\w+_)?(sliding_window|attention_window|window_length|local_attention|attention_chunk_size)", 8),
    (r"num_query_tokens|\w*num_latents|n_latents|num_queries", 6),
)
STAGES = re.compile(r"(\w+_)?(depths?|layers_per_block|num_blocks|stage_num_blocks|num_(\w+_)?(layers|blocks))")
WIDTHS = re.compile(r"(\w+_)?(hidden_sizes?|embed_dims?|out_channels|channels|dims?|widths|conv_dim|embed_dim)")
TOKEN = re.compile(
    r"(\w+_)?(token_(id|index)|start_token|end_token|_token|_idx)|(bos|eos|pad|unk|mask|sep|cls|lang)_(id|index)"
)
RANDOM = re.compile(r"\w*(dropout|drop_?path|layerdrop|drop_rate|pdrop)\w*|\w+_drop|mask_(time|feature)_prob")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The smallest configuration of a type that is still one of its kind."""
    own = CONFIGS.get(model_type, {})
    kind = CONFIG_MAPPING[model_type]
    return kind(**merged(small(kind(**own.get("from", {})).to_dict()), own.get("with", {})))


def merged(fields: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with those of `own` put in, at any depth; ``...`` takes a field out."""
    for name, value in own.items():
        if isinstance(value, Mapping) and isinstance(fields.get(name), dict):
            merged(fields[name], value)
        elif value is ...:
            fields.pop(name, None)
        else:
            fields[name] = value
    return fields


def small(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config, and of those inside it, made small."""
    layers = next((value for name, value in fields.items() if LAYERS.fullmatch(name) and type(value) is int), 0)
    layers = 0 if "depths" in fields else layers  # they are stages then
    by_layer = [value for value in fields.values() if isinstance(value, list) and len(value) == layers > 3]
    kept = kinds_of_layers(by_layer, fields.get("out_features") or ())
    shrunk = {name: small_field(name, value, layers, kept) for name, value in fields.items() if name != "stage_names"}
    if fields.get("num_key_value_heads") == fields.get("num_attention_heads"):
        shrunk["num_key_value_heads"] = shrunk.get("num_attention_heads")
    return {name: value for name, value in shrunk.items() if name in fields}


def small_field(name: str, value: Any, layers: int, kept: list[int]) -> Any:
    """One field; `kept`: of the `layers` those that stay."""
    if name == "per_layer_config" and value:
        return {kept.index(int(layer)): small(own) for layer, own in value.items() if int(layer) in kept}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and name != "label2id":
        return small(value) | ({"mrope_section": [2, 1, 1]} if "rope_type" in value else {})
    if isinstance(value, list) and len(value) == layers > 3 and not STAGES.fullmatch(name):
        return [value[index] for index in kept]
    if name in ("out_features", "_out_features") and value and layers > 3:
        return [f"stage{stage}" for stage in range(len(kept) - len(value) + 1, len(kept) + 1)]
    if name in ("out_indices", "_out_indices") and value and layers > 3:
        return list(range(len(kept) - len(value) + 1, len(kept) + 1))
    if isinstance(value, (list, tuple)) and value and all(type(entry) is int for entry in value):
        return small_list(name, list(value))
    if RANDOM.fullmatch(name) and isinstance(value, float):
        return 0.0
    if type(value) is int and LAYERS.fullmatch(name):
        return len(kept) if value == layers else min(value, 2)
    return small_number(name, value) if type(value) is int else value


def kinds_of_layers(by_layer: list[list[Any]], stages: Sequence[str]) -> list[int]:
    """The first layer of each kind, where lists say of which kind each is; two at least, and one for each stage."""
    seen: dict[str, int] = {}
    for index, kind in enumerate(zip(*by_layer, strict=True)):
        seen.setdefault(str(kind), index)
    found = list(seen.values())[:4]
    return found if len(found) > max(1, len(stages) - 1) else list(range(max(2, len(stages))))


def small_number(name: str, value: int) -> int:
    """The number that the rules have for a field."""
    if TOKEN.fullmatch(name):
        return value if value < VOCABULARY else VOCABULARY - 1 - sum(map(ord, name)) % 40
    limit = next((limit for pattern, limit in NUMBERS if re.fullmatch(pattern, name)), value)
    return min(value, limit)


def small_list(name: str, values: list[int]) -> list[int]:
    """One number for each stage: widths keep their ratio, depths become one."""
    if STAGES.fullmatch(name):
        return [1] * len(values)
    if "heads" in name:
        return [value // math.gcd(*values) for value in values]
    if WIDTHS.fullmatch(name) and min(values) >= 16:
        unit = math.gcd(*values)
        return [value // unit * min(unit, 8) for value in values] if unit >= 8 else values
    return values
