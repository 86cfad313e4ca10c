"""The sites of the vocabulary: the table from token ids to embeddings, and the map from hidden states to words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .composition import Setup
from .context import current
from .evaluation import evaluate
from .signals import LinearSignal, Signal
from .sites import LinearSite, Place, Site
from .topology import Anatomy, Linear, input_embeddings, linear_shape, path_of


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
        """Whether a map from hidden states to words has the same weight."""
        return any(output.weight is self.host.weight for output in self.owner.anatomy.onto_words)

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


@dataclass(frozen=True)
class OutputSignal(LinearSignal):
    """At a map from hidden states to words. tied: whether its weight is that of the token embeddings."""

    tied: bool = False


class OutputSite(LinearSite):
    """The map from hidden states to words. Its adapters are registered at the base model.

    Of a model with named heads it is every head's map that has the shape of the token embeddings, whose table, which
    is always there, is the host.
    """

    kind = "output"
    locations: ClassVar[dict[str, str]] = {"lm_head": "lm_head_lora"}

    def __init__(self, place: Place, output: nn.Module) -> None:
        self.of_heads = isinstance(output, nn.Embedding)
        inputs, outputs = output.weight.shape[::-1] if self.of_heads else linear_shape(output) or (0, 0)  # type: ignore[index]
        super().__init__(place, Linear("", output, int(inputs), int(outputs)))
        self.holder = "output_embeddings"

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """One, if the model has a head of language modelling, or named heads and tokens."""
        stack = anatomy.blocks[-1].stack if anatomy.blocks else ""
        table, output = input_table(anatomy.base_model), anatomy.output
        if anatomy.of_heads is not None and table is not None:
            yield cls(Place(-1, stack, "", "", "lm_head", outside="lm_head"), table)
        elif output is not None and linear_shape(output):
            known = (found.path for found in anatomy.outside if found.module is output)
            path = path_of(anatomy.base_model, output) or next(known, "lm_head")
            yield cls(Place(-1, stack, "", "", "lm_head", outside=path), output)

    @property
    def maps(self) -> list[nn.Module]:
        """The maps that the adapters act at."""
        shape = self.inputs, self.outputs
        return [output for output in self.owner.anatomy.onto_words if linear_shape(output) == shape]

    @property
    def tied(self) -> bool:
        """Whether the table of token embeddings has the same weight as one of the maps."""
        table = input_table(self.owner.anatomy.base_model)
        return table is not None and any(output.weight is table.weight for output in self.maps)

    @property
    def weight(self) -> Tensor:
        """W (words, d); of named heads the weight of the embeddings, which theirs starts as where they are tied."""
        return cast(Tensor, self.host.weight) if self.of_heads else super().weight

    @property
    def bias(self) -> Tensor | None:
        """(words,) that of the map; each named head has its own."""
        return None if self.of_heads else super().bias

    def write(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Named heads are not written to: see ``tied``."""
        if not self.of_heads:
            super().write(weight, bias)

    def attach(self) -> list[RemovableHandle]:
        """Hook the output of every map."""
        return [output.register_forward_hook(self.on_output, prepend=True) for output in self.maps]

    def on_output(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Wx becomes what the adapters make of it; a named head may have some rows of the batch only."""
        forward = current()
        part = None if forward is None or forward.sites is not self.owner else forward.part
        if part is None or self.plan() is None:
            return super().on_output(host, args, output)
        whole = super().on_output(host, (part.whole(args[0]),), part.whole(output))
        return None if whole is None else whole[part.rows]

    def signal(self, plan: Setup, host: nn.Module, x: Tensor, output: Tensor) -> OutputSignal:
        """As at any linear map, and whether this one is tied."""
        given = super().signal(plan, host, x, output)
        table = input_table(self.owner.anatomy.base_model)
        tied = table is not None and host.weight is table.weight
        return OutputSignal(None, x, output, given.owned, given.transformed, tied)

    def follow(self, output: nn.Module | None) -> None:
        """Sit at the maps onto words of now, if they have the same shape."""
        if not self.of_heads:
            if output is None or output is self.host or linear_shape(output) != (self.inputs, self.outputs):
                return
            self.host = output
        if self.adapters:
            for handle in self._handles:
                handle.remove()
            self._handles = self.attach()

    def is_current(self, base_model: Any) -> bool:
        """The model still has this map."""
        return (input_table(base_model) if self.of_heads else self.owner.anatomy.output) is self.host


def input_table(base_model: Any) -> nn.Embedding | None:
    """The table of token embeddings; None if the model does not read tokens."""
    found = input_embeddings(base_model)
    return found if isinstance(found, nn.Embedding) else None


def _factor(table: nn.Module) -> float:
    """BART and Gemma multiply what they look up by a number."""
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0))
    return float(scale)
