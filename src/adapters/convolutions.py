"""Convolutions as linear maps: W (out, c k k) of the patches (b, s, c k k) under the kernel, one for each output."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from .sharded import loaded


def convolution_shape(module: nn.Module) -> tuple[int, int] | None:
    """(c k k, out) of a 2-D convolution of all channels with zeros around; None for any other module."""
    if type(module) is not nn.Conv2d or module.groups > 1 or module.padding_mode != "zeros":
        return None
    return module.weight[0].numel(), module.out_channels


def convolves(module: nn.Module, least: int) -> bool:
    """Whether a module holds so many convolutions, of any kind, and is no list or sequence itself."""
    return not isinstance(module, (nn.ModuleList, nn.Sequential)) and len(_convolutions(module)) >= least


def channels_of(block: nn.Module) -> int:
    """The channels of the last convolution; 0 if there is none."""
    return [0, *(child.out_channels for child in _convolutions(block))][-1]


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [child for child in module.modules() if isinstance(child, nn.Conv2d)]


def patches(module: nn.Module, images: Tensor) -> Tensor:
    """(b, s, c k k) what the kernel of a convolution sees of images (b, c, h, w), output by output."""
    kernel = cast(nn.Conv2d, module)
    around = pad(images, kernel._reversed_padding_repeated_twice)
    return unfold(around, kernel.kernel_size, kernel.dilation, 0, kernel.stride).mT


def pixels(output: Tensor) -> Tensor:
    """(b, s, out) of what a convolution gives (b, out, h, w)."""
    return output.flatten(2).mT


def image(values: Tensor, like: Tensor) -> Tensor:
    """The reverse of ``pixels``."""
    return values.mT.reshape(like.shape)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear map keeps its weight as (outputs, inputs); GPT-2's keeps it the other way round."""
    return hasattr(module, "in_features")


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a linear map or a convolution as a matrix (outputs, inputs), a view of the parameter."""
    weight: Tensor = loaded(module, "weight")
    if weight.dim() > 2:
        return weight.view(len(weight), -1)
    return weight if is_plain(module) else weight.T
