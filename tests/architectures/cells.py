"""What a method has to keep on a type of model: the checks of one cell of the matrix, from cheap to dear."""

import copy
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from inputs import inputs_for
from meaning import facts_of, lacking
from models import generating_class, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import adapters
from adapters import AdapterConfig, AdapterError, LoRAConfig, Parallel

METHODS: dict[str, AdapterConfig] = {
    "lora": LoRAConfig(r=2, alpha=4, attn_matrices=["q", "k", "v"]),
    "ia3": AdapterConfig.load("ia3[intermediate_lora=False]"),
    "seq_bn": AdapterConfig.load("seq_bn[reduction_factor=4,non_linearity='leakyrelu']"),
    "double_seq_bn": AdapterConfig.load("double_seq_bn[reduction_factor=4,non_linearity='leakyrelu']"),
    "loreft": AdapterConfig.load("loreft[r=2]"),
    "prefix_tuning": AdapterConfig.load("prefix_tuning_flat[prefix_length=3]"),
    "prompt_tuning": AdapterConfig.load("prompt_tuning[prompt_length=3]"),
}
EVERYWHERE: dict[str, AdapterConfig] = {
    "lora": LoRAConfig(r=2, alpha=4, target_modules=".*"),
    "ia3": AdapterConfig.load("ia3[target_modules='.*']"),
}
"""What stands for a method whose default names the attention's maps, on models that do not attend: all maps."""


class Broken(AssertionError):
    """A check that failed."""


@dataclass
class Bare:
    """The model of a type without adapters, and what it can do by itself."""

    plain: PreTrainedModel
    batch: dict[str, Any]
    abilities: dict[str, bool] = field(default_factory=dict)

    @functools.cached_property
    def wanted(self) -> list[Tensor]:
        """The outputs."""
        return outputs(self.plain, self.batch)

    @functools.cached_property
    def facts(self) -> set[str]:
        """See ``meaning.py``."""
        return facts_of(self.plain, self.batch)

    def can(self, check: str) -> bool:
        """Whether it can do by itself what a check asks for: else the check says nothing about adapters."""
        if check not in self.abilities:
            ability = ABILITIES.get(check)
            self.abilities[check] = ability is None or _passes(functools.partial(ability, self))
        return self.abilities[check]


@dataclass
class Case:
    """A type with a method: the bare model, and one with the adapter."""

    bare: Bare
    method: str
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        self.plain, self.batch, self.wanted = self.bare.plain, self.bare.batch, self.bare.wanted
        self.model, self.config = with_adapters(self.plain), METHODS[self.method]


def _passes(check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception:  # whatever a model's own code says
        return False
    return True


def with_adapters(plain: PreTrainedModel) -> Any:
    """A copy that can have adapters."""
    model = copy.deepcopy(plain)
    adapters.init(model)
    return model


def outputs(model: Any, batch: dict[str, Any], rows: int = 1) -> list[Tensor]:
    """All floating tensors of one pass without gradients, with the same chance in every pass."""
    torch.manual_seed(5)
    with torch.no_grad():
        return list(tensors(model(**copy.deepcopy(batch))))


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating tensors in an output; caches are none of it."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors(entry)


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(found) == len(wanted) and all(
        one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(found, wanted, strict=True)
    )


def disturb(model: Any, name: str, seed: int = 3, scale: float = 0.3) -> None:
    """Move the adapter's parameters, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in own_parameters(model, name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=scale)


def own_parameters(model: Any, name: str) -> list[Tensor]:
    """The parameters of an adapter, each once."""
    modules = [*(module for _, module in model.adapter_sites.holding(name)), *model.adapter_sites.shared(name).values()]
    return list({id(parameter): parameter for module in modules for parameter in module.parameters()}.values())


def require(holds: bool, what: str) -> None:
    """Stop at the first check that fails."""
    if not holds:
        raise Broken(what)


def nothing_changes(case: Case) -> None:
    """``adapters.init`` changes no output bit."""
    require(same(outputs(case.model, case.batch), case.wanted), "init changes the output")


def adding(case: Case) -> None:
    """An adapter can be added."""
    try:
        case.model.add_adapter("a", case.config)
    except AdapterError:
        if "attention" in case.bare.facts or case.method not in EVERYWHERE:
            raise
        case.config = EVERYWHERE[case.method]
        case.model.add_adapter("a", case.config)


def acting(case: Case) -> None:
    """The adapter changes the output, to something finite; off, it does not."""
    disturb(case.model, "a")
    require(same(outputs(case.model, case.batch), case.wanted), "an adapter that is not active acts")
    case.model.set_active_adapters("a")
    found = outputs(case.model, case.batch)
    require(not same(found, case.wanted), "the adapter does not act")
    pairs = zip(found, case.wanted, strict=False)
    require(all(one.isfinite().all() or not other.isfinite().all() for one, other in pairs), "the output is not finite")
    case.model.set_active_adapters(None)
    require(same(outputs(case.model, case.batch), case.wanted), "switched off, it acts")


def learning(case: Case) -> None:
    """Its parameters get finite gradients, and no others."""
    model = case.model
    model.train_adapter("a")
    model.eval()
    own = {id(parameter) for parameter in own_parameters(model, "a")}
    body = {id(p) for p in model.base_model.parameters()}  # a head is trained with the adapter
    require(
        {id(p) for p in model.parameters() if p.requires_grad and id(p) in body | own} == own, "others are trainable"
    )
    loss(model, case.batch).backward()
    reached = [p.grad for p in own_parameters(model, "a") if p.grad is not None]
    require(len(reached) > 0 and any(bool(grad.any()) for grad in reached), "no gradient reaches it")
    require(all(bool(torch.isfinite(grad).all()) for grad in reached), "a gradient is not finite")
    require(
        all(p.grad is None for p in model.base_model.parameters() if id(p) not in own), "other parameters get gradients"
    )
    model.zero_grad()
    model.set_active_adapters(None)


def loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """A number that every output has a part in."""
    torch.manual_seed(5)
    cached = "use_cache" in inspect.signature(type(model).forward).parameters
    found = [
        one
        for one in tensors(model(**copy.deepcopy(batch), **({"use_cache": False} if cached else {})))
        if one.requires_grad
    ]
    require(len(found) > 0, "no output depends on it")
    generator = torch.Generator().manual_seed(7)
    parts = [(one.float().nan_to_num() * torch.randn(one.shape, generator=generator)).mean() for one in found]
    return torch.stack(parts).sum()


def storing(case: Case) -> None:
    """Saved and loaded into a fresh model it is the same adapter."""
    wanted = active(case.model, case.batch, "a")
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_adapter(folder, "a")
        other = with_adapters(case.plain)
        other.load_adapter(folder, load_as="b")
    close(active(other, case.batch, "b"), wanted, "loaded, it is not what was saved")


def active(model: Any, batch: dict[str, Any], setup: Any) -> list[Tensor]:
    """The outputs under a setup."""
    model.set_active_adapters(setup)
    found = outputs(model, batch)
    model.set_active_adapters(None)
    return found


def close(found: list[Tensor], wanted: list[Tensor], what: str, tolerance: float = 1e-4) -> None:
    """Equal up to rounding."""
    require([one.shape for one in found] == [one.shape for one in wanted], f"{what}: other shapes")
    for one, other in zip(found, wanted, strict=True):
        scale = max(1.0, float(other.nan_to_num().abs().max()))
        require(float((one - other).nan_to_num().abs().max()) <= tolerance * scale, what)


def parallel(case: Case) -> None:
    """Parallel gives what single runs give, one below the other."""
    case.model.add_adapter("b", case.config)
    disturb(case.model, "b", seed=4)
    single = [active(case.model, case.batch, name) for name in "ab"]
    found = active(case.model, case.batch, Parallel("a", "b"))
    pairs = list(zip(*single, strict=True))
    fitting = [bool(one.dim()) and one.shape[1:] == other.shape[1:] for one, other in pairs]  # speech has any length
    wanted = [torch.cat(pair) for pair, fits in zip(pairs, fitting, strict=True) if fits]
    require(len(wanted) > 0, "no output has one length")
    close([one for one, fits in zip(found, fitting, strict=True) if fits], wanted, "Parallel is not the single runs")


def checkpointing(case: Case) -> None:
    """Gradient checkpointing changes no gradient."""
    gradients = [gradients_of(case.model, case.batch, "a", again) for again in (False, True)]
    close(gradients[1], gradients[0], "gradient checkpointing changes gradients")


def gradients_of(model: Any, batch: dict[str, Any], name: str, again: bool) -> list[Tensor]:
    """Of an adapter's parameters, or with "" of all, in training; again: with gradient checkpointing."""
    model = copy.deepcopy(model).train()
    own = list(model.parameters())
    if name:
        model.train_adapter(name)
        own = own_parameters(model, name)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss(model, batch).backward()
    return [p.grad for p in own if p.grad is not None]


def halved(case: Case) -> None:
    """In bfloat16 it runs and acts."""
    model = copy.deepcopy(case.model).to(torch.bfloat16)
    disturb(model, "a", scale=1.0)  # eight bits show no small change
    batch = {name: to_half(value) for name, value in case.batch.items()}
    found = active(model, batch, "a")
    require(all(torch.isfinite(one).all() for one in found), "in bfloat16 the output is not finite")
    require(not same(found, active(model, batch, None)), "in bfloat16 the adapter does not act")


def to_half(value: Any) -> Any:
    """Floating tensors in bfloat16."""
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value


def generating(case: Case) -> None:
    """``generate`` gives with a cache what it gives without."""
    model = generator_of(case.plain)
    adapters.init(model)
    model.add_adapter("a", case.config, set_active=True)
    disturb(model, "a")
    same_texts(model, case.batch)


def generator_of(plain: PreTrainedModel) -> Any:
    """The model of a type that writes texts."""
    torch.manual_seed(0)
    cls = generating_class(plain.config)
    require(cls is not None, "no model of this type writes texts")
    return cls(copy.deepcopy(plain.config)).eval()


def same_texts(model: Any, batch: dict[str, Any]) -> None:
    """With and without a cache."""
    arguments = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "pad_token_id": 0}
    arguments |= {"eos_token_id": None}
    given = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    found = [model.generate(**copy.deepcopy(given), use_cache=cached, **arguments) for cached in (True, False)]
    require(torch.equal(*found), "generate with a cache is not what it is without")


CHECKS: tuple[Callable[[Case], None], ...] = (
    nothing_changes,
    adding,
    acting,
    learning,
    storing,
    parallel,
    checkpointing,
    generating,
    halved,
)


def _learns(bare: Bare) -> None:
    loss(copy.deepcopy(bare.plain).requires_grad_(True), bare.batch).backward()


def _is_one_for_each_row(bare: Bare) -> None:
    """Twice the rows give twice the output."""
    tensor_rows = {
        name: torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() > 1 else value
        for name, value in bare.batch.items()
    }
    wanted = [torch.cat([one, one]) for one in bare.wanted if one.dim()]
    close([one for one in outputs(bare.plain, tensor_rows) if one.dim()], wanted, "rows are not apart")


def _checkpoints(bare: Bare) -> None:
    require(bare.plain.supports_gradient_checkpointing, "it has no gradient checkpointing")
    model = copy.deepcopy(bare.plain).requires_grad_(True)
    close(*(gradients_of(model, bare.batch, "", again) for again in (True, False)), "other gradients")


def _generates(bare: Bare) -> None:
    same_texts(generator_of(bare.plain), bare.batch)


def _halves(bare: Bare) -> None:
    model = copy.deepcopy(bare.plain).to(torch.bfloat16)
    found = outputs(model, {name: to_half(value) for name, value in bare.batch.items()})
    require(all(torch.isfinite(one).all() for one in found), "not finite")


ABILITIES: dict[str, Callable[[Bare], None]] = {
    "learning": _learns,
    "parallel": _is_one_for_each_row,
    "checkpointing": _checkpoints,
    "generating": _generates,
    "halved": _halves,
}
"""What a bare model has to do for a check to be about adapters: two rows are apart, gradients come at all, …"""


def run_cell(bare: Bare, method: str, checks: int = len(CHECKS)) -> tuple[str, str]:
    """("works" | "refused" | "fails" | "no meaning", why).

    A check that the bare model cannot pass by itself is left out, and named in ``why``.
    """
    check, left_out, case = CHECKS[0], [], None
    try:
        case = Case(bare, method)
        for check in CHECKS[:checks]:
            try:
                check(case)
            except Exception:
                if bare.can(check.__name__):
                    raise
                left_out.append(check.__name__)
                case.model.set_active_adapters(None)
    except Exception as error:
        return verdict(bare, method, check, error, case)
    return "works", " ".join(left_out)


def verdict(
    bare: Bare, method: str, check: Callable[[Case], None], error: Exception, case: Case | None
) -> tuple[str, str]:
    """What an error in a check makes of the cell."""
    if isinstance(error, AdapterError) and check is adding:
        why = lacking(method, bare.facts)
        return ("no meaning", why) if why else ("refused", str(error))
    if check is acting and isinstance(error, Broken) and is_unused(bare, case):
        return "no meaning", "on this machine its output does not depend on the weights that the method changes"
    name = "" if isinstance(error, Broken) else f"{type(error).__name__}: "
    return "fails", f"{check.__name__}: {name}{error}"


def is_unused(bare: Bare, case: Case) -> bool:
    """Whether the bare model calls the places where the adapter sits, but gives the same with other weights there."""
    model, called = copy.deepcopy(bare.plain), []
    with torch.no_grad():
        for site, _ in case.model.adapter_sites.holding("a"):
            host = model.base_model.get_submodule(site.host_path)
            host.register_forward_hook(lambda module, args, output: called.append(module))
            for parameter in host.parameters():
                parameter.add_(1.0)
    return same(outputs(model, bare.batch), bare.wanted) and len(called) > 0


def run_type(model_type: str, methods: tuple[str, ...], checks: int = len(CHECKS)) -> dict[str, tuple[str, str]]:
    """The row of a type."""
    plain = tiny_model(model_type)
    bare = Bare(plain, inputs_for(plain))
    require(len(bare.wanted) > 0, "the bare model gives nothing")
    return {method: run_cell(bare, method, checks) for method in methods}
