"""Inputs for a model of any type: those that the library itself tries, and the rows of ``overrides.py``."""

from typing import Any

import torch
from overrides import INPUTS
from transformers import PreTrainedModel

from adapters.samples import Sample


def inputs_for(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs of two rows."""
    torch.manual_seed(2)
    sample, own = Sample(model, torch.device("cpu")), INPUTS.get(model.config.model_type, {})
    made = {name: filled(value) for name, value in sample.inputs().items() if name not in own}
    return made | {name: value(sample) for name, value in own.items()}


def filled(value: torch.Tensor) -> torch.Tensor:
    """Zeros are replaced by chance."""
    return torch.randn(value.shape) if value.is_floating_point() and not value.any() else value
