"""LoRA on the token embeddings and on the map from hidden states to words."""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ..errors import AdapterError
from ..method import register
from ..vocabulary import LookupSite, OutputSite
from .lora import LoRA, LoRAConfig
from .lora_init import initialise


def refuse_tied(name: str, site: LookupSite | OutputSite) -> None:
    """Refuse to merge what would change the other use of a shared weight too.

    Raises:
        AdapterError: the weight is shared.
    """
    if site.tied:
        raise AdapterError(
            f"merge_adapter({name!r}): the model's embeddings and its map onto words are one weight, and the adapter "
            f"changes one use of it ({site.location}). Keep the adapter active, or load the model with "
            "tie_word_embeddings=False."
        )


@register(LoRAConfig, LookupSite)
class LookupLoRA(LoRA):
    """y = E[i] + s (B A)[:, i]

    Low-rank change of a table of embeddings, which is a linear map of one-hot rows.

    Site: LookupSite. Parameters: lora_A (r, words), lora_B (d, r).
    Start: identity (A = 0 and B random with ``init_weights="lora"``, as in PEFT). Merges: yes, unless tied.
    """

    def __init__(self, config: LoRAConfig, site: LookupSite, shared: nn.Module | None = None) -> None:
        for name in ("use_gating", "lora_bias"):
            if config[name]:
                raise config.refusal(name, f"not possible at {site.module_path}", "token ids have no such thing")
        super().__init__(config, site, shared)  # type: ignore[arg-type]
        self.site = site

    def _initialise(self, scheme: str) -> None:
        if scheme == "lora":
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)
        else:
            initialise(self.lora_A, scheme, zero=False)
            initialise(self.lora_B, scheme, zero=True)

    def forward(self, signal: Any) -> Any:
        """See the class."""
        down, up = self.factors()
        change = linear(embedding(signal.ids, down.T), up) * (self.scale * signal.factor)
        return replace(signal, output=signal.output + change.to(signal.output.dtype))

    def group_key(self) -> Hashable:
        """Each by itself."""
        return None

    def merged_weight(self, weight: Tensor) -> Tensor:
        """E^T + s B A."""
        refuse_tied(self.name, self.site)
        return super().merged_weight(weight)


@register(LoRAConfig, OutputSite)
class OutputLoRA(LoRA):
    """y = Wx + s B A x at the map onto the vocabulary; see LoRA.

    Site: OutputSite. Parameters: those of LoRA. Start: identity. Merges: yes, unless tied.
    """

    def __init__(self, config: LoRAConfig, site: OutputSite, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.site = site

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s B A."""
        refuse_tied(self.name, self.site)
        if self.site.of_heads:
            raise AdapterError(
                f"merge_adapter({self.name!r}): the adapter changes the maps onto words of all named heads "
                "(lm_head_lora), which other adapters use too. Keep the adapter active."
            )
        return super().merged_weight(weight)
