"""Models that follow no convention: names in another language, an odd order, one projection of value, key and query."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers import PreTrainedConfig, PreTrainedModel

INTERFACE = {
    "adapter_methods": ["lora", "bottleneck", "reft", "invertible", "prompt_tuning"],
    "model_embeddings": "woerter",
    "model_layers": "stapel",
    "layer_self_attn": "blick",
    "layer_cross_attn": None,
    "attn_o_proj": "heraus",
    "attn_qkv_proj": "wert_schluessel_frage",
    "layer_intermediate_proj": "denken.hinein",
    "layer_output_proj": "denken.hinaus",
    "layer_pre_self_attn": "glatt_eins",
    "layer_pre_ffn": "glatt_zwei",
}


class Blick(nn.Module):
    """Attention. Of each head's 3 w outputs the first w are the value, the next the key, the last the query."""

    def __init__(self, breite, koepfe):
        super().__init__()
        self.koepfe = koepfe
        self.heraus = nn.Linear(breite, breite)
        self.wert_schluessel_frage = nn.Linear(breite, 3 * breite)

    def forward(self, strom):
        gruppen = self.wert_schluessel_frage(strom).unflatten(-1, (self.koepfe, 3, -1))
        wert, schluessel, frage = (gruppen[..., i, :].transpose(1, 2) for i in range(3))
        return self.heraus(scaled_dot_product_attention(frage, schluessel, wert).transpose(1, 2).flatten(2))


class Denken(nn.Module):
    def __init__(self, breite):
        super().__init__()
        self.hinaus = nn.Linear(2 * breite, breite)
        self.hinein = nn.Linear(breite, 2 * breite)

    def forward(self, strom):
        return self.hinaus(torch.tanh(self.hinein(strom)))


class Schicht(nn.Module):
    """A layer, whose parts stand in the order in which nobody runs them."""

    def __init__(self, breite, koepfe):
        super().__init__()
        self.denken = Denken(breite)
        self.glatt_zwei = nn.LayerNorm(breite)
        self.blick = Blick(breite, koepfe)
        self.glatt_eins = nn.LayerNorm(breite)

    def forward(self, strom):
        strom = strom + self.blick(self.glatt_eins(strom))
        return strom + self.denken(self.glatt_zwei(strom))


class Rumpf(nn.Module):
    """A module of torch."""

    def __init__(self, breite=16, koepfe=2, schichten=2, wortschatz=32):
        super().__init__()
        self.stapel = nn.ModuleList(Schicht(breite, koepfe) for _ in range(schichten))
        self.woerter = nn.Embedding(wortschatz, breite)

    def forward(self, saetze):
        strom = self.woerter(saetze)
        for schicht in self.stapel:
            strom = schicht(strom)
        return strom


class Ganzes(nn.Module):
    """A module of torch around another one."""

    def __init__(self):
        super().__init__()
        self.rumpf = Rumpf()
        self.klassen = nn.Linear(16, 3)

    def forward(self, saetze):
        return self.klassen(self.rumpf(saetze).mean(1))


class Unsichtbar(nn.Module):
    """A layer that no pass can be traced through, since it reads values."""

    def __init__(self, breite, koepfe):
        super().__init__()
        self.innen = Schicht(breite, koepfe)


class EigenConfig(PreTrainedConfig):
    model_type = "eigen"

    def __init__(self, breite=16, schichten=2, wortschatz=32, **kwargs):
        self.breite, self.schichten, self.wortschatz = breite, schichten, wortschatz
        super().__init__(**kwargs)


class EigenModel(PreTrainedModel):
    """A model of transformers."""

    config_class = EigenConfig
    base_model_prefix = "eigen"

    def __init__(self, config):
        super().__init__(config)
        self.stapel = nn.ModuleList(Schicht(config.breite, 2) for _ in range(config.schichten))
        self.woerter = nn.Embedding(config.wortschatz, config.breite)
        self.post_init()

    def forward(self, saetze, **kwargs):
        strom = self.woerter(saetze)
        for schicht in self.stapel:
            strom = schicht(strom)
        return (strom,)


def attention_by_hand(blick, strom, change):
    """What the attention gives if `change` is added to the query alone."""
    gruppen = blick.wert_schluessel_frage(strom).unflatten(-1, (blick.koepfe, 3, -1))
    wert, schluessel, frage = (gruppen[..., i, :].transpose(1, 2) for i in range(3))
    frage = frage + change.unflatten(-1, (blick.koepfe, -1)).transpose(1, 2)
    scores = softmax(frage @ schluessel.transpose(-1, -2) / frage.shape[-1] ** 0.5, -1)
    return blick.heraus((scores @ wert).transpose(1, 2).flatten(2))
