"""Several vocabularies in one model: tables of token embeddings by name, of which one is in use."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .checkpoints.atomic import finish_around, write_all
from .errors import AdapterError, CheckpointError, ConfigError, check_type, listing, suggestion, text_of
from .topology import linear_shape
from .vocabulary import LookupSite, OutputSite, input_table

if TYPE_CHECKING:
    from .model import ModelAdaptersMixin

EMBEDDING_FILE, TOKENIZER_FOLDER, DEFAULT = "embedding.pt", "tokenizer", "default"
START = 0.02
"""The standard deviation of new embeddings."""


class UnknownEmbeddingsError(AdapterError, KeyError):
    """A model has no embeddings of a name, or a reference lacks its other half."""

    __str__ = ValueError.__str__


class MissingEmbeddingsError(CheckpointError, FileNotFoundError):
    """A folder holds no embeddings."""


@dataclass
class Vocabularies:
    """The tables that are not in use, with the biases of the maps onto words that go with each, and the one that is."""

    active: str = DEFAULT
    tables: dict[str, nn.Embedding] = field(default_factory=dict)
    biases: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)


class EmbeddingAdaptersMixin:
    """Named tables of token embeddings; maps onto words that are tied to the table follow it."""

    base_model: Any
    config: Any
    words_are_loaded: bool = False
    """Whether the map onto words of one of transformers' classes came with an adapter."""

    @property
    def active_embeddings(self) -> str:
        """The name of the embeddings in use; those of the checkpoint are ``default``."""
        return self._vocabularies.active

    @property
    def loaded_embeddings(self) -> dict[str, nn.Embedding]:
        """All embeddings by name."""
        table = input_table(self.base_model)
        return {} if table is None else {**self._vocabularies.tables, self.active_embeddings: table}

    @property
    def _vocabularies(self) -> Vocabularies:
        found: Vocabularies = vars(self.base_model).setdefault("_adapters_vocabularies", Vocabularies())
        return found

    def add_embeddings(
        self,
        name: str,
        tokenizer: Any,
        reference_embedding: str | None = None,
        reference_tokenizer: Any = None,
        embedding_dim: int | None = None,
    ) -> None:
        """Adds and activates embeddings (len(tokenizer), d); ``train_adapter(…, train_embeddings=True)`` trains them.

        Args:
            tokenizer: Says which token each row is.
            reference_embedding, reference_tokenizer: Embeddings of this model and their tokenizer; tokens that both
                tokenizers have start from these, all others from N(0, 0.02).
            embedding_dim: d, by default that of the embeddings in use.

        Raises:
            AdapterError: The name is taken, there is one reference without the other, or an adapter sits here.

        Example:
            >>> model.add_embeddings("tr", turkish, reference_embedding="default", reference_tokenizer=english)
        """
        asked = f"add_embeddings({name!r})"
        if (reference_embedding is None) != (reference_tokenizer is None):
            raise UnknownEmbeddingsError(
                f"{asked}: Reference embedding and reference tokenizer are required to copy from a reference; one of "
                "the two is None. Give both or none."
            )
        table = self._new_name(asked, name)
        check_type(f"{asked}: tokenizer", tokenizer, Sized, "a tokenizer, whose length is the number of words")
        if reference_tokenizer is not None:
            for given in (tokenizer, reference_tokenizer):
                if not callable(getattr(given, "get_vocab", None)):
                    raise ConfigError(f"{asked}: {given!r} has no get_vocab(); give the two tokenizers.")
        check_type(f"{asked}: embedding_dim", embedding_dim, (int, NoneType), "a whole number, or None")
        source = None if reference_embedding is None else self._known(asked, reference_embedding).weight.detach()
        width = embedding_dim or table.embedding_dim
        weight = torch.randn(len(tokenizer), width, device=table.weight.device) * START
        if source is not None:
            theirs = reference_tokenizer.get_vocab()
            both = {row: theirs[token] for token, row in tokenizer.get_vocab().items() if token in theirs}
            known = {row: other for row, other in both.items() if row < len(weight) and other < len(source)}
            weight[[*known]] = source[[*known.values()]].to(weight)
        self._enter(name, weight.to(table.weight.dtype))

    def load_embeddings(self, path: str | os.PathLike[str], name: str) -> Any:
        """Loads embeddings from a folder and activates them; returns the tokenizer saved with them, or None.

        Raises:
            CheckpointError: There are none, or the file is broken. AdapterError: The name is taken.

        Example:
            >>> tokenizer = model.load_embeddings("out/tr", "tr")
        """
        path = text_of("load_embeddings(path)", path)
        asked, file = f"load_embeddings({path!r}, {name!r})", Path(path) / EMBEDDING_FILE
        table = self._new_name(asked, name)
        finish_around(Path(path))
        if not file.is_file():
            raise MissingEmbeddingsError(f"{asked}: No embeddings found at {file}; give a folder of save_embeddings.")
        try:
            weight = torch.load(file, map_location=table.weight.device, weights_only=True)
        except Exception as error:  # torch raises a dozen kinds
            raise CheckpointError(f"{asked}: {str(file)!r} cannot be read: {error}. Save it again.") from error
        if not (isinstance(weight, Tensor) and weight.dim() == 2):
            raise CheckpointError(f"{asked}: {str(file)!r} holds no matrix (words, d); save it with save_embeddings.")
        tokenizer = _tokenizer(Path(path) / TOKENIZER_FOLDER)
        self._enter(name, weight.detach().to(table.weight.dtype))
        return tokenizer

    def save_embeddings(self, path: str | os.PathLike[str], name: str, tokenizer: Any = None) -> None:
        """Saves embeddings, and their tokenizer if it is given, to a folder: all files or none.

        Raises:
            AdapterError: The model has no embeddings of that name.

        Example:
            >>> model.save_embeddings("out/tr", "tr", turkish)
        """
        path = text_of("save_embeddings(path)", path)
        weight = nn.Parameter(self._known("save_embeddings", name).weight.detach().cpu().clone())
        jobs: list[tuple[str, Callable[[Path], object]]] = [(EMBEDDING_FILE, lambda file: torch.save(weight, file))]
        with TemporaryDirectory() as folder:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            jobs += [
                (f"{TOKENIZER_FOLDER}/{file.name}", partial(shutil.copyfile, file)) for file in Path(folder).iterdir()
            ]
            write_all(Path(path), jobs)

    def set_active_embeddings(self, name: str) -> None:
        """Uses other embeddings from now on; maps onto words that are tied to them become theirs.

        Raises:
            AdapterError: The model has no embeddings of that name, or an adapter sits at those in use.

        Example:
            >>> model.set_active_embeddings("default")
        """
        asked = f"set_active_embeddings({name!r})"
        table = self._known(asked, name)
        if name == self.active_embeddings:
            return
        self._check_sites(asked)
        kept, live = self._vocabularies, cast(nn.Embedding, input_table(self.base_model))
        swap = _Swap(cast(nn.Module, self), cast(nn.Parameter, live.weight))
        kept.tables[kept.active] = _stored(swap.old, live.padding_idx)
        kept.biases[kept.active] = swap.biases
        swap.make(kept.tables.pop(name), kept.biases.pop(name, {}))
        kept.active = name
        self.follow_vocabulary(len(table.weight))

    def follow_vocabulary(self, size: int) -> None:
        """Brings what depends on the number of words up to date."""
        sites = cast("ModelAdaptersMixin", self).adapter_sites
        shape = None if sites.anatomy.output is None else linear_shape(sites.anatomy.output)
        self.config.get_text_config().vocab_size = size if shape is None else shape[1]  # a head that is not tied stays
        sites.forget(LookupSite, OutputSite)
        if isinstance(bias := vars(self)["_buffers"].get("final_logits_bias"), Tensor):  # BART's relatives add it
            cast(Any, self).final_logits_bias = bias.new_zeros(1, size)

    def delete_embeddings(self, name: str) -> None:
        """Deletes embeddings; if they are in use the default ones are used from now on.

        Raises:
            AdapterError: The model has no embeddings of that name, or they are the default ones.
        """
        self._known("delete_embeddings", name)
        if name == DEFAULT:
            raise AdapterError(f"delete_embeddings({name!r}): these are the checkpoint's own; delete others only.")
        if name == self.active_embeddings:
            warnings.warn("The active embedding is deleted. Setting the default embedding as active.", stacklevel=2)
            self.set_active_embeddings(DEFAULT)
        del self._vocabularies.tables[name]
        self._vocabularies.biases.pop(name, None)

    def _enter(self, name: str, weight: Tensor) -> None:
        self._vocabularies.tables[name] = _stored(nn.Parameter(weight, requires_grad=False), None)
        self.set_active_embeddings(name)

    def _known(self, asked: str, name: str) -> nn.Embedding:
        tables = self.loaded_embeddings
        if not isinstance(name, str) or name not in tables:
            raise UnknownEmbeddingsError(f"{asked}: No embedding with name {name!r}; {suggestion(str(name), tables)}")
        return tables[name]

    def _new_name(self, asked: str, name: str) -> nn.Embedding:
        """The table in use."""
        table = input_table(self.base_model)
        if table is None:
            raise AdapterError(f"{asked}: {type(self).__name__} reads no tokens, so it has no embeddings of any.")
        check_type(f"{asked}: name", name, str, "a string")
        if name in self.loaded_embeddings:
            raise AdapterError(f"{asked}: An embedding with the name {name} already exists; choose another name.")
        self._check_sites(asked)
        return table

    def _check_sites(self, asked: str) -> None:
        sites = cast("ModelAdaptersMixin", self).adapter_sites.sites
        found = {name for site in sites if type(site) in (LookupSite, OutputSite) for name in site.adapters}
        if found:
            raise AdapterError(
                f"{asked}: the adapters {listing(sorted(found))} sit at the embeddings in use, and have their shape; "
                "delete_adapter first."
            )


def _tokenizer(folder: Path) -> Any:
    """The tokenizer that was saved to a folder; None if there is no folder."""
    from transformers import AutoTokenizer  # slow to import, and rarely needed

    return AutoTokenizer.from_pretrained(folder) if folder.is_dir() else None


def _stored(weight: nn.Parameter, padding: int | None) -> nn.Embedding:
    table = nn.Embedding(len(weight), weight.shape[1], device="meta")
    table.weight, table.padding_idx = weight, padding
    return table


class _Swap:
    """Puts a weight (words, d) in the place of another wherever a model has it, and biases of maps to suit."""

    def __init__(self, model: nn.Module, old: nn.Parameter) -> None:
        self.modules, self.old = [*model.modules()], old
        self.users = [part for part in self.modules if part._parameters.get("weight") is old]
        tied = {id(part._parameters.get("bias")) for part in self.users}
        self.biases = {path: each for path, each in model.named_parameters() if id(each) in tied}

    def make(self, table: nn.Embedding, biases: Mapping[str, nn.Parameter]) -> None:
        """biases: those that go with the table, by path; 0 where there is none."""
        new = cast(nn.Parameter, table.weight)
        if (new.device, new.dtype) != (self.old.device, self.old.dtype):
            new = nn.Parameter(new.detach().to(self.old), new.requires_grad)
        changes = {id(self.old): new}
        for path, bias in self.biases.items():
            changes[id(bias)] = biases.get(path, nn.Parameter(bias.new_zeros(len(new)), bias.requires_grad))
        for part in self.modules:
            own = part._parameters.items()
            part._parameters |= {name: changes[id(each)] for name, each in own if id(each) in changes}
        for part in self.users:
            if isinstance(part, nn.Embedding):
                part.num_embeddings, part.embedding_dim = new.shape
                part.padding_idx = table.padding_idx
            else:
                cast(Any, part).out_features = len(new)
