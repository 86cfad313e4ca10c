"""Prompt tuning: learned embeddings in front of those of the input."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.base import AdapterConfig
from ..configuration.checks import check_choice, check_integer, check_number, is_integer
from ..configuration.registry import register_architecture, register_config
from ..errors import AdapterError
from ..layouts import PromptSignal
from ..method import AdapterModule, register, weights_follow
from ..prompts import PromptSite

PLACEMENTS = ("auto", "tokens", "embeddings")


@dataclass(eq=False)
class PromptTuningConfig(AdapterConfig):
    """Learned embeddings in front of those of the input. Lester et al. 2021, arXiv:2104.08691.

    The prompt starts uniformly within ± ``random_uniform_scale`` or as the embeddings of ``prompt_init_text``
    (``prompt_init="from_string"``), a text or a list of token ids. The tokenizer is that of
    ``tokenizer_name_or_path``, by default of the model. ``combine`` puts the prompt before the input or after the
    input's first token. ``placement``: "tokens", as further tokens that have positions; "embeddings", behind the
    model's embeddings module, without positions; "auto", the latter where the model has such a module.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "prompt_tuning"
    prompt_length: int = 10
    prompt_init: str = "random_uniform"
    prompt_init_text: str | list[int] | None = None
    combine: str = "prefix"
    init_weights_seed: int | None = None
    random_uniform_scale: float = 0.5
    placement: str = "auto"
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "prompt_length", least=1)
        check_place(self)
        check_start(self)


def check_place(config: AdapterConfig) -> None:
    """The fields that say where a prompt goes."""
    check_choice(config, "combine", ("prefix", "prefix_after_bos"))
    check_choice(config, "placement", PLACEMENTS)


def check_start(config: AdapterConfig) -> None:
    """The fields that say how a prompt starts."""
    check_choice(config, "prompt_init", ("random_uniform", "from_string"))
    check_number(config, "random_uniform_scale", above=0)
    text = config["prompt_init_text"]
    if config["prompt_init"] == "from_string" and not text:
        raise config.refusal("prompt_init_text", "no text", "prompt_init='from_string' needs a text to start from")
    if not isinstance(text, str | None) and not is_token_ids(text):
        raise config.refusal("prompt_init_text", "no text", "it must be a text or a list of token ids >= 0")


def is_token_ids(value: Any) -> bool:
    """Whether this is a list of integers from 0 on."""
    return isinstance(value, list) and all(is_integer(entry) and entry >= 0 for entry in value)


register_architecture("prompt_tuning", PromptTuningConfig)
register_config("prompt_tuning", PromptTuningConfig())


class Prompt(AdapterModule[PromptSignal]):
    """Embeddings that are put into the input of a model."""

    container = "prompt_tunings"

    def __init__(self, config: AdapterConfig, site: PromptSite, length: int) -> None:
        """config: one that says where they go; length: p."""
        super().__init__()
        self.target, self.length = site.target(config), length

    @classmethod
    def wants(cls, config: AdapterConfig, site: PromptSite) -> bool:
        """At every model's input."""
        return True

    @abstractmethod
    def prompt(self, signal: PromptSignal) -> Tensor:
        """The embeddings (p, d), or (b, p, d) for the rows of `signal`."""

    def forward(self, signal: PromptSignal) -> PromptSignal:
        """See the class."""
        return signal.with_prompt(self.target, self.length, lambda: self.prompt(signal))


@register(PromptTuningConfig, PromptSite)
class PromptTuning(Prompt):
    """[P; E]

    Learned embeddings P (p, d) before the embeddings E (s, d) of the input, or after the first of them. Lester et al.
    2021, arXiv:2104.08691, section 2.

    Site: PromptSite. Parameters: p d.
    Start: random or the embeddings of a text, not the identity. Merges: no.
    Differs from 1.x: works on decoders and encoder-decoders; heads and poolers read the states of tokens only.
    """

    def __init__(self, config: PromptTuningConfig, site: PromptSite, shared: Any = None) -> None:
        super().__init__(config, site, config.prompt_length)
        self.prompt_embedding = starting_prompt(config, site)

    def prompt(self, signal: PromptSignal) -> Tensor:
        """P (p, d)."""
        return self.prompt_embedding.weight


def starting_prompt(config: Any, site: PromptSite) -> nn.Embedding:
    """The embeddings (p, d) that a prompt starts with, by the fields of ``PromptTuningConfig``."""
    prompt = nn.Embedding(config.prompt_length, site.width)
    text: str | list[int] | None = config.prompt_init_text
    if config.prompt_init == "random_uniform" or text is None or weights_follow():
        nn.init.uniform_(prompt.weight, -config.random_uniform_scale, config.random_uniform_scale)
        return prompt
    ids = list(text) if isinstance(text, list) else _tokenised(text, config, site)
    repeated = (ids * (config.prompt_length // len(ids) + 1))[: config.prompt_length]
    prompt.weight = nn.Parameter(embedded(repeated, config, site))
    return prompt


def embedded(ids: Sequence[int], config: AdapterConfig, site: PromptSite) -> Tensor:
    """(n, d) the model's embeddings of tokens.

    Raises:
        AdapterError: the vocabulary does not have one of them.
    """
    module: Any = site.token_embeddings()
    size = module.weight.shape[0]
    if max(ids) >= size:
        raise AdapterError(
            f"add_adapter({type(config).__name__}): token id {max(ids)} is outside of the vocabulary of {size}; "
            f"give ids from 0 to {size - 1}."
        )
    with torch.no_grad():
        vectors: Tensor = module(torch.tensor(ids, device=module.weight.device))
    return vectors.float()


def _tokenised(text: str, config: Any, site: PromptSite) -> list[int]:
    from transformers import AutoTokenizer  # slow to import, and rarely needed

    model = site.base_model.config
    name = config.tokenizer_name_or_path or vars(model).get("tokenizer_name_or_path") or model.name_or_path
    asked = f"add_adapter({type(config).__name__}(prompt_init='from_string'))"
    ways = "set tokenizer_name_or_path to a tokenizer that can be loaded, or give token ids as prompt_init_text"
    if not name:
        raise AdapterError(f"{asked}: the model has no name to load a tokenizer by; {ways}.")
    try:
        ids: list[int] = AutoTokenizer.from_pretrained(name)(text)["input_ids"]
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise AdapterError(f"{asked}: the tokenizer of {name!r} cannot be loaded ({error}); {ways}.") from error
    if not ids:
        raise AdapterError(f"{asked}: the tokenizer of {name!r} makes no token of {text!r}; {ways}.")
    return ids
