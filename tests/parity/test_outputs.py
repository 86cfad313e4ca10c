"""Fusion attentions, and the outputs of several heads with labels, are those of 1.3.0; made by ``make_outputs.py``."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import CASES, GOLDENS, GROUPS, Case, archive, arguments, inputs
from golden_runs import load, new_model, run
from make_outputs import ARCHITECTURES, HEADS, SETUPS
from safetensors.torch import load_file

from adapters import AutoAdapterModel, composition

EXPECTED: dict[str, Any] = json.loads((GOLDENS / "fusion_attentions.json").read_text())
FUSED = [case for case in CASES if case.inputs and any(f"{case.id}/{name}" in EXPECTED for name in case.inputs)]


def test_every_fusion_of_these_architectures_has_its_attentions() -> None:
    wanted = [case for case in CASES if case.inputs and "Fuse" in case.setup and case.architecture in ARCHITECTURES]
    assert wanted == FUSED
    assert len(EXPECTED) >= 18


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.id)
def test_fusion_attentions(case: Case) -> None:
    group, root = GROUPS[case.group], archive(case.architecture)
    model = new_model(root, group)
    load(model, group, root)
    for name in case.inputs:
        given = arguments(case.architecture, group, name)
        found = run(model, case.setup, given, output_adapter_fusion_attentions=True).adapter_fusion_attentions
        wanted = EXPECTED[f"{case.id}/{name}"]
        real = given["attention_mask"].bool().numpy() if "attention_mask" in given else slice(None)
        assert found.keys() == wanted.keys()
        for fusion, layers in wanted.items():
            assert sorted(map(str, found[fusion])) == sorted(layers)
            for layer, places in layers.items():
                assert found[fusion][int(layer)].keys() == places.keys()
                for place, values in places.items():
                    mine, theirs = found[fusion][int(layer)][place], np.array(values)
                    assert mine.shape == theirs.shape
                    np.testing.assert_allclose(mine[real], theirs[real], atol=1e-5)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("heads")
    with zipfile.ZipFile(GOLDENS / "multi_heads.zip") as packed:
        packed.extractall(folder)
    return folder, load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", SETUPS)
def test_several_heads_with_labels(several: Any, architecture: str, case: str) -> None:
    folder, expected = several
    model = AutoAdapterModel.from_pretrained(archive(architecture) / "base", attn_implementation="eager").eval()
    for name in HEADS:
        model.load_adapter(folder / architecture / name)
    model.set_active_adapters(eval(SETUPS[case], dict(vars(composition))))
    with torch.no_grad():
        output = model(**inputs(architecture)["right"], labels=torch.tensor([2, 0, 1]))
    wanted = {key.split("/", 2)[2]: v for key, v in expected.items() if key.startswith(f"{architecture}/{case}/")}
    assert wanted
    found = {f"{number}/{kind}": part[kind] for number, part in enumerate(output) for kind in ("logits", "loss")}
    found["loss"] = output.loss
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
