"""LoRA+: the matrices B of LoRAs learn faster than the rest."""

import re
from typing import Any

from torch import nn

from ..errors import AdapterError

UP_PROJECTION = re.compile(r"(?:^|\.)loras\.[^.]+\.lora_B$")


def loraplus_groups(
    model: nn.Module, lr: float, ratio: float, weight_decay: float = 0.0, decaying: set[str] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the B of every LoRA has the learning rate ratio * lr, all else lr.

    Hayou et al. 2024, arXiv:2402.12354. Parameters that are not trained are in no group.

    Args:
        model: a model with LoRA adapters that are trained.
        lr: the learning rate of A and of everything else that is trained.
        ratio: lr of B / lr of A; the paper advises 16 or so.
        weight_decay: of the parameters in `decaying`.
        decaying: names of parameters that decay; None stands for all with two dimensions or more.

    Raises:
        AdapterError: `ratio` is not above 0, or no B is trained.

    Example:
        >>> optimizer = torch.optim.AdamW(loraplus_groups(model, lr=1e-4, ratio=16))
    """
    asked = f"loraplus_groups(lr={lr}, ratio={ratio})"
    if ratio <= 0:
        raise AdapterError(f"{asked}: ratio is {ratio}; it must be above 0. The paper advises 16.")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 if decaying is None else name in decaying
            groups.setdefault((UP_PROJECTION.search(name) is not None, decays), []).append(parameter)
    if not any(fast for fast, _ in groups):
        raise AdapterError(
            f"{asked}: no matrix B of a LoRA is trained; there must be one. Call train_adapter(name) with a LoRA first."
        )
    return [
        {"params": parameters, "lr": lr * ratio if fast else lr, "weight_decay": weight_decay if decays else 0.0}
        for (fast, decays), parameters in groups.items()
    ]
