"""Trains and evaluates a model that writes summaries of texts, as an adapter or as a whole.

    python run_summarization.py --model_name_or_path t5-small --train_file train.json --validation_file dev.json \
        --do_train --do_eval --source_prefix "summarize: " --output_dir out/summaries --predict_with_generate \
        --train_adapter --adapter_config seq_bn

README.md has more command lines; `python run_summarization.py --help` has every option.
"""

import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    set_seed,
)

import adapters
from adapters import AdapterArguments, Seq2SeqAdapterTrainer, setup_adapter_training
from adapters.errors import AdapterError
from adapters.training import Seq2SeqAdapterTrainingArguments, parse_options, read_table, set_up_logging

logger = logging.getLogger(__name__)

COLUMNS = {
    "amazon_reviews_multi": ("review_body", "review_title"),
    "big_patent": ("description", "abstract"),
    "cnn_dailymail": ("article", "highlights"),
    "multi_news": ("document", "summary"),
    "orange_sum": ("text", "summary"),
    "pn_summary": ("article", "summary"),
    "psc": ("extract_text", "summary_text"),
    "samsum": ("dialogue", "summary"),
    "thaisum": ("body", "summary"),
    "wiki_summary": ("article", "highlights"),
    "xglue": ("news_body", "news_title"),
    "xsum": ("document", "summary"),
}
"""Columns of the text and the summary, by the last part of the dataset's name; of others they are the first two."""
METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
LANGUAGE_TOKENS = ("m2m_100", "mbart", "nllb-moe", "plbart")
"""Models whose texts have a token that names the language."""
NO_TOKEN = -100
"""What the loss leaves out."""


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments:
    lang: str | None = field(default=None, metadata={"help": "Language, for models that are told it: en_XX, say."})
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset: a name on the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    text_column: str | None = field(default=None, metadata={"help": "Column of texts; else the first."})
    summary_column: str | None = field(default=None, metadata={"help": "Column of summaries; else the second."})
    train_file: str | None = field(default=None, metadata={"help": "json, jsonl, csv, tsv or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "json, jsonl, csv, tsv or parquet."})
    test_file: str | None = field(default=None, metadata={"help": "The same; it needs no summaries."})
    max_source_length: int = field(default=1024, metadata={"help": "Tokens of a text; the rest is cut off."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a summary; the rest is cut off."})
    val_max_target_length: int | None = field(
        default=None, metadata={"help": "The same in evaluation and generation; else max_target_length."}
    )
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to the maximal lengths, not to the batch."})
    num_beams: int | None = field(default=1, metadata={"help": "Beams of generation."})
    ignore_pad_token_for_loss: bool = field(default=True, metadata={"help": "Leave padding out of the loss."})
    source_prefix: str | None = field(default=None, metadata={"help": 'Put before each text: "summarize: " for T5.'})
    forced_bos_token: str | None = field(default=None, metadata={"help": "First token that is generated."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew even if it was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test examples."})

    def __post_init__(self) -> None:
        if not (self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise AdapterError("No data given; pass --dataset_name, or --train_file and --validation_file.")
        self.val_max_target_length = self.val_max_target_length or self.max_target_length


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
    resize_position_embeddings: bool | None = field(
        default=None, metadata={"help": "Make the model take max_source_length tokens; False: it must already."}
    )


def parse_arguments() -> tuple[
    ModelArguments, DataTrainingArguments, Seq2SeqAdapterTrainingArguments, AdapterArguments
]:
    return parse_options(ModelArguments, DataTrainingArguments, Seq2SeqAdapterTrainingArguments, AdapterArguments)


# --- Data ------------------------------------------------------------------------------------------------------------


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    if data_args.dataset_name is not None:
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        return load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    return DatasetDict({split: read_table(file, model_args.cache_dir) for split, file in files.items() if file})


def choose_splits(data: DatasetDict, training_args: Seq2SeqAdapterTrainingArguments) -> list[str]:
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    for split, needed in wanted.items():
        if needed and split not in data:
            raise AdapterError(f"There is no {split} data, only {', '.join(data)}; what is to be done needs it.")
    return [split for split, needed in wanted.items() if needed]


def choose_columns(data: Dataset, data_args: DataTrainingArguments) -> tuple[str, str]:
    """The column of texts and that of summaries."""
    known = COLUMNS.get(Path(data_args.dataset_name or "").name, (*data.column_names, "summary")[:2])
    return data_args.text_column or known[0], data_args.summary_column or known[1]


def prepare(data: Dataset, split: str, columns: tuple[str, str], data_args: DataTrainingArguments) -> Dataset:
    """The checked split as columns `text` and `summary`, with no more rows than asked for; a test needs no summary."""
    wanted = columns[:1] if split == "test" and columns[1] not in data.column_names else columns
    if missing := [name for name in wanted if name not in data.column_names]:
        raise AdapterError(
            f"The {split} data has no column {missing[0]}, only {', '.join(data.column_names)}; name it with "
            "--text_column or --summary_column."
        )
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    limit = limits.get(split, data_args.max_predict_samples)
    data = data if limit is None else data.select(range(min(limit, len(data))))
    if len(data) == 0:
        raise AdapterError(f"The {split} data is empty; it must have at least one text.")
    for column in wanted:
        for row, text in enumerate(data[column], start=1):
            if not isinstance(text, str) or not text.strip():
                raise AdapterError(f"The {split} data, row {row}, has {text!r} as {column}; it must be a text.")
    return data.select_columns(list(wanted)).rename_columns(dict(zip(wanted, ("text", "summary"), strict=False)))


def tokenize(
    data: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments
) -> Dataset:
    """The tokens of each text and, as `labels`, of its summary."""
    target = data_args.max_target_length if split == "train" else data_args.val_max_target_length
    options = {"truncation": True, "padding": "max_length" if data_args.pad_to_max_length else False}

    def encode(batch: dict[str, list[str]]) -> Mapping[str, Any]:
        texts = [(data_args.source_prefix or "") + text for text in batch["text"]]
        encoded = tokenizer(texts, max_length=data_args.max_source_length, **options)
        if "summary" in batch:
            labels = tokenizer(text_target=batch["summary"], max_length=target, **options)["input_ids"]
            if data_args.pad_to_max_length and data_args.ignore_pad_token_for_loss:
                labels = [[NO_TOKEN if token == tokenizer.pad_token_id else token for token in row] for row in labels]
            encoded["labels"] = labels
        return encoded

    return data.map(
        encode,
        batched=True,
        remove_columns=data.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc="Tokenizing",
    )


# --- Metrics and predictions -----------------------------------------------------------------------------------------


def decode(tokens: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of generated tokens or of labels."""
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    texts = tokenizer.batch_decode(np.where(tokens < 0, tokenizer.pad_token_id, tokens), skip_special_tokens=True)
    return [text.strip() for text in texts]


def sentences(text: str) -> str:
    """A sentence per line, as ROUGE-Lsum takes them."""
    return "\n".join(re.split(r"(?<=[.!?])\s+", text))


def build_metrics(tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """F1 of ROUGE-1, -2, -L and -Lsum in percent, and the mean number of generated tokens."""
    scorer = RougeScorer(METRICS, use_stemmer=True)

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        found, right = (decode(part, tokenizer) for part in (evaluated.predictions, evaluated.label_ids))
        pairs = zip(found, right, strict=True)
        scores = [scorer.score(sentences(wanted), sentences(summary)) for summary, wanted in pairs]
        result = {name: round(100 * float(np.mean([row[name].fmeasure for row in scores])), 4) for name in METRICS}
        lengths = np.sum((evaluated.predictions >= 0) & (evaluated.predictions != tokenizer.pad_token_id), axis=-1)
        return result | {"gen_len": round(float(np.mean(lengths)), 4)}

    return compute_metrics


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
    return tokenizer, AutoModelForSeq2SeqLM.from_pretrained(name, config=config, **source)


def fit_lengths(model: PreTrainedModel, model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """Makes the model take as many tokens as asked for, where its number of positions is fixed."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions >= data_args.max_source_length:
        return
    asked = f"max_source_length={data_args.max_source_length}: the model takes {positions} tokens"
    if model_args.resize_position_embeddings is False:
        raise AdapterError(f"{asked}; it must be no more. Lower it, or pass --resize_position_embeddings.")
    try:
        model.resize_position_embeddings(data_args.max_source_length)
    except NotImplementedError as error:
        raise AdapterError(f"{asked}, and cannot be made to take more; it must be no more. Lower it.") from error
    logger.warning("%s; it was given more positions", asked)


def set_language(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments) -> None:
    """Tells the model its language, and what generated texts begin with."""

    def number(option: str, token: str) -> int:
        for name in (token, f"__{token}__"):  # M2M-100's way
            found = tokenizer.convert_tokens_to_ids(name)
            if found is not None and found != tokenizer.unk_token_id:
                return found
        raise AdapterError(f"{option}={token!r}: the tokenizer has no such token; it must have it.")

    if model.config.model_type in LANGUAGE_TOKENS:
        if data_args.lang is None:
            raise AdapterError(f"lang=None: {model.config.model_type} is told the language. Pass --lang en_XX, say.")
        tokenizer.src_lang = tokenizer.tgt_lang = data_args.lang
        if model.config.decoder_start_token_id is None:
            start = number("lang", data_args.lang)
            model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = start
    if data_args.forced_bos_token is not None:
        model.generation_config.forced_bos_token_id = number("forced_bos_token", data_args.forced_bos_token)


# --- Training, evaluation, prediction --------------------------------------------------------------------------------


def record(trainer: Seq2SeqTrainer, kind: str, metrics: dict[str, float], data: Dataset) -> None:
    metrics[f"{kind}_samples"] = len(data)
    trainer.log_metrics(kind, metrics)
    trainer.save_metrics(kind, metrics)


def predict(trainer: Seq2SeqTrainer, test: Dataset) -> None:
    """Writes the summary of each text of the test data to generated_predictions.txt, a line each."""
    if "labels" not in test.column_names:
        trainer.compute_metrics, trainer.data_collator = None, DataCollatorWithPadding(trainer.processing_class)
    outputs = trainer.predict(test, metric_key_prefix="predict")
    record(trainer, "predict", outputs.metrics, test)
    if trainer.is_world_process_zero() and trainer.args.predict_with_generate:
        lines = [" ".join(text.split()) + "\n" for text in decode(outputs.predictions, trainer.processing_class)]
        (Path(trainer.args.output_dir) / "generated_predictions.txt").write_text("".join(lines), encoding="utf-8")


def describe(trainer: Seq2SeqTrainer, model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """Writes the model card, and uploads it with the adapter if asked to."""
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "summarization"}
    if data_args.dataset_name is not None:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}
    if data_args.lang is not None:
        card["language"] = data_args.lang
    (trainer.push_to_hub if trainer.args.push_to_hub else trainer.create_model_card)(**card)


def main() -> None:
    model_args, data_args, training_args, adapter_args = parse_arguments()
    set_up_logging(logger, training_args)
    checkpoint = training_args.checkpoint_to_resume()
    set_seed(training_args.seed)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    training_args.generation_max_length = training_args.generation_max_length or data_args.val_max_target_length
    training_args.generation_num_beams = data_args.num_beams or training_args.generation_num_beams

    data = read_data(data_args, model_args)
    splits = choose_splits(data, training_args)
    columns = choose_columns(data["train" if "train" in data else next(iter(data))], data_args)
    raw = {split: prepare(data[split], split, columns, data_args) for split in splits}

    tokenizer, model = load_tokenizer_and_model(model_args)
    if model.config.model_type == "t5" and data_args.source_prefix is None:
        logger.warning("T5 is told what to do by a prefix, and none is given: --source_prefix 'summarize: ', say.")
    fit_lengths(model, model_args, data_args)
    set_language(model, tokenizer, data_args)
    adapters.init(model)
    setup_adapter_training(model, adapter_args, Path(data_args.dataset_name or "summarization").name)
    with training_args.main_process_first(desc="tokenizing"):
        ready = {split: tokenize(part, split, tokenizer, data_args) for split, part in raw.items()}

    ignored = NO_TOKEN if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id
    trainer = (Seq2SeqAdapterTrainer if adapter_args.train_adapter else Seq2SeqTrainer)(
        model=model,
        args=training_args,
        data_collator=DataCollatorForSeq2Seq(
            tokenizer, model=model, label_pad_token_id=ignored, pad_to_multiple_of=8 if training_args.fp16 else None
        ),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
        compute_metrics=build_metrics(tokenizer) if training_args.predict_with_generate else None,
    )
    if training_args.do_train:
        record(trainer, "train", trainer.train(resume_from_checkpoint=checkpoint).metrics, ready["train"])
        trainer.save_model()
        trainer.save_state()
    if training_args.do_eval:
        record(trainer, "eval", trainer.evaluate(), ready["validation"])
    if training_args.do_predict:
        predict(trainer, ready["test"])
    describe(trainer, model_args, data_args)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_summarization.py: {error}")
