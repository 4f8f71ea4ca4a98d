"""Kimi K3 at its real size: the memory of a plan of 497,052 tensors and of a layer with packed experts; full width.

The checkpoints are sparse files of zeros, except for one expert; outputs are hashed, and their zeros are not stored.
"""

from __future__ import annotations

import cProfile
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_tools import assert_upstreams_tensors, convert, split_safetensors, upstream_convert
from random_k3 import PREFIX, K3Spec, write_checkpoint

from kimi_gguf.convert.model.kimi_k3 import RULES
from kimi_gguf.convert.model.layouts import places
from kimi_gguf.tools import measure_k3
from kimi_gguf.tools.synthetic_checkpoint import K3_SHARDS, k3_config, num_bytes, tensors, write_synthetic
from kimi_gguf.tools.upstream_converter import Job

MEMORY = 3 << 29  # 1.5 GiB
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")

PEAK = """
def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) << 10
"""
HASHES = f"""
import hashlib, json, re, sys
from pathlib import Path
from kimi_gguf.convert.conversion import plan_only
from kimi_gguf.convert.output.stream import Pace, encoded, prepared
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.mixes import TypeRequest
{PEAK}
default = sys.argv[2] == "default"
plan = plan_only(sys.argv[1], TypeRequest(TYPES["BF16" if default else sys.argv[2]], default=default))
hashes = {{tensor.name: hashlib.sha256() for tensor in plan.tensors}}
with open_checkpoint(sys.argv[1]) as checkpoint:
    pace = Pace.within({MEMORY}, elsewhere=checkpoint.own_bytes)
    for tensor, data in encoded(checkpoint, plan, plan.tensors, pace, prepared(checkpoint, plan)):
        hashes[tensor.name].update(data)
print(json.dumps(dict(peak=peak(), hashes={{name: h.hexdigest() for name, h in hashes.items()}})))
"""


def measured(script: str, *arguments: object) -> Any:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_published_tensors_and_bytes() -> None:
    """The published checkpoint has 497,220 tensors, of which 168 are of the vision model."""
    every = list(tensors(k3_config()))
    assert len({name for name, _, _ in every}) == 497_220 - 168
    experts = sum(num_bytes(info) for info in every if "_packed" in info[0] or "_scale" in info[0])
    assert experts == 92 * 896 * 3 * 3072 * 3584 // 32 * 17


def test_a_tensor_s_places_are_found_in_few_calls() -> None:
    """A plan needs the places of half a million tensors. Templates of `re` are parsed each time, in 400 calls."""
    name, profile = "model.layers.3.block_sparse_moe.experts.895.w2.weight", cProfile.Profile()
    places(RULES, name, (64, 32), 896)  # compiles the rules
    found = profile.runcall(places, RULES, name, (64, 32), 896)
    prefixed = f"language_model.{name}"
    assert [(place.stored, place.scales) for place in found] == [
        (name, None),
        (prefixed, None),
        (f"{prefixed}_packed", f"{prefixed}_scale"),
        (f"{name}_packed", f"{name}_scale"),
    ]
    assert sum(entry.callcount for entry in profile.getstats()) < 100


@pytest.mark.parametrize(
    "layers, shards, most",
    [("KKKMM", 8, 400 << 20), pytest.param("KKKM" * 23 + "M", K3_SHARDS, 1 << 30, marks=pytest.mark.full)],
    ids=["5 layers", "all"],
)
def test_memory_of_a_plan(tmp_path: Path, layers: str, shards: int, most: int) -> None:
    """The names of half a million tensors take most of it; docs/bench-conversion-k3.md has the figures."""
    found = measure_k3.plan(tmp_path, k3_config(layers), shards)
    assert found["peak"] < most
    if len(layers) == 93:
        assert found["tensors"] == 2573 and found["bytes"] == 1_561_155_826_400


@pytest.mark.engine
@pytest.mark.parametrize(
    "experts, kind",
    [
        (24, "default"),
        pytest.param(24, "BF16", marks=pytest.mark.full),
        pytest.param(24, "Q4_0", marks=pytest.mark.full),
        pytest.param(896, "default", marks=pytest.mark.full),
        pytest.param(200, "BF16", marks=pytest.mark.full),
    ],
)
def test_memory_of_a_layer(tmp_path: Path, experts: int, kind: str) -> None:
    """Real widths. The only expert that is not zero is at its place with its bits."""
    source = write_synthetic(tmp_path / "model", k3_config("KM", experts, 4096), 3)
    rng, rows, groups = np.random.default_rng(8), 3584, 96
    codes = rng.integers(0, 16, (rows, groups, 32), np.uint8)
    scales = rng.integers(100, 130, (rows, groups), np.uint8)
    name = f"{PREFIX}model.layers.1.block_sparse_moe.experts.{experts - 2}.w2.weight"
    measure_k3.poke(source, f"{name}_packed", (codes[..., ::2] | codes[..., 1::2] << 4).tobytes())
    measure_k3.poke(source, f"{name}_scale", scales.tobytes())
    found = measured(HASHES, source, kind)
    assert found["peak"] < 1 << 30
    if kind == "default":
        block = np.concatenate([scales[..., None], codes[..., :16] | codes[..., 16:] << 4], -1).tobytes()
        expected, zeros = hashlib.sha256(), bytes(len(block))
        for e in range(experts):
            expected.update(block if e == experts - 2 else zeros)
        assert found["hashes"]["blk.1.ffn_down_exps.weight"] == expected.hexdigest()


@pytest.mark.parametrize("experts", [24, pytest.param(896, marks=pytest.mark.full)])
def test_a_killed_conversion_of_a_layer_is_completed(tmp_path: Path, experts: int) -> None:
    """Real widths; 896 experts are 15.7 GB. `layer` raises an error if the hashes of the files differ."""
    runs = measure_k3.layer(tmp_path, experts)["runs"]
    assert runs["killed"]["tensors"] > 1  # these are not converted again
    assert min(run["peak"] for run in runs.values()) > 0
    assert max(run["peak"] for run in runs.values()) < MEMORY


@pytest.mark.full
def test_full_width_equals_upstreams(tmp_path: Path) -> None:
    """Hidden size 7168, 96 heads, 16 experts of 3072 in a space of 3584; 8 GB on disk."""
    spec = K3Spec(
        layers="KM", hidden=7168, heads=96, kda_head_dim=128, stored_heads=128, q_lora=1536, kv_lora=512, nope=128,
        rope=64, v_dim=128, dense_layers=0, experts=16, moe_intermediate=3072, latent=3584, std=0.02,
    )  # fmt: skip
    source = write_checkpoint(tmp_path / "model", spec, shards=2)
    header, _ = split_safetensors(source / "model-00001-of-000002.safetensors")
    assert header[f"{PREFIX}model.layers.0.self_attn.A_log"]["shape"] == [128]
    upstream_convert([Job(source, tmp_path / "theirs.gguf", "BF16")])
    assert convert(source, "-o", tmp_path / "ours.gguf").status == 0
    assert_upstreams_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
