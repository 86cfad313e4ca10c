"""run_madx.py as a user starts it: two languages, language and task adapters, the table of accuracies."""

import gzip
import re
import sys
from pathlib import Path

import pytest
from example_runs import DATA, load_script

from adapters import AutoAdapterModel, Stack
from adapters.errors import AdapterError

ENGLISH = [("the", "DET"), ("dog", "NOUN"), ("sees", "VERB"), ("a", "DET"), ("cat", "NOUN"), (".", "PUNCT")]
GERMAN = [("der", "DET"), ("Hund", "NOUN"), ("sieht", "VERB"), ("im", "_"), ("Haus", "NOUN"), (".", "PUNCT")]
SHORT = (
    "--output_dir OUT --max_steps 2 --model_steps 3 --language_steps 2 --task_steps 2 --vocabulary 90 --hidden_size 32 "
    "--max_seq_length 16 --per_device_train_batch_size 4 --save_strategy no --use_cpu --disable_tqdm True "
    "--report_to none"
)
script = load_script("madx/run_madx.py")


def treebank(words: list[tuple[str, str]]) -> str:
    """A contraction has a line of its own, in front of its words."""
    lines = ["# sent_id = 1", "# text = " + " ".join(word for word, _ in words)]
    for number, (word, tag) in enumerate(words, 1):
        if tag == "_":
            lines += [f"{number}-{number + 1}\t{word}" + "\t_" * 8, f"{number}\tin\tin\tADP" + "\t_" * 6]
        else:
            lines.append(f"{number}\t{word}\t{word}\t{tag}" + "\t_" * 6)
    return "\n".join(lines) + "\n\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("en.txt").write_text("the dog sees a cat .\n" * 40, "utf-8")
    Path("de.json").write_text(
        '{"data": [{"paragraphs": [{"context": "der Hund sieht das Haus .", "qas": [{"question": "Wer ?"}]}]}]}',
        "utf-8",
    )
    Path("en.conllu").write_text(treebank(ENGLISH) * 12, "utf-8")
    with gzip.open("de.conllu.gz", "wt", encoding="utf-8") as file:
        file.write(treebank(GERMAN) * 4)
    return tmp_path


def start(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run_madx.py", *SHORT.split(), *line.split()])
    script.main()


FILES = (
    "--source_text en.txt en.conllu --target_text de.json de.conllu.gz --source_train en.conllu "
    "--source_test en.conllu --target_test de.conllu.gz"
)


def check_report(text: str) -> None:
    rows = re.findall(r"^(task on the|the same task|task trained).* (\d\.\d{3})  +(\d\.\d{3})$", text, re.MULTILINE)
    assert len(rows) == 4
    assert all(0 <= float(accuracy) <= 1 for row in rows for accuracy in row[1:])
    verdicts = re.findall(r"^Zero-shot transfer is (NOT better|better) with .*: ([+-]\d\.\d{3})$", text, re.MULTILINE)
    assert len(verdicts) == 2
    kept, swapped, _, alone = (float(row[2]) for row in rows)
    for (verdict, difference), other in zip(verdicts, (kept, alone), strict=True):
        assert float(difference) == pytest.approx(swapped - other, abs=1.1e-3)
        assert (verdict == "better") == (swapped > other) or abs(swapped - other) < 1e-3


def test_the_whole_way(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trained: dict[str, set[str]] = {}
    train = script.Stage.train

    def watched(stage, name, *args, **kwargs):
        trained[name] = {key for key, parameter in stage.model.named_parameters() if parameter.requires_grad}
        train(stage, name, *args, **kwargs)

    monkeypatch.setattr(script.Stage, "train", watched)
    start(monkeypatch, FILES)
    check_report(capsys.readouterr().out)
    assert any(".tagging." in key for key in trained["tagging"])
    assert not any(".source." in key or ".target." in key for key in trained["tagging"])
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 128}
    model = AutoAdapterModel.from_config(script.BertConfig(vocab_size=90, **size))
    for name in ("source", "target", "tagging", "tagging_alone"):
        model.load_adapter(str(place / "OUT" / name))
    model.set_active_adapters(Stack("target", "tagging"))
    assert model.active_head == "tagging"
    assert model.get_labels() == script.TAGS
    assert model.get_adapter("source")[-1]  # its invertible part


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (FILES.replace("en.txt", "fr.txt"), "fr.txt: there is no such file"),
        (FILES.replace("--source_train en.conllu", "--source_train bad.conllu"), "'NN' is no universal part of speech"),
        (FILES.replace("en.txt en.conllu", "empty.txt"), "there is no text in it"),
    ],
)
def test_bad_files(line: str, message: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad.conllu").write_text(treebank([("dog", "NN")]), "utf-8")
    Path("empty.txt").write_text("\n", "utf-8")
    with pytest.raises(AdapterError, match=message):
        start(monkeypatch, line)


@pytest.mark.skipif(not DATA.is_dir(), reason="the treebanks and XQuAD are not beside the checkout")
def test_real_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    english, german = DATA / "ud/en_ewt-ud-dev.conllu.gz", DATA / "ud/de_gsd-ud-dev.conllu.gz"
    line = f"--source_text {DATA}/qa/xquad.en.json --target_text {DATA}/qa/xquad.de.json --source_train {english}"
    start(monkeypatch, f"{line} --source_test {english} --target_test {german} --per_device_eval_batch_size 256")
    check_report(capsys.readouterr().out)
