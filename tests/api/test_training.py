"""Training with adapters: what is set up, trained, saved, resumed and restored."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import adapters
from adapters import AdapterConfig, AutoAdapterModel, DynamicAdapterFusionConfig
from adapters.composition import Fuse, Stack
from adapters.trainer import AdapterTrainer, AdapterTrainerCallback, Seq2SeqAdapterTrainer, logger
from adapters.training import (
    AdapterArguments,
    AdapterTrainingArguments,
    Seq2SeqAdapterTrainingArguments,
    setup_adapter_training,
)
from adapters.training.checkpoint import load_trained
from adapters.training.resume import last_complete_checkpoint

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)
ROWS = [
    {"input_ids": row, "attention_mask": [1] * 6, "labels": label}
    for row, label in zip(
        torch.randint(5, 50, (16, 6), generator=torch.manual_seed(1)).tolist(), [0, 1] * 8, strict=True
    )
]


def flexible(seed: int = 0, config: BertConfig = CONFIG) -> PreTrainedModel:
    set_seed(seed)
    return AutoAdapterModel.from_config(copy.deepcopy(config))


def adapter() -> PreTrainedModel:
    model = flexible()
    model.add_classification_head("task", num_labels=2)
    model.add_adapter("frozen", "lora")
    model.add_adapter("task", "seq_bn")
    model.train_adapter(Stack("task"))
    return model


def static_head() -> PreTrainedModel:
    set_seed(0)
    model = BertForSequenceClassification(copy.deepcopy(CONFIG))
    adapters.init(model)
    model.add_adapter("task", "lora")
    model.train_adapter("task")
    return model


def prefix() -> PreTrainedModel:
    model = flexible()
    model.add_classification_head("other name", num_labels=2)
    model.add_adapter("task", "prefix_tuning[prefix_length=3,bottleneck_size=8]")
    model.train_adapter("task")
    return model


def fusion(name: str | None = None) -> PreTrainedModel:
    model = flexible()
    model.add_classification_head("fused", num_labels=2)
    model.add_adapter("a", "seq_bn")
    model.add_adapter("b", "seq_bn")
    model.add_adapter_fusion(["a", "b"], name=name)
    model.train_adapter_fusion(Fuse("a", "b", name=name))
    return model


def named_fusion() -> PreTrainedModel:
    return fusion("mix")


def embeddings() -> PreTrainedModel:
    model = adapter()
    model.train_adapter("task", train_embeddings=True)
    return model


SETUPS = [adapter, static_head, prefix, fusion, named_fusion, embeddings]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **{**defaults, **options})


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


# --- setup_adapter_training ------------------------------------------------------------------------------------------


def test_setup_without_training_changes_nothing():
    model = flexible()
    before, trained = state(model), [p.requires_grad for p in model.parameters()]
    assert setup_adapter_training(model, AdapterArguments(), "task") == (None, None)
    assert not differing(before, state(model)) and len(model.adapters_config) == 0
    assert trained == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("config", ["seq_bn", "lora[r=4]", "prefix_tuning[prefix_length=3]|par_bn"])
def test_setup_adds_trains_and_activates(config: str):
    model = flexible()
    model.add_classification_head("task")
    model.add_classification_head("last")
    assert setup_adapter_training(model, AdapterArguments(True, adapter_config=config), "task") == ("task", None)
    assert model.adapters_config.get("task") == AdapterConfig.load(config)
    assert model.active_adapters == Stack("task") and model.active_head == "task"
    base = {name for name, p in model.base_model.named_parameters() if p.requires_grad}
    assert base and all(".task." in name for name in base)


def test_setup_keeps_an_adapter_that_is_there():
    model = flexible()
    model.add_adapter("task", "lora")
    before = state(model)
    setup_adapter_training(model, AdapterArguments(True), "task")
    assert not differing(before, state(model))


def test_setup_changes_the_config_but_not_by_none():
    model = flexible()
    setup_adapter_training(model, AdapterArguments(True), "task", {"reduction_factor": 4, "non_linearity": None})
    assert model.adapters_config.get("task") == AdapterConfig.load("seq_bn", reduction_factor=4)


def test_setup_loads_task_and_language_adapters(tmp_path: Path):
    source = flexible()
    source.add_adapter("trained", "lora")
    source.add_adapter("en", "double_seq_bn")
    source.save_all_adapters(str(tmp_path))
    model = flexible(seed=1)
    options = AdapterArguments(True, load_adapter=str(tmp_path / "trained"), load_lang_adapter=str(tmp_path / "en"))
    assert setup_adapter_training(model, options, "task") == ("task", "en")
    assert model.active_adapters == Stack("en", "task")
    loaded = {name.replace(".trained.", ".task."): value for name, value in state(source).items()}
    own = state(model)
    assert not {name for name in own if ".task." in name or ".en." in name if not torch.equal(own[name], loaded[name])}
    assert {name for name, p in model.named_parameters() if p.requires_grad and ".en." in name} == set()


# --- construction ----------------------------------------------------------------------------------------------------


def test_positional_order_is_that_of_1x():
    names = list(inspect.signature(AdapterTrainer.__init__).parameters)
    assert names == [
        *("self", "model", "args", "data_collator", "train_dataset", "eval_dataset", "tokenizer", "processing_class"),
        *("model_init", "compute_metrics", "callbacks", "optimizers", "preprocess_logits_for_metrics"),
        *("adapter_names", "kwargs"),
    ]
    assert logger.name.startswith("adapters")


@pytest.mark.parametrize("argument", ["tokenizer", "processing_class"])
def test_both_names_of_the_tokenizer(argument: str, tmp_path: Path):
    tokenizer = object()
    trainer = AdapterTrainer(adapter(), arguments(tmp_path), **{argument: tokenizer})
    assert trainer.processing_class is tokenizer


def test_own_callback_comes_before_the_given_ones(tmp_path: Path):
    class Given(TrainerCallback):
        pass

    kinds = [
        type(one)
        for one in AdapterTrainer(adapter(), arguments(tmp_path), callbacks=[Given()]).callback_handler.callbacks
    ]
    assert kinds.index(AdapterTrainerCallback) < kinds.index(Given)


@pytest.mark.parametrize("make", [adapter, static_head])
def test_label_names(make: Callable[[], PreTrainedModel], tmp_path: Path):
    assert AdapterTrainer(make(), arguments(tmp_path)).label_names == ["labels"]
    assert AdapterTrainer(make(), arguments(tmp_path, label_names=["y"])).label_names == ["y"]


@pytest.mark.parametrize(("make", "expected"), [(adapter, False), (fusion, True), (named_fusion, True)])
def test_train_adapter_fusion(make: Callable[[], PreTrainedModel], expected: bool, tmp_path: Path):
    assert AdapterTrainer(make(), arguments(tmp_path)).train_adapter_fusion is expected


@pytest.mark.parametrize("how", ["model", "model_init"])
def test_adapter_names_are_activated(how: str, tmp_path: Path):
    given = adapter() if how == "model" else adapter
    trainer = AdapterTrainer(**{how: given}, args=arguments(tmp_path), adapter_names=Stack("frozen", "task"))
    assert trainer.model.active_adapters == Stack("frozen", "task")


@pytest.mark.parametrize("how", ["model", "model_init"])
def test_a_quantized_model_gets_through(how: str, tmp_path: Path):
    def quantized() -> PreTrainedModel:
        model = adapter()
        model.is_quantized = True
        return model

    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(quantized(), arguments(tmp_path))
    given = quantized() if how == "model" else quantized
    assert AdapterTrainer(**{how: given}, args=arguments(tmp_path)).model.is_quantized is True


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", SETUPS)
def test_only_what_is_trainable_changes(make: Callable[[], PreTrainedModel], tmp_path: Path):
    model = make()
    before = state(model)
    head, setup = vars(model).get("_active_heads"), model.active_adapters
    result = AdapterTrainer(model, arguments(tmp_path), train_dataset=ROWS).train()
    assert result.global_step == 4
    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    changed = differing(before, state(model))
    assert changed and changed <= trainable
    assert (vars(model).get("_active_heads"), model.active_adapters) == (head, setup)


def test_model_init_gives_a_model_for_each_training(tmp_path: Path):
    trainer = AdapterTrainer(model_init=adapter, args=arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    first = state(trainer.model)
    trainer.train()
    assert not differing(first, state(trainer.model))


def without_dropout() -> BertConfig:
    config = copy.deepcopy(CONFIG)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return config


def steady_adapter() -> PreTrainedModel:
    model = flexible(config=without_dropout())
    model.add_classification_head("task", num_labels=2)
    model.add_adapter("task", "double_seq_bn")
    model.train_adapter("task")
    return model


def steady_fusion() -> PreTrainedModel:
    model = flexible(config=without_dropout())
    model.add_classification_head("task", num_labels=2)
    model.add_adapter("a", "seq_bn")
    model.add_adapter("b", "seq_bn")
    model.add_adapter_fusion(["a", "b"], DynamicAdapterFusionConfig(dropout_prob=0.0))
    model.train_adapter_fusion(Fuse("a", "b"))
    return model


@pytest.mark.parametrize("make", [steady_adapter, steady_fusion])
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_activation_checkpointing_changes_no_result(make: Callable[[], PreTrainedModel], kwargs: Any, tmp_path: Path):
    plain, checkpointed = make(), make()
    AdapterTrainer(plain, arguments(tmp_path), train_dataset=ROWS).train()
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}
    AdapterTrainer(checkpointed, arguments(tmp_path, **options), train_dataset=ROWS).train()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_gradient_checkpointing_by_its_old_name(tmp_path: Path):
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        options = arguments(tmp_path, gradient_checkpointing=True, max_steps=1)
    AdapterTrainer(model := steady_adapter(), options, train_dataset=ROWS).train()
    assert model.is_activation_checkpointing


@pytest.mark.parametrize("make", [steady_adapter, steady_fusion])
def test_accumulated_gradients_are_those_of_the_whole_batch(make: Callable[[], PreTrainedModel], tmp_path: Path):
    whole, parts = make(), make()
    options = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0}
    AdapterTrainer(whole, arguments(tmp_path, **options), train_dataset=ROWS).train()
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    AdapterTrainer(parts, arguments(tmp_path, **options), train_dataset=ROWS).train()
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


# --- fusion ----------------------------------------------------------------------------------------------------------


def test_fusion_regularisation_is_part_of_the_training_loss_only(tmp_path: Path):
    model = steady_fusion()
    for name, parameter in model.named_parameters():
        if ".value." in name:
            torch.nn.init.normal_(parameter)
    trainer = AdapterTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=ROWS)
    batch = trainer.data_collator(ROWS[:4])
    model.eval()
    plain = trainer.compute_loss(model, batch)
    model.train()
    regularised, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    penalty = model.get_fusion_regularization_loss()
    assert penalty > 0.1
    torch.testing.assert_close(regularised, plain + penalty)
    assert outputs.logits.shape == (4, 2)


def test_weight_decay_leaves_fusion_values_alone(tmp_path: Path):
    trainer = AdapterTrainer(fusion(), arguments(tmp_path, weight_decay=0.1), train_dataset=ROWS)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {name.split(".")[-2] for name in decayed if "fusion" in name} == {"query", "key"}
    assert any(name.endswith("value.weight") for name in spared)


# --- saving, resuming, the best model --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", SETUPS)
def test_what_is_saved(make: Callable[[], PreTrainedModel], tmp_path: Path):
    model = make()
    trainer = AdapterTrainer(model, arguments(tmp_path), train_dataset=ROWS)
    trainer.save_model()
    heads = set(vars(model)["_modules"].get("heads", ()))
    fusions = set(model.adapters_config.fusions) if trainer.train_adapter_fusion else set()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {*model.adapters_config, *fusions, *heads}
    other = {"trained_base_parameters.safetensors"} if make is embeddings else set()
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"training_args.bin"} | other


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_holds_no_weights_of_the_base_model(named: bool, tmp_path: Path):
    """Of a head that is tied to the embeddings only its own layers are written, and it comes back whole."""

    def language_model(seed: int) -> PreTrainedModel:
        set_seed(0)
        config = copy.deepcopy(CONFIG)
        model = AutoAdapterModel.from_config(config) if named else BertForMaskedLM(config)
        set_seed(seed)
        if named:
            model.add_masked_lm_head("a")
        else:
            adapters.init(model)
            torch.nn.init.normal_(model.cls.predictions.transform.dense.weight)
        model.add_adapter("a")
        model.train_adapter("a")
        return model.eval()

    model = language_model(1)
    AdapterTrainer(model, arguments(tmp_path), train_dataset=ROWS).save_model()
    shapes = {value.shape for file in tmp_path.rglob("*.safetensors") for value in load_file(file).values()}
    assert shapes and model.get_input_embeddings().weight.shape not in shapes
    fresh = language_model(2)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    assert not torch.equal(fresh(ids).logits, model(ids).logits)
    load_trained(fresh, str(tmp_path))
    assert torch.equal(fresh(ids).logits, model(ids).logits)


@pytest.mark.parametrize("make", SETUPS)
@pytest.mark.parametrize("how", [True, "path"])
def test_a_resumed_run_equals_an_uninterrupted_one(make: Callable[[], PreTrainedModel], how: Any, tmp_path: Path):
    options = arguments(tmp_path, save_strategy="steps", save_steps=2, weight_decay=0.1, max_steps=5)
    whole = AdapterTrainer(make(), options, train_dataset=ROWS)
    whole.train()
    expected = state(whole.model)
    for step in (4, 5):
        (tmp_path / f"checkpoint-{step}/trainer_state.json").unlink()  # as if killed while it saved
    model = make()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    resumed = AdapterTrainer(model, options, train_dataset=ROWS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if how == "path" else True)
    assert resumed.state.log_history[-1]["step"] == 5
    assert not differing(expected, state(model))
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    assert model.active_adapters == whole.model.active_adapters


def test_the_last_complete_checkpoint(tmp_path: Path):
    assert last_complete_checkpoint(tmp_path / "none") is None
    for step, content in ((9, "{}"), (10, "{}"), (100, '{"epo'), (200, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("make", SETUPS)
def test_the_best_model_comes_back_whole(make: Callable[[], PreTrainedModel], tmp_path: Path):
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_evaluate(self, *_: Any, model: PreTrainedModel, **__: Any) -> None:
            seen.append(state(model))

    model = make()
    head, active = vars(model).get("_active_heads"), model.active_adapters
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options = arguments(tmp_path, load_best_model_at_end=True, metric_for_best_model="first", **every)
    trainer = AdapterTrainer(
        model,
        options,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        callbacks=[Watch()],
        compute_metrics=lambda _: {"first": -float(len(seen))},
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert differing(seen[0], seen[-1])
    assert not differing(seen[0], state(model))
    assert (vars(model).get("_active_heads"), model.active_adapters) == (head, active)
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in after)


def test_sequence_to_sequence_predicts_by_generating(tmp_path: Path):
    set_seed(0)
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    adapters.init(model)
    model.add_adapter("task", "lora")
    model.train_adapter("task")
    rows = [{"input_ids": [5, 6, 7, 1], "labels": [6, 7, 1]}] * 4
    options = Seq2SeqAdapterTrainingArguments(
        str(tmp_path), max_steps=1, no_cuda=True, disable_tqdm=True, predict_with_generate=True, generation_max_length=5
    )
    trainer = Seq2SeqAdapterTrainer(model, options, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.predict(rows).predictions.shape[0] == 4
    assert (tmp_path / "checkpoint-1/task/adapter_config.json").is_file()


# --- options that transformers v5 dropped ----------------------------------------------------------------------------

DROPPED = [
    ("--evaluation_strategy epoch", "eval_strategy", "epoch"),
    ("--per_gpu_train_batch_size 3", "per_device_train_batch_size", 3),
    ("--per_gpu_eval_batch_size=16", "per_device_eval_batch_size", 16),
    ("--no_cuda", "use_cpu", True),
    ("--warmup_ratio 0.1", "warmup_steps", 0.1),
    ("--warmup_ratio 0.1 --warmup_steps 7", "warmup_steps", 7),
    ("--group_by_length", "train_sampling_strategy", "group_by_length"),
    ("--adafactor", "optim", "adafactor"),
    ("--torchdynamo eager", "torch_compile_backend", "eager"),
    ("--include_tokens_per_second", "include_num_input_tokens_seen", "all"),
    ("--include_inputs_for_metrics", "include_for_metrics", ["inputs"]),
    ("--tpu_metrics_debug", "debug", ["tpu_metrics_debug"]),
    ("--push_to_hub_token t", "hub_token", "t"),
    ("--push_to_hub_model_id m", "hub_model_id", "m"),
    ("--push_to_hub_model_id m --push_to_hub_organization o", "hub_model_id", "o/m"),
    ("--push_to_hub_organization o", "hub_model_id", "o/out"),
    ("--fsdp_min_num_params 5", "fsdp_config", {"min_num_params": 5}),
    ("--fsdp_transformer_layer_cls_to_wrap L", "fsdp_config", {"transformer_layer_cls_to_wrap": ["L"]}),
    ("--overwrite_output", "overwrite_output_dir", True),
    ("--no_save_safetensors", "save_safetensors", False),
    ("--use_mps_device", "use_mps_device", True),
    ("--jit_mode_eval", "jit_mode_eval", True),
    ("--fp16_opt_level O2", "fp16_opt_level", "O2"),
    ("--fp16_backend apex", "fp16_backend", "apex"),
    ("--half_precision_backend cpu_amp", "half_precision_backend", "cpu_amp"),
    ("--tpu_num_cores 8", "tpu_num_cores", 8),
    ("--past_index 1", "past_index", 1),
    ("--use_legacy_prediction_loop", "use_legacy_prediction_loop", True),
    ("--mp_parameters x", "mp_parameters", "x"),
    ("--ray_scope all", "ray_scope", "all"),
]


@pytest.mark.parametrize("kind", [AdapterTrainingArguments, Seq2SeqAdapterTrainingArguments])
@pytest.mark.parametrize(("line", "name", "value"), DROPPED, ids=[line for line, *_ in DROPPED])
def test_a_dropped_option_keeps_its_meaning(kind: type[TrainingArguments], line: str, name: str, value: Any):
    (parsed,) = HfArgumentParser(kind).parse_args_into_dataclasses(["--output_dir", "out", *line.split()])
    assert getattr(parsed, name) == value


def test_the_whole_run_can_be_warmup(tmp_path: Path):
    assert AdapterTrainingArguments(str(tmp_path), warmup_ratio=1.0).get_warmup_steps(1000) == 1000


def test_the_log_folder_goes_where_tensorboard_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    AdapterTrainingArguments(str(tmp_path), logging_dir="logs")
    assert __import__("os").environ["TENSORBOARD_LOGGING_DIR"] == "logs"


@pytest.mark.parametrize(("content", "overwrite", "expected"), [([], False, None), (["old.txt"], True, None)])
def test_output_folders_that_training_may_start_in(content: list[str], overwrite: bool, expected: Any, tmp_path: Path):
    for name in content:
        (tmp_path / name).touch()
    options = AdapterTrainingArguments(str(tmp_path), do_train=True, overwrite_output_dir=overwrite)
    assert options.checkpoint_to_resume() == expected


def test_the_checkpoint_to_resume(tmp_path: Path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    one, two = (str(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    assert AdapterTrainingArguments(str(tmp_path), do_train=True).checkpoint_to_resume() == two
    assert (
        AdapterTrainingArguments(str(tmp_path), do_train=True, resume_from_checkpoint=one).checkpoint_to_resume() == one
    )
    assert (
        AdapterTrainingArguments(str(tmp_path), do_train=True, overwrite_output_dir=True).checkpoint_to_resume() is None
    )
    assert AdapterTrainingArguments(str(tmp_path)).checkpoint_to_resume() is None


def test_the_snippet_of_the_training_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Arguments without a folder for outputs, the tokenizer under its former name, no collator."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = adapter(), object()
    training_args = TrainingArguments(learning_rate=1e-4, num_train_epochs=6)
    trainer = AdapterTrainer(
        model=model,
        args=training_args,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        tokenizer=tokenizer,
        compute_metrics=lambda predicted: {"rows": len(predicted.predictions)},
    )
    assert trainer.processing_class is tokenizer
    trainer.processing_class = None  # which has no save_pretrained
    assert trainer.train().global_step == 6 * 2
    assert trainer.evaluate()["eval_rows"] == len(ROWS)


def test_the_plain_trainer_saves_a_model_that_loads(tmp_path: Path):
    model = static_head()
    Trainer(model, arguments(tmp_path), train_dataset=ROWS).train()
    model.save_pretrained(tmp_path)
    loaded = adapters.load_model(str(tmp_path), BertForSequenceClassification)
    assert not differing(state(model), state(loaded))
