"""A composition with all its adapters, fusions and heads, as one folder."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import __version__
from ..composition import Block, Fuse, Setup, parse_composition
from ..errors import AdapterError, CheckpointError, UnknownAdapterError, text_of
from . import adapterhub, files, fusion, heads, hub
from .adapterhub import Folder, Loaders, load_adapter
from .files import HEAD, SETUP_FILE
from .fusion import load_adapter_fusion
from .placing import all_or_nothing

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin

logger = logging.getLogger(__name__)

HeadSetup = Block | list[str] | str | bool | None


def save_adapter_setup(
    model: "ModelAdaptersMixin",
    save_directory: Folder,
    adapter_setup: Setup | list[Any],
    head_setup: HeadSetup = None,
    meta_dict: Mapping[str, Any] | None = None,
    custom_weights_loaders: Loaders = None,
    use_safetensors: bool = True,
) -> None:
    """Writes a composition: ``adapter_setup.json`` and a folder for each adapter, fusion and head; all or none.

    Args:
        head_setup: The heads that belong to it; True for the one head of an ordinary model class.
        meta_dict: More entries for the config files of adapters and fusions.

    Raises:
        UnknownAdapterError: The model lacks an adapter, fusion or head.
        CheckpointError: A folder cannot be written.
    """
    setup = parse_composition(adapter_setup)
    if setup is None:
        raise AdapterError("save_adapter_setup(None): there is nothing to save; pass a name or a composition block.")
    head_names = list(_head_names(head_setup))
    _check_present(model, setup, head_names)
    saved_heads = head_setup.to_dict() if isinstance(head_setup, Block) else head_setup
    content = {"adapter_setup": setup.to_dict(), "head_setup": saved_heads, "version": f"adapters.{__version__}"}
    more = {SETUP_FILE: files.json_job(save_directory, content)}
    names, meta = sorted(setup.flatten()), meta_dict or {}

    def folders() -> Iterator[tuple[str, files.Contents]]:
        yield from ((name, adapterhub.contents_of(model, name, False, meta)) for name in names)
        yield from ((fused.name, fusion.contents_of(model, fused.name, False, meta)) for fused in _fusions(setup))
        own = [("", None)] if head_setup is True else [(head, head) for head in head_names]
        yield from ((folder, {HEAD: head}) for folder, name in own if (head := heads.content(model, name)))

    files.write_tree(save_directory, folders(), use_safetensors, more)
    for loader in custom_weights_loaders or ():
        for name in (*names, *(fused.name for fused in _fusions(setup))):
            loader.save(str(files.subfolder(save_directory, name)), name)


def _check_present(model: "ModelAdaptersMixin", setup: Block, head_names: list[str]) -> None:
    fusions = [fused.name for fused in _fusions(setup) if fused.name not in model.adapters_config.fusions]
    adapters = sorted(name for name in setup.flatten() if name not in model.adapters_config)
    unknown = [name for name in head_names if heads.content(model, name) is None]
    for kind, missing in (("adapter", adapters), ("AdapterFusion", fusions), ("head", unknown)):
        if missing:
            raise UnknownAdapterError(
                f"save_adapter_setup({setup}): this model has no {kind} named {missing[0]!r}. Add it first."
            )


def load_adapter_setup(
    model: "ModelAdaptersMixin",
    adapter_setup_name_or_path: Folder,
    version: str | None = None,
    custom_weights_loaders: Loaders = None,
    set_active: bool = False,
    use_safetensors: bool = True,
    **download_arguments: Any,
) -> tuple[Block, HeadSetup]:
    """Loads a composition from a folder or the Hub: every adapter, fusion and head; returns it and its heads.

    Raises:
        CheckpointError: Something is missing, broken or does not fit the model, which is as it was.
    """
    path = text_of("load_adapter_setup(adapter_setup_name_or_path)", adapter_setup_name_or_path)
    asked = f"load_adapter_setup({path!r})"
    folder = hub.resolve(asked, path, version, **download_arguments)
    full = files.read_json(folder / SETUP_FILE)
    setup, head_setup = _read(full, asked)
    options: dict[str, Any] = {"custom_weights_loaders": custom_weights_loaders, "use_safetensors": use_safetensors}
    with all_or_nothing(model) as undo:
        for name in sorted(setup.flatten()):
            adapter = files.subfolder(folder, name)
            load_adapter(model, adapter, load_as=name, with_head=False, undo=undo, **options)
        for fused in _fusions(setup):
            load_adapter_fusion(model, files.subfolder(folder, fused.name), with_head=False, undo=undo, **options)
        _load_heads(model, folder, head_setup, use_safetensors, undo)
        if set_active:
            model.set_active_adapters(setup)
            if heads.is_flexible(model) and head_setup:
                model.active_head = cast(Any, head_setup)
    return setup, head_setup


def _read(full: Mapping[str, Any], asked: str) -> tuple[Block, HeadSetup]:
    try:
        setup, head_setup = parse_composition(Block.from_dict(full["adapter_setup"])), full.get("head_setup")
        if isinstance(head_setup, dict):
            head_setup = Block.from_dict(head_setup)
        elif not (head_setup in (None, True) or isinstance(head_setup, str) or files.is_list_of_names(head_setup)):
            raise TypeError(f"head_setup is {head_setup!r}")
    except (AdapterError, TypeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{asked}: {SETUP_FILE!r} holds no composition: {error!r}. Save it again.") from error
    if setup is None:
        raise CheckpointError(f"{asked}: {SETUP_FILE!r} holds an empty composition. Save the setup again.")
    return setup, head_setup


def _load_heads(
    model: "ModelAdaptersMixin", folder: Path, head_setup: HeadSetup, use_safetensors: bool, undo: ExitStack
) -> None:
    if head_setup is True:
        heads.load_head(model, folder, use_safetensors=use_safetensors, undo=undo)
        return
    names = list(_head_names(head_setup))
    if names and not heads.is_flexible(model):
        logger.warning("The setup has the heads %s; this model has no named heads, so they are left out.", names)
        return
    for name in names:
        heads.load_head(model, files.subfolder(folder, name), load_as=name, use_safetensors=use_safetensors, undo=undo)


def _fusions(setup: Setup) -> Iterator[Fuse]:
    """Every fusion inside a composition."""
    if isinstance(setup, Fuse):
        yield setup
    for child in setup.children if isinstance(setup, Block) else ():
        yield from _fusions(child)


def _head_names(head_setup: HeadSetup) -> Iterator[str]:
    if isinstance(head_setup, str):
        yield head_setup
    elif isinstance(head_setup, Block):
        yield from sorted(head_setup.flatten())
    elif isinstance(head_setup, list):
        yield from head_setup
