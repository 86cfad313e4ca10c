"""The commands of one example's page, run as they stand there on the data that the page makes."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from example_runs import DATA, SCRIPTS
from test_readmes import commands

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def make_data(folder: str, holding: str) -> None:
    """Runs the Python block of the page that has `holding` in it, in the working directory."""
    page = (SCRIPTS / folder / "README.md").read_text("utf-8")
    (block,) = (block for block in BLOCK.findall(page) if holding in block)
    exec(compile(block.replace("../../../../shared/data", str(DATA)), f"{folder}/README.md", "exec"), {})


def command_of(folder: str, holding: str) -> list[str]:
    """The command of the page with `holding` among its words."""
    (command,) = (words for words in commands(SCRIPTS / folder / "README.md") if holding in words)
    return command[1:]


def run(script: ModuleType, command: list[str], more: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the command, and what shortens it; returns its output folder."""
    always = "--cache_dir cache --use_cpu --disable_tqdm True --report_to none"
    words = [*command, *always.split(), *more.split()]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    return Path(words[len(words) - words[::-1].index("--output_dir")])


def tiny_tokenizer(words: list[str], special: list[str], **settings: Any) -> Any:
    """A tokenizer that knows these words; the first special tokens are those of padding, end and unknown words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special[:3], strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=special[3:], **names, **settings
    )
