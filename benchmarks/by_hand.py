"""LoRA and a bottleneck adapter written into BERT's own classes: what their formulas cost where no library is."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu
from transformers.models.bert.modeling_bert import BertOutput

from .models import sharing

RANK, REDUCTION = 8, 16


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
