"""Context-aware prompt tuning: the embeddings of examples, which training may move a little."""

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..composition import Block, Setup
from ..configuration.base import AdapterConfig
from ..configuration.checks import check_number
from ..configuration.registry import register_architecture, register_config
from ..context import AdapterSetup
from ..errors import AdapterError
from ..layouts import PromptSignal
from ..method import register, weights_follow
from ..prompts import PromptSite
from .prompt_tuning import Prompt, check_place, embedded, is_token_ids

KINDS = 4
FIXED, TEMPLATE_BEFORE, INPUT, TEMPLATE_AFTER = 0, 1, 2, 3
"""What a token of the context is, its type modulo 4; answers are fixed."""


@dataclass(eq=False)
class CPTConfig(AdapterConfig):
    """A context of examples in front of the input, whose embeddings are learned. Blau et al. 2024, arXiv:2410.17222.

    ``cpt_token_ids``: the tokens of the context. ``cpt_tokens_type_mask``: for each, modulo 4: 1 or 3 a part of the
    template, 2 a part of an example's input, 0 an answer, which stays fixed; by default all are 1. A token moves by at
    most ``opt_projection_epsilon`` (inputs) or ``opt_projection_format_epsilon`` (templates), times sqrt(d / 2048).
    ``combine``, ``placement``: as in ``PromptTuningConfig``.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "cpt"
    cpt_token_ids: list[int] = field(default_factory=lambda: [0])
    cpt_tokens_type_mask: list[int] | None = None
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    combine: str = "prefix"
    placement: str = "tokens"
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_token_ids(self.cpt_token_ids) or not self.cpt_token_ids:
            raise self.refusal("cpt_token_ids", "no list of token ids", "it must be a list of integers >= 0")
        kinds = self.cpt_tokens_type_mask
        if kinds is not None and not (is_token_ids(kinds) and len(kinds) == len(self.cpt_token_ids)):
            raise self.refusal(
                "cpt_tokens_type_mask", "no list of types", f"it must have {len(self.cpt_token_ids)} integers >= 0"
            )
        check_number(self, "opt_projection_epsilon", above=0)
        check_number(self, "opt_projection_format_epsilon", above=0)
        check_place(self)

    @property
    def kinds(self) -> list[int]:
        """What each token of the context is."""
        return self.cpt_tokens_type_mask or [TEMPLATE_BEFORE] * len(self.cpt_token_ids)


register_architecture("cpt", CPTConfig)
register_config("cpt", CPTConfig())


@register(CPTConfig, PromptSite)
class CPT(Prompt):
    """[C + D; E] with |D_i| <= e_i

    The embeddings C (p, d) of a context of p tokens, plus learned D (p, d). A row of D longer than e_i is scaled to
    e_i; e_i depends on what the token is, see ``CPTConfig``. Blau et al. 2024, arXiv:2410.17222, section 4.

    Site: PromptSite. Parameters: p d (of D; C is a buffer, and saved).
    Start: the context as it is, D = 0. Merges: no.
    Differs from PEFT: the loss is the model's own, on the labels that it is given; ``context_loss`` adds that of the
    context's answers, as PEFT does.
    """

    embedding: Tensor
    radius: Tensor

    def __init__(self, config: CPTConfig, site: PromptSite, shared: Any = None) -> None:
        ids = config.cpt_token_ids
        super().__init__(config, site, len(ids))
        self.config = config
        context = torch.zeros(len(ids), site.width) if weights_follow() else embedded(ids, config, site)
        self.register_buffer("embedding", context)
        self.delta_embedding = nn.Embedding(len(ids), site.width)
        nn.init.zeros_(self.delta_embedding.weight)
        kinds = [kind % KINDS for kind in config.kinds]
        unit = sqrt(site.width / 2048)
        radii = {FIXED: 0.0, INPUT: config.opt_projection_epsilon * unit}
        template = config.opt_projection_format_epsilon * unit
        self.register_buffer("radius", torch.tensor([[radii.get(kind, template)] for kind in kinds]), persistent=False)

    def prompt(self, signal: PromptSignal) -> Tensor:
        """C + D (p, d)."""
        return self.moved()

    def moved(self) -> Tensor:
        """C + D (p, d). In training the parameter itself is scaled: gradient descent with a projection."""
        delta = self.delta_embedding.weight
        with torch.no_grad():
            inside = delta * (self.radius / delta.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
            if self.training:
                delta.copy_(inside)
        moves = (self.radius > 0).to(delta.dtype)
        moved: Tensor = self.embedding + moves * (delta + (inside - delta).detach())
        return moved


def context_loss(
    model: Any,
    adapter_name: str,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    decay: float = 1.0,
) -> Tensor:
    """The loss of a causal model on its labels and on the answers in the context of a CPT adapter.

    It is the mean over all of these tokens of their cross entropies, those of an answer times ``decay`` for the newest
    one (of the largest type), times its square for the one before, and so on. Blau et al. 2024, section 4.

    Args:
        model: with a language modelling head; the other adapters of its setup act as ever.
        input_ids, labels, attention_mask: (b, s), padded on the right.

    Raises:
        AdapterError: there is no such CPT adapter, or a row is padded on the left.

    Example:
        >>> loss = context_loss(model, "cpt", **batch, decay=0.95)
    """
    found = [module for _, module in model.adapter_sites.holding(adapter_name) if isinstance(module, CPT)]
    if not found:
        raise AdapterError(
            f"context_loss({adapter_name!r}): the model has no CPT adapter of that name; add one with "
            f"add_adapter({adapter_name!r}, CPTConfig(…))."
        )
    if attention_mask is not None and not attention_mask[:, 0].all():
        raise AdapterError("context_loss: a row is padded on the left, next to the context; pad on the right.")
    (module,), rows = found, len(input_ids)
    tokens = list(zip(module.config.cpt_token_ids, module.config.kinds, strict=True))
    answers = {kind for _, kind in tokens if kind > 0 and kind % KINDS == FIXED}
    embeddings: Tensor = model.get_input_embeddings()(input_ids)
    context = module.moved().to(embeddings).expand(rows, -1, -1)
    mask = attention_mask
    mask = None if mask is None else torch.cat([mask.new_ones(rows, len(tokens)), mask], 1)
    with AdapterSetup(_without(model.effective_setup(), adapter_name)):
        logits = model(inputs_embeds=torch.cat([context, embeddings], 1), attention_mask=mask).logits
    known = labels.new_tensor([token if kind in answers else -100 for token, kind in tokens])
    wanted = torch.cat([known.expand(rows, -1), labels], 1)[:, 1:]
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
    newer = [sum(kind < other for other in answers) for _, kind in tokens]
    weights = losses.new_tensor([decay ** (count + 1) for count in newer] + [1.0] * labels.shape[1])[1:]
    return (losses * weights)[wanted != -100].mean()


def _without(setup: Setup, name: str) -> Setup:
    if isinstance(setup, Block):
        return setup.with_children([_without(child, name) for child in setup.children])
    return None if setup == name else setup
