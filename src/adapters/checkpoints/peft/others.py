"""The other methods that need more than a row: what is shared, drawn again, kept as values or counted otherwise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...attention import AttentionSite
from ...configuration import AdapterConfig
from ...layouts import Target
from ...methods.cpt import CPTConfig
from ...methods.lora import LoRAConfig
from ...methods.prefix_tuning import PrefixGroup
from ...norms import NormSite
from ...prompts import PromptSite
from ...sites import LinearSite, Site
from ...vocabulary import LookupSite
from .draft import Draft, Tensors, shortest
from .forms import Form


@dataclass(frozen=True)
class AdaLoRAForm(Form):
    """PEFT's files have the triplets that are left, by its pattern of ranks; here the others are zero."""

    unused: tuple[str, ...] = ("bias",)

    def write(self, draft: Draft) -> None:
        """See the base."""
        draft.fields["total_step"] = draft.fields["total_step"] or draft.fields["tinit"] + draft.fields["tfinal"] + 1
        super().write(draft)

    def read(self, draft: Draft) -> None:
        """See the base."""
        super().read(draft)
        rank = draft.fields["init_r"]
        draft.change(lambda site, own: _padded(own, rank))


def _padded(own: Tensors, rank: int) -> Tensors:
    down, middle, up = own["lora_A"], own["lora_E"], own["lora_B"]
    missing = rank - len(down)
    return {
        "lora_A": torch.cat([down, down.new_zeros(missing, down.shape[1])]),
        "lora_E": torch.cat([middle, middle.new_zeros(missing, 1)]),
        "lora_B": torch.cat([up, up.new_zeros(len(up), missing)], 1),
        "kept": torch.arange(rank) < len(down),
    }


@dataclass(frozen=True)
class VeRAForm(Form):
    """PEFT has no scale, and may leave out the matrices, which it draws again."""

    def takes(self, config: AdapterConfig) -> bool:
        """VeRA."""
        return isinstance(config, LoRAConfig) and config.variant == "vera"

    def read(self, draft: Draft) -> None:
        """See the base."""
        super().read(draft)
        rank, widths = draft.fields["r"], [(site.inputs, site.outputs) for site in draft.parts]  # type: ignore[attr-defined]
        inputs, outputs = (max(sizes) for sizes in zip(*widths, strict=True))
        draft.fields |= {"alpha": rank, "vera_b": 0.0}
        if not draft.shared:
            source = torch.Generator().manual_seed(draft.options["projection_prng_key"])
            draft.shared = {"lora_A": _drawn(rank, inputs, source), "lora_B": _drawn(outputs, rank, source)}
        draft.shared = {
            "lora_A": draft.shared["lora_A"][:, :inputs],
            "lora_B": draft.shared["lora_B"][:outputs],
        }

    def write(self, draft: Draft) -> None:
        """See the base."""
        if draft.fields.get("legacy"):
            raise draft.refusal("legacy", "it trains whole matrices, PEFT vectors. Save it in the native format")
        scale = draft.fields.pop("alpha") / draft.fields["r"]
        for name in ("vera_b", "composition_mode"):
            draft.fields.pop(name)
        draft.change(lambda site, own: {**own, "vera_B": own["vera_B"] * scale})
        super().write(draft)
        draft.options |= {"save_projection": True, "projection_prng_key": 0}


def _drawn(rows: int, columns: int, source: torch.Generator) -> Tensor:
    """He's uniform distribution, from a generator as PEFT uses it."""
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=source)


@dataclass(frozen=True)
class IA3Form(Form):
    """PEFT names the maps whose input is scaled; the shape of a vector says it too."""

    def takes(self, config: AdapterConfig) -> bool:
        """(IA)³."""
        return isinstance(config, LoRAConfig) and config.variant == "ia3"

    def read(self, draft: Draft) -> None:
        """See the base."""
        before = {site for site, own in draft.parts.items() if own["ia3_l"].shape[0] == 1}
        super().read(draft)
        paths = {site.module_path for site in draft.parts}
        if before:
            draft.fields["scaled_inputs"] = shortest({site.module_path for site in before}, paths)
        draft.change(lambda site, own: {"lora_A": own["lora_B"]} if site in before else own)

    def write(self, draft: Draft) -> None:
        """See the base."""
        scale = draft.fields.pop("alpha")
        draft.fields.pop("scaled_inputs")
        before = {draft.path(site) for site, own in draft.parts.items() if "lora_A" in own}
        draft.change(lambda site, own: {"lora_B": own.get("lora_B", own.get("lora_A", Tensor())) * scale})
        _joined_vectors(draft)
        super().write(draft)
        draft.options["feedforward_modules"] = sorted(before)


def _joined_vectors(draft: Draft) -> None:
    """The vectors of the slices of a fused map as one, with ones for what is not scaled."""
    whole = {site.host: site for site in draft.model.adapter_sites.of(LinearSite) if not site.part}
    joined: dict[Site, Tensors] = {}
    for site, own in draft.parts.items():
        if isinstance(site, LinearSite) and site.part:
            host, vector = whole[site.host], own["lora_B"]
            into = joined.setdefault(host, {"lora_B": vector.new_ones(host.outputs, 1)})["lora_B"]
            into[site.rows] = vector
        else:
            joined[site] = own
    draft.parts = joined


@dataclass(frozen=True)
class MiSSForm(Form):
    """PEFT says the variant by how the matrix starts."""

    def read(self, draft: Draft) -> None:
        """See the base."""
        super().read(draft)
        variant = draft.options.get("init_weights")
        draft.fields["variant"] = variant if variant in ("bat", "mini") else "miss"
        if variant != "mini":
            draft.fields.pop("mini_r", None)

    def write(self, draft: Draft) -> None:
        """See the base."""
        variant = draft.fields.pop("variant")
        super().write(draft)
        draft.options["init_weights"] = True if variant == "miss" else variant


@dataclass(frozen=True)
class RandLoRAForm(Form):
    """PEFT has two switches for the kind of matrices, and larger ones than needed."""

    def read(self, draft: Draft) -> None:
        """See the base."""
        if not draft.options.get("save_projection", True) and not draft.shared:
            raise draft.refusal(
                "save_projection", "the matrices that PEFT draws depend on the machine. Save it with them"
            )
        super().read(draft)
        draft.change(lambda site, own: {name: own[name] for name in ("randlora_lambda", "randlora_gamma")})
        sizes = [sorted((site.inputs, site.outputs)) for site in draft.parts]  # type: ignore[attr-defined]
        narrow, wide = (max(widths) for widths in zip(*sizes, strict=True))
        width = -(-narrow // draft.fields["r"]) * draft.fields["r"]
        draft.shared = {
            "randlora_A": draft.shared["randlora_A"].flatten(1)[:, :narrow].contiguous(),
            "randlora_B": draft.shared["randlora_B"].flatten(1)[:wide, :width].contiguous(),
        }
        sparse, very = draft.options.get("sparse"), draft.options.get("very_sparse")
        draft.fields["bases"] = "very_sparse" if very else "sparse" if sparse else "dense"

    def write(self, draft: Draft) -> None:
        """See the base."""
        bases = draft.fields.pop("bases")
        draft.fields["save_projection"] = True
        super().write(draft)
        draft.options |= {"sparse": bases == "sparse", "very_sparse": bases == "very_sparse"}
        rank = draft.options["r"]
        down, up = draft.shared["randlora_A"], draft.shared["randlora_B"]
        up = up.view(len(up), -1, rank)
        widths = [(site.inputs, site.outputs) for site in draft.parts]  # type: ignore[attr-defined]
        narrow = min(max(sizes) for sizes in zip(*widths, strict=True))
        more, bases = narrow - down.shape[1], -(-narrow // rank) - up.shape[1]  # which no map reads
        draft.shared = {"randlora_A": pad(down[:, None], (0, more)), "randlora_B": pad(up, (0, 0, 0, bases))}
        draft.change(lambda site, own: own | draft.shared)


@dataclass(frozen=True)
class VBLoRAForm(Form):
    """PEFT may keep the weights of the best vectors in place of all logits."""

    def read(self, draft: Draft) -> None:
        """See the base."""
        count = draft.options["num_vectors"]
        draft.change(lambda site, own: _all_logits(own, count))
        super().read(draft)


def _all_logits(own: Tensors, count: int) -> Tensors:
    found = {name: tensor for name, tensor in own.items() if "_topk_" not in name}
    for name in ("vblora_logits_A", "vblora_logits_B"):
        if f"{name}_topk_indices" in own:
            index, weights = own[f"{name}_topk_indices"].long(), own[f"{name}_topk_weights"]
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
            logits = weights.new_full((*weights.shape[:-1], count), -torch.inf)
            found[name] = logits.scatter(-1, index, weights.log())
    return found


@dataclass(frozen=True)
class NormForm(Form):
    """PEFT keeps the norms' own parameters, here the differences to the model's are kept."""

    def read(self, draft: Draft) -> None:
        """See the base."""
        super().read(draft)
        draft.change(lambda site, own: {name: value - _base(site, name).to(value) for name, value in own.items()})
        norms = {site.module_path for site in draft.model.adapter_sites.of(NormSite)}
        chosen = {site.module_path for site in draft.parts}
        if chosen != norms:
            draft.fields["target_modules"] = shortest(chosen, norms)

    def write(self, draft: Draft) -> None:
        """See the base."""
        for name in ("outside_blocks", "bias"):
            draft.fields.pop(name)
        draft.change(lambda site, own: {name: value + _base(site, name).to(value) for name, value in own.items()})
        for site, own in draft.parts.items():
            if site.bias is not None:
                own.setdefault("bias", site.bias.detach())
        super().write(draft)


def _base(site: Site, name: str) -> Tensor:
    return site.host.get_parameter(name).detach()


@dataclass(frozen=True)
class TokensForm(Form):
    """PEFT keeps the embeddings themselves, here the differences to the model's are kept."""

    def read(self, draft: Draft) -> None:
        """See the base."""
        super().read(draft)
        draft.fields = {"token_indices": list(draft.options["token_indices"])}
        for site, own in draft.parts.items():
            draft.shared = {"delta": own["delta"] - _rows(draft, site).to(own["delta"])}
        draft.parts = {}

    def write(self, draft: Draft) -> None:
        """See the base."""
        (table,) = draft.model.adapter_sites.of(LookupSite)
        delta = draft.shared["delta"]
        draft.parts = {}
        super().write(draft)
        draft.parts = {table: {"trainable_tokens_delta": delta + _rows(draft, table).to(delta)}}


def _rows(draft: Draft, site: Site) -> Tensor:
    return _base(site, "weight")[torch.tensor(draft.fields["token_indices"])]


@dataclass(frozen=True)
class PromptForm(Form):
    """PEFT keeps the prompt, however it is made."""

    always: Mapping[str, Any] = field(default_factory=lambda: {"placement": "tokens"})
    sites: tuple[type[Site], ...] = (PromptSite,)

    def read(self, draft: Draft) -> None:
        """See the base."""
        if draft.options.get("num_transformer_submodules") == 2:
            _refuse_two(draft)
        super().read(draft)
        ((site, own),) = draft.parts.items()
        if draft.options.get("task_type") == "SEQ_CLS" and isinstance(site, PromptSite) and site.embeddings is not None:
            raise draft.refusal("task_type", "PEFT's head reads the first vector of the prompt, ours the first token")
        if self.config is CPTConfig:  # the file has what training made of the context
            draft.parts = {site: {**own, "delta_embedding.weight": torch.zeros_like(own["embedding"])}}
        else:
            draft.fields["prompt_length"] = len(own[self.tensors["prompt_embeddings"]])

    def write(self, draft: Draft) -> None:
        """See the base."""
        ((site, own),) = draft.parts.items()
        config: Any = self.config(**draft.fields)
        if isinstance(site, PromptSite) and site.target(config) != Target("tokens", after_first=False):
            raise draft.refusal("placement", "PEFT puts prompts among the tokens, before the first one; train it so")
        module: Any = site.adapters[draft.name]
        made = own["embedding.weight"] if "prefix_task_cols" in own else module.prompt(None).detach()
        draft.fields = {name: value for name, value in draft.fields.items() if name in self.options.values()}
        super().write(draft)
        rest: Tensors = {name: own[name] for name in ("prefix_task_cols", "prefix_task_rows") if name in own}
        draft.parts = {site: {"prompt_embeddings": made, **rest}}
        draft.options |= {"num_virtual_tokens": len(made), "num_transformer_submodules": 1}


def _refuse_two(draft: Draft) -> None:
    raise draft.refusal(
        "num_transformer_submodules", "the decoder takes no prompt or prefix in that way here. Use LoRA instead"
    )


@dataclass(frozen=True)
class PrefixForm(Form):
    """PEFT has the prefix in the cache, so that the tokens' positions count on from it."""

    always: Mapping[str, Any] = field(default_factory=lambda: {"flat": True, "shift_positions": True})
    sites: tuple[type[Site], ...] = (PromptSite,)

    def read(self, draft: Draft) -> None:
        """See the base."""
        if draft.options.get("num_transformer_submodules") == 2:
            _refuse_two(draft)
        super().read(draft)
        prefix = draft.shared["prefix"]
        draft.fields["prefix_length"] = len(prefix)
        kind = draft.model.adapter_sites.of(AttentionSite)[0].location
        draft.shared = {f"{kind}.control_trans": prefix.flatten()}

    def write(self, draft: Draft) -> None:
        """See the base."""
        groups = [dict(module.named_children()) for module in draft.model.adapter_sites.shared(draft.name).values()]
        kinds = [group for each in groups for group in each.values()]
        for name in ("encoder_prefix", "cross_prefix", "leave_out", "modules", "use_gating"):
            if len(kinds) != 1 or (name in ("leave_out", "modules", "use_gating") and draft.fields[name]):
                raise draft.refusal(name, "PEFT has one prefix without gates, in all layers of one stack")
        if not draft.fields["shift_positions"]:
            raise draft.refusal("shift_positions", "PEFT counts the prefix as positions; train it so")
        (group,) = kinds
        if isinstance(group, PrefixGroup):
            draft.shared = {"prompt_embeddings": group.flat().detach().view(group.length, -1)}
        draft.options |= {"num_virtual_tokens": draft.fields["prefix_length"], "num_transformer_submodules": 1}
