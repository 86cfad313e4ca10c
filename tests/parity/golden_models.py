"""Tiny base models and inputs of the goldens, made by transformers 4.57 (run by ``make_goldens.py`` only)."""

import zlib

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

LENGTHS = (7, 5, 3)
VOCABULARY = 60

MODEL_TYPES = {"t5_unbiased": "t5"}
CONFIGS: dict[str, dict[str, object]] = {
    "bert": {"intermediate_size": 37, "max_position_embeddings": 24},
    "roberta": {"intermediate_size": 37, "max_position_embeddings": 24},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37, "max_position_embeddings": 24},
    "albert": {"intermediate_size": 37, "max_position_embeddings": 24, "embedding_size": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 24, "pad_token_id": 0},
    "llama": {"intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 24, "pad_token_id": 0},
    "mistral": {"intermediate_size": 40, "num_key_value_heads": 2, "sliding_window": 4, "pad_token_id": 0},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "max_position_embeddings": 24}
    | {f"{stack}_layers": 2 for stack in ("encoder", "decoder")}
    | {f"{stack}_ffn_dim": 40 for stack in ("encoder", "decoder")}
    | {f"{stack}_attention_heads": 4 for stack in ("encoder", "decoder")},
    "vit": {"image_size": 8, "patch_size": 4, "intermediate_size": 37},
}
CONFIGS["mt5"] = CONFIGS["t5_unbiased"] = CONFIGS["t5"]
SPECIAL_TOKENS = {"gpt2": {"bos_token_id": 1, "eos_token_id": 2}}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def generator(name: str) -> torch.Generator:
    """A random stream that depends on nothing but the name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


@torch.no_grad()
def disturb(parameters: dict[str, torch.Tensor], name: str, scale: float = 0.2) -> None:
    """Adds noise to tensors, so that nothing stays at its start; multiples of 1/32 because they compress well."""
    source = generator(name)
    for _, parameter in sorted(parameters.items()):
        noise = torch.randn(parameter.shape, generator=source) * scale
        parameter.copy_(torch.round((parameter + noise) * 32) / 32)


def model_config(architecture: str) -> PretrainedConfig:
    """The smallest config of an architecture that still has every kind of site."""
    shape = {} if architecture in ("distilbert", "gpt2", "t5", "mt5", "t5_unbiased", "bart") else SHAPE
    tokens = {} if architecture == "vit" else {"vocab_size": VOCABULARY} | SPECIAL_TOKENS.get(architecture, {})
    return AutoConfig.for_model(MODEL_TYPES.get(architecture, architecture), **shape, **tokens, **CONFIGS[architecture])


def base_model(architecture: str) -> PreTrainedModel:
    """A random model in evaluation mode with no parameter at its start value."""
    torch.manual_seed(0)
    model = AutoModel.from_config(model_config(architecture)).eval()
    disturb(dict(model.named_parameters()), architecture)
    if architecture == "t5_unbiased":
        for stack in (model.encoder, model.decoder):
            torch.nn.init.zeros_(stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    return model


def _tokens(config: PretrainedConfig, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with the end token last in each row, unpadded, and the mask of the right-padded rows."""
    tokens = torch.randint(5, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=source)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    if config.eos_token_id is not None:
        tokens[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = config.eos_token_id
    return tokens, mask


def model_inputs(architecture: str) -> dict[str, dict[str, torch.Tensor]]:
    """The inputs that all cases of an architecture share, by name."""
    source, config = generator(f"inputs of {architecture}"), model_config(architecture)
    if architecture == "vit":
        pixels = {"pixel_values": torch.randn((3, 3, 8, 8), generator=source).bfloat16().float()}
        return dict.fromkeys(("plain", "classify", "tasks"), pixels)
    tokens, mask = _tokens(config, source)
    padding = config.pad_token_id or 0
    right = {"input_ids": torch.where(mask.bool(), tokens, padding), "attention_mask": mask}
    left = {
        name: torch.stack([row.roll(max(LENGTHS) - length) for row, length in zip(tensor, LENGTHS, strict=True)])
        for name, tensor in right.items()
    }
    inputs = {"plain": {"input_ids": tokens}, "right": right, "left": left}
    inputs |= {"classify": right, "composed": right, "tasks": right | {"task_ids": torch.tensor([1, 0, 1])}}
    if config.is_encoder_decoder:
        decoder = torch.randint(5, VOCABULARY, (3, 7), generator=source)
        decoder_mask = (torch.arange(6) < torch.tensor([4, 6, 5])[:, None]).long()
        inputs["plain"]["decoder_input_ids"] = decoder
        inputs["right"] = right | {"decoder_input_ids": decoder[:, :6], "decoder_attention_mask": decoder_mask}
        inputs["composed"] = right | {"decoder_input_ids": decoder[:, :6]}  # 1.x does not repeat the decoder's mask
        inputs["left"] = left | {"decoder_input_ids": decoder[:, 1:]}
        inputs["tasks"] = inputs["right"] | {"task_ids": torch.tensor([1, 0, 1])}
    return inputs


def labels(architecture: str) -> dict[str, torch.Tensor]:
    """Labels for each kind of head, by the name that ``Head.labels`` gives."""
    source = generator(f"labels of {architecture}")
    _, mask = _tokens(model_config("bert"), source)
    ignore = torch.where(mask.bool(), 0, -100)
    return {
        "class": torch.tensor([2, 0, 1]),
        "number": torch.randn((3, 1), generator=source),
        "many": torch.randint(0, 2, (3, 4), generator=source),
        "tags": torch.randint(0, 5, (3, 7), generator=source) * mask + ignore,
        "tokens": torch.where(mask.bool(), torch.randint(5, VOCABULARY, (3, 7), generator=source), -100),
    }
