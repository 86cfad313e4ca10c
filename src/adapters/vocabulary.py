"""The sites of the vocabulary: the table from token ids to embeddings, and the map from hidden states to words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .evaluation import evaluate
from .signals import Signal
from .sites import LinearSite, Place, Site
from .topology import Anatomy, input_embeddings, linear_shape, path_of


@dataclass(frozen=True)
class LookupSignal(Signal):
    """At a table of embeddings: token ids (b, s) and their embeddings (b, s, d).

    factor: what the model multiplies the rows of its table by.
    """

    ids: Tensor
    output: Tensor
    factor: float = 1.0


class LookupSite(Site):
    """The table E (words, d) of token embeddings, with every module that shares it.

    As a linear map of one-hot rows it is W = E^T, with `inputs` = words and `outputs` = d.
    """

    kind = "lookup"
    locations: ClassVar[dict[str, str]] = {"embedding": "embedding_lora"}

    def __init__(self, place: Place, host: nn.Embedding) -> None:
        super().__init__(place, host)
        self.inputs, self.outputs = host.num_embeddings, host.embedding_dim
        self.source = place.stack
        self._factors: dict[int, float] = {}

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """One, if the model reads tokens."""
        table = input_table(anatomy.base_model)
        if table is not None:
            path = path_of(anatomy.base_model, table)
            stack = anatomy.blocks[0].stack if anatomy.blocks else ""
            yield cls(Place(-1, stack, "", path or "", "embedding"), table)

    @property
    def weight(self) -> Tensor:
        """E^T (d, words), a view."""
        weight: Tensor = self.host.weight.T  # type: ignore[assignment]
        return weight

    @property
    def tied(self) -> bool:
        """Whether the map from hidden states to words has the same weight."""
        output: Any = self.owner.anatomy.output
        return output is not None and output.weight is self.host.weight

    def attach(self) -> list[RemovableHandle]:
        """Hook every table that may share the weight: encoder and decoder can have one each, tied later."""
        tables = [
            module
            for module in self.owner.anatomy.base_model.modules()
            if isinstance(module, nn.Embedding) and module.weight.shape == self.host.weight.shape
        ]
        self._factors = {id(table): _factor(table) for table in tables}
        return [table.register_forward_hook(self.on_output, prepend=True) for table in tables]

    def on_output(self, table: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The embeddings become what the adapters make of them."""
        plan = self.plan()
        if plan is None or table.weight is not self.host.weight:
            return None
        factor = self._factors[id(table)] if id(table) in self._factors else _factor(table)
        return evaluate(plan, LookupSignal(None, args[0], output, factor), self).output


class OutputSite(LinearSite):
    """The map from hidden states to words of the model's own head. Its adapters are registered at the base model."""

    kind = "output"
    locations: ClassVar[dict[str, str]] = {"lm_head": "lm_head_lora"}

    def __init__(self, place: Place, output: nn.Module) -> None:
        inputs, outputs = linear_shape(output) or (0, 0)
        super().__init__(place, output, inputs, outputs)
        self.holder = "output_embeddings"

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """One, if the model has a head of language modelling."""
        output = anatomy.output
        if output is not None and linear_shape(output):
            stack = anatomy.blocks[-1].stack if anatomy.blocks else ""
            known = (found.path for found in anatomy.outside if found.module is output)
            path = path_of(anatomy.base_model, output) or next(known, "lm_head")
            yield cls(Place(-1, stack, "", "", "lm_head", outside=path), output)

    @property
    def tied(self) -> bool:
        """Whether the table of token embeddings has the same weight."""
        table = input_table(self.owner.anatomy.base_model)
        return table is not None and table.weight is self.host.weight

    def follow(self, output: nn.Module | None) -> None:
        """Sit at `output` from now on, if it has the same shape."""
        if output is None or output is self.host or linear_shape(output) != (self.inputs, self.outputs):
            return
        self.host = output
        if self.adapters:
            for handle in self._handles:
                handle.remove()
            self._handles = self.attach()

    def is_current(self, base_model: Any) -> bool:
        """The model still has this map."""
        return self.owner.anatomy.output is self.host


def input_table(base_model: Any) -> nn.Embedding | None:
    """The table of token embeddings; None if the model does not read tokens."""
    found = input_embeddings(base_model)
    return found if isinstance(found, nn.Embedding) else None


def _factor(table: nn.Module) -> float:
    """BART and Gemma multiply what they look up by a number."""
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0))
    return float(scale)
