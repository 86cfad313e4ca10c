"""Fine-tunes a chat model on examples of what to answer, as an adapter or as a whole, through TRL's SFTTrainer.

    python run_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --train_file train.jsonl --do_train \
        --validation_file dev.jsonl --do_eval --output_dir out/chat --train_adapter --adapter_config lora

With --load_in_4bit the base model is kept in 4 bits (QLoRA, and the same with every other adapter). README.md has more
command lines; `python run_sft.py --help` has every option.
"""

import json
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import SFTTrainer

import adapters
from adapters import AdapterArguments, prepare_quantized_training, setup_adapter_training
from adapters.errors import AdapterError
from adapters.training import parse_options, read_table, set_up_logging
from adapters.training.trl import AdapterSFTConfig, AdapterSFTTrainer

logger = logging.getLogger(__name__)

FORMS = (("messages",), ("prompt", "completion"), ("text",))
"""The columns that an example may have."""


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset: a name on the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "jsonl, json, csv, tsv or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "The same, to answer; it needs no answers."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of an answer to a test example."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test examples."})

    def __post_init__(self) -> None:
        if not (self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise AdapterError("No data given; pass --dataset_name, or --train_file and --validation_file.")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Pretrained model: a name on the Hub or a local folder."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, if it is elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub."})
    dtype: str = field(default="float32", metadata={"help": "auto, float32, bfloat16 or float16."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Keep the base model in 4 bits: nf4, scales too."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Keep the base model in 8 bits."})

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise AdapterError(f"dtype={self.dtype!r}: it must be auto, float32, bfloat16 or float16.")
        if self.load_in_4bit and self.load_in_8bit:
            raise AdapterError("load_in_4bit and load_in_8bit: a model is kept in one of them; pass one option.")


def parse_arguments() -> tuple[Any, ...]:
    return parse_options(ModelArguments, DataTrainingArguments, AdapterSFTConfig, AdapterArguments)


# --- Data ------------------------------------------------------------------------------------------------------------


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    """The splits train, validation and test, as far as they are there."""
    if data_args.dataset_name is not None:
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        return load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    return DatasetDict({split: read_table(file, model_args.cache_dir) for split, file in files.items() if file})


def choose_splits(data: DatasetDict, training_args: AdapterSFTConfig) -> list[str]:
    wanted = {
        "train": training_args.do_train,
        "validation": training_args.do_eval,
        "test": training_args.do_predict,
    }
    for split, needed in wanted.items():
        if needed and split not in data:
            raise AdapterError(
                f"There is no {split} data, only {', '.join(data)}; it is needed for what is to be done."
            )
    return [split for split, needed in wanted.items() if needed]


def prepare(data: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Dataset:
    """The checked split with the columns of one form, and no more rows than asked for; a test set has prompts."""
    forms = (("prompt",), ("messages",)) if split == "test" else FORMS
    form = next((form for form in forms if set(form) <= set(data.column_names)), None)
    if form is None:
        wanted = ", or ".join(" and ".join(form) for form in forms)
        raise AdapterError(
            f"The {split} data has the columns {', '.join(data.column_names)}; it must have {wanted}. Rename them."
        )
    data = data.select_columns(list(form))
    data = data if limit is None else data.select(range(min(limit, len(data))))
    for number, row in enumerate(data, 1):
        for name, value in row.items():
            check_value(value, f"The {split} data has in row {number}, column {name},", tokenizer)
    return data


def check_value(value: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A text, or messages with a role and a content each, which the model's template can write down."""
    if isinstance(value, str) and value:
        return
    if not isinstance(value, list) or not value:
        raise AdapterError(f"{where} {value!r}; it must be a text, or a list of messages.")
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise AdapterError(f"{where} the message {message!r}; each must have a role and a content.")
    if tokenizer.chat_template is None:
        raise AdapterError(
            f"{where} messages, and the tokenizer has no chat template to write them down; it must have one. Take a "
            "chat model's tokenizer with --tokenizer_name, or pass --chat_template_path."
        )


# --- Model -----------------------------------------------------------------------------------------------------------


def load_tokenizer(model_args: ModelArguments, training_args: AdapterSFTConfig) -> PreTrainedTokenizerBase:
    source = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.token}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path, **source)
    template = Path(training_args.chat_template_path or "")
    if template.is_file():
        tokenizer.chat_template = template.read_text("utf-8")
    return tokenizer


def load_model(model_args: ModelArguments, training_args: AdapterSFTConfig) -> PreTrainedModel:
    """The model, initialised for adapters; its weights quantised if asked for."""
    options: dict[str, Any] = {"dtype": model_args.dtype, "token": model_args.token}
    options |= {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision}
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **options)
        adapters.init(model)
        return model
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=model_args.load_in_4bit,
        load_in_8bit=model_args.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if training_args.bf16 else torch.float32,
    )
    options["device_map"] = {"": training_args.device}
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **options)
    return prepare_quantized_training(model, gradient_checkpointing=False)  # the trainer switches it on


# --- Training, evaluation, answers -----------------------------------------------------------------------------------


def train(trainer: SFTTrainer, checkpoint: str | None) -> None:
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: SFTTrainer) -> None:
    metrics = trainer.evaluate() | {"eval_samples": len(trainer.eval_dataset)}
    metrics["perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def prompt_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model is given: the prompt, or the messages before the last answer."""
    given = row.get("prompt") or row["messages"]
    if isinstance(given, str):
        return given
    asked = given[:-1] if given[-1]["role"] == "assistant" else given
    return tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def predict(trainer: SFTTrainer, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
    """Writes the most likely answer to each test example."""
    if not trainer.is_world_process_zero():
        return
    model = trainer.model.eval()
    with (Path(trainer.args.output_dir) / "generated_predictions.jsonl").open("w", encoding="utf-8") as file:
        for row in data:
            prompt = prompt_of(row, tokenizer)
            inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            file.write(json.dumps({"prompt": prompt, "answer": answer.strip()}, ensure_ascii=False) + "\n")


def main() -> None:
    model_args, data_args, training_args, adapter_args = parse_arguments()
    set_up_logging(logger, training_args)
    checkpoint = training_args.checkpoint_to_resume()
    set_seed(training_args.seed)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not adapter_args.train_adapter:
        raise AdapterError("A quantised model cannot be trained as a whole; pass --train_adapter.")

    data = read_data(data_args, model_args)
    tokenizer = load_tokenizer(model_args, training_args)
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    splits = choose_splits(data, training_args)
    ready = {split: prepare(data[split], split, tokenizer, limits[split]) for split in splits}
    model = load_model(model_args, training_args)
    name = Path(data_args.dataset_name or "chat").name  # of a dataset org/name, the name
    setup_adapter_training(model, adapter_args, name)

    learnt = [ready[split] for split in ("train", "validation") if split in ready]
    if learnt:
        trainer = (AdapterSFTTrainer if adapter_args.train_adapter else SFTTrainer)(
            model=model,
            args=training_args,
            train_dataset=learnt[0],  # TRL wants one, even if it only evaluates
            eval_dataset=ready.get("validation"),
            processing_class=tokenizer,
        )
    else:
        raise AdapterError("Nothing is to be done with examples; pass --do_train or --do_eval, also to --do_predict.")
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        evaluate(trainer)
    if training_args.do_predict:
        predict(trainer, ready["test"], tokenizer, data_args.max_new_tokens)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=data_args.dataset_name)
    else:
        trainer.create_model_card(dataset_name=data_args.dataset_name)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_sft.py: {error}")
