"""Starts of LoRA that are read off data: EVA and LoRA-GA, by one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..errors import AdapterError
from ..sites import LinearSite
from .lora import FROM_DATA, LoRA
from .lora_init import check_rank

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin

Place = tuple[LinearSite, LoRA]


def initialize_lora(
    model: ModelAdaptersMixin, name: str, batches: Iterable[Mapping[str, Any]], method: str | None = None
) -> None:
    """Start a LoRA adapter from what the model does with some data; see ``ModelAdaptersMixin.initialize_lora``."""
    places = [(site, module) for site, module in model.adapter_sites.holding(name) if isinstance(module, LoRA)]
    linear = [(site, module) for site, module in places if isinstance(site, LinearSite)]
    if not linear:
        raise AdapterError(
            f"initialize_lora({name!r}): this model has no LoRA of that name; add one with "
            f"add_adapter({name!r}, LoRAConfig(init_weights='eva'))."
        )
    configured = linear[0][1].config.init_weights
    method = configured if method is None else method
    if method not in FROM_DATA or (method == "lora_ga") != (configured == "lora_ga"):
        raise AdapterError(
            f"initialize_lora({name!r}, method={method!r}): the adapter has init_weights={configured!r}; for 'lora_ga' "
            "it must be 'lora_ga', for 'eva' anything else. Add the adapter with that configuration."
        )
    batches = list(batches)
    if not batches:
        raise AdapterError(f"initialize_lora({name!r}): batches is empty; pass one batch of inputs at least.")
    starts = _eva(model, linear, batches) if method == "eva" else _lora_ga(model, linear, batches)
    for (_, module), (down, up) in zip(linear, starts, strict=True):
        module.start_at(down, up)
        module.keep_start()


def _eva(model: Any, places: list[Place], batches: list[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """A: the principal components of the map's inputs; B = 0. Paischer et al. 2024, arXiv:2410.07170, section 3."""
    found = [Components(module.rank) for _, module in places]

    def hook(number: int) -> Callable[..., None]:
        return lambda host, args, output: found[number].add(args[0].detach().flatten(0, -2).float())

    with torch.no_grad(), _hooked(model, places, hook):
        for batch in batches:
            model(**batch)
    starts = []
    for (_, module), components in zip(places, found, strict=True):
        check_rank("eva", module.rank, components.count)
        starts.append((components.vectors[: module.rank], torch.zeros_like(module.lora_B)))
    return starts


class Components:
    """The principal components of rows that come in batches: an incremental singular value decomposition."""

    def __init__(self, rank: int) -> None:
        self.rank, self.rows = rank, 0
        self.mean, self.vectors, self.values = torch.empty(0), torch.empty(0), torch.empty(0)

    @property
    def count(self) -> int:
        """How many there are."""
        return int((self.values > 1e-6 * self.values.max()).sum())

    def add(self, rows: Tensor) -> None:
        """Take in more rows (n, d). What is kept of those before stands for them as sqrt-weighted directions."""
        mean, count = rows.mean(0), len(rows)
        parts = [rows - mean]
        if self.rows:
            weight = (self.rows * count / (self.rows + count)) ** 0.5
            parts += [self.values[:, None] * self.vectors, weight * (self.mean - mean)[None]]
            mean = (self.mean * self.rows + mean * count) / (self.rows + count)
        _, values, vectors = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        self.values, self.vectors = values[: self.rank], vectors[: self.rank]
        self.mean, self.rows = mean, self.rows + count


def _lora_ga(model: Any, places: list[Place], batches: list[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """G = U S V, the gradient of the loss: A0 = c V[:r], B0 = c U[r:2r]. Wang et al. 2024, arXiv:2407.05000, eq. 14.

    c = out^(1/4) / sqrt(gamma), with the paper's gamma = 16, so that the first step moves as full fine-tuning would.
    """
    gradients = [torch.zeros(site.outputs, site.inputs, device=site.weight.device) for site, _ in places]

    def hook(number: int) -> Callable[..., Tensor]:
        site = places[number][0]

        def probe(host: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].detach().flatten(0, -2).float()

            def note(gradient: Tensor) -> None:
                own = gradient[..., site.rows].flatten(0, -2).float()
                gradients[number].addmm_(own.T, x)

            probed = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            probed.register_hook(note)  # type: ignore[no-untyped-call]
            return probed

        return probe

    with torch.enable_grad(), _hooked(model, places, hook):
        for batch in batches:
            loss = model(**batch).loss
            if loss is None:
                raise AdapterError("initialize_lora(method='lora_ga'): the model gave no loss; batches need labels.")
            loss.backward()
    return [_gradient_start(gradient, module) for gradient, (_, module) in zip(gradients, places, strict=True)]


def _gradient_start(gradient: Tensor, module: LoRA) -> tuple[Tensor, Tensor]:
    rank = module.rank
    check_rank("lora_ga", 2 * rank, min(gradient.shape))
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    factor = gradient.shape[0] ** 0.25 / 4
    return factor * right[:rank], factor * left[:, rank : 2 * rank]


@contextmanager
def _hooked(model: Any, places: list[Place], hook: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """A hook on the host of each place, while the model is in eval mode and none of its parameters has a gradient."""
    training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles: list[RemovableHandle] = []
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        handles += [site.host.register_forward_hook(hook(number)) for number, (site, _) in enumerate(places)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(training)
