"""Trains and evaluates a model that chooses how a text goes on, as an adapter or as a whole: SWAG, COPA, XCOPA.

    python run_swag.py --model_name_or_path roberta-base --do_train --do_eval --output_dir out/swag_base \
        --train_adapter --adapter_config seq_bn

README.md has more command lines; `python run_swag.py --help` has every option.
"""

import json
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

import adapters
from adapters import AdapterArguments, AdapterTrainer, setup_adapter_training
from adapters.errors import AdapterError
from adapters.training import AdapterTrainingArguments, set_up_logging

logger = logging.getLogger(__name__)

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
"""What COPA's questions say, asked between the premise and the choice."""
CHOICE = re.compile(r"(?:ending|choice)\d+")


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments:
    dataset_name: str = field(
        default="allenai/swag", metadata={"help": "Dataset, if no files are given: on the Hub, or a local folder."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset; for SWAG it is regular."}
    )
    train_file: str | None = field(default=None, metadata={"help": "csv, json, jsonl or parquet; COPA's xml."})
    validation_file: str | None = field(default=None, metadata={"help": "csv, json, jsonl or parquet; COPA's xml."})
    test_file: str | None = field(default=None, metadata={"help": "The same; its labels are needed too."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Tokens of text and choice; the rest is cut."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to max_seq_length, not to the batch."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew even if it was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test examples."})

    def __post_init__(self) -> None:
        if self.dataset_name == "allenai/swag" and self.dataset_config_name is None:
            self.dataset_config_name = "regular"


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Pretrained model: a name on the Hub or a local folder."})
    config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it is elsewhere."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, if it is elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use a tokenizer of the tokenizers library."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def parse_arguments() -> tuple[ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments]:
    """From the command line, or from the JSON file that is its only argument."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


# --- Reading data ----------------------------------------------------------------------------------------------------


def read_copa(path: Path) -> Dataset:
    """COPA's and Balanced COPA's xml, with XCOPA's columns; its labels count from 1."""
    try:
        items = list(ElementTree.parse(path).iter("item"))
    except ElementTree.ParseError as error:
        raise AdapterError(f"{path}: it cannot be read as xml ({error}); it must be valid.") from error
    rows = [
        {
            "premise": item.findtext("p"),
            "choice1": item.findtext("a1"),
            "choice2": item.findtext("a2"),
            "question": item.get("asks-for"),
            "label": int(item.get("most-plausible-alternative", 0)) - 1,
        }
        for item in items
    ]
    if not rows:
        raise AdapterError(f"{path}: it has no <item>; it must have at least one.")
    return Dataset.from_list(rows)


def read_file(path: Path, cache_dir: str | None) -> Dataset:
    extension = path.suffix.lower()
    if extension != ".xml" and extension not in READERS:
        raise AdapterError(f"{path}: its extension is {extension!r}; it must be one of .xml, {', '.join(READERS)}.")
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such file; it must exist.")
    if path.stat().st_size == 0:
        raise AdapterError(f"{path}: the file is empty; it must have at least one example.")
    if extension == ".xml":
        return read_copa(path)
    options: dict[str, Any] = {"data_files": str(path), "split": "train", "cache_dir": cache_dir}
    if READERS[extension] == "csv":  # the text "NA" or "null" is text, only an empty cell is missing
        options |= {"keep_default_na": False, "na_values": [""]}
    try:
        return load_dataset(READERS[extension], **options)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise AdapterError(f"{path}: it cannot be read as {READERS[extension]} ({cause}); it must be valid.") from error
    except ValueError as error:  # what load_dataset says of a file without rows
        raise AdapterError(f"{path}: it has no rows ({error}); it must have at least one example.") from error


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    if any(files.values()):
        return DatasetDict(
            {split: read_file(Path(file), model_args.cache_dir) for split, file in files.items() if file}
        )
    options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    try:
        return load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise AdapterError(
            f"dataset_name={data_args.dataset_name!r}: it cannot be read ({error}); it must be a dataset of the Hub or "
            "a local folder. Or pass --train_file and --validation_file."
        ) from error


# --- Splits and columns ----------------------------------------------------------------------------------------------


def choose_splits(data: DatasetDict, training_args: AdapterTrainingArguments) -> list[str]:
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    for split, needed in wanted.items():
        if needed and split not in data:
            raise AdapterError(f"There is no {split} data, only {', '.join(data)}; what is to be done needs it.")
    return [split for split, needed in wanted.items() if needed]


def choices_of(row: Mapping[str, Any], names: list[str]) -> tuple[str, list[str]]:
    """What stands first, and each way to go on: in SWAG with the words that all of them begin with."""
    if "premise" in row:
        return row["premise"], [f"{QUESTIONS[row['question']]} {row[name]}" for name in names]
    return row["sent1"], [f"{row['sent2'] or ''} {row[name]}".strip() for name in names]


def check_row(row: Mapping[str, Any], place: str, names: list[str]) -> None:
    for name in (*(("premise", "question") if "premise" in row else ("sent1",)), *names, "label"):
        if row[name] is None:
            raise AdapterError(f"{place} has no {name}; each row must have one.")
    if isinstance(row["label"], bool) or row["label"] not in range(len(names)):
        raise AdapterError(
            f"{place} has the label {row['label']!r}; it must be the place of the right choice, 0 to {len(names) - 1}."
        )
    if "premise" in row and row["question"] not in QUESTIONS:
        raise AdapterError(f"{place} has the question {row['question']!r}; it must be one of {', '.join(QUESTIONS)}.")


def prepare(data: Dataset, split: str, data_args: DataTrainingArguments) -> Dataset:
    """The checked split as columns `first`, `choices` and `label`, with no more rows than asked for."""
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    limit = limits.get(split, data_args.max_predict_samples)
    data = data if limit is None else data.select(range(min(limit, len(data))))
    if len(data) == 0:
        raise AdapterError(f"The {split} data is empty; it must have at least one example.")
    names = sorted((name for name in data.column_names if CHOICE.fullmatch(name)), key=lambda name: (len(name), name))
    needed = ("premise", "question", "choice2") if "premise" in data.column_names else ("sent1", "sent2", "ending1")
    if missing := [name for name in (*needed, "label") if name not in data.column_names]:
        raise AdapterError(
            f"The {split} data has no column {missing[0]}, only {', '.join(data.column_names)}; it must have sent1, "
            "sent2, ending0, ending1 and so on, label; or premise, question, choice1, choice2, label."
        )
    columns: dict[str, list[Any]] = {"first": [], "choices": [], "label": []}
    for number, row in enumerate(data, start=1):
        check_row(row, f"The {split} data, row {number},", names)
        for column, value in zip(columns, (*choices_of(row, names), row["label"]), strict=True):
            columns[column].append(value)
    return Dataset.from_dict(columns)


def fit_length(data_args: DataTrainingArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokens of a text with a choice: those asked for, unless the model takes fewer."""
    most, asked = tokenizer.model_max_length, data_args.max_seq_length
    if asked is not None and asked > most:
        logger.warning("max_seq_length=%d: the model takes %d tokens; these are used", asked, most)
    return min(asked or 1024, most)


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments) -> Dataset:
    """Each text with each of its choices."""
    length = fit_length(data_args, tokenizer)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pairs = [(first, choice) for first, row in zip(batch["first"], batch["choices"], strict=True) for choice in row]
        padding = "max_length" if data_args.pad_to_max_length else False
        encoded = tokenizer(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=length, padding=padding)
        size = len(batch["choices"][0])
        return {
            name: [rows[start : start + size] for start in range(0, len(rows), size)] for name, rows in encoded.items()
        }

    return data.map(
        encode,
        batched=True,
        remove_columns=["first", "choices"],
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc="Tokenizing",
    )


# --- Metrics and predictions -----------------------------------------------------------------------------------------


def choose(outputs: Any) -> np.ndarray:
    """The number of the choice with the highest score, of each row."""
    return np.argmax(outputs[0] if isinstance(outputs, tuple) else outputs, axis=-1)


def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(choose(evaluated.predictions) == evaluated.label_ids))}


# --- Model, training, evaluation, prediction -------------------------------------------------------------------------


def load_tokenizer_and_model(model_args: ModelArguments) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    source = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(model_args.config_name or name, **source)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or name, use_fast=model_args.use_fast_tokenizer, **source
    )
    return tokenizer, AutoModelForMultipleChoice.from_pretrained(name, config=config, **source)


def record(trainer: Trainer, kind: str, metrics: dict[str, float], examples: Dataset) -> None:
    metrics[f"{kind}_samples"] = len(examples)
    trainer.log_metrics(kind, metrics)
    trainer.save_metrics(kind, metrics)


def predict(trainer: Trainer, test: Dataset) -> None:
    """Writes the number of the choice for each test row, with the scores of all choices, to a line of json."""
    outputs = trainer.predict(test, metric_key_prefix="predict")
    record(trainer, "predict", outputs.metrics, test)
    if trainer.is_world_process_zero():
        scores = outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions
        rows = zip(choose(scores).tolist(), scores.tolist(), strict=True)
        lines = "".join(json.dumps({"prediction": choice, "scores": values}) + "\n" for choice, values in rows)
        (Path(trainer.args.output_dir) / "predictions.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    model_args, data_args, training_args, adapter_args = parse_arguments()
    set_up_logging(logger, training_args)
    checkpoint = training_args.checkpoint_to_resume()
    set_seed(training_args.seed)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"

    data = read_data(data_args, model_args)
    raw = {split: prepare(data[split], split, data_args) for split in choose_splits(data, training_args)}
    tokenizer, model = load_tokenizer_and_model(model_args)
    adapters.init(model)
    setup_adapter_training(model, adapter_args, "swag")
    with training_args.main_process_first(desc="tokenizing"):
        ready = {split: tokenize(part, tokenizer, data_args) for split, part in raw.items()}

    trainer = (AdapterTrainer if adapter_args.train_adapter else Trainer)(
        model=model,
        args=training_args,
        data_collator=DataCollatorForMultipleChoice(
            tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None, return_tensors="pt"
        ),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    if training_args.do_train:
        record(trainer, "train", trainer.train(resume_from_checkpoint=checkpoint).metrics, ready["train"])
        trainer.save_model()
        trainer.save_state()
    if training_args.do_eval:
        record(trainer, "eval", trainer.evaluate(), ready["validation"])
    if training_args.do_predict:
        predict(trainer, ready["test"])
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "multiple-choice"}
    if not (data_args.train_file or data_args.validation_file):
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}
    (trainer.push_to_hub if training_args.push_to_hub else trainer.create_model_card)(**card)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_swag.py: {error}")
