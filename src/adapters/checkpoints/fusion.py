"""The native format of AdapterFusion layers."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..composition import Fuse
from ..configuration import AdapterConfig, AdapterFusionConfig
from ..configuration.hashing import get_adapter_config_hash
from ..errors import AdapterError, CheckpointError, UnknownAdapterError, check_type, listing, suggestion, text_of
from . import files, heads, legacy, weights
from .adapterhub import Folder, Loaders
from .files import FUSION, HEAD, Content
from .placing import Fusions, Saved, all_or_nothing, place
from .provenance import full_config

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin


def save_adapter_fusion(
    model: "ModelAdaptersMixin",
    save_directory: Folder,
    adapter_names: Fuse | list[str] | str,
    meta_dict: Mapping[str, Any] | None = None,
    custom_weights_loaders: Loaders = None,
    with_head: bool | str = False,
    use_safetensors: bool = True,
) -> None:
    """Writes the layers of a fusion, without its adapters, into a folder: all files or none.

    Args:
        adapter_names: The fusion: its block, its name, or the names of its adapters.
        meta_dict: More entries for the config file; they replace none of its own.
        custom_weights_loaders: Each saves what it wants into the folder afterwards.
        with_head: Whether the head of the fusion's name is written too; or the name of another one.

    Raises:
        UnknownAdapterError: The model has no such fusion or head.
        CheckpointError: The folder cannot be written.
    """
    name = fusion_name(adapter_names)
    files.write(save_directory, contents_of(model, name, with_head, meta_dict or {}), use_safetensors)
    for loader in custom_weights_loaders or ():
        loader.save(str(save_directory), name)


def save_all_adapter_fusions(
    model: "ModelAdaptersMixin",
    save_directory: Folder,
    meta_dict: Mapping[str, Any] | None = None,
    custom_weights_loaders: Loaders = None,
    use_safetensors: bool = True,
) -> None:
    """Writes each fusion into a folder of its name, with its configuration's hash as ``config_id``.

    Raises:
        CheckpointError: A folder cannot be written.
    """
    names, meta = [*model.adapters_config.fusions], dict(meta_dict or {})
    folders = ((name, contents_of(model, name, False, meta | config_id(model, name))) for name in names)
    files.write_tree(save_directory, folders, use_safetensors)
    for loader in custom_weights_loaders or ():
        for name in names:
            loader.save(str(files.subfolder(save_directory, name)), name)


def fusion_name(adapter_names: Fuse | list[str] | str) -> str:
    """The name of a fusion that is given as its block, its name or the names of its adapters."""
    if isinstance(adapter_names, Fuse):
        return adapter_names.name
    check_type("save_adapter_fusion(adapter_names)", adapter_names, (str, list, tuple), "a Fuse, a name or a list")
    return adapter_names if isinstance(adapter_names, str) else ",".join(map(str, adapter_names))


def contents_of(
    model: "ModelAdaptersMixin", name: str, with_head: bool | str, meta: Mapping[str, Any]
) -> dict[files.Kind, Content]:
    """What is saved of a fusion, and of the head of its name or another one.

    Raises:
        UnknownAdapterError: The model has no such fusion or head.
    """
    config, adapters = _fusion(model, name)
    tensors = weights.gathered(weights.fusion_slots(model, name), weights.prefix_of(model))
    contents = {
        FUSION: Content(full_config(model, name, config.to_dict(), meta) | {"adapter_names": adapters}, tensors)
    }
    if with_head:
        head_name = with_head if isinstance(with_head, str) else name
        if (head := heads.content(model, head_name)) is None:
            raise UnknownAdapterError(
                f"save_adapter_fusion({name!r}): No head with name {head_name!r} found; pass with_head=False."
            )
        contents[HEAD] = head
    return contents


def config_id(model: "ModelAdaptersMixin", name: str) -> dict[str, str]:
    """The hash of a configuration, as a further entry of its file."""
    return {"config_id": get_adapter_config_hash(_fusion(model, name)[0].to_dict())}


def _fusion(model: "ModelAdaptersMixin", name: str) -> tuple[AdapterFusionConfig, list[str]]:
    config, adapters = model.adapters_config.get_fusion(name)
    if config is None:
        known = suggestion(name, model.adapters_config.fusions)
        raise UnknownAdapterError(f"save_adapter_fusion({name!r}): Unknown AdapterFusion {name!r}; {known}")
    return config, list(adapters or ())


def load_adapter_fusion(
    model: "ModelAdaptersMixin",
    adapter_fusion_name_or_path: Folder,
    load_as: str | None = None,
    custom_weights_loaders: Loaders = None,
    set_active: bool = False,
    with_head: bool = True,
    use_safetensors: bool = True,
    *,
    loading_info: dict[str, Any] | None = None,
    undo: ExitStack | None = None,
) -> str:
    """Adds the layers of a fusion, and the head saved with it, from a folder; returns its name.

    The adapters that it fuses must be in the model. A fusion of that name is overwritten.

    Args:
        load_as: The name in this model; by default the one it was saved under.
        custom_weights_loaders: Each loads what it wants from the folder afterwards.
        loading_info: Receives the lists ``missing_keys`` and ``unexpected_keys``.
        undo: The enclosing load of a setup.

    Raises:
        CheckpointError: The checkpoint is missing, broken, or does not fit the model, which is as it was.
    """
    folder = Path(text_of("load_adapter_fusion(adapter_fusion_name_or_path)", adapter_fusion_name_or_path))
    asked = f"load_adapter_fusion({str(folder)!r})"
    fusion = read_fusion(folder, load_as, use_safetensors)
    name, adapters = fusion.name, fusion.config[1]
    if unknown := [adapter for adapter in adapters if adapter not in model.adapters_config]:
        raise UnknownAdapterError(
            f"{asked}: No adapter with name {unknown[0]!r} found; it fuses {listing(adapters)}. Load these first."
        )
    head = heads.beside_adapter(model, folder, name, load_as, None, use_safetensors) if with_head else None
    with all_or_nothing(model, undo) as changes:
        place(Fusions(model), fusion, asked, loading_info, changes)
        if set_active:
            model.set_active_adapters(Fuse(*adapters, name=name))
        if head is not None:
            heads.place_head(model, head, asked, set_active, loading_info, changes)
        for loader in custom_weights_loaders or ():
            options: dict[str, Any] = {"main_load_name": name, "set_active": set_active}
            loader.load(str(folder), load_as=load_as, loading_info=loading_info, **options)
    return name


def read_fusion(
    folder: Path, load_as: str | None = None, use_safetensors: bool = True
) -> Saved[tuple[AdapterConfig, list[str]]]:
    """Reads the folder of a fusion; touches no model. Before version 1.0 its name lists the adapters.

    Raises:
        CheckpointError: A file is missing or broken.
    """
    file = folder / FUSION.config
    full = files.read_json(file)
    saved = files.read_weights(folder, FUSION, use_safetensors)
    old, config, adapters = full.get("name"), full.get("config"), full.get("adapter_names")
    if adapters is None and isinstance(old, str):
        adapters = old.split(",")
    if not isinstance(old, str) or not isinstance(config, dict) or not files.is_list_of_names(adapters):
        raise CheckpointError(
            f"{str(file)!r}: 'name', 'config' or 'adapter_names' is not that of an AdapterFusion. Save it again."
        )
    try:
        definition = AdapterFusionConfig.from_dict({**legacy.LATER_OF_FUSIONS, **config}), adapters
    except (AdapterError, TypeError) as error:
        raise CheckpointError(f"{str(file)!r}: 'config' cannot be used: {error}") from error
    name = load_as or old
    own = {key: value for key, value in saved.items() if f".{old}." in key}  # 1.x wrote those that begin the same too
    return Saved(name, definition, weights.renamed(own, old, name), full)
