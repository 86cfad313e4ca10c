"""The site of methods that change a norm: its weight and its bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from .containers import AdapterDict
from .errors import AdapterError
from .evaluation import evaluate
from .signals import Signal
from .sites import Place, Site
from .topology import Anatomy, Block

OWN_FORWARD = "forward"
Normalise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class NormSignal(Signal):
    """At a norm: its input x (b, …, d) and what has been made of it.

    output: (b, …, d); None stands for the model's own norm(x), which is not computed before it is needed: an adapter
    that acts alone normalises with its own parameters, and nobody normalises twice. original: the model's norm.
    """

    x: Tensor
    original: Callable[[Tensor], Tensor]
    output: Tensor | None = None

    def filled(self) -> Self:
        """With the output computed."""
        return self if self.output is not None else replace(self, output=self.original(self.x))

    def result(self) -> Tensor:
        """The output."""
        return self.original(self.x) if self.output is None else self.output

    @classmethod
    def join(cls, parts: Sequence[Self], dim: int) -> Self:
        """As for any signal, with every output computed."""
        return super().join([part.filled() for part in parts], dim)

    @classmethod
    def mean(cls, parts: Sequence[Self], weights: Sequence[float | Tensor]) -> Self:
        """As for any signal, with every output computed; x stays as it is."""
        return replace(super().mean([part.filled() for part in parts], weights), x=parts[0].x)

    def select(self, mask: Tensor, other: Self) -> Self:
        """As for any signal, with every output computed."""
        return super(NormSignal, self.filled()).select(mask, other.filled())


class NormSite(Site):
    """A norm of any class, y = n(x) w + b."""

    kind = "norm"
    locations: ClassVar[dict[str, str]] = {"norm": "norm"}

    def __init__(self, place: Place, norm: nn.Module) -> None:
        """See the class."""
        super().__init__(place, norm)
        self.width = int(norm.get_parameter("weight").shape[0])

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """Every norm of the base model, those outside of the blocks first to last as well."""
        for path, module in _own_modules(anatomy.base_model, ""):
            if is_norm(module):
                block = _block_of(path, anatomy.blocks)
                layer, stack, layer_path = (-1, "", "") if block is None else (block.layer, block.stack, block.path)
                yield cls(Place(layer, stack, layer_path, path, "norm"), module)

    @property
    def weight(self) -> Tensor:
        """w (d,)."""
        return self.host.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """b (d,), if the norm has one."""
        return self.host._parameters.get("bias")

    def attach(self) -> list[RemovableHandle]:
        """Stand in for the norm's forward; a hook comes too late to save the norm's own pass."""
        host: Any = self.host
        if OWN_FORWARD in vars(host) and vars(host)[OWN_FORWARD] != self.forward:
            raise AdapterError(
                f"add_adapter: something else has replaced the forward of {self.host_path}; remove it first, or use "
                "LoRA or a bottleneck adapter."
            )
        host.forward = self.forward
        return []

    def detach(self) -> None:
        """Give the forward back."""
        vars(self.host).pop(OWN_FORWARD, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """norm(x) becomes what the adapters make of it."""
        plan = self.plan()
        if plan is None:
            return self.original(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        return evaluate(plan, NormSignal(None, x, self.original), self).result()

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The norm as the model has it."""
        return type(self.host).forward(self.host, *args, **kwargs)

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The norm with another w and b (d,)."""
        host: Any = self.host
        if type(host).forward is nn.LayerNorm.forward:
            return layer_norm(x, host.normalized_shape, weight, bias, host.eps)
        if type(host).forward is nn.RMSNorm.forward:
            return rms_norm(x, host.normalized_shape, weight, host.eps)
        stand_in = object.__new__(type(host))
        vars(stand_in).update(vars(host))
        vars(stand_in)["_parameters"] = {**host._parameters, "weight": weight, "bias": bias}
        output: Tensor = type(host).forward(stand_in, x)
        return output


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: it has a weight (d,), at most a bias (d,) beside it, and no children.

    Batch norms are none: they mix the rows of a batch.
    """
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    return (
        weight is not None
        and weight.dim() == 1
        and set(parameters) <= {"weight", "bias"}
        and (bias is None or bias.shape == weight.shape)
        and not any(not isinstance(child, AdapterDict) for child in module.children())
        and not isinstance(module, (_BatchNorm, nn.GroupNorm, nn.PReLU))
    )


def _own_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """All modules below, but those of adapters."""
    for name, below in module.named_children():
        if not isinstance(below, AdapterDict):
            own = f"{path}.{name}" if path else name
            yield own, below
            yield from _own_modules(below, own)


def _block_of(path: str, blocks: Sequence[Block]) -> Block | None:
    return next((block for block in blocks if path.startswith(f"{block.path}.")), None)
