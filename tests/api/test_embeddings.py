"""Several vocabularies in one model: tables, what is tied to them, files, training."""

import copy
import json
import pickle

import pytest
import torch
from head_models import ENCODER_DECODERS, TEXT_MODELS, adapter_model, batch, config, with_lm_head
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertForMaskedLM, TrainingArguments
from transformers import BertTokenizer as Tokenizer

import adapters
from adapters import AdapterError, AdapterTrainer, AutoAdapterModel, CheckpointError
from adapters.embeddings import EMBEDDING_FILE

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Of 48 words, as the models have, and of 30, of which 15 are among the 48."""
    folder = tmp_path_factory.mktemp("tokenizers")
    words = {
        "old": [f"w{i}" for i in range(43)],
        "new": [f"w{i}" for i in range(33, 43)] + [f"v{i}" for i in range(15)],
    }
    made = []
    for name, own in words.items():
        (folder / name).mkdir()
        (folder / name / "vocab.txt").write_text("\n".join(SPECIAL + own))
        made.append(Tokenizer(str(folder / name / "vocab.txt")))
    return made


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_new_embeddings_start_from_the_reference_and_the_old_come_back(name, tokenizers):
    old, new = tokenizers
    model = AutoModel.from_config(config(name)).eval()
    adapters.init(model)
    inputs, before = batch(name), state(model)
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if name in ENCODER_DECODERS else {}
    expected = model(**inputs)[0]
    assert model.active_embeddings == "default" and list(model.loaded_embeddings) == ["default"]
    model.add_embeddings("new", new, reference_embedding="default", reference_tokenizer=old)
    table, default = model.loaded_embeddings["new"], model.loaded_embeddings["default"]
    assert model.active_embeddings == "new" and model.get_input_embeddings() is table
    assert model.config.vocab_size == table.num_embeddings == len(new) == 30 and not table.weight.requires_grad
    for token, row in new.get_vocab().items():
        if token in old.get_vocab():
            assert torch.equal(table.weight[row], default.weight[old.get_vocab()[token]])
    fresh = table.weight[len(SPECIAL) + 10 :]
    assert 0.01 < fresh.std() < 0.03
    inputs = {key: value.clamp(max=29) for key, value in inputs.items()}
    assert model(**inputs)[0].isfinite().all() and not torch.equal(model(**inputs)[0], expected)
    model.set_active_embeddings("default")
    assert state(model).keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 48
    model.delete_embeddings("new")
    assert list(model.loaded_embeddings) == ["default"]


@pytest.mark.parametrize("name", TEXT_MODELS)
@pytest.mark.parametrize("flexible", [True, False])
def test_tied_maps_onto_words_follow(name, flexible, tokenizers):
    if flexible and name in ("gpt2", "llama", "mistral", *ENCODER_DECODERS):
        model = with_lm_head(name)[0]
    elif flexible:
        model = adapter_model(name)
        model.add_masked_lm_head("lm")
    else:
        auto = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
        model = auto.from_config(config(name)).eval() if name not in ("distilbert", "albert") else adapter_model(name)
        adapters.init(model)
    if model.get_output_embeddings() is None:
        model.add_masked_lm_head("lm")
    inputs = batch(name) | ({"decoder_input_ids": batch(name)["input_ids"]} if name in ENCODER_DECODERS else {})
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected = model(**inputs).logits
    model.add_embeddings("new", tokenizers[1])
    small = {key: value.clamp(max=29) for key, value in inputs.items()}
    output = model.get_output_embeddings()
    assert (output.weight is model.get_input_embeddings().weight) is tied
    result = model(**small, labels=small["input_ids"])
    assert result.logits.shape[-1] == output.out_features == (30 if tied else 48) and result.loss.isfinite()
    if output.bias is not None and tied:
        assert output.bias.shape == (30,) and output.bias.eq(0).all()
        torch.nn.init.normal_(output.bias)
        own = output.bias.clone()
        model.set_active_embeddings("default")
        model.set_active_embeddings("new")
        assert torch.equal(model.get_output_embeddings().bias, own)
    model.set_active_embeddings("default")
    assert torch.equal(model(**inputs).logits, expected)
    model.tie_weights()
    assert torch.equal(model(**inputs).logits, expected)


def test_files_hold_what_1x_reads(tokenizers, tmp_path):
    model = adapter_model("bert")
    model.add_embeddings("new", tokenizers[1])
    model.save_embeddings(tmp_path, "new", tokenizers[1])
    weight = torch.load(tmp_path / EMBEDDING_FILE, weights_only=True)
    assert isinstance(weight, torch.nn.Parameter) and torch.equal(weight, model.get_input_embeddings().weight)
    assert (tmp_path / "tokenizer/tokenizer_config.json").is_file()
    other = adapter_model("bert")
    tokenizer = other.load_embeddings(tmp_path, "loaded")
    assert tokenizer.get_vocab() == tokenizers[1].get_vocab() and other.active_embeddings == "loaded"
    assert torch.equal(other.get_input_embeddings().weight, weight)
    assert other.base_model.loaded_embeddings.keys() == other.loaded_embeddings.keys() == {"default", "loaded"}
    other.save_embeddings(tmp_path / "again", "default")
    assert [file.name for file in (tmp_path / "again").iterdir()] == [EMBEDDING_FILE]
    assert other.load_embeddings(tmp_path / "again", "third") is None


def test_refusals_change_nothing(tokenizers, tmp_path):
    old, new = tokenizers
    model = adapter_model("bert")
    model.add_masked_lm_head("lm")
    model.add_embeddings("new", new)
    before = state(model)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / EMBEDDING_FILE).write_bytes(b"no tensor")
    (tmp_path / "list").mkdir()
    torch.save([1, 2], tmp_path / "list" / EMBEDDING_FILE)
    for wrong, kind, message in (
        (lambda: model.add_embeddings("new", new), ValueError, "already exists"),
        (lambda: model.add_embeddings("default", new), ValueError, "already exists"),
        (lambda: model.add_embeddings("a", new, reference_embedding="default"), KeyError, "required to copy"),
        (lambda: model.add_embeddings("a", new, reference_tokenizer=old), KeyError, "required to copy"),
        (lambda: model.add_embeddings("a", new, "nope", old), KeyError, "No embedding with name 'nope'"),
        (lambda: model.set_active_embeddings("nwe"), KeyError, "did you mean 'new'"),
        (lambda: model.delete_embeddings("nope"), ValueError, "No embedding with name"),
        (lambda: model.delete_embeddings("default"), AdapterError, "the checkpoint's own"),
        (lambda: model.save_embeddings(tmp_path / "x", "nope"), KeyError, "No embedding with name"),
        (lambda: model.load_embeddings(tmp_path / "nowhere", "a"), FileNotFoundError, "No embeddings found at"),
        (lambda: model.load_embeddings(tmp_path / "broken", "a"), CheckpointError, "cannot be read"),
        (lambda: model.load_embeddings(tmp_path / "list", "a"), CheckpointError, "holds no matrix"),
    ):
        with pytest.raises(kind, match=message) as caught:
            wrong()
        assert isinstance(caught.value, AdapterError) and model.active_embeddings == "new"
        assert all(torch.equal(value, before[key]) for key, value in state(model).items())
    assert not (tmp_path / "x").exists()
    with pytest.warns(UserWarning, match="Setting the default embedding as active"):
        model.delete_embeddings("new")
    assert model.active_embeddings == "default" and model.config.vocab_size == 48
    with pytest.raises(AdapterError, match="reads no tokens"):
        adapter_model("vit").add_embeddings("a", new)
    assert adapter_model("vit").loaded_embeddings == {}


def test_embeddings_with_an_adapter_at_them_stay(tokenizers):
    model = adapter_model("bert")
    model.add_adapter("a", adapters.TrainableTokensConfig(token_indices=[7]))
    with pytest.raises(AdapterError, match="sit at the embeddings in use"):
        model.add_embeddings("new", tokenizers[1])
    model.delete_adapter("a")
    model.add_embeddings("new", tokenizers[1])
    with pytest.raises(AdapterError, match="tokens 0 to 29"):
        model.add_adapter("a", adapters.TrainableTokensConfig(token_indices=[40]))
    model.add_adapter("b", adapters.TrainableTokensConfig(token_indices=[20]))
    model.add_adapter("inv", "seq_bn_inv[reduction_factor=4]")
    model.set_active_adapters("inv")
    assert model(**{key: value.clamp(max=29) for key, value in batch("bert").items()})[0].isfinite().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own(copied, tokenizers):
    model = adapter_model("bert")
    model.add_masked_lm_head("lm")
    model.add_embeddings("new", tokenizers[1])
    other = copied(model)
    other.set_active_embeddings("default")
    assert model.active_embeddings == "new" and other.active_embeddings == "default"
    assert other.heads["lm"][-1].weight is other.get_input_embeddings().weight
    assert model.get_input_embeddings().num_embeddings == 30


def test_a_saved_model_has_the_embeddings_in_use(tokenizers, tmp_path):
    model = adapter_model("bert")
    model.add_masked_lm_head("lm")
    model.add_embeddings("new", tokenizers[1])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 30
    again, info = AutoAdapterModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = {key: value.clamp(max=29) for key, value in batch("bert").items()}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_half_precision_and_static_masked_language_models(tokenizers):
    model = BertForMaskedLM(config("bert")).to(torch.bfloat16).eval()
    adapters.init(model)
    model.add_embeddings("new", tokenizers[1])
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias and len(model.cls.predictions.bias) == 30
    model.to(torch.float32).set_active_embeddings("default")
    assert model.get_input_embeddings().weight.dtype == torch.float32  # the table was of another when it was put away


def test_trainer_trains_and_resumes_them(tokenizers, tmp_path):
    def made():
        torch.manual_seed(0)
        model = adapter_model("bert")
        model.add_classification_head("a")
        model.add_adapter("a", "lora")
        model.add_embeddings("new", tokenizers[1])
        model.train_adapter("a", train_embeddings=True)
        return model

    rows = [{"input_ids": torch.tensor([2, 7 + i, 3]), "labels": torch.tensor(i % 2)} for i in range(8)]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, save_steps=1, report_to="none", learning_rate=0.1)
    model = made()
    start = model.get_input_embeddings().weight.detach().clone()
    AdapterTrainer(model, arguments, train_dataset=rows).train()
    trained = model.get_input_embeddings().weight.detach().clone()
    assert not torch.equal(trained, start) and not model.loaded_embeddings["default"].weight.requires_grad
    again = made()
    AdapterTrainer(again, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(again.get_input_embeddings().weight, trained)
