"""Trains an AdapterFusion of pretrained adapters on a GLUE task (Pfeiffer et al. 2021, arXiv:2005.00247).

    python run_fusion_glue.py --model_name_or_path bert-base-uncased --task_name SST-2 --data_dir glue/SST-2 \
        --do_train --do_eval --output_dir out/fusion

The adapters come from the Hub, or from where --adapters says. README.md has more; --help has every option.
"""

import csv
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

import adapters
from adapters import AdapterArguments, AdapterTrainer
from adapters.composition import Fuse
from adapters.errors import AdapterError
from adapters.training import AdapterTrainingArguments, set_up_logging

logger = logging.getLogger(__name__)

# --- What there is to know about GLUE --------------------------------------------------------------------------------


class Task(NamedTuple):
    dataset: str
    """Its name on the Hub, as a configuration of nyu-mll/glue."""
    texts: tuple[str, ...]
    """Columns that hold the text."""
    labels: tuple[str, ...]
    """In the order of their numbers; none for regression."""
    metrics: tuple[str, ...]
    """Their mean comes under the last name, where there is one more than needed."""


SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
BINARY = ("0", "1")
TASKS = {
    "cola": Task("cola", ("sentence",), BINARY, ("mcc",)),
    "mnli": Task("mnli", SENTENCES, ("contradiction", "entailment", "neutral"), ("mnli/acc",)),
    "mrpc": Task("mrpc", SENTENCES, BINARY, ("acc", "f1", "acc_and_f1")),
    "qnli": Task("qnli", ("question", "sentence"), ENTAILMENT, ("acc",)),
    "qqp": Task("qqp", ("question1", "question2"), BINARY, ("acc", "f1", "acc_and_f1")),
    "rte": Task("rte", SENTENCES, ENTAILMENT, ("acc",)),
    "sst-2": Task("sst2", ("sentence",), BINARY, ("acc",)),
    "sts-b": Task("stsb", SENTENCES, (), ("pearson", "spearmanr", "corr")),
    "wnli": Task("wnli", SENTENCES, BINARY, ("acc",)),
}
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "acc": accuracy_score,
    "mnli/acc": accuracy_score,
    "mnli-mm/acc": accuracy_score,
    "f1": f1_score,
    "mcc": matthews_corrcoef,
    "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic,
    "spearmanr": lambda labels, predictions: spearmanr(labels, predictions).statistic,
}
# The headers of GLUE's own tsv files, as the columns are called here. CoLA's train and dev files have none.
TSV_COLUMNS = {
    "#1 String": "sentence1",
    "#2 String": "sentence2",
    "Quality": "label",
    "score": "label",
    "is_duplicate": "label",
    "gold_label": "label",
}
COLA_COLUMNS = ("source", "label", "mark", "sentence")

# The adapters that are fused by default, each trained on another task (Poth et al. 2021, arXiv:2104.08247).
ADAPTERS = {
    "sst-2": "sst2",
    "mnli": "mnli",
    "rte": "rte",
    "mrpc": "mrpc",
    "qqp": "qqp",
    "cosmosqa": "cosmos_qa",
    "csqa": "commonsense_qa",
    "hellaswag": "hellaswag",
    "socialiqa": "social_i_qa",
    "winogrande": "winogrande",
    "cb": "cb",
    "sick": "sick",
    "scitail": "scitail",
    "boolq": "boolq",
    "imdb": "imdb",
}
REPOSITORY = "AdapterHub/{model}-pf-{task}"


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Pretrained model: a name on the Hub or a local folder."})
    config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it is elsewhere."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, if it is elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})


@dataclass
class FusionArguments:
    adapters: list[str] | None = field(
        default=None,
        metadata={"help": "Adapters to fuse: folders or names on the Hub, each as it is or as name=place."},
    )
    fusion_config: str = field(default="dynamic", metadata={"help": "Configuration of the fusion: dynamic or static."})


@dataclass
class DataTrainingArguments:
    task_name: str = field(metadata={"help": f"GLUE task: {', '.join(TASKS)}."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with the task's tsv files; without it the data come from the Hub."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per example; the rest is cut off."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew even if it was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test examples."})

    def __post_init__(self) -> None:
        given, self.task_name = self.task_name, self.task_name.lower()
        dashed = {task.dataset: name for name, task in TASKS.items()}
        self.task_name = dashed.get(self.task_name, self.task_name)
        if self.task_name not in TASKS:
            raise AdapterError(f"task_name={given!r}: no GLUE task; it must be one of {', '.join(TASKS)}.")


Arguments = tuple[ModelArguments, DataTrainingArguments, FusionArguments, AdapterTrainingArguments, AdapterArguments]


def parse_arguments() -> Arguments:
    """From the command line, or from the JSON file that is its only argument."""
    parser = HfArgumentParser(
        (ModelArguments, DataTrainingArguments, FusionArguments, AdapterTrainingArguments, AdapterArguments)
    )
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


# --- Reading data ----------------------------------------------------------------------------------------------------


def read_tsv(path: Path, task: str) -> Dataset:
    """A file of GLUE's own download. Lines without all fields are skipped (QQP has some)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: it is not UTF-8 ({error}); it must be.") from error
    header = list(COLA_COLUMNS) if task == "cola" and path.stem != "test" else rows.pop(0) if rows else []
    header = [TSV_COLUMNS.get(name, name) for name in header]
    wanted = [*TASKS[task].texts, *(["label"] if not path.stem.startswith("test") else [])]
    if missing := [name for name in wanted if name not in header]:
        raise AdapterError(f"{path}: it has no column {missing[0]}, only {', '.join(header)}; GLUE's files have it.")
    examples = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    if not examples:
        raise AdapterError(f"{path}: it has no rows; it must have at least one example.")
    return Dataset.from_dict({name: [example[name] for example in examples] for name in wanted})


def read_folder(folder: Path, task: str) -> dict[str, Dataset]:
    if not folder.is_dir():
        raise AdapterError(f"data_dir={str(folder)!r}: there is no such folder; it must have the task's tsv files.")
    found = {}
    for file in sorted(folder.glob("*.tsv")):
        if matched := re.fullmatch(r"(train|dev|test)(_matched|_mismatched)?", file.stem):
            found[file.stem.replace("dev", "validation")] = (file, matched)
    return {split: read_tsv(file, task) for split, (file, _) in found.items()}


def read_hub(task: str, cache_dir: str | None) -> dict[str, Dataset]:
    """The task as `datasets` has it, its labels under the names that GLUE's own files have."""
    try:
        data = load_dataset("nyu-mll/glue", TASKS[task].dataset, cache_dir=cache_dir)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise AdapterError(f"task_name={task!r}: the Hub has not given it ({error}); pass --data_dir.") from error
    if task == "mnli":
        data = data.rename_columns({"premise": "sentence1", "hypothesis": "sentence2"})
    named = {}
    for split, part in data.items():
        feature = part.features["label"]
        if isinstance(feature, ClassLabel) and TASKS[task].labels != BINARY:
            names = [feature.names[number] if number >= 0 else "" for number in part["label"]]
            part = part.remove_columns("label").add_column("label", names)
        named[split] = part.remove_columns("label") if split.startswith("test") else part
    return named


def encode_labels(data: Dataset, labels: tuple[str, ...], split: str) -> Dataset:
    if "label" not in data.column_names:
        return data
    given = [str(label) for label in data["label"]]
    if not labels:
        return data.remove_columns("label").add_column("label", [float(label) for label in given])
    if unseen := sorted(set(given) - set(labels)):
        raise AdapterError(f"The {split} data has the label {unseen[0]!r}; it must be one of {', '.join(labels)}.")
    return data.remove_columns("label").add_column("label", [labels.index(label) for label in given])


def read_data(
    data_args: DataTrainingArguments, training_args: AdapterTrainingArguments, cache_dir: str | None
) -> dict[str, Dataset]:
    """The splits that are needed, with labels as numbers. MNLI has two of validation and of test."""
    task = data_args.task_name
    data = read_folder(Path(data_args.data_dir), task) if data_args.data_dir else read_hub(task, cache_dir)
    wanted = {
        "train": (training_args.do_train, data_args.max_train_samples),
        "validation": (training_args.do_eval, data_args.max_eval_samples),
        "test": (training_args.do_predict, data_args.max_predict_samples),
    }
    chosen = {}
    for kind, (needed, limit) in wanted.items():
        splits = [name for name in data if name.split("_")[0] == kind] if needed else []
        if needed and not splits:
            raise AdapterError(f"There is no {kind} data, only {', '.join(data) or 'none'}; it is needed here.")
        for split in splits:
            part = encode_labels(data[split], TASKS[task].labels, split)
            chosen[split] = part if limit is None else part.select(range(min(limit, len(part))))
    return chosen


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments) -> Dataset:
    columns = TASKS[data_args.task_name].texts
    length = min(data_args.max_seq_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list[str]]) -> Mapping[str, Any]:
        return tokenizer(*(batch[name] for name in columns), max_length=length, truncation=True)

    return data.map(
        encode,
        batched=True,
        remove_columns=[name for name in data.column_names if name != "label"],
        load_from_cache_file=not data_args.overwrite_cache,
        desc="Tokenizing",
    )


# --- Model -----------------------------------------------------------------------------------------------------------


def list_adapters(given: list[str] | None, model_name: str) -> dict[str, str]:
    """Name and place of each adapter that is fused."""
    if given is None:
        model = Path(model_name).name
        return {name: REPOSITORY.format(model=model, task=task) for name, task in ADAPTERS.items()}
    found: dict[str, str] = {}
    for entry in given:
        name, equals, place = entry.partition("=")
        name, place = (name, place) if equals else (Path(entry).name, entry)
        if name in found:
            raise AdapterError(f"adapters={entry!r}: two have the name {name!r}; pass one as another_name={place}.")
        found[name] = place
    if len(found) < 2:
        raise AdapterError(f"adapters={given}: there must be two or more; one cannot be fused.")
    return found


def load_model(model_args: ModelArguments, task: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    labels = TASKS[task].labels
    options: dict[str, Any] = {"num_labels": max(len(labels), 1), "finetuning_task": task}
    if labels:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    name, cache_dir = model_args.model_name_or_path, model_args.cache_dir
    config = AutoConfig.from_pretrained(model_args.config_name or name, cache_dir=cache_dir, **options)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, cache_dir=cache_dir)
    model = AutoModelForSequenceClassification.from_pretrained(name, config=config, cache_dir=cache_dir)
    return tokenizer, model


def add_fusion(model: PreTrainedModel, places: Mapping[str, str], fusion_config: str) -> None:
    """Loads the adapters without their heads, adds a fusion of them and trains that alone."""
    adapters.init(model)
    for name, place in places.items():
        try:
            model.load_adapter(place, load_as=name, with_head=False)
        except (AdapterError, OSError) as error:
            raise AdapterError(
                f"adapter {name!r}: {place!r} does not load ({error}) Name other adapters with --adapters."
            ) from error
    fusion = Fuse(*places)
    model.add_adapter_fusion(fusion, fusion_config)
    model.train_adapter_fusion(fusion)


# --- Metrics and results ---------------------------------------------------------------------------------------------


def choose(outputs: Any, regression: bool) -> np.ndarray:
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return np.squeeze(logits, axis=-1) if regression else np.argmax(logits, axis=-1)


def build_metrics(names: tuple[str, ...]) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metrics of the task; a name without a formula of its own is the mean of the others."""

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        predictions = choose(evaluated.predictions, regression="pearson" in names)
        measured = {name: float(METRICS[name](evaluated.label_ids, predictions)) for name in names if name in METRICS}
        return measured | {name: float(np.mean(list(measured.values()))) for name in names if name not in METRICS}

    return compute_metrics


def evaluate(trainer: AdapterTrainer, parts: Mapping[str, Dataset], task: str) -> None:
    """Writes the metrics on each validation set to eval_results_<task>.txt and eval_results.json."""
    combined: dict[str, float] = {}
    for split, part in parts.items():
        mismatched = split.endswith("_mismatched")
        names = ("mnli-mm/acc",) if mismatched else TASKS[task].metrics
        trainer.compute_metrics = build_metrics(names)
        metrics = trainer.evaluate(part) | {"eval_samples": len(part)}
        trainer.log_metrics("eval", metrics)
        if trainer.is_world_process_zero():
            file = Path(trainer.args.output_dir) / f"eval_results_{task}{'-mm' if mismatched else ''}.txt"
            file.write_text("".join(f"{name} = {value}\n" for name, value in metrics.items()), encoding="utf-8")
        combined |= {f"{name}_mm": value for name, value in metrics.items()} if mismatched else metrics
    trainer.save_metrics("eval", combined)


def predict(trainer: AdapterTrainer, parts: Mapping[str, Dataset], task: str) -> None:
    """Writes the prediction for each row of each test set to test_results_<task>.txt."""
    labels = TASKS[task].labels
    for split, part in parts.items():
        predictions = choose(trainer.predict(part).predictions, regression=not labels)
        if trainer.is_world_process_zero():
            suffix = "-mm" if split.endswith("_mismatched") else ""
            lines = [labels[prediction] if labels else f"{prediction:3.3f}" for prediction in predictions]
            file = Path(trainer.args.output_dir) / f"test_results_{task}{suffix}.txt"
            rows = "".join(f"{index}\t{line}\n" for index, line in enumerate(lines))
            file.write_text(f"index\tprediction\n{rows}", encoding="utf-8")


def train(trainer: AdapterTrainer, checkpoint: str | None) -> None:
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics | {"train_samples": len(trainer.train_dataset)}
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def main() -> None:
    model_args, data_args, fusion_args, training_args, _ = parse_arguments()
    set_up_logging(logger, training_args)
    checkpoint = training_args.checkpoint_to_resume()
    set_seed(training_args.seed)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"

    task = data_args.task_name
    places = list_adapters(fusion_args.adapters, model_args.model_name_or_path)
    raw = read_data(data_args, training_args, model_args.cache_dir)
    tokenizer, model = load_model(model_args, task)
    add_fusion(model, places, fusion_args.fusion_config)
    with training_args.main_process_first(desc="tokenizing"):
        ready = {split: tokenize(part, tokenizer, data_args) for split, part in raw.items()}
    validation = {split: part for split, part in ready.items() if split.startswith("validation")}

    trainer = AdapterTrainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=ready.get("train"),
        eval_dataset=next(iter(validation.values()), None),
        processing_class=tokenizer,
        compute_metrics=build_metrics(TASKS[task].metrics),
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        evaluate(trainer, validation, task)
    if training_args.do_predict:
        predict(trainer, {split: part for split, part in ready.items() if split.startswith("test")}, task)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_fusion_glue.py: {error}")
