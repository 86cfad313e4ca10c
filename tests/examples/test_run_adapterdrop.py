"""run_adapterdrop.py as a user starts it: the command of the page, how much of a step is saved, resuming, mistakes."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_runs import DATA, load_script, results, write_model
from pages import command_of, make_data, run
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

import adapters
from adapters import AutoAdapterModel
from adapters.errors import AdapterError

FOLDER = "adapterdrop"
SHORT = "--max_train_samples 32 --max_eval_samples 12 --max_steps 2"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small model of six layers under the name of the page's, and the page's data."""
    monkeypatch.chdir(tmp_path)
    if DATA.is_dir():
        make_data(FOLDER, "movieReviewSnippets")
        Path("minilm").unlink(missing_ok=True)
    else:
        for name in ("train", "validation"):
            Path(f"{name}.csv").write_text("sentence,label\n" + "a fine film,good\na dull film,bad\n" * 20, "utf-8")
    write_model(tmp_path / "minilm", ["a fine film . a dull film"], num_hidden_layers=6)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(f"{FOLDER}/run_adapterdrop.py")


def test_the_command_of_the_page(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    dropped: list[int] = []
    drop = script.drop
    monkeypatch.setattr(script, "drop", lambda model, layers: (dropped.append(layers), drop(model, layers)))
    more = f"{SHORT} --max_steps 6 --test_file validation.csv --do_predict --max_predict_samples 3"
    out = run(script, command_of(FOLDER, "out/movies"), more, monkeypatch)
    assert {"eval_accuracy", "eval_drop2_accuracy", "eval_drop4_accuracy"} <= set(results(out))
    steps = dropped[: 2 * 6 : 2]
    assert len(set(steps)) > 1 and set(steps) <= set(range(6)) and dropped[1 : 2 * 6 : 2] == [0] * 6
    assert len((out / "predict_results_glue.txt").read_text("utf-8").splitlines()) == 4
    model = AutoAdapterModel.from_pretrained("minilm")
    model.load_adapter(str(out / "glue"), set_active=True)
    assert model.active_head == "glue" and model.get_labels() == ["bad", "good"]


def test_glue_from_a_folder(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    Path("glue/mrpc").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [{"sentence1": "a film", "sentence2": "a fine film", "label": number % 2} for number in range(8)]
        Path(f"glue/mrpc/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    place.joinpath("minilm").rename("bert-base-uncased")
    command = [word if word != "8" else "5" for word in command_of(FOLDER, "mrpc")]
    command = [word if word != "6" else "3" for word in command]
    out = run(script, command, SHORT, monkeypatch)
    assert {"eval_f1", "eval_drop5_f1"} <= set(results(out)) and (out / "mrpc/adapter.safetensors").is_file()


def test_the_same_layers_are_dropped_in_a_resumed_run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    command = [word for word in command_of(FOLDER, "out/movies") if word != "--overwrite_output_dir"]
    more = "--max_train_samples 32 --max_eval_samples 4 --max_steps 4 --save_strategy steps --save_steps 2"
    out = run(script, command, more, monkeypatch)
    wanted = load_file(out / "glue/adapter.safetensors")
    out.rename("WHOLE")
    out.mkdir()
    Path("WHOLE/checkpoint-2").rename(out / "checkpoint-2")
    again = load_file(run(script, command, more, monkeypatch) / "glue/adapter.safetensors")
    assert wanted and all(torch.equal(again[name], value) for name, value in wanted.items())


# The gradient goes down to the first adapter: a bottleneck's is behind its layer, one of 11 then, LoRA's is in front.
@pytest.mark.parametrize(("config", "passed"), [("seq_bn", 11), ("lora", 12)])
def test_the_backward_pass_is_shorter_by_the_share_of_dropped_layers(script: ModuleType, config: str, passed: int):
    size = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 256}
    model = BertModel(BertConfig(vocab_size=30, **size, hidden_dropout_prob=0.0))
    adapters.init(model)
    model.add_adapter("a", config)
    model.train_adapter("a")
    ids = torch.ones(2, 16, dtype=torch.long)

    def work(layers: int) -> tuple[int, int]:
        """Operations of the forward and of the backward pass."""
        script.drop(model, layers)
        with FlopCounterMode(display=False) as forward:
            loss = model(input_ids=ids).last_hidden_state.square().mean()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        model.zero_grad()
        return forward.get_total_flops(), backward.get_total_flops()

    whole = work(0)
    for layers in (1, 3, 6, 11):
        forward, backward = work(layers)
        assert 1 - backward / whole[1] == pytest.approx(layers / passed, abs=0.02)
        assert 1 - backward / whole[1] == pytest.approx(layers / 12, abs=0.1)
        assert forward <= whole[0]
    assert work(0) == whole


MISTAKES = [
    ("--max_dropped_layers 6", "6 layers to leave out: the adapter has 6 layers; one at least must be left"),
    ("--evaluate_dropped 0 7", "7 layers to leave out"),
    ("--min_dropped_layers -1", "-1 layers to leave out: it must be a number from 0"),
    ("--min_dropped_layers 3 --max_dropped_layers 2", "max_dropped_layers=2: it is less than min_dropped_layers=3"),
    ("--train_file nowhere.csv", "nowhere.csv: there is no such file"),
    ("--text_columns title", "The train data has no column title, only sentence, label"),
    ("--validation_file unseen.csv", "the label 'odd', which is not one of training; it must be one of bad, good"),
    ("--train_file empty.csv", "the file is empty"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_mistakes_are_told(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str):
    Path("empty.csv").touch()
    Path("unseen.csv").write_text("sentence,label\na film,odd\n", "utf-8")
    with pytest.raises(AdapterError, match=message):
        run(script, command_of(FOLDER, "out/movies"), f"{SHORT} {line}", monkeypatch)
