"""Law: what is kept from parameters is computed anew after a step, whichever way the optimizer makes it."""

import pytest
import torch
from transformers import BertConfig, BertModel

import adapters


@pytest.mark.parametrize("way", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("config", ["prefix_tuning", "hra", "dora"])
def test_evaluation_sees_each_step(config: str, way: dict[str, bool]):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=30, max_position_embeddings=16, **size))
    adapters.init(model)
    model.add_adapter("a", config)
    model.train_adapter("a")
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 0.1, **way)
    ids = torch.tensor([[3, 4, 5]])

    def evaluated(of: BertModel) -> torch.Tensor:
        of.eval()
        with torch.no_grad():
            return of(input_ids=ids).last_hidden_state

    before = evaluated(model)
    for _ in range(2):
        model.train()
        model(input_ids=ids).last_hidden_state.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluated(model)
    fresh = model.state_dict()
    model.delete_adapter("a")
    model.add_adapter("a", config)
    model.load_state_dict(fresh)
    model.set_active_adapters("a")
    assert not torch.equal(after, before)
    assert torch.allclose(after, evaluated(model), atol=1e-6)
