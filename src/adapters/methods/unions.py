"""Unions of methods that papers propose."""

from ..configuration.base import AdapterConfig
from ..configuration.registry import register_config
from ..configuration.union import ConfigUnion
from ..errors import ConfigError
from .bottleneck import BnConfig, ParBnConfig, SeqBnConfig
from .lora import LoRAConfig
from .prefix_tuning import PrefixTuningConfig


class MAMConfig(ConfigUnion):
    """Mix-and-Match: prefix tuning and a parallel bottleneck. He et al. 2021, arXiv:2110.04366.

    Raises:
        ConfigError: a part is the configuration of another method.
    """

    def __init__(self, prefix_tuning: PrefixTuningConfig | None = None, adapter: BnConfig | None = None) -> None:
        prefix_tuning = prefix_tuning or PrefixTuningConfig(bottleneck_size=800)
        adapter = adapter or ParBnConfig()
        _check_part("MAMConfig", "prefix_tuning", prefix_tuning, PrefixTuningConfig)
        _check_part("MAMConfig", "adapter", adapter, BnConfig)
        super().__init__(prefix_tuning, adapter)

    @property
    def prefix_tuning(self) -> AdapterConfig:
        """The configuration of the prefix."""
        return self.configs[0]

    @property
    def adapter(self) -> AdapterConfig:
        """The configuration of the bottleneck."""
        return self.configs[1]


class UniPELTConfig(ConfigUnion):
    """Prefix tuning, a bottleneck and LoRA, each with a gate. Mao et al. 2022, arXiv:2110.07577.

    Raises:
        ConfigError: a part is the configuration of another method.
    """

    def __init__(
        self,
        prefix_tuning: PrefixTuningConfig | None = None,
        adapter: BnConfig | None = None,
        lora: LoRAConfig | None = None,
    ) -> None:
        prefix_tuning = prefix_tuning or PrefixTuningConfig(prefix_length=10)
        adapter = adapter or SeqBnConfig(reduction_factor=16)
        lora = lora or LoRAConfig(r=8, alpha=2)
        _check_part("UniPELTConfig", "prefix_tuning", prefix_tuning, PrefixTuningConfig)
        _check_part("UniPELTConfig", "adapter", adapter, BnConfig)
        _check_part("UniPELTConfig", "lora", lora, LoRAConfig)
        super().__init__(*(part.replace(use_gating=True) for part in (prefix_tuning, adapter, lora)))


def _check_part(union: str, name: str, part: AdapterConfig, expected: type[AdapterConfig]) -> None:
    if not isinstance(part, expected):
        raise ConfigError(f"{union}: {name} is a {type(part).__name__}; it must be a {expected.__name__}.")


register_config("mam", MAMConfig())
register_config("unipelt", UniPELTConfig())
