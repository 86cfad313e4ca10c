"""LoRA in a mixture of experts, and its sites: the weights of all experts, which are one parameter; the router."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from ..composition import Average, Block, Setup, Stack
from ..context import Kept
from ..errors import AdapterError, CompositionError
from ..evaluation import evaluate
from ..method import register
from ..signals import LinearSignal
from ..sites import Place, Site
from ..standing_in import FORWARD
from ..topology import Anatomy, linear_shape
from .lora import RANDOM, LinearChange, LoRA, LoRAConfig
from .lora_init import initialise


@dataclass(frozen=True)
class ExpertSignal(LinearSignal):
    """At the maps of all experts: x (b, s k, in) and output (b, s k, out), each token once for each of its k experts.

    experts: (b, s k) the number of the expert; top_k: k.
    """

    experts: Tensor = field(kw_only=True)
    top_k: int = field(kw_only=True)

    def positions(self) -> int:
        """The number of tokens of a row."""
        return super().positions() // self.top_k

    def window(self, start: int, stop: int) -> Self:
        """The tokens [start, stop)."""
        return super().window(start * self.top_k, stop * self.top_k)

    @classmethod
    def mean(cls, parts: Sequence[Self], weights: Sequence[float | Tensor]) -> Self:
        """As for any signal; inputs and experts are those of all parts."""
        return replace(super().mean(parts, weights), x=parts[0].x, experts=parts[0].experts)


def routed(x: Tensor, experts: Tensor, *weights: Tensor) -> Tensor:
    """(n, out) for each x (n, in) its product with its expert's matrix of every weight (E, out, in) in turn.

    Only the experts that some x goes to are computed.
    """
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=len(weights[0])).tolist()
    parts = []
    for expert, part in enumerate(torch.split(x[order], counts)):
        if len(part):
            for weight in weights:
                part = linear(part, weight[expert])
            parts.append(part)
    if not parts:
        return x.new_zeros(0, weights[-1].shape[1])
    return torch.cat(parts)[torch.argsort(order)]


class FusedExperts:
    """Stands in for the forward of a module of experts while adapters sit at its weights."""

    def __init__(self, host: nn.Module, parent: nn.Module) -> None:
        """parent: the module that is given hidden states (b, s, d) and gives the experts tokens without rows."""
        self.host, self.parent = host, parent
        self.sites: list[ExpertSite] = []
        self._kept = Kept()

    def attach(self) -> RemovableHandle:
        """Take the forward's place.

        Raises:
            AdapterError: somebody else has it.
        """
        taken = vars(self.host).setdefault(FORWARD, self.forward)
        if taken != self.forward or vars(self.host)["_is_expert_parallel"]:
            raise AdapterError(
                f"add_adapter: the experts at {self.sites[0].host_path} are spread over devices or have a forward of "
                "their own, which adapters cannot take the place of; use LoRA at the attention for this model."
            )
        return self.parent.register_forward_pre_hook(self.on_input, with_kwargs=True)

    def detach(self) -> None:
        """Give it back, after the last adapter."""
        if all(not site.adapters for site in self.sites):
            vars(self.host).pop(FORWARD, None)

    def on_input(self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the rows are."""
        given = (*args, *kwargs.values())
        self._kept.residual = given[0] if given and isinstance(given[0], Tensor) and given[0].dim() == 3 else None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the experts make of tokens (n, d), by their numbers (n, k) and weights (n, k)."""
        host: Any = self.host
        plans = [site.plan() for site in self.sites]
        if all(plan is None for plan in plans):
            output: Tensor = type(host).forward(host, *args, **kwargs)
            return output
        given = inspect.signature(type(host).forward).bind(host, *args, **kwargs).arguments
        _, hidden, index, weights = given.values()
        pairs = hidden.repeat_interleave(index.shape[-1], 0)
        first, last = self.sites
        inner = first.apply_plan(plans[0], pairs, index, self._rows(hidden))
        inner = host._apply_gate(inner) if host.has_gate else host.act_fn(inner)
        output = last.apply_plan(plans[1], inner, index, self._rows(hidden))
        if host.has_post_expert_norm:
            output = host.post_expert_norm(output)
        output = (output * weights.reshape(-1, 1)).view(*index.shape, -1).sum(1)
        return output.to(hidden.dtype)

    def _rows(self, hidden: Tensor) -> int | None:
        """b, as far as it is known."""
        whole = self._kept.residual
        return len(whole) if whole is not None and whole.shape[0] * whole.shape[1] == len(hidden) else None


class ExpertSite(Site):
    """The maps W (E, out, in) of all experts of a layer."""

    kind = "experts"
    locations: ClassVar[dict[str, str]] = {"intermediate": "intermediate_lora", "output": "output_lora"}

    def __init__(self, place: Place, experts: FusedExperts, name: str) -> None:
        """name: that of the parameter."""
        super().__init__(place, experts.host)
        self.experts, self.name, self.source = experts, name, place.stack
        self.holder = f"{name}_adapters"
        self.count, self.outputs, self.inputs = self.weight.shape
        experts.sites.append(self)

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """The two weights of every module of experts that transformers can compute in several ways."""
        for block in anatomy.blocks:
            for path, host in block.module.named_modules():
                if "has_post_expert_norm" in vars(host):
                    names = ["gate_up_proj" if vars(host)["has_gate"] else "up_proj", "down_proj"]
                    if any(getattr(host, name, torch.empty(0)).dim() != 3 for name in names):
                        continue  # quantised
                    fused = FusedExperts(host, block.module.get_submodule(path.rpartition(".")[0]))
                    for role, name in zip(cls.locations, names, strict=True):
                        yield cls(
                            Place(block.layer, block.stack, block.path, f"{block.path}.{path}", role), fused, name
                        )

    @property
    def module_path(self) -> str:
        """That of the parameter."""
        return f"{self.host_path}.{self.name}"

    @property
    def weight(self) -> Tensor:
        """W (E, out, in), a view."""
        weight = self.host.get_parameter(self.name)
        return weight.transpose(1, 2) if vars(self.host)["is_transposed"] else weight

    def attach(self) -> list[RemovableHandle]:
        """Compute the experts here."""
        return [self.experts.attach()]

    def detach(self) -> None:
        """No longer."""
        self.experts.detach()

    def apply_plan(self, plan: Setup, x: Tensor, index: Tensor, rows: int | None) -> Tensor:
        """(n k, out) from x (n k, in) of n tokens with their experts (n, k)."""
        numbers = index.flatten()
        output = routed(x, numbers, self.weight)
        if vars(self.host)["has_bias"]:
            output = output + self.host.get_parameter(f"{self.name}_bias")[numbers]
        if plan is None:
            return output
        if rows is None:
            _refuse_rows(plan, f"the experts at {self.host_path} are given tokens of which no rows are known")
        x, wide, numbers = (values.view(rows or 1, -1, *values.shape[1:]) for values in (x, output, numbers))
        signal = ExpertSignal(None, x, wide, experts=numbers, top_k=index.shape[-1])
        return evaluate(plan, signal, self).output.reshape(output.shape)


class RouterSite(Site):
    """The router's weight W (E, d), where no linear map has it: it is computed with that of the adapters."""

    kind = "router"
    locations: ClassVar[dict[str, str]] = {"router": "router_lora"}

    def __init__(self, place: Place, host: nn.Module) -> None:
        super().__init__(place, host)
        self.outputs, self.inputs = self.weight.shape
        self.source = place.stack

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """The module with a matrix for as many experts beside every module of experts."""
        for site in ExpertSite.find(anatomy):
            for name, host in site.experts.parent.named_children() if site.role == "output" else ():
                weight = host._parameters.get("weight")
                if (
                    linear_shape(host) is None
                    and weight is not None
                    and weight.dim() == 2
                    and len(weight) == site.count
                ):
                    path = f"{site.host_path.rpartition('.')[0]}.{name}"
                    yield cls(Place(site.layer, site.stack, site.layer_path, path, "router"), host)

    @property
    def weight(self) -> Tensor:
        """W (E, d)."""
        return self.host._parameters["weight"]  # type: ignore[return-value]

    def attach(self) -> list[RemovableHandle]:
        """Hook the router on both sides."""
        return [
            self.host.register_forward_pre_hook(self.on_input),
            self.host.register_forward_hook(self.on_output, always_call=True),
        ]

    def on_input(self, host: nn.Module, args: Any) -> None:
        """What the adapters make of the weight is in front of it."""
        plan = self.plan()
        if plan is not None:
            _refuse_rows(plan, f"the router at {self.host_path} has one weight for all rows")
            vars(host)["weight"] = self._of(plan, self.weight)

    def on_output(self, host: nn.Module, args: Any, output: Any) -> None:
        """The weight is seen again."""
        vars(host).pop("weight", None)

    def _of(self, plan: Setup, weight: Tensor) -> Tensor:
        if isinstance(plan, Stack):
            for child in plan.children:
                weight = self._of(child, weight)
            return weight
        if isinstance(plan, Average):
            parts = zip(plan.children, plan.weights, strict=True)
            return torch.stack([self._of(child, weight) * share for child, share in parts]).sum(0)
        return weight if plan is None else self.adapters[str(plan)].merged_weight(weight)


def _refuse_rows(plan: Setup, why: str) -> None:
    """Refuse a block that is about rows, or positions."""
    for block in plan.blocks() if isinstance(plan, Block) else ():
        if not isinstance(block, (Stack, Average)):
            raise CompositionError(f"{block}: {why}; use a name, Stack or Average at this place.")


@register(LoRAConfig, ExpertSite)
class ExpertLoRA(LinearChange):
    """y = W_e x + s B_e A_e x for the experts e that x is routed to, with s = alpha / r

    LoRA of the fused weights of all experts. With ``shared_experts`` A and B are the same for all of them.

    Site: ExpertSite. Parameters: lora_A (E, r, in), lora_B (E, out, r); shared (r, in), (out, r).
    Start: identity (B = 0). Merges: yes.
    """

    variant = "lora"

    def __init__(self, config: LoRAConfig, site: ExpertSite, shared: nn.Module | None = None) -> None:
        for option in ("use_gating", "lora_bias"):
            if config[option]:
                raise config.refusal(option, "not possible at the weights of experts", "it must be False")
        if config.init_weights not in RANDOM:
            raise config.refusal("init_weights", "not possible at the weights of experts", f"use one of {RANDOM}")
        super().__init__(config, site, shared)  # type: ignore[arg-type]
        each = () if config.shared_experts else (site.count,)
        self.lora_A = nn.Parameter(torch.empty(*each, self.rank, site.inputs, dtype=self.dtype))
        self.lora_B = nn.Parameter(torch.empty(*each, site.outputs, self.rank, dtype=self.dtype))
        for matrices, zero in ((self.lora_A, False), (self.lora_B, True)):
            for matrix in matrices if each else (matrices,):
                initialise(matrix, config.init_weights, zero=zero)

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        given = signal
        x = given.x if given.x.dtype == self.lora_A.dtype else given.x.to(self.lora_A.dtype)
        x = nn.functional.dropout(x, self.config.dropout, self.training)
        if self.lora_A.dim() == 2:
            change = linear(linear(x, self.lora_A), self.lora_B)
        elif isinstance(given, ExpertSignal):
            change = routed(x.flatten(0, 1), given.experts.flatten(), self.lora_A, self.lora_B).view(given.output.shape)
        return replace(given, output=given.output + (change * self.scale).to(given.output.dtype))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W_e + s B_e A_e (E, out, in)."""
        return weight + (self.lora_B @ self.lora_A * self.scale).to(weight.dtype)


@register(LoRAConfig, RouterSite)
class RouterLoRA(LoRA):
    """W x + s B A x at the router of a mixture of experts, where ``router_lora`` is set.

    Site: RouterSite. Parameters, start and merging as of LoRA.
    """

    def __init__(self, config: LoRAConfig, site: Any, shared: nn.Module | None = None) -> None:
        for option in ("use_gating", "lora_bias", "dropout"):
            if config[option]:
                raise AdapterError(f"add_adapter(LoRAConfig({option}={config[option]})): a router has no such thing.")
        super().__init__(config, site, shared)
