"""VB-LoRA: LoRA whose matrices are put together from vectors of one bank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from ..configuration.checks import check_integer, check_number
from ..configuration.registry import register_architecture, register_config
from ..errors import AdapterError
from ..method import register, seeded
from ..sites import LinearSite
from .linear_method import LinearUpdateConfig, LowRankUpdate


@dataclass(eq=False)
class VBLoRAConfig(LinearUpdateConfig):
    """Low-rank changes from a bank of vectors that all layers share. Li et al. 2024, arXiv:2405.15179.

    The bank has ``num_vectors`` vectors of ``vector_length``, which must divide the widths of the maps. Each piece of
    the matrices of rank ``r`` is a mean of its ``topk`` best vectors. The bank starts uniform within
    ``init_vector_bank_bound``, the logits normal with ``init_logits_std``. The other fields are those of
    ``LinearMethodConfig``; ``dropout`` is that of the change's input.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "vblora"
    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            check_integer(self, name, least=1)
        if self.topk > self.num_vectors:
            raise self.refusal("topk", "out of range", f"it must be at most num_vectors={self.num_vectors}")
        check_number(self, "init_vector_bank_bound", above=0)
        check_number(self, "init_logits_std", above=0)


register_architecture("vblora", VBLoRAConfig)
register_config("vblora", VBLoRAConfig())


class VectorBank(nn.Module):
    """The vectors of one adapter: (num_vectors, vector_length)."""

    def __init__(self, config: VBLoRAConfig) -> None:
        super().__init__()
        bound = config.init_vector_bank_bound
        self.vblora_vector_bank = nn.Parameter(torch.empty(config.num_vectors, config.vector_length))
        nn.init.uniform_(self.vblora_vector_bank, -bound, bound)


@register(VBLoRAConfig, LinearSite)
class VBLoRA(LowRankUpdate):
    """y = Wx + B A x, where each piece of A and B, b entries long, is Σ_{k in top-k} softmax(σ)_k v_k

    The vectors v_k are those of one bank, shared by all maps; σ are the logits of the piece, and the softmax is over
    the k largest. Li et al. 2024, arXiv:2405.15179, eq. 3 and 4.

    Site: LinearSite. Parameters: vblora_logits_A (r, in / b, h), vblora_logits_B (out / b, r, h), and once for the
    adapter vblora_vector_bank (h, b).
    Start: random and small, not the identity. Merges: yes.
    """

    def __init__(self, config: VBLoRAConfig, site: LinearSite, shared: VectorBank) -> None:
        super().__init__(config)
        self._bank, self.topk, self.rank = (shared,), config.topk, config.r  # the bank is registered once, not here
        length, vectors = config.vector_length, config.num_vectors
        self.vblora_logits_A = self.new(config.r, site.inputs // length, vectors)
        self.vblora_logits_B = self.new(site.outputs // length, config.r, vectors)
        with seeded(config.init_weights_seed):
            nn.init.normal_(self.vblora_logits_A, std=config.init_logits_std)
            nn.init.normal_(self.vblora_logits_B, std=config.init_logits_std)

    @classmethod
    def share(cls, config: VBLoRAConfig, sites: Sequence[LinearSite]) -> VectorBank:
        """The bank, once it is known that its vectors fit into every map."""
        for site in sites:
            for name, width in (("inputs", site.inputs), ("outputs", site.outputs)):
                if width % config.vector_length:
                    raise AdapterError(
                        f"add_adapter(VBLoRAConfig(vector_length={config.vector_length})): the map at {site.path} has "
                        f"{width} {name}, which {config.vector_length} does not divide; choose a common divisor of the "
                        "widths of all maps."
                    )
        return VectorBank(config)

    def sources(self) -> list[Tensor]:
        """See the base."""
        return [self.vblora_logits_A, self.vblora_logits_B, self._bank[0].vblora_vector_bank]

    def factors(self) -> tuple[Tensor, Tensor]:
        """See the base."""
        down = self._pieces(self.vblora_logits_A).reshape(self.rank, -1)
        up = self._pieces(self.vblora_logits_B).transpose(1, 2).reshape(-1, self.rank)
        return down, up

    def _pieces(self, logits: Tensor) -> Tensor:
        """(…, b) for the logits (…, h)."""
        best, index = logits.topk(self.topk, -1)
        weights = best.softmax(-1).flatten(0, -2)
        bank = self._bank[0].vblora_vector_bank.to(weights.dtype)  # what is shared has the model's dtype
        pieces = embedding_bag(index.flatten(0, -2), bank, per_sample_weights=weights, mode="sum")
        return pieces.view(*logits.shape[:-1], -1)
