"""Parameter-efficient and modular fine-tuning for transformers: adapters, their composition, heads and checkpoints.

Names are imported from where they are defined when they are first used.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "2.0.0.dev0"

_MODULES: dict[str, tuple[str, ...]] = {
    "wrap": ("init", "load_model", "init_adapters_config"),
    "composition": (
        "AdapterCompositionBlock", "Average", "BatchSplit", "Fuse", "MultiTask", "Parallel", "Route", "Split", "Stack",
        "parse_composition", "validate_composition",
    ),
    "context": ("AdapterSetup",),
    "model": ("ModelAdaptersMixin",),
    "embeddings": ("EmbeddingAdaptersMixin",),
    "invertible": ("InvertibleAdaptersMixin",),
    "configuration": (
        "ADAPTERFUSION_CONFIG_MAP", "ADAPTER_CONFIG_MAP", "AdaLoRAConfig", "AdapterConfig", "AdapterFusionConfig",
        "AdapterPlusConfig", "BOFTConfig", "BitFitConfig", "BnConfig", "CPTConfig", "CompacterConfig",
        "CompacterPlusPlusConfig", "ConfigUnion", "DEFAULT_ADAPTERFUSION_CONFIG", "DEFAULT_ADAPTER_CONFIG",
        "DiReftConfig", "DoRAConfig", "DoubleSeqBnConfig", "DoubleSeqBnInvConfig", "DvoRAConfig",
        "DynamicAdapterFusionConfig", "FourierFTConfig", "HRAConfig", "HiRAConfig", "IA3Config", "LNTuningConfig",
        "LoHaConfig", "LoKrConfig", "LoRAConfig", "LoReftConfig", "MAMConfig", "MTLLoRAConfig", "MiSSConfig",
        "ModelAdaptersConfig", "MultiTaskConfig", "MultitaskPromptTuningConfig", "NoReftConfig", "OFTConfig",
        "PTuningConfig", "ParBnConfig", "PrefixTuningConfig", "PromptTuningConfig", "RandLoRAConfig", "ReftConfig",
        "RoAdConfig", "RouterConfig", "SHiRAConfig", "SeqBnConfig", "SeqBnInvConfig", "StaticAdapterFusionConfig",
        "TrainableTokensConfig", "UniPELTConfig", "VBLoRAConfig", "VeraConfig", "get_adapter_config_hash",
    ),
    "heads": (
        "BertStyleMaskedLMHead", "BiaffineParsingHead", "CausalLMHead", "ClassificationHead", "DependencyParsingOutput",
        "ModelWithFlexibleHeadsAdaptersMixin", "MultiHeadOutput", "MultiLabelClassificationHead", "MultipleChoiceHead",
        "PredictionHead", "QuestionAnsweringHead", "Seq2SeqLMHead", "TaggingHead",
    ),
    "auto": ("ADAPTER_MODEL_MAPPING", "AutoAdapterModel"),
    "training": (
        "AdapterArguments", "AdapterTrainingArguments", "Seq2SeqAdapterTrainingArguments", "loraplus_groups",
        "prepare_quantized_training", "setup_adapter_training",
    ),
    "trainer": ("AdapterTrainer", "AdapterTrainerCallback", "Seq2SeqAdapterTrainer"),
    "checkpoints.hub": ("AdapterInfo", "get_adapter_info", "list_adapters"),
    "describing": ("describe",),
    "interface": ("AdapterMethod", "AdapterModelInterface"),
    "former_names": (
        "ADAPTER_CACHE", "AdapterLayerBase", "AdapterType", "ComposableAdapterLayerBase",
        "InvertibleAdaptersWrapperMixin", "ModelWithHeadsAdaptersMixin",
    ),
    "errors": ("AdapterError", "CheckpointError", "CompositionError", "ConfigError", "UnknownAdapterError"),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_HOMES, "__version__"]


class _FormerModule(ModuleType):
    """A module of 1.x that has no counterpart; its names are in ``former_names``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked by those who look through all modules
            raise AttributeError(name)
        return getattr(importlib.import_module(f"{__package__}.former_names"), name)


_FORMER = {name: _FormerModule(f"{__name__}.{name}") for name in ("utils", "wrappers", "model_mixin", "hub_mixin")}
sys.modules.update({module.__name__: module for module in _FORMER.values()})


def __getattr__(name: str) -> Any:
    """A public name, from its module; ``XAdapterModel`` for every architecture X from ``adapters.auto``."""
    if name in _FORMER:
        return _FORMER[name]
    module = _HOMES.get(name) or ("auto" if name.endswith("AdapterModel") else None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    """All public names, and ``XAdapterModel`` for every architecture X."""
    auto = importlib.import_module(f"{__name__}.auto")
    return sorted({*globals(), *__all__, *auto.class_names()})
