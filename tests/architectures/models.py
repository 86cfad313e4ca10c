"""Tiny random models of every type, built offline in milliseconds."""

import importlib
import inspect

import torch
from overrides import CLASSES
from shrinking import tiny_config
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a type's base model; of a type that AutoModel does not know, the first of its file that has none."""
    if config.model_type not in CLASSES and type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    classes = [cls for _, cls in inspect.getmembers(importlib.import_module(module), inspect.isclass)]
    fitting = [
        cls
        for cls in classes
        if issubclass(cls, PreTrainedModel)
        and cls.config_class is type(config)
        and not cls.__name__.endswith("PreTrainedModel")
    ]
    named = [cls for cls in fitting if cls.__name__ == CLASSES.get(config.model_type)]
    whole = sorted(fitting, key=lambda cls: ("For" in cls.__name__, len(cls.__name__)))
    return next(iter(named or whole))


def tiny_model(model_type: str) -> PreTrainedModel:
    """A model of a type, in evaluation mode, with values that are no one's default: norms and biases are disturbed."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    return disturbed(model_class(config)(config).eval())


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    """With every parameter moved a little: zeros and ones would hide what a method does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                moved = torch.randn(parameter.shape, generator=generator)
                parameter.add_(moved.abs() if name.endswith("bias") else moved, alpha=0.05)  # fewer dead units
    return model


def generating_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that writes text after text, if a type has one."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    return None
