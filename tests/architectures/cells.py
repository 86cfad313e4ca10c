"""What a method has to keep on a type of model: the checks of one cell of the matrix, from cheap to dear."""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from inputs import inputs_for
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


class Broken(AssertionError):
    """A check that failed."""


@dataclass
class Case:
    """A type with a method: the model as it was, and one with the adapter."""

    plain: PreTrainedModel
    batch: dict[str, Any]
    method: str
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = with_adapters(self.plain)

    @functools.cached_property
    def wanted(self) -> list[Tensor]:
        """The outputs of the model as it was."""
        return outputs(self.plain, self.batch)


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


def disturb(model: Any, name: str, seed: int = 3) -> None:
    """Move the adapter's parameters, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in own_parameters(model, name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.3)


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
    case.model.add_adapter("a", METHODS[case.method])


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
    found = [one for one in tensors(model(**copy.deepcopy(batch))) if one.requires_grad]
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
    case.model.add_adapter("b", METHODS[case.method])
    disturb(case.model, "b", seed=4)
    single = [active(case.model, case.batch, name) for name in "ab"]
    found = active(case.model, case.batch, Parallel("a", "b"))
    wanted = [torch.cat(pair) for pair in zip(*single, strict=True) if pair[0].dim()]
    close([one for one in found if one.dim()], wanted, "Parallel is not the single runs")


def checkpointing(case: Case) -> None:
    """Gradient checkpointing changes no gradient."""
    if not case.model.supports_gradient_checkpointing:
        return
    gradients = []
    for again in (False, True):
        model = copy.deepcopy(case.model)
        model.train_adapter("a")
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss(model.train(), case.batch).backward()
        gradients.append([p.grad for p in own_parameters(model, "a") if p.grad is not None])
    close(gradients[1], gradients[0], "gradient checkpointing changes gradients")


def halved(case: Case) -> None:
    """In bfloat16 it runs, and is near."""
    model = copy.deepcopy(case.model).to(torch.bfloat16)
    batch = {name: to_half(value) for name, value in case.batch.items()}
    found = active(model, batch, "a")
    require(all(torch.isfinite(one).all() for one in found), "in bfloat16 the output is not finite")
    require(not same(found, active(model, batch, None)), "in bfloat16 the adapter does not act")


def to_half(value: Any) -> Any:
    """Floating tensors in bfloat16."""
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value


def generating(case: Case) -> None:
    """``generate`` gives with a cache what it gives without."""
    cls = generating_class(case.plain.config)
    if cls is None:
        return
    torch.manual_seed(0)
    config = copy.deepcopy(case.plain.config)
    model = cls(config).eval()
    adapters.init(model)
    model.add_adapter("a", METHODS[case.method], set_active=True)
    disturb(model, "a")
    tokens = case.batch["input_ids"]
    arguments = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "pad_token_id": 0}
    found = [model.generate(tokens, use_cache=cached, **arguments) for cached in (True, False)]
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


def run_cell(plain: PreTrainedModel, batch: dict[str, Any], method: str, checks: int = len(CHECKS)) -> tuple[str, str]:
    """("works" | "refused" | "fails", why)."""
    check = CHECKS[0]
    try:
        case = Case(plain, batch, method)
        for check in CHECKS[:checks]:
            check(case)
    except Broken as error:
        return "fails", f"{check.__name__}: {error}"
    except Exception as error:
        kind = "refused" if isinstance(error, AdapterError) and check is adding else "fails"
        return kind, str(error) if kind == "refused" else f"{check.__name__}: {type(error).__name__}: {error}"
    return "works", ""


def run_type(model_type: str, methods: tuple[str, ...], checks: int = len(CHECKS)) -> dict[str, tuple[str, str]]:
    """The row of a type."""
    plain = tiny_model(model_type)
    batch = inputs_for(plain)
    outputs(plain, batch)
    return {method: run_cell(plain, batch, method, checks) for method in methods}
