"""What every configuration is: a frozen dataclass, a mapping, and a value with equality and a hash."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Self, cast

from ..errors import ConfigError, listing, suggestion

ATOMS = {bool, float, int, str, type(None)}
LATER = {"later": True}
"""Metadata of a field that 1.x does not have: ``to_dict``, and so a file, leaves it out where it is at its default."""


@dataclass(eq=False)
class Placed:
    """The parts of a composite model where an adapter sits; None: all of them."""

    modules: str | list[str] | None = field(default=None, metadata=LATER, kw_only=True)


class AdapterConfig(Placed, Mapping[str, Any]):
    """How one adapter is built: the base of the configuration of every method.

    A method's configuration is a dataclass (declared with ``eq=False``) below this class. Its fields can be read as
    attributes and as the items of a mapping, and are set once: a changed copy comes from :meth:`replace`.
    Two configurations are equal if their fields are, whatever their class is.

    Every one has ``modules``, the parts of the model where its adapter sits (None: all): their names, such as "vision",
    "text" or "decoder", or patterns of module paths, such as "layers.1?.*".

    Raises:
        ConfigError: a field is unknown or its value is not allowed.

    Example:
        >>> config = AdapterConfig.load("lora", r=16)
        >>> config.r, config["alpha"], config == LoRAConfig(r=16)
        (16, 8, True)
    """

    architecture: str | None = None
    """The method's name in files; ``None`` stands for a bottleneck (or a fusion)."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Refuse unknown fields with a message that suggests the right one."""
        if cls.__init__ is Placed.__init__:
            raise ConfigError(f"{cls.__name__}(): the class is abstract; use the configuration of a method.")
        cls.check_known(values)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.type in (bool, "bool") and not isinstance(self[item.name], bool):
                raise self.refusal(item.name, "no truth value", "it must be True or False")
        if self.modules is not None:
            parts = [self.modules] if isinstance(self.modules, str) else self.modules
            if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(p, str) and p for p in parts):
                wanted = 'it must be a list of such as "vision", "decoder" and patterns of module paths, or None'
                raise self.refusal("modules", "no list of parts of a model", wanted)
            self.normalize("modules", list(parts))
        if "architecture" in self and self.architecture != type(self).architecture:
            raise self.refusal("architecture", "another method", f"it must be {type(self).architecture!r}")
        seed = self.get("init_weights_seed")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise self.refusal("init_weights_seed", "no seed", "it must be an integer or None")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the fields in the order of their declaration."""
        return _field_names(cls)

    @classmethod
    def check_known(cls, names: Mapping[str, Any]) -> None:
        """Raise a ConfigError if one of ``names`` is not a field of this class."""
        for name in names:
            if name not in cls.field_names():
                raise ConfigError(f"{cls.__name__}: unknown field {name!r}; {suggestion(name, cls.field_names())}")

    def refusal(self, field: str, wrong: str, right: str) -> ConfigError:
        """The error about the value of ``field``: what is ``wrong`` with it and what would be ``right``."""
        value = self[field]
        return ConfigError(f"{type(self).__name__}({field}={value!r}): {value!r} is {wrong}; {right}.")

    def check_sites(self, sites: Sequence[Any]) -> None:
        """Refuse what has no meaning at the sites that a model has for the method; called before modules are built."""

    def normalize(self, field: str, value: Any) -> None:
        """Give ``field`` the one form of its value, which only ``__post_init__`` may do."""
        object.__setattr__(self, field, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or name not in self.field_names():
            raise FrozenInstanceError(
                f"{type(self).__name__}.{name} = {value!r}: a configuration does not change; "
                f"make a changed copy with config.replace({name}={value!r})."
            )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"del {type(self).__name__}.{name}: a configuration does not change.")

    def __getitem__(self, key: str) -> Any:
        return self.__dict__[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.field_names())

    def __len__(self) -> int:
        return len(self.field_names())

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, AdapterConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(_hashable(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """The fields in the order of their declaration, as plain Python values that JSON can hold.

        Fields that 1.x does not have are left out where they are at their default.
        """
        values, left_out = _plain(self), _left_out(type(self))
        return {name: value for name, value in values.items() if name not in left_out or left_out[name] != value}

    def replace(self, **changes: Any) -> Self:
        """A copy of the same class with some fields changed.

        Raises:
            ConfigError: a field is unknown or its value is not allowed.
        """
        return type(self)(**{**self.to_dict(), **changes})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The configuration of this class with the given fields; an existing configuration is returned as it is.

        Raises:
            ConfigError: a field is unknown or missing, or its value is not allowed.
        """
        if isinstance(config, AdapterConfig):
            return cast(Self, config)
        required = [field.name for field in fields(cls) if field.default is field.default_factory is MISSING]
        missing = [name for name in required if name not in config]
        if missing:
            raise ConfigError(f"{cls.__name__}: the fields {listing(missing)} are missing; they have no default.")
        return cls(**config)

    @staticmethod
    def load(
        config: "Mapping[str, Any] | str | None", download_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> "AdapterConfig | None":
        """The configuration that ``config`` stands for, with the fields in ``kwargs`` changed.

        ``config`` is an identifier (``"lora"``), a config string (``"lora[r=16]|par_bn"``), a dictionary, the path of a
        JSON file or a configuration. An empty one gives None. A keyword argument that is None changes nothing.
        ``download_kwargs`` is accepted for scripts written for 1.x and has no effect.

        Raises:
            ConfigError: ``config`` is none of these, a field is unknown or a value is not allowed.

        Example:
            >>> AdapterConfig.load("seq_bn", reduction_factor=8).reduction_factor
            8
        """
        from .resolve import load_config  # the classes of the methods derive from this one

        return load_config(config, kwargs)


@cache
def _field_names(cls: type[AdapterConfig]) -> tuple[str, ...]:
    return tuple(item.name for item in sorted(fields(cls), key=lambda item: item.kw_only is True))


@cache
def _left_out(cls: type[AdapterConfig]) -> dict[str, Any]:
    marked = [field for field in fields(cls) if field.metadata == LATER]
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory() for field in marked
    }


def _plain(value: Any) -> Any:
    """A copy, as `dataclasses.asdict` makes it in several times the time."""
    if type(value) in ATOMS:
        return value
    if isinstance(value, AdapterConfig):
        return {name: _plain(value.__dict__[name]) for name in value.field_names()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return {key: _plain(entry) for key, entry in value.items()} if isinstance(value, dict) else deepcopy(value)


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return frozenset((key, _hashable(entry)) for key, entry in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
