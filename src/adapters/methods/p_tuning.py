"""P-tuning: a prompt that a small network makes of learned embeddings."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..configuration.base import AdapterConfig
from ..configuration.checks import check_choice, check_fraction, check_integer
from ..configuration.registry import register_architecture, register_config
from ..derived import Derived
from ..layouts import PromptSignal
from ..method import register
from ..prompts import PromptSite
from .prompt_tuning import Prompt, check_place


@dataclass(eq=False)
class PTuningConfig(AdapterConfig):
    """A prompt made by a network. Liu et al. 2021, arXiv:2103.10385.

    ``encoder_reparameterization_type``: "MLP", three linear maps, or "LSTM", ``encoder_num_layers`` bidirectional
    layers with ``encoder_dropout`` between them and two linear maps. ``encoder_hidden_size``: the network's width, by
    default that of the embeddings. ``combine``, ``placement``: as in ``PromptTuningConfig``.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "p_tuning"
    prompt_length: int = 20
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    combine: str = "prefix"
    placement: str = "tokens"
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "prompt_length", least=1)
        check_choice(self, "encoder_reparameterization_type", ("MLP", "LSTM"))
        if self.encoder_hidden_size is not None:
            check_integer(self, "encoder_hidden_size", least=1)
        check_integer(self, "encoder_num_layers", least=1)
        check_fraction(self, "encoder_dropout")
        check_place(self)
        lstm = self.encoder_reparameterization_type == "LSTM"
        if not lstm and (self.encoder_num_layers, self.encoder_dropout) != (2, 0.0):
            raise self.refusal(
                "encoder_reparameterization_type", "the one without them", "encoder_num_layers and _dropout need 'LSTM'"
            )


register_architecture("p_tuning", PTuningConfig)
register_config("p_tuning", PTuningConfig())


@register(PTuningConfig, PromptSite)
class PTuning(Prompt):
    """[f(P); E]

    A prompt f(P) (p, d) in front of the input's embeddings E, with P (p, d) learned and f an MLP of width w,
    W3 relu(W2 relu(W1 P)), or W2 relu(W1 lstm(P)) with an LSTM that reads P in both directions. Liu et al. 2021,
    arXiv:2103.10385, section 3.

    Site: PromptSite. Parameters: MLP: p d + (d + 1) w + (w + 1) w + (w + 1) d; LSTM: see ``torch.nn.LSTM``.
    Start: random, not the identity. Merges: no. In eval mode f(P) is computed once.
    """

    def __init__(self, config: PTuningConfig, site: PromptSite, shared: Any = None) -> None:
        super().__init__(config, site, config.prompt_length)
        width, inner = site.width, config.encoder_hidden_size or site.width
        self.embedding = nn.Embedding(config.prompt_length, width)
        self.lstm_head: nn.LSTM | None = None
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm_head = nn.LSTM(
                width,
                inner,
                config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            sizes = [2 * inner, 2 * inner, width]
        else:
            sizes = [width, inner, inner, width]
        maps = [nn.Linear(*pair) for pair in pairwise(sizes)]
        self.mlp_head = nn.Sequential(*[part for one in maps for part in (one, nn.ReLU())][:-1])
        self._kept = Derived()

    def prompt(self, signal: PromptSignal) -> Tensor:
        """f(P) (p, d)."""
        return self._made() if self.training else self._kept.get("prompt", self.parameters(), self._made)

    def _made(self) -> Tensor:
        inner = self.embedding.weight
        if self.lstm_head is not None:
            inner = self.lstm_head(inner)[0]
        made: Tensor = self.mlp_head(inner)
        return made
