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
from kimi_gguf.tools.tokenizer_files import SPECIAL
from kimi_gguf.validate.reference import Reference, Trace

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
