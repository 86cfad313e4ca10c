"""Trains and evaluates a model that writes down speech, such as Whisper, as an adapter or as a whole, on audio files.

    python run_speech_recognition.py --model_name_or_path openai/whisper-small --train_file train.csv \
        --validation_file dev.csv --language en --do_train --do_eval --predict_with_generate --output_dir out/speech \
        --train_adapter --adapter_config lora

README.md has more command lines; `python run_speech_recognition.py --help` has every option.
"""

import io
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from datasets import Audio, Dataset, DatasetDict, load_dataset
from scipy.signal import resample_poly
from transformers import (
    AutoFeatureExtractor,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    EvalPrediction,
    FeatureExtractionMixin,
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

NO_TOKEN = -100
"""What the loss leaves out."""


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset: a name on the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet: audio and text."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "The same, to predict; it needs no texts."})
    train_split_name: str = field(default="train", metadata={"help": "What a dataset calls its training data."})
    eval_split_name: str = field(default="validation", metadata={"help": "What it calls the data to evaluate on."})
    audio_column_name: str = field(default="audio", metadata={"help": "Column of audio, in files: of their paths."})
    text_column_name: str = field(default="text", metadata={"help": "Column of what is said."})
    language: str | None = field(default=None, metadata={"help": "Language of the speech: en, say. None: it is heard."})
    task: str = field(default="transcribe", metadata={"help": "transcribe, or translate into English."})
    do_lower_case: bool = field(default=False, metadata={"help": "Train on texts in lower case."})
    max_duration_in_seconds: float = field(default=30.0, metadata={"help": "Longer training examples are left out."})
    min_duration_in_seconds: float = field(default=0.0, metadata={"help": "Shorter training examples are left out."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test examples."})

    def __post_init__(self) -> None:
        if not (self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise AdapterError("No data given; pass --dataset_name, or --train_file and --validation_file.")
        if self.task not in ("transcribe", "translate"):
            raise AdapterError(f"task={self.task!r}: no such task; it must be transcribe or translate.")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Pretrained model: a name on the Hub or a local folder."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, if it is elsewhere."})
    feature_extractor_name: str | None = field(default=None, metadata={"help": "Its feature extractor, likewise."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub."})
    dtype: str = field(default="float32", metadata={"help": "auto, float32, bfloat16 or float16."})

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise AdapterError(f"dtype={self.dtype!r}: it must be auto, float32, bfloat16 or float16.")


def parse_arguments() -> tuple[Any, ...]:
    return parse_options(ModelArguments, DataTrainingArguments, Seq2SeqAdapterTrainingArguments, AdapterArguments)


# --- Reading data ----------------------------------------------------------------------------------------------------


def read_file(file: str, data_args: DataTrainingArguments, cache_dir: str | None) -> Dataset:
    """The rows of the table; paths of audio files are relative to it."""
    data, column = read_table(file, cache_dir), data_args.audio_column_name
    if column not in data.column_names:
        raise AdapterError(
            f"{file}: it has no column {column}, only {', '.join(data.column_names)}; it must have one of paths of "
            "audio files. Name it with --audio_column_name."
        )
    paths = [str(Path(file).parent / str(path)) for path in data[column]]
    for path in paths:
        open_audio(path)
    return data.remove_columns(column).add_column(column, paths)


def open_audio(path: str) -> soundfile._SoundFileInfo:
    """What the head of the audio file says: duration, sampling rate, channels."""
    if not Path(path).is_file():
        raise AdapterError(f"{path}: there is no such file; it must exist. Paths are relative to the table's folder.")
    try:
        return soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise AdapterError(
            f"{path}: it cannot be read as audio ({error}); it must be wav, flac, ogg or mp3."
        ) from error


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    """The splits train, validation and test, as far as they are there; audio is a path, or bytes of a dataset."""
    if data_args.dataset_name is None:
        files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
        return DatasetDict(
            {split: read_file(file, data_args, model_args.cache_dir) for split, file in files.items() if file}
        )
    options = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    data = load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    for name, asked in {"train": data_args.train_split_name, "validation": data_args.eval_split_name}.items():
        if asked in data and asked != name:
            data[name] = data.pop(asked)
    return data.cast_column(data_args.audio_column_name, Audio(decode=False))


def choose_splits(data: DatasetDict, training_args: Seq2SeqAdapterTrainingArguments) -> list[str]:
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


def prepare(data: Dataset, split: str, data_args: DataTrainingArguments) -> Dataset:
    """The checked split with the columns audio and text; training data without what is too long or too short."""
    text = data_args.text_column_name
    if split != "test" or text in data.column_names:
        if text not in data.column_names:
            found = ", ".join(data.column_names)
            raise AdapterError(
                f"The {split} data has no column {text}, only {found}; name the one of texts with --text_column_name."
            )
        if data.data.column(text).null_count:
            row = data.data.column(text).to_pylist().index(None) + 1
            raise AdapterError(f"The {split} data has no {text} in row {row}; each row must have one.")
    names = {data_args.audio_column_name: "audio", text: "text"}
    names = {old: new for old, new in names.items() if old in data.column_names}
    data = data.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    data = data if limits[split] is None else data.select(range(min(limits[split], len(data))))
    if split == "train":
        least, most = data_args.min_duration_in_seconds, data_args.max_duration_in_seconds
        kept = [row for row, audio in enumerate(data["audio"]) if least <= duration(audio) <= most]
        if not kept:
            raise AdapterError(f"The train data has nothing between {least} and {most} seconds; it must have some.")
        logger.info("%d of %d training examples are between %g and %g seconds", len(kept), len(data), least, most)
        data = data.select(kept)
    return data


# --- From audio to examples ------------------------------------------------------------------------------------------


def source_of(audio: Any) -> Any:
    """What soundfile opens: the path, or the bytes that a dataset has."""
    if isinstance(audio, str):
        return audio
    return io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"]


def duration(audio: Any) -> float:
    return float(soundfile.info(source_of(audio)).duration)


def read_audio(audio: Any, rate: int) -> np.ndarray:
    """(s,) one channel at the sampling rate that the model takes."""
    samples, given = soundfile.read(source_of(audio), dtype="float32", always_2d=True)
    samples = samples.mean(axis=1)
    divisor = math.gcd(rate, given)
    return samples if rate == given else resample_poly(samples, rate // divisor, given // divisor).astype(np.float32)


class Transcript:
    """What the model writes: the tokens that tell it language and task, the text, the end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, data_args: DataTrainingArguments):
        self.tokenizer, self.lower, known = tokenizer, data_args.do_lower_case, tokenizer.get_vocab()
        told = [f"<|{data_args.language}|>", f"<|{data_args.task}|>"] if data_args.language else []
        if unknown := [token for token in told if token not in known]:
            raise AdapterError(
                f"language={data_args.language!r}: the model has no token {unknown[0]}; give a language that it knows, "
                "or leave the option out."
            )
        names = [token for token in (*told, "<|notimestamps|>") if token in known]
        self.start = tokenizer.convert_tokens_to_ids(names)
        self.most = getattr(model.config, "max_target_positions", tokenizer.model_max_length)

    def encode(self, text: str) -> list[int]:
        text = text.lower() if self.lower else text
        tokens = [
            *self.start,
            *self.tokenizer(text, add_special_tokens=False)["input_ids"],
            self.tokenizer.eos_token_id,
        ]
        if len(tokens) > self.most:
            raise AdapterError(
                f"{text[:60]!r}…: it has {len(tokens)} tokens; the model takes {self.most}. Cut the recording in two."
            )
        return tokens


def show(data: Dataset, extractor: FeatureExtractionMixin, transcript: Transcript) -> Dataset:
    """The split whose audio is read and brought into the model's form when it is needed."""
    for text in data["text"] if "text" in data.column_names else ():
        transcript.encode(text)  # too long a text is told before training begins

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rate = extractor.sampling_rate
        heard = extractor([read_audio(audio, rate) for audio in batch["audio"]], sampling_rate=rate)
        rows = {extractor.model_input_names[0]: list(heard[extractor.model_input_names[0]])}
        return rows | ({"labels": [transcript.encode(text) for text in batch["text"]]} if "text" in batch else {})

    return data.with_transform(transform)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as a batch, labels as long as the longest."""
    (name,) = set(rows[0]) - {"labels"}
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows]))}
    if "labels" in rows[0]:
        labels = [torch.tensor(row["labels"]) for row in rows]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=NO_TOKEN)
    return batch


# --- Model -----------------------------------------------------------------------------------------------------------


def load_parts(model_args: ModelArguments) -> tuple[PreTrainedTokenizerBase, FeatureExtractionMixin, PreTrainedModel]:
    source = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision, "token": model_args.token}
    name = model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **source)
    extractor = AutoFeatureExtractor.from_pretrained(model_args.feature_extractor_name or name, **source)
    return tokenizer, extractor, AutoModelForSpeechSeq2Seq.from_pretrained(name, dtype=model_args.dtype, **source)


def tell_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments) -> None:
    """Tells a Whisper what to write when it generates; checkpoints that came another way lack the numbers of tokens."""
    if model.config.model_type != "whisper":
        return
    vocabulary, config = tokenizer.get_vocab(), model.generation_config
    languages = {token: number for token, number in vocabulary.items() if re.fullmatch(r"<\|[a-z]{2,3}\|>", token)}
    found = {
        "lang_to_id": languages,
        "task_to_id": {task: vocabulary.get(f"<|{task}|>") for task in ("transcribe", "translate")},
        "no_timestamps_token_id": vocabulary.get("<|notimestamps|>"),
        "is_multilingual": bool(languages),
    }
    for name, value in found.items():
        if value and name not in config.to_dict():
            setattr(config, name, value)
    if data_args.language is not None:
        config.language, config.task = data_args.language, data_args.task


# --- Metrics and predictions -----------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The words in lower case, without punctuation."""
    return re.sub(r"[^\w\s']", " ", text.lower()).split()


def errors(wanted: Sequence[str], given: Sequence[str]) -> int:
    """The least number of words to put in, take out or change that makes `given` of `wanted`."""
    row = list(range(len(given) + 1))
    for number, word in enumerate(wanted, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(given, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1]


def decode(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    tokens = np.where(tokens == NO_TOKEN, tokenizer.eos_token_id, tokens)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def build_metrics(tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """The word error rate: wrong words over words that were said."""

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        said = [words(text) for text in decode(evaluated.label_ids, tokenizer)]
        heard = [words(text) for text in decode(evaluated.predictions, tokenizer)]
        return {"wer": sum(map(errors, said, heard)) / max(1, sum(map(len, said)))}

    return compute_metrics


# --- Training, evaluation, prediction --------------------------------------------------------------------------------


def train(trainer: Seq2SeqTrainer, checkpoint: str | None) -> None:
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: Seq2SeqTrainer) -> None:
    metrics = trainer.evaluate() | {"eval_samples": len(trainer.eval_dataset)}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def predict(trainer: Seq2SeqTrainer, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes what is heard in each row of the test set, and the metrics if it has texts."""
    outputs = trainer.predict(data, metric_key_prefix="predict")
    metrics = outputs.metrics | {"predict_samples": len(data)}
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
    if trainer.is_world_process_zero():
        lines = "".join(f"{text}\n" for text in decode(outputs.predictions, tokenizer))
        (Path(trainer.args.output_dir) / "generated_predictions.txt").write_text(lines, encoding="utf-8")


def describe(trainer: Seq2SeqTrainer, model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """Writes the model card, and uploads it with the adapter if asked to."""
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "automatic-speech-recognition"}
    if data_args.dataset_name is not None:
        card |= {"dataset": data_args.dataset_name}
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
    training_args.remove_unused_columns = False  # the column of audio becomes features when it is read
    training_args.label_names = training_args.label_names or ["labels"]
    if training_args.do_predict and not training_args.predict_with_generate:
        raise AdapterError("do_predict: predictions are what the model generates; pass --predict_with_generate too.")

    data = read_data(data_args, model_args)
    splits = choose_splits(data, training_args)
    raw = {split: prepare(data[split], split, data_args) for split in splits}
    tokenizer, extractor, model = load_parts(model_args)
    tell_task(model, tokenizer, data_args)
    transcript = Transcript(tokenizer, model, data_args)
    ready = {split: show(part, extractor, transcript) for split, part in raw.items()}

    adapters.init(model)
    name = Path(data_args.dataset_name or "speech").name  # of a dataset org/name, the name
    setup_adapter_training(model, adapter_args, name)
    trainer = (Seq2SeqAdapterTrainer if adapter_args.train_adapter else Seq2SeqTrainer)(
        model=model,
        args=training_args,
        data_collator=collate,
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("validation"),
        processing_class=extractor,
        compute_metrics=build_metrics(tokenizer) if training_args.predict_with_generate else None,
    )
    if training_args.do_train:
        train(trainer, checkpoint)
        tokenizer.save_pretrained(training_args.output_dir)
    if training_args.do_eval:
        evaluate(trainer)
    if training_args.do_predict:
        predict(trainer, ready["test"], tokenizer)
    describe(trainer, model_args, data_args)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_speech_recognition.py: {error}")
