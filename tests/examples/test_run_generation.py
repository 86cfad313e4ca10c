"""run_generation.py as a user starts it: texts with and without an adapter, options, mistakes."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_runs import load_script, write_model
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

import adapters
from adapters.errors import AdapterError

COMMAND = "--model_type=gpt2 --model_name_or_path=gpt2 --use_cpu --prompt hello"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a GPT-2, an adapter that changes what it says, and no network."""
    write_model(tmp_path / "gpt2", ["hello world this is a test of words"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    set_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3, **size))
    model.save_pretrained(tmp_path / "gpt2")
    adapters.init(model)
    model.add_adapter("poems", config="lora")
    for name, parameter in model.named_parameters():
        if "poems" in name:
            torch.nn.init.normal_(parameter)
    model.save_adapter(str(tmp_path / "poems"), "poems")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    script: ModuleType = load_script("text-generation/run_generation.py")

    def start(line: str) -> list[str]:
        """The texts that it prints."""
        monkeypatch.setattr(sys, "argv", ["run_generation.py", *COMMAND.split(), *line.split()])
        capsys.readouterr()
        script.main()
        lines = capsys.readouterr().out.splitlines()
        texts = len(lines) // 2
        assert lines[::2] == [f"=== GENERATED SEQUENCE {number} ===" for number in range(1, texts + 1)]
        return lines[1::2]

    return start


def test_an_adapter_changes_the_text(run: Callable[[str], list[str]]):
    plain, again, adapted = run(""), run(""), run("--load_adapter=poems")
    assert plain == again != adapted and plain[0].startswith("hello")


def test_options(run: Callable[[str], list[str]]):
    assert len(run("--num_return_sequences 3 --length 5 --k 5 --p 0.5")) == 3
    (text,) = run("--temperature 0 --length 9")
    written = text.removeprefix("hello")
    stop = written.split()[-1]
    assert run(f"--temperature 0 --length 9 --stop_token {stop}") == ["hello" + written.split(stop)[0]] != [text]
    assert len(run("--temperature 0 --num_return_sequences 2")) == 2
    assert run("--prefix this --length 3")[0].startswith("hello")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model_type opt", "the model is a 'gpt2'"),
        ("--length 0", "length=0: it is too small"),
        ("--p 2", "p=2.0: it is no share"),
        ("--xlm_language en", "xlm_language='en': unknown"),
    ],
)
def test_mistakes_are_told(run: Callable[[str], list[str]], line: str, message: str):
    with pytest.raises(AdapterError, match=message):
        run(line)
