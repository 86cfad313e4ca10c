"""DDP and FSDP2 of plain torch on two processes learn what one process learns from the whole batch."""

import functools
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import PROCESSES, together
from tiny_models import METHODS, MORE_METHODS, changed, disturb, inputs, plain, rows_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import adapters
from adapters import Average, Fuse, Parallel, Stack

TYPE, ROWS, STEPS = "llama", 4, 2
BOTTLENECKS = "seq_bn", "par_bn"
ALL = METHODS | MORE_METHODS
# Of each way to hold and to use parameters one: in a block, at the base model, at the embeddings, kept results.
ALONE = [
    *("gated_bn", "lora", "prefix_tuning", "gated_prefix", "unipelt", "ia3", "dora", "vera", "pissa", "vblora", "oft"),
    *("randlora", "compacter_shared", "seq_bn_inv", "prompt", "p_tuning", "loreft", "ln_tuning", "mtl_lora", "shira"),
]
SETUPS: dict[str, Any] = {name: Stack(name) for name in ALONE} | {
    "fusion": Fuse(*BOTTLENECKS),
    "stack": Stack("lora", "seq_bn"),
    "average": Average("prefix_tuning", "lora"),
    "parallel": Parallel("lora", "seq_bn"),
}


def built(setup: Any) -> Any:
    """A model with the adapters of a setup, which are trained."""
    model = plain(TYPE)
    adapters.init(model)
    torch.manual_seed(1)
    for name in setup.leaves():
        model.add_adapter(name, changed(ALL[name], dropout=0.0))
        disturb(model, name, 0.1)
    if isinstance(setup, Fuse):
        model.add_adapter_fusion(setup, "dynamic")
        model.train_adapter_fusion(setup)
    else:
        model.train_adapter(setup)
    return model


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = model(**batch)[0]
    return (hidden * torch.linspace(-1, 1, hidden.shape[-1])).mean() + hidden.pow(2).mean()


def learned(model: Any, wrapped: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The losses of some steps, the last one in evaluation, and the trained parameters after them."""
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(wrapped, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapped.eval()
        with torch.no_grad():
            losses.append(loss_of(wrapped, batch).item())
        wrapped.train()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses} | {name: whole(p).clone() for name, p in trained.items()}


def whole(parameter: Any) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def with_ddp(model: Any) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def with_fsdp(model: Any) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {"ddp": with_ddp, "fsdp": with_fsdp}


def learn_all(rank: int, wrap: Callable[[Any], nn.Module]) -> dict[str, Any]:
    """What each setup learned, or how it failed, from this process' rows."""
    found: dict[str, Any] = {}
    size = ROWS // PROCESSES
    batch = rows_of(inputs(TYPE, ROWS), slice(rank * size, (rank + 1) * size))
    for name, setup in SETUPS.items():
        try:
            model = built(setup)
            found[name] = learned(model, wrap(model), batch)
        except Exception:
            found[name] = traceback.format_exc()
    return found


@functools.cache
def on_two(wrapper: str) -> list[dict[str, Any]]:
    return together(learn_all, WRAPPERS[wrapper], seconds=120)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", SETUPS)
def test_two_processes_learn_what_one_does(name: str, wrapper: str) -> None:
    model = built(SETUPS[name])
    expected = learned(model, model, inputs(TYPE, ROWS))
    first, second = (each[name] for each in on_two(wrapper))
    assert isinstance(first, dict) and isinstance(second, dict), f"{first}\n{second}"
    mean = [(one + two) / PROCESSES for one, two in zip(first.pop("losses"), second.pop("losses"), strict=True)]
    torch.testing.assert_close(mean, expected.pop("losses"), rtol=1e-4, atol=1e-5)
    assert first.keys() == second.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
        assert torch.equal(first[key], second[key]), key
