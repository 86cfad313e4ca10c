"""Whenever a save is interrupted, the old checkpoint is there or the new one, and never a part of one."""

import copy
import errno
import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig

from adapters import AutoAdapterModel, CheckpointError, Fuse, Stack
from adapters.checkpoints import atomic
from adapters.training.checkpoint import save_trained

BERT = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
KILLS = 100


def new_model(adapters=("a", "b")):
    model = AutoAdapterModel.from_config(copy.deepcopy(BERT)).eval()
    for name in adapters:
        model.add_adapter(name, config="seq_bn[reduction_factor=4]")
        model.add_classification_head(name, num_labels=2)
    model.add_adapter_fusion(Fuse("a", "b"))
    return model


@torch.no_grad()
def become(model, version):
    """Every weight has the number of the version, and every config names it."""
    model.config.name_or_path = str(version)
    for parameter in model.parameters():
        parameter.fill_(version)


SAVES = {
    "adapter": lambda model, folder: model.save_adapter(folder, "a"),
    "bin": lambda model, folder: model.save_adapter(folder, "a", use_safetensors=model.model_name == "1"),
    "head": lambda model, folder: model.save_head(folder, "a"),
    "fusion": lambda model, folder: model.save_adapter_fusion(folder, "a,b", with_head="a"),
    "all adapters": lambda model, folder: model.save_all_adapters(folder),
    "setup": lambda model, folder: model.save_adapter_setup(folder, Stack(Fuse("a", "b"), "b"), head_setup=["a", "b"]),
    "whole": lambda model, folder: model.save_pretrained(folder),
    "trainer": lambda model, folder: save_trained(model, str(folder), with_fusions=True),
}
FOLDERS = ("all adapters", "setup", "trainer")
each_save = pytest.mark.parametrize("save", SAVES)


def version_of(folder):
    """The one version that all files are of, after what any reader does first."""
    for root in (folder, *filter(Path.is_dir, folder.iterdir())):
        atomic.finish(root)
    versions, kinds = set(), set()
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_dir() or hidden or file.name == "adapter_setup.json":
            continue
        kinds.add(file.suffix)
        if file.name in ("config.json", "generation_config.json"):  # of a whole model, which say no version
            continue
        if file.suffix == ".json":
            versions.add(int(json.loads(file.read_text())["model_name"]))
        else:
            read = load_file if file.suffix == ".safetensors" else torch.load
            versions |= {int(value) for tensor in read(file).values() for value in tensor.unique()}
    assert len(versions) == 1 and len(kinds) == 2, (versions, kinds)
    return versions.pop()


def forked(work):
    """Runs `work` in a copy of this process, which then ends; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@each_save
def test_a_process_that_is_killed_at_any_moment(save, tmp_path):
    model, folder, chance = new_model(), tmp_path / "saved", random.Random(0)
    become(model, 1)
    begun = time.perf_counter()
    SAVES[save](model, folder)
    duration, seen = time.perf_counter() - begun, set()

    def save_again_and_again():
        while True:
            for version in (2, 1):
                become(model, version)
                SAVES[save](model, folder)

    for _ in range(-(-KILLS // len(SAVES))):
        child = forked(save_again_and_again)
        time.sleep(chance.uniform(0, 3 * duration))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        seen.add(version_of(folder))
    assert seen <= {1, 2}


@each_save
def test_a_process_that_dies_at_each_step(save, tmp_path, monkeypatch):
    """The steps are those that another process can see: writing through, renaming, and removing."""
    model, seen = new_model(), []
    for step in range(0, 200, 4 if save in FOLDERS else 1):
        folder = tmp_path / str(step)
        become(model, 1)
        SAVES[save](model, folder)
        left = [step]

        def dying(function, left=left):
            def step_of_it(*arguments, **options):
                if left[0] == 0:
                    os._exit(7)
                left[0] -= 1
                return function(*arguments, **options)

            return step_of_it

        def save_new(folder=folder):
            become(model, 2)
            for name in ("fsync", "replace", "unlink"):
                monkeypatch.setattr(os, name, dying(getattr(os, name)))
            SAVES[save](model, folder)

        _, status = os.waitpid(forked(save_new), 0)
        seen.append(version_of(folder))
        if os.WEXITSTATUS(status) == 0:
            break
    assert seen == sorted(seen) and set(seen) == {1, 2} and len(seen) > 4


@each_save
def test_a_full_disk(save, tmp_path):
    model, folder = new_model(), tmp_path / "saved"
    become(model, 1)
    SAVES[save](model, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    become(model, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for size in (1, max(len(content) for content in before.values()) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=r"old files are as they were\. Pass another directory"):
                SAVES[save](model, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, previous)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_full_disk_under_a_merged_model(tmp_path, monkeypatch):
    model, folder = new_model(), tmp_path / "saved"
    model.add_adapter("lora", config="lora")
    model.active_head = None
    model.save_merged(folder, "lora", max_shard_size="1KB")
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    become(model, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in (folder, tmp_path / "new"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"No space left.*old files are as"):
            patch.setattr(os, "fsync", full)
            model.save_merged(target, "lora")
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before
    assert not (tmp_path / "new").exists()
    model.save_merged(folder, "lora")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_disk_that_is_full_when_it_writes_through(tmp_path, monkeypatch):
    model = new_model()
    become(model, 1)
    model.save_adapter(tmp_path, "a")
    become(model, 2)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(os, "fsync", full)
        model.save_adapter(tmp_path, "a")
    assert version_of(tmp_path) == 1


@pytest.mark.parametrize("content", ["x", "[]", '{"token": "0", "new": [], "stale": []}', "[" * 10**5,
                                     '{"token": "00000000", "new": ["../x"], "stale": []}',
                                     '{"token": "00000000", "new": [], "stale": ["/etc/x"]}',
                                     '{"token": "00000000", "new": [], "stale": ["a/../../x"]}',
                                     '{"token": "00000000", "new": [1], "stale": []}'])  # fmt: skip
def test_a_journal_that_is_none_of_ours_is_refused(content, tmp_path):
    model, folder = new_model(), tmp_path / "a"
    (tmp_path / "x").write_text("mine")
    model.save_adapter(folder, "a")
    (folder / atomic.JOURNAL).write_text(content)
    for call in (lambda: model.load_adapter(folder), lambda: model.save_adapter(folder, "a")):
        with pytest.raises(CheckpointError, match=r"adapters-save\.journal.* Delete it, or save again"):
            call()
    assert (tmp_path / "x").read_text() == "mine"


def test_a_later_save_is_not_undone_by_an_earlier_one(tmp_path):
    """One adapter's folder is in that of a setup; each may have been interrupted, and the later save wins."""
    model, folder = new_model(), tmp_path / "setup"

    def dying_save(version, save):
        def work():
            os.replace, replace = (
                lambda one, two: os._exit(7) if "journal" not in str(two) else replace(one, two),
                os.replace,
            )
            become(model, version)
            save()

        assert os.WEXITSTATUS(os.waitpid(forked(work), 0)[1]) == 7

    become(model, 1)
    SAVES["all adapters"](model, folder)
    dying_save(2, lambda: SAVES["all adapters"](model, folder))
    become(model, 3)
    model.save_adapter(folder / "a", "a")
    assert version_of(folder / "a") == 3
    dying_save(4, lambda: model.save_adapter(folder / "a", "a"))
    become(model, 5)
    SAVES["all adapters"](model, folder)
    assert version_of(folder) == 5


def test_what_a_killed_save_left_is_removed_in_time(tmp_path):
    model = new_model()
    model.save_adapter(tmp_path, "a")
    old, young = tmp_path / ".adapter.safetensors.00000000", tmp_path / ".adapter.safetensors.11111111"
    for file in (old, young):
        file.touch()
    os.utime(old, (1, 1))
    model.save_adapter(tmp_path, "a")
    assert young.exists() and not old.exists()
