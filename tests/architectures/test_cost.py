"""What ``adapters.init`` and the first adapters cost, in time and memory, whatever the size of the model."""

import resource
import time
from collections.abc import Callable

import pytest
import torch
from transformers import BertConfig, BertModel, DeepseekV3Config, DeepseekV3Model, PreTrainedModel

import adapters
from adapters import trace

MILLISECONDS = 1e3


def least(action: Callable[[], object], times: int = 5) -> float:
    """The shortest of some runs, in milliseconds of the process: other work on the machine does not count."""
    found = []
    for _ in range(times):
        start = time.process_time()
        action()
        found.append(time.process_time() - start)
    return min(found) * MILLISECONDS


def twelve_layers() -> PreTrainedModel:
    return BertModel(
        BertConfig(hidden_size=24, num_attention_heads=2, intermediate_size=32, num_hidden_layers=12, vocab_size=50)
    )


def test_init_of_twelve_layers_takes_15_ms_at_most() -> None:
    models = iter([twelve_layers() for _ in range(5)])
    assert least(lambda: adapters.init(next(models))) <= 15


def peak() -> int:
    """The most memory that the process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_model_of_a_trillion_parameters_takes_two_seconds_and_no_memory() -> None:
    config = DeepseekV3Config(
        hidden_size=7168,
        num_hidden_layers=61,
        n_routed_experts=384,
        moe_intermediate_size=2048,
        first_k_dense_replace=1,
    )
    with torch.device("meta"):
        model = DeepseekV3Model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e12
    adapters.init(twelve_layers())  # all code is imported now
    before, start = peak(), time.process_time()
    adapters.init(model)
    seconds = time.process_time() - start
    assert seconds <= 2
    assert peak() - before < 100e6
    model.add_adapter("a", "lora")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_second_model_of_a_kind_is_not_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = twelve_layers(), twelve_layers()
    adapters.init(first)
    first.add_adapter("a", "double_seq_bn")
    monkeypatch.setattr(trace, "watch", None)  # nothing can be recorded any more
    adapters.init(second)
    second.add_adapter("a", "double_seq_bn")
    inputs = torch.arange(6)[None]
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        model.set_active_adapters("a")
    assert torch.equal(first.eval()(inputs)[0], second.eval()(inputs)[0])
    assert [site.path for site, _ in second.adapter_sites.holding("a")] == [
        site.path for site, _ in first.adapter_sites.holding("a")
    ]


def test_a_model_of_other_options_is_recorded_by_itself() -> None:
    """One of a class that differs in its configuration alone has other sub-layers."""
    found = []
    for norm_first in (True, False):
        config = BertConfig(
            hidden_size=24, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2 + norm_first, vocab_size=50
        )
        model = BertModel(config)
        adapters.init(model)
        model.add_adapter("a", "seq_bn")
        found.append(len(model.adapter_sites.holding("a")))
    assert found == [3, 2]
