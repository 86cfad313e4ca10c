"""The record of a model's adapters and fusions, which is saved with the model's own configuration."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import sha1
from typing import Any, TypeVar

from ..errors import AdapterError, ConfigError, UnknownAdapterError, listing, suggestion
from ..methods.fusion import ADAPTERFUSION_CONFIG_MAP, DEFAULT_ADAPTERFUSION_CONFIG, AdapterFusionConfig
from .base import AdapterConfig
from .hashing import get_adapter_config_hash
from .resolve import ADAPTER_CONFIG_MAP, DEFAULT_ADAPTER_CONFIG, build_config, load_config, resolve_adapter_config
from .union import ConfigUnion

C = TypeVar("C", bound=AdapterConfig)


class ModelAdaptersConfig(Collection[str]):
    """The adapters and fusions of a model by name, each with its configuration; a collection of the adapters' names.

    ``adapters`` maps each name to the key of its configuration, ``config_map`` each key to the configuration. A key is
    the configuration's hash or an identifier such as ``"seq_bn"``. ``fusions`` and ``fusion_config_map`` do so for
    fusions, and ``fusion_name_map`` gives the adapters of a fusion whose name does not. ``active_setup`` (the
    composition that runs) and ``skip_layers`` are of this process and not saved.

    Raises:
        ConfigError: an entry has a configuration that is missing or not valid.

    Example:
        >>> record = ModelAdaptersConfig()
        >>> record.add("sst2", LoRAConfig())
        >>> "sst2" in record, record.get("sst2").r, record.get("mnli")
        (True, 8, None)
    """

    def __init__(
        self,
        adapters: Mapping[str, str | Sequence[str | None]] | None = None,
        config_map: Mapping[str, Mapping[str, Any] | str] | None = None,
        fusions: Mapping[str, str] | None = None,
        fusion_config_map: Mapping[str, Mapping[str, Any] | str] | None = None,
        fusion_name_map: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.adapters = {name: _adapter_key(key) for name, key in (adapters or {}).items()}
        self.config_map = {
            key: build_config(resolve_adapter_config(config)) for key, config in (config_map or {}).items()
        }
        self.fusions = dict(fusions or {})
        self.fusion_config_map = {
            key: AdapterFusionConfig.load(config) for key, config in (fusion_config_map or {}).items()
        }
        self.fusion_name_map = {name: list(adapters) for name, adapters in (fusion_name_map or {}).items()}
        _check_keys("adapter", self.adapters, self.config_map, ADAPTER_CONFIG_MAP)
        _check_keys("fusion", self.fusions, self.fusion_config_map, ADAPTERFUSION_CONFIG_MAP)
        self.active_setup: Any = None
        self.skip_layers: list[int] | None = None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def get(self, name: str) -> AdapterConfig | None:
        """The configuration of an adapter, or None if there is no such adapter."""
        if name not in self:
            return None
        key = self.adapters[name]
        return self.config_map[key] if key in self.config_map else ADAPTER_CONFIG_MAP[key]

    def members(self, name: str) -> tuple[AdapterConfig, ...]:
        """The configurations that make an adapter: the members of its union, or its one configuration.

        Raises:
            UnknownAdapterError: there is no adapter of that name.
        """
        config = self.get(name)
        if config is None:
            raise UnknownAdapterError(
                f"adapter {name!r}: No adapter with name {name!r} found; the model has {listing(self.adapters)}. "
                f"Add it with add_adapter({name!r})."
            )
        return config.configs if isinstance(config, ConfigUnion) else (config,)

    def match(
        self, name: str, config_type: type[C], layer_idx: int | None = None, location_key: str | None = None
    ) -> C | None:
        """The one member of an adapter that is a ``config_type`` and acts in that layer and location, or None.

        Raises:
            AdapterError: there are several.
        """
        found = [
            member
            for member in (self.members(name) if name in self else ())
            if isinstance(member, config_type)
            and layer_idx not in member.get("leave_out", ())
            and (location_key is None or member.get(location_key))
        ]
        if len(found) > 1:
            raise AdapterError(
                f"adapter {name!r}: Multiple adapter definitions conflict for adapter {name!r} in layer {layer_idx}; "
                "one place takes one member of a union. Change leave_out or the locations of its members."
            )
        return found[0] if found else None

    def add(self, name: str, config: Mapping[str, Any] | str | None = None) -> None:
        """Record an adapter; no configuration stands for the default identifier.

        Raises:
            AdapterError: the name is taken or cannot be the name of a module.
            ConfigError: the configuration is not known or not valid.
        """
        _check_name("add_adapter", name)
        if name in self.adapters:
            raise AdapterError(
                f"add_adapter({name!r}): An adapter with the name {name!r} has already been added; "
                "take another name or delete the old one with delete_adapter."
            )
        if config is None:
            config = DEFAULT_ADAPTER_CONFIG
        if isinstance(config, str) and (config in ADAPTER_CONFIG_MAP or config in self.config_map):
            self.adapters[name] = config
            return
        loaded = config if isinstance(config, AdapterConfig) else load_config(config, {})
        if loaded is None:
            raise ConfigError(f"add_adapter({name!r}): the configuration {config!r} is empty; give one or None.")
        self.adapters[name] = _store(loaded, self.config_map)

    def change(self, name: str, **fields: Any) -> None:
        """Change fields in the configuration of an adapter, in every member of a union that has them."""
        config: Any = self.get(name)
        former, self.adapters[name] = self.adapters[name], _store(config.replace(**fields), self.config_map)
        if former not in self.adapters.values():
            self.config_map.pop(former, None)

    def remove(self, name: str) -> None:
        """Forget an adapter, and its configuration if no other adapter has it.

        Raises:
            UnknownAdapterError: there is no adapter of that name.
        """
        self.members(name)
        key = self.adapters.pop(name)
        if key not in self.adapters.values():
            self.config_map.pop(key, None)

    def get_fusion(self, fusion_name: str | Sequence[str]) -> tuple[AdapterFusionConfig, list[str]] | tuple[None, None]:
        """The configuration and the adapters of a fusion, or twice None if there is no such fusion."""
        name = _fusion_name(fusion_name)
        if name not in self.fusions:
            return None, None
        key = self.fusions[name]
        config = self.fusion_config_map[key] if key in self.fusion_config_map else ADAPTERFUSION_CONFIG_MAP[key]
        return config, list(self.fusion_name_map.get(name) or name.split(","))

    def add_fusion(
        self,
        adapter_names: str | Sequence[str],
        config: Mapping[str, Any] | str | None = None,
        fusion_name: str | None = None,
    ) -> None:
        """Record a fusion of adapters; its name is theirs joined with commas if it has none of its own.

        Raises:
            AdapterError: the name is taken or cannot be the name of a module.
            UnknownAdapterError: one of the adapters is not there.
            ConfigError: the configuration is not known or not valid.
        """
        adapters = adapter_names.split(",") if isinstance(adapter_names, str) else list(adapter_names)
        name = _fusion_name(adapters) if fusion_name is None else fusion_name
        _check_name("add_adapter_fusion", name)
        if name in self.fusions:
            raise AdapterError(
                f"add_adapter_fusion({name!r}): An AdapterFusion with the name {name!r} has already been added; "
                "take another name or delete the old one with delete_adapter_fusion."
            )
        for adapter in adapters:
            self.members(adapter)
        if config is None:
            config = DEFAULT_ADAPTERFUSION_CONFIG
        if isinstance(config, str) and config in ADAPTERFUSION_CONFIG_MAP:
            self.fusions[name] = config
        else:
            self.fusions[name] = _store(AdapterFusionConfig.load(config), self.fusion_config_map)
        if name.split(",") != adapters:
            self.fusion_name_map[name] = adapters

    def remove_fusion(self, fusion_name: str | Sequence[str]) -> None:
        """Forget a fusion, and its configuration if no other fusion has it.

        Raises:
            UnknownAdapterError: there is no fusion of that name.
        """
        name = _fusion_name(fusion_name)
        if name not in self.fusions:
            raise UnknownAdapterError(
                f"fusion {name!r}: this model has no fusion named {name!r}; it has {listing(self.fusions)}. "
                "Add it with add_adapter_fusion."
            )
        key = self.fusions.pop(name)
        self.fusion_name_map.pop(name, None)
        if key not in self.fusions.values():
            self.fusion_config_map.pop(key, None)

    def common_config_value(self, adapter_names: Sequence[str], attribute: str) -> Any:
        """The value of a field that all the adapters share; in a union, of the member where it is set.

        Raises:
            AdapterError: they differ in it.
            UnknownAdapterError: one of the adapters is not there.
        """
        values = [self._value(name, attribute) for name in adapter_names]
        if any(value != values[0] for value in values):
            given = ", ".join(f"{name!r} has {value!r}" for name, value in zip(adapter_names, values, strict=True))
            raise AdapterError(
                f"{attribute}: All given adapters must define the same value for config attribute {attribute}; {given}."
            )
        return values[0]

    def _value(self, name: str, attribute: str) -> Any:
        values = [member[attribute] for member in self.members(name) if attribute in member]
        return next(filter(None, values), values[0] if values else None)

    def to_dict(self) -> dict[str, Any]:
        """The five maps as plain Python values; ``ModelAdaptersConfig(**record.to_dict())`` is an equal record."""
        return {
            "adapters": dict(self.adapters),
            "config_map": {key: config.to_dict() for key, config in self.config_map.items()},
            "fusions": dict(self.fusions),
            "fusion_config_map": {key: config.to_dict() for key, config in self.fusion_config_map.items()},
            "fusion_name_map": {name: list(adapters) for name, adapters in self.fusion_name_map.items()},
        }


def _adapter_key(key: str | Sequence[str | None]) -> str:
    """The key of a configuration; the first releases recorded the pair (adapter type, key)."""
    if isinstance(key, str):
        return key
    adapter_type, config_key = key
    return str(config_key or adapter_type)


def _fusion_name(fusion: str | Sequence[str]) -> str:
    return fusion if isinstance(fusion, str) else ",".join(fusion)


def _store(config: C, config_map: dict[str, C]) -> str:
    """Put ``config`` into the map and return its key, which no different configuration has."""
    key = get_adapter_config_hash(config)
    if config_map.setdefault(key, config) != config:
        key += "-" + sha1(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()
        config_map[key] = config
    return key


def _check_name(verb: str, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(
            f"{verb}({name!r}): {name!r} cannot be the name of a module; it must be a string that is not empty and has "
            "no '.'."
        )


def _check_keys(
    what: str, names: Mapping[str, str], config_map: Mapping[str, Any], identifiers: Mapping[str, Any]
) -> None:
    for name, key in names.items():
        if key not in config_map and key not in identifiers:
            raise ConfigError(
                f"{what} {name!r}: its configuration {key!r} is missing; {suggestion(key, [*config_map, *identifiers])}"
            )
