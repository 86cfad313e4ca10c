"""Where 1.x has its model classes: ``adapters.models.bert``, ``adapters.models.auto.adapter_model``, and so on.

All of these paths are this one module, and it has every ``XAdapterModel``.
"""

import sys
from typing import Any

from . import auto
from .auto import ADAPTER_MODEL_MAPPING, AutoAdapterModel

__all__ = ["ADAPTER_MODEL_MAPPING", "AutoAdapterModel"]

FOLDERS = (
    *("albert", "auto", "bart", "beit", "bert", "bert_generation", "clip", "deberta", "deberta_v2", "distilbert"),
    *("electra", "gpt2", "gptj", "llama", "mbart", "mistral", "mt5", "plbart", "roberta", "t5", "vit", "whisper"),
    *("xlm_roberta", "xmod"),
)
for _folder in FOLDERS:
    for _path in (_folder, f"{_folder}.adapter_model"):
        sys.modules[f"{__name__}.{_path}"] = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    """A model class by its name, or one of the folders."""
    return sys.modules[__name__] if name in (*FOLDERS, "adapter_model") else getattr(auto, name)


def __dir__() -> list[str]:
    """All model classes."""
    return [*__all__, *auto.class_names()]
