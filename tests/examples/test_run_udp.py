"""run_udp.py as a user starts it: treebanks, words and their tokens, scores of arcs, the best model, mistakes."""

import gzip
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from example_runs import DATA, Run, load_script, results, runner, write_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, EvalPrediction

from adapters import AutoAdapterModel
from adapters.errors import AdapterError

MADE_UP = """# text = im Haus
1-2\tim\t_\t_\t_\t_\t_\t_\t_\t_
1\tin\t_\tADP\t_\t_\t3\tcase\t_\t_
2\tdem\t_\tDET\t_\t_\t3\tdet:poss\t_\t_
3\tHaus\t_\tNOUN\t_\t_\t0\troot\t_\t_

1\tsie\t_\tPRON\t_\t_\t2\tnsubj\t_\t_
1.1\tempty\t_\tX\t_\t_\t_\t_\t_\t_
2\tliest\t_\tVERB\t_\t_\t0\troot\t_\t_
3\t.\t_\tPUNCT\t_\t_\t2\tpunct\t_\t_

"""
# The command of README.md, but for the steps that `runner` limits.
COMMAND = (
    "--model_name_or_path bert-base-cased --task_name en_ewt --train_file en_ewt-ud-train.half.conllu.gz "
    "--validation_file en_ewt-ud-dev.conllu.gz --test_file en_ewt-ud-test.conllu.gz --do_train --do_eval --do_predict "
    "--per_device_train_batch_size 12 --learning_rate 5e-4 --num_train_epochs 10 --max_seq_length 256 "
    "--overwrite_output_dir --store_best_model --evaluation_strategy epoch --metric_score las --train_adapter"
)
FILES = ("en_ewt-ud-train.half", "en_ewt-ud-dev", "en_ewt-ud-test")
SHORT = f"{COMMAND} --max_train_samples 24 --max_eval_samples 8 --max_predict_samples 8"
PLAIN = SHORT.replace("--store_best_model --evaluation_strategy epoch --metric_score las", "")


def treebank(name: str) -> str:
    file = DATA / "ud" / f"{name}.conllu.gz"
    return gzip.decompress(file.read_bytes()).decode() if file.is_file() else MADE_UP * 60


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, the first sentences of the treebanks, and no network."""
    for name in FILES:
        sentences = treebank(name).split("\n\n")[:60]
        (tmp_path / f"{name}.conllu.gz").write_bytes(gzip.compress("\n\n".join(sentences).encode()))
    text = gzip.decompress((tmp_path / f"{FILES[0]}.conllu.gz").read_bytes()).decode()
    words = [line.split("\t")[1] for line in text.splitlines() if line[:1].isdigit()]
    write_model(tmp_path / "bert-base-cased", [*words, "##s", "##e", *"abcdefghijklmnopqrstuvwxyz"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("dependency-parsing/run_udp.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "")


def test_the_command_of_the_page(run: Run, script: ModuleType, place: Path):
    out = run(f"{COMMAND} --max_train_samples 24 --max_eval_samples 8 --max_predict_samples 8", steps=4)
    for kind in ("eval", "predict"):
        measured = results(out, kind)
        assert 0 <= measured[f"{kind}_las"] <= measured[f"{kind}_uas"] <= 100 and measured[f"{kind}_samples"] == 8
    best = (out / "best_model/output.txt").read_text().splitlines()
    assert best[0] == f"las = {results(out)['eval_las']}" and best[1] in ("step = 2", "step = 4")
    assert "predict_uas = " in (out / "test_results.txt").read_text()
    model = AutoAdapterModel.from_pretrained(place / "bert-base-cased")
    assert model.load_adapter(str(out / "best_model/ud_en_ewt"), set_active=True) == "ud_en_ewt"
    assert model.active_head == "ud_en_ewt" and model.get_labels() == script.LABELS
    written, given = (
        script.read_conllu(file) for file in (out / "predictions.conllu", place / f"{FILES[2]}.conllu.gz")
    )
    assert written["tokens"][:] == given["tokens"][:8]


def test_an_adapter_learns_the_arcs_by_heart_and_is_loaded_again(run: Run, place: Path):
    (place / "two.conllu").write_text(MADE_UP)
    line = f"{PLAIN} --train_file two.conllu --validation_file two.conllu --evaluate_on train"
    line = line.replace("--do_predict", "")
    trained = results(run(f"{line} --learning_rate 2e-2", steps=60))
    assert trained["eval_uas"] == trained["eval_las"] == 100
    (place / "OUT").rename(place / "before")
    again = results(run(f"{line.replace('--do_train', '')} --load_adapter before/ud_en_ewt"))
    assert again["eval_las"] == 100 and again["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-4)


def test_a_resumed_run_ends_as_an_unbroken_one_and_knows_the_best(run: Run, place: Path):
    line = f"{SHORT.replace('--overwrite_output_dir', '')} --per_device_train_batch_size 8"
    whole = run(line, steps=6)
    wanted, best = load_file(whole / "ud_en_ewt/adapter.safetensors"), (whole / "best_model/output.txt").read_text()
    whole.rename(place / "WHOLE")
    (place / "OUT").mkdir()
    (place / "WHOLE/checkpoint-3").rename(place / "OUT/checkpoint-3")
    again = run(line, steps=6)
    assert (again / "best_model/output.txt").read_text() == best
    weights = load_file(again / "ud_en_ewt/adapter.safetensors")
    assert wanted and all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_the_whole_model_and_heads_that_are_not_known(run: Run, place: Path):
    (place / "open.conllu").write_text(
        MADE_UP.replace("\t3\t", "\t_\t").replace("\t0\t", "\t_\t").replace("\t2\t", "\t_\t")
    )
    out = run(f"{SHORT.replace('--train_adapter', '')} --test_file open.conllu")
    assert (out / "best_model/model.safetensors").is_file() and "predict_uas" not in results(out, "predict")
    assert len((out / "predictions.conllu").read_text().split("\n\n")) == 3


def test_the_twelfth_layer_has_no_adapter(run: Run, place: Path):
    write_model(place / "deep", ["the", "a", "of"], num_hidden_layers=12)
    out = run(f"{PLAIN} --model_name_or_path deep --leave_out_twelvth --task_name de".replace("--do_predict", ""))
    layers = {int(key.split(".layer.")[1].split(".")[0]) for key in load_file(out / "ud_de/adapter.safetensors")}
    assert layers == set(range(11))


def test_a_table_of_datasets_is_read_as_the_treebank(script: ModuleType, tmp_path: Path):
    (tmp_path / "a.conllu").write_text(MADE_UP)
    options = script.DataTrainingArguments(task_name="de")
    wanted = script.prepare(script.read_conllu(tmp_path / "a.conllu"), "train", "train", options)
    assert wanted[0] == {
        "words": ["in", "dem", "Haus"],
        "labels_arcs": [3, 3, 0],
        "labels_rels": [script.LABELS.index(name) for name in ("case", "det", "root")],
    }
    table = Dataset.from_dict(
        {
            "tokens": [["im", "in", "dem", "Haus"], ["sie", "liest", "."]],
            "head": [["None", "3", "3", "0"], ["2", "0", "2"]],
            "deprel": [["_", "case", "det:poss", "root"], ["nsubj", "root", "punct"]],
        }
    )
    assert list(script.prepare(table, "train", "train", options)) == list(wanted)
    (tmp_path / "own").mkdir()
    table.to_parquet(tmp_path / "own/train.parquet")
    own = script.DataTrainingArguments(task_name="de", dataset_name=str(tmp_path / "own"))
    read = script.read_data(own, script.ModelArguments("x", cache_dir=str(tmp_path / "cache")))
    assert list(script.prepare(read["train"], "train", "train", options)) == list(wanted)


def test_words_begin_at_their_first_token_and_long_sentences_are_left_out(script: ModuleType, tmp_path: Path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "al", "##ice", "met", "bob"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = [["alice", "met", "\u200b", "bob"], ["met"] * 9, ["bob"]]
    data = Dataset.from_dict(
        {"words": words, **{name: [[1] * len(row) for row in words] for name in ("labels_arcs", "labels_rels")}}
    )
    options = script.DataTrainingArguments(task_name="x", max_seq_length=11)
    rows = list(script.tokenize(data, "train", tokenizer, options))
    assert [row["input_ids"] for row in rows] == [[2, 5, 6, 7, 1, 8, 3], [2, 8, 3]]
    assert [row["word_starts"] for row in rows] == [[1, 3, 4, 5, 6], [1, 2]]
    batch = script.collate(rows, padding=0)
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 3]
    assert batch["word_starts"][1].tolist() == [1, 2, -1, -1, -1]
    assert batch["labels_arcs"].shape == batch["input_ids"].shape and batch["labels_arcs"][1].tolist() == [1] + [-1] * 6


def test_heads_are_words_of_the_sentence(script: ModuleType):
    arcs, relations = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4, 38)
    arcs[0, :, 3], arcs[0, 0, 2], arcs[0, 1, 0] = 9, 1, 1  # the third place is no word
    relations[0, 0, 2, 5] = relations[0, 1, 0, 34] = relations[0, 1, 2, 7] = 1
    labels = torch.tensor([[2, 0, -1]]), torch.tensor([[5, 33, -1]])
    heads, chosen = script.decode((relations, arcs), labels)
    assert heads[0, :2].tolist() == [2, 0] and chosen[0, :2].tolist() == [5, 34]
    evaluated = EvalPrediction(
        predictions=(heads.numpy(), chosen.numpy()), label_ids=tuple(row.numpy() for row in labels)
    )
    assert script.compute_metrics(evaluated) == {"uas": 100, "las": 50}


def test_the_loss_counts_arcs_to_the_root(script: ModuleType, place: Path):
    model = AutoAdapterModel.from_pretrained(place / "bert-base-cased")
    script.ensure_head(model, "ud_x")
    head = model.heads["ud_x"]
    arcs, relations = torch.randn(1, 2, 3), torch.randn(1, 2, 3, 38)
    labels = torch.tensor([[0, -1]]), torch.tensor([[33, -1]])
    wanted = -arcs.log_softmax(-1)[0, 0, 0] - relations.log_softmax(-1)[0, 0, 0, 33]
    assert model.config.pad_token_id == 0 and torch.allclose(head.loss(arcs, relations, *labels), wanted)


LINE = "1\ta\t_\t_\t_\t_\t{}\t{}\t_\t_\n"
MISTAKES = [
    ("--train_file nowhere", "nowhere: there is no such file"),
    ("--train_file empty", "The train data is empty"),
    ("--train_file latin", "latin: it is not UTF-8"),
    ("--train_file packed.gz", "packed.gz: it cannot be unpacked"),
    ("--train_file spaces", "spaces, line 2: it has 1 fields"),
    ("--train_file head", "'a' has the head '2'; it must be 0, the root, to 1"),
    ("--train_file open", "'a' has the head '_'"),
    ("--train_file relation", "'a' has the relation 'friend'; it must be one of _, acl"),
    ("--evaluate_on dev", "There is no dev data, only train, validation, test"),
    ("--max_seq_length 3", "all sentences \\(train\\) are longer"),
    ("--decode_mode mst", "decode_mode='mst': there is no such mode"),
    ("--metric_score f1", "metric_score='f1': it is not measured"),
    ("--evaluation_strategy no", "nothing is evaluated while training"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told(run: Run, place: Path, line: str, message: str):
    contents = {"empty": "", "spaces": "# x\n1 a _\n", "head": LINE.format(2, "det"), "open": LINE.format("_", "_")}
    for name, content in {**contents, "relation": LINE.format(0, "friend"), "packed.gz": "x"}.items():
        (place / name).write_text(content)
    (place / "latin").write_bytes("# für\n".encode("latin-1"))
    with pytest.raises(AdapterError, match=message):
        run(f"{SHORT} {line}")


def test_a_dataset_that_is_not_there(script: ModuleType):
    options = script.DataTrainingArguments(task_name="en_ewt", dataset_name="nowhere/treebank")
    with pytest.raises(AdapterError, match=r"dataset_name='nowhere/treebank': .* Or pass --train_file"):
        script.read_data(options, script.ModelArguments("x"))
