"""Tensor data equals that of llama.cpp's own converter, byte for byte except `ssm_a`, on the same checkpoint.

Its tokenizer step is skipped, because it would run the checkpoint's Python. All differences are listed here and
explained in docs/conversion.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from convert_tools import assert_upstreams_tensors, convert, fresh_checkpoint, gguf_keys, upstream_convert
from random_checkpoint import Spec

from kimi_gguf.tools.upstream_converter import FILE_TYPES, Job

SPECS = [
    Spec(layers="KMKM", heads=4, experts=8, dense_layers=2, std=0.02),
    # Rows that are not whole blocks of 32; query compression, two shared experts, no dense layer.
    Spec("MK", heads=3, q_lora=24, shared_experts=2, dense_layers=0, nope=20, moe_intermediate=48, seed=1),
    Spec(layers="KM", dtype=torch.float16, std=1.0, seed=2),
    Spec(layers="KM", dtype=torch.float32, seed=3),
]
# Keys that only one of the two files has, or that differ intentionally.
OTHER_KEYS = {
    "general.name",  # upstream makes a title from the folder's name
    "general.size_label",  # all and active parameters, not one expert's size
    "kimi-linear.attention.value_length",  # the size of the latent, not hidden_size / heads
    "kimi-linear.expert_group_used_count",  # omitted if there are no groups
    "kimi-linear.expert_weights_norm",  # written, although llama.cpp assumes this value
    "kimi_gguf.source.config_sha256",
    "kimi_gguf.source.headers_sha256",
}


PAIRS = [(SPECS[0], kind) for kind in FILE_TYPES]
PAIRS += [(SPECS[1], "Q8_0"), (SPECS[2], "Q8_0"), (SPECS[3], "Q8_0"), (SPECS[3], "BF16")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By number, a folder with each of PAIRS: the checkpoint, and upstream's GGUF of it."""
    folder, jobs = tmp_path_factory.mktemp("upstream"), []
    for number, (spec, kind) in enumerate(PAIRS):
        source = fresh_checkpoint(folder / f"{number}" / "model", spec)
        jobs.append(Job(source, folder / f"{number}.gguf", kind))
    upstream_convert(jobs)
    return folder


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=[f"{spec.id}-{kind}" for spec, kind in PAIRS])
def test_tensors_equal_upstreams(tmp_path: Path, pairs: Path, number: int) -> None:
    kind = PAIRS[number][1]
    theirs_path, ours_path = pairs / f"{number}.gguf", tmp_path / "ours.gguf"
    assert convert(pairs / f"{number}" / "model", "-o", ours_path, "--type", kind).status == 0
    assert_upstreams_tensors(ours_path, theirs_path)
    our_keys, their_keys = gguf_keys(ours_path), gguf_keys(theirs_path)
    for keys in (our_keys, their_keys):
        for name in [name for name in keys if name.startswith("tokenizer.") or name in OTHER_KEYS]:
            del keys[name]
    assert our_keys == their_keys
