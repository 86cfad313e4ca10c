"""run_speech_recognition.py as a user starts it: the command of the page, what is heard, a resumed run, mistakes."""

import csv
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from example_runs import DATA, load_script, results
from pages import command_of, make_data, run, tiny_tokenizer
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, set_seed

import adapters
from adapters.errors import AdapterError

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
FOLDER = "speech"
SHORT = "--max_train_samples 4 --max_eval_samples 2 --max_steps 2 --generation_max_length 8"
SPECIAL = ["<pad>", "<|endoftext|>", "<unk>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>"]
SPECIAL += ["<|translate|>", "<|notimestamps|>", "<|0.00|>"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small Whisper under the name of the page's, and the page's recordings or tones."""
    monkeypatch.chdir(tmp_path)
    if DATA.is_dir() and find_spec("espeakng_loader"):
        make_data(FOLDER, "espeakng_loader")
    else:
        for split in ("train", "dev"):
            with open(f"{split}.csv", "w", encoding="utf-8", newline="") as table:
                rows = csv.writer(table)
                rows.writerow(["audio", "text"])
                for number in range(4):
                    tone = np.sin(np.arange(8000) * 0.05 * (number + 1)).astype("float32")
                    soundfile.write(f"{split}{number}.flac", tone, 8000)
                    rows.writerow([f"{split}{number}.flac", "a good film"])
    tokenizer = tiny_tokenizer(["a", "good", "bad", "film", "the"], SPECIAL)
    tokenizer.save_pretrained("models/whisper-base")
    set_seed(0)
    size = {
        f"{stack}_{name}": value
        for stack in ("encoder", "decoder")
        for name, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 32}.items()
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 3}
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=32, max_source_positions=50, num_mel_bins=16, **size, **ends
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    model.save_pretrained("models/whisper-base")
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained("models/whisper-base")
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(f"{FOLDER}/run_speech_recognition.py")


def test_the_command_of_the_page(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    out = run(script, command_of(FOLDER, "out/reviews"), f"{SHORT} --max_predict_samples 2", monkeypatch)
    assert results(out)["eval_samples"] == 2 and results(out)["eval_wer"] >= 0
    assert len((out / "generated_predictions.txt").read_text("utf-8").splitlines()) == 2
    model = WhisperForConditionalGeneration.from_pretrained("models/whisper-base")
    adapters.init(model)
    assert model.load_adapter(str(out / "speech")) == "speech"


def test_a_resumed_run_ends_as_an_unbroken_one(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    command = [word for word in command_of(FOLDER, "out/reviews") if word != "--overwrite_output_dir"]
    command = [word for word in command if word not in ("--do_eval", "--do_predict")]
    more = "--max_train_samples 4 --max_steps 4 --save_steps 2"
    out = run(script, command, more, monkeypatch)
    wanted = load_file(out / "speech/adapter.safetensors")
    out.rename("WHOLE")
    out.mkdir()
    Path("WHOLE/checkpoint-2").rename(out / "checkpoint-2")
    again = load_file(run(script, command, more, monkeypatch) / "speech/adapter.safetensors")
    assert wanted and all(torch.equal(again[name], value) for name, value in wanted.items())


def test_word_errors(script: ModuleType):
    for said, heard, wrong in (("a b c", "a b c", 0), ("a b c", "a c", 1), ("a b", "x a b y", 2), ("a b", "", 2)):
        assert script.errors(said.split(), heard.split()) == wrong
    assert script.words("It's GOOD, isn't it?") == ["it's", "good", "isn't", "it"]


def test_audio_is_brought_to_the_rate_of_the_model(script: ModuleType, tmp_path: Path):
    tone = np.sin(np.arange(48000) * 2 * np.pi * 440 / 48000).astype("float32")
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, tone], 1), 48000)
    heard = script.read_audio(str(tmp_path / "tone.wav"), 16000)
    assert heard.shape == (16000,) and np.abs(np.fft.rfft(heard)).argmax() == 440


MISTAKES = [
    ("--train_file nowhere.csv", "nowhere.csv: there is no such file"),
    ("--train_file column.csv", "it has no column audio, only file, text"),
    ("--train_file missing.csv", "gone.wav: there is no such file; .*relative to the table"),
    ("--train_file broken.csv", "broken.wav: it cannot be read as audio"),
    ("--language xx", r"language='xx': the model has no token <\|xx\|>"),
    ("--task sing", "task='sing': no such task"),
    ("--max_duration_in_seconds 0.001", "The train data has nothing between 0.0 and 0.001 seconds"),
    ("--text_column_name said", "The train data has no column said"),
    ("--predict_with_generate False", "pass --predict_with_generate too"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_mistakes_are_told(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str):
    Path("broken.wav").write_bytes(b"no audio")
    Path("column.csv").write_text("file,text\na.wav,a\n", "utf-8")
    Path("missing.csv").write_text("audio,text\ngone.wav,a\n", "utf-8")
    Path("broken.csv").write_text("audio,text\nbroken.wav,a\n", "utf-8")
    with pytest.raises(AdapterError, match=message):
        run(script, command_of(FOLDER, "out/reviews"), f"{SHORT} {line}", monkeypatch)
