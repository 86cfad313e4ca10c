"""``python docs/scaling.py``: the memory of training with adapters, by formula; fills the table of docs/scaling.md."""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_suffix(".md")
MARKER = re.compile(r"(<!-- table -->\n).*", re.DOTALL)
GIGABYTE = 1e9


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind: width d, layers, width of the feed-forward block, width of keys and values, words."""

    name: str
    width: int
    layers: int
    inner: int
    keys: int
    words: int

    def parameters(self) -> int:
        """Of the whole model, with a map onto words of its own."""
        attention = 2 * self.width * (self.width + self.keys)
        block = attention + 3 * self.width * self.inner + 2 * self.width
        return self.layers * block + 2 * self.words * self.width + self.width


SHAPES = [
    Shape("1B (Llama 3.2)", 2048, 16, 8192, 512, 128256),
    Shape("8B (Llama 3.1)", 4096, 32, 14336, 1024, 128256),
    Shape("32B (Qwen 2.5)", 5120, 64, 27648, 1024, 152064),
    Shape("70B (Llama 3.1)", 8192, 80, 28672, 1024, 128256),
]


def lora(shape: Shape, r: int) -> int:
    """Rank r at query and value: r (in + out) each."""
    return shape.layers * r * (2 * shape.width + shape.width + shape.keys)


def bottleneck(shape: Shape, factor: int) -> int:
    """`seq_bn`: two maps between d and d / factor, with biases."""
    inner = shape.width // factor
    return shape.layers * (2 * shape.width * inner + inner + shape.width)


def prefix(shape: Shape, length: int) -> int:
    """`prefix_tuning_flat`: keys and values of each layer."""
    return shape.layers * 2 * length * shape.keys


def loreft(shape: Shape, r: int) -> int:
    """`loreft`, tied or with one side: R, W and b."""
    return shape.layers * r * (2 * shape.width + 1)


METHODS = {
    "LoRA, r = 16": lambda shape: lora(shape, 16),
    "`seq_bn`": lambda shape: bottleneck(shape, 16),
    "prefix, 30 tokens": lambda shape: prefix(shape, 30),
    "LoReFT, r = 4": lambda shape: loreft(shape, 4),
}
STATES = 16
"""Bytes for each trained parameter in float32: itself, its gradient and AdamW's two moments."""
FULL = 16
"""The same for full fine-tuning in mixed precision: 2 + 2 in bf16, and 4 + 4 + 4 of the optimizer."""
BITS = {"bf16": 2.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes for each frozen parameter; nf4 has a scale of 8 bits for 64 weights, and one of 32 for 256 scales."""


def frozen_bytes(shape: Shape, base: str) -> float:
    """The frozen base; embeddings and the map onto words stay in bf16 whatever the rest is in."""
    apart = 2 * shape.words * shape.width
    return (shape.parameters() - apart) * BITS[base] + apart * BITS["bf16"]


def checkpointed_bytes(shape: Shape, tokens: int) -> int:
    """Activations with checkpointing, in bf16: the input of each block, and one block's own while it runs again."""
    one_block = tokens * (8 * shape.width + 2 * shape.keys + 4 * shape.inner)
    logits = 2 * tokens * shape.words
    return 2 * (shape.layers * tokens * shape.width + one_block) + 4 * logits


def per_device(shape: Shape, base: str, trained: int, devices: int, tokens: int) -> float:
    """Bytes on each of the devices over which FSDP2 shares everything out, but for one block and the activations."""
    shared = (frozen_bytes(shape, base) + STATES * trained) / devices
    gathered = 0.0 if devices == 1 else 2 * BITS["bf16"] * (shape.parameters() / shape.layers)
    return shared + gathered + checkpointed_bytes(shape, tokens)


def table(tokens: int) -> str:
    """Rows are sizes; the columns what is trained, and what one device needs."""
    rows = [
        [
            "model",
            "trained: " + "; ".join(METHODS),
            "full, 1 device",
            "LoRA on bf16, 1",
            "on nf4, 1",
            "bf16, 8",
            "bf16, 32",
        ]
    ]
    for shape in SHAPES:
        sizes = "; ".join(f"{count(shape) / 1e6:.1f} M" for count in METHODS.values())
        full = FULL * shape.parameters() + checkpointed_bytes(shape, tokens)
        wanted = [("bf16", 1), ("nf4", 1), ("bf16", 8), ("bf16", 32)]
        needs = [per_device(shape, base, lora(shape, 16), devices, tokens) for base, devices in wanted]
        rows.append([shape.name, sizes, *(f"{math.ceil(each / GIGABYTE)} GB" for each in (full, *needs))])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""])


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(prog="python docs/scaling.py", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch on one device")
    arguments = parser.parse_args()
    PAGE.write_text(
        MARKER.sub(lambda match: match[1] + "\n" + table(arguments.tokens), PAGE.read_text("utf-8")), "utf-8"
    )


if __name__ == "__main__":
    main()
