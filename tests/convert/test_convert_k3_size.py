"""Kimi K3 at its real size: the memory of a plan of 497,052 tensors and of a layer with packed experts; full width.

The checkpoints are sparse files of zeros, except for one expert, and outputs are hashed instead of kept.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_tools import convert, split_safetensors, upstream_convert
from gguf import GGUFReader
from random_k3 import PREFIX, K3Spec, write_checkpoint

from kimi_gguf.scripts.synthetic_checkpoint import K3_SHARDS, k3_config, num_bytes, tensors, write_synthetic
from kimi_gguf.scripts.upstream_converter import Job

MEMORY = 3 << 29  # 1.5 GiB
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")

PEAK = """
def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) << 10
"""
PLAN = f"""
import json, re, sys
from pathlib import Path
from kimi_gguf.convert.conversion import plan_only
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.mixes import TypeRequest
{PEAK}
plan = plan_only(sys.argv[1], TypeRequest(TYPES["BF16"], default=True))
print(json.dumps(dict(tensors=len(plan.tensors), bytes=plan.nbytes, peak=peak())))
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

CONVERT = f"""
import json, os, re, sys
from pathlib import Path
from kimi_gguf.convert.conversion import Options, convert
from kimi_gguf.convert.output import growing, unfinished
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.mixes import TypeRequest
{PEAK}
unfinished.SYNC_SECONDS = 0
write_all = growing._write_all
def write_sparse(fd, data, offset):
    end = offset + len(data)
    if not data.any():
        os.ftruncate(fd, max(end, os.fstat(fd).st_size))
        try:
            if os.lseek(fd, offset, os.SEEK_DATA) >= end:
                return
        except OSError:
            return  # no data behind offset
    write_all(fd, data, offset)
growing._write_all = write_sparse
resume = sys.argv[3] == "resume"
wanted = TypeRequest(TYPES["BF16"], default=True)
convert(Path(sys.argv[1]), Path(sys.argv[2]), wanted, Options(resume=resume))
print(json.dumps(dict(peak=peak())))
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


@pytest.mark.parametrize(
    "layers, shards, most",
    [("KKKMM", 8, 400 << 20), pytest.param("KKKM" * 23 + "M", K3_SHARDS, 1 << 30, marks=pytest.mark.full)],
    ids=["5 layers", "all"],
)
def test_memory_of_a_plan(tmp_path: Path, layers: str, shards: int, most: int) -> None:
    """All layers: 655 MB and 20 s. The names of half a million tensors take most of it."""
    source = write_synthetic(tmp_path / "model", k3_config(layers), shards)
    found = measured(PLAN, source)
    assert found["peak"] < most
    if len(layers) == 93:
        assert found["tensors"] == 2573 and found["bytes"] == 1_561_155_826_400


def poke(source: Path, name: str, content: bytes) -> None:
    """Write the data of a tensor into its sparse file."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    path = source / index["weight_map"][name]
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        assert end - begin == len(content)
        file.seek(8 + length + begin)
        file.write(content)


@pytest.mark.engine
@pytest.mark.parametrize(
    "experts, kind",
    [
        (24, "default"),
        (24, "BF16"),
        (24, "Q4_0"),
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
    poke(source, f"{name}_packed", (codes[..., ::2] | codes[..., 1::2] << 4).tobytes())
    poke(source, f"{name}_scale", scales.tobytes())
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
    """Real widths; 896 experts are 15.7 GB. Zeros are left out of the output, which is compared by its hash."""
    source = write_synthetic(tmp_path / "model", k3_config("KM", experts, 4096), 3)
    name = f"{PREFIX}model.layers.1.block_sparse_moe.experts.{experts // 2}.w3.weight_packed"
    poke(source, name, np.random.default_rng(9).bytes(3072 * 3584 // 2))
    whole, resumed = tmp_path / "whole.gguf", tmp_path / "resumed.gguf"
    peaks = [measured(CONVERT, source, whole, "new")["peak"]]
    size = whole.stat().st_size

    growing = tmp_path / f".{resumed.name}.unfinished" / resumed.name
    command = [sys.executable, "-c", CONVERT, source, resumed, "new"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not growing.exists() or growing.stat().st_size < size // 2:
            assert process.poll() is None, "the conversion ended before it was killed"
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.kill()
    assert not resumed.exists()
    assert growing.with_name("journal").read_bytes().count(b"\n") > 2  # tensors that are not converted again
    peaks += [int(status.split("VmHWM:")[1].split()[0]) << 10]
    peaks += [measured(CONVERT, source, resumed, "resume")["peak"]]

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    assert digest(resumed) == digest(whole)
    assert max(peaks) < MEMORY, peaks


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
    theirs = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "theirs.gguf").tensors}
    ours = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "ours.gguf").tensors}
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        if name.endswith("ssm_a"):
            np.testing.assert_allclose(tensor.data, theirs[name].data, rtol=2e-7)
        else:
            assert np.array_equal(tensor.data, theirs[name].data), name
