"""`tp_plan`: methods that see whole hidden states compute what they do in one process; the others are refused."""

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together
from tiny_models import METHODS, MORE_METHODS, changed, disturb, inputs, plain
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import adapters

WORKING = ["double_seq_bn", "adapter_plus", "compacter_shared", "seq_bn_inv", "prompt", "loreft"]
REFUSED = ["lora", "ia3", "prefix_tuning", "unipelt", "oft"]
BATCH = inputs("llama")


def learned(model: Any, method: str) -> dict[str, torch.Tensor]:
    """The output with an adapter, and the gradients of its parameters."""
    torch.manual_seed(1)
    model.add_adapter("a", changed((METHODS | MORE_METHODS)[method], dropout=0.0))
    disturb(model, "a")
    model.train_adapter("a")
    output = model(**BATCH).logits
    output.pow(2).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.delete_adapter("a")
    return {"output": output.detach(), **found}


def in_parts(rank: int, folder: Path) -> dict[str, Any]:
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    adapters.init(model)
    found: dict[str, Any] = {}
    for method in WORKING + REFUSED:
        try:
            found[method] = learned(model, method)
        except Exception:
            found[method] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("model")
    plain("llama", head=True).save_pretrained(folder)
    return together(in_parts, folder, seconds=100)


@pytest.mark.parametrize("method", WORKING)
def test_outputs_and_gradients_are_those_of_one_process(method: str, both: list[dict[str, Any]]) -> None:
    model = plain("llama", head=True)
    adapters.init(model)
    expected = learned(model, method)
    for each in both:
        assert isinstance(each[method], dict), each[method]
        assert each[method].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(each[method][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", REFUSED)
def test_what_needs_a_whole_map_is_refused(method: str, both: list[dict[str, Any]]) -> None:
    message = r"AdapterError: add_adapter\('a'\): tensor parallelism computes .* in parts, .* without tp_plan"
    assert all(re.search(message, each[method]) for each in both), both[0][method]
