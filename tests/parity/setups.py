"""Setups with fusions and heads, from 1.3.0 to this library and back.

    python tests/parity/setups.py record           # adapters 1.3.0: goldens/setups.zip
    python tests/parity/setups.py rewrite FOLDER   # this library: loads the goldens and saves them again
    python tests/parity/setups.py check FOLDER     # adapters 1.3.0: goldens/reverse_setups.json

The last has the largest deviation from 1.3.0's own outputs and a digest of the files, by which a test knows that the
library still writes the same.
"""

import contextlib
import hashlib
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

import adapters
from adapters import AutoAdapterModel
from adapters.composition import BatchSplit, Fuse, Parallel, Split, Stack

GOLDENS = Path(__file__).parent / "goldens"
ARCHIVE, EVIDENCE = GOLDENS / "setups.zip", GOLDENS / "reverse_setups.json"
CONFIG = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SETUPS = {
    "stack_of_fusion": (Stack("a", Fuse("b", "c")), "h"),
    "fusion": (Fuse("b", "c", "d"), "h"),
    "parallel": (Parallel("a", "b"), ["h", "i"]),
    "batch_split": (BatchSplit("a", "b", batch_sizes=[1, 3]), BatchSplit("h", "i", batch_sizes=[1, 3])),
    "split": (Split("a", "b", splits=[2, 4]), "i"),
    "one": (Stack("a"), "h"),
}
ADAPTERS = dict.fromkeys("abcd", "double_seq_bn[reduction_factor=4]")


def base(folder):
    """The model of the goldens, without adapters."""
    torch.manual_seed(0)
    model = AutoAdapterModel.from_config(BertConfig(intermediate_size=24, **CONFIG)).eval()
    model.base_model.load_state_dict(load_file(folder / "base.safetensors"), strict=False)
    return model


def plain_state(model):
    """The weights of the base model, without what 1.3.0 adds before there is any adapter."""
    state = model.base_model.state_dict()
    return {key: value for key, value in state.items() if not key.startswith("prompt_tuning.")}


def tokens():
    return torch.arange(24).reshape(4, 6) % 37 + 2


@torch.no_grad()
def logits(model):
    found = model(tokens(), attention_mask=torch.ones(4, 6))
    parts = found.head_outputs if "head_outputs" in found else [found]
    return {str(number): part["logits"].contiguous() for number, part in enumerate(parts)}


@contextlib.contextmanager
def goldens():
    """The folder of the goldens, unpacked."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
        yield Path(folder)


def record() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(1)
        model = AutoAdapterModel.from_config(BertConfig(intermediate_size=24, **CONFIG)).eval()
        save_file(plain_state(model), folder / "base.safetensors")
        for name, config in ADAPTERS.items():
            model.add_adapter(name, config=config)
        for fuse in (Fuse("b", "c"), Fuse("b", "c", "d")):
            model.add_adapter_fusion(fuse)
        for head, labels in (("h", 3), ("i", 2)):
            model.add_classification_head(head, num_labels=labels)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "adapter" in key or "heads." in key:
                    parameter.add_(torch.randn_like(parameter) / 4)
        for name, (setup, heads) in SETUPS.items():
            (folder / name).mkdir()
            model.save_adapter_setup(str(folder / name), setup, head_setup=heads)
            loaded = base(folder)
            loaded.load_adapter_setup(str(folder / name), set_active=True)
            save_file(logits(loaded), folder / f"{name}.safetensors")
        with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                archive.write(file, file.relative_to(folder))


def rewrite(target: Path) -> None:
    with goldens() as folder:
        for name, (setup, heads) in SETUPS.items():
            model = base(folder)
            model.load_adapter_setup(folder / name)
            model.save_adapter_setup(target / name, setup, head_setup=heads, use_safetensors=False)


def deviation(model, folder, name) -> float:
    wanted, found = load_file(folder / f"{name}.safetensors"), logits(model)
    assert wanted.keys() == found.keys()
    return max(float((found[key] - value).abs().max()) for key, value in wanted.items())


def digest(folder: Path) -> str:
    """Of the keys, tensors and settings in a folder; not of the version that wrote it."""
    found = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(file.relative_to(folder).as_posix().encode())
        if file.suffix == ".json":
            content = json.loads(file.read_text())
            found.update(json.dumps({**content, "version": None}, sort_keys=True).encode())
        else:
            for key, tensor in sorted(torch.load(file, weights_only=True).items()):
                found.update(key.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def check(written: Path) -> None:
    evidence = {}
    with goldens() as folder:
        for name in SETUPS:
            model = base(folder)
            model.load_adapter_setup(str(written / name), set_active=True)
            furthest = deviation(model, folder, name)
            evidence[name] = {"deviation": float(f"{furthest:.1e}"), "digest": digest(written / name)}
    EVIDENCE.write_text(json.dumps(evidence, indent=1) + "\n")
    print(evidence)


if __name__ == "__main__":
    torch.set_num_threads(1)
    former = adapters.__version__.startswith("1.")
    if former != (sys.argv[1] != "rewrite"):
        sys.exit(f"setups.py {sys.argv[1]}: not with adapters {adapters.__version__}; see the head of this file.")
    {"record": record, "rewrite": rewrite, "check": check}[sys.argv[1]](*map(Path, sys.argv[2:]))
