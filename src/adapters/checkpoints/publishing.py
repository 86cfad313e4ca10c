"""Uploading adapters and setups to the Hugging Face Hub, with a card that says how to use them."""

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..composition import Setup, parse_composition
from ..errors import CheckpointError, ConfigError, UnknownAdapterError, suggestion
from .adapterhub import save_adapter
from .heads import content as head_content
from .hub import FILES
from .setups import HeadSetup, save_adapter_setup

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin

LIBRARY_TAG = "adapter-transformers"
"""By which the Hub knows adapters."""
CARD = "README.md"
METADATA = ("language", "license", "metrics")
CARD_OPTIONS = ("tags", *METADATA, "architecture_training", "results", "citation")
NOT_SAID = "Not stated by the author."
UNNAMED_MODEL = "path/of/the/base-model"


class PushAdapterToHubMixin:
    """The uploading verbs of a model."""

    def push_adapter_to_hub(
        self,
        repo_id: str,
        adapter_name: str,
        datasets_tag: str | None = None,
        local_path: str | os.PathLike[str] | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        overwrite_adapter_card: bool = False,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
        adapter_card_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Upload an adapter, the head of its name and a card to a repository of the Hub, which is made if need be.

        Args:
            repo_id: ``"user/repository"``.
            datasets_tag: The Hub's name of the dataset that it was trained on.
            local_path: A directory to keep the files in; by default a temporary one.
            overwrite_adapter_card: Whether a card that is in `local_path` already is replaced.
            adapter_card_kwargs: For the card: ``tags``, ``language``, ``license``, ``metrics`` (names), ``results`` (a
                text, or values by metric, which become a table), ``architecture_training``, ``citation`` (texts).

        Returns:
            What ``huggingface_hub.HfApi.upload_folder`` returns.

        Raises:
            UnknownAdapterError: The model has no such adapter.
            ConfigError: The card has no such part.
            CheckpointError: It cannot be saved or uploaded.

        Example:
            >>> model.push_adapter_to_hub("me/bert-sst2", "sst2", adapter_card_kwargs={"results": {"accuracy": 0.92}})
        """
        model = cast("ModelAdaptersMixin", self)
        if adapter_name not in model.adapters_config:
            known = suggestion(adapter_name, model.adapters_config.adapters)
            raise UnknownAdapterError(f"push_adapter_to_hub({adapter_name!r}): no adapter of that name; {known}")
        load = f'name = model.load_adapter("{repo_id}", set_active=True)'
        card = Card(model, repo_id, f"Adapter `{adapter_name}`", load, datasets_tag, adapter_card_kwargs or {})
        text = card.text(_head_type(model, adapter_name))
        upload = Upload(repo_id, local_path, private, token, overwrite_adapter_card)
        details = {"create_pr": create_pr, "revision": revision, "commit_description": commit_description}
        details["commit_message"] = commit_message or f"Upload adapter {adapter_name}"
        return upload.perform(lambda folder: save_adapter(model, folder, adapter_name), text, details)

    def push_adapter_setup_to_hub(
        self,
        repo_id: str,
        adapter_setup: Setup | list[Any],
        head_setup: HeadSetup = None,
        datasets_tag: str | None = None,
        local_path: str | os.PathLike[str] | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        overwrite_adapter_card: bool = False,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
        adapter_card_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Upload a composition with all that it uses, as ``save_adapter_setup`` writes it, and a card.

        The other arguments, what is returned and what is raised: see ``push_adapter_to_hub``.

        Example:
            >>> model.push_adapter_setup_to_hub("me/bert-en-ner", Stack("en", "ner"), head_setup="ner")
        """
        model, setup = cast("ModelAdaptersMixin", self), parse_composition(adapter_setup)
        load = f'setup, heads = model.load_adapter_setup("{repo_id}", set_active=True)'
        card = Card(model, repo_id, f"Adapter setup `{setup}`", load, datasets_tag, adapter_card_kwargs or {})
        text = card.text(_head_type(model, head_setup) if isinstance(head_setup, str) else None)
        upload = Upload(repo_id, local_path, private, token, overwrite_adapter_card)
        details = {"create_pr": create_pr, "revision": revision, "commit_description": commit_description}
        details["commit_message"] = commit_message or f"Upload setup {setup}"
        return upload.perform(lambda folder: save_adapter_setup(model, folder, setup, head_setup), text, details)


def _head_type(model: "ModelAdaptersMixin", name: str) -> str | None:
    found = head_content(model, name)
    config = found.config.get("config") if found else None
    return config.get("head_type") if isinstance(config, dict) else None


@dataclass(frozen=True)
class Upload:
    """Where to and how."""

    repo_id: str
    local_path: str | os.PathLike[str] | None
    private: bool | None
    token: bool | str | None
    overwrite_card: bool

    def perform(self, save: Callable[[Path], None], card: str, details: Mapping[str, Any]) -> Any:
        """Saves into a folder, writes the card beside it, and uploads both.

        Raises:
            CheckpointError: It cannot be saved or uploaded.
        """
        from huggingface_hub import HfApi

        with ExitStack() as places:
            folder = Path(self.local_path or places.enter_context(tempfile.TemporaryDirectory()))
            save(folder)
            if self.overwrite_card or not (folder / CARD).exists():
                (folder / CARD).write_text(card, encoding="utf-8")
            try:
                hub = HfApi(token=self.token, library_name="adapters")
                repository = hub.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
                patterns = [*FILES, CARD]
                return hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=patterns, **details)
            except Exception as error:  # what a network can raise is without limit
                reason = (str(error).splitlines() or [""])[0]
                raise CheckpointError(
                    f"upload to {self.repo_id!r}: {reason}. Pass a token that may write there, or log in with "
                    "`hf auth login`."
                ) from error


@dataclass(frozen=True)
class Card:
    """The page of a repository: metadata for the Hub and a text for its readers."""

    model: "ModelAdaptersMixin"
    repo_id: str
    what: str
    load: str
    dataset: str | None
    options: Mapping[str, Any]

    def text(self, head_type: str | None) -> str:
        """The page; `head_type` is that of the head that comes along.

        Raises:
            ConfigError: An option is unknown.
        """
        for option in self.options:
            if option not in CARD_OPTIONS:
                raise ConfigError(f"adapter_card_kwargs: {option!r}; {suggestion(option, CARD_OPTIONS)}")
        base = self.model.model_name or UNNAMED_MODEL
        trained = f" that was trained on the dataset `{self.dataset}`" if self.dataset else ""
        head = f" It comes with a prediction head for {head_type.replace('_', ' ')}." if head_type else ""
        parts = {
            "Usage": f"```sh\npip install -U adapters\n```\n\n```python\nfrom adapters import AutoAdapterModel\n\n"
            f'model = AutoAdapterModel.from_pretrained("{base}")\n{self.load}\n```',
            "Architecture & training": self.options.get("architecture_training", NOT_SAID),
            "Evaluation results": _table(self.options.get("results", NOT_SAID)),
            "Citation": self.options.get("citation", NOT_SAID),
        }
        about = f"{self.what} for the model `{base}`{trained}, made with the library [adapters]"
        about += f"(https://github.com/adapter-hub/adapters).{head}"
        sections = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
        return f"---\n{self._metadata()}\n---\n\n# {self.repo_id}\n\n{about}\n\n{sections}\n"

    def _metadata(self) -> str:
        from huggingface_hub import ModelCardData

        tags = dict.fromkeys([LIBRARY_TAG, self.model.config.model_type, *self.options.get("tags", ())])
        known = {name: value for name in METADATA if (value := self.options.get(name)) is not None}
        if self.model.model_name and not Path(self.model.model_name).exists():
            known["base_model"] = self.model.model_name
        if self.dataset:
            known["datasets"] = [self.dataset]
        if isinstance(results := self.options.get("results"), Mapping):
            known.setdefault("metrics", [*results])
        return ModelCardData(library_name="adapters", tags=[*tags], **known).to_yaml()


def _table(results: object) -> str:
    if isinstance(results, str):
        return results
    if not isinstance(results, Mapping):
        raise ConfigError(f"adapter_card_kwargs: results is {results!r}; give a text, or values by metric.")
    rows = [
        f"| {metric} | {value:.4g} |" if isinstance(value, float) else f"| {metric} | {value} |"
        for metric, value in results.items()
    ]
    return "\n".join(["| metric | value |", "|---|---|", *rows])
