"""Builds, fills and runs the models of the goldens, with adapters 1.3.0 as with this library (the API is the same)."""

import copy
import functools
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

import adapters
from adapters import composition

NUMBER_OF_LABELS = {"class": 3, "tags": 5}


class Group(Protocol):
    """What both the table of cases and the index say about a group."""

    id: str
    adapters: dict[str, str]
    fusions: dict[str, str]
    model: str
    labels: str
    head_type: str
    added_length: int
    add_first: bool


@functools.lru_cache(maxsize=4)
def _pristine(model_class: str, base: Path, attention: str, labels: int) -> Any:
    space = adapters if model_class == "AutoAdapterModel" else transformers
    static = {"num_labels": labels} if labels else {}
    torch.manual_seed(0)
    model = getattr(space, model_class).from_pretrained(base, attn_implementation=attention, **static).eval()
    model.config.name_or_path = "golden"  # goes into the files and must not depend on where the base was unpacked
    return model


def new_model(root: Path, group: Group, attention: str = "eager") -> Any:
    """The group's model class on the golden base, in evaluation mode, without adapters."""
    static = bool(group.labels) and not group.head_type
    labels = NUMBER_OF_LABELS.get(group.labels, 2) if static else 0
    model = copy.deepcopy(_pristine(group.model, root / "base", attention, labels))
    if group.model != "AutoAdapterModel":
        adapters.init(model)
    return model


def load(model: Any, group: Group, root: Path) -> dict[str, list[str]]:
    """Loads the adapters and fusions of a group below a folder; returns what the loader reports."""
    report: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": []}
    for name in group.adapters:
        folder, found = root / "adapters" / group.id / name, {}
        if group.add_first:
            model.add_adapter(name, config=group.adapters[name])
        safe = (folder / "adapter.safetensors").exists()
        model.load_adapter(str(folder), use_safetensors=safe, loading_info=found)
        report = {kind: keys + found.get(kind, []) for kind, keys in report.items()}
    for name in group.fusions:
        folder = root / "fusions" / group.id / name
        safe = (folder / "model_adapter_fusion.safetensors").exists()
        model.load_adapter_fusion(str(folder), use_safetensors=safe)
    model.eval()
    return report


def real_tokens(output: torch.Tensor, given: dict[str, torch.Tensor], added_length: int = 0) -> torch.Tensor:
    """The rows of an output that belong to real tokens: what padding computes is not part of the contract.

    A parallel block repeats the batch, and with it the mask; prompt tokens stand on the left and are always real.
    """
    mask = given.get("decoder_attention_mask" if "decoder_input_ids" in given else "attention_mask")
    if mask is None or output.shape[1] != mask.shape[1] + added_length:
        return output.flatten(0, 1)
    mask = torch.cat([mask.new_ones(len(mask), added_length), mask], dim=1)
    return output[mask.repeat(len(output) // len(mask), 1).bool()]


@torch.no_grad()
def run(model: Any, setup: str | Any, given: dict[str, torch.Tensor], **more: Any) -> Any:
    """The model's whole output with a setup active; an expression is read with the composition blocks' names."""
    model.set_active_adapters(eval(setup, dict(vars(composition))) if isinstance(setup, str) else setup)
    return model(**{name: tensor.clone() for name, tensor in given.items()}, **more)


def outputs(model: Any, group: Group, setup: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the goldens hold: hidden states of real tokens, or logits and loss of a head."""
    out = run(model, setup, given)
    if not group.labels:
        return {"hidden": real_tokens(out.last_hidden_state, given, group.added_length)}
    return {"logits": real_tokens(out.logits, given) if out.logits.dim() == 3 else out.logits, "loss": out.loss}


def deviation(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest absolute difference; infinite for tensors of different shapes."""
    return float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
