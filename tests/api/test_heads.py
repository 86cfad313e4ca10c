"""Prediction heads: layers, inputs, losses, dispatch, labels, tied weights."""

import copy
import inspect

import pytest
import torch
from head_models import (
    ADD,
    CONFIGS,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    EOS,
    LABELS,
    OFFERED,
    PAD,
    TEXT_MODELS,
    VOCABULARY,
    adapter_model,
    batch,
    inputs_for,
    two_heads,
)
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers.modeling_outputs import SequenceClassifierOutput

import adapters.composition as ac
from adapters import AdapterSetup
from adapters.heads import MultiHeadOutput, PredictionHead
from adapters.heads.model_mixin import MODEL_HEAD_MAP


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
        case "dependency_parsing":
            rows, words = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1])
            heads, relations = (labels[key][rows, words] for key in ("labels_arcs", "labels_rels"))
            at_heads = output.rel_preds[rows, words, heads]
            return cross_entropy(output.arc_preds[rows, words], heads) + cross_entropy(at_heads, relations)
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


# --- what the Trainer and torch need -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_shows_the_inputs_by_name(name):
    model = adapter_model(name)
    names = list(inspect.signature(model.forward).parameters)
    assert names[0] == model.main_input_name and {"head", "return_dict", "kwargs"} <= set(names)
    assert model.accepts_loss_kwargs is False  # as long as no language modeling head is active


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_inputs_may_be_positional(name):
    model = adapter_model(name)
    model.add_classification_head("h")
    inputs = batch(name)
    expected = model(**inputs).logits
    positional = [inputs.get(key) for key in list(inspect.signature(model.base_model.forward).parameters)[:3]]
    kept = {key: value for key, value in inputs.items() if not any(value is given for given in positional)}
    assert torch.equal(model(*positional, **kept).logits, expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_heads_compile_without_a_graph_break(name):
    model = adapter_model(name)
    model.add_classification_head("h")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch(name)).logits, model(**batch(name)).logits)
