"""What a model with any number of named heads adds to a model with adapters."""

import copy
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from ..averaging import Shares
from ..checkpoints import heads as head_files
from ..composition import Block, parse_heads_from_composition
from ..context import AdapterSetup, Forward, Part, current, state, within
from ..errors import AdapterError, check_type, listing
from ..streams import Inverse
from .base import PredictionHead
from .dispatch import HeadPlan, HeadSetup, check_names, flatten_choices, gather, hand_on, take_rows, to_tuple
from .language_modeling import Seq2SeqLMHead
from .registry import MODEL_HEAD_MAP
from .sentence import scales_for_heads, sentence_vector
from .vocabulary import VocabularyHeads

__all__ = ["MODEL_HEAD_MAP", "ModelWithFlexibleHeadsAdaptersMixin"]

logger = logging.getLogger(__name__)

HEAD_INPUTS = ("num_items_in_batch",)
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


class ModelWithFlexibleHeadsAdaptersMixin(VocabularyHeads):
    """A base model with adapters and any number of named prediction heads, ``model.heads``.

    The heads of a forward pass are those of its argument ``head``, else of the innermost ``AdapterSetup``, else the
    ``active_head``. Without one the model returns what its base model returns.
    """

    # The base model repeats its inputs for Parallel; the heads then take their rows of its outputs.
    repeats_inputs = False

    # The base model's forward arguments: the named ones in order, and all that it accepts.
    forward_parameters: ClassVar[tuple[str, ...]] = ()
    _base_inputs: ClassVar[frozenset[str]] = frozenset()

    # Only encoder-decoders have it: collators ask for it to know one.
    prepare_decoder_input_ids_from_labels: Callable[[torch.Tensor], torch.Tensor]

    # --- state -----------------------------------------------------------------------------------------------------

    def init_heads(self) -> None:
        """Makes the heads that ``config.prediction_heads`` lists; the last one becomes active."""
        self.heads = cast("MutableMapping[str, PredictionHead]", nn.ModuleDict())
        self._active_heads = None
        configs = vars(self.config).get("prediction_heads") or {}
        self.config.prediction_heads = {}
        for name, config in configs.items():
            self._register(self.head_from_config(name, config, overwrite_ok=False))
            self.active_head = name

    @property
    def active_head(self) -> HeadSetup:
        """The active head: a name, a list of names, a ``BatchSplit`` or ``Parallel`` of names, or None.

        A single name also sets the labels of the model's config.

        Raises:
            AdapterError: (when set) The model has no head of that name.

        Example:
            >>> model.active_head = "sst2"
        """
        if not self._active_heads:
            return None
        heads = self._active_heads
        return heads[0] if isinstance(heads, list) and len(heads) == 1 else heads

    @active_head.setter
    def active_head(self, head: HeadSetup) -> None:
        check_type("active_head", head, (str, Sequence, Block, type(None)), "a name, a list of names, a block or None")
        missing = [name for name in HeadPlan.of(head).names if name not in self.heads]
        if missing:
            raise AdapterError(
                f"active_head = {head!r}: Model does not contain a head with name {missing[0]!r}; it has "
                f"{listing(self.heads)}. Add the head with one of the add_*_head methods or load_head."
            )
        if isinstance(head, str) and head:
            self._active_heads = [head]
            self.config.label2id = self.heads[head].config.get("label2id")
            self.config.id2label = self.get_labels_dict(head)
        else:
            self._active_heads = head if isinstance(head, Block) else list(head or []) or None
        self.loss_type = self._loss_type()

    def set_active_adapters(self, adapter_setup: Any, skip_layers: list[int] | None = None) -> None:
        """Activates adapters, and the heads of the same names if the model has them all.

        Raises:
            AdapterError: An adapter is unknown.
            CompositionError: The composition is invalid.

        Example:
            >>> model.set_active_adapters("sst2")
        """
        super().set_active_adapters(adapter_setup, skip_layers)
        heads = parse_heads_from_composition(self.active_adapters)
        if heads and self._has_heads(heads):
            self.active_head = heads

    # --- add and delete --------------------------------------------------------------------------------------------

    def add_prediction_head(self, head: PredictionHead, overwrite_ok: bool = False, set_active: bool = True) -> None:
        """Adds a head that was made before, under ``head.name``.

        Raises:
            AdapterError: The name is taken.

        Example:
            >>> model.add_prediction_head(ClassificationHead(model, "sst2", num_labels=2))
        """
        check_type("add_prediction_head(head)", head, PredictionHead, "a PredictionHead")
        self._check_name(head.name, overwrite_ok)
        self._register(head)
        if (
            output := head.get_output_embeddings()
        ) is not None and f"{self._output_path(head)}.weight" in self._tied_heads():
            output.weight = cast(nn.Embedding, self.get_input_embeddings()).weight
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.follow_heads()
        if set_active:
            self.active_head = head.name

    def _register(self, head: PredictionHead) -> None:
        outputs = head.config.get("num_labels", head.config.get("num_choices"))
        if outputs is not None and head.config.get("label2id", ...) is None:
            head.config["label2id"] = {f"LABEL_{index}": index for index in range(outputs)}
        self.heads[head.name] = head
        self.config.prediction_heads[head.name] = head.config

    def delete_head(self, head_name: str) -> None:
        """Removes a head, also from the active ones; an unknown name is logged.

        Example:
            >>> model.delete_head("sst2")
        """
        if head_name not in self.heads:
            logger.info("No prediction head '%s' found for deletion.", head_name)
            return
        del self.heads[head_name]
        self.config.prediction_heads.pop(head_name, None)  # models made from one config object share it
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.follow_heads()
        if isinstance(self._active_heads, list):
            self._active_heads = [name for name in self._active_heads if name != head_name] or None
        elif head_name in HeadPlan.of(self._active_heads).names:
            self._active_heads = None

    # --- forward ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, head: HeadSetup = None, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Runs the base model and the heads in use; labels go to every one of them.

        Raises:
            AdapterError: A head is unknown.
            CompositionError: Heads and rows of the batch do not match.
        """
        if len(args) > len(self.forward_parameters):
            raise TypeError(f"forward: {len(args)} positional arguments; at most {len(self.forward_parameters)} fit.")
        plan = self._plan(head)
        inputs = flatten_choices({**dict(zip(self.forward_parameters, args, strict=False)), **kwargs})
        inputs = self._decoder_inputs(inputs, plan)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        base_inputs = {name: value for name, value in inputs.items() if name in self._base_inputs}
        if not plan.names:
            return self.base_model(**base_inputs, return_dict=return_dict)
        result = self._run_heads(plan, self.base_model(**base_inputs, return_dict=True), inputs)
        return result if return_dict else to_tuple(result)

    def _plan(self, head: HeadSetup) -> HeadPlan:
        if head is None and (context := AdapterSetup.acting_on(self.adapter_sites)) is not None and self.heads:
            if context.assignment is not None and state.generating is None:
                rowwise = HeadPlan.of_rows(context.adapter_setup.children, context.assignment)
                if all(name in self.heads for name in rowwise.names):
                    return rowwise
            head = context.head_setup
            # Heads that only follow from the adapters' names are used if they exist, as in set_active_adapters.
            if head == parse_heads_from_composition(context.adapter_setup) and not self._has_heads(head):
                head = None
        plan = HeadPlan.of(self._active_heads if head is None else head)
        check_names("forward", plan.names, [*self.heads])
        return plan

    def _has_heads(self, heads: HeadSetup) -> bool:
        return all(name in self.heads for name in HeadPlan.of(heads).names)

    def _decoder_inputs(self, inputs: dict[str, Any], plan: HeadPlan) -> dict[str, Any]:
        """Adds the decoder's inputs if there are none: a language model's labels, else the inputs, shifted right."""
        if "decoder_input_ids" not in self.forward_parameters:
            return inputs
        heads = [self.heads[name] for name in plan.names]
        if any(inputs.get(name) is not None for head in heads for name in head.get_label_names()):
            inputs = {"use_cache": False, **inputs}
        if any(inputs.get(name) is not None for name in DECODER_INPUTS):
            return inputs
        source = inputs.get("labels") if any(isinstance(head, Seq2SeqLMHead) for head in heads) else None
        source = inputs.get("input_ids") if source is None else source
        if source is None:
            return inputs
        return {**inputs, "decoder_input_ids": self.prepare_decoder_input_ids_from_labels(source)}

    def _run_heads(self, plan: HeadPlan, outputs: ModelOutput, inputs: Mapping[str, Any]) -> Any:
        setup, total = self.effective_setup(), len(outputs[0])
        channels = setup.parallel_channels if setup else 1
        rows = plan.rows(total, channels, repeated=state.generating is not None)
        parts = [(outputs, inputs)] * len(plan.names)
        if rows is not None:
            parts = [(take_rows(outputs, part, total), take_rows(inputs, part, total)) for part in rows]
        owns = len(parts) * [None] if rows is None else [Part(own, total) for own in rows]
        results = []
        for name, part, own in zip(plan.names, parts, owns, strict=True):
            with within(_of_head(current(), channels, own)):
                results.append(self._run_head(name, *part, Inverse.of(self.adapter_sites.sites, own)))
        return hand_on(results[0] if len(results) == 1 else gather(results, summed=rows is not None), outputs)

    def follow_heads(self) -> None:
        """Tell the sites of the heads' maps onto words; each head undoes invertible adapters itself, before its own."""
        outputs = (head.get_output_embeddings() for head in self.heads.values())
        self.adapter_sites.follow(None, of_heads=tuple(output for output in outputs if output is not None))

    def _run_head(self, name: str, outputs: ModelOutput, inputs: Mapping[str, Any], inverse: Inverse | None) -> Any:
        sentence = sentence_vector(outputs, self.config, inputs) if self.head_types else None
        pooled = outputs.get("pooler_output")
        if scales_for_heads(self.config):  # what heads read, not the sentence vector
            outputs = type(outputs)(**{**outputs, "last_hidden_state": outputs[0] * self.config.d_model**-0.5})
        own = {key: value for key, value in inputs.items() if key in HEAD_INPUTS or key not in self._base_inputs}
        return self.heads[name](
            outputs,
            cls_output=sentence,
            attention_mask=inputs.get("attention_mask"),
            return_dict=True,
            pooled_output=pooled,
            invertible_adapter=inverse,
            **own,
        )

    def average_head(
        self,
        head_name: str,
        head_list: Any,
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """Adds a head whose weights are a weighted mean of those of heads of one class and configuration.

        Args:
            head_list: Names of heads, or their weights by name.
            weights: A number for each; equal by default.
            normalize_weights: Divide the weights by their sum.

        Raises:
            AdapterError: A head is unknown, the name is taken, or the heads differ in more than their weights.

        Example:
            >>> model.average_head("mean", ["sst2", "imdb"])
        """
        shares = Shares.of("average_head", head_list, weights, normalize_weights)
        check_names("average_head", shares.names, [*self.heads])
        heads = [self.heads[name] for name in shares.names]
        if len({type(head) for head in heads}) > 1:
            raise AdapterError(
                f"average_head({head_name!r}): Cannot average heads of different classes. All heads must be of type "
                f"{type(heads[0]).__name__}."
            )
        if any({**head.config, "dropout_prob": None} != {**heads[0].config, "dropout_prob": None} for head in heads):
            raise AdapterError(
                f"average_head({head_name!r}): Cannot average heads with different configurations. Please make sure "
                "all heads have the same configuration."
            )
        mean = copy.deepcopy(heads[0])
        mean.name = head_name
        mean.load_state_dict(shares.mean([head.state_dict() for head in heads]))
        self.add_prediction_head(mean, overwrite_ok, set_active)

    # --- labels ----------------------------------------------------------------------------------------------------

    def get_labels_dict(self, head_name: str | None = None) -> dict[int, str] | None:
        """The labels of a head in the order of their ids, ``{id: label}``; None for a head without labels.

        Raises:
            AdapterError: The head is unknown; or none is given and there is not one active head.

        Example:
            >>> model.get_labels_dict("sst2")
        """
        label2id = self._named(head_name, "get_labels_dict").config.get("label2id")
        return (
            None if label2id is None else {index: label for label, index in sorted(label2id.items(), key=itemgetter(1))}
        )

    def get_labels(self, head_name: str | None = None) -> list[str] | None:
        """The labels of a head in the order of their ids; None for a head without labels.

        Raises:
            AdapterError: The head is unknown; or none is given and there is not one active head.

        Example:
            >>> model.get_labels("sst2")
        """
        labels = self.get_labels_dict(head_name)
        return None if labels is None else list(labels.values())

    def get_prediction_heads_config(self) -> dict[str, dict[str, Any]]:
        """The configs of all heads by name."""
        return {name: head.config for name, head in self.heads.items()}

    def _named(self, head_name: str | None, asked: str) -> PredictionHead:
        name = self.active_head if head_name is None else head_name
        if not name:
            raise AdapterError(f"{asked}: No head name given and no active head in the model; pass head_name.")
        if not isinstance(name, str):
            raise AdapterError(f"{asked}: several heads are active, {name!r}; pass the head_name of one.")
        check_names(asked, [name], [*self.heads])
        return self.heads[name]

    # --- files and devices -----------------------------------------------------------------------------------------

    def adapter_to(self, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Moves an adapter, and the head of the same name, to a device or a precision.

        Example:
            >>> model.adapter_to("sst2", dtype=torch.bfloat16)
        """
        super().adapter_to(name, device, dtype)
        if name in self.heads:
            self.heads[name].to(device=device, dtype=dtype)

    def save_head(
        self,
        save_directory: str | PathLike[str],
        head_name: str | None = None,
        use_safetensors: bool = True,
        **kwargs: Any,
    ) -> None:
        """Saves a head, by default the active one, to a directory.

        Raises:
            AdapterError: The head is unknown; or none is given and there is not one active head.

        Example:
            >>> model.save_head("out/sst2", "sst2")
        """
        head_files.save_head(self, save_directory, self._named(head_name, "save_head").name, use_safetensors, **kwargs)

    def save_all_heads(self, save_directory: str | PathLike[str], use_safetensors: bool = True) -> None:
        """Saves each head to a folder of its name.

        Example:
            >>> model.save_all_heads("out")
        """
        for name in self.heads:
            self.save_head(Path(save_directory) / name, name, use_safetensors)

    def load_head(
        self,
        save_directory: str | PathLike[str],
        load_as: str | None = None,
        id2label: Mapping[int, str] | None = None,
        use_safetensors: bool = True,
        **kwargs: Any,
    ) -> tuple[str, str | None]:
        """Loads a head from a directory, adds and activates it; returns the directory and the head's name.

        Args:
            save_directory: Where it was saved.
            load_as: Its name in this model.
            id2label: Labels in place of the saved ones.
            use_safetensors: Prefer the safetensors file if there are both.
            kwargs: ``set_active`` (default True) and ``loading_info`` (a dict that receives the missing keys).

        Raises:
            CheckpointError: The files are missing, broken or do not fit the model.

        Example:
            >>> model.load_head("out/sst2", load_as="reviews")
        """
        return head_files.load_head(self, save_directory, load_as, id2label, use_safetensors, **kwargs)


def _of_head(forward: Forward | None, channels: int, part: Part | None) -> Forward | None:
    """The pass as the base model saw it, whose rows were repeated for Parallel, for a head with a part of its rows."""
    if forward is None or (channels == 1 and part is None):
        return forward
    return replace(forward, repeated=forward.repeated or channels > 1, part=part)
