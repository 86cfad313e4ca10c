"""What users see when they ask for a head that cannot be."""

import pytest
import torch
from transformers import BertConfig, GPT2Config, T5Config, ViTConfig

import adapters
import adapters.composition as ac
from adapters import AutoAdapterModel
from adapters.errors import AdapterError, CompositionError, ConfigError
from adapters.heads import ClassificationHead, PredictionHead

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TOKENS = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.fixture
def model():
    made = AutoAdapterModel.from_config(BertConfig(vocab_size=20, **SIZE)).eval()
    made.add_classification_head("a")
    made.add_classification_head("b")
    return made


@pytest.fixture
def generator():
    return AutoAdapterModel.from_config(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)).eval()


CALLS = [
    (lambda m: m.add_classification_head("a"), ValueError, "already contains a head with name 'a'. Use overwrite_ok"),
    (lambda m: m.add_prediction_head(ClassificationHead(m, "a")), ValueError, "already contains a head with name 'a'"),
    (lambda m: m.add_image_classification_head("i"), ValueError, "type 'bert' does not support head type 'image_"),
    (lambda m: m.add_seq2seq_lm_head("s"), ValueError, "it supports 'classification', .* and 'causal_lm'"),
    (lambda m: m.add_tagging_head("x.y"), AdapterError, "add head 'x.y': this cannot name a module"),
    (lambda m: m.add_tagging_head("values"), AdapterError, "add head 'values'"),
    (
        lambda m: m.add_tagging_head("t", layers=0),
        ConfigError,
        "head 't': layers is 0; it must be an integer of at least 1",
    ),
    (lambda m: m.add_tagging_head("t", num_labels=0), ConfigError, "num_labels is 0"),
    (
        lambda m: m.add_tagging_head("t", id2label={0: "O", 1: "B", 2: "I"}),
        ConfigError,
        "3 different labels.* 2 outputs",
    ),
    (lambda m: m.add_classification_head("t", activation_function="tahn"), ConfigError, "'tahn'.*did you mean 'tanh'"),
    (lambda m: m.add_qa_head("q", num_labels=3), ConfigError, "head 'q': num_labels is 3; a span has 2"),
    (lambda m: m.add_custom_head("mine", "t"), AttributeError, "head_type that is not registered"),
    (lambda m: m.register_custom_head("mine", dict), ConfigError, "is no head class"),
    (lambda m: m.register_custom_head("tagging", PredictionHead), ConfigError, "built-in head type"),
    (lambda m: m.add_prediction_head_from_config("t", {"head_type": "nope"}), AttributeError, "'nope' is not known"),
    (
        lambda m: m.add_prediction_head_from_config("t", {"head_type": "tagging", "labels": 3}),
        ConfigError,
        "unexpected keyword argument 'labels'",
    ),
    (lambda m: setattr(m, "active_head", "c"), ValueError, "Model does not contain a head with name 'c'.*'a' and 'b'"),
    (lambda m: setattr(m, "active_head", ["a", "c"]), ValueError, "with name 'c'"),
    (lambda m: m(TOKENS, head="c"), ValueError, "Unknown head_name 'c'; this model has 'a' and 'b'"),
    (lambda m: m.save_head("unused", "c"), ValueError, "Unknown head_name 'c'"),
    (lambda m: m.get_labels("c"), ValueError, "Unknown head_name 'c'"),
    (lambda m: m.generate(TOKENS), AdapterError, "generation needs a causal_lm or seq2seq_lm head"),
    (lambda m: m(*[TOKENS] * 20), TypeError, "20 positional arguments"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_a_failed_call_says_why_and_changes_nothing(model, call, error, message):
    before = (model.active_head, list(model.heads), dict(model.config.prediction_heads), model.config.label2id)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        call(model)
    assert before == (model.active_head, list(model.heads), model.config.prediction_heads, model.config.label2id)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())


def test_labels_of_no_or_of_several_heads(model):
    model.active_head = None
    with pytest.raises(ValueError, match="No head name given and no active head in the model"):
        model.get_labels()
    model.active_head = ["a", "b"]
    with pytest.raises(AdapterError, match=r"several heads are active, \['a', 'b'\]"):
        model.get_labels_dict()


def test_batch_split_of_heads_must_fit_the_batch(model):
    model.active_head = ac.BatchSplit("a", "b", batch_sizes=[1, 2])
    with pytest.raises(CompositionError, match=r"batch_sizes=\[1, 2\].*sum to 3, the batch has 2 rows"):
        model(TOKENS)


def test_a_parallel_head_setup_needs_a_parallel_adapter_setup(model):
    model.active_head = ac.Parallel("a", "b")
    with pytest.raises(ValueError, match=r"parallel adapters \(1\).*active heads \(2\) must match"):
        model(TOKENS)


def test_use_pooler_needs_a_pooler(generator):
    generator.add_classification_head("h", use_pooler=True)
    with pytest.raises(AdapterError, match="head 'h': use_pooler=True, but this model returns no pooler_output"):
        generator(TOKENS)


@pytest.mark.parametrize("add", ["add_masked_lm_head", "add_multiple_choice_head", "add_seq2seq_lm_head"])
def test_decoders_refuse_heads_of_encoders(generator, add):
    with pytest.raises(ValueError, match="This model of type 'gpt2' does not support head type"):
        getattr(generator, add)("h")


def test_generation_needs_a_head_that_generates(generator):
    for prepare in (lambda: None, lambda: generator.add_classification_head("c")):
        prepare()
        with pytest.raises(AdapterError, match="generate: the heads in use are"):
            generator.generate(TOKENS)


def test_decoder_inputs_need_a_start_token():
    settings = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    settings.decoder_start_token_id = None
    model = AutoAdapterModel.from_config(settings)
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        model(TOKENS)


def test_vision_models_refuse_heads_for_text():
    model = AutoAdapterModel.from_config(ViTConfig(**SIZE, image_size=8, patch_size=4))
    with pytest.raises(ValueError, match="type 'vit' does not support head type 'tagging'; it supports 'image_class"):
        model.add_tagging_head("t")


def test_auto_adapter_model_is_no_class_to_construct():
    with pytest.raises(OSError, match="AutoAdapterModel is designed to be instantiated"):
        AutoAdapterModel(BertConfig())


def test_a_class_that_no_config_has_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoneSuchAdapterModel"):
        getattr(adapters, "NoneSuch" + "AdapterModel")
