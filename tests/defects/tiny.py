"""Tiny random models of the architectures that the defects of 1.x showed on, and how to run them."""

import torch
import transformers as tf

import adapters

torch.set_num_threads(1)

TEXT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
GROUPED = TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS = {
    "bert": lambda n: tf.BertConfig(**TEXT, num_hidden_layers=n),
    "bert_decoder": lambda n: tf.BertConfig(**TEXT, num_hidden_layers=n, is_decoder=True, add_cross_attention=True),
    "albert": lambda n: tf.AlbertConfig(**TEXT, num_hidden_layers=n, embedding_size=8),
    "distilbert": lambda n: tf.DistilBertConfig(dim=16, n_layers=n, n_heads=2, hidden_dim=24, vocab_size=40),
    "gpt2": lambda n: tf.GPT2Config(n_embd=16, n_layer=n, n_head=2, vocab_size=40),
    "phi": lambda n: tf.PhiConfig(**TEXT, num_hidden_layers=n),
    "llama": lambda n: tf.LlamaConfig(**GROUPED, num_hidden_layers=n),
    "mistral": lambda n: tf.MistralConfig(**GROUPED, num_hidden_layers=n, head_dim=6, sliding_window=8),
    "gemma2": lambda n: tf.Gemma2Config(**GROUPED, num_hidden_layers=n, head_dim=4),
    "qwen2": lambda n: tf.Qwen2Config(**GROUPED, num_hidden_layers=n),
    "t5": lambda n: tf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=n, num_heads=2, vocab_size=40),
    "bart": lambda n: tf.BartConfig(
        d_model=16,
        encoder_layers=n,
        decoder_layers=n,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        vocab_size=40,
    ),
}
IDS = torch.tensor([[5, 9, 11, 3, 7, 21], [8, 4, 30, 31, 2, 6], [12, 3, 22, 9, 18, 7], [33, 5, 5, 10, 6, 14]])
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])


def tiny(name, layers=2, model_class=tf.AutoModel, seed=0, **arguments):
    """A model with support for adapters, in evaluation mode."""
    torch.manual_seed(seed)
    model = model_class.from_config(CONFIGS[name](layers), **arguments).eval()
    adapters.init(model)
    return model


def with_adapters(name, configs, **arguments):
    """A tiny model with the given adapters, none of which is the identity."""
    model = tiny(name, **arguments)
    for adapter, config in configs.items():
        add(model, adapter, config)
    return model


def add(model, adapter, config):
    model.add_adapter(adapter, config)
    stir(parameters(model, adapter))


def stir(tensors, size=0.3):
    """Away from the start values."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn_like(tensor) * size)


def parameters(model, adapter):
    return [parameter for name, parameter in model.named_parameters() if adapter in name.split(".")]


def run(model, setup, ids=IDS, mask=None, **inputs):
    """The last hidden state."""
    model.set_active_adapters(setup)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    elif getattr(model.config, "add_cross_attention", False):
        inputs["encoder_hidden_states"] = torch.linspace(-1, 1, 48).reshape(1, 3, 16).repeat(len(ids), 1, 1)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **inputs)[0]


def close(one, other, **tolerance):
    torch.testing.assert_close(one, other, **({"atol": 1e-5, "rtol": 1e-4} | tolerance))


def differs(one, other):
    return (one - other).abs().max() > 1e-4
