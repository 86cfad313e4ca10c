"""PEFT's models, whose outputs ours are compared with."""

import peft
import torch


def noisy(model: torch.nn.Module, config: peft.PeftConfig, source: torch.Generator) -> torch.nn.Module:
    """PEFT's form of `model`, with noise on what its adapter trains."""
    found = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=source) * 0.2)
    return found.eval()
