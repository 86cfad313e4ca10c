"""Prediction heads: layers, inputs, losses, dispatch, labels, tied weights."""

import copy
import inspect
import pickle

import pytest
import torch
from head_models import (
    CONFIGS,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    EOS,
    PAD,
    TEXT_MODELS,
    VOCABULARY,
    adapter_model,
    batch,
    config,
)
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_outputs import SequenceClassifierOutput

import adapters.composition as ac
from adapters import AdapterSetup, AutoAdapterModel
from adapters.heads import MultiHeadOutput, PredictionHead
from adapters.heads.model_mixin import MODEL_HEAD_MAP

ADD = {
    "classification": lambda model, name: model.add_classification_head(name, num_labels=3),
    "multilabel_classification": lambda model, name: model.add_classification_head(name, num_labels=3, multilabel=True),
    "multiple_choice": lambda model, name: model.add_multiple_choice_head(name, num_choices=2),
    "tagging": lambda model, name: model.add_tagging_head(name, num_labels=3),
    "question_answering": lambda model, name: model.add_qa_head(name),
    "image_classification": lambda model, name: model.add_image_classification_head(name, num_labels=3),
    "masked_lm": lambda model, name: model.add_masked_lm_head(name),
    "causal_lm": lambda model, name: model.add_causal_lm_head(name),
    "seq2seq_lm": lambda model, name: model.add_seq2seq_lm_head(name),
}
LABELS = {
    "classification": {"labels": torch.tensor([0, 2])},
    "multilabel_classification": {"labels": torch.tensor([[0, 1, 1], [1, 0, 0]])},
    "multiple_choice": {"labels": torch.tensor([1])},
    "tagging": {"labels": torch.tensor([[0, 1, 2, -100, 1, 0], [2, 2, 1, 0, 1, 1]])},
    "question_answering": {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([[2], [9]])},
    "image_classification": {"labels": torch.tensor([0, 2])},
    "masked_lm": {"labels": torch.tensor([[-100, 5, -100, -100, 7, -100], [4, -100, -100, -100, -100, -100]])},
    "causal_lm": {"labels": torch.tensor([[3, 5, 9, 6, 7, 8], [4, 3, 3, 5, -100, -100]])},
    "seq2seq_lm": {"labels": torch.tensor([[3, 5, 9], [4, 2, -100]])},
}
OFFERED = [(name, kind) for name in CONFIGS for kind in adapter_model(name).head_types]


def inputs_for(name: str, kind: str) -> dict[str, torch.Tensor]:
    inputs = batch(name)
    return {key: value[None] for key, value in inputs.items()} if kind == "multiple_choice" else inputs


def reference_loss(kind: str, output, labels, mask):
    target = labels.get("labels")
    match kind:
        case "multilabel_classification":
            return binary_cross_entropy_with_logits(output.logits, target.float())
        case "tagging":
            return cross_entropy(output.logits[mask == 1], target[mask == 1])
        case "question_answering":
            end = cross_entropy(output.end_logits[:1], torch.tensor([2]))  # position 9 lies outside the sequence
            return (cross_entropy(output.start_logits, labels["start_positions"]) + end) / 2
        case "causal_lm":
            return cross_entropy(output.logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
        case "masked_lm" | "seq2seq_lm":
            return cross_entropy(output.logits.flatten(0, 1), target.flatten())
        case _:
            return cross_entropy(output.logits, target)


@pytest.mark.parametrize(("name", "kind"), OFFERED)
def test_each_head_computes_its_loss_and_trains(name, kind):
    model = adapter_model(name)
    ADD[kind](model, "h")
    assert type(model.heads["h"]) is MODEL_HEAD_MAP[kind] and model.active_head == "h"
    inputs, labels = inputs_for(name, kind), LABELS[kind]
    kept = {key: value.clone() for key, value in labels.items()}
    output = model(**inputs, **labels)
    expected = reference_loss(kind, output, labels, inputs.get("attention_mask"))
    torch.testing.assert_close(output.loss, expected)
    assert all(torch.equal(labels[key], kept[key]) for key in labels), "the caller's labels were changed"
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.heads["h"].parameters())
    assert "loss" not in model(**inputs)


@pytest.mark.parametrize(("name", "kind"), OFFERED)
def test_tuples_equal_named_outputs(name, kind):
    model = adapter_model(name)
    ADD[kind](model, "h")
    named = model(**inputs_for(name, kind), **LABELS[kind], output_hidden_states=True)
    plain = model(**inputs_for(name, kind), **LABELS[kind], output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(named.to_tuple())
    assert torch.equal(plain[0], named.loss) and torch.equal(plain[1], named.to_tuple()[1])


def test_regression_is_a_head_with_one_label():
    model = adapter_model("bert")
    model.add_classification_head("score", num_labels=1)
    output = model(**batch("bert"), labels=torch.tensor([1, 3]))
    torch.testing.assert_close(output.loss, mse_loss(output.logits.flatten(), torch.tensor([1.0, 3.0])))


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"layers": 1}, [nn.Dropout, nn.Linear]),
        ({"layers": 2}, [nn.Dropout, nn.Linear, nn.Tanh, nn.Dropout, nn.Linear]),
        ({"layers": 2, "activation_function": None}, [nn.Dropout, nn.Linear, nn.Dropout, nn.Linear]),
    ],
)
def test_layers_stand_at_the_indices_of_the_file_format(settings, layers):
    model = adapter_model("bert")
    model.add_classification_head("h", num_labels=3, **settings)
    assert [type(layer) for layer in model.heads["h"]] == layers
    linear = [
        f"heads.h.{i}.{part}" for i, layer in enumerate(layers) if layer is nn.Linear for part in ("weight", "bias")
    ]
    assert [key for key in model.state_dict() if key.startswith("heads.")] == linear


def test_lm_head_layers_stand_at_the_indices_of_the_file_format():
    model = adapter_model("albert")
    model.add_masked_lm_head("mlm")
    shapes = {key: tuple(value.shape) for key, value in model.heads["mlm"].state_dict().items()}
    assert set(shapes) == {f"{i}.{part}" for i in (0, 2, 3) for part in ("weight", "bias")}
    assert shapes["0.weight"] == (8, 16) and shapes["3.weight"] == (VOCABULARY, 8)


@pytest.mark.parametrize(
    ("name", "probability"), [("bert", 0.1), ("distilbert", 0.2), ("gpt2", 0.1), ("llama", 0.0), ("t5", 0.0)]
)
def test_dropout_is_the_models(name, probability):
    model = adapter_model(name)
    model.add_classification_head("h")
    assert model.heads["h"][0].p == probability


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_head_has_the_models_precision_and_mode(dtype):
    model = adapter_model("bert").to(dtype)
    for training in (True, False):
        model.train(training)
        model.add_tagging_head("h", overwrite_ok=True)
        assert model.heads["h"].training is training
        assert {parameter.dtype for parameter in model.heads["h"].parameters()} == {dtype}
    assert model(**batch("bert")).logits.dtype is dtype


# --- the sentence vector -------------------------------------------------------------------------------------------


def padded(tokens: torch.Tensor, count: int, left: bool) -> dict[str, torch.Tensor]:
    pad = torch.full((len(tokens), count), PAD)
    parts = (pad, tokens) if left else (tokens, pad)
    ids = torch.cat(parts, dim=1)
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("pad_token_id", [PAD, None])
def test_decoders_read_the_last_token_on_both_sides_of_the_padding(name, left, pad_token_id):
    model = adapter_model(name)
    model.config.pad_token_id = pad_token_id
    model.add_classification_head("h")
    tokens = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))
    expected = model(tokens).logits
    torch.testing.assert_close(model(**padded(tokens, 3, left)).logits, expected, atol=1e-5, rtol=1e-5)
    hidden = model.base_model(tokens).last_hidden_state[:, -1]
    torch.testing.assert_close(model.heads["h"](model.base_model(tokens), hidden, return_dict=True).logits, expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_read_the_first_token(name):
    model = adapter_model(name)
    model.add_classification_head("h", layers=1)
    hidden = model.base_model(**batch(name)).last_hidden_state
    torch.testing.assert_close(model(**batch(name)).logits, model.heads["h"][1](hidden[:, 0]))


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "vit"])
def test_use_pooler_reads_the_pooler(name):
    model = adapter_model(name)
    add = model.add_image_classification_head if name == "vit" else model.add_classification_head
    add("h", layers=1, use_pooler=True)
    pooled = model.base_model(**batch(name)).pooler_output
    torch.testing.assert_close(model(**batch(name)).logits, model.heads["h"][1](pooled))


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders_read_the_last_end_token(name):
    model = adapter_model(name)
    model.add_classification_head("h", layers=1)
    inputs = batch(name)
    shifted = model.prepare_decoder_input_ids_from_labels(inputs["input_ids"])
    hidden = model.base_model(**inputs, decoder_input_ids=shifted).last_hidden_state
    ends = torch.stack([hidden[0, 5], hidden[1, 3]])
    torch.testing.assert_close(model(**inputs).logits, model.heads["h"][1](ends))
    unended = inputs["input_ids"].masked_fill(inputs["input_ids"] == EOS, 7)
    assert model(input_ids=unended, attention_mask=inputs["attention_mask"]).logits.shape == (2, 2)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_decoder_inputs_of_another_length_are_read_at_their_end(name):
    model = adapter_model(name)
    model.add_classification_head("h", layers=1)
    decoder = torch.tensor([[EOS, 5, 6, EOS], [EOS, 8, EOS, PAD]])
    hidden = model.base_model(**batch(name), decoder_input_ids=decoder).last_hidden_state
    expected = model.heads["h"][1](torch.stack([hidden[0, 3], hidden[1, 2]]))
    torch.testing.assert_close(model(**batch(name), decoder_input_ids=decoder).logits, expected)


# --- active heads and dispatch -------------------------------------------------------------------------------------


def two_heads(name: str = "bert"):
    model = adapter_model(name)
    model.add_classification_head("a", num_labels=2)
    model.add_classification_head("b", num_labels=3)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_head_the_base_output_comes_back(name):
    model = adapter_model(name)
    inputs = batch(name)
    output = model(**inputs)
    if name in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["input_ids"])
    base = model.base_model(**inputs)
    assert type(output) is type(base) and torch.equal(output[0], base[0])
    assert isinstance(model(**batch(name), return_dict=False), tuple)


def test_active_head_reads_back_what_was_set():
    model = two_heads()
    assert model.active_head == "b" and model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    block = ac.BatchSplit("a", "b", batch_sizes=[1, 1])
    for given, read in [("a", "a"), (["a", "b"], ["a", "b"]), (["b"], "b"), (block, block), (None, None), ("", None)]:
        model.active_head = given
        assert model.active_head == read
    model.active_head = "a"
    assert model.config.label2id == {"LABEL_0": 0, "LABEL_1": 1}


def test_head_argument_wins_over_context_and_active_head():
    model = two_heads()
    assert model(**batch("bert")).logits.shape == (2, 3)
    assert model(**batch("bert"), head="a").logits.shape == (2, 2)
    with AdapterSetup(None, head_setup="a"):
        assert model(**batch("bert")).logits.shape == (2, 2)
        assert model(**batch("bert"), head="b").logits.shape == (2, 3)


def test_several_heads_share_the_batch_and_sum_no_loss():
    model = two_heads()
    model.active_head = ["a", "b"]
    output = model(**batch("bert"), labels=torch.tensor([0, 1]))
    assert isinstance(output, MultiHeadOutput) and len(output) == 2 and output.loss is None
    assert [part.logits.shape for part in output] == [(2, 2), (2, 3)]
    for part, name in zip(output, ("a", "b"), strict=True):
        assert torch.equal(part.logits, model(**batch("bert"), head=name).logits) and part.loss is not None
    plain = model(**batch("bert"), return_dict=False)
    assert isinstance(plain, MultiHeadOutput) and all(isinstance(part, tuple) for part in plain)


def test_batch_split_gives_each_head_its_rows():
    model = two_heads()
    inputs, labels = batch("bert", rows=3), torch.tensor([1, 0, 2])
    model.active_head = ac.BatchSplit("a", "b", batch_sizes=[2, 1])
    output = model(**inputs, labels=labels, output_hidden_states=True)
    rows = [slice(0, 2), slice(2, 3)]
    separate = [
        model(**{key: value[part] for key, value in inputs.items()}, labels=labels[part], head=name)
        for name, part in zip(("a", "b"), rows, strict=True)
    ]
    for part, expected in zip(output, separate, strict=True):
        torch.testing.assert_close(part.logits, expected.logits)
        torch.testing.assert_close(part.loss, expected.loss)
    torch.testing.assert_close(output.loss, separate[0].loss + separate[1].loss)
    assert output[1].hidden_states[0].shape[0] == 1 and output.hidden_states[0].shape[0] == 3


def test_batch_split_of_taggers_slices_the_mask():
    model = adapter_model("bert")
    model.add_tagging_head("a", num_labels=3)
    model.add_tagging_head("b", num_labels=3)
    model.active_head = ac.BatchSplit("a", "b", batch_sizes=[1, 1])
    output = model(**batch("bert"), **LABELS["tagging"])
    assert output["loss"].isfinite() and output.logits.shape == (2, 6, 3)


def test_multi_head_output_is_a_list_and_a_mapping():
    parts = [SequenceClassifierOutput(logits=torch.zeros(2, 3)), SequenceClassifierOutput(logits=torch.ones(1, 3))]
    output = MultiHeadOutput(head_outputs=parts, loss=torch.tensor(1.0))
    assert output[0] is parts[0] and list(output) == parts and len(output) == 2 and output["loss"] == 1
    assert output.logits.shape == (3, 3) and dict(output.items())["head_outputs"] == parts
    output[0] = "other"
    assert output[0] == "other" and copy.deepcopy(output)[0] == "other"
    assert list(MultiHeadOutput(head_outputs=[(1, 2)])) == [(1, 2)]


def test_deleted_heads_are_gone_everywhere():
    model = two_heads()
    model.active_head = ["a", "b"]
    model.delete_head("b")
    assert model.active_head == "a" and list(model.config.prediction_heads) == ["a"]
    assert not any("heads.b" in key for key in model.state_dict())
    model.active_head = ac.BatchSplit("a", batch_sizes=[2])
    model.delete_head("a")
    model.delete_head("a")
    assert model.active_head is None and len(model.heads) == 0
    assert model(**batch("bert")).last_hidden_state.shape == (2, 6, 16)


def test_multiple_choice_reads_the_choices_as_rows():
    model = adapter_model("bert")
    model.add_multiple_choice_head("mc", num_choices=2)
    rows = batch("bert", rows=4)
    stacked = {key: value.unflatten(0, (2, 2)) for key, value in rows.items()}
    output = model(**stacked)
    assert output.logits.shape == (2, 2)
    embedded = model.get_input_embeddings()(stacked["input_ids"])
    again = model(inputs_embeds=embedded, attention_mask=stacked["attention_mask"])
    torch.testing.assert_close(again.logits, output.logits)


# --- configs, labels, custom heads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), OFFERED)
def test_a_head_is_rebuilt_from_its_config(name, kind):
    model = adapter_model(name)
    ADD[kind](model, "h")
    head = model.heads["h"]
    assert model.config.prediction_heads["h"] is head.config and model.get_prediction_heads_config() == {
        "h": head.config
    }
    kept = copy.deepcopy(head.config)
    model.add_prediction_head_from_config("again", head.config, set_active=False)
    again = model.heads["again"]
    assert head.config == kept == again.config and model.active_head == "h" and type(again) is type(head)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in head.state_dict().items()}
    assert head.get_label_names() == list(LABELS[kind])


def test_labels():
    model = adapter_model("bert")
    model.add_tagging_head("ner", num_labels=2, id2label={0: "O", 1: "B"})
    model.add_masked_lm_head("mlm")
    assert model.get_labels("ner") == ["O", "B"] and model.get_labels_dict("ner") == {0: "O", 1: "B"}
    assert model.heads["ner"].config["label2id"] == {"O": 0, "B": 1}
    assert model.get_labels() is None and model.config.id2label is None
    model.active_head = "ner"
    assert model.get_labels() == ["O", "B"] and model.config.label2id == {"O": 0, "B": 1}


class MeanHead(PredictionHead):
    def __init__(self, model, head_name, num_labels=2, scale=1.0):
        super().__init__(head_name)
        self.config = {"num_labels": num_labels, "scale": scale}
        self.build(model)

    def forward(self, outputs, cls_output=None, attention_mask=None, return_dict=False, **kwargs):
        logits = super().forward(outputs[0].mean(dim=1)) * self.config["scale"] + kwargs.get("offset", 0.0)
        return SequenceClassifierOutput(logits=logits) if return_dict else (logits, *outputs[1:])


def test_custom_heads_take_their_own_inputs_and_survive_saving(tmp_path):
    model = adapter_model("bert")
    model.register_custom_head("mean", MeanHead)
    model.add_custom_head("mean", "mine", num_labels=4, scale=2.0)
    inputs = batch("bert")
    output = model(**inputs, offset=1.0, output_hidden_states=True)
    torch.testing.assert_close(output.logits, model(**inputs).logits + 1)
    assert output.logits.shape == (2, 4) and len(output.hidden_states) == 3
    assert model.heads["mine"].config["head_type"] == "mean" and not type(model).custom_heads
    model.save_pretrained(tmp_path)
    kind = type("Mine", (type(model),), {"custom_heads": {"mean": MeanHead}})
    again = kind.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_head_made_by_hand_can_be_added():
    model = adapter_model("bert")
    head = MODEL_HEAD_MAP["tagging"](model, "hand", num_labels=5)
    model.add_prediction_head(head, set_active=False)
    assert model.heads["hand"] is head and model.active_head is None


# --- language models -----------------------------------------------------------------------------------------------

LM_HEADS = [(n, k) for n, k in OFFERED if k in ("masked_lm", "causal_lm", "seq2seq_lm")]
# transformers itself does not save a resized BART with untied weights completely.
TIES = [(n, k, tie) for n, k in LM_HEADS for tie in (True, False) if (n, tie) != ("bart", False)]


@pytest.mark.parametrize(("name", "kind", "tie"), TIES)
def test_lm_heads_are_tied_resized_saved_and_loaded(name, kind, tie, tmp_path):
    settings = config(name)
    settings.tie_word_embeddings = tie
    model = AutoAdapterModel.from_config(settings).eval()
    ADD[kind](model, "lm")
    ADD["classification"](model, "c")  # the active head is another one
    model.resize_token_embeddings(VOCABULARY + 5)
    inputs = batch(name)
    for found in (model, copy.deepcopy(model)):
        output, embeddings = found.heads["lm"].get_output_embeddings(), found.get_input_embeddings()
        assert (output.weight is embeddings.weight) is tie
        assert (
            output.out_features == embeddings.num_embeddings == found.heads["lm"].config["vocab_size"] == VOCABULARY + 5
        )
        assert output.bias is None or len(output.bias) == VOCABULARY + 5
    logits = model(**inputs, head="lm").logits
    assert logits.shape[-1] == VOCABULARY + 5 and model(**inputs, **LABELS[kind], head="lm").loss.isfinite()
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (again.heads["lm"].get_output_embeddings().weight is again.get_input_embeddings().weight) is tie
    assert torch.equal(again(**inputs, head="lm").logits, logits)


def test_a_second_lm_head_and_a_deleted_one_leave_the_ties_right():
    model = adapter_model("bert")
    model.add_masked_lm_head("with-dash+plus")
    model.add_causal_lm_head("b", layers=3)
    assert set(model.all_tied_weights_keys) == {"heads.with-dash+plus.3.weight", "heads.b.6.weight"}
    fresh = nn.Embedding(VOCABULARY, 16)
    model.set_input_embeddings(fresh)
    model.tie_weights()
    assert model.heads["b"][6].weight is fresh.weight is model.heads["with-dash+plus"][3].weight
    model.delete_head("b")
    assert set(model.all_tied_weights_keys) == {"heads.with-dash+plus.3.weight"}


def test_output_embeddings_are_the_active_heads():
    model = adapter_model("bert")
    assert model.get_output_embeddings() is None
    model.add_masked_lm_head("lm")
    model.add_classification_head("c")
    assert model.get_output_embeddings() is None
    model.active_head = ["lm", "c"]
    assert model.get_output_embeddings() == [model.heads["lm"][3], None]
    model.active_head = "lm"
    new = nn.Linear(16, 7)
    model.set_output_embeddings(new)
    assert model.get_output_embeddings() is new and model.heads["lm"].config["vocab_size"] == 7


def with_lm_head(name: str):
    """An adapter model and the static language model of the same weights."""
    auto = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    model, static = adapter_model(name), auto.from_config(config(name)).eval()
    if name in ENCODER_DECODERS:
        model.add_seq2seq_lm_head("lm")
    else:
        model.add_causal_lm_head("lm", layers=1, activation_function=None)
        model.delete_head("lm")
        model.add_prediction_head(MODEL_HEAD_MAP["causal_lm"](model, "lm"))
    prefix = f"{static.base_model_prefix}."
    weights = {key.removeprefix(prefix): value for key, value in static.state_dict().items()}
    model.base_model.load_state_dict({key: weights[key] for key in model.base_model.state_dict()})
    model.heads["lm"].get_output_embeddings().weight.data.copy_(static.get_output_embeddings().weight)
    return model, static


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_lm_heads_equal_the_static_language_model_and_generate(name):
    model, static = with_lm_head(name)
    inputs, kind = batch(name), "seq2seq_lm" if name in ENCODER_DECODERS else "causal_lm"
    ours, theirs = model(**inputs, **LABELS[kind]), static(**inputs, **LABELS[kind])
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    prompt = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = static.generate(**prompt, **settings)
    assert torch.equal(model.generate(**prompt, **settings), expected)
    assert torch.equal(model.generate(**prompt, **settings, use_cache=False), expected)
    beams = dict(settings, num_beams=3)
    assert torch.equal(model.generate(**prompt, **beams), static.generate(**prompt, **beams))


# --- what the Trainer and torch need -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_shows_the_inputs_by_name(name):
    model = adapter_model(name)
    names = list(inspect.signature(model.forward).parameters)
    assert names[0] == model.main_input_name and {"head", "return_dict", "kwargs"} <= set(names)
    assert model.accepts_loss_kwargs is False


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_inputs_may_be_positional(name):
    model = adapter_model(name)
    model.add_classification_head("h")
    inputs = batch(name)
    expected = model(**inputs).logits
    positional = [inputs.get(key) for key in list(inspect.signature(model.base_model.forward).parameters)[:3]]
    kept = {key: value for key, value in inputs.items() if not any(value is given for given in positional)}
    assert torch.equal(model(*positional, **kept).logits, expected)


def test_adapter_to_moves_the_head_of_the_same_name():
    model = two_heads()
    model.add_adapter("a")
    model.adapter_to("a", dtype=torch.float64)
    assert {p.dtype for p in model.heads["a"].parameters()} == {torch.float64}
    assert {p.dtype for p in model.heads["b"].parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_heads_compile_without_a_graph_break(name):
    model = adapter_model(name)
    model.add_classification_head("h")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch(name)).logits, model(**batch(name)).logits)


# --- with adapters -------------------------------------------------------------------------------------------------


def with_adapters(name: str = "bert"):
    """A model with two adapters that change its outputs, and a head of each name."""
    model = two_heads(name)
    for adapter in ("a", "b"):
        model.add_adapter(adapter, "lora")
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.5, generator=generator)
    model.set_active_adapters(None)
    return model


@pytest.mark.parametrize(
    ("setup", "heads"),
    [
        (lambda: "a", "a"),
        (lambda: ac.Stack("b", "a"), "a"),
        (lambda: ac.Parallel("a", "b"), ["a", "b"]),
        (lambda: ac.BatchSplit("a", "b", batch_sizes=[1, 1]), ac.BatchSplit("a", "b", batch_sizes=[1, 1])),
        (lambda: ac.Average("a", "a"), "b"),
        (lambda: "headless", "b"),
        (lambda: ac.Parallel("a", "headless"), "b"),
        (lambda: None, "b"),
    ],
)
def test_set_active_adapters_switches_the_heads_it_finds(setup, heads):
    model = with_adapters()
    model.add_adapter("headless", "lora")
    model.active_head = "b"
    model.set_active_adapters(setup())
    assert model.active_head == heads


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("by_context", [False, True])
def test_parallel_equals_separate_runs(name, by_context):
    model = with_adapters(name)
    inputs, labels = batch(name), torch.tensor([1, 0])
    separate = []
    for adapter in ("a", "b"):
        model.set_active_adapters(adapter)
        separate.append(model(**inputs, labels=labels))
    assert not torch.allclose(separate[0].logits, separate[1].logits[:, :2], atol=1e-3)
    setup = ac.Parallel("a", "b")
    if by_context:
        model.set_active_adapters(None)
        with AdapterSetup(setup):
            output = model(**inputs, labels=labels)
    else:
        model.set_active_adapters(setup)
        output = model(**inputs, labels=labels)
    for part, expected in zip(output, separate, strict=True):
        torch.testing.assert_close(part.logits, expected.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(part.loss, expected.loss, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output["loss"], separate[0].loss + separate[1].loss, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_batch_split_of_adapters_and_heads_equals_separate_runs(name):
    model = with_adapters(name)
    inputs = batch(name, rows=3)
    model.set_active_adapters(ac.BatchSplit("a", "b", batch_sizes=[1, 2]))
    output = model(**inputs, labels=torch.tensor([1, 0, 2]))
    for part, adapter, rows in zip(output, ("a", "b"), (slice(0, 1), slice(1, 3)), strict=True):
        model.set_active_adapters(adapter)
        expected = model(**{key: value[rows] for key, value in inputs.items()})
        torch.testing.assert_close(part.logits, expected.logits, atol=1e-5, rtol=1e-4)


def test_parallel_adapters_need_as_many_heads():
    model = with_adapters()
    model.set_active_adapters(ac.Parallel("a", "b"))
    model.active_head = "a"
    with pytest.raises(ValueError, match=r"parallel adapters \(2\).*active heads \(1\) must match"):
        model(**batch("bert"))


def test_an_adapter_setup_with_a_head_that_is_missing_keeps_the_active_one():
    model = with_adapters()
    model.add_adapter("headless", "lora")
    with AdapterSetup("headless"):
        assert model(**batch("bert")).logits.shape == (2, 3)
    with AdapterSetup("a"):
        assert model(**batch("bert")).logits.shape == (2, 2)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_training_an_adapter_trains_its_head_but_no_output_embeddings(name):
    model = with_adapters(name)
    ADD["seq2seq_lm" if name == "t5" else "causal_lm"](model, "lm")
    model.active_head = "lm"
    model.train_adapter("a")
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.requires_grad for parameter in model.heads["a"].parameters())
    assert not model.heads["lm"].get_output_embeddings().weight.requires_grad
    assert not [key for key in trainable if not key.startswith("heads.") and ".a." not in key]


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_models_come_back_with_adapters_and_heads(name, tmp_path):
    model = with_adapters(name)
    model.save_pretrained(tmp_path)
    again = AutoAdapterModel.from_pretrained(tmp_path)
    assert set(again.adapters_config.adapters) == {"a", "b"} and again.active_adapters is None
    for adapter in ("a", "b"):
        model.set_active_adapters(adapter)
        again.set_active_adapters(adapter)
        assert again.active_head == adapter
        assert torch.equal(again(**batch(name)).logits, model(**batch(name)).logits)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_generation_with_an_adapter_is_the_same_with_and_without_cache(name):
    model, _ = with_lm_head(name)
    model.add_adapter("a", "lora[init_weights='bert']")
    model.set_active_adapters("a")
    prompt = {key: value[:1] for key, value in batch(name).items()}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**prompt, **settings), model.generate(**prompt, **settings, use_cache=False))


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_parallel_generation_equals_separate_generation(name):
    model, _ = with_lm_head(name)
    for adapter in ("a", "b"):
        model.add_adapter(adapter, "lora[init_weights='bert']")
        model.add_prediction_head_from_config(adapter, model.heads["lm"].config)
    prompt = {key: value[:1] for key, value in batch(name).items()}
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    separate = []
    for adapter in ("a", "b"):
        model.set_active_adapters(adapter)
        separate.append(model.generate(**prompt, **settings))
    model.set_active_adapters(ac.Parallel("a", "b"))
    assert torch.equal(model.generate(**prompt, **settings), torch.cat(separate))


def test_beams_keep_to_the_head_of_their_row():
    model, _ = with_lm_head("gpt2")
    for adapter in ("a", "b"):
        model.add_adapter(adapter, "lora[init_weights='bert']")
        model.add_prediction_head_from_config(adapter, model.heads["lm"].config)
    tokens = torch.randint(3, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(4))
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    separate = []
    for row, adapter in enumerate(("a", "b")):
        model.set_active_adapters(adapter)
        separate.append(model.generate(tokens[row : row + 1], **settings))
    model.set_active_adapters(ac.BatchSplit("a", "b", batch_sizes=[1, 1]))
    assert torch.equal(model.generate(tokens, **settings), torch.cat(separate))


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_generate_takes_the_head_as_forward_does(name):
    model, _ = with_lm_head(name)
    prompt = {key: value[:1] for key, value in batch(name).items()}
    expected = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    model.add_classification_head("c")
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False, head="lm"), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_complete_and_independent(copied):
    model = with_adapters()
    model.add_masked_lm_head("mlm")
    model.set_active_adapters("a")
    expected = model(**batch("bert")).logits
    again = copied(model)
    assert torch.equal(again(**batch("bert")).logits, expected)
    assert (
        again.heads["mlm"][3].weight is again.get_input_embeddings().weight is not model.get_input_embeddings().weight
    )
    again.delete_head("a")
    again.delete_adapter("a")
    assert torch.equal(model(**batch("bert")).logits, expected) and "a" in model.config.prediction_heads
