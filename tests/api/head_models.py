"""Tiny random models and batches for the tests of heads."""

import torch
from transformers import (
    AlbertConfig,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from adapters import AutoAdapterModel

torch.set_num_threads(1)  # tiny models only lose by more

VOCABULARY, PAD, BOS, EOS = 48, 0, 1, 2
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
HALVES = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZE, **TEXT),
    "roberta": RobertaConfig(**SIZE, **TEXT),
    "distilbert": DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, **TEXT),
    "albert": AlbertConfig(**SIZE, embedding_size=8, **TEXT),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, **TEXT),
    "llama": LlamaConfig(**SIZE, num_key_value_heads=1, **TEXT),
    "mistral": MistralConfig(**SIZE, num_key_value_heads=1, **TEXT),
    "t5": T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=PAD, **TEXT),
    "bart": BartConfig(
        d_model=16, **HALVES, encoder_ffn_dim=24, decoder_ffn_dim=24, **TEXT, decoder_start_token_id=EOS
    ),
    "vit": ViTConfig(**SIZE, image_size=8, patch_size=4),
}
DECODERS = ("gpt2", "llama", "mistral")
ENCODER_DECODERS = ("t5", "bart")
ENCODERS = ("bert", "roberta", "distilbert", "albert")
TEXT_MODELS = (*ENCODERS, *DECODERS, *ENCODER_DECODERS)


def config(name: str) -> PreTrainedConfig:
    return type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict())


def adapter_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoAdapterModel.from_config(config(name)).eval()


def batch(name: str, rows: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    if name in ENCODER_DECODERS:
        tokens[:, -1] = EOS
    tokens[-1, 4:], mask[-1, 4:] = PAD, 0
    if name in ENCODER_DECODERS:
        tokens[-1, 3] = EOS
    return {"input_ids": tokens, "attention_mask": mask}
