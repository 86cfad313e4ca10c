"""Several configurations that make one adapter."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, Self, cast

from ..errors import ConfigError, suggestion
from .base import AdapterConfig


class ConfigUnion(AdapterConfig):
    """Several methods under one name, as in MAM and UniPELT.

    ``union[0]`` is a member and ``union["0.r"]`` a field of it; iteration gives the keys of that form.

    Raises:
        ConfigError: a member is no configuration or a union, or two members would sit in the same places.

    Example:
        >>> union = ConfigUnion(PrefixTuningConfig(), ParBnConfig())
        >>> union["1.reduction_factor"], len(union.configs)
        (2, 2)
    """

    architecture: str | None = "union"
    configs: tuple[AdapterConfig, ...]

    def __new__(cls, *configs: Any, **values: Any) -> Self:
        """Skip the check of fields: the members have made it."""
        return object.__new__(cls)

    def __init__(self, *configs: AdapterConfig) -> None:
        _check_members(configs)
        self.configs = configs

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The one attribute of a union, ``configs``."""
        return ("configs",)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, int):
            return self.configs[key]
        index, dot, field = key.partition(".")
        if dot and index.isdecimal() and int(index) < len(self.configs):
            return self.configs[int(index)][field]
        if key == "architecture":
            return self.architecture
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return (f"{index}.{field}" for index, config in enumerate(self.configs) for field in config)

    def __len__(self) -> int:
        return sum(map(len, self.configs))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.configs))})"

    def to_dict(self) -> dict[str, Any]:
        """The members as dictionaries, as plain Python values that JSON can hold."""
        return {"architecture": self.architecture, "configs": [config.to_dict() for config in self.configs]}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed in every member that has them.

        Raises:
            ConfigError: no member has the field, a value is not allowed or the members no longer fit together.
        """
        known = list(dict.fromkeys(field for config in self.configs for field in config))
        for name in changes:
            if name not in known:
                raise ConfigError(f"{type(self).__name__}: no member has a field {name!r}; {suggestion(name, known)}")
        union = object.__new__(type(self))
        ConfigUnion.__init__(union, *(config.replace(**_fields_of(config, changes)) for config in self.configs))
        return union

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The union of the dictionaries or configurations in ``config["configs"]``.

        Raises:
            ConfigError: a member is not a valid configuration, or the members do not fit together.
        """
        from .resolve import build_config, resolve_adapter_config  # which build unions

        if isinstance(config, AdapterConfig):
            return cast(Self, config)
        cls.check_known({name: value for name, value in config.items() if name != "architecture"})
        members = config.get("configs")
        if not isinstance(members, list | tuple):
            raise ConfigError(f"{cls.__name__}: the field 'configs' is {members!r}; it must be a list of members.")
        return cls(*(build_config(resolve_adapter_config(member)) for member in members))


def _fields_of(config: AdapterConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if name in config}


def _check_members(configs: tuple[Any, ...]) -> None:
    for config in configs:
        if not isinstance(config, AdapterConfig) or isinstance(config, ConfigUnion):
            raise ConfigError(
                f"ConfigUnion: a member is of type {type(config).__name__}; it must be the configuration of one method."
            )
    for first, second in combinations(configs, 2):
        if first.architecture == second.architecture and not _may_share(first, second):
            names = f"{type(first).__name__}, {type(second).__name__}"
            raise ConfigError(
                f"ConfigUnion({names}): both would sit in the same places; "
                "they must differ in leave_out, or two bottlenecks in mh_adapter and in output_adapter."
            )


def _may_share(first: AdapterConfig, second: AdapterConfig) -> bool:
    """Whether two configurations of one method can be members of one union: they may not meet in a layer."""
    if first.get("leave_out") or second.get("leave_out"):
        return True
    return first.architecture is None and all(
        first[place] != second[place] for place in ("mh_adapter", "output_adapter")
    )
