"""Tiny random models and batches for the tests of heads."""

import torch
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
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
from adapters.heads.model_mixin import MODEL_HEAD_MAP

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


ADD = {
    "classification": lambda model, name: model.add_classification_head(name, num_labels=3),
    "multilabel_classification": lambda model, name: model.add_classification_head(name, num_labels=3, multilabel=True),
    "multiple_choice": lambda model, name: model.add_multiple_choice_head(name, num_choices=2),
    "tagging": lambda model, name: model.add_tagging_head(name, num_labels=3),
    "question_answering": lambda model, name: model.add_qa_head(name),
    "image_classification": lambda model, name: model.add_image_classification_head(name, num_labels=3),
    "dependency_parsing": lambda model, name: model.add_dependency_parsing_head(name, num_labels=3),
    "masked_lm": lambda model, name: model.add_masked_lm_head(name),
    "causal_lm": lambda model, name: model.add_causal_lm_head(name),
    "seq2seq_lm": lambda model, name: model.add_seq2seq_lm_head(name),
}
LABELS = {
    "classification": {"labels": torch.tensor([0, 2])},
    "multilabel_classification": {"labels": torch.tensor([[0, 1, 1], [1, 0, 0]])},
    "multiple_choice": {"labels": torch.tensor([1])},
    "tagging": {"labels": torch.tensor([[0, 1, 2, -100, 1, 0], [2, 2, 1, 0, 1, 1]])},
    "question_answering": {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([[2], [9]])},
    "image_classification": {"labels": torch.tensor([0, 2])},
    "dependency_parsing": {
        "labels_arcs": torch.tensor([[2, 3, 1, -100, -100, -100], [2, 1, -100, -100, -100, -100]]),
        "labels_rels": torch.tensor([[0, 1, 2, -100, -100, -100], [2, 1, -100, -100, -100, -100]]),
    },
    "masked_lm": {"labels": torch.tensor([[-100, 5, -100, -100, 7, -100], [4, -100, -100, -100, -100, -100]])},
    "causal_lm": {"labels": torch.tensor([[3, 5, 9, 6, 7, 8], [4, 3, 3, 5, -100, -100]])},
    "seq2seq_lm": {"labels": torch.tensor([[3, 5, 9], [4, 2, -100]])},
}
WORD_STARTS = torch.tensor([[1, 2, 4, 6], [1, 2, 4, PAD]])
OFFERED = [(name, kind) for name in CONFIGS for kind in adapter_model(name).head_types]


def inputs_for(name: str, kind: str) -> dict[str, torch.Tensor]:
    inputs = batch(name)
    if kind == "dependency_parsing":
        return inputs | {"word_starts": WORD_STARTS}
    return {key: value[None] for key, value in inputs.items()} if kind == "multiple_choice" else inputs


def two_heads(name: str = "bert"):
    model = adapter_model(name)
    model.add_classification_head("a", num_labels=2)
    model.add_classification_head("b", num_labels=3)
    return model


def with_adapters(name: str = "bert"):
    """A model with two adapters that change its outputs, and a head of each name."""
    model = two_heads(name)
    for adapter in ("a", "b"):
        model.add_adapter(adapter, "lora")
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.5, generator=generator)
    model.set_active_adapters(None)
    return model


def with_lm_head(name: str):
    """An adapter model and the static language model of the same weights."""
    auto = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    model, static = adapter_model(name), auto.from_config(config(name)).eval()
    if name in ENCODER_DECODERS:
        model.add_seq2seq_lm_head("lm")
    else:
        model.add_causal_lm_head("lm", layers=1, activation_function=None)
        model.delete_head("lm")
        model.add_prediction_head(MODEL_HEAD_MAP["causal_lm"](model, "lm"))
    prefix = f"{static.base_model_prefix}."
    weights = {key.removeprefix(prefix): value for key, value in static.state_dict().items()}
    model.base_model.load_state_dict({key: weights[key] for key in model.base_model.state_dict()})
    model.heads["lm"].get_output_embeddings().weight.data.copy_(static.get_output_embeddings().weight)
    return model, static
