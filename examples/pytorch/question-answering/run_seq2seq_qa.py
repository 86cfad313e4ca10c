"""Trains and evaluates a model that writes the answer to a question about a text, as an adapter or as a whole.

    python run_seq2seq_qa.py --model_name_or_path t5-small --train_file train-v1.1.json \
        --validation_file dev-v1.1.json --do_train --do_eval --predict_with_generate --train_adapter --output_dir out

It reads the files that run_qa.py reads, and measures as it does. README.md has more command lines;
`python run_seq2seq_qa.py --help` has every option.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import run_qa
import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    set_seed,
)

import adapters
from adapters import AdapterArguments, Seq2SeqAdapterTrainer, setup_adapter_training
from adapters.errors import AdapterError
from adapters.training import Seq2SeqAdapterTrainingArguments, parse_options, set_up_logging

logger = logging.getLogger(__name__)

NO_TOKEN = -100
"""What the loss leaves out."""


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments(run_qa.DataTrainingArguments):
    context_column: str = field(default="context", metadata={"help": "Column of texts."})
    question_column: str = field(default="question", metadata={"help": "Column of questions."})
    answer_column: str = field(default="answers", metadata={"help": "Column of answers."})
    val_max_answer_length: int | None = field(
        default=None, metadata={"help": "Tokens of an answer in evaluation and generation; else max_answer_length."}
    )
    num_beams: int | None = field(default=None, metadata={"help": "Beams of generation."})
    ignore_pad_token_for_loss: bool = field(default=True, metadata={"help": "Leave padding out of the loss."})
    n_best_size: int = field(default=20, metadata={"help": "Without effect: one answer is written."})
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "Without effect: the model writes that there is no answer."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.val_max_answer_length = self.val_max_answer_length or self.max_answer_length


@dataclass
class ModelArguments(run_qa.ModelArguments):
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Windows need one of the tokenizers library."})


def parse_arguments() -> tuple[
    ModelArguments, DataTrainingArguments, Seq2SeqAdapterTrainingArguments, AdapterArguments
]:
    return parse_options(ModelArguments, DataTrainingArguments, Seq2SeqAdapterTrainingArguments, AdapterArguments)


# --- Data ------------------------------------------------------------------------------------------------------------


def texts_of(answers: Any) -> list[str]:
    """The texts of the answers: SQuAD has them with the places where they stand, other data alone."""
    if answers is None:
        return []
    given = answers["text"] if isinstance(answers, Mapping) else answers
    return [given] if isinstance(given, str) else [text if isinstance(text, str) else text["text"] for text in given]


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> Mapping[str, Any]:
    if data_args.dataset_name is not None:
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        return load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    return {split: run_qa.read_rows(Path(file)) for split, file in files.items() if file}


def prepare(data: Any, split: str, data_args: DataTrainingArguments) -> Dataset:
    """The checked questions, with the texts of their answers, and no more of them than asked for."""
    columns = {"question": data_args.question_column, "context": data_args.context_column}
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    rows = list(islice(data, limits.get(split, data_args.max_predict_samples)))
    if not rows:
        raise AdapterError(f"The {split} data is empty; it must have at least one question.")
    found: dict[str, list[Any]] = {"id": [], "question": [], "context": [], "answers": []}
    for number, row in enumerate(rows):
        identity = str(row.get("id", number))
        for name, column in columns.items():
            if not isinstance(row.get(column), str):
                raise AdapterError(
                    f"The {split} data, question {identity!r}, has {row.get(column)!r} as {column}, only "
                    f"{', '.join(row)}; it must be a text. Name the column with --{name}_column."
                )
            found[name].append(row[column])
        if split != "test" and data_args.answer_column not in row:
            raise AdapterError(
                f"The {split} data, question {identity!r}, has no {data_args.answer_column}, only {', '.join(row)}; it "
                "must have it. Name the column with --answer_column."
            )
        found["id"].append(identity)
        found["answers"].append({"text": texts_of(row.get(data_args.answer_column))})
    if len(set(found["id"])) < len(rows):
        twice = next(name for name in found["id"] if found["id"].count(name) > 1)
        raise AdapterError(f"The {split} data, question {twice!r}: it is there twice; each id must be another.")
    unanswered = sum(not answers["text"] for answers in found["answers"])
    if split != "test" and unanswered and not data_args.version_2_with_negative:
        logger.warning("%d questions of %s have no answer: an empty one is right", unanswered, split)
    return Dataset.from_dict(found)


# --- Windows ---------------------------------------------------------------------------------------------------------


def windows_of(
    question: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, args: DataTrainingArguments
) -> Iterator[tuple[str, str]]:
    """What the model reads, and the part of the text in it: parts that share `doc_stride` tokens, if it is long."""
    prompt = f"question: {question['question'].strip()} context: "
    context = question["context"].strip()
    room = args.max_seq_length - len(tokenizer(prompt)["input_ids"]) - 1  # a part may begin with one token more
    if room <= args.doc_stride:
        raise AdapterError(
            f"Question {question['id']!r}: with max_seq_length={args.max_seq_length} it leaves {room} tokens to the "
            f"text; these must be more than doc_stride={args.doc_stride}. Raise the one or lower the other."
        )
    spans = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    for start in range(0, max(len(spans) - args.doc_stride, 1), room - args.doc_stride):
        part = context[spans[start][0] : spans[start : start + room][-1][1]] if spans else context
        yield prompt + part, part


def tokenize(data: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, args: DataTrainingArguments) -> Dataset:
    """Windows: the row of their question (`row`), their tokens and, as `labels`, those of the answer.

    Training leaves out windows that lack the answer; in SQuAD 2 it teaches that they have none.
    """
    length = args.max_answer_length if split == "train" else args.val_max_answer_length
    options = {"truncation": True, "padding": "max_length" if args.pad_to_max_length else False}

    def encode(batch: dict[str, list[Any]], rows: list[int]) -> Mapping[str, Any]:
        found: dict[str, list[Any]] = {"row": [], "text": [], "answer": []}
        for place, row in enumerate(rows):
            question = {name: values[place] for name, values in batch.items()}
            windows = list(windows_of(question, tokenizer, args))
            answer = next(iter(question["answers"]["text"]), "").strip()
            held = [answer in part for _, part in windows]
            held[0] |= not any(held)  # an answer in other words
            for (text, _), has_answer in zip(windows, held, strict=True):
                if split == "train" and not has_answer and not args.version_2_with_negative:
                    continue
                teaches = has_answer or not args.version_2_with_negative
                for name, value in zip(found, (row, text, answer if teaches else ""), strict=True):
                    found[name].append(value)
        encoded = tokenizer(found["text"], max_length=args.max_seq_length, **options)
        labels = tokenizer(text_target=found["answer"], max_length=length, **options)["input_ids"]
        if args.pad_to_max_length and args.ignore_pad_token_for_loss:
            labels = [[NO_TOKEN if token == tokenizer.pad_token_id else token for token in row] for row in labels]
        encoded["labels"] = labels
        return {**encoded, "row": found["row"]}

    return data.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=data.column_names,
        num_proc=args.preprocessing_num_workers,
        load_from_cache_file=not args.overwrite_cache,
        desc="Tokenizing",
    )


# --- Answers and metrics ---------------------------------------------------------------------------------------------


class AnsweringTrainer(Seq2SeqTrainer):
    """Scores what it generates: the answers to a question from several windows are compared."""

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None, **generation: Any
    ) -> tuple[Any, Any, Any]:
        """Of each row the tokens and the logarithm of their probability, besides loss and labels."""
        loss, tokens, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **generation)
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, tokens, labels
        inputs, padding = self._prepare_inputs(inputs), self.processing_class.pad_token_id
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**read, decoder_input_ids=tokens[:, :-1]).logits
        scores = logits.float().log_softmax(dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return loss, (tokens, (scores * (tokens[:, 1:] != padding)).sum(dim=-1)), labels


class AnsweringAdapterTrainer(AnsweringTrainer, Seq2SeqAdapterTrainer):
    """The same for an adapter."""


def choose_answers(
    outputs: tuple[np.ndarray, np.ndarray], windows: Dataset, questions: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Of each question the best answer; an empty one if no window has another."""
    tokens = np.where(outputs[0] < 0, tokenizer.pad_token_id, outputs[0])
    texts = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    best: dict[int, tuple[bool, float, str]] = {}
    for row, text, score in zip(windows["row"], texts, outputs[1], strict=True):
        found = (bool(text), float(score), text)
        best[row] = max(best.get(row, found), found)
    return {question["id"]: best[row][-1] for row, question in enumerate(questions)}


def build_metrics(
    windows: Dataset,
    questions: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DataTrainingArguments,
    file: Path | None,
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A function that measures the answers, if right ones are known, and writes them to `file`."""

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        answers = choose_answers(evaluated.predictions, windows, questions, tokenizer)
        if file is not None:
            file.write_text(json.dumps(answers, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
        known = args.version_2_with_negative or any(row["text"] for row in questions["answers"])
        return run_qa.measure(answers, questions, args.version_2_with_negative) if known else {}

    return compute_metrics


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
    if not tokenizer.is_fast:
        raise AdapterError(
            f"{type(tokenizer).__name__}: it does not tell where a token stands in the text; it must be a tokenizer of "
            "the tokenizers library. Name one with --tokenizer_name."
        )
    return tokenizer, AutoModelForSeq2SeqLM.from_pretrained(name, config=config, **source)


def record(trainer: Seq2SeqTrainer, kind: str, metrics: dict[str, float], questions: Dataset) -> None:
    metrics[f"{kind}_samples"] = len(questions)
    trainer.log_metrics(kind, metrics)
    trainer.save_metrics(kind, metrics)


def main() -> None:
    model_args, data_args, training_args, adapter_args = parse_arguments()
    set_up_logging(logger, training_args)
    checkpoint = training_args.checkpoint_to_resume()
    set_seed(training_args.seed)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    training_args.generation_max_length = training_args.generation_max_length or data_args.val_max_answer_length
    training_args.generation_num_beams = data_args.num_beams or training_args.generation_num_beams

    data = read_data(data_args, model_args)
    splits = run_qa.choose_splits(data, training_args)
    raw = {split: prepare(data[split], split, data_args) for split in splits}
    tokenizer, model = load_tokenizer_and_model(model_args)
    data_args.max_seq_length = min(data_args.max_seq_length, tokenizer.model_max_length)
    adapters.init(model)
    setup_adapter_training(model, adapter_args, Path(data_args.dataset_name or "squad").name)
    with training_args.main_process_first(desc="tokenizing"):
        windows = {split: tokenize(part, split, tokenizer, data_args) for split, part in raw.items()}
    ready = {split: part.remove_columns("row") for split, part in windows.items()}

    ignored = NO_TOKEN if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id
    trainer = (AnsweringAdapterTrainer if adapter_args.train_adapter else AnsweringTrainer)(
        model=model,
        args=training_args,
        data_collator=DataCollatorForSeq2Seq(
            tokenizer, model=model, label_pad_token_id=ignored, pad_to_multiple_of=8 if training_args.fp16 else None
        ),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
    )

    def metrics_of(split: str, name: str) -> Callable[[EvalPrediction], dict[str, float]] | None:
        if not training_args.predict_with_generate:
            return None
        file = Path(training_args.output_dir) / name if trainer.is_world_process_zero() else None
        return build_metrics(windows[split], raw[split], tokenizer, data_args, file)

    if training_args.do_eval:
        trainer.compute_metrics = metrics_of("validation", "eval_predictions.json")
    if training_args.do_train:
        record(trainer, "train", trainer.train(resume_from_checkpoint=checkpoint).metrics, raw["train"])
        trainer.save_model()
        trainer.save_state()
    if training_args.do_eval:
        record(trainer, "eval", trainer.evaluate(), raw["validation"])
    if training_args.do_predict:
        trainer.compute_metrics = metrics_of("test", "predict_predictions.json")
        record(trainer, "predict", trainer.predict(ready["test"], metric_key_prefix="predict").metrics, raw["test"])
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "question-answering"}
    if data_args.dataset_name is not None:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}
    (trainer.push_to_hub if training_args.push_to_hub else trainer.create_model_card)(**card)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_seq2seq_qa.py: {error}")
