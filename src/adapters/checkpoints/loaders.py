"""A way for users to save more of a model beside each adapter."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import files, weights
from .files import Content, Kind
from .provenance import full_config, origin, prefixes

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin


class WeightsLoader(ABC):
    """Saves and loads the weights of a model that ``filter_func`` picks, in files of its own beside an adapter.

    Pass instances as ``custom_weights_loaders`` to ``save_adapter`` and ``load_adapter``.

    Attributes:
        model: The model that is saved from and loaded into.

    Example:
        >>> class PoolerLoader(WeightsLoader):
        ...     def __init__(self, model):
        ...         super().__init__(model, "pooler.bin", "pooler_config.json", safe_weights_name="pooler.safetensors")
        ...     def filter_func(self, adapter_name):
        ...         return lambda key: ".pooler." in key
        ...     def rename_func(self, old_name, new_name):
        ...         return lambda key: key
        >>> model.save_adapter("out/sst2", "sst2", custom_weights_loaders=[PoolerLoader(model)])
    """

    def __init__(
        self,
        model: "ModelAdaptersMixin",
        weights_name: str,
        config_name: str,
        use_safetensors: bool = False,
        safe_weights_name: str | None = None,
    ) -> None:
        """Names the files: a PyTorch file, a config, and the file that is written instead with `use_safetensors`."""
        self.model, self.use_safetensors = model, use_safetensors
        self.files = Kind("weights", config_name, safe_weights_name or f"{weights_name}.safetensors", weights_name)

    @abstractmethod
    def filter_func(self, adapter_name: str) -> Callable[[str], bool]:
        """Which keys of the model's state dict are saved for an adapter."""

    @abstractmethod
    def rename_func(self, old_name: str, new_name: str) -> Callable[[str], str]:
        """What a saved key is called after the adapter `old_name` is loaded as `new_name`."""

    def save(self, save_directory: str | os.PathLike[str], name: str, **kwargs: Any) -> None:
        """Writes the picked weights and a config with the adapter's name.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        wanted = self.filter_func(name)
        tensors = {key: weights.copied(value) for key, value in self.model.state_dict().items() if wanted(key)}
        content = Content(full_config(self.model, name, None, {}), tensors)
        files.write(save_directory, {self.files: content}, self.use_safetensors)

    def load(
        self,
        save_directory: str | os.PathLike[str],
        load_as: str | None = None,
        loading_info: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[str, str | None]:
        """Reads the weights into the model; returns the folder and the adapter's name.

        Raises:
            CheckpointError: The files are missing, broken or do not fit the model, which is as it was.
        """
        folder, asked = Path(save_directory), f"{type(self).__name__}.load({str(save_directory)!r})"
        config = files.read_json(folder / self.files.config)
        saved, name = files.read_weights(folder, self.files, self.use_safetensors), config.get("name")
        if load_as is not None and name is not None:
            rename = self.rename_func(name, load_as)
            saved = {rename(key): value for key, value in saved.items()}
        wanted, own = self.filter_func(load_as or name or ""), weights.prefix_of(self.model)
        state: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        slots: weights.Slots = {key.removeprefix(own): (value,) for key, value in state.items() if wanted(key)}
        found = prefixes(config, saved, self.model)
        fit = weights.compare(slots, saved, found, own, asked, origin(config, self.model))
        weights.fill(slots, fit.matched)
        weights.report(fit, asked, loading_info)
        return str(save_directory), load_as or name
