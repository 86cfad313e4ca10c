"""AutoAdapterModel and the XAdapterModel classes made from one factory."""

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from head_models import CONFIGS, TEXT_MODELS, adapter_model, batch, config
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    BertConfig,
    GenerationMixin,
    PreTrainedModel,
    Qwen2Config,
)

import adapters
from adapters import ADAPTER_MODEL_MAPPING, AutoAdapterModel

# The classes of adapters 1.3.0, each with the attribute of its base model.
CLASSES = {
    "AlbertAdapterModel": "albert",
    "BartAdapterModel": "model",
    "BeitAdapterModel": "beit",
    "BertAdapterModel": "bert",
    "BertGenerationAdapterModel": "bert",
    "CLIPAdapterModel": "clip",
    "DebertaAdapterModel": "deberta",
    "DebertaV2AdapterModel": "deberta",
    "DistilBertAdapterModel": "distilbert",
    "ElectraAdapterModel": "electra",
    "GPT2AdapterModel": "transformer",
    "GPTJAdapterModel": "transformer",
    "LlamaAdapterModel": "model",
    "MBartAdapterModel": "model",
    "MT5AdapterModel": "transformer",
    "MistralAdapterModel": "model",
    "PLBartAdapterModel": "model",
    "RobertaAdapterModel": "roberta",
    "T5AdapterModel": "transformer",
    "ViTAdapterModel": "vit",
    "WhisperAdapterModel": "model",
    "XLMRobertaAdapterModel": "roberta",
    "XmodAdapterModel": "roberta",
}
UNDERSTANDING = ["classification", "multilabel_classification", "multiple_choice", "tagging", "question_answering"]
UNDERSTANDING += ["dependency_parsing"]
GENERATING = ["classification", "multilabel_classification", "tagging", "question_answering", "causal_lm"]
HEAD_TYPES = {
    "BertAdapterModel": [*UNDERSTANDING, "masked_lm", "causal_lm"],
    "AlbertAdapterModel": [*UNDERSTANDING, "masked_lm"],
    "DistilBertAdapterModel": [*UNDERSTANDING, "masked_lm", "causal_lm"],
    "LlamaAdapterModel": GENERATING,
    "GPTJAdapterModel": GENERATING,
    "T5AdapterModel": ["classification", "multilabel_classification", "question_answering", "seq2seq_lm"],
    "WhisperAdapterModel": ["seq2seq_lm"],
    "ViTAdapterModel": ["image_classification"],
    "CLIPAdapterModel": [],
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_1x_is_importable_by_name(name):
    kind = getattr(adapters, name)
    assert kind.__name__ == kind.__qualname__ == name and issubclass(kind, PreTrainedModel)
    assert kind.base_model_prefix == CLASSES[name] and kind is getattr(adapters, name)
    assert pickle.loads(pickle.dumps(kind)) is kind
    assert ADAPTER_MODEL_MAPPING[kind.config_class] is kind and kind.base_class is MODEL_MAPPING[kind.config_class]


def test_names_are_listed_for_completion():
    listed = dir(adapters)
    assert {*CLASSES, "Qwen2AdapterModel", "AutoAdapterModel"} <= {*listed} and len(listed) == len({*listed})
    classes = [name for name in listed if name.endswith("AdapterModel") and name != "AutoAdapterModel"]
    assert len(classes) > 300 and {*classes} <= {*dir(importlib.import_module("adapters.models"))}
    assert issubclass(getattr(adapters, classes[-1]), PreTrainedModel)


PATHS = {
    "adapters.models.deberta_v2": "DebertaV2AdapterModel",
    "adapters.models": "BertAdapterModel",
    "adapters.models.auto": "AutoAdapterModel",
    "adapters.models.auto.adapter_model": "ADAPTER_MODEL_MAPPING",
    "adapters.models.bert": "BertAdapterModel",
    "adapters.models.xlm_roberta.adapter_model": "XLMRobertaAdapterModel",
    "adapters.heads.base": "PredictionHead",
    "adapters.heads.dependency_parsing": "BiaffineParsingHead",
}


def test_paths_of_1x_lead_to_the_same_classes():
    """In a process that has imported none of them before."""
    lines = [f"from {path} import {name}; assert {name} is adapters.{name}" for path, name in PATHS.items()]
    code = "\n".join(["import adapters", *lines])
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


@pytest.mark.parametrize("name", HEAD_TYPES)
def test_head_types_are_those_of_1x(name):
    assert list(getattr(adapters, name).head_types) == HEAD_TYPES[name]


def test_architectures_that_1x_did_not_know_have_a_class():
    settings = Qwen2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        vocab_size=20,
    )
    model = AutoAdapterModel.from_config(settings).eval()
    assert type(model) is adapters.Qwen2AdapterModel
    model.add_causal_lm_head("lm", layers=1, activation_function=None)
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(
        model.generate(tokens, max_new_tokens=3, do_sample=False),
        model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False),
    )


def test_mapping_covers_auto_model():
    assert len(ADAPTER_MODEL_MAPPING) == len(MODEL_MAPPING) and BertConfig in ADAPTER_MODEL_MAPPING


def test_a_fresh_process_unpickles_a_model(tmp_path):
    model = adapter_model("bert")
    model.add_classification_head("h")
    torch.save(model, tmp_path / "model.pt")
    load = f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)"
    code = f"import torch; {load}; print(type(model), model.active_head)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "<class 'adapters.auto.BertAdapterModel'> h"


@pytest.mark.parametrize("name", CONFIGS)
def test_classes_behave_like_those_of_transformers(name):
    model = adapter_model(name)
    base = AutoModel.from_config(config(name))
    assert type(model).__name__ == f"{type(model.config).__name__.removesuffix('Config')}AdapterModel"
    assert isinstance(model.base_model, type(base)) and model.base_model_prefix == (base.base_model_prefix or "model")
    assert model.main_input_name == base.main_input_name and model.config_class is base.config_class
    assert isinstance(model, GenerationMixin) is (name not in ("distilbert", "albert", "vit"))
    assert type(copy.deepcopy(model)) is type(model)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == model.base_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", CONFIGS)
def test_base_checkpoints_load_into_the_base_model(name, tmp_path):
    torch.manual_seed(0)
    source = AutoModel.from_config(config(name)).eval()
    source.save_pretrained(tmp_path)
    model, info = AutoAdapterModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not [key for key in info["missing_keys"] if "pooler" not in key]
    weights, loaded = source.state_dict(), model.base_model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items() if "pooler" not in key)
    assert len(model.heads) == 0 and not model.training


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_saved_models_come_back_with_their_heads(name, tmp_path):
    model = adapter_model(name)
    model.add_classification_head("z", num_labels=3, id2label={0: "no", 1: "maybe", 2: "yes"})
    model.add_qa_head("q")
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == [type(model).__name__]
    for again in (AutoAdapterModel.from_pretrained(tmp_path), type(model).from_pretrained(tmp_path)):
        assert type(again) is type(model) and list(again.heads) == ["q", "z"] and again.active_head == "z"
        assert again.get_labels() == ["no", "maybe", "yes"]
        assert again.get_prediction_heads_config() == model.get_prediction_heads_config()
        for head in ("q", "z"):
            first, second = model(**batch(name), head=head), again(**batch(name), head=head)
            assert torch.equal(first[0], second[0])


def test_a_loaded_model_keeps_the_precision_it_was_asked_for(tmp_path):
    model = adapter_model("bert")
    model.add_masked_lm_head("mlm")
    model.save_pretrained(tmp_path)
    again = AutoAdapterModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_two_models_of_one_config_class_share_no_heads():
    settings = config("bert")
    first, second = AutoAdapterModel.from_config(settings), AutoAdapterModel.from_config(config("bert"))
    first.add_classification_head("h")
    assert list(first.heads) == ["h"] and list(second.heads) == []
