"""Prefixes where a module computes attention itself: what is followed equals the formula, written out by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BigBirdConfig,
    BigBirdModel,
    BloomConfig,
    BloomModel,
    DebertaV2Config,
    DebertaV2Model,
    FalconConfig,
    FalconModel,
    GPTJConfig,
    GPTJModel,
    LongformerConfig,
    LongformerModel,
    MptConfig,
    MptModel,
    XLNetConfig,
    XLNetModel,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import scaled_size_sqrt
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as turn

import adapters
from adapters import AdapterError, Average, BatchSplit, Parallel, PrefixTuningConfig, Split, Stack

LENGTH, HEADS, WIDTH = 3, 4, 8
"""Of the prefix; of keys."""
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning")
D = HEADS * WIDTH


def attend(scores: Tensor, prefix_scores: Tensor, value: Tensor, prefix_value: Tensor) -> Tensor:
    """(b, q, d) of softmax([P; S]) [P_v; V], heads side by side."""
    weights = torch.cat([prefix_scores, scores], -1).softmax(-1)
    value = torch.cat([prefix_value.expand(len(value), -1, -1, -1), value], 2)
    return (weights @ value).transpose(1, 2).flatten(2)


def heads(states: Tensor) -> Tensor:
    return states.unflatten(-1, (-1, WIDTH)).transpose(1, 2)


def bloom(core: Any, args: tuple, kwargs: dict, key: Tensor, value: Tensor) -> Tensor:
    hidden, residual = args
    q, k, v = core.query_key_value(hidden).unflatten(-1, (HEADS, 3, WIDTH)).permute(3, 0, 2, 1, 4)
    alibi = kwargs["alibi"].view(len(hidden), HEADS, 1, -1)
    scores = q @ k.mT / WIDTH**0.5 + alibi + kwargs["attention_mask"]
    return core.dense(attend(scores, q @ key.mT / WIDTH**0.5, v, value)) + residual


def falcon(core: Any, args: tuple, kwargs: dict, key: Tensor, value: Tensor) -> Tensor:
    (hidden,) = args
    fused = core.query_key_value(hidden).unflatten(-1, (HEADS + 2, WIDTH)).transpose(1, 2)
    q, k, v = fused[:, :-2], fused[:, -2:-1], fused[:, -1:]
    q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    scores = (q @ k.mT / WIDTH**0.5).masked_fill(~seen, float("-inf"))
    prefix = q @ key.mT / WIDTH**0.5
    return core.dense(attend(scores, prefix, v, value))


def gptj(core: Any, args: tuple, kwargs: dict, key: Tensor, value: Tensor) -> Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    table = core.embed_positions[kwargs["position_ids"]]
    sin, cos = table.chunk(2, -1)
    q, k, v = (map_(hidden).unflatten(-1, (HEADS, WIDTH)) for map_ in (core.q_proj, core.k_proj, core.v_proj))
    size = core.rotary_dim
    q, k = (torch.cat([turn(x[..., :size], sin, cos), x[..., size:]], -1).transpose(1, 2) for x in (q, k))
    scores = q @ k.mT / WIDTH**0.5 + kwargs["attention_mask"]
    return core.out_proj(attend(scores, q @ key.mT / WIDTH**0.5, v.transpose(1, 2), value))


def mpt(core: Any, args: tuple, kwargs: dict, key: Tensor, value: Tensor) -> Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    q, k, v = (heads(part) for part in core.Wqkv(hidden).chunk(3, -1))
    bias = kwargs["position_bias"][:, :, -k.shape[2] :]
    scores = (q @ k.mT * core.softmax_scale + bias).masked_fill(kwargs["attention_mask"], float("-inf"))
    return core.out_proj(attend(scores, q @ key.mT * core.softmax_scale, v, value))


def deberta(core: Any, args: tuple, kwargs: dict, key: Tensor, value: Tensor) -> Tensor:
    hidden, mask, relative = args[0], args[1], {**kwargs}
    q, k, v = (heads(map_(hidden)) for map_ in (core.query_proj, core.key_proj, core.value_proj))
    scale = scaled_size_sqrt(q, 3)
    bias = core.disentangled_attention_bias(
        q.flatten(0, 1), k.flatten(0, 1), relative["relative_pos"], relative["rel_embeddings"], 3
    ).view(len(hidden), HEADS, *2 * [hidden.shape[1]])
    scores = (q @ k.mT / scale + bias).masked_fill(~mask.bool(), torch.finfo(torch.float32).min)
    return attend(scores, q @ key.mT / scale, v, value)


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Callable[..., Tensor]]] = {
    "bloom": (
        lambda: BloomModel(BloomConfig(vocab_size=40, hidden_size=D, n_layer=2, n_head=HEADS)),
        "h.1.self_attention",
        bloom,
    ),
    "falcon": (
        lambda: FalconModel(
            FalconConfig(vocab_size=40, hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS, alibi=False)
        ),
        "h.1.self_attention",
        falcon,
    ),
    "gptj": (
        lambda: GPTJModel(GPTJConfig(vocab_size=40, n_embd=D, n_layer=2, n_head=HEADS, rotary_dim=4, n_positions=64)),
        "h.1.attn",
        gptj,
    ),
    "mpt": (
        lambda: MptModel(MptConfig(vocab_size=40, d_model=D, n_layers=2, n_heads=HEADS, max_seq_len=32)),
        "blocks.1.attn",
        mpt,
    ),
    "deberta-v2": (
        lambda: DebertaV2Model(
            DebertaV2Config(
                vocab_size=40,
                hidden_size=D,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                intermediate_size=D,
                relative_attention=True,
                max_relative_positions=8,
                pos_att_type=["c2p", "p2c"],
            )
        ),
        "encoder.layer.1.attention.self",
        deberta,
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)
FOLLOWED = ("bloom", "falcon", "deberta-v2", "xlnet")
PREFIX = PrefixTuningConfig(flat=True, prefix_length=LENGTH)


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(2))


def bare(name: str) -> Any:
    torch.manual_seed(0)
    if name == "xlnet":
        return XLNetModel(XLNetConfig(vocab_size=40, d_model=D, n_layer=2, n_head=HEADS, d_inner=D)).eval()
    return MODELS[name][0]().eval()


def adapted(name: str, **members: Any) -> Any:
    model = bare(name)
    adapters.init(model)
    for adapter, config in (members or {"a": PREFIX, "b": PREFIX}).items():
        model.add_adapter(adapter, config)
    return model.eval()


def states(model: Any, setup: Any, batch: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad(), adapters.AdapterSetup(setup):
        return model(batch, **kwargs)[0]


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def seen_by(core: nn.Module, run: Callable[[], Any]) -> tuple[tuple, dict, Tensor]:
    """What a module is given, and gives, in a pass."""
    calls = []
    handle = core.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    run()
    handle.remove()
    args, kwargs, output = copy.copy(calls[0])
    return args, kwargs, output[0] if isinstance(output, tuple) else output


@each_model
def test_what_is_followed_is_attention_over_prefix_and_tokens(name: str) -> None:
    model, (_, path, formula) = adapted(name), MODELS[name]
    core = model.get_submodule(path)
    (group,) = model.adapter_sites.shared("a")["prefix_tuning.prefix_tunings.a"].values()
    key, value = group.parted(group.layer(1))
    args, kwargs, output = seen_by(core, lambda: states(model, "a", tokens()))
    with torch.no_grad(), adapters.AdapterSetup(None):
        wanted = formula(core, args, {**kwargs, "layer_past": None, "past_key_values": None}, key, value)
    close(output, wanted)


@pytest.mark.parametrize("name", FOLLOWED)
def test_off_it_is_the_bare_model_and_deleted_it_leaves_nothing(name: str) -> None:
    model, wanted = adapted(name), bare(name)(tokens())[0]
    assert torch.equal(states(model, None, tokens()), wanted)
    assert not torch.equal(states(model, "a", tokens()), wanted)
    for adapter in "ab":
        model.delete_adapter(adapter)
    assert torch.equal(model(tokens())[0], wanted)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", FOLLOWED)
def test_rows_and_weights_of_prefixes(name: str) -> None:
    model, batch = adapted(name), tokens(4)
    single = {setup: states(model, setup, batch) for setup in (None, "a", "b")}
    close(states(model, BatchSplit("a", None, "b", batch_sizes=[1, 2, 1]), batch)[0], single["a"][0])
    close(states(model, BatchSplit("a", None, "b", batch_sizes=[1, 2, 1]), batch)[1:3], single[None][1:3])
    close(states(model, Parallel("a", "b"), batch), torch.cat([single["a"], single["b"]]))
    close(states(model, Average("a", "b", weights=[0.0, 1.0]), batch), single["b"])
    close(states(model, Stack("a", None), batch), single["a"])


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_the_parts_of_a_sequence_see_their_own_prefix(name: str) -> None:
    """What comes first in a decoder does not depend on the prefix of the rest."""
    model, batch = adapted(name), tokens()
    found = states(model, Split("a", "b", splits=[3, 4]), batch)
    close(found[:, :3], states(model, "a", batch[:, :3]))
    assert not torch.allclose(found[:, 3:], states(model, "a", batch)[:, 3:], atol=1e-4)


@pytest.mark.parametrize("name", FOLLOWED)
def test_gradients_reach_the_prefix_alone_and_checkpointing_keeps_them(name: str) -> None:
    gradients = []
    for reentrant in (None, False, True) if bare(name).supports_gradient_checkpointing else (None,):
        model = adapted(name)
        model.train_adapter("a")
        for module in model.modules():
            module.train(not isinstance(module, nn.Dropout))
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model(tokens())[0].square().mean().backward()
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        assert {parameter for parameter in model.parameters() if parameter.grad is not None} == trained
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for found in gradients[1:]:
        for one, other in zip(found, gradients[0], strict=True):
            close(one, other)


@pytest.mark.parametrize("name", FOLLOWED)
def test_copies_and_half_precision(name: str) -> None:
    model, batch = adapted(name), tokens()
    wanted = states(model, "a", batch)
    twin = copy.deepcopy(model)
    model.delete_adapter("a")
    close(states(twin, "a", batch), wanted)
    half = states(twin.to(torch.bfloat16), "a", batch)
    assert half.dtype == torch.bfloat16
    close(half.float(), wanted, 0.2)


def test_keys_with_a_gate_and_of_other_methods() -> None:
    gated = PrefixTuningConfig(prefix_length=LENGTH, bottleneck_size=4, use_gating=True, shared_gating=False)
    model = adapted("bloom", a=gated, b="lora")
    both, lora = (states(model, setup, tokens()) for setup in (Stack("a", "b"), "b"))
    assert not torch.allclose(both, lora)


class Sorted(nn.Module):
    """What nobody does to the weights of an attention."""

    def forward(self, weights: Tensor) -> Tensor:
        return weights.sort(-1)[0]


def odd() -> Any:
    model = bare("bloom")
    model.h[1].self_attention.attention_dropout = Sorted()
    return model


def windowed() -> Any:
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": D}
    return LongformerModel(LongformerConfig(vocab_size=40, attention_window=4, **sizes)).eval()


def sparse() -> Any:
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": D}
    return BigBirdModel(BigBirdConfig(vocab_size=40, attention_type="block_sparse", block_size=4, **sizes)).eval()


REFUSED = {
    "encoder.layer.0.attention.self is replaced by the model itself when it runs on a short input": sparse,
    "h.1.self_attention does not multiply the weights of its softmax with values": odd,
    "encoder.layer.0.attention.self changes its scores by pad, which is not known": windowed,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_followed_is_refused_when_it_is_added(reason: str) -> None:
    model = REFUSED[reason]()
    adapters.init(model)
    modules = dict(model.named_modules())
    with pytest.raises(AdapterError, match=f"add_adapter: the attention at {reason}.*; use LoRA or a bottleneck"):
        model.add_adapter("a", PREFIX)
    assert dict(model.named_modules()) == modules
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_a_module_does_only_later_is_an_error_in_the_pass() -> None:
    model = adapted("bloom")
    model.h[1].self_attention.attention_dropout = Sorted()
    with pytest.raises(AdapterError, match=r"prefix tuning: the attention at h\.1\.self_attention does not multiply"):
        states(model, "a", tokens())
    assert states(model, None, tokens()).isfinite().all()
