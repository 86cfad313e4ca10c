"""Trains and evaluates a model that finds the answer to a question in a text, as an adapter or as a whole.

    python run_qa.py --model_name_or_path bert-base-uncased --train_file train-v1.1.json --do_train \
        --validation_file dev-v1.1.json --do_eval --output_dir out/squad --train_adapter --adapter_config seq_bn

README.md has more command lines; `python run_qa.py --help` has every option.
"""

import json
import logging
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
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


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset: a name on the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "SQuAD's json, or a table as json or jsonl."})
    validation_file: str | None = field(default=None, metadata={"help": "SQuAD's json, or a table as json or jsonl."})
    test_file: str | None = field(default=None, metadata={"help": "The same; it needs no answers."})
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of question and text; long texts are windowed."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows of a text share."})
    pad_to_max_length: bool = field(default=True, metadata={"help": "Pad to max_seq_length, not to the batch."})
    version_2_with_negative: bool = field(default=False, metadata={"help": "Some questions have no answer."})
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "No answer is given if its score is higher than the best answer's by more."}
    )
    n_best_size: int = field(default=20, metadata={"help": "Number of answers per question that are written."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of the longest answer."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew even if it was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training questions."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation questions."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test questions."})

    def __post_init__(self) -> None:
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


def parse_arguments() -> tuple[ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments]:
    """From the command line, or from the JSON file that is its only argument."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, AdapterTrainingArguments, AdapterArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


# --- Reading data ----------------------------------------------------------------------------------------------------


def questions_of(articles: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """The questions of SQuAD's articles; a row that is a question itself is left as it is."""
    for article in articles:
        if "paragraphs" not in article:
            yield article
            continue
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {"context": paragraph["context"], **question}


def parse(text: str) -> list[Any]:
    """A json list, what is under "data", or an object per line."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return content.get("data", [content]) if isinstance(content, dict) else content


def listed(answers: Any) -> dict[str, list[Any]]:
    """The answers as lists of texts and starts, as `datasets` has them; SQuAD's files have a list of pairs."""
    if isinstance(answers, list):
        return {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
    return answers if answers is not None else {"text": [], "answer_start": []}


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """The questions of a file, with the columns that they have there."""
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such file; it must exist.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: it is not UTF-8 ({error}); it must be. Convert it, with iconv say.") from error
    if not text.strip():
        raise AdapterError(f"{path}: the file is empty; it must have at least one question.")
    try:
        return [dict(row) for row in questions_of(parse(text))]
    except KeyError as error:
        raise AdapterError(f"{path}: a paragraph has no {error}; each must have context and qas.") from error
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: it cannot be read as SQuAD's json ({error}); it must be valid.") from error


def read_file(path: Path) -> Dataset:
    rows = read_rows(path)
    try:
        data = {name: [row[name] for row in rows] for name in ("id", "question", "context")}
        return Dataset.from_dict({**data, "answers": [listed({"answers": None, **row}["answers"]) for row in rows]})
    except KeyError as error:
        raise AdapterError(
            f"{path}: a question has no {error}; each must have id, question and context, and answers with text and "
            "answer_start."
        ) from error
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: its answers cannot be read ({error}); they must have text and start.") from error


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    if data_args.dataset_name is not None:
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        return load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    return DatasetDict({split: read_file(Path(file)) for split, file in files.items() if file})


def choose_splits(data: DatasetDict, training_args: AdapterTrainingArguments) -> list[str]:
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    for split, needed in wanted.items():
        if needed and split not in data:
            raise AdapterError(f"There is no {split} data, only {', '.join(data)}; what is to be done needs it.")
    return [split for split, needed in wanted.items() if needed]


def check_rows(data: Dataset, split: str, negative: bool) -> None:
    """Each question is there once, and its answers stand in the text where they are said to."""
    if missing := [name for name in ("id", "question", "context", "answers") if name not in data.column_names]:
        raise AdapterError(
            f"The {split} data has no column {missing[0]}, only {', '.join(data.column_names)}; it must have it."
        )
    if len(data) == 0:
        raise AdapterError(f"The {split} data is empty; it must have at least one question.")
    seen = set()
    for row in data:
        name = f"The {split} data, question {row['id']!r}"
        if row["id"] in seen:
            raise AdapterError(f"{name}: it is there twice; each id must be another.")
        seen.add(row["id"])
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        if not texts and split != "test" and not negative:
            raise AdapterError(f"{name}: it has no answer; it must have one. Or pass --version_2_with_negative.")
        for text, start in zip(texts, starts, strict=True):
            if row["context"][start : start + len(text)] != text:
                raise AdapterError(f"{name}: the answer {text!r} is not at {start} in the context; it must be.")


def prepare(data: Dataset, split: str, data_args: DataTrainingArguments) -> Dataset:
    """The checked split, with no more questions than asked for."""
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    limit = limits.get(split, data_args.max_predict_samples)
    data = data if limit is None else data.select(range(min(limit, len(data))))
    check_rows(data, split, data_args.version_2_with_negative)
    return data


# --- Windows ---------------------------------------------------------------------------------------------------------


def check_lengths(
    data: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments
) -> None:
    """Each question leaves room for more of the text than the windows share."""
    room = data_args.max_seq_length - data_args.doc_stride - tokenizer.num_special_tokens_to_add(pair=True)
    lengths = [len(tokens) for tokens in tokenizer(data["question"][:], add_special_tokens=False)["input_ids"]]
    if max(lengths) >= room:
        row = lengths.index(max(lengths))
        raise AdapterError(
            f"The {split} data, question {data[row]['id']!r}: it has {lengths[row]} tokens; with max_seq_length="
            f"{data_args.max_seq_length} and doc_stride={data_args.doc_stride} it must have fewer than {room}. "
            "Raise the one or lower the other."
        )


def answer_tokens(offsets: list[list[int] | None], answers: Mapping[str, list[Any]]) -> tuple[int, int] | None:
    """The first and the last token of the first answer, if the window has all of it."""
    if not answers["text"]:
        return None
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    inside = [place for place, span in enumerate(offsets) if span is not None and span[0] < end and span[1] > start]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return None
    return inside[0], inside[-1]


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments) -> Dataset:
    """Overlapping windows: their question's row (`row`), where each token stands in the text (`offsets`; null if
    nowhere), and the tokens of the answer; the first token, [CLS], where there is none."""
    question_first = tokenizer.padding_side == "right"
    columns = ("question", "context") if question_first else ("context", "question")

    def encode(batch: dict[str, list[Any]], rows: list[int]) -> Mapping[str, Any]:
        encoded = tokenizer(
            *([text.lstrip() if name == "question" else text for text in batch[name]] for name in columns),
            truncation="only_second" if question_first else "only_first",
            max_length=data_args.max_seq_length,
            stride=data_args.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length" if data_args.pad_to_max_length else False,
        )
        sources, spans = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        windows: dict[str, list[Any]] = {"row": [], "offsets": [], "start_positions": [], "end_positions": []}
        for window, source in enumerate(sources):
            parts = encoded.sequence_ids(window)
            text = int(question_first)
            offsets = [list(span) if part == text else None for span, part in zip(spans[window], parts, strict=True)]
            tokens = encoded["input_ids"][window]
            nothing = tokens.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in tokens else 0
            start, end = answer_tokens(offsets, batch["answers"][source]) or (nothing, nothing)
            for name, value in zip(windows, (rows[source], offsets, start, end), strict=True):
                windows[name].append(value)
        return {**encoded, **windows}

    return data.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=data.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc="Tokenizing",
    )


# --- Answers and metrics ---------------------------------------------------------------------------------------------


def spans_of(window: Mapping[str, Any], start: np.ndarray, end: np.ndarray, data_args: DataTrainingArguments) -> Any:
    """The spans (score, first character, last, score of start, of end) from the best starts to the best ends."""
    offsets, size = window["offsets"], data_args.n_best_size
    here = np.array([place for place, span in enumerate(offsets) if span is not None])
    first, last = (here[np.argsort(-scores[here], kind="stable")[:size]] for scores in (start, end))
    for i in first:
        for j in last:
            if i <= j < i + data_args.max_answer_length:
                yield start[i] + end[j], offsets[i][0], offsets[j][1], start[i], end[j]


def choose_answers(
    outputs: tuple[np.ndarray, ...], windows: Dataset, questions: Dataset, tokenizer: Any, args: DataTrainingArguments
) -> tuple[dict[str, str], dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Of each question: the answer, the n best ones, and by how much no answer at all scores higher than the best."""
    spans: list[list[Any]] = [[] for _ in questions]
    nulls = np.full(len(questions), np.inf)
    for window, start, end in zip(windows, *outputs[:2], strict=True):
        tokens, row = window["input_ids"], window["row"]
        nothing = tokens.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in tokens else 0
        nulls[row] = min(nulls[row], start[nothing] + end[nothing])
        spans[row] += spans_of(window, start, end, args)
    answers, n_best, odds = {}, {}, {}
    for question, found, null in zip(questions, spans, nulls, strict=True):
        best = sorted(found, key=lambda span: -span[0])[: args.n_best_size]
        odds[question["id"]] = float(null - best[0][0]) if best else float("inf")
        texts = [(question["context"][a:b], score, (start, end)) for score, a, b, start, end in best]
        if args.version_2_with_negative or not texts:
            texts = sorted([*texts, ("", null, (null / 2, null / 2))], key=lambda text: -text[1])
        weights = np.exp([score - texts[0][1] for _, score, _ in texts])
        n_best[question["id"]] = [
            {"text": text, "probability": float(weight), "start_logit": float(start), "end_logit": float(end)}
            for (text, _, (start, end)), weight in zip(texts, weights / weights.sum(), strict=True)
        ]
        unanswered = args.version_2_with_negative and odds[question["id"]] > args.null_score_diff_threshold
        answers[question["id"]] = "" if unanswered or not best else question["context"][best[0][1] : best[0][2]]
    return answers, n_best, odds


def normalized(text: str) -> list[str]:
    """The words that SQuAD's metrics compare: small letters, without punctuation and English articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall of the words; of two answers that have none it is 1."""
    found, wanted = normalized(answer), normalized(right)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if found and wanted else float(found == wanted)


def measure(answers: Mapping[str, str], questions: Dataset, negative: bool) -> dict[str, float]:
    """SQuAD's metrics in percent, of the right answer that fits best; version 2 counts both kinds of questions."""
    scores: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for question in questions:
        answer, right = answers[question["id"]], question["answers"]["text"] or [""]
        exact = max(float(normalized(answer) == normalized(text)) for text in right)
        scores[bool(question["answers"]["text"])].append((exact, max(f1(answer, text) for text in right)))
    exact, overlap = 100 * np.mean(scores[True] + scores[False], axis=0)
    if not negative:
        return {"exact_match": float(exact), "f1": float(overlap)}
    result = {"exact": float(exact), "f1": float(overlap), "total": len(questions)}
    for kind, part in (("HasAns", scores[True]), ("NoAns", scores[False])):
        if part:
            exact, overlap = 100 * np.mean(part, axis=0)
            result |= {f"{kind}_exact": float(exact), f"{kind}_f1": float(overlap), f"{kind}_total": len(part)}
    return result


def build_metrics(
    windows: Dataset, questions: Dataset, tokenizer: Any, data_args: DataTrainingArguments, write_to: Path | None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A function that measures the answers, if right ones are known, and writes them to `<write_to>_….json`."""

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        chosen = choose_answers(evaluated.predictions, windows, questions, tokenizer, data_args)
        files = dict(zip(("predictions", "nbest_predictions", "null_odds"), chosen, strict=True))
        if not data_args.version_2_with_negative:
            del files["null_odds"]
        for name, content in files.items() if write_to is not None else ():
            text = json.dumps(content, indent=4, ensure_ascii=False)
            write_to.with_name(f"{write_to.name}_{name}.json").write_text(text + "\n", encoding="utf-8")
        known = data_args.version_2_with_negative or all(answers["text"] for answers in questions["answers"])
        return measure(chosen[0], questions, data_args.version_2_with_negative) if known else {}

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
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **source)
    if not tokenizer.is_fast:
        raise AdapterError(
            f"{type(tokenizer).__name__}: it does not tell where a token stands in the text; it must be a tokenizer of "
            "the tokenizers library. Name one with --tokenizer_name."
        )
    return tokenizer, AutoModelForQuestionAnswering.from_pretrained(name, config=config, **source)


def record(trainer: Trainer, kind: str, metrics: dict[str, float], questions: Dataset) -> None:
    metrics[f"{kind}_samples"] = len(questions)
    trainer.log_metrics(kind, metrics)
    trainer.save_metrics(kind, metrics)


def main() -> None:
    model_args, data_args, training_args, adapter_args = parse_arguments()
    set_up_logging(logger, training_args)
    checkpoint = training_args.checkpoint_to_resume()
    set_seed(training_args.seed)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"

    data = read_data(data_args, model_args)
    raw = {split: prepare(data[split], split, data_args) for split in choose_splits(data, training_args)}
    tokenizer, model = load_tokenizer_and_model(model_args)
    data_args.max_seq_length = min(data_args.max_seq_length, tokenizer.model_max_length)
    for split, part in raw.items():
        check_lengths(part, split, tokenizer, data_args)
    adapters.init(model)
    setup_adapter_training(model, adapter_args, Path(data_args.dataset_name or "squad").name)
    with training_args.main_process_first(desc="tokenizing"):
        windows = {split: tokenize(part, tokenizer, data_args) for split, part in raw.items()}
    ready = {split: part.remove_columns(["row", "offsets"]) for split, part in windows.items()}

    trainer = (AdapterTrainer if adapter_args.train_adapter else Trainer)(
        model=model,
        args=training_args,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=tokenizer,
    )

    def metrics_of(split: str, name: str) -> Callable[[EvalPrediction], dict[str, float]]:
        file = Path(training_args.output_dir) / name if trainer.is_world_process_zero() else None
        return build_metrics(windows[split], raw[split], tokenizer, data_args, file)

    if training_args.do_eval:
        trainer.compute_metrics = metrics_of("validation", "eval")
    if training_args.do_train:
        record(trainer, "train", trainer.train(resume_from_checkpoint=checkpoint).metrics, raw["train"])
        trainer.save_model()
        trainer.save_state()
    if training_args.do_eval:
        record(trainer, "eval", trainer.evaluate(), raw["validation"])
    if training_args.do_predict:
        trainer.compute_metrics = metrics_of("test", "predict")
        record(trainer, "predict", trainer.predict(ready["test"], metric_key_prefix="predict").metrics, raw["test"])
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "question-answering"}
    if data_args.dataset_name is not None:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}
    (trainer.push_to_hub if training_args.push_to_hub else trainer.create_model_card)(**card)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_qa.py: {error}")
