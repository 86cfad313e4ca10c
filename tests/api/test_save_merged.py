"""``save_merged``: a plain model of transformers with equal outputs, and no trace of adapters."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import ENCODER_DECODERS, METHODS, adapted, disturb, inputs, output, plain, run
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import adapters
from adapters import AdapterError, Average, BertAdapterModel, Stack

MODELS = [("bert", False), ("albert", False), ("vit", False), ("gpt2", True), ("llama", True), ("t5", True)]


def automodel(name: str, head: bool):
    if not head:
        return AutoModel
    return AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM


def loaded(folder, auto):
    """The model, which must not lack anything nor have anything left over."""
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def check_plain(folder: Path, model) -> None:
    text = (folder / "config.json").read_text("utf-8")
    assert not any(f'"{name}"' in text for name in ("adapters", "prediction_heads", "architectures_of_adapters"))
    assert json.loads(text)["architectures"] == [type(model).__name__]
    assert not isinstance(model, adapters.ModelAdaptersMixin)


@pytest.mark.parametrize(("name", "head"), MODELS)
def test_what_is_saved_is_a_plain_model_with_equal_outputs(name: str, head: bool, tmp_path) -> None:
    model, batch = adapted(name, "lora", "ia3", "seq_bn", head=head), inputs(name)
    model.add_adapter("tuned", "ln_tuning")
    disturb(model, "tuned")
    model.set_active_adapters(Stack(Average("lora", None, weights=[0.6, 0.4]), "ia3", "tuned"))
    wanted, before = output(model, batch), {key: value.clone() for key, value in model.state_dict().items()}
    model.save_merged(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(output(model, batch), wanted)
    other = loaded(tmp_path, automodel(name, head))
    assert other.state_dict().keys() == plain(name, head).state_dict().keys()
    torch.testing.assert_close(output(other, batch), wanted, rtol=1e-5, atol=1e-5)
    check_plain(tmp_path, other)


def test_what_is_merged_is_saved_and_stays_merged(tmp_path) -> None:
    model, batch = adapted("bert", "lora", "ia3"), inputs("bert")
    one, two = run(model, batch, "lora"), run(model, batch, "ia3")
    model.set_active_adapters("lora")
    model.merge_adapter("lora")
    model.save_merged(tmp_path / "one")
    model.save_merged(tmp_path / "two", "ia3")
    assert model.adapter_sites.merged == "lora"
    torch.testing.assert_close(output(model, batch), one, rtol=1e-5, atol=1e-5)
    for folder, wanted in {"one": one, "two": two}.items():
        torch.testing.assert_close(output(loaded(tmp_path / folder, AutoModel), batch), wanted, rtol=1e-5, atol=1e-5)


def test_half_precision_and_shards(tmp_path) -> None:
    model, batch = adapted("llama", "lora", head=True).bfloat16(), inputs("llama")
    model.merge_adapter("lora")
    wanted = output(model, batch)
    model.save_merged(tmp_path, "lora", max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    other = loaded(tmp_path, AutoModelForCausalLM)
    assert other.dtype == torch.bfloat16
    assert torch.equal(output(other, batch), wanted)


def test_what_cannot_be_merged_is_named(tmp_path) -> None:
    model = adapted("bert", "lora", "seq_bn", "mam", "gated_lora")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for setup, message in {
        "seq_bn": "what 'seq_bn' has at encoder.layer.0.output_adapters, Bottleneck, does not change a weight",
        Stack("lora", "mam"): "what 'mam' has at",
        "gated_lora": "Cannot merge LoRA layer with gating",
        adapters.Parallel("lora", "lora"): "Parallel does not do the same to all tokens",
        "nobody": "No adapter with name 'nobody' found",
        None: "save_merged: no adapter is active; name what is to be saved",
    }.items():
        with pytest.raises(AdapterError, match=message):
            model.save_merged(tmp_path, setup)
    model.set_active_adapters("lora", skip_layers=[0])
    with pytest.raises(AdapterError, match=r"skips the layers \[0\]"):
        model.save_merged(tmp_path)
    model.set_active_adapters("seq_bn")
    model.merge_adapter("lora")
    with pytest.raises(AdapterError, match=r"lora is in the weights and Stack\[seq_bn\] is active"):
        model.save_merged(tmp_path)
    model.reset_adapter()
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_adapter_model_without_a_head_is_saved_as_its_base_model(tmp_path) -> None:
    model, batch = BertAdapterModel(plain("bert").config).eval(), inputs("bert")
    model.add_adapter("lora", METHODS["lora"], set_active=True)
    disturb(model, "lora")
    model.add_classification_head("unused", num_labels=3)
    model.active_head = None
    model.save_merged(tmp_path)
    other = loaded(tmp_path, AutoModel)
    check_plain(tmp_path, other)
    torch.testing.assert_close(output(other, batch), output(model, batch), rtol=1e-5, atol=1e-5)
    assert model.config.prediction_heads


HEADS = {
    "classification": ("SequenceClassification", {"layers": 1, "use_pooler": True, "num_labels": 3}),
    "multilabel_classification": ("SequenceClassification", {"layers": 1, "use_pooler": True, "num_labels": 3}),
    "multiple_choice": ("MultipleChoice", {"layers": 1, "use_pooler": True}),
    "tagging": ("TokenClassification", {"num_labels": 5}),
    "question_answering": ("QuestionAnswering", {}),
    "masked_lm": ("MaskedLM", {}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_an_adapter_model_is_saved_as_the_class_with_its_head(kind: str, tmp_path) -> None:
    model, batch = BertAdapterModel(plain("bert").config).eval(), inputs("bert")
    if kind == "multiple_choice":
        batch = {key: value.view(2, 2, -1) for key, value in batch.items()}
    model.add_adapter("lora", METHODS["lora"], set_active=True)
    disturb(model, "lora")
    task, settings = HEADS[kind]
    if kind == "multilabel_classification":
        model.add_classification_head("own", multilabel=True, **settings)
    else:
        add = model.add_qa_head if kind == "question_answering" else getattr(model, f"add_{kind}_head")
        add("own", **settings)
    for parameter in model.heads["own"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.add_classification_head("other", num_labels=7)
    model.active_head = "own"
    model.save_merged(tmp_path)
    other = loaded(tmp_path, getattr(transformers, f"AutoModelFor{task}"))
    check_plain(tmp_path, other)
    for own, wanted in zip(other(**batch).to_tuple(), model(**batch).to_tuple(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    if labels := model.heads["own"].config["label2id"]:
        assert other.config.label2id == labels
    assert (other.config.problem_type == "multi_label_classification") == (kind == "multilabel_classification")


def test_a_head_that_no_class_has_is_refused(tmp_path) -> None:
    model = BertAdapterModel(plain("bert").config)
    model.add_adapter("lora", METHODS["lora"], set_active=True)
    model.add_classification_head("deep", num_labels=2, layers=2)
    with pytest.raises(AdapterError, match="no class for BertAdapterModel with this head: its layers is 2, that of"):
        model.save_merged(tmp_path)
    model.add_tagging_head("tags")
    model.active_head = ["deep", "tags"]
    with pytest.raises(AdapterError, match="a plain model has one head, not 'deep' and 'tags'; name one"):
        model.save_merged(tmp_path)
    model.save_merged(tmp_path, head_name="tags")
    loaded(tmp_path, transformers.AutoModelForTokenClassification)
    static = adapted("bert", "lora")
    with pytest.raises(AdapterError, match="has one head of its own and no named ones"):
        static.save_merged(tmp_path, "lora", head_name="x")


def test_a_generating_head_stays_tied(tmp_path) -> None:
    config = plain("gpt2").config
    model, batch = adapters.AutoAdapterModel.from_config(config).eval(), inputs("gpt2")
    model.add_adapter("lora", METHODS["lora"], set_active=True)
    disturb(model, "lora")
    model.add_prediction_head(adapters.CausalLMHead(model, "words"))
    model.save_merged(tmp_path)
    other = loaded(tmp_path, AutoModelForCausalLM)
    assert other.lm_head.weight is other.transformer.wte.weight
    torch.testing.assert_close(output(other, batch), output(model, batch), rtol=1e-5, atol=1e-5)
