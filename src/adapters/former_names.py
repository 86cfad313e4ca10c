"""Names that 1.x has for things of another name here, and all that it has in ``adapters.utils`` and other modules.

``adapters.utils``, ``adapters.wrappers``, ``adapters.model_mixin`` and ``adapters.hub_mixin`` give these names.
"""

import os
from enum import StrEnum
from pathlib import Path

from .checkpoints.files import ADAPTER, FUSION, HEAD, SETUP_FILE
from .checkpoints.hub import AdapterInfo, get_adapter_info, list_adapters
from .checkpoints.legacy import ACTIVATION_RENAME
from .checkpoints.publishing import PushAdapterToHubMixin
from .configuration.hashing import get_adapter_config_hash
from .configuration.resolve import parse_adapter_config_string, resolve_adapter_config
from .embeddings import EMBEDDING_FILE, TOKENIZER_FOLDER, EmbeddingAdaptersMixin
from .interface import INTERFACE_FILE
from .invertible import InvertibleAdaptersMixin
from .model import ModelAdaptersMixin
from .sites import Site
from .wrap import init, init_adapters_config, load_model

# fmt: off
__all__ = [
    "ACTIVATION_RENAME", "EMBEDDING_FILE", "AdapterInfo", "EmbeddingAdaptersMixin", "ModelAdaptersMixin",
    "PushAdapterToHubMixin", "get_adapter_config_hash", "get_adapter_info", "init", "init_adapters_config",
    "list_adapters", "load_model", "parse_adapter_config_string", "resolve_adapter_config",
]
# fmt: on

ModelBaseAdaptersMixin = ModelUsingSubmodelsAdaptersMixin = ModelWithHeadsAdaptersMixin = ModelAdaptersMixin
EmbeddingAdaptersWrapperMixin, InvertibleAdaptersWrapperMixin = EmbeddingAdaptersMixin, InvertibleAdaptersMixin
AdapterLayerBase = ComposableAdapterLayerBase = Site
CONFIG_NAME, WEIGHTS_NAME, SAFE_WEIGHTS_NAME = ADAPTER.config, ADAPTER.torch, ADAPTER.safetensors
HEAD_CONFIG_NAME, HEAD_WEIGHTS_NAME, SAFE_HEAD_WEIGHTS_NAME = HEAD.config, HEAD.torch, HEAD.safetensors
ADAPTERFUSION_CONFIG_NAME, ADAPTERFUSION_WEIGHTS_NAME = FUSION.config, FUSION.torch
SAFE_ADAPTERFUSION_WEIGHTS_NAME, SETUP_CONFIG_NAME = FUSION.safetensors, SETUP_FILE
TOKENIZER_PATH, INTERFACE_CONFIG_NAME = TOKENIZER_FOLDER, INTERFACE_FILE
_CACHE = os.getenv("TORCH_HOME") or Path(os.getenv("XDG_CACHE_HOME") or "~/.cache", "torch")
ADAPTER_CACHE = str(Path(_CACHE, "adapters").expanduser())
"""Where 1.x keeps what it downloads; here transformers' own cache has it."""


class AdapterType(StrEnum):
    """What an adapter was trained on, in files of the first releases."""

    text_task = "text_task"
    text_lang = "text_lang"

    @classmethod
    def has(cls, value: object) -> bool:
        """Whether there is such a type."""
        return value in [*cls]
