"""Configurations of adapters: one class per method, identifiers, config strings and the record of a model's adapters.

The classes of the methods live in the files of the methods; they are imported when first asked for. So the files here
stand on both sides of them: ``methods`` imports ``base``, ``checks``, ``files``, ``registry`` and ``union``, and is
imported by ``resolve`` and ``model_adapters_config``.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "configuration.base": ("AdapterConfig",),
    "configuration.hashing": ("get_adapter_config_hash",),
    "configuration.model_adapters_config": ("ModelAdaptersConfig",),
    "configuration.resolve": (
        "ADAPTER_CONFIG_MAP",
        "DEFAULT_ADAPTER_CONFIG",
        "parse_adapter_config_string",
        "resolve_adapter_config",
    ),
    "configuration.union": ("ConfigUnion",),
    "methods.adalora": ("AdaLoRAConfig",),
    "methods.bitfit": ("BitFitConfig",),
    "methods.boft": ("BOFTConfig",),
    "methods.bottleneck": (
        "AdapterPlusConfig",
        "BnConfig",
        "DoubleSeqBnConfig",
        "DoubleSeqBnInvConfig",
        "ParBnConfig",
        "SeqBnConfig",
        "SeqBnInvConfig",
    ),
    "methods.compacter": ("CompacterConfig", "CompacterPlusPlusConfig"),
    "methods.cpt": ("CPTConfig",),
    "methods.dora": ("DoRAConfig", "DvoRAConfig"),
    "methods.fourierft": ("FourierFTConfig",),
    "methods.fusion": (
        "ADAPTERFUSION_CONFIG_MAP",
        "DEFAULT_ADAPTERFUSION_CONFIG",
        "AdapterFusionConfig",
        "DynamicAdapterFusionConfig",
        "StaticAdapterFusionConfig",
    ),
    "methods.hira": ("HiRAConfig",),
    "methods.hra": ("HRAConfig",),
    "methods.ia3": ("IA3Config",),
    "methods.ln_tuning": ("LNTuningConfig",),
    "methods.loha": ("LoHaConfig",),
    "methods.lokr": ("LoKrConfig",),
    "methods.lora": ("LoRAConfig",),
    "methods.miss": ("MiSSConfig",),
    "methods.mtl_lora": ("MTLLoRAConfig", "MultiTaskConfig"),
    "methods.oft": ("OFTConfig",),
    "methods.multitask_prompt_tuning": ("MultitaskPromptTuningConfig",),
    "methods.p_tuning": ("PTuningConfig",),
    "methods.prefix_tuning": ("PrefixTuningConfig",),
    "methods.prompt_tuning": ("PromptTuningConfig",),
    "methods.randlora": ("RandLoRAConfig",),
    "methods.reft": ("DiReftConfig", "LoReftConfig", "NoReftConfig", "ReftConfig"),
    "methods.road": ("RoAdConfig",),
    "methods.routing": ("RouterConfig",),
    "methods.shira": ("SHiRAConfig",),
    "methods.trainable_tokens": ("TrainableTokensConfig",),
    "methods.unions": ("MAMConfig", "UniPELTConfig"),
    "methods.vblora": ("VBLoRAConfig",),
    "methods.vera": ("VeraConfig",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"adapters.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
