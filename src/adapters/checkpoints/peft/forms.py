"""What each type of PEFT is called here: a row of options and tensors, and a class where a table is not enough."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...configuration import AdapterConfig
from ...sites import LinearSite, Site
from .draft import Draft, placement

NOTHING: tuple[Any, ...] = (None, False, "none", {}, [], ())
"""Values of an option that is not in use."""


@dataclass(frozen=True)
class Form:
    """How a method is written in PEFT's files.

    Attributes:
        peft_type: Its name there.
        config: The configuration here.
        options: Fields here by the options there, where both mean the same.
        tensors: Parameters here by those there, of one module.
        shared: The same for those that modules have in common.
        unused: Options that have no counterpart here; they must not be in use.
        always: Fields here that are the same for every file.
        sites: Where it may sit.
    """

    peft_type: str
    config: type[AdapterConfig]
    options: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ("bias", "rank_pattern", "alpha_pattern", "n_frequency_pattern")
    always: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[type[Site], ...] = (LinearSite,)

    def takes(self, config: AdapterConfig) -> bool:
        """Whether an adapter of this configuration is written in this form."""
        return type(config) is self.config or isinstance(config, self.config)

    def read(self, draft: Draft) -> None:
        """From PEFT's terms to ours.

        Raises:
            CheckpointError: An option has no counterpart here.
        """
        for option in self.unused:
            if draft.options.get(option) not in NOTHING:
                raise draft.refusal(option, "there is no such thing here. Merge the adapter in PEFT")
        known = {field: draft.options[option] for option, field in self.options.items() if option in draft.options}
        draft.fields = {**known, **self.always}
        draft.change(lambda site, own: {self.tensors[name]: tensor for name, tensor in own.items()})
        draft.shared = {self.shared[name]: tensor for name, tensor in draft.shared.items() if name in self.shared}
        self.place(draft)

    def place(self, draft: Draft) -> None:
        """Say where the modules are."""
        if "target_modules" in self.config.field_names():
            every = [site for kind in self.sites for site in draft.model.adapter_sites.of(kind)]
            draft.fields |= placement(self.config, draft.parts, every)

    def write(self, draft: Draft) -> None:
        """From our terms to PEFT's.

        Raises:
            CheckpointError: A field has no counterpart there.
        """
        there = {field: option for option, field in self.options.items()}
        plain = {} if self.config is AdapterConfig else self.config(**self.always)
        for name, value in draft.fields.items():
            if name not in there and name not in FREE and value != plain.get(name):
                raise draft.refusal(name, f"PEFT's {self.peft_type} has no such option. Save it in the native format")
        draft.options |= {option: draft.fields[name] for name, option in there.items() if name in draft.fields}
        back = {name: theirs for theirs, name in self.tensors.items()}
        draft.change(lambda site, own: {back[name]: tensor for name, tensor in own.items() if name in back})
        back = {name: theirs for theirs, name in self.shared.items()}
        draft.shared = {back[name]: tensor for name, tensor in draft.shared.items() if name in back}


FREE = {
    "architecture",
    "attn_matrices",
    "dtype",
    "embedding_lora",
    "init_weights",
    "init_weights_seed",
    "intermediate_lora",
    "leave_out",
    "lm_head_lora",
    "modules",
    "output_lora",
    "random_uniform_scale",
    "selfattn_lora",
    "target_modules",
}
"""Fields that say where modules are and how they start, of which files of PEFT have the result."""
