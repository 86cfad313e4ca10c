"""``eject_prefix_tuning``: flat prefixes in the place of the network they come from."""

import pytest
import torch
from tiny_models import METHODS, adapted, disturb, inputs, run

import adapters


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])  # equal heads, grouped queries, heads of another width
@pytest.mark.parametrize("method", ["prefix_tuning", "gated_prefix", "unipelt"])
def test_d6_an_ejected_prefix_stays_what_it_was_and_can_be_loaded(name: str, method: str, tmp_path) -> None:
    model, batch = adapted(name, method), inputs(name)
    model.add_adapter("other", METHODS[method])
    before, size = run(model, batch, method), model.adapter_summary(as_dict=True)[0]["#param"]
    for _ in range(2):
        model.eject_prefix_tuning(method)
        torch.testing.assert_close(run(model, batch, method), before, rtol=1e-5, atol=1e-6)
    prefixes = [config for config in model.adapters_config.members(method) if config.architecture == "prefix_tuning"]
    assert [config.flat for config in prefixes] == [True]
    assert type(model.adapters_config.get(method)) is type(METHODS[method])
    assert model.adapters_config.get("other") == METHODS[method]
    assert model.adapter_summary(as_dict=True)[0]["#param"] != size
    model.save_adapter(tmp_path, method)
    other = adapted(name)
    other.load_adapter(tmp_path, load_as="again")
    torch.testing.assert_close(run(other, batch, "again"), before, rtol=1e-5, atol=1e-6)
    model.train_adapter(method)
    disturb(model, method)
    assert (run(model, batch, method) - before).abs().max() > 1e-3


def test_only_prefixes_are_ejected() -> None:
    model = adapted("bert", "lora")
    with pytest.raises(adapters.AdapterError, match=r"'lora'.: the adapter has no prefix"):
        model.eject_prefix_tuning("lora")
    with pytest.raises(adapters.AdapterError, match="No adapter with name 'nobody'"):
        model.eject_prefix_tuning("nobody")
