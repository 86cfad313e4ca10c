"""The formulas of docs/scaling.md count what models have; its table and its launch files are as they should be."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import adapters

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "docs/scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


CONFIGS = {
    "lora[r=4]": lambda scaling, shape: scaling.lora(shape, 4),
    "seq_bn[reduction_factor=4]": lambda scaling, shape: scaling.bottleneck(shape, 4),
    "prefix_tuning_flat[prefix_length=5]": lambda scaling, shape: scaling.prefix(shape, 5),
    "loreft[r=2,tied_weights=True]": lambda scaling, shape: scaling.loreft(shape, 2),
}


@pytest.mark.parametrize("sizes", [(16, 2, 24, 8, 40), (32, 3, 48, 32, 50)])
def test_the_formulas_count_what_a_model_has(scaling: Any, sizes: tuple[int, ...]) -> None:
    width, layers, inner, keys, words = sizes
    shape = scaling.Shape("tiny", *sizes)
    config = LlamaConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=inner, vocab_size=words,
                         num_attention_heads=4, num_key_value_heads=4 * keys // width)  # fmt: skip
    model = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters()
    adapters.init(model)
    for number, (text, count) in enumerate(CONFIGS.items()):
        model.add_adapter(f"a{number}", text)
        model.train_adapter(f"a{number}")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == count(scaling, shape), text


def test_known_models_have_the_sizes_that_their_names_say(scaling: Any) -> None:
    for shape in scaling.SHAPES[1:]:
        assert shape.parameters() / 1e9 == pytest.approx(float(shape.name.partition("B")[0]), rel=0.03)


def test_the_table_is_what_the_formulas_give(scaling: Any) -> None:
    assert scaling.PAGE.read_text("utf-8").endswith(scaling.table(2048))


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_accelerate_reads_the_launch_files(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = ROOT / f"examples/scaling/{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    assert yaml.safe_load(file.read_text("utf-8")).get("fsdp_config", {}).get("fsdp_version", 2) == 2
