"""Invertible adapters: their formulas, the way back before words, and the verbs that 1.x has for them."""

import math

import pytest
import torch
from tiny_models import CONFIGS, DECODERS, ENCODER_DECODERS, TEXT_MODELS, config, disturb, inputs, output, plain, run
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertModel,
    WhisperConfig,
    WhisperModel,
)

import adapters
from adapters import AdapterSetup, AutoAdapterModel, Average, BatchSplit, Fuse, MultiTask, Parallel, Split, Stack
from adapters.errors import AdapterError

ADAPTERS = {"a": "nice", "b": "glow", "c": "nice"}
BLOCKS = [
    "a",
    "b",
    Stack("a", "b", "c"),
    BatchSplit("a", None, Stack("c", "b"), batch_sizes=[1, 1, 2]),
    Stack("b", Split(Stack("a", "b"), "c", splits=[2, 4])),
]


def with_adapters(model):
    adapters.init(model)
    torch.manual_seed(1)
    for name, kind in ADAPTERS.items():
        settings = f"reduction_factor=4,inv_adapter='{kind}',inv_adapter_reduction_factor=4,non_linearity='tanh'"
        model.add_adapter(name, f"seq_bn_inv[{settings}]")
        disturb(model, name)
    return model.eval()


def static(name: str):
    """A model with the language modeling head of transformers."""
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForMaskedLM
    return with_adapters((AutoModelForCausalLM if name in DECODERS else kind).from_config(config(name)))


def halves(hidden):
    width = hidden.shape[-1] // 2
    return hidden[..., :width], hidden[..., width:]


@torch.no_grad()
def test_nice_is_its_formula():
    model = with_adapters(plain("bert"))
    module, hidden = model.get_adapter("a")[-1]["invertible"], torch.randn(2, 3, 16)
    model.set_active_adapters("a")
    first, second = halves(hidden)
    first = first + module.F(second)
    second = second + module.G(first)
    torch.testing.assert_close(model.invertible_adapters_forward(hidden), torch.cat([first, second], -1))


@torch.no_grad()
def test_glow_is_its_formula():
    model = with_adapters(plain("bert"))
    module, hidden = model.get_adapter("b")[-1]["invertible"], torch.randn(2, 3, 16)
    model.set_active_adapters("b")
    first, second = halves(hidden)
    scale, shift = halves(module.s2(second))
    first = torch.exp(5 * 0.636 * torch.atan(scale / 5)) * first + shift
    scale, shift = halves(module.s1(first))
    second = torch.exp(5 * 0.636 * torch.atan(scale / 5)) * second + shift
    torch.testing.assert_close(model.invertible_adapters_forward(hidden), torch.cat([first, second], -1))


@torch.no_grad()
@pytest.mark.parametrize("setup", BLOCKS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_identity(name, setup):
    model = with_adapters(plain(name))
    width = model.config.embedding_size if name == "albert" else 16
    hidden = torch.randn(4, 6, width)
    with AdapterSetup(setup):
        there = model.invertible_adapters_forward(hidden)
        assert (there - hidden).abs().max() > 0.1
        torch.testing.assert_close(model.invertible_adapters_forward(there, rev=True), hidden, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_odd_widths_and_the_width_of_the_table(name):
    model = with_adapters(plain(name))
    module = model.get_adapter("b")[-1]["invertible"]
    assert module.first + module.second == model.get_input_embeddings().embedding_dim
    assert module.s1[0].weight.shape == (max(1, module.first // 4), module.first)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_static_heads_undo_it(name):
    """What the map onto the vocabulary is given is brought back; tied or not."""
    model, batch, seen = static(name), inputs(name), []
    for first in (True, False):
        model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=first)
    for setup in ("a", Stack("a", "b", "c")):
        run(model, batch, setup)
        with AdapterSetup(setup):
            given, changed = seen[-2], seen[-1]
            torch.testing.assert_close(changed, model.invertible_adapters_forward(given, rev=True))
            assert (changed - given).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "t5"])
def test_static_heads_in_every_block(name):
    model, batch = static(name), inputs(name)
    parts = ["a", Stack("c", "b"), None, Average("a", "a")]
    alone = [run(model, batch, part) for part in parts]
    rows = torch.stack([alone[row][row] for row in range(4)])
    close = torch.testing.assert_close
    close(run(model, batch, Parallel(*parts)), torch.cat(alone), rtol=1e-4, atol=1e-4)
    close(run(model, batch, BatchSplit(*parts, batch_sizes=1)), rows, rtol=1e-4, atol=1e-4)
    tasks = torch.tensor([3, 1, 0, 2])
    routed = torch.stack([alone[task][row] for row, task in enumerate(tasks)])
    close(run(model, batch, MultiTask(*parts), task_ids=tasks), routed, rtol=1e-4, atol=1e-4)


def flexible(name: str):
    torch.manual_seed(0)
    model = with_adapters(AutoAdapterModel.from_config(config(name)))
    add = model.add_seq2seq_lm_head if name in ENCODER_DECODERS else model.add_causal_lm_head
    for head in "ab":
        add(head, **({} if name in ENCODER_DECODERS else {"layers": 2, "activation_function": "tanh"}))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
def test_flexible_heads_undo_it(name):
    model, batch = flexible(name), inputs(name)
    with AdapterSetup(Stack("a", "b"), head_setup="a"):
        logits = model(**batch).logits
        hidden = model.base_model(**batch)[0] * (16**-0.5 if vars(model.config).get("scale_decoder_outputs") else 1)
        for layer in list(model.heads["a"])[:-1]:
            hidden = layer(hidden)
        wanted = model.heads["a"][-1](model.invertible_adapters_forward(hidden, rev=True))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_each_head_undoes_what_acted_on_its_rows(name):
    model, batch = flexible(name), inputs(name)
    alone = [run(model, batch, name) for name in ("a", "b")]
    with AdapterSetup(Parallel("a", Stack("c", "b")), head_setup=Parallel("a", "b")):
        found = model(**batch)
    torch.testing.assert_close(found[0].logits, alone[0], rtol=1e-4, atol=1e-5)
    with AdapterSetup(Stack("c", "b"), head_setup="b"):
        torch.testing.assert_close(found[1].logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    with AdapterSetup(BatchSplit("a", "b", batch_sizes=[1, 3]), head_setup=BatchSplit("a", "b", batch_sizes=[1, 3])):
        found = model(**batch)
    torch.testing.assert_close(found[0].logits, alone[0][:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].logits, alone[1][1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_new_output_embeddings_are_undone_too(name):
    model, batch = static(name), inputs(name)
    before = run(model, batch, "a")
    model.resize_token_embeddings(56, mean_resizing=False)
    torch.testing.assert_close(run(model, batch, "a")[..., : before.shape[-1]], before)
    for adapter in ADAPTERS:
        model.delete_adapter(adapter)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_head_around_an_adapted_base_model_undoes_it():
    model = plain("llama", head=True)
    with_adapters(model.model)
    adapters.init(model)
    assert len(model.lm_head._forward_pre_hooks) == 1


def test_embeddings_that_are_given_are_changed():
    model, batch = static("llama"), inputs("llama")
    given = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    del given["input_ids"]
    with AdapterSetup("a"):
        torch.testing.assert_close(model(**given).logits, model(**batch).logits)


def test_c13_whisper_has_it_on_the_embeddings_of_the_encoder():
    settings = {f"{stack}_{what}": 2 for stack in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    size = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 4, "max_source_positions": 8}
    model = with_adapters(WhisperModel(WhisperConfig(**settings, **tokens, **size)))
    batch = {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": torch.tensor([[3, 4], [5, 6]])}
    entering = []
    model.encoder.layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    run(model, batch, None)
    run(model, batch, "a")
    with AdapterSetup("a"):
        torch.testing.assert_close(entering[1], model.invertible_adapters_forward(entering[0]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
def test_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = with_adapters(plain("llama"))
        model.train_adapter("b")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**inputs("llama"))[0].pow(2).sum().backward()
        gradients.append([parameter.grad for module in model._modules_of("b") for parameter in module.parameters()])
    for plainly, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plainly)


def test_verbs():
    model, batch = with_adapters(plain("bert")), inputs("bert")
    assert model.get_invertible_adapter() is None
    module = model.get_adapter("b")[-1]["invertible"]
    with AdapterSetup(Stack("b", "a")):
        assert model.get_invertible_adapter() is module
    model.freeze_model()
    model.enable_invertible_adapters(["b", "unknown"])
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in module.parameters()}
    assert model.add_invertible_adapter("b") is False
    model.delete_invertible_adapter("b")
    assert -1 not in model.get_adapter("b") and run(model, batch, "b") is not None
    assert model.add_invertible_adapter("b") is True
    assert model.get_adapter("b")[-1]["invertible"] is not module
    model.add_adapter("plain", "seq_bn[reduction_factor=4]")
    assert model.add_invertible_adapter("plain") is False


def test_it_trains_with_the_adapter_and_is_saved_with_it(tmp_path):
    model, batch = static("t5"), inputs("t5")
    model.train_adapter("b")
    model.eval()
    assert all(parameter.requires_grad for parameter in model.get_adapter("b")[-1]["invertible"].parameters())
    model.save_adapter(tmp_path, "b", use_safetensors=False)
    keys = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True).keys()
    assert "encoder.invertible_adapters.b.s1.0.weight" in keys  # T5 with a head has no base model of its own
    again = static("t5")
    again.load_adapter(tmp_path, load_as="new", set_active=True)
    torch.testing.assert_close(output(again, batch), run(model, batch, "b"))


def test_of_fused_language_adapters_the_first_acts_on_the_embeddings(tmp_path):
    """As in 1.x, whose whole models may have such fusions."""
    model, hidden = with_adapters(plain("bert")), torch.randn(1, 2, 16)
    model.add_adapter_fusion(["a", "c"], set_active=True)
    changed = model.invertible_adapters_forward(hidden)
    torch.testing.assert_close(model.invertible_adapters_forward(changed, rev=True), hidden)
    with AdapterSetup("a"):
        assert torch.equal(model.invertible_adapters_forward(hidden), changed)
    expected = output(model, inputs("bert"))
    model.save_pretrained(tmp_path)
    again = adapters.load_model(tmp_path, BertModel).eval()
    again.set_active_adapters(Fuse("a", "c"))
    torch.testing.assert_close(output(again, inputs("bert")), expected)


def test_a_width_that_is_not_as_read_is_told():
    model = with_adapters(plain("bert"))
    with AdapterSetup("a"), pytest.raises(AdapterError, match="the embeddings have width 12, 16 was read"):
        model.invertible_adapters_forward(torch.randn(1, 2, 12))


def test_scales_stay_in_bounds():
    model = with_adapters(plain("bert"))
    module = model.get_adapter("b")[-1]["invertible"]
    torch.nn.init.constant_(module.s2[2].bias, 1e6)
    with AdapterSetup("b"):
        assert model.invertible_adapters_forward(torch.zeros(1, 1, 16)).isfinite().all()
    assert math.isclose(5 * 0.636 * math.pi / 2, 5, rel_tol=0.01)
