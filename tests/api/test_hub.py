"""Adapters from and to the Hugging Face Hub and from URLs, with a stand-in server on this machine; and its failures."""

import copy
import hashlib
import io
import json
import re
import shutil
import tarfile
import warnings
import zipfile

import huggingface_hub
import pytest
import torch
from hub_server import running
from transformers import BertConfig

import adapters
from adapters import AutoAdapterModel, CheckpointError, ConfigError, Fuse, Stack, UnknownAdapterError

BERT = BertConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, pad_token_id=0
)
TOKENS = torch.tensor([[3, 5, 7], [2, 4, 6]])


def base():
    torch.manual_seed(0)
    return AutoAdapterModel.from_config(copy.deepcopy(BERT)).eval()


def trained(seed=1):
    """A model with two adapters, a fusion and a head."""
    model = base()
    torch.manual_seed(seed)
    for name in ("a", "b"):
        model.add_adapter(name, config="seq_bn[reduction_factor=4]")
    model.add_adapter_fusion(["a", "b"])
    model.add_classification_head("a", num_labels=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter" in name or "heads" in name:
                parameter.copy_(torch.randn_like(parameter) / 4)
    model.set_active_adapters("a")
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trained().save_adapter(folder / "first", "a")
    trained(2).save_adapter(folder / "second", "a")
    trained().save_adapter_setup(folder / "setup", Stack("b", "a"), head_setup="a")
    return folder


def state(model):
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    return tensors, model.adapters_config.to_dict(), [*model.heads], model.active_adapters


def as_it_was(model, before):
    now = state(model)
    assert now[1:] == before[1:] and now[0].keys() == before[0].keys()
    assert all(torch.equal(value, before[0][key]) for key, value in now[0].items())


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_an_adapter_and_its_revisions(hub, saved):
    hub.add("org/name", saved / "first")
    hub.add("org/name", saved / "second", "v2")
    for revision, model in ((None, trained()), ("v2", trained(2))):
        loaded = base()
        assert loaded.load_adapter("org/name", version=revision, set_active=True) == "a"
        assert torch.equal(logits(loaded), logits(model))
    assert base().load_adapter("org/name", revision="v2") == "a"


def test_what_was_downloaded_is_kept(hub, saved):
    hub.add("org/name", saved / "first")
    base().load_adapter("org/name")
    downloads = [path for verb, path in hub.requests if verb == "GET" and "resolve" in path]
    assert len(downloads) == 4
    base().load_adapter("org/name")
    assert [path for verb, path in hub.requests if verb == "GET" and "resolve" in path] == downloads


@pytest.mark.parametrize("way", ["local_files_only", "offline", "down"])
def test_without_a_network_the_cache_is_read(way, hub, saved, monkeypatch):
    hub.add("org/name", saved / "first")
    with pytest.raises(CheckpointError, match="the Hub cannot be reached, nor is it in the local cache"):
        base().load_adapter("org/name", local_files_only=True)
    base().load_adapter("org/name")
    if way == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif way == "down":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    loaded = base()
    loaded.load_adapter("org/name", set_active=True, **{"local_files_only": True} if way == "local_files_only" else {})
    assert torch.equal(logits(loaded), logits(trained()))


def test_a_token_opens_private_and_gated_repositories(hub, saved, tmp_path):
    for name, kind in (("org/private", hub.private), ("org/gated", hub.gated)):
        hub.add(name, saved / "first")
        kind.add(name)
        assert base().load_adapter(name, token=hub.token, cache_dir=tmp_path / "mine") == "a"
    assert (tmp_path / "mine").is_dir()


def test_a_setup(hub, saved):
    hub.add("org/setup", saved / "setup")
    model = base()
    setup, heads = model.load_adapter_setup("org/setup", set_active=True)
    assert (setup, heads) == (Stack("b", "a"), "a")
    other = trained()
    other.set_active_adapters(setup)
    assert torch.equal(logits(model), logits(other))


def fails(failure):
    def prepare(hub, saved):
        hub.add("org/name", saved / "first")
        hub.failure = failure

    return prepare


FAILURES = {
    "unknown": (lambda hub, saved: None, "the Hub has no such repository, .*404 or 401"),
    "private": (lambda hub, saved: (hub.add("org/name", saved / "first"), hub.private.add("org/name")), "404 or 401"),
    "gated": (lambda hub, saved: (hub.add("org/name", saved / "first"), hub.gated.add("org/name")), "is gated: accept"),
    "no revision": (lambda hub, saved: hub.add("org/name", saved / "first", "other"), "has no such revision"),
    "server error": (fails("broken"), "the Hub cannot be reached|its download from the Hub failed"),
    "timeout": (fails("slow"), r"its download from the Hub failed \(ReadTimeout"),
    "truncated": (fails("truncated"), "its download from the Hub failed"),
    "wrong content": (
        fails("wrong content"),
        "'adapter.safetensors' and 'model_head.safetensors': the content is not what the Hub has",
    ),
    "no adapter": (
        lambda hub, saved: hub.repositories.update({"org/name": {"main": {"config.json": b"{}"}}}),
        r"adapter_config\.json': No such file",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_says_what_it_is_and_leaves_the_model(case, hub, saved):
    prepare, message = FAILURES[case]
    prepare(hub, saved)
    model = trained(3)
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of retries
        with pytest.raises(CheckpointError, match=message):
            model.load_adapter("org/name", set_active=True)
    as_it_was(model, before)
    if hub.failure:  # nothing broken stays in the cache
        hub.failure = ""
        assert model.load_adapter("org/name") == "a"


def test_names_of_the_former_archive_are_explained(hub):
    with pytest.raises(CheckpointError, match=r"archive of task/adapter@organisation is gone"):
        base().load_adapter("sentiment/sst-2@ukp")


# --- uploading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """A model whose base model can be loaded from a directory."""
    base().base_model.save_pretrained(tmp_path / "base")
    model = AutoAdapterModel.from_pretrained(tmp_path / "base").eval()
    source = trained()
    source.save_adapter_setup(tmp_path / "setup", Fuse("a", "b"), head_setup="a")
    model.load_adapter_setup(tmp_path / "setup")
    return model


def snippet(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def run(code):
    names = {}
    exec(code, names)
    return names["model"].eval()


def test_what_is_pushed_has_a_card_whose_code_runs(hub, published):
    card = {"language": ["en"], "license": "apache-2.0", "results": {"accuracy": 0.91234, "n": 7}, "tags": ["mine"]}
    details = {"datasets_tag": "sst2", "token": hub.token, "adapter_card_kwargs": card}
    published.push_adapter_to_hub("org/new", "a", **details)
    files = hub.repositories["org/new"]["main"]
    assert {*files} == {
        "README.md", "adapter.safetensors", "adapter_config.json", "head_config.json", "model_head.safetensors"
    }  # fmt: skip
    text = files["README.md"].decode()
    found = huggingface_hub.ModelCard(text).data
    assert found.tags == ["adapter-transformers", "bert", "mine"]
    assert (found.library_name, found.datasets, found.language) == ("adapters", ["sst2"], ["en"])
    assert (found.license, found.metrics) == ("apache-2.0", ["accuracy", "n"])
    assert "| accuracy | 0.9123 |\n| n | 7 |" in text
    assert "prediction head for classification" in text
    model = run(snippet(text))
    published.set_active_adapters("a")
    assert torch.equal(logits(model), logits(published))
    assert [info.model_name for info in adapters.list_adapters()] == [published.model_name]
    assert adapters.list_adapters("another") == []
    info = adapters.get_adapter_info("org/new")
    assert (info.source, info.adapter_id, info.username) == ("hf", "org/new", "org")
    assert len(info.sha1_checksum) == 40
    assert adapters.get_adapter_info("org/nothing") is None


def test_a_setup_is_pushed(hub, published):
    published.push_adapter_setup_to_hub("org/setup", Fuse("a", "b"), head_setup="a", token=hub.token)
    files = hub.repositories["org/setup"]["main"]
    assert {"adapter_setup.json", "a/adapter.safetensors", "a,b/model_adapter_fusion.safetensors"} <= {*files}
    model = run(snippet(files["README.md"].decode()))
    published.set_active_adapters(Fuse("a", "b"))
    published.active_head = "a"
    assert torch.equal(logits(model), logits(published))


def test_a_card_of_ones_own_stays(hub, published, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    push = {"local_path": tmp_path / "mine", "token": hub.token}
    published.push_adapter_to_hub("org/new", "a", **push)
    assert hub.repositories["org/new"]["main"]["README.md"] == b"mine"
    published.push_adapter_to_hub("org/new", "a", overwrite_adapter_card=True, **push)
    assert b"adapter-transformers" in hub.repositories["org/new"]["main"]["README.md"]


def test_pushes_that_fail(hub, published):
    with pytest.raises(CheckpointError, match=r"upload to 'org/new': .*401.* Pass a token"):
        published.push_adapter_to_hub("org/new", "a", token="hf_wrong")
    with pytest.raises(UnknownAdapterError, match="no adapter of that name; known are 'a' and 'b'"):
        published.push_adapter_to_hub("org/new", "zzz", token=hub.token)
    with pytest.raises(ConfigError, match="'licence'; did you mean 'license'"):
        published.push_adapter_to_hub("org/new", "a", adapter_card_kwargs={"licence": "mit"})
    with pytest.raises(ConfigError, match="results is 3; give a text, or values by metric"):
        published.push_adapter_to_hub("org/new", "a", adapter_card_kwargs={"results": 3})
    assert hub.repositories == {}


def test_a_hub_that_cannot_be_asked(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for ask in (lambda: adapters.list_adapters(), lambda: adapters.get_adapter_info("org/name")):
        with pytest.raises(CheckpointError, match="the Hub cannot be asked"):
            ask()


# --- archives and URLs ------------------------------------------------------------------------------------------------


def packed(folder, kind):
    stream = io.BytesIO()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, f"name/{file.relative_to(folder)}")
    else:
        with tarfile.open(fileobj=stream, mode=f"w:{kind.partition('.')[2]}") as archive:
            for file in files:
                archive.add(file, f"name/{file.relative_to(folder)}")
    return stream.getvalue()


KINDS = ["zip", "tar", "tar.gz", "tar.xz"]


@pytest.mark.parametrize("kind", KINDS)
def test_archives_from_a_url_and_from_here(kind, hub, saved, tmp_path):
    content = packed(saved / "first", kind)
    hub.plain[f"files/a.{kind}"] = content
    (tmp_path / f"a.{kind}").write_bytes(content)
    for place in (f"{hub.url}/files/a.{kind}", tmp_path / f"a.{kind}"):
        model = base()
        model.load_adapter(place, set_active=True)
        assert torch.equal(logits(model), logits(trained()))


def test_a_setup_in_an_archive(hub, saved):
    hub.plain["setup.zip"] = packed(saved / "setup", "zip")
    assert base().load_adapter_setup(f"{hub.url}/setup.zip")[0] == Stack("b", "a")


def test_a_url_is_downloaded_once_per_version(hub, saved, monkeypatch):
    url = f"{hub.url}/a.zip"
    hub.plain["a.zip"], hub.headers = packed(saved / "first", "zip"), {"ETag": '"1"'}
    with pytest.raises(CheckpointError, match="downloads are off"):
        base().load_adapter(url, local_files_only=True)
    base().load_adapter(url)
    hub.plain["a.zip"] = b"not an archive, but not read either"
    base().load_adapter(url)
    hub.plain["a.zip"], hub.headers = packed(saved / "second", "zip"), {"ETag": '"2"'}
    model = base()
    model.load_adapter(url, set_active=True)
    assert torch.equal(logits(model), logits(trained(2)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    base().load_adapter(url)
    assert len(hub.requests) == asked


def test_a_checksum_and_a_token(hub, saved, tmp_path):
    content = hub.plain["a.zip"] = packed(saved / "first", "zip")
    url = f"{hub.url}/a.zip"
    base().load_adapter(url, checksum=hashlib.sha1(content).hexdigest())
    base().load_adapter(url, checksum=hashlib.sha256(content).hexdigest().upper(), checksum_algo="sha256")
    with pytest.raises(CheckpointError, match=r"its sha1 is .*, not 12"):
        base().load_adapter(url, checksum="12")
    hub.headers = {"needs token": "yes"}
    with pytest.raises(CheckpointError, match=r"no access; pass token=\.\.\. \(HTTP 401"):
        base().load_adapter(url)
    base().load_adapter(url, token="any")
    with pytest.raises(ConfigError, match="'checksum' is for URLs"):
        base().load_adapter("org/name", checksum="12")


URL_FAILURES = {
    "unknown": ({}, "", r"there is no such file \(HTTP 404"),
    "no archive": ({"a.zip": b"hello"}, "", "is neither a zip nor a tar file"),
    "truncated": ({"a.zip": b"PK" * 100}, "truncated", "100 of 200 bytes arrived|IncompleteRead"),
    "timeout": ({"a.zip": b"PK" * 100}, "slow", "the download failed: .*timed out"),
    "server error": ({"a.zip": b""}, "broken", r"the server cannot answer now \(HTTP 500"),
}


@pytest.mark.parametrize("case", URL_FAILURES)
def test_a_failing_url_leaves_the_model(case, hub, tmp_path):
    hub.plain, hub.failure, message = URL_FAILURES[case]
    model = trained(3)
    before = state(model)
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(f"{hub.url}/a.zip")
    as_it_was(model, before)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_url_that_is_none():
    with pytest.raises(CheckpointError, match="the download failed: Invalid IPv6 URL"):
        base().load_adapter("http://[bad")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a.zip"])
def test_only_http_is_spoken(url):
    with pytest.raises(CheckpointError, match="only http and https"):
        base().load_adapter(url)


def test_a_copied_cache_is_read(saved, tmp_path, hub):
    """Folders without links, as on systems that have none."""
    hub.add("org/name", saved / "first")
    base().load_adapter("org/name", cache_dir=tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=False)
    assert base().load_adapter("org/name", cache_dir=tmp_path / "two", local_files_only=True) == "a"
    assert json.loads((saved / "first/adapter_config.json").read_text())["name"] == "a"
