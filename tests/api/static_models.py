"""Tiny models of transformers' own classes with a head, of the architectures that 1.x knew and some more."""

import torch
from head_models import BOS, CONFIGS, EOS, HALVES, LABELS, PAD, SIZE, TEXT, batch
from transformers import (
    BeitConfig,
    BertGenerationConfig,
    DebertaConfig,
    DebertaV2Config,
    ElectraConfig,
    GPTJConfig,
    GPTNeoXConfig,
    MBartConfig,
    MT5Config,
    PLBartConfig,
    PreTrainedConfig,
    Qwen2Config,
    RoFormerConfig,
    UMT5Config,
    WhisperConfig,
    XLMRobertaConfig,
    XLNetConfig,
    XmodConfig,
)
from transformers.models.auto import modeling_auto

from adapters import ADAPTER_MODEL_MAPPING
from adapters.heads.convert import TASKS, task_of

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": PAD}
BART = {"d_model": 16, **HALVES, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": EOS}
ALL: dict[str, PreTrainedConfig] = CONFIGS | {
    "beit": BeitConfig(**SIZE, image_size=8, patch_size=4),
    "bert-generation": BertGenerationConfig(**SIZE, **TEXT, is_decoder=True),
    "deberta": DebertaConfig(**SIZE, **TEXT, pooler_hidden_size=16),
    "deberta-v2": DebertaV2Config(**SIZE, **TEXT, pooler_hidden_size=16),
    "electra": ElectraConfig(**SIZE, embedding_size=8, **TEXT),
    "gptj": GPTJConfig(n_embd=16, n_layer=2, n_head=2, rotary_dim=4, **TEXT),
    "gpt_neox": GPTNeoXConfig(**SIZE, **TEXT),
    "mbart": MBartConfig(**BART, **TEXT),
    "mt5": MT5Config(**T5, **TEXT),
    "plbart": PLBartConfig(**BART, **TEXT),
    "qwen2": Qwen2Config(**SIZE, num_key_value_heads=1, **TEXT),
    "roformer": RoFormerConfig(**SIZE, embedding_size=16, **TEXT),
    "umt5": UMT5Config(**T5, **TEXT),
    "whisper": WhisperConfig(
        **BART,
        vocab_size=48,
        num_mel_bins=4,
        max_source_positions=4,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ),
    "xlm-roberta": XLMRobertaConfig(**SIZE, **TEXT),
    "xlnet": XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=24, **TEXT),
    "xmod": XmodConfig(**SIZE, **TEXT, languages=["en_XX"], default_language="en_XX"),
}


def classes(name: str) -> dict[str, tuple[type, str]]:
    """The classes of an architecture with a head that an AdapterModel offers, each with the type of head."""
    kind, found = type(ALL[name]), {}
    offered = ADAPTER_MODEL_MAPPING[kind].head_types
    for task in TASKS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")
        entry = mapping.get(kind, ())
        for each in entry if isinstance(entry, tuple) else (entry,):
            known = task_of(each.__name__, offered)
            if known is not None:
                found[each.__name__] = (each, known[1])
    return found


STATIC = {(name, label): pair for name in ALL for label, pair in classes(name).items()}


def fresh(name: str, **fields) -> PreTrainedConfig:
    return type(ALL[name]).from_dict(ALL[name].to_dict() | fields)


def static_model(name: str, label: str, **fields):
    """The model, with values that are no one's default."""
    model_class, kind = STATIC[name, label]
    config = fresh(name, **fields)
    config.num_labels = 2 if kind in ("multiple_choice", "question_answering") else 3
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def inputs(name: str, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model's inputs, and the labels that go with them."""
    if name in ("beit", "vit"):
        return batch("vit"), LABELS[kind]
    if name == "whisper":
        sound = {"input_features": torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))}
        return sound | {"decoder_input_ids": torch.tensor([[2, 5, 6], [2, 7, 8]])}, LABELS[kind]
    given = batch("bart" if ALL[name].is_encoder_decoder else "bert")
    if kind == "seq2seq_lm":
        given["decoder_input_ids"] = torch.tensor([[2, 5, 6], [2, 7, 8]])
    if kind == "question_answering":
        return given, {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 9])}
    if kind == "tagging":  # transformers' loss counts padding too
        return given, {"labels": LABELS[kind]["labels"].masked_fill(given["attention_mask"] == 0, -100)}
    if kind == "multiple_choice":
        return {key: value[None] for key, value in given.items()}, LABELS[kind]
    return given, LABELS[kind]
