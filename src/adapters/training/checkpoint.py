"""What a trainer writes of a model and reads back: its adapters, fusions, heads and other trained weights."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from ..checkpoints import adapterhub, atomic, files, fusion, heads
from ..checkpoints.adapterhub import load_adapter
from ..checkpoints.files import ADAPTER, FUSION, HEAD, Content, Gone
from ..checkpoints.fusion import load_adapter_fusion
from ..checkpoints.heads import load_head
from ..checkpoints.placing import all_or_nothing
from ..checkpoints.weights import copied
from ..composition import Block, Fuse, Setup
from ..errors import CheckpointError, listing
from ..heads.model_mixin import ModelWithFlexibleHeadsAdaptersMixin
from ..model import ModelAdaptersMixin
from ..sharded import set_whole

OTHER_WEIGHTS = "trained_base_parameters.safetensors"
"""Trained weights of the base model itself, such as embeddings; the file is there only if there are any."""


def save_trained(model: ModelAdaptersMixin, folder: str, with_fusions: bool, write: bool = True) -> None:
    """Writes each adapter, each fusion if `with_fusions`, and each head into a folder of its name: all or none.

    Heads are written without the weights that are tied to the base model's: a checkpoint holds none of those.

    write: False in processes that only give their parts of the tensors.
    """

    def contents() -> Iterator[tuple[str, files.Contents]]:
        for name in model.adapters_config:
            found = adapterhub.contents_of(model, name, True, adapterhub.config_id(model, name))
            yield name, {kind: _own(model, name, each) if kind == HEAD else each for kind, each in found.items()}
        for name in model.adapters_config.fusions if with_fusions else ():
            yield name, fusion.contents_of(model, name, False, fusion.config_id(model, name))
        for name in model.heads if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin) else ():
            if name not in model.adapters_config and (head := heads.content(model, name)):
                yield name, {HEAD: _own(model, name, head)}

    weights = {name: copied(parameter) for name, parameter in _other_trained(model).items()}
    if not write:
        for _ in contents():
            pass
        return
    more = {OTHER_WEIGHTS: partial(save_file, weights, metadata={"format": "pt"})} if weights else {}
    files.write_tree(folder, contents(), True, more)


def load_trained(model: ModelAdaptersMixin, folder: str) -> None:
    """Reads what `save_trained` wrote; what is active and what is trained stays as it is.

    Raises:
        CheckpointError: `folder` has no adapter or lacks one that is active, or a file does not fit; the model is left
            as it was.
    """
    atomic.finish(Path(folder))
    saved_adapters, saved_fusions, saved_heads = (
        [file.parent for file in sorted(Path(folder).glob(f"*/{kind.config}"))] for kind in (ADAPTER, FUSION, HEAD)
    )
    _require_active(model, folder, {path.name for path in saved_adapters})
    flexible = isinstance(model, ModelWithFlexibleHeadsAdaptersMixin)
    with all_or_nothing(model) as changes:
        for path in saved_adapters:
            load_adapter(model, path, with_head=not flexible, undo=changes)
        for path in saved_fusions:
            load_adapter_fusion(model, path, with_head=False, undo=changes)
        for path in saved_heads if flexible else ():
            load_head(model, path, set_active=False, undo=changes)
        _load_others(model, Path(folder) / OTHER_WEIGHTS)


def fused(setup: Setup) -> bool:
    """Whether there is a `Fuse` anywhere in the composition."""
    return isinstance(setup, Block) and (isinstance(setup, Fuse) or any(map(fused, setup.children)))


def _require_active(model: ModelAdaptersMixin, folder: str, saved: set[str]) -> None:
    if not saved:
        raise CheckpointError(
            f"Can't find a valid checkpoint at {folder!r}: it has no adapter; it must be what an AdapterTrainer wrote. "
            "Give a folder checkpoint-N of its output_dir."
        )
    active = set(model.active_adapters.flatten()) if model.active_adapters else set()
    if missing := sorted(active - saved):
        raise CheckpointError(
            f"resume from {folder!r}: the active {listing(missing)} is not there, only {listing(sorted(saved))}; all "
            "active adapters must be. Activate what was trained, or give the checkpoint of this training."
        )


def _own(model: ModelAdaptersMixin, name: str, head: Content | Gone) -> Content | Gone:
    """A head's content without weights of the base model."""
    if isinstance(head, Gone):
        return head
    flexible = isinstance(model, ModelWithFlexibleHeadsAdaptersMixin)
    tied = heads.tied_weights(model, name if flexible else None)
    return replace(head, weights={key: tensor for key, tensor in head.weights.items() if key not in tied})


def _other_trained(model: ModelAdaptersMixin) -> dict[str, nn.Parameter]:
    """The trained parameters of the base model that no adapter and no fusion owns, by their names in the model."""
    sites = model.adapter_sites
    adapters = (module for name in model.adapters_config for _, module in sites.holding(name))
    shared = (module for name in model.adapters_config for module in sites.shared(name).values())
    owned = {id(p) for module in (*adapters, *shared, *sites.fusion_layers()) for p in module.parameters()}
    inside = {id(p) for p in model.base_model.parameters() if p.requires_grad} - owned
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside}


def _load_others(model: ModelAdaptersMixin, file: Path) -> None:
    if not file.is_file():
        return
    parameters, saved = dict(model.named_parameters()), load_file(file)
    if misfits := [name for name in saved if name not in parameters or parameters[name].shape != saved[name].shape]:
        raise CheckpointError(
            f"resume from {str(file.parent)!r}: {misfits[0]!r} is not in this model or has another shape; it must be "
            "the model that was trained. Load that one."
        )
    for name, value in saved.items():
        set_whole(parameters[name], value)
