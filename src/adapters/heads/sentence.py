"""The vector that stands for a whole sequence, as each kind of architecture has it."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
)
from transformers.utils.generic import ModelOutput

Position = Literal["first", "last", "end", "pooled"]

# Architectures that the rule in sentence_position does not read: BEiT pools inside the base model and has no usable
# first token; BertGeneration is an encoder without a masked-LM class.
EXCEPTIONS: dict[str, Position] = {"beit": "pooled", "bert-generation": "first"}


SCALED_IF_TIED = ("umt5", "switch_transformers")


def scales_for_heads(config: PreTrainedConfig) -> bool:
    """Whether the architecture multiplies what its language model's head reads by d^-0.5: T5's relatives."""
    fields = vars(config)
    tied = config.model_type in SCALED_IF_TIED and fields.get("tie_word_embeddings")
    return bool(fields.get("scale_decoder_outputs") or tied)


def sentence_position(config: PreTrainedConfig) -> Position:
    """Where the vector is: encoders ``first`` token, decoders ``last`` token, encoder-decoders last ``end`` token."""
    if config.model_type in EXCEPTIONS:
        return EXCEPTIONS[config.model_type]
    if config.is_encoder_decoder:
        return "end"
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return "last" if causal and kind not in MODEL_FOR_MASKED_LM_MAPPING else "first"


def sentence_vector(outputs: ModelOutput, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The sentence vectors, ``(b, d)``, from the base model's output and the inputs of the forward pass.

    The last token is the last one that is no padding, wherever the padding stands. An encoder-decoder that is not
    given decoder inputs reads its own input shifted by one, so the input's last ``<eos>`` marks the position.
    """
    hidden: torch.Tensor = outputs[0]
    rows = torch.arange(len(hidden), device=hidden.device)
    vectors: torch.Tensor
    match sentence_position(config):
        case "first":
            vectors = hidden[:, 0]
        case "last":
            vectors = hidden[rows, _last_token(hidden, config.get_text_config(), inputs)]
        case "end":
            vectors = hidden[rows, _last_end(hidden, config.get_text_config(), inputs)]
        case "pooled":
            vectors = outputs["pooler_output"]
    return vectors


def _last_token(hidden: torch.Tensor, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> torch.Tensor:
    length = hidden.shape[1]
    tokens: torch.Tensor | None = inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    if tokens is not None and config.pad_token_id is not None:
        return _last(tokens != config.pad_token_id)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        mask = mask[:, -length:]  # with a cache the mask covers the past as well
        return _last(mask != 0) + (length - mask.shape[1])
    return torch.full((len(hidden),), length - 1, device=hidden.device)


def _last_end(hidden: torch.Tensor, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> torch.Tensor:
    length = hidden.shape[1]
    for name in ("input_ids", "decoder_input_ids"):
        tokens = inputs.get(name)
        if tokens is not None and tokens.shape[1] == length:
            ends = _is_any(tokens, config.eos_token_id)
            return torch.where(ends.any(dim=1), _last(ends), _last(~_is_any(tokens, config.pad_token_id)))
    mask = inputs.get("decoder_attention_mask")
    return _last(torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask)


def _last(marks: torch.Tensor) -> torch.Tensor:
    """Index of each row's last non-zero mark; the last index where a row has none."""
    return marks.shape[1] - 1 - marks.flip(1).ne(0).int().argmax(dim=1)


def _is_any(tokens: torch.Tensor, special: int | list[int] | None) -> torch.Tensor:
    """Where the tokens are the special one or one of several; nowhere without one."""
    if special is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    return torch.isin(tokens, torch.as_tensor(special, device=tokens.device))
