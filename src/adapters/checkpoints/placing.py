"""Putting what was read into a model, so that a failure leaves the model as it was."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from ..composition import Fuse
from ..configuration import AdapterConfig
from ..errors import CheckpointError
from ..method import filled_later
from ..placement import check_fused
from .files import Weights
from .provenance import check_architecture, origin, prefixes
from .weights import Fit, Slots, adapter_slots, compare, fill, fusion_slots, prefix_of, renamed, report

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin

logger = logging.getLogger(__name__)

C = TypeVar("C")
Snapshot = dict[str, tuple[Tensor, ...]]
REHEARSAL = "__rehearsal__"


class Bearer(ABC, Generic[C]):
    """What a checkpoint is put into: the adapters or the fusions of a model, by name."""

    def __init__(self, model: "ModelAdaptersMixin") -> None:
        self.model = model

    @abstractmethod
    def config(self, name: str) -> C | None:
        """What defines the one of that name; None if there is none."""

    @abstractmethod
    def add(self, name: str, config: C, filled: bool = True) -> None:
        """Makes a new one; if it is to be `filled`, its tensors may hold anything."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Removes one."""

    @abstractmethod
    def slots(self, name: str) -> Slots:
        """Its tensors."""


class Adapters(Bearer[AdapterConfig]):
    """The adapters of a model."""

    def config(self, name: str) -> AdapterConfig | None:
        """The configuration of an adapter."""
        return self.model.adapters_config.get(name)

    def add(self, name: str, config: AdapterConfig, filled: bool = True) -> None:
        """Makes a new adapter.

        Raises:
            CheckpointError: There is no memory for it.
        """
        try:
            with filled_later() if filled else nullcontext():
                self.model.add_adapter(name, config=config)
        except (MemoryError, OverflowError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(
                f"load_adapter({name!r}): it cannot be made as its config says: {reason}. Check the sizes in the file."
            ) from error

    def delete(self, name: str) -> None:
        """Removes an adapter."""
        self.model.delete_adapter(name)

    def slots(self, name: str) -> Slots:
        """The tensors of an adapter."""
        return adapter_slots(self.model, name)


class Fusions(Bearer[tuple[AdapterConfig, list[str]]]):
    """The fusions of a model, each defined by its configuration and the adapters it fuses."""

    def config(self, name: str) -> tuple[AdapterConfig, list[str]] | None:
        """The configuration and the adapters of a fusion."""
        config, adapters = self.model.adapters_config.get_fusion(name)
        return None if config is None else (config, list(adapters or ()))

    def add(self, name: str, config: tuple[AdapterConfig, list[str]], filled: bool = True) -> None:
        """Makes a new fusion."""
        self.model.add_adapter_fusion(Fuse(*config[1], name=name), config[0])

    def delete(self, name: str) -> None:
        """Removes a fusion."""
        self.model.delete_adapter_fusion(name)

    def slots(self, name: str) -> Slots:
        """The tensors of a fusion."""
        return fusion_slots(self.model, name)


@contextmanager
def all_or_nothing(model: "ModelAdaptersMixin", outer: ExitStack | None = None) -> Iterator[ExitStack]:
    """Collects what takes a change of the model back, and does so if the block fails; `outer` may still do so later."""
    with ExitStack() as undo:
        undo.callback(remembered_activation(model))
        yield undo
        kept = undo.pop_all()
        if outer is not None:
            outer.push(kept)


@dataclass(frozen=True)
class Saved(Generic[C]):
    """What a folder says.

    Attributes:
        name: What it will be called in the model.
        config: What defines it.
        weights: Its tensors by 1.x's keys for that name.
        file: The content of its config file.
    """

    name: str
    config: C
    weights: Weights
    file: Mapping[str, Any]


def place(
    bearer: Bearer[C],
    saved: Saved[C],
    asked: str,
    loading_info: dict[str, Any] | None,
    undo: ExitStack,
    complete: bool = True,
) -> None:
    """Adds or overwrites what was saved; closing `undo` takes it all back.

    One that is there with an equal configuration keeps its parameters, which then hold other values: an optimizer may
    know them. Else it is replaced, once it is known that the weights will fit.

    Args:
        asked: The call, for messages.
        complete: Whether tensors without a place in the model are worth a warning.

    Raises:
        CheckpointError: The weights do not fit.
    """
    model, name, present = bearer.model, saved.name, bearer.config(saved.name)
    known, own, about = prefixes(saved.file, saved.weights, model), prefix_of(model), origin(saved.file, model)

    def fit(slots: Slots) -> Fit:
        return compare(slots, saved.weights, known, own, asked, about)

    active_again = remembered_activation(model)
    if present is not None:
        logger.warning("%s: overwriting %r.", asked, name)
    if present is not None and present != saved.config:
        with _rehearsed(bearer, saved.config) as slots:
            fit(renamed(slots, REHEARSAL, name))
            if isinstance(bearer, Adapters):
                check_fused(model.adapter_sites, model.adapters_config, name, REHEARSAL)
        undo.callback(_reinstate, bearer, name, present, _snapshot(bearer.slots(name)))
        bearer.delete(name)
    if present != saved.config:
        bearer.add(name, saved.config)
    if present is None:
        undo.callback(bearer.delete, name)
    slots = bearer.slots(name)
    found = fit(slots)
    if found.missing and present != saved.config:  # which need start values
        bearer.delete(name)
        bearer.add(name, saved.config, filled=False)
        slots = bearer.slots(name)
    if present == saved.config:
        undo.callback(_restore, slots, _snapshot(slots))
    fill(slots, found.matched)
    active_again()
    check_architecture(saved.file, saved.weights, model, asked)
    report(found, asked, loading_info, complete)


@contextmanager
def _rehearsed(bearer: Bearer[C], config: C) -> Iterator[Slots]:
    """The tensors of one that is there for the time of the block."""
    bearer.add(REHEARSAL, config)
    try:
        yield bearer.slots(REHEARSAL)
    finally:
        bearer.delete(REHEARSAL)


def _reinstate(bearer: Bearer[C], name: str, config: C, snapshot: Snapshot) -> None:
    if bearer.config(name) is not None:
        bearer.delete(name)
    bearer.add(name, config)
    _restore(bearer.slots(name), snapshot)


def _snapshot(slots: Mapping[str, tuple[Tensor, ...]]) -> Snapshot:
    return {
        key: tuple(part.detach().clone().requires_grad_(part.requires_grad) for part in parts)
        for key, parts in slots.items()
    }


@torch.no_grad()
def _restore(slots: Slots, snapshot: Snapshot) -> None:
    for key, parts in slots.items():
        for part, old in zip(parts, snapshot[key], strict=True):
            part.copy_(old)
            part.requires_grad_(old.requires_grad)


def remembered_activation(model: "ModelAdaptersMixin") -> Callable[[], None]:
    """A function that activates again what is active now: adapters, skipped layers, and heads with their labels."""
    from .heads import is_flexible  # which places heads

    adapters, skipped = model.active_adapters, model.adapters_config.skip_layers
    labels = model.config.label2id, model.config.id2label
    head = model.active_head if is_flexible(model) else None

    def activate() -> None:
        if model.active_adapters != adapters or model.adapters_config.skip_layers != skipped:
            model.set_active_adapters(adapters, skipped)
        if is_flexible(model):
            model.active_head = head
        if (model.config.label2id, model.config.id2label) != labels:
            model.config.label2id, model.config.id2label = labels

    return activate
