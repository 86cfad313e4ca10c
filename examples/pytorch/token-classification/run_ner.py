"""Trains and evaluates a tagger of words, for names or parts of speech, as an adapter or as a whole.

    python run_ner.py --model_name_or_path bert-base-uncased --train_file train.conll --validation_file dev.conll \
        --do_train --do_eval --output_dir out/ner --train_adapter --adapter_config seq_bn

README.md has more command lines; `python run_ner.py --help` has every option.
"""

import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from seqeval.metrics import accuracy_score, classification_report
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
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
"""Reader of a file by its extension; every other file is read as CoNLL: a word and its tag per line."""
NO_TAG = -100
"""What the loss leaves out."""


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments:
    task_name: str = field(default="ner", metadata={"help": "ner, pos, …: the tags are in the column <task>_tags."})
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset: a name on the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "CoNLL file, or json, jsonl, parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "CoNLL file, or json, jsonl, parquet."})
    test_file: str | None = field(default=None, metadata={"help": "CoNLL file, or json, jsonl, parquet."})
    text_column_name: str | None = field(default=None, metadata={"help": "Column of words; else tokens."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of tags; else <task>_tags, or tags."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Tokens per sentence; the rest is cut off."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to max_seq_length, not to the batch."})
    label_all_tokens: bool = field(default=False, metadata={"help": "Tag all tokens of a word, not just the first."})
    return_entity_level_metrics: bool = field(default=False, metadata={"help": "Metrics of each kind of entity too."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew even if it was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test examples."})

    def __post_init__(self) -> None:
        self.task_name = self.task_name.lower()
        if not (self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise AdapterError("No data given; pass --dataset_name, or --train_file and --validation_file.")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Pretrained model: a name on the Hub or a local folder."})
    config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it is elsewhere."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, if it is elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Skip weights of another shape."})


def parse_arguments() -> tuple[ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments]:
    """From the command line, or from the JSON file that is its only argument."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


# --- Reading data ----------------------------------------------------------------------------------------------------


def read_conll(path: Path) -> Dataset:
    """Sentences apart by blank lines; the first field of a line is the word, the last its tag."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: it is not UTF-8 ({error}); it must be. Convert it, with iconv say.") from error
    rows: dict[str, list[list[str]]] = {"tokens": [], "tags": []}
    line = 0
    for block in re.split(r"(?<=\n)[ \t\r]*\n", text):
        words, tags = [], []
        for part in block.splitlines():
            line += 1
            if not part.strip() or part.startswith(("-DOCSTART-", "# ")):
                continue
            fields = part.split("\t") if "\t" in part else part.split()
            if len(fields) < 2:
                raise AdapterError(
                    f"{path}, sentence {len(rows['tokens']) + 1}: {part!r} has no tag; each word has one."
                )
            words.append(fields[0])
            tags.append(fields[-1].strip())
        if words:
            rows["tokens"].append(words)
            rows["tags"].append(tags)
    return Dataset.from_dict(rows)


def read_file(path: Path, cache_dir: str | None) -> Dataset:
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such file; it must exist.")
    if path.stat().st_size == 0:
        raise AdapterError(f"{path}: the file is empty; it must have at least one sentence.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        return read_conll(path)
    try:
        return load_dataset(reader, data_files=str(path), split="train", cache_dir=cache_dir)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise AdapterError(f"{path}: it cannot be read as {reader} ({cause}); it must be valid.") from error


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    if data_args.dataset_name is not None:
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        return load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    return DatasetDict({split: read_file(Path(file), model_args.cache_dir) for split, file in files.items() if file})


# --- Splits, columns and tags ----------------------------------------------------------------------------------------


def choose_splits(data: DatasetDict, training_args: AdapterTrainingArguments) -> list[str]:
    wanted = {
        "train": training_args.do_train,
        "validation": training_args.do_eval,
        "test": training_args.do_predict,
    }
    for split, needed in wanted.items():
        if needed and split not in data:
            raise AdapterError(f"There is no {split} data, only {', '.join(data)}; what is to be done needs it.")
    return [split for split, needed in wanted.items() if needed]


def choose_columns(data: Dataset, data_args: DataTrainingArguments) -> tuple[str, str]:
    """The column of words and that of their tags."""
    names = data.column_names
    text = data_args.text_column_name or ("tokens" if "tokens" in names else names[0])
    tags = data_args.label_column_name or next(
        (name for name in (f"{data_args.task_name}_tags", "tags") if name in names), names[-1]
    )
    return text, tags


def check_rows(data: Dataset, split: str, columns: tuple[str, str]) -> None:
    """The split has rows, and each as many tags as words."""
    if missing := [name for name in columns if name not in data.column_names]:
        found = ", ".join(data.column_names)
        raise AdapterError(
            f"The {split} data has no column {missing[0]}, only {found}; name it with --text_column_name or "
            "--label_column_name."
        )
    if len(data) == 0:
        raise AdapterError(f"The {split} data is empty; it must have at least one sentence.")
    for row, (words, tags) in enumerate(zip(data[columns[0]], data[columns[1]], strict=True), start=1):
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise AdapterError(f"The {split} data, row {row}: there must be a list of words and one of as many tags.")


def list_tags(data: Dataset, column: str) -> list[str]:
    """The tags in the order of their numbers."""
    feature = data.features[column].feature
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return sorted({str(tag) for tags in data[column] for tag in tags})


def encode_tags(data: Dataset, split: str, column: str, tags: Sequence[str]) -> Dataset:
    """The column `labels`, of the places in `tags`."""
    feature, numbers = data.features[column].feature, {tag: number for number, tag in enumerate(tags)}
    given = data[column]
    if isinstance(feature, ClassLabel):
        given = [[feature.names[number] for number in row] for row in given]
    if unseen := sorted({str(tag) for row in given for tag in row} - set(tags)):
        raise AdapterError(
            f"The {split} data has the tag {unseen[0]!r}, which is not one of training; it must be one of "
            f"{', '.join(tags)}."
        )
    encoded = [[numbers[str(tag)] for tag in row] for row in given]
    return data.remove_columns([name for name in ("labels",) if name in data.column_names]).add_column(
        "labels", encoded
    )


def prepare(
    data: Dataset, split: str, columns: tuple[str, str], tags: Sequence[str], data_args: DataTrainingArguments
) -> Dataset:
    """The checked split with its words, its tags as numbers, and no more rows than asked for."""
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    check_rows(data, split, columns)
    data = encode_tags(data, split, columns[1], tags).select_columns([columns[0], "labels"])
    limit = limits[split]
    return data if limit is None else data.select(range(min(limit, len(data))))


def continued(tags: Sequence[str]) -> list[int]:
    """The tag of a word's later tokens: where a name begins, B-, they are inside of it, I-."""
    numbers = {tag: number for number, tag in enumerate(tags)}
    return [numbers.get(f"I-{tag[2:]}", number) if tag.startswith("B-") else number for number, tag in enumerate(tags)]


def tokenize(
    data: Dataset,
    column: str,
    tags: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataTrainingArguments,
) -> Dataset:
    """Tokens with the tag of their word; without `label_all_tokens` only a word's first token has one."""
    inside = continued(tags)

    def align(words: Sequence[int | None], labels: Sequence[int]) -> list[int]:
        found, last = [], None
        for word in words:
            if word is None:
                found.append(NO_TAG)
            elif word != last:
                found.append(labels[word])
            else:
                found.append(inside[labels[word]] if data_args.label_all_tokens else NO_TAG)
            last = word
        return found

    def encode(batch: dict[str, list[Any]]) -> Mapping[str, Any]:
        encoded = tokenizer(
            batch[column],
            padding="max_length" if data_args.pad_to_max_length else False,
            truncation=True,
            max_length=data_args.max_seq_length,
            is_split_into_words=True,
        )
        labels = [align(encoded.word_ids(row), tags) for row, tags in enumerate(batch["labels"])]
        return {**encoded, "labels": labels}

    return data.map(
        encode,
        batched=True,
        remove_columns=data.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc="Tokenizing",
    )


# --- Metrics and predictions -----------------------------------------------------------------------------------------


def choose(outputs: Any, labels: np.ndarray, tags: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """The predicted tags and the right ones, of each row, where there are right ones."""
    numbers = np.argmax(outputs[0] if isinstance(outputs, tuple) else outputs, axis=-1)
    pairs = [(found[right != NO_TAG], right[right != NO_TAG]) for found, right in zip(numbers, labels, strict=True)]
    return tuple([[tags[number] for number in row] for row in rows] for rows in zip(*pairs, strict=True))


def build_metrics(tags: Sequence[str], each_entity: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """Precision, recall and F1 of whole names, as CoNLL's script counts them, and the accuracy of tags.

    Tags that mark no names, such as parts of speech, have the accuracy alone.
    """
    names_too = all(tag == "O" or tag[1:2] == "-" for tag in tags)

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        predictions, right = choose(evaluated.predictions, evaluated.label_ids, tags)
        if not names_too:
            return {"accuracy": float(accuracy_score(right, predictions))}
        report = classification_report(right, predictions, output_dict=True, zero_division=0)
        names = {"precision": "precision", "recall": "recall", "f1-score": "f1"}
        result = {name: float(report["micro avg"][theirs]) for theirs, name in names.items()}
        for entity in report if each_entity else ():
            if not entity.endswith(" avg"):
                result |= {f"{entity}_{name}": float(report[entity][theirs]) for theirs, name in names.items()}
        return result | {"accuracy": float(accuracy_score(right, predictions))}

    return compute_metrics


# --- Model -----------------------------------------------------------------------------------------------------------


def load_tokenizer_and_model(
    model_args: ModelArguments, tags: Sequence[str], task: str
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    source = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    name = model_args.model_name_or_path
    labels = {"id2label": dict(enumerate(tags)), "label2id": {tag: number for number, tag in enumerate(tags)}}
    config = AutoConfig.from_pretrained(model_args.config_name or name, finetuning_task=task, **labels, **source)
    spaces = {"add_prefix_space": True} if config.model_type in ("bloom", "deberta", "gpt2", "roberta") else {}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **spaces, **source)
    if not tokenizer.is_fast:
        raise AdapterError(
            f"{type(tokenizer).__name__}: it does not tell which word a token is from; it must be a tokenizer of the "
            "tokenizers library. Name one with --tokenizer_name."
        )
    model = AutoModelForTokenClassification.from_pretrained(
        name, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **source
    )
    return tokenizer, model


# --- Training, evaluation, prediction --------------------------------------------------------------------------------


def train(trainer: Trainer, checkpoint: str | None) -> None:
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: Trainer) -> None:
    metrics = trainer.evaluate() | {"eval_samples": len(trainer.eval_dataset)}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def predict(trainer: Trainer, test: Dataset, tags: Sequence[str]) -> None:
    """Writes the tags of each test sentence to a line of predictions.txt."""
    outputs = trainer.predict(test, metric_key_prefix="predict")
    metrics = outputs.metrics | {"predict_samples": len(test)}
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
    if trainer.is_world_process_zero():
        predictions, _ = choose(outputs.predictions, outputs.label_ids, tags)
        file = Path(trainer.args.output_dir) / "predictions.txt"
        file.write_text("".join(" ".join(row) + "\n" for row in predictions), encoding="utf-8")


def describe(trainer: Trainer, model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """Writes the model card, and uploads it with the adapter if asked to."""
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "token-classification"}
    if data_args.dataset_name is not None:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def main() -> None:
    model_args, data_args, training_args, adapter_args = parse_arguments()
    set_up_logging(logger, training_args)
    checkpoint = training_args.checkpoint_to_resume()
    set_seed(training_args.seed)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"

    data = read_data(data_args, model_args)
    splits = choose_splits(data, training_args)
    reference = "train" if "train" in data else next(iter(data))  # its tags count, also if it is not trained on
    columns = choose_columns(data[reference], data_args)
    check_rows(data[reference], reference, columns)
    tags = list_tags(data[reference], columns[1])
    raw = {split: prepare(data[split], split, columns, tags, data_args) for split in splits}

    tokenizer, model = load_tokenizer_and_model(model_args, tags, data_args.task_name)
    adapters.init(model)
    setup_adapter_training(model, adapter_args, Path(data_args.dataset_name or data_args.task_name).name)
    with training_args.main_process_first(desc="tokenizing"):
        ready = {split: tokenize(part, columns[0], tags, tokenizer, data_args) for split, part in raw.items()}

    trainer = (AdapterTrainer if adapter_args.train_adapter else Trainer)(
        model=model,
        args=training_args,
        data_collator=DataCollatorForTokenClassification(
            tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None
        ),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        compute_metrics=build_metrics(tags, data_args.return_entity_level_metrics),
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        evaluate(trainer)
    if training_args.do_predict:
        predict(trainer, ready["test"], tags)
    describe(trainer, model_args, data_args)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_ner.py: {error}")
