"""The site of what acts on the embeddings, and inversely on the way back to words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .composition import Fuse
from .context import Part
from .errors import AdapterError
from .evaluation import evaluate
from .signals import HiddenSignal
from .sites import Place, S, Site
from .topology import Anatomy, input_embeddings, linear_shape, path_of


@dataclass(frozen=True)
class InverseSignal(HiddenSignal):
    """Hidden states (b, s, d) on their way back to words: each adapter is undone, the last of a Stack first."""

    backwards: ClassVar[bool] = True


class EmbeddingSite(Site):
    """The embeddings (b, s, e) that enter a model's first block; of an encoder-decoder, its encoder's.

    They are the output of the embeddings module, or where there is only a table, the input of the first block. The way
    back is the input of the map from hidden states to words, where it has the same width.
    """

    kind = "embedding"
    locations: ClassVar[dict[str, str]] = {"embedding": "invertible"}

    def __init__(self, place: Place, host: nn.Module, base_model: nn.Module, width: int, at_entry: bool) -> None:
        """at_entry: the embeddings enter the host, in place of leaving it; width: e."""
        super().__init__(place, host)
        self.base_model, self.width, self.at_entry = base_model, width, at_entry
        self._way_back: list[RemovableHandle] = []

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """One."""
        if not anatomy.blocks:
            return
        model, block = anatomy.base_model, anatomy.blocks[0]
        width = block.width
        found = _embeddings_module(anatomy)
        path, host = (block.path, block.module) if found is None else found
        if found is not None:
            width = getattr(model.config, "embedding_size", width)
        yield cls(Place(-1, block.stack, "", path, "embedding"), host, model, width, found is None)

    @property
    def root(self) -> tuple[str, nn.Module]:
        """The base model."""
        return "", self.base_model

    def attach(self) -> list[RemovableHandle]:
        """Hook the embeddings and the way back."""
        self.follow(self.owner.anatomy.output)
        if self.at_entry:
            return [self.host.register_forward_pre_hook(self.on_entry, prepend=True, with_kwargs=True)]
        return [self.host.register_forward_hook(self.on_output, prepend=True)]

    def detach(self) -> None:
        """Unhook the way back."""
        self.follow(None)

    def follow(self, output: nn.Module | None) -> None:
        """Hook `output`, and the one before no longer."""
        for handle in self._way_back:
            handle.remove()
        shape = None if output is None or self._idle else linear_shape(output)
        fits = output is not None and shape is not None and shape[0] == self.width
        self._way_back = [output.register_forward_pre_hook(self.on_words, prepend=True)] if output and fits else []

    def on_entry(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The block is given what the adapters make of the embeddings."""
        if self.plan() is None:
            return None
        if args:
            return (self.there(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.there(kwargs["hidden_states"])}

    def on_output(self, embeddings: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The embeddings become what the adapters make of them."""
        if self.plan() is None:
            return None
        return self.there(output) if isinstance(output, Tensor) else (self.there(output[0]), *output[1:])

    def on_words(self, output: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What leads to words is brought back to where the embeddings were."""
        return None if self.plan() is None else (self.back(args[0]), *args[1:])

    def fuse(self, tree: Fuse, signal: S) -> S:
        """What the first child does, as in 1.x: there is no weighted sum of bijections that could be undone."""
        return evaluate(tree.children[0], signal, self)

    def there(self, hidden: Tensor) -> Tensor:
        """What the adapters in force make of the embeddings (b, s, e)."""
        if hidden.shape[-1] != self.width:
            raise AdapterError(
                f"invertible adapters: the embeddings have width {hidden.shape[-1]}, {self.width} was read off the "
                "model; this architecture cannot have them. Use a configuration with inv_adapter=None."
            )
        return evaluate(self.plan(), HiddenSignal(None, hidden), self).hidden

    def back(self, hidden: Tensor) -> Tensor:
        """The inverse of ``there``."""
        return evaluate(self.plan(), InverseSignal(None, hidden), self).hidden


class Inverse:
    """The way back, for a prediction head that may have some rows of the batch only."""

    def __init__(self, site: EmbeddingSite, part: Part | None) -> None:
        """part: the head's rows; None if it has all."""
        self.site, self.part = site, part

    @classmethod
    def of(cls, sites: Iterable[Site], part: Part | None) -> Self | None:
        """The one of a model with these sites; None if nothing acts on its embeddings."""
        acting = (site for site in sites if isinstance(site, EmbeddingSite) and site.plan() is not None)
        return next((cls(site, part) for site in acting), None)

    def __call__(self, hidden: Tensor, rev: bool = True) -> Tensor:
        """hidden: (rows, s, e); with ``rev=False`` the way there."""
        change = self.site.back if rev else self.site.there
        if self.part is None:
            return change(hidden)
        return change(self.part.whole(hidden))[self.part.rows]  # the composition is about all rows


def _embeddings_module(anatomy: Anatomy) -> tuple[str, nn.Module] | None:
    """The largest module around the table of input embeddings that holds no block; None if that is the table itself."""
    model = anatomy.base_model
    table = input_embeddings(model)
    path = None if table is None else path_of(model, table)
    names = (path or "").split(".")
    blocks = {block.module for block in anatomy.blocks}
    for depth in range(1, len(names)):
        around = ".".join(names[:depth])
        module: nn.Module = model.get_submodule(around)
        if blocks.isdisjoint(module.modules()):
            return around, module
    return None
