"""Heads of transformers' own classes become named heads and named heads theirs, with equal outputs and losses."""

import pytest
import torch
from safetensors.torch import load_file
from static_models import STATIC, fresh, inputs, static_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForPreTraining,
    LxmertConfig,
    RobertaForSequenceClassification,
    SeamlessM4TConfig,
    SeamlessM4Tv2Config,
)

import adapters
from adapters import AdapterError, AutoAdapterModel, CheckpointError
from adapters.heads.convert import DIFFERENT, TASKS, static_head

# The classes of which no named head computes the same, by DIFFERENT or by their layers.
REFUSED = {
    ("t5", "T5ForQuestionAnswering"),
    ("mt5", "MT5ForQuestionAnswering"),
    ("umt5", "UMT5ForQuestionAnswering"),
    ("roformer", "RoFormerForMultipleChoice"),
    ("xlnet", "XLNetForSequenceClassification"),
    ("xlnet", "XLNetLMHeadModel"),
}
CASES = sorted(STATIC.keys() - REFUSED)
BOTH_WAYS = [case for case in CASES if case[0] in {"bert", "gpt2", "t5", "bart", "vit", "electra", "gpt_neox", "umt5"}]


def scores(output) -> list[torch.Tensor]:
    return [output[key] for key in ("logits", "start_logits", "end_logits") if key in output]


def assert_equal(found, expected, what="logits") -> None:
    """Choices become rows here before the model sees them and there inside it, so sums may differ in order."""
    for ours, theirs in zip(scores(found), scores(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(("name", "label"), CASES)
def test_a_checkpoint_with_a_head_becomes_a_model_with_a_named_head(name, label, tmp_path):
    static, (_, kind) = static_model(name, label), STATIC[name, label]
    static.save_pretrained(tmp_path)
    model, info = AutoAdapterModel.from_pretrained(tmp_path, output_loading_info=True)
    strange = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    assert not [key for key in strange if "pooler" not in str(key) and key != "final_logits_bias"]
    assert model.active_head == "default" and list(model.heads) == ["default"] and not model.training
    assert model.heads["default"].config["head_type"] == kind
    given, labels = inputs(name, kind)
    with torch.no_grad():
        found, expected = model(**given, **labels), static(**given, **labels)
    assert_equal(found, expected)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "label"), BOTH_WAYS)
def test_heads_saved_with_adapters_go_both_ways(name, label, tmp_path):
    static, (_, kind) = static_model(name, label), STATIC[name, label]
    given, _ = inputs(name, kind)
    model = AutoAdapterModel.from_config(fresh(name)).eval()
    base = {key.removeprefix(f"{static.base_model_prefix}."): value for key, value in static.state_dict().items()}
    model.base_model.load_state_dict(
        {key: base.get(key, value) for key, value in model.base_model.state_dict().items()}
    )
    adapters.init(static)
    static.add_adapter("a", "lora[init_weights='bert']")
    static.set_active_adapters("a")
    static.save_adapter(tmp_path / "static", "a")
    expected = static(**given)
    model.load_adapter(tmp_path / "static", set_active=True)
    assert model.active_head == "a" and model.heads["a"].config["head_type"] == kind
    assert_equal(model(**given), expected)

    model.save_adapter(tmp_path / "named", "a")
    own = load_file(tmp_path / "static/model_head.safetensors")
    head = {key: value.clone() for key, value in own.items()}
    cleared = {key: torch.zeros_like(value) for key, value in own.items() if not is_tied(static, key)}
    static.load_state_dict(cleared, strict=False)
    static.load_adapter(tmp_path / "named", set_active=True)
    state = static.state_dict()
    assert all(torch.equal(state[key], value) for key, value in head.items() if not is_tied(static, key))
    assert static.config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2} or kind not in (
        "classification",
        "tagging",
    )


def is_tied(model, key: str) -> bool:
    tied = model.all_tied_weights_keys
    return key in tied or key in tied.values()


def test_refused_classes_load_without_a_head(tmp_path):
    for name, label in REFUSED:
        static_model(name, label).save_pretrained(tmp_path / label)
        model = AutoAdapterModel.from_pretrained(tmp_path / label)
        assert len(model.heads) == 0
    assert all(reason for reason in DIFFERENT.values())


@pytest.mark.parametrize("tie", [True, False])
def test_masked_language_models_keep_their_bias_and_ties(tie, tmp_path):
    static = static_model("bert", "BertForMaskedLM", tie_word_embeddings=tie)
    static.save_pretrained(tmp_path)
    model = AutoAdapterModel.from_pretrained(tmp_path)
    output = model.heads["default"].get_output_embeddings()
    assert torch.equal(output.bias, static.get_output_embeddings().bias)
    assert (output.weight is model.get_input_embeddings().weight) is tie
    model.save_pretrained(tmp_path / "again")
    again, info = AutoAdapterModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and list(again.heads) == ["default"]
    given, _ = inputs("bert", "masked_lm")
    assert torch.equal(again(**given).logits, static(**given).logits)


@pytest.mark.parametrize(
    ("problem", "kind"), [("multi_label_classification", "multilabel_classification"), ("regression", None)]
)
def test_the_problem_type_decides_the_loss(problem, kind, tmp_path):
    static = static_model("roberta", "RobertaForSequenceClassification", problem_type=problem)
    static.save_pretrained(tmp_path)
    model = AutoAdapterModel.from_pretrained(tmp_path)
    if kind is None:  # a regression onto several numbers
        assert len(model.heads) == 0
        return
    given, labels = inputs("roberta", "classification")[0], torch.tensor([[0.0, 1, 1], [1, 0, 0]])
    assert model.heads["default"].config["head_type"] == kind
    torch.testing.assert_close(model(**given, labels=labels).loss, static(**given, labels=labels).loss)


def test_arguments_of_from_pretrained_mean_what_they_do_in_transformers(tmp_path):
    static_model("bert", "BertForSequenceClassification").save_pretrained(tmp_path)
    names = {0: "no", 1: "maybe", 2: "yes"}
    for kind in (AutoAdapterModel, adapters.BertAdapterModel):
        model = kind.from_pretrained(
            tmp_path, dtype=torch.bfloat16, id2label=names, label2id={"no": 0, "maybe": 1, "yes": 2}
        )
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.get_labels() == ["no", "maybe", "yes"]


def test_a_head_alone_is_loaded_under_a_name(tmp_path):
    static = static_model("bert", "BertForSequenceClassification")
    adapters.init(static)
    static.save_head(str(tmp_path))
    model = AutoAdapterModel.from_config(fresh("bert"))
    with pytest.raises(CheckpointError, match="specify 'load_as'"):
        model.load_head(str(tmp_path))
    assert model.load_head(str(tmp_path), load_as="sst2", id2label={0: "a", 1: "b", 2: "c"})[1] == "sst2"
    assert torch.equal(model.heads["sst2"][1].weight, static.classifier.weight)
    assert model.get_labels() == ["a", "b", "c"]


def test_a_named_head_that_a_class_cannot_have_is_refused_with_the_difference(tmp_path):
    model = AutoAdapterModel.from_config(fresh("bert"))
    model.add_classification_head("two", num_labels=3)
    model.save_head(str(tmp_path), "two")
    static = AutoModelForSequenceClassification.from_config(fresh("bert"))
    adapters.init(static)
    before = static.classifier.weight.clone()
    with pytest.raises(CheckpointError, match="its layers is 2, that of BertForSequenceClassification is 1"):
        static.load_head(str(tmp_path))
    tagger = AutoModelForTokenClassification.from_config(fresh("bert"))
    adapters.init(tagger)
    with pytest.raises(CheckpointError, match="its head_type is 'classification'"):
        tagger.load_head(str(tmp_path))
    assert torch.equal(static.classifier.weight, before)


def test_a_head_of_a_like_architecture_is_taken(tmp_path):
    static = static_model("roberta", "RobertaForSequenceClassification")
    assert isinstance(static, RobertaForSequenceClassification)
    adapters.init(static)
    static.save_head(str(tmp_path))
    model = AutoAdapterModel.from_config(fresh("xlm-roberta"))
    model.load_head(str(tmp_path), load_as="h")
    assert torch.equal(model.heads["h"][4].weight, static.classifier.out_proj.weight)


def test_classes_for_other_tasks_load_as_a_base_model(tmp_path):
    BertForPreTraining(fresh("bert")).save_pretrained(tmp_path)
    assert len(AutoAdapterModel.from_pretrained(tmp_path).heads) == 0


def test_a_model_from_a_converted_checkpoint_trains_and_generates(tmp_path):
    static = static_model("gpt2", "GPT2LMHeadModel")
    static.save_pretrained(tmp_path)
    model = AutoAdapterModel.from_pretrained(tmp_path)
    tokens = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(tokens, **settings), static.generate(tokens, **settings))
    model.add_adapter("a", "lora")
    model.train_adapter("a")
    model(tokens, labels=tokens).loss.backward()
    assert model.heads["default"][0].weight.grad is None


def test_bert_with_both_names_of_its_bias_is_read(tmp_path):
    """Files of transformers 4 in torch's format have both."""
    static = static_model("bert", "BertForMaskedLM")
    static.config.save_pretrained(tmp_path)
    static.config.architectures = [BertForMaskedLM.__name__]
    static.config.save_pretrained(tmp_path)
    torch.save(static.state_dict(), tmp_path / "pytorch_model.bin")
    model = AutoAdapterModel.from_pretrained(tmp_path)
    given, _ = inputs("bert", "masked_lm")
    assert torch.equal(model(**given).logits, static(**given).logits)


def test_an_error_of_the_checkpoint_is_transformers_own():
    with pytest.raises(OSError):
        adapters.BertAdapterModel.from_pretrained("/nowhere/at/all")
    with pytest.raises(AdapterError):
        AutoAdapterModel.from_config(fresh("bert")).load_head("/nowhere/at/all")


@pytest.mark.parametrize(
    ("config", "label"),
    [
        (SeamlessM4TConfig, "SeamlessM4TForTextToText"),
        (SeamlessM4TConfig, "SeamlessM4TForSpeechToText"),
        (SeamlessM4Tv2Config, "SeamlessM4Tv2ForTextToText"),
        (SeamlessM4Tv2Config, "SeamlessM4Tv2ForSpeechToText"),
        (LxmertConfig, "LxmertForQuestionAnswering"),
    ],
)
def test_classes_of_models_of_several_parts_have_no_head_of_ours(config, label):
    """Their checkpoints are loaded into their own classes; a head of theirs is refused by its name."""
    names = ("encoder", "decoder", "speech_encoder", "t2u_encoder", "t2u_decoder")
    small = {} if config is LxmertConfig else {f"{name}_layers": 1 for name in names}
    assert static_head(label, config(**small), tuple(TASKS.values())) is None
