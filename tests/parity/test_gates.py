"""Gating scores are those that 1.3.0 reports, where it is right: of batches without padding (C9).

Its columns are in the order in which the gates are called, here always in the order q, k, v.
"""

import json

import numpy as np
import pytest
from golden import CASES, GOLDENS, GROUPS, Case, archive, arguments
from golden_runs import load, new_model, run

from adapters import AdapterConfig, ConfigUnion

EXPECTED = json.loads((GOLDENS / "gates.json").read_text())
GATED = [case for case in CASES if case.inputs and "use_gating" in str(GROUPS[case.group].adapters)]
IDS = [f"{case.id}/{name}" for case in GATED for name in case.inputs]


def in_order(architecture: str, place: str, matrices: list[str], values: np.ndarray) -> np.ndarray:
    """The columns of 1.3.0: ALBERT calls its layer twice, ViT its projections in the order k, v, q."""
    if place == "selfattn_lora" and architecture == "albert":
        return values.reshape(len(values), 2, -1).swapaxes(1, 2).reshape(len(values), -1)
    if place == "selfattn_lora" and architecture == "vit" and "q" in matrices:
        return np.roll(values, 1, axis=1)
    return values


def attention_matrices(config: AdapterConfig) -> list[str]:
    """Where the LoRA of a configuration sits."""
    parts = config.configs if isinstance(config, ConfigUnion) else [config]
    return next((part["attn_matrices"] for part in parts if "attn_matrices" in part), [])


def test_every_gated_group_has_its_scores() -> None:
    assert list(EXPECTED) == IDS


@pytest.mark.filterwarnings("ignore:.*ignored alpha; alpha is set to r:UserWarning")
@pytest.mark.parametrize("case", GATED, ids=lambda case: case.id)
def test_gating_scores(case: Case) -> None:
    group, root = GROUPS[case.group], archive(case.architecture)
    model = new_model(root, group)
    load(model, group, root)
    for name in case.inputs:
        given = arguments(case.architecture, group, name)
        found = run(model, case.setup, given, output_adapter_gating_scores=True).adapter_gating_scores
        wanted = EXPECTED[f"{case.id}/{name}"]
        assert found.keys() == wanted.keys()
        for adapter, layers in wanted.items():
            assert sorted(map(str, found[adapter])) == sorted(layers)
            for layer, places in layers.items():
                assert found[adapter][int(layer)].keys() == places.keys()
                matrices = attention_matrices(model.adapters_config.get(adapter))
                for place, values in places.items():
                    values = in_order(case.architecture, place, matrices, np.array(values))
                    np.testing.assert_allclose(found[adapter][int(layer)][place], values, atol=1e-5)
