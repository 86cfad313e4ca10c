"""Files made to do harm: each is refused with a clear error, writes nothing outside, runs nothing, leaves the model."""

import copy
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig

from adapters import AutoAdapterModel
from adapters.checkpoints import archives, files
from adapters.errors import AdapterError, CheckpointError

BERT = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
MEMORY = 512 << 20


def new_model():
    model = AutoAdapterModel.from_config(copy.deepcopy(BERT)).eval()
    model.add_adapter("a", config="lora[r=2]", set_active=True)
    model.add_adapter("p", config="prefix_tuning_flat[prefix_length=2]")
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A saved adapter, in a directory that is all that may be written to."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "room/cache"))
    monkeypatch.chdir(tmp_path)
    new_model().save_adapter(tmp_path / "room/a", "a")
    return tmp_path / "room/a"


def refused(load, message, room):
    """Loads, which must fail, in bounded memory; afterwards the files and the model are what they were."""
    model = new_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    present = {path: path.read_bytes() for path in room.parent.rglob("*") if path.is_file()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match=message):
        load(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEMORY >> 10
    assert {path: path.read_bytes() for path in room.parent.rglob("*") if path.is_file()} == present
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(model.adapters_config) == {"a", "p"}


# --- archives ---------------------------------------------------------------------------------------------------------


def zipped(**entries):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def zip_with_link():
    stream, link = io.BytesIO(), zipfile.ZipInfo("adapter_config.json")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    return stream.getvalue()


def tarred(name, kind=tarfile.REGTYPE, link="", size=0, content=b""):
    stream, member = io.BytesIO(), tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size or len(content)
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(member, io.BytesIO(content or bytes(min(size, 1))) if member.isreg() and not size else None)
    return stream.getvalue()


def lying_zip():
    """States one byte for an entry of a megabyte."""
    content = bytearray(zipped(x=bytes(1 << 20)))
    for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        struct.pack_into("<I", content, content.index(signature) + offset, 1)
    return bytes(content)


ARCHIVES = {
    "zip slip": (lambda: zipped(**{"../slipped": b"x"}), r"'\.\./slipped' is a path that leads out of its folder"),
    "zip slip below": (lambda: zipped(**{"a/../../slipped": b"x"}), "is a path that leads out"),
    "zip slip absolute": (lambda: zipped(**{"/slipped": b"x"}), "is a path that leads out"),
    "zip slip of Windows": (lambda: zipped(**{"..\\slipped": b"x"}), "is a path that leads out"),
    "zip slip to a drive": (lambda: zipped(**{"C:/slipped": b"x"}), "is a path that leads out"),
    "zip with a link": (zip_with_link, "'adapter_config.json' is a link or a device"),
    "zip bomb": (lambda: zipped(x=bytes(archives.FACTOR_FROM + 1)), "holds more than 268,435,456 bytes"),
    "zip with a lie": (lying_zip, r"truncated or broken \((BadZipFile|EOFError)"),
    "zip cut": (lambda: zipped(x=os.urandom(999))[:500], "is neither a zip nor a tar file"),
    "zip with a name twice": (lambda: two_of_a_name(), r"truncated or broken \(FileExistsError"),
    "zip of many files": (lambda: zipped(**{str(i): b"" for i in range(21)}), "20 files"),
    "zip with a password": (lambda: encrypted(), r"truncated or broken \(RuntimeError: .*password"),
    "tar slip": (lambda: tarred("../slipped", content=b"x"), "is a path that leads out"),
    "tar slip absolute": (lambda: tarred("/slipped", content=b"x"), "is a path that leads out"),
    "tar with a link": (lambda: tarred("adapter_config.json", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device"),
    "tar with a hard link": (lambda: tarred("x", tarfile.LNKTYPE, "/etc/passwd"), "is a link or a device"),
    "tar with a device": (lambda: tarred("x", tarfile.CHRTYPE), "is a link or a device"),
    "tar with a pipe": (lambda: tarred("x", tarfile.FIFOTYPE), "is a link or a device"),
    "tar bomb": (lambda: tarred("x", size=1 << 50), "holds more than 268,435,456 bytes"),
    "tar cut": (lambda: tarred("x", content=bytes(5000))[:1500], "truncated or broken|neither a zip nor a tar"),
    "no archive": (lambda: b"hello", "is neither a zip nor a tar file"),
    "empty": (lambda: b"", "is neither a zip nor a tar file"),
    "an archive of nothing": (lambda: zipped(), r"adapter_config\.json': No such file"),
}


def two_of_a_name():
    return zipped(aa=b"1", ab=b"2").replace(b"ab", b"aa")


def encrypted():
    content = bytearray(zipped(x=b"1"))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + offset] |= 1
    return bytes(content)


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(case, folder, monkeypatch):
    monkeypatch.setattr(archives, "MOST_FILES", 20)
    make, message = ARCHIVES[case]
    room = folder.parent
    (room / "x.archive").write_bytes(make())
    refused(lambda model: model.load_adapter(room / "x.archive"), message, room)
    assert not list(room.parent.rglob("slipped")) and not Path("/slipped").exists()


# --- weights ----------------------------------------------------------------------------------------------------------


class Executed:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def with_header(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def pickled(content):
    return lambda file: file.write_bytes(pickle.dumps(content))


def compressed(file):
    """A file of torch's that was compressed: a megabyte in a kilobyte."""
    torch.save({"a": torch.zeros(1 << 18)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    file.write_bytes(zipped(**entries))


def expanded(file):
    """A tensor of a million rows that are one."""
    torch.save({"bert.prefix_tuning.prefix_tunings.a.x": torch.zeros(1).expand(10**6, 10**6)}, file)


def stored_sizes_that_lie(file):
    """The shape of a tensor in torch's file, made larger than its data."""
    torch.save({"a": torch.arange(3.0)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content.replace(b"K\x03", b"K\xff") if name.endswith(".pkl") else content)


def one(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


SAFE, TORCH = "adapter.safetensors", "pytorch_adapter.bin"
WEIGHTS = {
    "a pickle with code": (TORCH, pickled({"a": Executed("touch slipped")}), "they could run code"),
    "a pickle in torch's form": (TORCH, lambda file: torch.save({"a": Executed("touch slipped")}, file), "run code"),
    "a pickle without end": (TORCH, lambda file: file.write_bytes(b"\x80\x02" + b"(" * 10**5), "truncated, broken"),
    "a pickle named safetensors": (SAFE, pickled({"a": Executed("touch slipped")}), "truncated, broken"),
    "compressed": (TORCH, compressed, "its entries are compressed"),
    "expanded": (TORCH, expanded, r"has shape \(1000000, 1000000\), more than the .* bytes of the file can hold"),
    "sizes that lie": (TORCH, stored_sizes_that_lie, "truncated, broken"),
    "a header without end": (SAFE, lambda f: f.write_bytes(struct.pack("<Q", 1 << 62) + b"{}"), "truncated, broken"),
    "a header too large": (SAFE, lambda f: f.write_bytes(struct.pack("<Q", 99) + b"{}"), "truncated, broken"),
    "a header that is no JSON": (SAFE, lambda f: with_header(f, b"{" * 99), "truncated, broken"),
    "a nested header": (SAFE, lambda f: with_header(f, b'{"a":' * 10**5), "truncated, broken"),
    "a huge shape": (SAFE, lambda f: with_header(f, one(shape=(10**9, 10**9)), bytes(16)), "truncated, broken"),
    "a shape that overflows": (SAFE, lambda f: with_header(f, one(shape=(2**62, 2**62)), bytes(16)), "truncated"),
    "a negative shape": (SAFE, lambda f: with_header(f, one(shape=(-2, 2)), bytes(16)), "truncated, broken"),
    "data beyond the end": (SAFE, lambda f: with_header(f, one(shape=(4, 4), offsets=(0, 64)), bytes(16)), "truncated"),
    "data that overlap": (
        SAFE, lambda f: with_header(f, one() | {"b": one()["a"]}, bytes(16)), "truncated, broken",
    ),
    "an unknown type": (SAFE, lambda f: with_header(f, one(dtype="X9"), bytes(16)), "truncated, broken"),
    "no rows": (SAFE, lambda f: with_header(f, one(shape=(0, 10**12), offsets=(0, 0))), "none of the 1 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case, folder):
    name, make, message = WEIGHTS[case]
    (folder / SAFE).unlink()
    make(folder / name)
    refused(lambda model: model.load_adapter(folder), message, folder.parent)
    assert not list(folder.parent.parent.rglob("slipped"))


# --- configs ----------------------------------------------------------------------------------------------------------


def set_config(folder, **changes):
    file = folder / "adapter_config.json"
    full = json.loads(file.read_text())
    file.write_text(json.dumps(full | {"config": full["config"] | changes}))


def nested_unions(folder):
    config = {"architecture": "lora"}
    for _ in range(100):
        config = {"architecture": "union", "configs": [config]}
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config": config}))


CONFIGS = {
    "nested": (lambda f: (f / "adapter_config.json").write_text('{"a":' * 10**5), "the file is broken, not JSON"),
    "huge": (
        lambda f: (f / "adapter_config.json").write_bytes(b'"' + b"x" * (files.LARGEST_JSON + 1)),
        "has 16,777,218 bytes; a config has at most 16,777,216",
    ),
    "a number without end": (lambda f: (f / "adapter_config.json").write_text("9" * 10**5), "the file is broken"),
    "a huge rank": (lambda f: set_config(f, r=10**12), "asks for far more values than the file has"),
    "a negative rank": (lambda f: set_config(f, r=-1), r"LoRAConfig\(r=-1\)"),
    "nested unions": (nested_unions, "a member is of type ConfigUnion"),
    "a name that leads out": (lambda f: rename(f, "../../slipped"), r"'\.\./\.\./slipped'"),
    "a name of another kind": (lambda f: rename(f, ["a"]), "'name'"),
}  # fmt: skip


def rename(folder, name):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name": name}))


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case, folder):
    make, message = CONFIGS[case]
    make(folder)
    refused(lambda model: model.load_adapter(folder), message, folder.parent)


HUGE = {
    "lora": {"r": 10**8},
    "lora[alpha=16]": {"r": 300_000},
    "lora[r=4]": {"rank_pattern": {"q": 10**8}},
    "seq_bn": {"reduction_factor": 1e-7},
    "seq_bn_inv": {"inv_adapter_reduction_factor": 1e-8},
    "prefix_tuning": {"prefix_length": 10**10},
    "prefix_tuning[prefix_length=3]": {"bottleneck_size": 10**9},
    "prompt_tuning": {"prompt_length": 10**8},
    "adalora": {"init_r": 10**7},
}


@pytest.mark.parametrize("method", HUGE)
def test_huge_sizes(method, folder):
    """Memory that is filled would kill the process, so nothing of the size is made."""
    model = new_model()
    model.add_adapter("huge", config=method)
    model.save_adapter(folder, "huge")
    set_config(folder, **HUGE[method])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda model: model.load_adapter(folder), "asks for far more values than the file has", folder.parent)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@pytest.mark.parametrize("change", [{"num_labels": 10**9, "label2id": None}, {"layers": 10**7}])
def test_huge_heads(change, folder):
    model = new_model()
    model.add_classification_head("huge")
    model.save_head(folder, "huge")
    file = folder / "head_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"config": content["config"] | change}))
    refused(lambda model: model.load_head(folder), "asks for far more values than the file has", folder.parent)


def test_a_setup_that_leads_out(folder):
    model = new_model()
    model.save_adapter_setup(folder.parent / "setup", "a")
    shutil.move(folder.parent / "setup/a", folder.parent / "elsewhere")
    setup = folder.parent / "setup/adapter_setup.json"
    setup.write_text(setup.read_text().replace('"a"', '"../elsewhere"'))
    refused(lambda model: model.load_adapter_setup(folder.parent / "setup"), r"\.\./elsewhere", folder.parent)


def test_links_in_a_folder_are_the_users(folder):
    """A local folder may have links, as the cache of the Hub has."""
    shutil.move(folder / SAFE, folder.parent / "weights")
    (folder / SAFE).symlink_to(folder.parent / "weights")
    assert new_model().load_adapter(folder, load_as="b") == "b"


def test_weights_are_read_into_memory_of_their_own(folder):
    """A file that changes after it was read changes no model."""
    model = new_model()
    model.load_adapter(folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_file({"x": torch.ones(10)}, folder / SAFE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError):
        model.load_adapter(folder)
