"""What a caller is told when training cannot start."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from adapters import AutoAdapterModel
from adapters.errors import AdapterError
from adapters.trainer import AdapterTrainer
from adapters.training import AdapterArguments, AdapterTrainingArguments, setup_adapter_training
from adapters.training.checkpoint import OTHER_WEIGHTS

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=8,
)
ROWS = [{"input_ids": [3, 4, 5], "labels": 0}] * 2


def model() -> Any:
    made = AutoAdapterModel.from_config(copy.deepcopy(CONFIG))
    made.add_classification_head("task", num_labels=2)
    return made


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, max_steps=1, save_strategy="no")


@pytest.mark.parametrize("option", ["load_adapter", "load_lang_adapter"])
def test_loading_without_training(option: str):
    with pytest.raises(AdapterError, match=rf"{option}='x': train_adapter is False; .* Pass --train_adapter\."):
        setup_adapter_training(model(), AdapterArguments(**{option: "x"}), "task")


def test_setup_of_a_model_without_adapters():
    with pytest.raises(AdapterError, match=r"BertModel.* Call adapters\.init\(model\) first\."):
        setup_adapter_training(BertModel(CONFIG), AdapterArguments(True), "task")


@pytest.mark.parametrize("option", ["load_adapter", "load_lang_adapter", "adapter_config"])
def test_a_setup_that_fails_leaves_the_model(option: str, tmp_path: Path):
    source = model()
    source.add_adapter("en")
    source.save_adapter(str(tmp_path / "en"), "en")
    made = model()
    names = set(made.state_dict())
    trained = [p.requires_grad for p in made.parameters()]
    options = {"load_lang_adapter": str(tmp_path / "en"), option: str(tmp_path / "nothing")}
    with pytest.raises((AdapterError, OSError)):
        setup_adapter_training(made, AdapterArguments(True, **options), "task")
    assert set(made.state_dict()) == names and len(made.adapters_config) == 0 and made.active_adapters is None
    assert [p.requires_grad for p in made.parameters()] == trained


def test_a_language_adapter_of_the_same_name(tmp_path: Path):
    source = model()
    source.add_adapter("task")
    source.save_adapter(str(tmp_path), "task")
    made = model()
    with pytest.raises(AdapterError, match="its name is 'task', as that of the trained adapter"):
        setup_adapter_training(made, AdapterArguments(True, load_lang_adapter=str(tmp_path)), "task")
    assert len(made.adapters_config) == 0


def test_a_model_that_was_never_initialised(tmp_path: Path):
    with pytest.raises(AdapterError, match=r"BertForSequenceClassification.* Call adapters\.init\(model\) first"):
        AdapterTrainer(BertForSequenceClassification(CONFIG), arguments(tmp_path))


@pytest.mark.parametrize("how", ["model", "model_init"])
def test_nothing_active(how: str, tmp_path: Path):
    made = model()
    made.add_adapter("task")
    with pytest.raises(AdapterError, match=r"Expected a model with an active adapter setup.*'task'.*train_adapter"):
        AdapterTrainer(**{how: made if how == "model" else lambda: made}, args=arguments(tmp_path))


def test_a_base_model_that_is_not_frozen(tmp_path: Path):
    made = model()
    made.add_adapter("task")
    made.set_active_adapters("task")
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(AdapterError, match=r"not frozen.* Call train_adapter\("):
        AdapterTrainer(made, arguments(tmp_path), train_dataset=ROWS).train()
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def trained() -> Any:
    made = model()
    made.add_adapter("task")
    made.train_adapter("task")
    return made


def test_a_folder_that_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(AdapterError, match=r"Can't find a valid checkpoint.*no adapter"):
        AdapterTrainer(trained(), arguments(tmp_path), train_dataset=ROWS).train(resume_from_checkpoint=str(tmp_path))


def test_no_checkpoint_in_the_output_folder(tmp_path: Path):
    with pytest.raises(AdapterError, match="no complete checkpoint"):
        AdapterTrainer(trained(), arguments(tmp_path), train_dataset=ROWS).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_adapters(tmp_path: Path):
    other = model()
    other.add_adapter("other")
    other.train_adapter("other")
    AdapterTrainer(other, arguments(tmp_path)).save_model()
    made = trained()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(AdapterError, match=r"'task'.*'other'"):
        AdapterTrainer(made, arguments(tmp_path), train_dataset=ROWS).train(resume_from_checkpoint=str(tmp_path))
    assert made.state_dict().keys() == before.keys()


@pytest.mark.parametrize("broken", ["task/adapter.safetensors", "head/model_head.safetensors", OTHER_WEIGHTS])
def test_a_checkpoint_that_breaks_off_leaves_the_model(broken: str, tmp_path: Path):
    def make(seed: int) -> Any:
        set_seed(seed)
        made = model()
        made.add_classification_head("head", num_labels=3)
        made.add_adapter("first", "lora[init_weights='bert']")
        made.add_adapter("task")
        made.train_adapter("task", train_embeddings=True)
        return made

    AdapterTrainer(make(0), arguments(tmp_path)).save_model()
    content = (tmp_path / broken).read_bytes()
    if broken == OTHER_WEIGHTS:
        save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(3, 8)}, tmp_path / broken)
    else:
        (tmp_path / broken).write_bytes(content[:-9])
    made = make(1)
    before, active = copy.deepcopy(made.state_dict()), (made.active_head, made.active_adapters)
    with pytest.raises(AdapterError):
        AdapterTrainer(made, arguments(tmp_path), train_dataset=ROWS).train(resume_from_checkpoint=str(tmp_path))
    after = made.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
    assert (made.active_head, made.active_adapters) == active


def test_an_output_folder_with_content(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(AdapterError, match=r"is not empty and has no checkpoint.* Pass --overwrite_output_dir"):
        AdapterTrainingArguments(str(tmp_path), do_train=True).checkpoint_to_resume()


def test_a_checkpoint_that_is_none(tmp_path: Path):
    with pytest.raises(AdapterError, match="there is no complete checkpoint"):
        AdapterTrainingArguments(
            str(tmp_path), do_train=True, resume_from_checkpoint=str(tmp_path)
        ).checkpoint_to_resume()


@pytest.mark.parametrize("ratio", ["-0.1", "1.5"])
def test_a_ratio_that_is_none(ratio: str):
    with pytest.raises(AdapterError, match=r"must lie in \[0, 1\]"):
        HfArgumentParser(AdapterTrainingArguments).parse_args_into_dataclasses(["--warmup_ratio", ratio])


def test_fsdp_options_beside_a_configuration_file():
    with pytest.raises(AdapterError, match="Move them there"):
        AdapterTrainingArguments("out", fsdp_config="fsdp.json", fsdp_min_num_params=3)
