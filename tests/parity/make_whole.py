"""Writes ``goldens/whole.zip``: whole models with adapters, saved by 1.3.0's ``save_pretrained``, and their outputs.

RUN THIS IN THE REFERENCE ENVIRONMENT ONLY (adapters 1.3.0, transformers 4.57.6).

    python tests/parity/make_whole.py
"""

import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
from golden import GOLDENS
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, GPT2Config

import adapters
from adapters import BertAdapterModel, GPT2AdapterModel
from adapters.composition import Fuse

ARCHIVE = GOLDENS / "whole.zip"
SIZES = {"vocab_size": 32, "num_labels": 3, "attn_implementation": "eager"}  # prefixes are right in 1.x with it only
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, **SIZES}
GPT2 = {
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
    **SIZES,
}
CONFIGS = {
    "a": "seq_bn[reduction_factor=2]",
    "b": "seq_bn[reduction_factor=4]",
    "c": "compacter[phm_dim=2,reduction_factor=2]",
    "dora": "lora[r=2,alpha=4,use_dora=True,selfattn_lora=False,output_lora=True]",
    "gated": "lora[r=2,alpha=6,use_gating=True,attn_matrices=['q','k']]",
    "inverse": "double_seq_bn_inv[reduction_factor=4]",
    "lora": "lora[r=2,attn_matrices=['q','k','v'],intermediate_lora=True]",
    "prefix": "prefix_tuning[prefix_length=3,bottleneck_size=4]",
    "reft": "loreft[r=2]",
    "union": "unipelt",
}
INPUTS = torch.arange(2, 14).view(2, 6)
MODELS = {
    "bert": lambda: BertAdapterModel(BertConfig(max_position_embeddings=16, **BERT)),
    "bert_static": lambda: BertForSequenceClassification(BertConfig(max_position_embeddings=16, **BERT)),
    "gpt2": lambda: GPT2AdapterModel(GPT2Config(**GPT2)),
}


@torch.no_grad()
def outputs(model) -> dict[str, torch.Tensor]:
    """The logits of every setup."""
    found = {}
    for setup in [*model.adapters_config.adapters, Fuse("a", "b")]:
        model.set_active_adapters(setup)
        found[setup if isinstance(setup, str) else "fuse"] = model(INPUTS)[0].contiguous()
    return found


def filled(kind: str):
    """A model with all adapters, whose weights are random."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    adapters.init(model)
    before = {*model.state_dict()}
    for name, config in CONFIGS.items():
        if (kind, name) != ("gpt2", "dora"):  # which 1.x cannot make
            model.add_adapter(name, config)
    model.add_adapter_fusion(["a", "b"])
    for name, tensor in model.state_dict().items():
        if name not in before and tensor.is_floating_point() and "projection" not in name:
            tensor.add_(torch.randn_like(tensor) * 0.1)
    if kind != "bert_static":
        model.add_classification_head("h", num_labels=3)
    return model.eval()


def main() -> None:
    if version("adapters") != "1.3.0":
        sys.exit(f"make_whole.py: adapters {version('adapters')} is installed; it must be 1.3.0.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        for kind in MODELS:
            model, root = filled(kind), Path(folder) / kind
            expected = outputs(model)
            model.save_pretrained(root)
            save_file(expected, root / "outputs.safetensors")
            for file in sorted(root.iterdir()):
                archive.write(file, f"{kind}/{file.name}")
    print(f"{ARCHIVE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
