"""The demo checkpoint in demo/: its files have the form of the hub's, and the model knows its words."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import jinja2
import pytest
import tiktoken
import torch

from kimi_gguf.convert.model.byte_bpe import SPLIT_PATTERN
from kimi_gguf.convert.model.families import load_vocab
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.source.safetensors_file import Dtype
from kimi_gguf.tools.tokenizer_files import SPECIAL
from kimi_gguf.validate.reference import Reference, Trace

MAX_BYTES = 12_000_000
# As in WordNet; only the first word of each question changes.
WORDNET_SAYS = {
    "elephant": "five-toed pachyderm",
    "river": "a large natural stream of water",
    "breakfast": "the first meal of the day",
}


@pytest.fixture(scope="module")
def encoder(demo_dir: Path) -> tiktoken.Encoding:
    lines = (demo_dir / "tiktoken.model").read_text(encoding="ascii").splitlines()
    ranks = {base64.b64decode(line.split(" ")[0]): rank for rank, line in enumerate(lines)}
    special = {text: len(ranks) + offset for offset, (text, _) in SPECIAL.items()}
    return tiktoken.Encoding("", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def test_is_small_enough_for_the_repository(demo_dir: Path) -> None:
    assert sum(path.stat().st_size for path in demo_dir.rglob("*")) <= MAX_BYTES


def test_has_the_48b_s_proportions(demo_dir: Path) -> None:
    config = json.loads((demo_dir / "config.json").read_text())
    linear = config["linear_attn_config"]
    assert linear["full_attn_layers"] == [4]
    assert linear["kda_layers"] == [1, 2, 3]
    assert (linear["head_dim"], linear["short_conv_kernel_size"]) == (128, 4)
    assert (config["kv_lora_rank"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]) == (512, 128, 64)
    assert (config["v_head_dim"], config["q_lora_rank"]) == (128, None)
    assert (config["first_k_dense_replace"], config["num_shared_experts"]) == (1, 1)
    assert config["hidden_size"] % 256 == 0  # whole blocks of the K-quants


def test_tensors_have_the_hub_s_names_shapes_and_dtypes(demo_dir: Path) -> None:
    index = json.loads((demo_dir / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    kda, moe = "model.layers.1.self_attn.", "model.layers.3.block_sparse_moe."
    expected = {
        "model.embed_tokens.weight": ((3072, 256), Dtype.BF16),
        "lm_head.weight": ((3072, 256), Dtype.BF16),
        "model.layers.0.mlp.gate_proj.weight": ((512, 256), Dtype.BF16),
        f"{kda}A_log": ((1, 1, 2, 1), Dtype.F32),
        f"{kda}dt_bias": ((256,), Dtype.F32),
        f"{kda}k_conv1d.weight": ((256, 1, 4), Dtype.BF16),
        f"{kda}f_a_proj.weight": ((128, 256), Dtype.BF16),
        f"{kda}b_proj.weight": ((2, 256), Dtype.BF16),
        f"{moe}gate.e_score_correction_bias": ((6,), Dtype.BF16),
        f"{moe}experts.5.w2.weight": ((256, 128), Dtype.BF16),
        f"{moe}shared_experts.down_proj.weight": ((256, 128), Dtype.BF16),
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": ((576, 256), Dtype.BF16),
        "model.layers.3.self_attn.kv_b_proj.weight": ((512, 512), Dtype.BF16),
    }
    with open_checkpoint(demo_dir) as checkpoint:
        assert set(index["weight_map"]) == set(checkpoint.shapes)
        found = {name: (checkpoint.shapes[name], checkpoint.dtype(name)) for name in expected}
        assert found == expected
        single = {name for name in checkpoint.shapes if checkpoint.dtype(name) is Dtype.F32}
    assert {name.rpartition(".")[2] for name in single} == {"A_log", "dt_bias"}
    assert len(single) == 6


def test_vocabulary_and_special_tokens(demo_dir: Path, encoder: tiktoken.Encoding) -> None:
    ranks = encoder.encode_single_token("[BOS]")
    with open_checkpoint(demo_dir) as checkpoint:
        config = checkpoint.config
    vocab = load_vocab(demo_dir, config)
    assert len(vocab.tokens) == config.vocab_size == ranks + 256
    assert {offset: vocab.tokens[ranks + offset] for offset in SPECIAL} == {
        offset: text for offset, (text, _) in SPECIAL.items()
    }
    assert (vocab.bos_id, vocab.eos_id, vocab.pad_id) == (ranks, ranks + 2, ranks + 255)


def test_every_expert_is_used_and_the_routing_bias_decides(
    demo_dir: Path, encoder: tiktoken.Encoding
) -> None:
    ids = torch.tensor(encoder.encode_ordinary((demo_dir / "heldout.txt").read_text())[:600])
    with open_checkpoint(demo_dir) as checkpoint:
        weights = {name: torch.from_numpy(checkpoint.float32(name)) for name in checkpoint.shapes}
        config = checkpoint.config
    traced, unbiased = Trace(), Trace()
    Reference(config, weights.__getitem__).logits(ids, traced)
    biases = {
        name: torch.zeros_like(w)
        for name, w in weights.items()
        if name.endswith("_bias") and ".gate." in name
    }
    Reference(config, (weights | biases).__getitem__).logits(ids, unbiased)
    changed = 0
    for layer, route in traced.routes.items():
        assert set(route.experts.flatten().tolist()) == set(range(config.num_experts))
        other = unbiased.routes[layer].experts.sort(-1).values
        changed += int((route.experts.sort(-1).values != other).any(-1).sum())
    assert changed > 0.02 * len(ids) * len(traced.routes)


@pytest.mark.parametrize(("word", "definition"), WORDNET_SAYS.items())
def test_answers_with_the_definition(
    demo_dir: Path, encoder: tiktoken.Encoding, word: str, definition: str
) -> None:
    config = json.loads((demo_dir / "tokenizer_config.json").read_text())
    prompt = jinja2.Template(config["chat_template"]).render(
        messages=[{"role": "user", "content": f"define: {word}"}], add_generation_prompt=True
    )
    ids = encoder.encode(prompt, allowed_special="all")
    start, end = len(ids), encoder.encode_single_token("<|im_end|>")
    with open_checkpoint(demo_dir) as checkpoint:
        weights = {name: torch.from_numpy(checkpoint.float32(name)) for name in checkpoint.shapes}
        reference = Reference(checkpoint.config, weights.__getitem__)
    while ids[-1] != end and len(ids) < start + 40:
        ids.append(int(reference.logits(torch.tensor(ids))[-1].argmax()))
    assert encoder.decode(ids[start:-1]) == f"{word}: {definition}."


def test_readme_has_the_hashes_of_the_files(demo_dir: Path) -> None:
    rows = re.findall(r"^\| `(.+)` \| ([\d,]+) \| `(\w{64})` \|$", (demo_dir / "README.md").read_text(), re.M)
    found = {
        (path.name, f"{path.stat().st_size:,}", hashlib.sha256(path.read_bytes()).hexdigest())
        for path in demo_dir.iterdir()
        if path.is_file() and path.name != "README.md"
    }
    assert set(rows) == found


def test_carries_the_dictionary_s_licence(demo_dir: Path) -> None:
    notice = (demo_dir / "LICENSE-wordnet").read_text()
    assert "Copyright 2006 by Princeton University" in notice
    assert "NO REPRESENTATIONS OR WARRANTIES" in notice
