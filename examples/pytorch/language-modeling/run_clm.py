"""Trains a language model that reads from left to right on text, as an adapter or as a whole.

    python run_clm.py --model_name_or_path gpt2 --train_file train.txt --validation_file validation.txt \
        --do_train --do_eval --output_dir out/clm --train_adapter --adapter_config lora

README.md has more command lines; `python run_clm.py --help` has every option.
"""

import logging
import math
import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
    set_seed,
)

import adapters
from adapters import AdapterArguments, AdapterTrainer, setup_adapter_training
from adapters.errors import AdapterError
from adapters.training import AdapterTrainingArguments, set_up_logging

logger = logging.getLogger(__name__)

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Reader of a file by its extension; every other file is plain text."""
Data = dict[str, Dataset | IterableDataset]


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset: a name on the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Text file, or csv, json, jsonl, parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Text file, or csv, json, jsonl, parquet."})
    text_column: str | None = field(default=None, metadata={"help": "Column of text; else 'text', else the first."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training data to evaluate on, if there is no validation data."}
    )
    block_size: int | None = field(default=None, metadata={"help": "Tokens per example; at most 1024 without it."})
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line breaks of plain text."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; needs --max_steps."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew even if it was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})

    def __post_init__(self) -> None:
        if not (self.dataset_name or self.train_file or self.validation_file):
            raise AdapterError("No data given; pass --dataset_name, or --train_file and --validation_file.")
        if not 0 < self.validation_split_percentage < 100:
            raise AdapterError(
                f"validation_split_percentage={self.validation_split_percentage}: it must lie between 0 and 100."
            )


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained model: a name on the Hub or a local folder. None: from scratch."}
    )
    model_type: str | None = field(default=None, metadata={"help": "Kind of a model from scratch, such as gpt2."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to its configuration: 'n_embd=128,n_layer=2'."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it is elsewhere."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, if it is elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use a tokenizer of the tokenizers library."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    dtype: str | None = field(default=None, metadata={"help": "auto, float32, bfloat16 or float16."})
    torch_dtype: str | None = field(default=None, metadata={"help": "Now --dtype."})
    low_cpu_mem_usage: bool = field(default=False, metadata={"help": "Without effect: always so."})

    def __post_init__(self) -> None:
        self.dtype = self.dtype or self.torch_dtype
        if self.dtype not in (None, "auto", "float32", "bfloat16", "float16"):
            raise AdapterError(f"dtype={self.dtype!r}: it must be auto, float32, bfloat16 or float16.")
        if self.config_overrides and (self.config_name or self.model_name_or_path):
            raise AdapterError(
                f"config_overrides={self.config_overrides!r}: they are for a model from scratch; pass --model_type "
                "and neither --model_name_or_path nor --config_name."
            )
        if not (self.model_name_or_path or self.config_name or self.model_type in CONFIG_MAPPING):
            raise AdapterError(f"model_type={self.model_type!r}: no such kind; pass --model_name_or_path or a kind.")
        if not (self.model_name_or_path or self.tokenizer_name):
            raise AdapterError("No tokenizer given; a model from scratch needs one: pass --tokenizer_name.")


def parse_arguments() -> tuple[ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments]:
    """From the command line, or from the JSON file that is its only argument."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


# --- Reading data ----------------------------------------------------------------------------------------------------


def check_file(path: Path) -> None:
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such file; it must exist.")
    if path.stat().st_size == 0:
        raise AdapterError(f"{path}: the file is empty; it must have text.")
    if path.suffix.lower() == ".parquet":
        return
    try:
        with path.open(encoding="utf-8") as lines:
            for _ in lines:
                pass
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: it is not UTF-8 ({error}); it must be. Convert it, with iconv say.") from error


def read_file(path: Path, data_args: DataTrainingArguments, cache_dir: str | None) -> Dataset | IterableDataset:
    check_file(path)
    reader = READERS.get(path.suffix.lower(), "text")
    options: dict[str, Any] = {"data_files": str(path), "split": "train", "cache_dir": cache_dir}
    if reader == "text":
        options["keep_linebreaks"] = data_args.keep_linebreaks
    try:
        return load_dataset(reader, streaming=data_args.streaming, **options)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise AdapterError(f"{path}: it cannot be read as {reader} ({cause}); it must be valid.") from error


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments, do_eval: bool) -> Data:
    """The splits train and validation; the latter is a share of the former where it is wanted and there is none."""
    if data_args.dataset_name is not None:
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token, "streaming": data_args.streaming}
        data = dict(load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options))
    else:
        files = {"train": data_args.train_file, "validation": data_args.validation_file}
        data = {split: read_file(Path(file), data_args, model_args.cache_dir) for split, file in files.items() if file}
    if do_eval and "validation" not in data and "train" in data:
        if data_args.streaming:
            raise AdapterError("There is no validation data; streamed data cannot be split. Pass --validation_file.")
        everything = data["train"]
        if len(everything) < 2:
            raise AdapterError("There is no validation data, and one row cannot be split. Pass --validation_file.")
        held_out = max(1, len(everything) * data_args.validation_split_percentage // 100)
        data["validation"] = everything.select(range(held_out))
        data["train"] = everything.select(range(held_out, len(everything)))
    return data


def choose_splits(data: Data, training_args: AdapterTrainingArguments) -> Data:
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval}
    for split, needed in wanted.items():
        if needed and split not in data:
            raise AdapterError(
                f"There is no {split} data, only {', '.join(data)}; it is needed for what is to be done."
            )
    return {split: data[split] for split, needed in wanted.items() if needed}


def choose_column(data: Data, asked: str | None) -> str:
    """The column of text: the one asked for, else `text`, else the first that holds text."""
    split, part = next(iter(data.items()))
    names = list(part.column_names or next(iter(part)))
    texts = [name for name in names if part.features is None or part.features[name].dtype in ("string", "large_string")]
    chosen = asked or ("text" if "text" in texts else next(iter(texts), None))
    if chosen not in names:
        raise AdapterError(
            f"The {split} data has no column of text {asked or ''}, only {', '.join(names)}; name one of them with "
            "--text_column."
        )
    return chosen


# --- From text to examples -------------------------------------------------------------------------------------------


def choose_length(data_args: DataTrainingArguments, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The tokens per example: those asked for, no more than the model takes."""
    most = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length))
    if data_args.block_size is None:
        return min(1024, most)
    if data_args.block_size > most:
        logger.warning("block_size is %d, not %d: the model takes no more", most, data_args.block_size)
    return min(data_args.block_size, most)


def tokenize(
    data: Data, column: str, length: int, tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments
) -> Data:
    """The texts one after the other, cut into pieces of `length` tokens. What is left at the end is dropped."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        return dict(tokenizer(batch[column], verbose=False))

    def pack(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = {name: list(chain.from_iterable(pieces)) for name, pieces in batch.items()}
        whole = range(0, len(joined["input_ids"]) - length + 1, length)
        packed = {name: [row[start : start + length] for start in whole] for name, row in joined.items()}
        return packed | {"labels": packed["input_ids"]}  # the model itself shifts them by one

    once: dict[str, Any] = {}
    if not data_args.streaming:
        once = {
            "num_proc": data_args.preprocessing_num_workers,
            "load_from_cache_file": not data_args.overwrite_cache,
        }
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    ready = {}
    for split, part in data.items():
        texts = part.select_columns(column).filter(lambda row: bool(row[column]))
        part = texts.map(encode, batched=True, remove_columns=[column], **once).map(pack, batched=True, **once)
        part = part if limits[split] is None else part.take(limits[split])
        if next(iter(part), None) is None:
            raise AdapterError(
                f"The {split} data has no example of {length} tokens; it must have at least one. "
                "Pass a smaller --block_size."
            )
        ready[split] = part
    return ready


# --- Metrics ---------------------------------------------------------------------------------------------------------


def choose(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The most likely token at each place: a vocabulary's scores for all of them would not fit into memory."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
    """The share of tokens that are guessed from those before them."""
    labels, predictions = np.asarray(evaluated.label_ids)[:, 1:], np.asarray(evaluated.predictions)[:, :-1]
    read = labels != -100
    return {"accuracy": float((predictions[read] == labels[read]).mean())}


def perplexity(loss: float) -> float:
    """exp(loss), the number of tokens between which the model is in doubt."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


# --- Model -----------------------------------------------------------------------------------------------------------


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path,
        use_fast=model_args.use_fast_tokenizer,
        cache_dir=model_args.cache_dir,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )


def load_model(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The pretrained model, or a new one of the kind asked for; embeddings grow to the tokenizer's size."""
    source = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    where = model_args.config_name or model_args.model_name_or_path
    config = AutoConfig.from_pretrained(where, **source) if where else CONFIG_MAPPING[model_args.model_type]()
    if model_args.config_overrides:
        config.update_from_string(model_args.config_overrides)
    if model_args.model_name_or_path:
        dtype = {} if model_args.dtype is None else {"dtype": model_args.dtype}
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, config=config, **source, **dtype)
    else:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code)
        logger.info("A new %s with %.1f million parameters", config.model_type, model.num_parameters() / 1e6)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model


# --- Training and evaluation -----------------------------------------------------------------------------------------


def counted(part: Dataset | IterableDataset) -> dict[str, int]:
    return {"samples": len(part)} if isinstance(part, Dataset) else {}


def train(trainer: Trainer, checkpoint: str | None) -> None:
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics |= {f"train_{name}": value for name, value in counted(trainer.train_dataset).items()}
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: Trainer) -> None:
    metrics = trainer.evaluate()
    metrics |= {f"eval_{name}": value for name, value in counted(trainer.eval_dataset).items()}
    metrics["perplexity"] = perplexity(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def describe(trainer: Trainer, model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """Writes the model card, and uploads it with the adapter if asked to."""
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-generation"}
    if data_args.dataset_name is not None:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}
        card |= {"dataset_args": data_args.dataset_config_name} if data_args.dataset_config_name else {}
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
    data = choose_splits(read_data(data_args, model_args, training_args.do_eval), training_args)
    column = choose_column(data, data_args.text_column) if data else ""
    tokenizer = load_tokenizer(model_args)
    model = load_model(model_args, tokenizer)
    name = Path(data_args.dataset_name or "clm").name  # of a dataset org/name, the name
    adapters.init(model)
    setup_adapter_training(model, adapter_args, name)
    length = choose_length(data_args, tokenizer, model)
    with training_args.main_process_first(desc="tokenizing"):
        ready = tokenize(data, column, length, tokenizer, data_args)

    trainer = (AdapterTrainer if adapter_args.train_adapter else Trainer)(
        model=model,
        args=training_args,
        data_collator=default_data_collator,
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=choose,
    )
    if training_args.do_train:
        train(trainer, checkpoint)
    if training_args.do_eval:
        evaluate(trainer)
    describe(trainer, model_args, data_args)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_clm.py: {error}")
