"""The adapter methods, one file each. Importing them registers their configurations and modules."""

from . import bottleneck, compacter, dora, fusion, ia3, lora, mtl_lora, prefix_tuning, prompt_tuning, reft, unions, vera

__all__ = [
    "bottleneck",
    "compacter",
    "dora",
    "fusion",
    "ia3",
    "lora",
    "mtl_lora",
    "prefix_tuning",
    "prompt_tuning",
    "reft",
    "unions",
    "vera",
]
