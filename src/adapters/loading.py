"""The class for saving more of a model beside an adapter, where 1.x has it."""

from .checkpoints.loaders import WeightsLoader

__all__ = ["WeightsLoader"]
