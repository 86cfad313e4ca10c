"""The site of prompts: learned embeddings that lengthen a model's input, and all that has to be lengthened with it.

A prompt stands among the tokens' embeddings, where position embeddings, token types and norms run over it too, or
behind the embeddings module, where nothing but the attention mask has to know of it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .composition import Setup
from .context import state
from .errors import AdapterError, CompositionError
from .evaluation import evaluate
from .interfaces import MASK_OF_TOKENS, POSITIONS_FROM_MASK, WITHOUT_PROMPTS
from .layouts import TARGETS, Layout, PromptSignal, Target, for_each_token
from .sites import Place, Site
from .stacks import Stack, embeddings_module, runs_longer
from .topology import Anatomy, input_embeddings, path_of


class Kept(threading.local):
    """What one step of a pass keeps for the next, per thread; copies and pickles start empty.

    layouts: of all prompts that were put in; pending: of those that the embeddings module has yet to take in;
    hidden: the last hidden states.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self.layouts: Sequence[Layout] = ()
        self.pending: Sequence[Layout] = ()
        self.hidden: Tensor | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class PromptSite(Site):
    """The input of a model; of an encoder-decoder, that of its encoder; or of a stack of blocks within it."""

    kind = "prompt"
    locations: ClassVar[dict[str, str]] = {"": "prompt"}
    holder = "prompt_tuning"

    def __init__(
        self, place: Place, stack: nn.Module, anatomy: Anatomy, width: int, within: Stack | None = None
    ) -> None:
        """stack: the model or its encoder; width: d of the embeddings; within: the blocks, whose first is `stack`."""
        super().__init__(place, stack)
        self.base_model, self.width, self.within = anatomy.base_model, width, within
        self.decoder = anatomy.base_model.get_decoder() if place.stack else None
        self.parameters = _parameters(stack)
        self.embeddings = embeddings_module(stack)
        self.placements = [] if self.embeddings is None and within is None else ["embeddings"]
        reads = "inputs_embeds" in self.parameters and isinstance(input_embeddings(stack), nn.Embedding)
        self.placements += ["tokens"] if reads else []
        self.pooler = stack._modules.get("pooler")
        path = anatomy.blocks[0].path if anatomy.blocks else ""
        trunk = stack._modules.get(path.removeprefix(f"{place.host_path}.").partition(".")[0])
        self.trunk = None if isinstance(trunk, nn.ModuleList) else trunk
        self._kept = Kept()

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """One, if the model reads tokens or has an embeddings module; else one for each stack of attentions.

        Raises:
            AdapterError: its input cannot be lengthened.
        """
        model = anatomy.base_model
        if why := WITHOUT_PROMPTS.get(model.config.model_type):
            raise AdapterError(
                f"add_adapter: prompts have no place in {type(model).__name__}: {why}; use LoRA or a bottleneck "
                "adapter."
            )
        encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        stack = model.get_encoder() if encoder_decoder else model
        path = path_of(model, stack)
        if path is None:
            return
        table, embeddings = input_embeddings(stack), embeddings_module(stack)
        place = Place(-1, "encoder" if encoder_decoder else "", "", path, "")
        if "inputs_embeds" in _parameters(stack) and isinstance(table, nn.Embedding):
            yield cls(place, stack, anatomy, table.embedding_dim)
        elif anatomy.blocks and embeddings is not None and runs_longer(model, embeddings):
            yield cls(place, stack, anatomy, anatomy.blocks[0].width)
        else:
            for within in Stack.find(anatomy):
                where = replace(place, host_path=within.path)
                yield cls(where, within.modules[0], anatomy, within.width, within)

    @property
    def root(self) -> tuple[str, nn.Module]:
        """The base model, or the first block of the stack."""
        return ("", self.base_model) if self.within is None else super().root

    @property
    def reference(self) -> Tensor:
        """The embeddings' weight."""
        tokens = self.embeddings is None and self.within is None
        return next((self.token_embeddings() if tokens else self.embeddings or self.host).parameters())

    def token_embeddings(self) -> nn.Module:
        """The map from token ids (b, s) to embeddings (b, s, d).

        Raises:
            AdapterError: the model reads no tokens.
        """
        if "tokens" not in self.placements:
            raise AdapterError(
                f"add_adapter: {type(self.base_model).__name__} reads no tokens, so no prompt can start from some; use "
                'prompt_init="random_uniform".'
            )
        host: Any = self.host
        module: nn.Module = host.get_input_embeddings()
        return module

    def target(self, config: Any) -> Target:
        """Where a prompt of this configuration (``placement``, ``combine``) goes.

        Raises:
            AdapterError: the model has no such place.
        """
        placement = self.placements[0] if config.placement == "auto" else config.placement
        if placement not in self.placements:
            raise AdapterError(
                f"add_adapter({type(config).__name__}(placement={placement!r})): {type(self.base_model).__name__} has "
                f"only the placement {' and '.join(map(repr, self.placements))}; use it, or 'auto'."
            )
        if self.within is not None and config.combine == "prefix_after_bos":
            raise AdapterError(
                f"add_adapter({type(config).__name__}(combine='prefix_after_bos')): {type(self.base_model).__name__} "
                "has no first token that a prompt could follow; use combine='prefix'."
            )
        return Target(placement, config.combine == "prefix_after_bos")

    def attach(self) -> list[RemovableHandle]:
        """Stand at the model's entrance (an encoder-decoder's: at both stacks'), its embeddings and its pooler."""
        if self.within is not None:
            return self.within.attach(self._prompt)
        handles: list[RemovableHandle] = []
        if self.decoder is None:
            handles.append(self.owner.at_entrance(self))
        else:
            handles += [
                self.host.register_forward_pre_hook(self.on_encoder, with_kwargs=True),
                self.host.register_forward_hook(self.on_encoded, always_call=True),
                self.decoder.register_forward_pre_hook(self.on_decoder, with_kwargs=True),
            ]
        if self.embeddings is not None:  # after all other hooks: these are about tokens
            handles.append(self.embeddings.register_forward_hook(self.on_embeddings))
            if self._masks_embeddings:
                handles.append(self.embeddings.register_forward_pre_hook(self.on_embedded, with_kwargs=True))
        if self.pooler is not None:
            handles.append(self.pooler.register_forward_pre_hook(self.on_pooler))
        if self.pooler is not None and self.trunk is not None:
            handles.append(self.trunk.register_forward_hook(self.on_trunk))
        return handles

    def around(self, forward: Callable[..., Any], model: nn.Module, *args: Any, inside: bool, **kwargs: Any) -> Any:
        """The base model's forward with prompts; `inside` another model, which asked for states of its own tokens."""
        plan = self.plan()
        if plan is None:
            return forward(model, *args, **kwargs)
        inputs = self._lengthened(plan, self._named(args, kwargs))
        layouts = self._kept.layouts
        try:
            output = forward(model, **inputs)
        finally:
            self._kept.forget()
        if not inside or not layouts:
            return output
        hidden = _tokens_of(layouts, output[0])
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output[next(iter(output))] = hidden
        return output

    def on_encoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Lengthen the encoder's input."""
        plan = self.plan()
        return None if plan is None else ((), self._lengthened(plan, self._named(args, kwargs)))

    def on_encoded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the encoder's input."""
        self._kept.forget()

    def on_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Lengthen the mask of the encoder's states, which the cross-attention sees."""
        plan, states = self.plan(), kwargs.get("encoder_hidden_states")
        if plan is None or states is None:
            return None
        given, length = kwargs.get("encoder_attention_mask"), states.shape[1]
        signals = self._signals(plan, len(states), 0)
        _, mask = self._layouts(signals, given, lambda: length)
        if mask is None or (given is not None and given.shape[1] == length):  # made of states without a prompt
            return None
        self._note(mask, 0)
        return args, {**kwargs, "encoder_attention_mask": mask}

    def on_embedded(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give an embeddings module that masks what it makes (DeBERTa's) the mask of the tokens."""
        mask = kwargs.get("mask")
        return None if mask is None else (args, {**kwargs, "mask": _tokens_of(self._kept.pending, mask)})

    def on_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """Put the prompts in front of what the embeddings module gives."""
        layouts, self._kept.pending = self._kept.pending, ()
        if not layouts:
            return None
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise AdapterError(
                f"prompt tuning: the embeddings module of {type(self.base_model).__name__} does not give a sequence of "
                "embeddings (b, s, d) alone, so a prompt has no place; use LoRA or a bottleneck adapter."
            )
        hidden: Tensor = output
        for layout in layouts:
            hidden = layout.spread(layout.prompt, hidden)
        return hidden

    def on_trunk(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the last hidden states for a pooler that is given one position of them."""
        if self._kept.layouts:
            self._kept.hidden = output if isinstance(output, Tensor) else output[0]

    def on_pooler(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Let the pooler read the first token, not a prompt."""
        layouts, hidden = self._kept.layouts, args[0]
        if not layouts:
            return None
        if hidden.dim() == 3:
            return _tokens_of(layouts, hidden), *args[1:]
        return None if self._kept.hidden is None else (_tokens_of(layouts, self._kept.hidden)[:, 0], *args[1:])

    def _prompt(self, rows: int, width: int) -> Tensor | None:
        """(rows, p, d) what stands in front of the blocks' states."""
        plan = self.plan()
        signals = [] if plan is None else self._signals(plan, rows, width)
        if any(signal.seen is not None for signal in signals):
            raise CompositionError(
                f"{plan}: the blocks at {self.host_path} have no mask, so prompts in one batch must be of one length; "
                "use prompts of one prompt_length."
            )
        return torch.cat([signal.prompt for signal in signals], 1) if signals else None

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def _signals(self, plan: Setup, rows: int, width: int) -> list[PromptSignal]:
        """The prompts for each target, without those of length 0."""
        targets = {module.target for module in self.adapters.values()}
        empty = self.reference.new_zeros(rows, 0, width)
        signals = [evaluate(plan, PromptSignal(None, target, empty), self) for target in TARGETS if target in targets]
        return [signal for signal in signals if signal.prompt.shape[1]]

    def _layouts(
        self, signals: Sequence[PromptSignal], mask: Tensor | None, length: Callable[[], int]
    ) -> tuple[list[Layout], Tensor | None]:
        """The layouts, and the mask of the whole; `length`: the whole's, asked for if prompts differ in length."""
        if mask is None and any(signal.seen is not None for signal in signals):
            tokens = length() - sum(signal.prompt.shape[1] for signal in signals)
            mask = signals[0].prompt.new_ones(len(signals[0]), tokens, dtype=torch.long)
        layouts = []
        for signal in signals:
            layouts.append(Layout.of(signal, mask, self._counts and signal.target.placement == "tokens"))
            mask = layouts[-1].mask(mask)
        return layouts, mask

    @property
    def _masks_embeddings(self) -> bool:
        return self.embeddings is not None and "mask" in _parameters(self.embeddings)

    @property
    def _counts(self) -> bool:
        """Whether positions are counted by the model itself and its input does not grow, as in an encoder."""
        encodes = self.embeddings is not None and not getattr(self.host.config, "is_decoder", False)
        return "past_key_values" not in self.parameters or encodes

    @property
    def _needs_positions(self) -> bool:
        """Whether the model would count the padding of a shorter prompt as positions."""
        masked = self.base_model.config.model_type in POSITIONS_FROM_MASK
        return "position_ids" in self.parameters and not self._counts and not masked

    def _note(self, mask: Tensor | None, added: int) -> None:
        """Let all other sites see the longer mask, and that what ``generate`` was given is longer by `added`."""
        now = state.forward
        if now is None or now.sites is not self.owner:
            return
        masks = now.masks if mask is None else {**now.masks, self.stack: mask}
        prompt = None if now.prompt is None else now.prompt + (0 if self.stack else added)
        state.forward = replace(now, masks=masks, prompt=prompt)

    def _lengthened(self, plan: Setup, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with prompts put in, or, where they are in the cache already, with all that reaches over them."""
        name = self._input_name(inputs)
        rows, mask, cache = len(inputs[name]), inputs.get("attention_mask"), inputs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        self._check(mask)
        masks = self._masks_embeddings or self.base_model.config.model_type in MASK_OF_TOKENS
        if mask is None and masks:  # the model would make one of the input's length
            mask = self.reference.new_ones(rows, self._tokens(name, inputs), dtype=torch.long)
        signals = self._signals(plan, rows, 0 if past else self.width)
        added = sum(signal.prompt.shape[1] for signal in signals)
        layouts, longer = self._layouts(
            signals, mask, lambda: past + self._tokens(name, inputs) + (0 if past else added)
        )
        if longer is not None and layouts:
            inputs["attention_mask"] = longer
        self._note(longer, added)
        inside = [layout for layout in layouts if layout.target.placement == "tokens"]
        if inside and past:
            inputs |= self._later_positions(inputs, inside, past)
        elif inside:
            inputs |= self._with_prompts(inputs, inside)
        if not past:
            self._kept.layouts = layouts
            self._kept.pending = [layout for layout in layouts if layout.target.placement == "embeddings"]
        return inputs

    def _with_prompts(self, inputs: dict[str, Any], layouts: Sequence[Layout]) -> dict[str, Any]:
        """Embeddings in place of tokens, positions and whole numbers for each token (types, boxes), prompts put in."""
        hidden = inputs.get("inputs_embeds")
        hidden = self.token_embeddings()(inputs["input_ids"]) if hidden is None else hidden
        types, positions = for_each_token(inputs, hidden), inputs.get("position_ids")
        uneven = any(layout.seen is not None for layout in layouts)
        if positions is None and uneven and self._needs_positions:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        for layout in layouts:
            hidden = layout.spread(layout.prompt, hidden)
            for name, given in types.items():
                types[name] = layout.spread(given.new_zeros(len(given), layout.length, *given.shape[2:]), given)
            positions = None if positions is None else layout.positions(positions)
        new = {"inputs_embeds": hidden} if positions is None else {"inputs_embeds": hidden, "position_ids": positions}
        return {"input_ids": None, **types, **new}

    def _later_positions(self, inputs: dict[str, Any], layouts: Sequence[Layout], past: int) -> dict[str, Any]:
        """The positions of tokens behind prompts that are in the cache."""
        positions = inputs.get("position_ids")
        if positions is None and (not self._needs_positions or all(layout.seen is None for layout in layouts)):
            return {}
        if positions is None:
            given = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            start = past - sum(layout.length for layout in layouts)
            positions = torch.arange(start, start + given.shape[1], device=given.device)[None]
        for layout in layouts:
            positions = positions + layout.count
        return {"position_ids": positions}

    def _input_name(self, inputs: dict[str, Any]) -> str:
        names = ("input_ids", "inputs_embeds", self.base_model.main_input_name)
        return next(name for name in names if inputs.get(name) is not None)

    def _tokens(self, name: str, inputs: dict[str, Any]) -> int:
        """The number of positions of an input; of an image, as its embeddings module has it."""
        if name in ("input_ids", "inputs_embeds"):
            return int(inputs[name].shape[1])
        embeddings: Any = self.embeddings
        known = {key: value for key, value in inputs.items() if key in _parameters(embeddings) and key != name}
        return int(embeddings(inputs[name], **known).shape[1])

    def _check(self, mask: Any) -> None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise AdapterError(
                "prompt tuning: attention_mask is no tensor (b, s), so it cannot be lengthened by the prompt; pass a "
                "mask with one entry for each token, and generate without a static cache."
            )


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module's forward takes."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _tokens_of(layouts: Sequence[Layout], states: Tensor) -> Tensor:
    """(b, s, …) the states of the tokens."""
    for layout in reversed(layouts):
        states = layout.tokens_of(states)
    return states
