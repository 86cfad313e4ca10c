"""Trains and evaluates a parser of dependencies, as an adapter or as a whole.

    python run_udp.py --model_name_or_path bert-base-cased --task_name en_ewt --train_file en_ewt-ud-train.conllu \
        --validation_file en_ewt-ud-dev.conllu --do_train --do_eval --output_dir out/en_ewt --train_adapter

The parser is biaffine (Glavaš and Vulić 2021, arXiv:2008.06788). README.md has more command lines;
`python run_udp.py --help` has every option.
"""

import gzip
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from adapters import AdapterArguments, AdapterTrainer, AutoAdapterModel, setup_adapter_training
from adapters.errors import AdapterError
from adapters.training import AdapterTrainingArguments, parse_options, set_up_logging

logger = logging.getLogger(__name__)

RELATIONS = "_ acl advcl advmod amod appos aux case cc ccomp clf compound conj cop csubj dep det discourse dislocated "
RELATIONS += "expl fixed flat goeswith iobj list mark nmod nsubj nummod obj obl orphan parataxis punct reparandum root "
RELATIONS += "vocative xcomp"
LABELS = RELATIONS.split()
"""Universal relations, without their subtypes; `_` where there is none."""
NO_WORD, UNKNOWN = -1, -2
"""In place of the number of a head: there is no word, or its head is not known."""
WORDS_AS_IN_TEXT = ("bloom", "deberta", "gpt2", "longformer", "roberta")
"""Models whose tokenizers tell a word by the space before it."""


# --- Options ---------------------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments:
    task_name: str = field(metadata={"help": "The treebank, en_ewt say: the adapter is called ud_<task>."})
    dataset_name: str = field(
        default="universal_dependencies",
        metadata={"help": "Dataset, if no files are given: on the Hub, or a local folder."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration; else the task's name."})
    train_file: str | None = field(default=None, metadata={"help": "Treebank in CoNLL-U, also gzipped."})
    validation_file: str | None = field(default=None, metadata={"help": "Treebank in CoNLL-U, also gzipped."})
    test_file: str | None = field(default=None, metadata={"help": "The same; its heads may be `_`, not known."})
    max_seq_length: int = field(default=128, metadata={"help": "Sentences need fewer tokens than this less two."})
    evaluate_on: str = field(default="validation", metadata={"help": "The split of --do_eval."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew even if it was done before."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training sentences."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many sentences to evaluate."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many test sentences."})


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Pretrained model: a name on the Hub or a local folder."})
    config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it is elsewhere."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, if it is elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    use_fast: bool = field(default=False, metadata={"help": "Use a tokenizer of the tokenizers library."})
    do_lower_case: bool = field(default=False, metadata={"help": "Make all letters small."})
    is_japanese: bool = field(default=False, metadata={"help": "The tokenizer is a Japanese one, with MeCab."})
    mecab_dir: str | None = field(default=None, metadata={"help": "MeCab's mecabrc."})
    mecab_dic_dir: str | None = field(default=None, metadata={"help": "MeCab's dictionary."})
    leave_out_twelvth: bool = field(default=False, metadata={"help": "No adapter in the twelfth layer."})
    replace_embeddings: bool = field(default=False, metadata={"help": "Without effect, as in 1.x."})


@dataclass
class UDTrainingArguments(AdapterTrainingArguments):
    """Best weights are chosen with `load_best_model_at_end`, so that a run that was stopped still knows them."""

    decode_mode: str = field(default="greedy", metadata={"help": "greedy: each word has its best head."})
    store_best_model: bool = field(
        default=False, metadata={"help": "Keep the best weights in best_model/ and use them."}
    )
    metric_score: str | None = field(default=None, metadata={"help": "What is best: uas or las, the default."})

    def __post_init__(self) -> None:
        if self.decode_mode != "greedy":
            raise AdapterError(f"decode_mode={self.decode_mode!r}: there is no such mode; it must be 'greedy'.")
        if self.metric_score not in (None, "uas", "las"):
            raise AdapterError(f"metric_score={self.metric_score!r}: it is not measured; it must be 'uas' or 'las'.")
        if self.store_best_model:
            strategy = self.evaluation_strategy or self.eval_strategy
            if strategy == "no":
                raise AdapterError(
                    "store_best_model=True: nothing is evaluated while training; something must be. Pass "
                    "--eval_strategy epoch."
                )
            self.load_best_model_at_end, self.greater_is_better = True, True
            self.metric_for_best_model = self.metric_score or "las"
            self.save_strategy, self.save_steps = strategy, self.eval_steps or self.logging_steps
        super().__post_init__()


def parse_arguments() -> tuple[ModelArguments, DataTrainingArguments, UDTrainingArguments, AdapterArguments]:
    return parse_options(ModelArguments, DataTrainingArguments, UDTrainingArguments, AdapterArguments)


# --- Reading data ----------------------------------------------------------------------------------------------------


def read_conllu(path: Path) -> Dataset:
    """Words, heads and relations; parts of contractions (`zum` = `zu dem`) count, the contraction itself does not."""
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such file; it must exist.")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: it is not UTF-8 ({error}); it must be. Convert it, with iconv say.") from error
    except (EOFError, OSError) as error:
        raise AdapterError(
            f"{path}: it cannot be unpacked ({error}); a name in .gz must be of a gzipped file."
        ) from error
    sentences: dict[str, list[list[str]]] = {"tokens": [], "head": [], "deprel": []}
    words: list[tuple[str, str, str]] = []
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], start=1):
        if not line.strip():
            for column, values in zip(sentences.values(), zip(*words, strict=True), strict=False):
                column.append(list(values))
            words = []
        elif not line.startswith("#"):
            fields = line.split("\t")
            if len(fields) != 10:
                raise AdapterError(
                    f"{path}, line {number}: it has {len(fields)} fields between tabs; in CoNLL-U it must have 10."
                )
            if fields[0].isdigit():
                words.append((fields[1], fields[6], fields[7]))
    return Dataset.from_dict(sentences)


def read_data(data_args: DataTrainingArguments, model_args: ModelArguments) -> DatasetDict:
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    if any(files.values()):
        return DatasetDict({split: read_conllu(Path(file)) for split, file in files.items() if file})
    name, config = data_args.dataset_name, data_args.dataset_config_name
    if name == "universal_dependencies":
        config = config or data_args.task_name
    try:
        return load_dataset(name, config, cache_dir=model_args.cache_dir)
    except (ConnectionError, FileNotFoundError, RuntimeError, ValueError) as error:
        raise AdapterError(
            f"dataset_name={name!r}: {config or 'it'} cannot be read ({error}); it must be a dataset of the Hub or a "
            "local folder. Or pass --train_file and --validation_file, in CoNLL-U."
        ) from error


def choose_splits(data: DatasetDict, training_args: UDTrainingArguments, evaluate_on: str) -> dict[str, str]:
    """What is to be done, and the split that it needs."""
    wanted = {"train": ("train", training_args.do_train), "predict": ("test", training_args.do_predict)}
    wanted["eval"] = evaluate_on, training_args.do_eval or training_args.eval_strategy != "no"
    for split, needed in wanted.values():
        if needed and split not in data:
            raise AdapterError(f"There is no {split} data, only {', '.join(data)}; what is to be done needs it.")
    return {kind: split for kind, (split, needed) in wanted.items() if needed}


def arcs_of(row: Mapping[str, Any], place: str, known: bool) -> tuple[list[str], list[int], list[int]]:
    """The words, the number of each word's head, 0 for the root, and of its relation.

    In `datasets` a contraction stands before its parts, with the head None.
    """
    rows = [
        (word, str(head), relation.split(":")[0])
        for word, head, relation in zip(row["tokens"], row["head"], row["deprel"], strict=True)
        if str(head) != "None"
    ]
    heads, relations = [], []
    for word, head, relation in rows:
        if head == "_" and not known:
            heads.append(UNKNOWN)
            relations.append(UNKNOWN)
            continue
        if not head.isdigit() or int(head) > len(rows):
            raise AdapterError(f"{place}: {word!r} has the head {head!r}; it must be 0, the root, to {len(rows)}.")
        if relation not in LABELS:
            raise AdapterError(
                f"{place}: {word!r} has the relation {relation!r}; it must be one of {', '.join(LABELS)}."
            )
        heads.append(int(head))
        relations.append(LABELS.index(relation))
    return [word for word, _, _ in rows], heads, relations


def prepare(data: Dataset, kind: str, split: str, data_args: DataTrainingArguments) -> Dataset:
    """The checked split as columns `words`, `labels_arcs` and `labels_rels`, with no more rows than asked for."""
    limits = {"train": data_args.max_train_samples, "eval": data_args.max_eval_samples}
    limit = limits.get(kind, data_args.max_predict_samples)
    data = data if limit is None else data.select(range(min(limit, len(data))))
    if len(data) == 0:
        raise AdapterError(f"The {split} data is empty; it must have at least one sentence.")
    if missing := [name for name in ("tokens", "head", "deprel") if name not in data.column_names]:
        raise AdapterError(
            f"The {split} data has no column {missing[0]}, only {', '.join(data.column_names)}; it must have it."
        )
    columns: dict[str, list[Any]] = {"words": [], "labels_arcs": [], "labels_rels": []}
    for number, row in enumerate(data, start=1):
        parts = arcs_of(row, f"The {split} data, sentence {number}", known=kind != "predict")
        for column, values in zip(columns.values(), parts, strict=True):
            column.append(values)
    return Dataset.from_dict(columns)


# --- Tokens ----------------------------------------------------------------------------------------------------------


def tokenize(data: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments) -> Dataset:
    """The tokens, and in `word_starts` the place of each word's first one and of what comes after the last word.

    The first token stands for the root.
    """
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise AdapterError(f"{type(tokenizer).__name__}: it has neither cls_token nor bos_token; the root must be one.")

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pieces = iter(tokenizer(list(chain.from_iterable(batch["words"])), add_special_tokens=False)["input_ids"])
        ids, starts = [], []
        for words in batch["words"]:
            parts = [next(pieces) or [tokenizer.unk_token_id] for _ in words]
            ids.append([first, *chain.from_iterable(parts), *([] if last is None else [last])])
            starts.append(np.cumsum([1, *map(len, parts)]).tolist())
        return {"input_ids": ids, "word_starts": starts}

    encoded = data.map(encode, batched=True, load_from_cache_file=not data_args.overwrite_cache, desc="Tokenizing")
    room = data_args.max_seq_length - 2
    fitting = [row for row, starts in enumerate(encoded["word_starts"]) if starts[-1] - 1 < room]
    if len(fitting) < len(encoded):
        logger.warning("%d of %d sentences (%s) are left out: they need %d tokens or more",
                       len(encoded) - len(fitting), len(encoded), kind, room)  # fmt: skip
    if not fitting:
        raise AdapterError(
            f"max_seq_length={data_args.max_seq_length}: all sentences ({kind}) are longer; some must be shorter. "
            "Raise it."
        )
    return encoded.select(fitting)


def collate(rows: Sequence[Mapping[str, Any]], padding: int) -> dict[str, torch.Tensor]:
    """A batch, as long as its longest sentence."""

    def padded(name: str, value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)

    batch = {"input_ids": padded("input_ids", padding), "word_starts": padded("word_starts", NO_WORD)}
    batch["attention_mask"] = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], True)
    length = batch["input_ids"].shape[1]
    for name in ("labels_arcs", "labels_rels"):
        labels = padded(name, NO_WORD)
        batch[name] = torch.nn.functional.pad(labels, (0, length - labels.shape[1]), value=NO_WORD)
    return batch


# --- Arcs, metrics and predictions -----------------------------------------------------------------------------------


def decode(scores: tuple[torch.Tensor, ...], labels: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each word the best head in its sentence, and the best relation to it: scores themselves would fill memory."""
    relations, arcs = scores[:2]
    is_word = labels[0] != NO_WORD
    targets = torch.nn.functional.pad(is_word, (1, 0), value=True)  # the root is one
    heads = arcs.masked_fill(~targets[:, None], float("-inf")).argmax(dim=-1)
    chosen = heads[..., None, None].expand(-1, -1, 1, relations.shape[-1])
    return heads, relations.gather(2, chosen)[:, :, 0].argmax(dim=-1)


def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
    """The share of words with the right head (UAS), and with the right relation to it too (LAS), in percent."""
    known = evaluated.label_ids[0] >= 0
    if not known.any():
        return {}
    right = [
        found[known] == wanted[known] for found, wanted in zip(evaluated.predictions, evaluated.label_ids, strict=True)
    ]
    return {"uas": 100 * float(np.mean(right[0])), "las": 100 * float(np.mean(right[0] & right[1]))}


def write_predictions(file: Path, test: Dataset, predictions: Sequence[np.ndarray]) -> None:
    """The sentences with their heads and relations, in CoNLL-U."""
    with file.open("w", encoding="utf-8") as lines:
        for words, heads, relations in zip(test["words"], *predictions, strict=True):
            for number, (word, head, relation) in enumerate(zip(words, heads, relations, strict=False), start=1):
                lines.write("\t".join([str(number), word, *"____", str(head), LABELS[relation], *"__"]) + "\n")
            lines.write("\n")


def write_metrics(file: Path, metrics: Mapping[str, float]) -> None:
    file.write_text("".join(f"{name} = {value}\n" for name, value in sorted(metrics.items())), encoding="utf-8")


# --- Model -----------------------------------------------------------------------------------------------------------


def load_tokenizer_and_model(model_args: ModelArguments) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    name, source = model_args.model_name_or_path, {"cache_dir": model_args.cache_dir}
    config = AutoConfig.from_pretrained(model_args.config_name or name, **source)
    options: dict[str, Any] = {"use_fast": model_args.use_fast, **source}
    if config.model_type in WORDS_AS_IN_TEXT:
        options["add_prefix_space"] = True
    if model_args.do_lower_case:
        options["do_lower_case"] = True
    if model_args.is_japanese:
        options["mecab_kwargs"] = {"mecab_option": f"-r {model_args.mecab_dir} -d {model_args.mecab_dic_dir}"}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **options)
    return tokenizer, AutoAdapterModel.from_pretrained(name, config=config, **source)


def ensure_head(model: PreTrainedModel, name: str) -> None:
    """Gives the model the head `name` for these relations, unless it came with one."""
    if name not in model.heads or model.get_labels(name) != LABELS:
        model.add_dependency_parsing_head(
            name, num_labels=len(LABELS), id2label=dict(enumerate(LABELS)), overwrite_ok=True
        )
    model.active_head = name
    model.heads[name].padding = NO_WORD  # else it is the tokenizer's, and for BERT that is 0, as is the root


# --- Training, evaluation, prediction --------------------------------------------------------------------------------


def record(trainer: Trainer, kind: str, metrics: dict[str, float], data: Dataset) -> None:
    metrics[f"{kind}_samples"] = len(data)
    trainer.log_metrics(kind, metrics)
    trainer.save_metrics(kind, metrics)


def train(trainer: Trainer, checkpoint: str | None, data: Dataset) -> None:
    record(trainer, "train", trainer.train(resume_from_checkpoint=checkpoint).metrics, data)
    trainer.save_model()
    trainer.save_state()
    if trainer.args.store_best_model:
        folder = Path(trainer.args.output_dir) / "best_model"
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            name = trainer.args.metric_for_best_model
            write_metrics(
                folder / "output.txt", {name: trainer.state.best_metric, "step": trainer.state.best_global_step}
            )


def predict(trainer: Trainer, test: Dataset) -> None:
    outputs = trainer.predict(test, metric_key_prefix="predict")
    record(trainer, "predict", outputs.metrics, test)
    if trainer.is_world_process_zero():
        write_predictions(Path(trainer.args.output_dir) / "predictions.conllu", test, outputs.predictions)
        write_metrics(Path(trainer.args.output_dir) / "test_results.txt", outputs.metrics)


def main() -> None:
    model_args, data_args, training_args, adapter_args = parse_arguments()
    set_up_logging(logger, training_args)
    checkpoint = training_args.checkpoint_to_resume()
    set_seed(training_args.seed)
    training_args.dataloader_pin_memory &= training_args.device.type != "cpu"
    training_args.remove_unused_columns, training_args.label_names = False, ["labels_arcs", "labels_rels"]

    data = read_data(data_args, model_args)
    splits = choose_splits(data, training_args, data_args.evaluate_on)
    raw = {kind: prepare(data[split], kind, split, data_args) for kind, split in splits.items()}

    name = f"ud_{data_args.task_name}"
    left_out = {"leave_out": [11]} if model_args.leave_out_twelvth else {}
    tokenizer, model = load_tokenizer_and_model(model_args)
    ensure_head(model, name)
    setup_adapter_training(model, adapter_args, name, left_out, left_out)
    ensure_head(model, name)  # the loaded adapter may have brought another one
    with training_args.main_process_first(desc="tokenizing"):
        ready = {kind: tokenize(part, kind, tokenizer, data_args) for kind, part in raw.items()}

    padding = tokenizer.pad_token_id or 0  # which the attention mask hides
    trainer = (AdapterTrainer if adapter_args.train_adapter else Trainer)(
        model=model,
        args=training_args,
        data_collator=lambda rows: collate(rows, padding),
        train_dataset=ready.get("train"),
        eval_dataset=ready.get("eval"),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=decode,
    )
    if training_args.do_train:
        train(trainer, checkpoint, ready["train"])
    if training_args.do_eval:
        record(trainer, "eval", trainer.evaluate(), ready["eval"])
    if training_args.do_predict:
        predict(trainer, ready["predict"])
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "dependency-parsing"}
    card |= {"dataset_tags": "universal_dependencies", "dataset": f"Universal Dependencies {data_args.task_name}"}
    (trainer.push_to_hub if training_args.push_to_hub else trainer.create_model_card)(**card)


if __name__ == "__main__":
    try:
        main()
    except AdapterError as error:
        sys.exit(f"run_udp.py: {error}")
