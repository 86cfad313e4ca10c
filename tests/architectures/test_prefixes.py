"""Prefixes where attention is not transformers' own function, or has keys and values of other shapes than are read."""

import pytest
from cells import CHECKS, run_type

pytestmark = pytest.mark.filterwarnings("ignore")
WORKING = ["bigbird_pegasus", "deberta", "deepseek_v3", "falcon", "florence_vision", "fsmt", "funnel", "gptj", "jetmoe"]
WORKING += ["maskformer-swin", "mistral_large4_text", "mpt", "openai-gpt", "wavlm", "xlm", "xlnet"]
REFUSED = {
    "led": "changes its scores by pad",
    "lilt": "changes its scores by another product's",
    "qwen2_vl_vision": "has the positions of all rows in one dimension",
    "sew-d": "has a softmax with a gradient of its own",
}


@pytest.mark.parametrize("model_type", WORKING)
def test_a_prefix_keeps_all_laws(model_type: str) -> None:
    assert run_type(model_type, ("prefix_tuning",), len(CHECKS))["prefix_tuning"][0] == "works"


@pytest.mark.parametrize("model_type", REFUSED)
def test_attention_that_no_prefix_can_enter_is_refused(model_type: str) -> None:
    kind, why = run_type(model_type, ("prefix_tuning",), 4)["prefix_tuning"]
    assert kind == "refused"
    assert REFUSED[model_type] in why
    assert why.endswith("; use LoRA or a bottleneck adapter for this model.")
