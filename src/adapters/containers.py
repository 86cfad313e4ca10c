"""The modules that hold adapters inside a model: made when the first one comes, removed when the last one goes."""

from torch import nn


class AdapterDict(nn.ModuleDict):
    """Modules by adapter name; unlike its base it takes every name, also ``train`` or ``keys``."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        """Register `module` under `key`."""
        self._modules[key] = module


def child(module: nn.Module, name: str) -> nn.Module:
    """The child module of that name, an empty one if there is none yet."""
    if name not in module._modules:
        module.add_module(name, nn.Module().train(module.training))
    return module.get_submodule(name)


def child_dict(module: nn.Module, name: str) -> AdapterDict:
    """The dict of adapters below `module`, an empty one if there is none yet."""
    found = module._modules.get(name)
    if not isinstance(found, AdapterDict):
        found = AdapterDict().train(module.training)
        module.add_module(name, found)
    return found


def remove_child(module: nn.Module, name: str) -> None:
    """Remove the child of that name if nothing is below it."""
    found = module._modules.get(name)
    if found is not None and not found._modules:
        del module._modules[name]
