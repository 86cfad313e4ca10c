"""Setting up a quantised model for the training of adapters: QLoRA, and the same with every other method."""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ..containers import AdapterDict
from ..errors import AdapterError
from ..quantised import is_quantised, keep_differentiable
from ..wrap import init

M = TypeVar("M", bound=PreTrainedModel)


def prepare_quantized_training(
    model: M,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    single_precision: bool = True,
) -> M:
    """Set up a quantised model so that adapters can be trained on it; call it right after ``from_pretrained``.

    It initialises the model for adapters; casts what is in half precision and not quantised (norms, embeddings, the map
    onto words) to single precision, in which activations then are (Dettmers et al. 2023, arXiv:2305.14314); lets
    gradients through 4-bit maps on a CPU, where bitsandbytes would order weights anew at the first evaluation; switches
    gradient checkpointing on; and lets transformers' ``Trainer`` know that a quantised model with adapters can be
    trained. Quantised weights stay as they are.

    Args:
        model: a model that transformers quantised when it loaded it.
        gradient_checkpointing: compute activations anew in the backward pass, which saves memory.
        gradient_checkpointing_kwargs: as for transformers' ``gradient_checkpointing_enable``.
        single_precision: False leaves parameters in half precision, to save memory.

    Returns:
        The model itself.

    Raises:
        AdapterError: the model is not quantised.

    Example:
        >>> config = BitsAndBytesConfig(load_in_4bit=True)
        >>> model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
        >>> adapters.prepare_quantized_training(model)
        >>> model.add_adapter("chat", "lora[r=16]")
        >>> model.train_adapter("chat")
    """
    if not isinstance(model, PreTrainedModel) or not any(map(is_quantised, model.modules())):
        raise AdapterError(
            f"prepare_quantized_training({type(model).__name__}): it is no quantised model; load one with "
            "from_pretrained and a quantization_config. For a model in floating numbers adapters.init is enough."
        )
    init(model)
    keep_differentiable(model)
    if single_precision:
        _widen(model)
    if gradient_checkpointing:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # since transformers 5.23; before
        enable: Any = getattr(model, next(name for name in names if hasattr(model, name)))
        enable(dict(gradient_checkpointing_kwargs or {"use_reentrant": False}))
    quantizer: Any = vars(model).get("hf_quantizer")
    if quantizer is not None and not quantizer.is_qat_trainable:
        kind: Any = type(quantizer)
        quantizer.__class__ = _trainable(kind)
    return model


def _widen(model: PreTrainedModel) -> None:
    """Cast the parameters in half precision that neither are quantised nor belong to an adapter."""
    kept = [module for module in model.modules() if isinstance(module, AdapterDict) or is_quantised(module)]
    own = {id(parameter) for module in kept for parameter in module.parameters() if parameter.dim() > 1}
    own |= {id(each) for module in kept if isinstance(module, AdapterDict) for each in module.parameters()}
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and id(parameter) not in own:
            parameter.data = parameter.data.float()


@cache
def _trainable(quantizer: Any) -> type:
    """The class of a model's quantizer, with the answer that Trainer looks for where no adapters of PEFT are there."""
    return type(quantizer.__name__, (quantizer,), {"is_qat_trainable": True, "__module__": quantizer.__module__})
