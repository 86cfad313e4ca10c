"""Trains a text classifier by AdapterDrop: in each step the adapters of the first layers are left out.

    python run_adapterdrop.py --model_name_or_path bert-base-uncased --task_name mrpc --do_train --do_eval \
        --output_dir out/mrpc --max_dropped_layers 11 --evaluate_dropped 0 4 8

No gradient passes through the layers below the first adapter, so a step takes less time; and the trained adapter can
be used with any of these numbers of layers left out. Rücklé et al. 2021, arXiv:2010.11918. README.md has more.
"""

import logging
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from adapters import AdapterArguments, AdapterTrainer, AutoAdapterModel, setup_adapter_training
from adapters.errors import AdapterError
from adapters.training import AdapterTrainingArguments, parse_options, read_table, set_up_logging

logger = logging.getLogger(__name__)

SENTENCES = ("sentence1", "sentence2")
TASKS = {
    "cola": (("sentence",), ("matthews_correlation",)),
    "mnli": (("premise", "hypothesis"), ("accuracy",)),
    "mrpc": (SENTENCES, ("accuracy", "f1")),
    "qnli": (("question", "sentence"), ("accuracy",)),
    "qqp": (("question1", "question2"), ("accuracy", "f1")),
    "rte": (SENTENCES, ("accuracy",)),
    "sst2": (("sentence",), ("accuracy",)),
    "stsb": (SENTENCES, ("pearson", "spearmanr")),
    "wnli": (SENTENCES, ("accuracy",)),
}
"""The columns of text and the metrics of the tasks of GLUE."""
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "mse": mean_squared_error,
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearmanr": lambda labels, predictions: spearmanr(labels, predictions).statistic,
}


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DropArguments:
    min_dropped_layers: int = field(default=0, metadata={"help": "The least layers that a step leaves out."})
    max_dropped_layers: int | None = field(
        default=None, metadata={"help": "The most; else all layers but one. Both equal: always so many."}
    )
    evaluate_dropped: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Evaluate with so many layers left out; any number of numbers."}
    )

    def __post_init__(self) -> None:
        numbers = [self.min_dropped_layers, *self.evaluate_dropped]
        if min(numbers) < 0:
            raise AdapterError(f"{min(numbers)} layers to leave out: it must be a number from 0.")
        if self.max_dropped_layers is not None and self.max_dropped_layers < self.min_dropped_layers:
            raise AdapterError(
                f"max_dropped_layers={self.max_dropped_layers}: it is less than "
                f"min_dropped_layers={self.min_dropped_layers}; it must be at least that."
            )


@dataclass
class DataTrainingArguments:
    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(TASKS)}."})
    data_dir: str | None = field(default=None, metadata={"help": "Local copy of GLUE; ./glue is found without it."})
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet file."})
    test_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet file."})
    text_columns: str | None = field(default=None, metadata={"help": "One or two columns of text: 'title,body'."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per example; the rest is cut off."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew even if it was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test examples."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower().replace("-", "")
            if self.task_name not in TASKS:
                raise AdapterError(f"task_name={self.task_name!r}: no GLUE task; it must be one of {', '.join(TASKS)}.")
        elif not (self.train_file or self.validation_file or self.test_file):
            raise AdapterError("No data given; pass --task_name, or --train_file and --validation_file.")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Pretrained model: a name on the Hub or a local folder."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, if it is elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub."})


def parse_arguments() -> tuple[Any, ...]:
    return parse_options(
        ModelArguments, DataTrainingArguments, DropArguments, AdapterTrainingArguments, AdapterArguments
    )


# --- AdapterDrop -----------------------------------------------------------------------------------------------------


class AdapterDrop(TrainerCallback):
    """Leaves the adapters of the first n layers out of each training step, n drawn evenly from `least` to `most`.

    n depends on the seed and the step alone: it is the same in all processes, and in a resumed run.
    """

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        drop(model, random.Random(f"{args.seed} {state.global_step}").randint(self.least, self.most))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        drop(model, 0)  # evaluation and what is saved know nothing of it


def drop(model: PreTrainedModel, layers: int) -> None:
    """From now on no adapter acts in the first `layers` layers."""
    model.set_active_adapters(model.active_adapters, skip_layers=list(range(layers)) or None)


def choose_range(model: PreTrainedModel, name: str, drop_args: DropArguments) -> tuple[int, int]:
    """The least and the most layers to leave out of a step: at least one keeps its adapter."""
    layers = sum(layer >= 0 for layer in model.get_adapter(name))
    asked = [drop_args.min_dropped_layers, drop_args.max_dropped_layers or 0, *drop_args.evaluate_dropped]
    if max(asked) >= layers:
        raise AdapterError(
            f"{max(asked)} layers to leave out: the adapter has {layers} layers; one at least must be left, so it "
            f"must be at most {layers - 1}."
        )
    most = drop_args.max_dropped_layers
    return drop_args.min_dropped_layers, layers - 1 if most is None else most


# --- Data ------------------------------------------------------------------------------------------------------------


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    """The splits train, validation and test, as far as they are there; of MNLI the matched ones."""
    if data_args.task_name is None:
        files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
        return DatasetDict({split: read_table(file, model_args.cache_dir) for split, file in files.items() if file})
    root = Path(data_args.data_dir or "glue")
    if data_args.data_dir and not root.is_dir():
        raise AdapterError(f"data_dir={data_args.data_dir!r}: there is no such folder; it must be a copy of GLUE.")
    if root.is_dir():
        folder = root / data_args.task_name if (root / data_args.task_name).is_dir() else root
        files = {file.stem: file for file in sorted(folder.iterdir()) if file.is_file()}
        data = {name: read_table(files[name], model_args.cache_dir) for name in files}
    else:
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        data = load_dataset("nyu-mll/glue", data_args.task_name, **options)
    return DatasetDict({name.removesuffix("_matched"): part for name, part in data.items() if "mismatched" not in name})


def choose_splits(data: DatasetDict, training_args: AdapterTrainingArguments) -> list[str]:
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


def choose_text_columns(data: Dataset, data_args: DataTrainingArguments) -> list[str]:
    """Those asked for, else the GLUE task's own, else sentence1 and sentence2, else the first two that hold text."""
    if data_args.text_columns is not None:
        return [name.strip() for name in data_args.text_columns.split(",")]
    if data_args.task_name is not None:
        return list(TASKS[data_args.task_name][0])
    if set(SENTENCES) <= set(data.column_names):
        return list(SENTENCES)
    texts = (Value("string"), Value("large_string"))
    columns = [name for name, kind in data.features.items() if kind in texts and name != "label"][:2]
    if not columns:
        raise AdapterError(f"No text among the columns {', '.join(data.column_names)}; name it with --text_columns.")
    logger.info("Text columns: %s", ", ".join(columns))
    return columns


def check_rows(data: Dataset, split: str, columns: Sequence[str]) -> None:
    """Each row has a value in each of the columns."""
    if missing := [name for name in columns if name not in data.column_names]:
        found = ", ".join(data.column_names)
        raise AdapterError(f"The {split} data has no column {', '.join(missing)}, only {found}; it must have it.")
    for name in columns:
        if data.data.column(name).null_count:
            row = data.data.column(name).to_pylist().index(None) + 1
            raise AdapterError(f"The {split} data has no {name} in row {row}; each row must have one.")


def list_labels(data: Dataset) -> list[str]:
    """The labels in the order of their numbers; none for regression, that is when they are numbers with a point."""
    feature = data.features["label"]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return [] if feature.dtype.startswith("float") else [str(label) for label in sorted(data.unique("label"))]


def encode_labels(data: Dataset, split: str, labels: Sequence[str]) -> Dataset:
    """The column `label` as floats for regression, else as places in `labels`."""
    feature = data.features["label"]
    if not labels:
        return data.cast_column("label", Value("float32"))
    if isinstance(feature, ClassLabel) and list(feature.names) == list(labels):
        return data
    numbers = {label: number for number, label in enumerate(labels)}
    given = [str(label) for label in data["label"]]
    if unseen := sorted(set(given) - set(numbers)):
        raise AdapterError(
            f"The {split} data has the label {unseen[0]!r}, which is not one of training; "
            f"it must be one of {', '.join(labels)}."
        )
    return data.remove_columns("label").add_column("label", [numbers[label] for label in given])


def prepare(
    data: Dataset, split: str, columns: Sequence[str], labels: Sequence[str], data_args: DataTrainingArguments
) -> Dataset:
    """The checked split with texts as strings and labels as numbers; a test set may be without, or hide them as -1."""
    hidden = split == "test" and ("label" not in data.column_names or set(data.unique("label")) == {-1})
    check_rows(data, split, [*columns, *([] if hidden else ["label"])])
    for name in columns:
        data = data.cast_column(name, Value("string"))
    data = data.select_columns(list(columns)) if hidden else encode_labels(data, split, labels)
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    return data if limits[split] is None else data.select(range(min(limits[split], len(data))))


def tokenize(
    data: Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments
) -> Dataset:
    length = min(data_args.max_seq_length, tokenizer.model_max_length)
    if length < data_args.max_seq_length:
        logger.warning("max_seq_length is %d, not %d: the model takes no more", length, data_args.max_seq_length)

    def encode(batch: dict[str, list[str]]) -> Mapping[str, Any]:
        return tokenizer(*(batch[name] for name in columns), max_length=length, truncation=True)

    return data.map(
        encode,
        batched=True,
        remove_columns=[name for name in data.column_names if name != "label"],
        load_from_cache_file=not data_args.overwrite_cache,
        desc="Tokenizing",
    )


# --- Training, evaluation, prediction --------------------------------------------------------------------------------


def choose(outputs: Any, regression: bool) -> np.ndarray:
    """The predicted value, or the number of the most likely label, of each row of the model's outputs."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return np.squeeze(logits, axis=-1) if regression else np.argmax(logits, axis=-1)


def build_metrics(task: str | None, regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    names = TASKS[task][1] if task is not None else ("mse",) if regression else ("accuracy",)

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        predictions = choose(evaluated.predictions, regression)
        return {name: float(METRICS[name](evaluated.label_ids, predictions)) for name in names}

    return compute_metrics


def train(trainer: AdapterTrainer, checkpoint: str | None) -> None:
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: AdapterTrainer, numbers: Sequence[int]) -> None:
    """Evaluates with each number of layers left out; those of n > 0 are called eval_drop<n>_accuracy."""
    combined: dict[str, float] = {"eval_samples": len(trainer.eval_dataset)}
    for number in numbers:
        drop(trainer.model, number)
        combined |= trainer.evaluate(metric_key_prefix=f"eval_drop{number}" if number else "eval")
    drop(trainer.model, 0)
    trainer.log_metrics("eval", combined)
    trainer.save_metrics("eval", combined)


def predict(trainer: AdapterTrainer, data: Dataset, name: str, labels: Sequence[str]) -> None:
    """Writes the prediction for each row of the test set, and the metrics if it has labels."""
    outputs = trainer.predict(data, metric_key_prefix="predict")
    metrics = outputs.metrics | {"predict_samples": len(data)}
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
    if trainer.is_world_process_zero():
        chosen = choose(outputs.predictions, not labels)
        lines = [labels[prediction] if labels else f"{prediction:.3f}" for prediction in chosen]
        rows = "".join(f"{index}\t{line}\n" for index, line in enumerate(lines))
        file = Path(trainer.args.output_dir) / f"predict_results_{name}.txt"
        file.write_text(f"index\tprediction\n{rows}", encoding="utf-8")


def describe(trainer: AdapterTrainer, model_args: ModelArguments) -> None:
    """Writes the model card, and uploads it with the adapter if asked to."""
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-classification"}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def load_tokenizer_and_model(model_args: ModelArguments) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    source = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.token}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path, **source)
    return tokenizer, AutoAdapterModel.from_pretrained(model_args.model_name_or_path, **source)


def ensure_head(model: PreTrainedModel, name: str, labels: Sequence[str]) -> None:
    """Gives the model the head `name` for these labels, unless a loaded adapter has brought it."""
    wanted = list(labels) or ["LABEL_0"]  # what a head of one number calls it
    if name in model.heads and list(map(str, model.get_labels(name))) == wanted:
        return
    id2label = dict(enumerate(labels)) or None
    model.add_classification_head(name, num_labels=len(wanted), id2label=id2label, overwrite_ok=True)


def main() -> None:
    model_args, data_args, drop_args, training_args, adapter_args = parse_arguments()
    set_up_logging(logger, training_args)
    checkpoint = training_args.checkpoint_to_resume()
    set_seed(training_args.seed)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"

    data = read_data(data_args, model_args)
    splits = choose_splits(data, training_args)
    reference = "train" if "train" in data else next(iter(data))  # its labels count, also if it is not trained on
    columns = choose_text_columns(data[reference], data_args)
    check_rows(data[reference], reference, ["label"])
    labels = list_labels(data[reference])
    raw = {split: prepare(data[split], split, columns, labels, data_args) for split in splits}

    name = data_args.task_name or "glue"
    tokenizer, model = load_tokenizer_and_model(model_args)
    adapter_args.train_adapter = True  # there is nothing else that could be dropped
    setup_adapter_training(model, adapter_args, name)
    ensure_head(model, name, labels)
    least, most = choose_range(model, name, drop_args)
    with training_args.main_process_first(desc="tokenizing"):
        ready = {split: tokenize(part, columns, tokenizer, data_args) for split, part in raw.items()}

    training_args.label_names = training_args.label_names or ["labels"]
    trainer = AdapterTrainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        compute_metrics=build_metrics(data_args.task_name, regression=not labels),
        callbacks=[AdapterDrop(least, most)],
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        evaluate(trainer, drop_args.evaluate_dropped)
    if training_args.do_predict:
        predict(trainer, ready["test"], name, labels)
    describe(trainer, model_args)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_adapterdrop.py: {error}")
