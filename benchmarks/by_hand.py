"""Adapters written into BERT's and GPT-2's own classes: what their formulas cost where no library is."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu
from transformers import DynamicCache
from transformers.models.bert.modeling_bert import BertOutput
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from .models import sharing

RANK, REDUCTION, PREFIX = 8, 16, 30


class LowRank(nn.Linear):
    """y = Wx + b + B A x"""

    def forward(self, input: Tensor) -> Tensor:
        output = linear(input, self.weight, self.bias)
        flat = linear(input.flatten(0, -2), self.lora_A)
        return torch.addmm(output.flatten(0, -2), flat, self.lora_B.T).view(output.shape)


class WithBottleneck(BertOutput):
    """LN(up(relu(down(LN(h + r)))) + h + r), as `seq_bn` computes."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        total = self.dropout(self.dense(hidden_states)) + input_tensor
        return self.LayerNorm(self.up(relu(self.down(self.LayerNorm(total)))) + total)


def by_hand(base: nn.Module, method: str) -> nn.Module:
    """The base model with the adapter and the head in training."""
    model = sharing(base)
    model.bert.requires_grad_(False)
    width = model.config.hidden_size
    for layer in model.bert.encoder.layer:
        if method == "LoRA":
            for projection in (layer.attention.self.query, layer.attention.self.value):
                projection.__class__ = LowRank
                projection.lora_A = nn.Parameter(torch.randn(RANK, width) / width)
                projection.lora_B = nn.Parameter(torch.zeros(width, RANK))
        else:
            layer.output.__class__ = WithBottleneck
            layer.output.down = nn.Linear(width, width // REDUCTION)
            layer.output.up = nn.Linear(width // REDUCTION, width)
    return model


class LowRankParts(Conv1D):
    """y = Wx + b + B A x at the queries and the values of GPT-2's fused projection"""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, self.nx)
        output = torch.addmm(self.bias, rows, self.weight)
        for part, down, up in ((0, self.query_A, self.query_B), (2, self.value_A, self.value_B)):
            output[:, part * self.nx : (part + 1) * self.nx].addmm_(torch.mm(rows, down), up)
        return output.view(*x.shape[:-1], -1)


class DecoderWithBottleneck(GPT2Block):
    """h + up(relu(down(h))) after GPT-2's block, as `seq_bn` computes"""

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, *_, use_cache=False, **_kwargs):
        attended, _ = self.attn(self.ln_1(hidden_states), past_key_values, attention_mask, use_cache=use_cache)
        total = hidden_states + attended
        total = total + self.mlp(self.ln_2(total))
        return total + self.up(relu(self.down(total)))


def generating_by_hand(base: nn.Module, method: str) -> nn.Module:
    """GPT-2 with the adapter in its own classes; a prefix is none of it but a cache, see ``prefix_cache``."""
    model = sharing(base)
    width = model.config.hidden_size
    for block in model.transformer.h if method != "prefix_tuning" else ():
        if method == "lora":
            block.attn.c_attn.__class__ = LowRankParts
            for part in ("query", "value"):
                setattr(block.attn.c_attn, f"{part}_A", nn.Parameter(torch.randn(width, RANK) / width))
                setattr(block.attn.c_attn, f"{part}_B", nn.Parameter(torch.zeros(RANK, width)))
        else:
            block.__class__ = DecoderWithBottleneck
            block.down, block.up = nn.Linear(width, width // REDUCTION), nn.Linear(width // REDUCTION, width)
    return model.eval()


def prefix_cache(model: nn.Module, rows: int, length: int) -> DynamicCache:
    """A cache whose first positions are a prefix for each row, which the model's own attention then reads."""
    config, cache = model.config, DynamicCache()
    shape = (rows, config.n_head, length, config.n_embd // config.n_head)
    for layer in range(config.n_layer):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache
