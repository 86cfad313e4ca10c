"""LoRA and its kin, whose options change how tensors are read."""

from dataclasses import dataclass
from typing import Any

import torch

from ...configuration import AdapterConfig
from ...methods.experts import ExpertSite, RouterSite
from ...methods.lora import LoRAConfig
from ...methods.lora_init import FROM_WEIGHT, factors
from ...sites import LinearSite, Site
from ...vocabulary import LookupSite, OutputSite
from .draft import Draft, Tensors, first_fit
from .forms import Form

OTHER_WEIGHTS = ("loftq", "corda", "lora_ga")
"""Starts with which PEFT changes the weights of the model in a way that a file does not tell."""


@dataclass(frozen=True)
class LoRAForm(Form):
    """LoRA with patterns, DoRA, a bias, embeddings; and starts that take A0 and B0 off the weights."""

    def takes(self, config: AdapterConfig) -> bool:
        """LoRA and DoRA."""
        return isinstance(config, LoRAConfig) and config.variant in ("lora", "dora") and config.architecture == "lora"

    def read(self, draft: Draft) -> None:
        """See the base."""
        options = draft.options
        start = str(options.get("init_lora_weights"))
        if draft.alone and (start in OTHER_WEIGHTS or start.startswith("corda")):
            raise draft.refusal(
                "init_lora_weights",
                "PEFT changed the model's weights too. Save it there with path_initial_model_for_weight_conversion",
            )
        super().read(draft)
        rank, alpha = draft.fields["r"], draft.fields["alpha"]
        ranks, alphas = {}, {}
        for site, own in draft.parts.items():
            if len(own["lora_A"]) != rank:
                ranks[site.module_path] = len(own["lora_A"])
            found = first_fit(options.get("alpha_pattern"), draft.path(site), alpha)
            if found != alpha:
                alphas[site.module_path] = found
        draft.fields |= {"rank_pattern": ranks, "alpha_pattern": alphas}
        if draft.fields.get("use_dora"):
            draft.change(lambda site, own: {**own, "m.weight": own["m.weight"].reshape(-1, 1)})
        if draft.alone and FROM_WEIGHT.fullmatch(start):
            draft.fields["init_weights"] = start
            draft.change(lambda site, own: own | _start(start, site, own, scale_of(draft, site)))

    def write(self, draft: Draft) -> None:
        """See the base."""
        for name in ("use_gating", "legacy"):
            if draft.fields.get(name):
                raise draft.refusal(name, "PEFT's LoRA has no such option. Save it in the native format")
        if any(isinstance(site, (ExpertSite, RouterSite)) for site in draft.parts):
            raise draft.refusal("target_modules", "experts and routers are written in the native format only")
        scales = {site: scale_of(draft, site) for site in draft.parts}
        draft.change(_plain)
        _join_slices(draft, scales)
        ranks = {site: len(own["lora_A"]) for site, own in draft.parts.items()}
        rooted = bool(draft.fields.get("use_rslora"))
        alphas = {site: scales[site] * (rank**0.5 if rooted else rank) for site, rank in ranks.items()}
        fields = draft.fields
        fields["r"], fields["alpha"] = next(iter(ranks.values())), _whole(next(iter(alphas.values())))
        draft.fields = {name: value for name, value in fields.items() if not name.endswith("_pattern")}
        super().write(draft)
        paths = {site: draft.path(site).replace(".", r"\.") for site in ranks}
        draft.options["rank_pattern"] = {paths[site]: rank for site, rank in ranks.items() if rank != fields["r"]}
        draft.options["alpha_pattern"] = {
            paths[site]: _whole(alpha) for site, alpha in alphas.items() if _whole(alpha) != fields["alpha"]
        }
        draft.change(_named_for_site)


def scale_of(draft: Draft, site: Site) -> float:
    """What the change at a site is multiplied by."""
    fields = {name: value for name, value in draft.fields.items() if name not in ("init_weights", "target_modules")}
    config: Any = LoRAConfig(**fields)
    return float(config.scale_at(site))


def _start(scheme: str, site: Site, own: Tensors, scale: float) -> Tensors:
    """A0 and B0; PEFT does not start embeddings so."""
    down, up = own["lora_A"], own["lora_B"]
    if isinstance(site, LinearSite):
        down, up = factors(scheme, site.weight, len(down), scale)
        return {"start_A": down, "start_B": up}
    return {"start_A": torch.zeros_like(down), "start_B": torch.zeros_like(up)}


def _plain(site: Site, own: Tensors) -> Tensors:
    """B A - B0 A0 as one product of twice the rank."""
    if "start_A" not in own:
        return own
    down, up, down_0, up_0 = own["lora_A"], own["lora_B"], own["start_A"], own["start_B"]
    rest = {name: tensor for name, tensor in own.items() if name not in ("start_A", "start_B")}
    return rest | {"lora_A": torch.cat([down, down_0]), "lora_B": torch.cat([up, -up_0], 1)}


def _join_slices(draft: Draft, scales: dict[Site, float]) -> None:
    """The changes of the slices of a fused map as one of the whole: all A on top of each other, each B in its place."""
    whole = {site.host: site for site in draft.model.adapter_sites.of(LinearSite) if not site.part}
    fused: dict[LinearSite, list[tuple[LinearSite, Tensors]]] = {}
    for site, own in draft.parts.items():
        if isinstance(site, LinearSite) and site.part:
            fused.setdefault(whole[site.host], []).append((site, own))
    for host, slices in fused.items():
        if len({scales[site] for site, _ in slices}) > 1:
            raise draft.refusal("alpha_pattern", "PEFT has one scale for the slices of a fused map")
        scales[host] = scales[slices[0][0]]
        joined = _joined(host, slices)
        draft.parts = {site: own for site, own in draft.parts.items() if site.host is not host.host} | {host: joined}


def _joined(host: LinearSite, slices: list[tuple[LinearSite, Tensors]]) -> Tensors:
    down = torch.cat([own["lora_A"] for _, own in slices])
    starts = {"lora_B": down.new_zeros(host.outputs, len(down)), "bias": down.new_zeros(host.outputs)}
    starts["m.weight"] = host.weight.detach().norm(dim=1, keepdim=True).to(down)
    whole = {name: start for name, start in starts.items() if name in slices[0][1]}
    column = 0
    for site, own in slices:
        rows = site.rows
        for name, tensor in whole.items():
            if name == "lora_B":
                tensor[rows, column : column + len(own["lora_A"])] = own[name]
            else:
                tensor[rows] = own[name]
        column += len(own["lora_A"])
    return {"lora_A": down, **whole}


def _named_for_site(site: Site, own: Tensors) -> Tensors:
    """PEFT has other names at embeddings, and a vector for DoRA."""
    if isinstance(site, LookupSite):
        return {
            "lora_embedding_A": own["lora_A.weight"],
            "lora_embedding_B": own["lora_B.weight"],
        }
    return {name: tensor.flatten() if name == "lora_magnitude_vector" else tensor for name, tensor in own.items()}


def _whole(number: float) -> float:
    """An integer where it is one, up to rounding."""
    return round(number) if abs(number - round(number)) < 1e-9 else number


LORA = LoRAForm(
    "LORA",
    LoRAConfig,
    {
        "r": "r",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": "use_rslora",
        "use_dora": "use_dora",
        "lora_bias": "lora_bias",
    },
    {
        "lora_embedding_A": "lora_A",
        "lora_embedding_B": "lora_B",
        "lora_magnitude_vector.weight": "m.weight",
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "lora_B.bias": "bias",
        "lora_magnitude_vector": "m.weight",
    },
    unused=(
        "layer_replication",
        "use_qalora",
        "alora_invocation_tokens",
        "arrow_config",
        "use_bdlora",
        "kasa_config",
        "monteclora_config",
        "ensure_weight_tying",
    ),
    sites=(LinearSite, LookupSite, OutputSite),
)
