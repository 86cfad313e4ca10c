"""LoRA: a low-rank change of a linear map."""

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..configuration.base import LATER, AdapterConfig
from ..configuration.checks import (
    check_choice,
    check_dtype,
    check_fraction,
    check_integer,
    check_layers,
    check_letters,
    check_number,
    is_integer,
    is_number,
)
from ..configuration.registry import register_architecture, register_config
from ..context import token_mean
from ..derived import Derived
from ..errors import AdapterError
from ..grouping import Group
from ..method import AdapterModule, register
from ..signals import LinearSignal
from ..sites import LinearSite, Site
from .lora_init import FROM_WEIGHT, KEEPS_START, factors, initialise
from .patterns import (
    ATTENTION_MATRICES,
    asked_locations,
    check_pattern,
    check_targets,
    check_targets_used,
    check_used,
    is_placed,
    value_at,
)
from .products import plus_low_rank, plus_low_rank_by_row

RANDOM = ("lora", "bert", "ia3", "vera")
FROM_DATA = ("eva", "lora_ga")
INITIALISATIONS = (*RANDOM, "pissa", "pissa_niter_16", "olora", *FROM_DATA)
PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(eq=False)
class LoRAConfig(AdapterConfig):
    """Low-rank changes of the linear maps of a model. Hu et al. 2021, arXiv:2106.09685.

    ``selfattn_lora`` changes the projections of every attention that ``attn_matrices`` names (q, k, v and o, the
    output), ``intermediate_lora`` the first and ``output_lora`` the second map of the feed-forward block, in all layers
    but those in ``leave_out``. ``target_modules``, if it is given, says in place of all these flags which modules are
    changed: a list of ends of module paths, a regular expression for whole paths (relative to the base model), or
    "all-linear". The change has rank ``r`` and is scaled by ``alpha / r``. ``dtype`` names the torch dtype of the new
    parameters; None is the model's. ``composition_mode="scale"`` is (IA)³ (at the modules in ``scaled_inputs``, named
    as in ``target_modules``, it scales inputs), ``use_dora`` is DoRA, ``vera_d`` and ``vera_b`` (starts) are VeRA.

    Not in 1.x: ``use_rslora`` scales by ``alpha / sqrt(r)`` (arXiv:2312.03732). ``rank_pattern`` and ``alpha_pattern``
    give single places another r (0: none) or alpha; which key wins is said in ``methods/patterns.py``. ``lora_bias``
    adds a bias to B. ``embedding_lora`` changes the token embeddings, ``lm_head_lora`` the map onto the vocabulary.
    Experts have an A and a B each, or with ``shared_experts`` the same; ``router_lora`` changes their router.
    ``init_weights`` is one of 1.x's "lora", "bert", "ia3" and "vera", or "pissa", "pissa_niter_16" (or another number
    of iterations), "olora", "eva" or "lora_ga"; the last two wait for ``model.initialize_lora``. ``legacy`` marks DoRA
    and VeRA from files of 1.x, which are computed as there; new ones are those of the papers.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "lora"
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: list[int] = field(default_factory=list)
    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    attn_matrices: list[str] = field(default_factory=lambda: ["q", "v"])
    composition_mode: str = "add"
    init_weights: str = "lora"
    init_weights_seed: int | None = None
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None
    dtype: str | None = None
    use_rslora: bool = field(default=False, metadata=LATER)
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=LATER)
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata=LATER)
    lora_bias: bool = field(default=False, metadata=LATER)
    embedding_lora: bool = field(default=False, metadata=LATER)
    lm_head_lora: bool = field(default=False, metadata=LATER)
    legacy: bool = field(default=False, metadata=LATER)
    target_modules: str | list[str] | None = field(default=None, metadata=LATER)
    scaled_inputs: str | list[str] | None = field(default=None, metadata=LATER)
    shared_experts: bool = field(default=False, metadata=LATER, kw_only=True)
    router_lora: bool = field(default=False, metadata=LATER, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "leave_out")
        check_integer(self, "r", least=1)
        check_number(self, "alpha")
        check_fraction(self, "dropout")
        check_letters(self, "attn_matrices", ATTENTION_MATRICES)
        check_choice(self, "composition_mode", ("add", "scale"))
        if not (isinstance(self.init_weights, str) and FROM_WEIGHT.fullmatch(self.init_weights)):
            check_choice(self, "init_weights", INITIALISATIONS)
        for name in ("vera_d", "vera_b"):
            if self[name] is not None:
                check_number(self, name)
                self.normalize(name, float(self[name]))
        check_dtype(self, "dtype")
        check_targets(self, "target_modules")
        check_targets(self, "scaled_inputs")
        check_pattern(self, "rank_pattern", "integers >= 0", lambda value: is_integer(value) and value >= 0)
        check_pattern(self, "alpha_pattern", "numbers", is_number)
        self._check_options()
        if self.composition_mode == "scale":
            self._check_scale()

    @property
    def variant(self) -> str:
        """Which kind of change the fields describe: "lora", "ia3", "dora", "vera" or "dvora"."""
        if self.composition_mode == "scale":
            return "ia3"
        is_vera = self.vera_d is not None or self.vera_b is not None
        if self.use_dora:
            return "dvora" if is_vera else "dora"
        return "vera" if is_vera else "lora"

    def check_sites(self, sites: Sequence[Any]) -> None:
        """Every key of a pattern fits one of the sites."""
        check_targets_used(self, "target_modules", sites)
        check_targets_used(self, "scaled_inputs", sites)
        for name in PATTERNS:
            check_used(self, name, sites)

    def rank_at(self, site: Site) -> int:
        """The rank at a site; 0: it has no module."""
        return int(value_at(self.rank_pattern, site, self.r))

    def scale_at(self, site: Site) -> float:
        """alpha / r at a site, or alpha / sqrt(r)."""
        rank = self.rank_at(site)
        return float(value_at(self.alpha_pattern, site, self.alpha)) / (rank**0.5 if self.use_rslora else rank)

    def _check_options(self) -> None:
        """What 1.x does not have is for plain LoRA; DoRA has patterns and rsLoRA too."""
        options = [item.name for item in fields(LoRAConfig) if item.metadata == LATER and self[item.name]]
        if self.init_weights not in RANDOM:
            options.append("init_weights")
        kind = self.variant if self.architecture == LoRAConfig.architecture else "mtl_lora"
        kinds: dict[str, tuple[str, ...]] = dict.fromkeys((*PATTERNS, "use_rslora"), ("lora", "dora"))
        kinds |= {"legacy": ("dora", "vera", "dvora"), "scaled_inputs": ("ia3",)}
        for name in options:
            if name not in ("target_modules", "modules") and kind not in (having := kinds.get(name, ("lora",))):
                raise self.refusal(name, f"not possible with {kind}", f"only {' and '.join(having)} have it")
        if self.embedding_lora:
            for name in ("use_gating", "dropout", "lora_bias"):
                if self[name]:
                    raise self.refusal(name, "not possible with embedding_lora", "token ids have no such thing")
            if self.init_weights in FROM_DATA:
                wrong = "not possible with embedding_lora"
                raise self.refusal("init_weights", wrong, "it reads what linear maps are given")
        if KEEPS_START.fullmatch(self.init_weights) and self.alpha <= 0:
            raise self.refusal("alpha", f"not possible with init_weights={self.init_weights!r}", "it must be > 0")

    def _check_scale(self) -> None:
        """(IA)³ multiplies by one vector: it has no rank, no input to drop, no A and B."""
        wrong = "not possible with composition_mode='scale'"
        for name, only in {"r": 1, "dropout": 0, "use_dora": False, "vera_d": None, "vera_b": None}.items():
            if self[name] != only:
                raise self.refusal(name, wrong, f"it must be {only}")
        if self.init_weights == "vera":
            raise self.refusal("init_weights", wrong, "it must be 'ia3', 'bert' or 'lora'")


register_architecture("lora", LoRAConfig)
register_config("lora", LoRAConfig())


class LinearChange(AdapterModule[LinearSignal]):
    """What the kinds of change that a LoRAConfig describes have in common: their places, scale and gate.

    variant: which configurations mean this kind, see ``LoRAConfig.variant``.
    """

    container = "loras"
    variant: ClassVar[str]
    stack: str
    config: LoRAConfig
    rank: int
    scale: float
    dtype: torch.dtype | None
    gate: nn.Linear | None

    def __init__(self, config: LoRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__()
        # past nn.Module's own assignment, which takes most of the time that a small module takes to build
        vars(self).update(
            stack=site.source,
            config=config,
            rank=config.rank_at(site),
            scale=config.scale_at(site),
            dtype=None if config.dtype is None else getattr(torch, config.dtype),
            gate=None,
        )
        if config.use_gating:
            self.gate = nn.Linear(site.inputs, 1)
            nn.init.normal_(self.gate.weight, std=0.02)

    @classmethod
    def takes(cls, config: LoRAConfig) -> bool:
        """The configurations of this variant."""
        return config.variant == cls.variant

    @classmethod
    def wants(cls, config: LoRAConfig, site: LinearSite) -> bool:
        """At the projections that the configuration's flags and ``attn_matrices`` name."""
        return is_placed(config, site) and config.rank_at(site) > 0

    @classmethod
    def asks_for(cls, config: LoRAConfig) -> set[str]:
        """The location flags that are set."""
        return asked_locations(config, cls.site_type)

    def opened(self, signal: LinearSignal) -> Tensor | None:
        """(b, 1) how far the gate is open for each row, which is reported; None without a gate."""
        if self.gate is None:
            return None
        x = signal.x if signal.x.dtype == self.gate.weight.dtype else signal.x.to(self.gate.weight.dtype)
        gate = token_mean(torch.sigmoid(self.gate(x)), self.stack, signal)
        self.report_gate(gate, signal)
        return gate

    def refuse_gate(self) -> None:
        """A gated change cannot be merged.

        Raises:
            AdapterError: there is a gate.
        """
        if self.gate is not None:
            raise AdapterError("merge_adapter: Cannot merge LoRA layer with gating; its gate depends on the input.")


class LowRankChange(LinearChange):
    """y = Wx + scale up down x"""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """down (r, in) and up (out, r)."""

    def sources(self) -> list[Tensor]:
        """The tensors that the factors are computed from: here all of its own."""
        return [tensor for tensor in (*self._parameters.values(), *self._buffers.values()) if tensor is not None]

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        down, up = self.factors()
        return plus_low_rank(signal, self.dropped(signal.x, down.dtype), down, up, self.scale, self.opened(signal))

    def dropped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The input of the change: x after dropout, in the dtype of the matrices."""
        x = dropout(x, self.config.dropout, self.training) if self.config.dropout else x
        return x if x.dtype == dtype else x.to(dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + scale up down."""
        self.refuse_gate()
        down, up = self.factors()
        return weight + (up @ down * self.scale).to(weight.dtype)

    @classmethod
    def stacked_factors(cls, group: Group) -> tuple[Tensor, Tensor]:
        """down (n, r, in) and up (n, out, r) of all modules of a group."""
        raise NotImplementedError

    @classmethod
    def grouped(cls, group: Group, signal: LinearSignal, index: Tensor | None) -> LinearSignal:
        """See the class."""
        modules: list[Any] = group.modules
        down, up = cls.stacked_factors(group)
        x, scales = modules[0].dropped(signal.x, down.dtype), [module.scale for module in modules]
        return plus_low_rank_by_row(signal, x, down, up, scales, index)


@register(LoRAConfig, LinearSite)
class LoRA(LowRankChange):
    """y = Wx + s B A x with s = alpha / r

    Low-rank change of a linear map. Hu et al. 2021, arXiv:2106.09685, eq. 3. With ``use_gating`` the change is
    multiplied by a gate, one for each row; with ``lora_bias`` it is s (B A x + b). For starts with B A != 0 it is
    s (B A - B0 A0) x, see ``lora_init.py``.

    Site: LinearSite. Parameters: lora_A (r, in), lora_B (out, r), bias b (out), gate (1, in). Buffers: start_A = A0,
    start_B = B0. Start: identity (B = 0; or A = A0, B = B0). Merges: yes, unless gated.
    Differs from 1.x: in a Stack each LoRA sees x, not the previous change; a gated one is scaled by alpha / r too.
    """

    variant = "lora"
    bias: nn.Parameter | None
    start_A: Tensor | None
    start_B: Tensor | None
    mergeable: bool

    def __init__(self, config: LoRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.lora_A = nn.Parameter(torch.empty(self.rank, site.inputs, dtype=self.dtype))
        self.lora_B = nn.Parameter(torch.empty(site.outputs, self.rank, dtype=self.dtype))
        mergeable = not config.lora_bias or site.bias is not None
        vars(self).update(bias=None, start_A=None, start_B=None, mergeable=mergeable)
        if config.lora_bias:
            self.bias = nn.Parameter(torch.zeros(site.outputs, dtype=self.dtype))
        scheme = config.init_weights
        if FROM_WEIGHT.fullmatch(scheme) and not site.weight.is_meta:
            self.start_at(*factors(scheme, site.weight, self.rank, self.scale))
        else:
            self._initialise(scheme)
        if KEEPS_START.fullmatch(scheme):
            del self.start_A, self.start_B
            self.register_buffer("start_A", self.lora_A.detach().clone())
            self.register_buffer("start_B", self.lora_B.detach().clone())
            self._kept = Derived()

    def _initialise(self, scheme: str) -> None:
        scheme = scheme if scheme in RANDOM else "lora"
        initialise(self.lora_A, scheme, zero=False)
        initialise(self.lora_B, scheme, zero=True)

    @torch.no_grad()
    def start_at(self, down: Tensor, up: Tensor) -> None:
        """Set A and B."""
        self.lora_A.copy_(down)
        self.lora_B.copy_(up)

    @torch.no_grad()
    def keep_start(self) -> None:
        """Take the A and B of now for A0 and B0."""
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(self.lora_A)
            self.start_B.copy_(self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B; where there are A0 and B0 those of (B - B0) A + B0 (A - A0), which is exactly 0 at the start."""
        down, up, down_0, up_0 = self.lora_A, self.lora_B, self.start_A, self.start_B
        if down_0 is None or up_0 is None:
            return down, up
        return self._kept.get(
            "factors",
            (down, up, down_0, up_0),
            lambda: (torch.cat([down, down - down_0]), torch.cat([up - up_0, up_0], 1)),
        )

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        down, up = self.factors()
        x, gate = self.dropped(signal.x, down.dtype), self.opened(signal)
        changed = plus_low_rank(signal, x, down, up, self.scale, gate)
        if self.bias is None:
            return changed
        bias = self.bias * self.scale if gate is None else self.bias * self.scale * gate[:, None]
        return replace(changed, output=changed.output + bias.to(changed.output.dtype))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s B A."""
        if not self.mergeable:
            raise AdapterError(
                f"merge_adapter({self.name!r}): it has a bias (lora_bias=True), and {self.location} in layer "
                f"{self.layer} has none that it could be merged into. Keep the adapter active instead."
            )
        return super().merged_weight(weight)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """b of the map plus s b."""
        self.refuse_gate()
        return bias if self.bias is None else bias + (self.bias * self.scale).to(bias.dtype)

    def group_key(self) -> Hashable:
        """Without gate, bias and kept start; all but alpha must be the same."""
        if self.gate is not None or self.bias is not None or self.start_A is not None:
            return None
        return self.lora_A.shape, self.lora_B.shape, self.lora_A.dtype, self.config.dropout

    @classmethod
    def stacked_factors(cls, group: Group) -> tuple[Tensor, Tensor]:
        """Of all modules."""
        return group.stacked("lora_A"), group.stacked("lora_B")
