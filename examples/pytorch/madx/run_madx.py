"""MAD-X: trains a task in one language and applies it in another, whose language adapter takes the place of the first.

    python run_madx.py --output_dir out/madx --source_text en.txt --source_train en_ewt-ud-train.conllu.gz \
        --source_test en_ewt-ud-test.conllu.gz --target_text de.txt --target_test de_gsd-ud-dev.conllu.gz

The task is to tag the words of a sentence with their universal parts of speech. A language adapter, with an invertible
adapter at the embeddings, is trained on plain text of each language; the task adapter on top of that of the source
language. Without --model_name_or_path a small BERT is trained on the text of both languages first.
Pfeiffer et al. 2020, arXiv:2005.00052. README.md has a command line and what it prints.
"""

import gzip
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)

from adapters import AdapterTrainer, AutoAdapterModel, Stack
from adapters.errors import AdapterError
from adapters.training import AdapterTrainingArguments

logger = logging.getLogger(__name__)

TAGS = ["ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ"]
TAGS += ["SYM", "VERB", "X"]
SOURCE, TARGET, TASK, ALONE, LANGUAGE_HEAD = "source", "target", "tagging", "tagging_alone", "mlm"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
IGNORED = -100
Sentence = tuple[list[str], list[str]]
"""Words and their tags."""


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class Arguments:
    source_text: list[str] = field(metadata={"help": "Files of text in the source language: .txt, .conllu, SQuAD."})
    target_text: list[str] = field(metadata={"help": "Files of text in the target language: .txt, .conllu, SQuAD."})
    source_train: str = field(metadata={"help": "Treebank (CoNLL-U, may be gzipped) that the task is trained on."})
    source_test: str = field(metadata={"help": "Treebank of the source language to evaluate on."})
    target_test: str = field(metadata={"help": "Treebank of the target language to evaluate on."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Pretrained model; else a small new one."})
    language_config: str = field(default="seq_bn_inv[reduction_factor=2]", metadata={"help": "Of both languages."})
    task_config: str = field(default="seq_bn[reduction_factor=2]", metadata={"help": "Of the task adapter."})
    model_steps: int = field(default=2500, metadata={"help": "Training steps of a new model or head."})
    language_steps: int = field(default=500, metadata={"help": "Training steps of each language adapter."})
    task_steps: int = field(default=1200, metadata={"help": "Training steps of each task adapter."})
    model_learning_rate: float = field(default=3e-3, metadata={"help": "That of a new model."})
    max_seq_length: int = field(default=48, metadata={"help": "Tokens per example; the rest is cut off."})
    vocabulary: int = field(default=1500, metadata={"help": "Word pieces of a new model, shared by both languages."})
    hidden_size: int = field(default=64, metadata={"help": "Width of a new model."})
    layers: int = field(default=2, metadata={"help": "Layers of a new model."})


def parse_arguments() -> tuple[Arguments, AdapterTrainingArguments]:
    return HfArgumentParser((Arguments, AdapterTrainingArguments)).parse_args_into_dataclasses()


# --- Reading data ----------------------------------------------------------------------------------------------------


def read(path: str) -> str:
    file = Path(path)
    if not file.is_file():
        raise AdapterError(f"{path}: there is no such file; it must exist.")
    raw = file.read_bytes()
    return (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")


def read_treebank(path: str) -> list[Sentence]:
    """Words and universal tags; parts of contractions (`zum` = `zu dem`) count, the contraction itself does not."""
    sentences: list[Sentence] = []
    for block in read(path).strip().split("\n\n"):
        rows = [line.split("\t") for line in block.split("\n") if line and not line.startswith("#")]
        words = [row for row in rows if row[0].isdigit()]
        if unknown := [row[3] for row in words if row[3] not in TAGS]:
            raise AdapterError(f"{path}: {unknown[0]!r} is no universal part of speech; they are {', '.join(TAGS)}.")
        sentences.append(([row[1] for row in words], [row[3] for row in words]))
    return sentences


def read_text(path: str) -> list[str]:
    """Paragraphs: the lines of a text file, the sentences of a treebank, or contexts and questions of SQuAD."""
    name = path.removesuffix(".gz")
    if name.endswith(".conllu"):
        return [line.removeprefix("# text = ") for line in read(path).split("\n") if line.startswith("# text = ")]
    if name.endswith(".json"):
        paragraphs = [paragraph for article in json.loads(read(path))["data"] for paragraph in article["paragraphs"]]
        questions = [answered["question"] for paragraph in paragraphs for answered in paragraph["qas"]]
        return [paragraph["context"] for paragraph in paragraphs] + questions
    return [line for line in read(path).split("\n") if line.strip()]


def read_texts(paths: Sequence[str]) -> list[str]:
    texts = list(chain.from_iterable(read_text(path) for path in paths))
    if not texts:
        raise AdapterError(f"{', '.join(paths)}: there is no text in it; it must have some.")
    return texts


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """The texts one after the other, cut into pieces of `length` tokens."""
    tokens = list(chain.from_iterable(tokenizer(list(texts))["input_ids"]))
    pieces = [tokens[start : start + length] for start in range(0, max(len(tokens) - length, 0) + 1, length)]
    return Dataset.from_dict({"input_ids": pieces})


def tokenize(sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """The tag of a word stands at its first piece."""
    encoded = tokenizer([words for words, _ in sentences], is_split_into_words=True, truncation=True, max_length=length)
    labels = []
    for row, (_, tags) in enumerate(sentences):
        words = encoded.word_ids(row)
        starts = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels.append([TAGS.index(tags[word]) if start else IGNORED for word, start in zip(words, starts, strict=True)])
    return Dataset.from_dict({"input_ids": encoded["input_ids"], "labels": labels})


# --- Model -----------------------------------------------------------------------------------------------------------


def new_tokenizer(texts: Sequence[str], args: Arguments) -> PreTrainedTokenizerBase:
    """Word pieces of both languages."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=args.vocabulary, special_tokens=SPECIAL))
    ends = [(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def new_model(tokenizer: PreTrainedTokenizerBase, args: Arguments) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden_size // 32),
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=args.max_seq_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoAdapterModel.from_config(config)


# --- Training and evaluation -----------------------------------------------------------------------------------------


class Stage:
    """What all trainings have in common."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, training: AdapterTrainingArguments):
        self.model, self.tokenizer, self.training = model, tokenizer, training

    def train(self, name: str, data: Dataset, steps: int, whole: bool = False, rate: float | None = None) -> None:
        """By the active head; `whole`: the model itself and not the active adapters."""
        args = replace(
            self.training,
            output_dir=str(Path(self.training.output_dir) / name),
            max_steps=steps,
            learning_rate=rate or self.training.learning_rate,
        )
        logger.info("Training %s: %d examples, %d steps", name, len(data), steps)
        kind = Trainer if whole else AdapterTrainer
        result = kind(self.model, args, data_collator=self.collator(data), train_dataset=data).train()
        logger.info("Trained %s: loss %.3f, %.0f s", name, result.training_loss, result.metrics["train_runtime"])

    def collator(self, data: Dataset) -> Callable[..., Any]:
        if "labels" in data.column_names:
            return DataCollatorForTokenClassification(self.tokenizer)
        return DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=0.15)

    def accuracy(self, data: Dataset) -> float:
        """The share of words that the active adapters and head give their tag."""
        args = replace(self.training, output_dir=str(Path(self.training.output_dir) / "evaluation"))
        trainer = Trainer(
            self.model,
            args,
            data_collator=self.collator(data),
            compute_metrics=tagged,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        return trainer.evaluate(data)["eval_accuracy"]


def tagged(evaluated: EvalPrediction) -> dict[str, float]:
    counted = evaluated.label_ids != IGNORED
    return {"accuracy": float(np.mean(evaluated.predictions[counted] == evaluated.label_ids[counted]))}


def train_languages(stage: Stage, texts: dict[str, Dataset], args: Arguments) -> None:
    """A language adapter for each language, by masked language modeling with the model's own head."""
    for language, data in texts.items():
        stage.model.add_adapter(language, args.language_config)
        stage.model.train_adapter(language)
        stage.model.active_head = LANGUAGE_HEAD
        stage.train(language, data, args.language_steps)


def train_tasks(stage: Stage, data: Dataset, args: Arguments) -> None:
    """The task adapter on top of the source language's, which stays as it is; another one without, to compare with."""
    for name, setup in {TASK: Stack(SOURCE, TASK), ALONE: Stack(ALONE)}.items():
        stage.model.add_adapter(name, args.task_config)
        stage.model.add_tagging_head(name, num_labels=len(TAGS), id2label=dict(enumerate(TAGS)))
        stage.model.train_adapter(name)  # what trains
        stage.model.set_active_adapters(setup)  # what acts, with the head of its last adapter
        stage.train(name, data, args.task_steps)


def evaluate(stage: Stage, tests: dict[str, Dataset]) -> dict[str, dict[str, float]]:
    """The accuracy in each language with each setup."""
    setups = {
        "task on the source language's adapter": Stack(SOURCE, TASK),
        "task on the target language's adapter": Stack(TARGET, TASK),
        "the same task adapter, no language": Stack(TASK),
        "task trained and used without language": Stack(ALONE),
    }
    found: dict[str, dict[str, float]] = {}
    for name, setup in setups.items():
        stage.model.set_active_adapters(setup)
        found[name] = {language: stage.accuracy(data) for language, data in tests.items()}
    return found


def report(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """A table of the accuracies, and what they say of transfer."""
    yield f"{'accuracy of tags':40} {'source':>8} {'target':>8}"
    for name, accuracies in found.items():
        yield f"{name:40} {accuracies[SOURCE]:8.3f} {accuracies[TARGET]:8.3f}"
    kept, swapped, _, alone = (accuracies[TARGET] for accuracies in found.values())
    for what, other in {"with the source language's adapter": kept, "without any": alone}.items():
        verdict = "better" if swapped > other else "NOT better"
        difference = f"{swapped - other:+.3f}"
        yield f"Zero-shot transfer is {verdict} with the target language's adapter than {what}: {difference}"


def main() -> None:
    args, training = parse_arguments()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, stream=sys.stdout, datefmt="%H:%M:%S")
    set_seed(training.seed)
    training.dataloader_pin_memory &= training.device.type != "cpu"
    training.label_names = ["labels"]
    texts = {SOURCE: read_texts(args.source_text), TARGET: read_texts(args.target_text)}
    treebanks = {name: read_treebank(getattr(args, name)) for name in ("source_train", "source_test", "target_test")}

    if args.model_name_or_path is None:
        tokenizer = new_tokenizer(list(chain.from_iterable(texts.values())), args)
        model = new_model(tokenizer, args)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
    stage = Stage(model, tokenizer, training)
    packed = {language: pack(lines, tokenizer, args.max_seq_length) for language, lines in texts.items()}
    data = {name: tokenize(sentences, tokenizer, args.max_seq_length) for name, sentences in treebanks.items()}

    if LANGUAGE_HEAD not in model.heads:
        model.add_masked_lm_head(LANGUAGE_HEAD)
        model.freeze_model(args.model_name_or_path is not None)
        both = Dataset.from_dict({"input_ids": [*packed[SOURCE]["input_ids"], *packed[TARGET]["input_ids"]]})
        stage.train("model", both, args.model_steps, whole=True, rate=args.model_learning_rate)
    train_languages(stage, packed, args)
    train_tasks(stage, data["source_train"], args)
    found = evaluate(stage, {SOURCE: data["source_test"], TARGET: data["target_test"]})
    model.save_all_adapters(training.output_dir)
    print(*report(found), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_madx.py: {error}")
