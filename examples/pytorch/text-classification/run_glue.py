"""Trains and evaluates a text classifier, as an adapter or as a whole, on a GLUE task or on your own files.

    python run_glue.py --model_name_or_path bert-base-uncased --task_name mrpc --do_train --do_eval \
        --output_dir out/mrpc --train_adapter --adapter_config seq_bn

README.md has more command lines; `python run_glue.py --help` has every option.
"""

import csv
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
    set_seed,
)

from adapters import AdapterArguments, AdapterTrainer, AutoAdapterModel, setup_adapter_training
from adapters.errors import AdapterError
from adapters.training import AdapterTrainingArguments, set_up_logging

logger = logging.getLogger(__name__)

# --- What there is to know about GLUE --------------------------------------------------------------------------------


class Task(NamedTuple):
    texts: tuple[str, ...]
    """Columns that hold the text."""
    labels: tuple[str, ...]
    """In the order of their numbers; none for regression."""
    metrics: tuple[str, ...]


SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
ACCURACY = ("accuracy",)
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ACCURACY),
    "mrpc": Task(SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qnli": Task(("question", "sentence"), ENTAILMENT, ACCURACY),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": Task(SENTENCES, ENTAILMENT, ACCURACY),
    "sst2": Task(("sentence",), ("negative", "positive"), ACCURACY),
    "stsb": Task(SENTENCES, (), ("pearson", "spearmanr")),
    "wnli": Task(SENTENCES, ("not_entailment", "entailment"), ACCURACY),
}
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "mse": mean_squared_error,
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearmanr": lambda labels, predictions: spearmanr(labels, predictions).statistic,
}
# The headers of GLUE's own tsv files, as the columns are called here. CoLA's files have none.
TSV_COLUMNS = {
    "#1 String": "sentence1",
    "#2 String": "sentence2",
    "Quality": "label",
    "score": "label",
    "is_duplicate": "label",
    "gold_label": "label",
}
COLA_COLUMNS = ("source", "label", "mark", "sentence")
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments:
    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(TASKS)}."})
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset: a name on the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Local copy of GLUE or of the task. ./glue/<task> is found without it."}
    )
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet file."})
    test_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet file."})
    text_columns: str | None = field(
        default=None, metadata={"help": "One or two columns of text in your own data, such as 'title,body'."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per example; the rest is cut off."})
    pad_to_max_length: bool = field(default=True, metadata={"help": "Pad to max_seq_length, not to the batch."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew even if it was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test examples."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower().replace("-", "")
            if self.task_name not in TASKS:
                raise AdapterError(f"task_name={self.task_name!r}: no GLUE task; it must be one of {', '.join(TASKS)}.")
        elif not (self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise AdapterError(
                "No data given; pass --task_name, --dataset_name, or --train_file and --validation_file."
            )


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
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Skip weights of another shape."})


def parse_arguments() -> tuple[ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments]:
    """From the command line, or from the JSON file that is its only argument."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


# --- Reading data ----------------------------------------------------------------------------------------------------


def read_file(path: Path, cache_dir: str | None) -> Dataset:
    extension = path.suffix.lower()
    if extension not in READERS:
        raise AdapterError(f"{path}: its extension is {extension!r}; it must be one of {', '.join(READERS)}.")
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such file; it must exist.")
    if path.stat().st_size == 0:
        raise AdapterError(f"{path}: the file is empty; it must have at least one example.")
    options: dict[str, Any] = {"data_files": str(path), "split": "train", "cache_dir": cache_dir}
    if READERS[extension] == "csv":  # the text "NA" or "null" is text, only an empty cell is missing
        options |= {"sep": "\t" if extension == ".tsv" else ",", "keep_default_na": False, "na_values": [""]}
    try:
        return load_dataset(READERS[extension], **options)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise AdapterError(f"{path}: it cannot be read as {READERS[extension]} ({cause}); it must be valid.") from error
    except ValueError as error:  # what load_dataset says of a file without rows
        raise AdapterError(f"{path}: it has no rows ({error}); it must have at least one example.") from error


def read_glue_tsv(path: Path, task: str) -> Dataset:
    """A file of GLUE's own download. Lines without all fields are skipped (QQP has some)."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    header = list(COLA_COLUMNS) if task == "cola" and path.stem != "test" else rows.pop(0)
    names = TSV_COLUMNS | ({"sentence1": "premise", "sentence2": "hypothesis"} if task == "mnli" else {})
    header = [names.get(name, name) for name in header]
    examples = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    wanted = [*TASKS[task].texts, *(["label"] if "label" in header else [])]
    return Dataset.from_dict({name: [example[name] for example in examples] for name in wanted})


def read_glue_folder(folder: Path, task: str, cache_dir: str | None) -> DatasetDict:
    """A local copy of one task: from `save_to_disk`, GLUE's own tsv files, or one or more files per split."""
    if (folder / "dataset_dict.json").is_file():
        return load_from_disk(str(folder))
    parts: dict[str, list[Dataset]] = {}
    for file in sorted(folder.iterdir()):
        split = re.split(r"[-.]", file.name)[0].replace("dev", "validation")
        if file.suffix.lower() in READERS and split.startswith(("train", "validation", "test")):
            own = file.suffix.lower() == ".tsv"
            part = read_glue_tsv(file, task) if own else read_file(file, cache_dir)
            parts.setdefault(split, []).append(part)
    return DatasetDict({split: datasets.concatenate_datasets(files) for split, files in parts.items()})


def read_glue(task: str, data_dir: str | None, model_args: ModelArguments) -> DatasetDict:
    """The task from `data_dir` or ./glue, where its folder may be called mrpc, MRPC or the like, else from the Hub."""
    root = Path(data_dir or "glue")
    if data_dir and not root.is_dir():
        raise AdapterError(f"data_dir={data_dir!r}: there is no such folder; it must be a local copy of GLUE.")
    inside = sorted(root.iterdir()) if root.is_dir() else []
    folders = [path for path in inside if path.is_dir() and path.name.lower().replace("-", "") == task]
    for folder in [*folders, *([root] if data_dir else [])]:
        if data := read_glue_folder(folder, task, model_args.cache_dir):
            logger.info("Reading %s from %s", task, folder)
            return data
    source = str(root) if root.is_dir() else "nyu-mll/glue"
    try:
        return load_dataset(source, task, cache_dir=model_args.cache_dir, token=model_args.token)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise AdapterError(
            f"task_name={task!r}: neither {root / task} nor the Hub has the data ({error}); one of them must. "
            f"Put files train.*, validation.* and test.* into {root / task}, or name their folder with --data_dir."
        ) from error


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    if data_args.task_name is not None:
        return read_glue(data_args.task_name, data_args.data_dir, model_args)
    if data_args.dataset_name is not None:
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        return load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    return DatasetDict({split: read_file(Path(file), model_args.cache_dir) for split, file in files.items() if file})


# --- Splits, columns and labels --------------------------------------------------------------------------------------


def choose_splits(data: DatasetDict, training_args: AdapterTrainingArguments) -> dict[str, list[str]]:
    """The splits that each thing to do needs. MNLI has two of validation and of test, matched and mismatched."""
    wanted = {
        "train": training_args.do_train,
        "validation": training_args.do_eval,
        "test": training_args.do_predict,
    }
    splits = {kind: sorted(name for name in data if name.split("_")[0] == kind) for kind in wanted}
    for kind, needed in wanted.items():
        if needed and not splits[kind]:
            raise AdapterError(f"There is no {kind} data, only {', '.join(data)}; it is needed for what is to be done.")
    return {kind: splits[kind] if needed else [] for kind, needed in wanted.items()}


def choose_text_columns(data: Dataset, data_args: DataTrainingArguments) -> list[str]:
    """Those asked for, else a GLUE task's own, else sentence1 and sentence2, else the first two that hold text."""
    if data_args.text_columns is not None:
        columns = [name.strip() for name in data_args.text_columns.split(",")]
    elif data_args.task_name is not None:
        columns = list(TASKS[data_args.task_name].texts)
    elif set(SENTENCES) <= set(data.column_names):
        columns = list(SENTENCES)
    else:
        texts = (Value("string"), Value("large_string"))
        columns = [name for name, kind in data.features.items() if kind in texts and name != "label"][:2]
    if not 1 <= len(columns) <= 2:
        raise AdapterError(
            f"{len(columns)} columns of text among {', '.join(data.column_names)}; there must be one or two. "
            "Name them with --text_columns."
        )
    logger.info("Text columns: %s", ", ".join(columns))
    return columns


def check_rows(data: Dataset, split: str, columns: Sequence[str]) -> None:
    """The split has rows, and each of them a value in each of the columns."""
    if len(data) == 0:
        raise AdapterError(f"The {split} data is empty; it must have at least one example.")
    if missing := [name for name in columns if name not in data.column_names]:
        found = ", ".join(data.column_names)
        raise AdapterError(f"The {split} data has no column {', '.join(missing)}, only {found}; it must have it.")
    for name in columns:
        if data.data.column(name).null_count:
            row = data.data.column(name).to_pylist().index(None) + 1
            raise AdapterError(f"The {split} data has no {name} in row {row}; each row must have one.")


def list_labels(data: Dataset, split: str, task: str | None) -> list[str]:
    """The labels in the order of their numbers; none for regression, that is when the labels are floats."""
    if task is not None:
        return list(TASKS[task].labels)
    check_rows(data, split, ["label"])
    feature = data.features["label"]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if feature.dtype.startswith("float"):
        return []
    return [str(label) for label in sorted(data.unique("label"))]


def encode_labels(data: Dataset, split: str, labels: Sequence[str], task: str | None) -> Dataset:
    """The column `label` as floats for regression, else as places in `labels`; -1 where a test set hides them."""
    if not labels:
        return data.cast_column("label", Value("float32"))
    numbers = {str(number): number for number in range(len(labels))} if task is not None else {}
    numbers |= {label: number for number, label in enumerate(labels)}
    if split.startswith("test"):
        numbers.setdefault("-1", -1)
    feature, given = data.features["label"], data.data.column("label").to_pylist()
    if isinstance(feature, ClassLabel):
        given = [feature.names[number] if number >= 0 else number for number in given]
    if unseen := sorted({str(label) for label in given} - set(numbers)):
        raise AdapterError(
            f"The {split} data has the label {unseen[0]!r}, which is not one of training; "
            f"it must be one of {', '.join(labels)}."
        )
    return data.remove_columns("label").add_column("label", [numbers[str(label)] for label in given])


def prepare(
    data: Dataset,
    split: str,
    columns: Sequence[str],
    labels: Sequence[str],
    data_args: DataTrainingArguments,
) -> Dataset:
    """The checked split with its texts as strings, its labels as numbers, and no more rows than asked for."""
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    hidden = split.startswith("test") and "label" not in data.column_names
    check_rows(data, split, [*columns, *([] if hidden else ["label"])])
    for name in columns:
        data = data.cast_column(name, Value("string"))
    if not hidden:
        data = encode_labels(data, split, labels, data_args.task_name)
    limit = limits[split.split("_")[0]]
    return data if limit is None else data.select(range(min(limit, len(data))))


def tokenize(
    data: Dataset,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataTrainingArguments,
) -> Dataset:
    length = min(data_args.max_seq_length, tokenizer.model_max_length)
    if length < data_args.max_seq_length:
        logger.warning("max_seq_length is %d, not %d: the model takes no more", length, data_args.max_seq_length)

    def encode(batch: dict[str, list[str]]) -> Mapping[str, Any]:
        padding = "max_length" if data_args.pad_to_max_length else False
        return tokenizer(*(batch[name] for name in columns), padding=padding, max_length=length, truncation=True)

    return data.map(
        encode,
        batched=True,
        remove_columns=[name for name in data.column_names if name != "label"],
        load_from_cache_file=not data_args.overwrite_cache,
        desc="Tokenizing",
    )


# --- Metrics and predictions -----------------------------------------------------------------------------------------


def build_metrics(task: str | None, regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metrics of the GLUE task, else the mean squared error or the accuracy; their mean if there are several."""
    names = TASKS[task].metrics if task is not None else ("mse",) if regression else ("accuracy",)

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        predictions = choose(evaluated.predictions, regression)
        result = {name: float(METRICS[name](evaluated.label_ids, predictions)) for name in names}
        return result | ({"combined_score": float(np.mean(list(result.values())))} if len(result) > 1 else {})

    return compute_metrics


def choose(outputs: Any, regression: bool) -> np.ndarray:
    """The predicted value, or the number of the most likely label, of each row of the model's outputs."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return np.squeeze(logits, axis=-1) if regression else np.argmax(logits, axis=-1)


def write_predictions(file: Path, predictions: np.ndarray, labels: Sequence[str]) -> None:
    lines = [labels[prediction] if labels else f"{prediction:.3f}" for prediction in predictions]
    rows = "".join(f"{index}\t{line}\n" for index, line in enumerate(lines))
    file.write_text(f"index\tprediction\n{rows}", encoding="utf-8")


# --- Model -----------------------------------------------------------------------------------------------------------


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
    model = AutoAdapterModel.from_pretrained(
        name, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **source
    )
    return tokenizer, model


def ensure_head(model: PreTrainedModel, name: str, labels: Sequence[str]) -> None:
    """Gives the model the head `name` for these labels, unless it came with one."""
    wanted = list(labels) or ["LABEL_0"]  # what a head of one number calls it
    if name in model.heads and list(map(str, model.get_labels(name))) == wanted:
        model.active_head = name
        return
    if name in model.heads:
        logger.warning("The head %r is for other labels: it is replaced by a new one", name)
    id2label = dict(enumerate(labels)) or None
    model.add_classification_head(name, num_labels=len(wanted), id2label=id2label, overwrite_ok=True)


# --- Training, evaluation, prediction --------------------------------------------------------------------------------


def train(trainer: Trainer, checkpoint: str | None) -> None:
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: Trainer, parts: Mapping[str, Dataset]) -> None:
    """Evaluates on each validation set; the metrics on MNLI's mismatched one end in `_mm`."""
    combined: dict[str, float] = {}
    for split, part in parts.items():
        metrics = trainer.evaluate(part) | {"eval_samples": len(part)}
        if split.endswith("_mismatched"):
            metrics = {f"{name}_mm": value for name, value in metrics.items()}
        trainer.log_metrics("eval", metrics)
        combined |= metrics
    trainer.save_metrics("eval", combined)


def predict(trainer: Trainer, parts: Mapping[str, Dataset], name: str, labels: Sequence[str]) -> None:
    """Writes the prediction for each row of each test set, and the metrics where the test set has labels."""
    combined: dict[str, float] = {}
    for split, part in parts.items():
        if "label" in part.column_names and labels and min(part["label"]) < 0:
            part = part.remove_columns("label")
        suffix = "-mm" if split.endswith("_mismatched") else ""
        outputs = trainer.predict(part, metric_key_prefix="predict")
        metrics = outputs.metrics | {"predict_samples": len(part)}
        combined |= {f"{metric}{suffix.replace('-', '_')}": value for metric, value in metrics.items()}
        if trainer.is_world_process_zero():
            file = Path(trainer.args.output_dir) / f"predict_results_{name}{suffix}.txt"
            write_predictions(file, choose(outputs.predictions, not labels), labels)
            logger.info("Predictions are in %s", file)
    trainer.log_metrics("predict", combined)
    trainer.save_metrics("predict", combined)


def describe(trainer: Trainer, model_args: ModelArguments, task: str | None) -> None:
    """Writes the model card, and uploads it with the adapter if asked to."""
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-classification"}
    if task is not None:
        card |= {"language": "en", "dataset_tags": "glue", "dataset_args": task, "dataset": f"GLUE {task.upper()}"}
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
    reference = "train" if "train" in data else next(iter(data))  # its labels count, also if it is not trained on
    columns = choose_text_columns(data[reference], data_args)
    labels = list_labels(data[reference], reference, data_args.task_name)
    raw = {split: prepare(data[split], split, columns, labels, data_args) for kind in splits.values() for split in kind}

    name = data_args.task_name or "glue"
    tokenizer, model = load_tokenizer_and_model(model_args)
    ensure_head(model, name, labels)
    setup_adapter_training(model, adapter_args, name)
    ensure_head(model, name, labels)  # the loaded adapter may have brought a head for other labels
    with training_args.main_process_first(desc="tokenizing"):
        ready = {split: tokenize(part, columns, tokenizer, data_args) for split, part in raw.items()}

    training_args.label_names = training_args.label_names or ["labels"]
    validation = {split: ready[split] for split in splits["validation"]}
    trainer = (AdapterTrainer if adapter_args.train_adapter else Trainer)(
        model=model,
        args=training_args,
        data_collator=default_data_collator if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        train_dataset=ready.get("train"),
        eval_dataset=next(iter(validation.values()), None),
        processing_class=tokenizer,
        compute_metrics=build_metrics(data_args.task_name, regression=not labels),
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        evaluate(trainer, validation)
    if training_args.do_predict:
        predict(trainer, {split: ready[split] for split in splits["test"]}, name, labels)
    describe(trainer, model_args, data_args.task_name)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_glue.py: {error}")
