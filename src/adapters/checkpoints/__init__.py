"""Saving and loading adapters, fusions, heads and setups.

`adapterhub`, `fusion`, `heads` and `setups` are the native format, whose keys are in `names`; `legacy` reads what
former versions wrote; `hub` finds folders; `placing` puts what was read into a model, all or nothing.
"""

from .adapterhub import load_adapter, save_adapter, save_all_adapters
from .fusion import load_adapter_fusion, save_adapter_fusion, save_all_adapter_fusions
from .heads import load_head, save_head
from .loaders import WeightsLoader
from .setups import load_adapter_setup, save_adapter_setup

__all__ = [
    "WeightsLoader",
    "load_adapter",
    "load_adapter_fusion",
    "load_adapter_setup",
    "load_head",
    "save_adapter",
    "save_adapter_fusion",
    "save_adapter_setup",
    "save_all_adapter_fusions",
    "save_all_adapters",
    "save_head",
]
