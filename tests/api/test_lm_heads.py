"""Language modeling heads: tied weights, vocabulary, generation."""

import copy

import pytest
import torch
from head_models import (
    ADD,
    DECODERS,
    ENCODER_DECODERS,
    LABELS,
    OFFERED,
    VOCABULARY,
    adapter_model,
    batch,
    config,
    with_lm_head,
)
from torch import nn
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import adapters
import adapters.composition as ac
from adapters import AdapterTrainer, AutoAdapterModel

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


@pytest.mark.parametrize(("name", "kind"), LM_HEADS)
def test_the_loss_counts_the_items_that_the_trainer_counted(name, kind):
    model = adapter_model(name)
    ADD["classification"](model, "c")
    assert not model.accepts_loss_kwargs
    ADD[kind](model, "lm")
    assert model.accepts_loss_kwargs
    labels = LABELS[kind]["labels"]
    counted = labels[:, 1:] if kind == "causal_lm" else labels
    items = int((counted != -100).sum())
    mean = model(**batch(name), labels=labels).loss
    for given in (items, torch.tensor(items)):
        torch.testing.assert_close(model(**batch(name), labels=labels, num_items_in_batch=given).loss, mean)
    torch.testing.assert_close(model(**batch(name), labels=labels, num_items_in_batch=2 * items).loss, mean / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["gpt2", "llama", *ENCODER_DECODERS])
def test_trainers_loss_is_that_of_the_static_language_model(name, smoothing, tmp_path):
    model, static = with_lm_head(name)
    collate = DataCollatorForSeq2Seq(Padded(), model) if name in ENCODER_DECODERS else None
    rows = [{"input_ids": [5, 6, 7, 8 + i], "attention_mask": [1] * 4, "labels": [5, 6, 7, 8 + i]} for i in range(4)]
    losses = []
    for candidate in (static, model):
        adapters.init(candidate)
        candidate.add_adapter("a", "lora[init_weights='ia3']")
        candidate.train_adapter("a")
        candidate.eval()
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            label_smoothing_factor=smoothing,
            report_to="none",
            save_strategy="no",
        )
        trainer = AdapterTrainer(candidate, arguments, train_dataset=rows, data_collator=collate)
        losses.append(trainer.train().training_loss)
    # Trainer does not know by GPT-2's class that its labels are shifted, and counts four of three items; and it thinks
    # that encoder-decoders divide by the number of items, which they ignore.
    factor = 3 / 4 if name == "gpt2" else 2 if name in ENCODER_DECODERS and not smoothing else 1
    assert losses[0] == pytest.approx(losses[1] * factor, rel=1e-5)


class Padded:
    """What the collator asks of a tokenizer: the rows have one length already."""

    padding_side = "right"

    def pad(self, features, **kwargs):
        return {key: torch.tensor([row[key] for row in features]) for key in features[0]}
