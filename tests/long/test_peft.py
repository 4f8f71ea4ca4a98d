"""The demo, fine-tuned with PEFT: with the converted adapter, or merged, the engine's logits are those of PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from llama_script import Setup, adapters, batches, play
from peft import LoraConfig, get_peft_model
from synthetic_case import error_of
from transformers import AutoModelForCausalLM

from kimi_gguf.convert.adapter.gguf import convert_adapter
from kimi_gguf.convert.conversion import Options, convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine

IDS = np.arange(20, 84)
F32 = TYPES["F32"]


@pytest.mark.engine
@pytest.mark.usefixtures("one_core")
def test_the_answers_of_a_fine_tuned_demo_are_those_of_peft(
    demo_dir: Path, tmp_path: Path, engine: Engine
) -> None:
    """Experts are parameters in transformers, and here have as many rows as columns; PEFT copies the embedding."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"o_proj": 2},
        target_modules=["q_proj", "kv_b_proj", "o_proj", "down_proj", "f_a_proj", "lm_head", "embed_tokens"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = get_peft_model(base, config)
    ids = torch.from_numpy(IDS)[None]
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits[0].numpy()
    convert(demo_dir, tmp_path / "base.gguf", F32)
    convert(demo_dir, tmp_path / "merged.gguf", F32, Options(adapters=((adapter, 1.0),)))
    convert_adapter(adapter, demo_dir, tmp_path / "adapter.gguf")
    setup, steps = Setup(flash_attention=True), batches(IDS, (len(IDS),))
    use = adapters({tmp_path / "adapter.gguf": 1.0})
    before = play(engine, tmp_path / "base.gguf", setup, steps).logits
    assert (before.argmax(-1) != expected.argmax(-1)).mean() > 0.5
    assert (
        error_of(play(engine, tmp_path / "base.gguf", setup, [use, *steps]).logits, expected).in_all < 1e-10
    )
    assert error_of(play(engine, tmp_path / "merged.gguf", setup, steps).logits, expected).in_all < 1e-10
