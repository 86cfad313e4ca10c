"""The verbs for the invertible part of an adapter, which acts on the embeddings."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .composition import Block
from .configuration.model_adapters_config import ModelAdaptersConfig
from .sitemap import SiteMap
from .streams import EmbeddingSite


class InvertibleAdaptersMixin:
    """A model's invertible adapters, by hand; ``add_adapter`` and the forward pass do all of it themselves."""

    adapters_config: ModelAdaptersConfig
    adapter_sites: SiteMap

    def add_invertible_adapter(self, adapter_name: str) -> bool:
        """Make the invertible part that an adapter's configuration asks for; False if it asks for none or has it.

        ``add_adapter`` does so itself.
        """
        return self.adapter_sites.add_part(adapter_name, self.adapters_config.members(adapter_name), EmbeddingSite)

    def delete_invertible_adapter(self, adapter_name: str) -> None:
        """Remove the invertible part of an adapter; the rest of it stays."""
        self.adapter_sites.remove_part(adapter_name, EmbeddingSite)

    def get_invertible_adapter(self) -> nn.Module | None:
        """The first invertible adapter of the setup in force, or None.

        Example:
            >>> model.get_invertible_adapter()
        """
        for site in self._embedding_sites():
            plan = site.plan()
            names = plan.leaves() if isinstance(plan, Block) else [plan]
            return next((site.adapters[name] for name in names if name in site.adapters), None)
        return None

    def enable_invertible_adapters(self, adapter_names: Iterable[str]) -> None:
        """Train the invertible parts of these adapters."""
        for site in self._embedding_sites():
            for name in set(adapter_names) & set(site.adapters):
                site.adapters[name].requires_grad_(True)

    def invertible_adapters_forward(self, hidden_states: Tensor, rev: bool = False) -> Tensor:
        """What the setup in force makes of embeddings (b, s, e) or, with `rev`, what it has made these of.

        Example:
            >>> model.invertible_adapters_forward(model.invertible_adapters_forward(hidden), rev=True)  # hidden again
        """
        for site in self._embedding_sites():
            hidden_states = site.back(hidden_states) if rev else site.there(hidden_states)
        return hidden_states

    def _embedding_sites(self) -> list[EmbeddingSite]:
        return self.adapter_sites.of(EmbeddingSite)
