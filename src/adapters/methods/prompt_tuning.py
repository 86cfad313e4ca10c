"""Prompt tuning: learned embeddings in front of those of the input."""

from dataclasses import dataclass

from ..configuration.base import AdapterConfig
from ..configuration.checks import check_choice, check_integer, check_number
from ..configuration.registry import register_architecture, register_config


@dataclass(eq=False)
class PromptTuningConfig(AdapterConfig):
    """Learned embeddings in front of those of the input. Lester et al. 2021, arXiv:2104.08691.

    The prompt starts uniformly within ± ``random_uniform_scale`` or as the embeddings of ``prompt_init_text``
    (``prompt_init="from_string"``). ``combine`` puts it before the input or after the input's first token.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "prompt_tuning"
    prompt_length: int = 10
    prompt_init: str = "random_uniform"
    prompt_init_text: str | None = None
    combine: str = "prefix"
    init_weights_seed: int | None = None
    random_uniform_scale: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "prompt_length", least=1)
        check_choice(self, "prompt_init", ("random_uniform", "from_string"))
        check_choice(self, "combine", ("prefix", "prefix_after_bos"))
        check_number(self, "random_uniform_scale", above=0)
        if self.prompt_init == "from_string" and not self.prompt_init_text:
            raise self.refusal("prompt_init_text", "no text", "prompt_init='from_string' needs a text to start from")


register_architecture("prompt_tuning", PromptTuningConfig)
register_config("prompt_tuning", PromptTuningConfig())
