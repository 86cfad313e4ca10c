"""A model with code of its own in its folder, of names and a layout that no rule was written for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign_models import INTERFACE, EigenConfig, EigenModel
from transformers import AutoModel, dynamic_module_utils

import adapters
from adapters import AdapterError, AdapterSetup, Parallel

IDS = torch.arange(3, 27).view(4, 6)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What somebody has on the Hub: a config, weights, and the code."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    torch.manual_seed(0)
    found = tmp_path / "eigen"
    EigenModel(EigenConfig()).save_pretrained(found)
    shutil.copy(Path(__file__).with_name("foreign_models.py"), found / "modeling_eigen.py")
    config = json.loads((found / "config.json").read_text("utf-8"))
    config["auto_map"] = {"AutoConfig": "modeling_eigen.EigenConfig", "AutoModel": "modeling_eigen.EigenModel"}
    (found / "config.json").write_text(json.dumps(config), "utf-8")
    return found


def loaded(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    return model


@pytest.mark.parametrize("interface", [None, INTERFACE], ids=["rules", "described"])
def test_every_method_works_or_says_why_not(folder, interface, tmp_path):
    model = loaded(folder)
    plain = model(IDS)[0]
    rows = adapters.describe(model, interface=interface).methods
    adapters.init(model, interface=interface)
    assert torch.equal(model(IDS)[0], plain)
    works = []
    for row in rows:
        if not row.applies:
            with pytest.raises(AdapterError):
                model.add_adapter("a", row.method)
            continue
        works.append(row.method)
    for method in {"lora", "seq_bn", "double_seq_bn", "loreft"} & {*works}:
        model.add_adapter(method, method, set_active=True)
        for key, parameter in model.named_parameters():
            if f".{method}." in key:
                torch.nn.init.normal_(parameter.data, std=0.3)
        adapted = model(IDS)[0]
        assert not torch.equal(adapted, plain)
        with AdapterSetup(None):
            assert torch.equal(model(IDS)[0], plain)
        model.save_adapter(tmp_path / method, method)
        other = loaded(folder)
        adapters.init(other, interface=interface)
        other.load_adapter(tmp_path / method, set_active=True)
        torch.testing.assert_close(other(IDS)[0], adapted)
    assert {"seq_bn", "double_seq_bn", "loreft"} <= {*works}
    assert interface is None or "lora" in works  # no rule knows what "frage" means
    assert all("add_adapter" in row.reason for row in rows if not row.applies)


def test_parallel(folder):
    model = loaded(folder)
    adapters.init(model)
    model.add_adapter("a", "seq_bn")
    model.set_active_adapters(Parallel("a", None))
    assert model(IDS)[0].shape == (8, 6, 16)
