"""Compiles our CUDA kernels and upstream's, and counts their instructions for scripts/cuda_roofline.py.

Input: the sources; nvcc and nvdisasm. Output: for each kernel and architecture its registers, static shared memory, and
the phases of its main loop and of the rest (cuda_sass.py); and constants of the sources, by name.

Next to a kernel's name are the turns of the loops inside its main loop: rules of an operation, the fewest of them in
the loop, and the turns. The first rule that fits a loop counts; a loop without one runs once.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.engine.errors import EngineError, install
from kimi_gguf.scripts import cuda_sass
from kimi_gguf.scripts.cuda_check import OPERATORS, compile_cubin, find_nvcc, sources_text
from kimi_gguf.scripts.cuda_sass import Code, Loop, Phase
from kimi_gguf.scripts.gpu_devices import L2_LATENCY

Data = dict[str, Any]
Rule = tuple[str, int, float]  # operation, fewest in the loop, turns
LOOP, INNERMOST, WHOLE, DOTS = "loop", "innermost", "whole", "dots"


@dataclass(frozen=True)
class Kernel:
    """A kernel: its row's name, its source, a part of its mangled name, its main loop, and rules for loops inside."""

    name: str
    source: str  # below ggml_ops, or one of UPSTREAM
    mangled: str
    main: (
        str  # LOOP: the main one; INNERMOST: the innermost with tensor instructions; WHOLE: all of the kernel;
        # DOTS: the loop with most dot products of bytes; they are counted, because the compiler unrolls it
    )
    rules: tuple[Rule, ...] = ()


_KDA, _LATENT, _MATMUL = "kda/cuda/", "latent_attention/cuda/", "matmul/cuda/"
_CACHES = ("f32", "f16", "bf16", "q8_0", "q4_0")  # as in cache_type, in this order
_QUANTIZED = _CACHES[3:]
# Masks are read before, one load for the query of a block of 32 heads; more turns are for more queries.
_MASKS: tuple[Rule, ...] = (("LDG", 1, 0.0),)
# 64 channels by 64 tokens; 32 channels at a time: 4 turns. Matmuls of 16 channels: 2. Triangular solves: (1+2+3+4)/4.
_PREPARE: tuple[Rule, ...] = (
    ("BAR", 5, 4.0), ("HMMA", 20, 2.5), ("HMMA", 1, 2.0), ("LDG", 4, 2.0), ("FFMA", 40, 2.0), ("FFMA", 20, 3.0),
)  # fmt: skip
# Copies of 16 bytes, not of 4; unpacking in three turns. Wide blocks: scores of half of a tile's keys in a turn.
_QUANTS: tuple[Rule, ...] = (
    ("LDGSTS", 16, 0.0), ("LDGSTS", 1, 2.0), ("HMMA", 1, 2.0), ("STS", 3, 3.0), *_MASKS,
)  # fmt: skip
KERNELS = (
    Kernel("conv", _KDA + "kda-conv.cu", "conv_kernelILi128E", WHOLE,
           (("MUFU", 30, 4.0), ("MUFU", 5, 0.0), ("LDG", 6, 0.0))),  # 16 tokens, four at a time
    Kernel("prepare", _KDA + "kda-scan-prepare.cu", "prepare_kernelILi128ELi2E", WHOLE, _PREPARE),
    Kernel("prepare, one set of rows", _KDA + "kda-scan-prepare.cu", "prepare_kernelILi128ELi1E", WHOLE, _PREPARE),
    Kernel("states", _KDA + "kda-scan-states.cu", "states_kernelILi128ELi2ELi5ELi1E", LOOP),
    Kernel("states, two warps", _KDA + "kda-scan-states.cu", "states_kernelILi128ELi4ELi5ELi2E", LOOP),
    Kernel("states, two warps, short ring", _KDA + "kda-scan-states.cu", "states_kernelILi128ELi4ELi3ELi2E", LOOP),
    Kernel("states, short ring", _KDA + "kda-scan-states.cu", "states_kernelILi128ELi2ELi3ELi1E", LOOP),
    Kernel("states of whole heads", _KDA + "kda-scan-states.cu", "states_kernelILi128ELi8ELi5ELi1E", LOOP),
    Kernel("steps", _KDA + "kda-scan-steps.cu", "steps_kernelILi128ELi2E", WHOLE),
    Kernel("steps, four rows a thread", _KDA + "kda-scan-steps.cu", "steps_kernelILi128ELi4E", WHOLE),
    Kernel("finish", _KDA + "kda-scan-steps.cu", "finish_kernelILi128E", WHOLE),
    Kernel("copies", _KDA + "kda-state.cu", "copy_states_kernel", LOOP),
    Kernel("gather", _KDA + "kda-state.cu", "gather_states_kernel", LOOP),
    Kernel("attend f16", _LATENT + "latent-attend.cu", "4formILNS_10cache_typeE1ELi32ELb0E", INNERMOST,
           (("LDGSTS", 1, 3.0), *_MASKS)),  # 32 rows of 1152 bytes by 256 threads: 9 copies, three at a time
    Kernel("attend bf16", _LATENT + "latent-attend.cu", "4formILNS_10cache_typeE2ELi32ELb0E", INNERMOST,
           (("LDGSTS", 1, 3.0), *_MASKS)),
    Kernel("attend f32", _LATENT + "latent-attend.cu", "4formILNS_10cache_typeE0ELi32ELb0E", INNERMOST,
           (("STS", 6, 6.0), *_MASKS)),  # 32 rows of 2304 bytes by 256 threads: 18 loads, three at a time
    *(
        kernel
        for form, name in enumerate(_QUANTIZED, _CACHES.index(_QUANTIZED[0]))
        for kernel in (
            Kernel(f"attend {name}", _LATENT + "latent-attend.cu", f"4formILNS_10cache_typeE{form}ELi32ELb0E",
                   INNERMOST, _QUANTS),
            Kernel(f"attend {name}, wide, data centre", _LATENT + "latent-attend.cu",
                   f"4formILNS_10cache_typeE{form}ELi64ELb0E", LOOP, _QUANTS),
            Kernel(f"attend {name}, wide, GeForce", _LATENT + "latent-attend.cu",
                   f"4formILNS_10cache_typeE{form}ELi64ELb1E", LOOP, _QUANTS),
        )
    ),
    Kernel("join", _LATENT + "latent-attend.cu", "join_pieces", LOOP),
    Kernel("add run", _LATENT + "latent-runs.cu", "add_run", LOOP),
    Kernel("find ends", _LATENT + "latent-runs.cu", "find_ends", WHOLE),  # if all tiles see the last keys of a run
    *(
        Kernel(f"collect {name}", _LATENT + "latent-collect.cu", f"collect_tileILNS_10cache_typeE{form}E",
               WHOLE, _MASKS)
        for form, name in enumerate(_CACHES)
    ),
    Kernel("look", _LATENT + "latent-collect.cu", "look_at", WHOLE),
    Kernel("weigh", _LATENT + "latent-collect.cu", "weigh_headILi1E", WHOLE, (("LDG", 8, 16.0), ("LDG", 1, 0.0))),
    Kernel("weigh, exact", _LATENT + "latent-collect.cu", "weigh_headILi2E", WHOLE,
           (("LDG", 8, 16.0), ("LDG", 1, 0.0))),
    Kernel("expand keys", _LATENT + "latent-expand.cu", "expand_keysINS_5modes6halvesELb0E", LOOP),
    Kernel("expand values", _LATENT + "latent-expand.cu", "expand_keysINS_5modes6halvesELb1E", LOOP),
    Kernel("expand keys, exact", _LATENT + "latent-expand.cu", "expand_keysINS_5modes3f16ELb0E", LOOP),
    Kernel("expand values, exact", _LATENT + "latent-expand.cu", "expand_keysINS_5modes3f16ELb1E", LOOP),
    Kernel("expand keys, f32", _LATENT + "latent-expand.cu", "expand_keysINS_5modes3f32ELb0E", LOOP),
    Kernel("expand values, f32", _LATENT + "latent-expand.cu", "expand_keysINS_5modes3f32ELb1E", LOOP),
    Kernel("decompressed", _LATENT + "latent-decompressed.cu", "attend_tilesINS_5modes6halvesE", LOOP,
           (("LDGSTS", 1, 2.0), *_MASKS)),
    Kernel("decompressed, exact", _LATENT + "latent-decompressed.cu", "attend_tilesINS_5modes3f16E", LOOP,
           (("LDGSTS", 1, 2.0), *_MASKS)),
    Kernel("decompressed, f32", _LATENT + "latent-decompressed.cu", "attend_tilesINS_5modes3f32E", LOOP,
           (("LDGSTS", 1, 2.0), *_MASKS)),
    Kernel("multiply q4_0", _MATMUL + "matvec.cu", "8multiplyIL9ggml_type2ELb0ELb0E", DOTS),
    Kernel("multiply q8_0", _MATMUL + "matvec.cu", "8multiplyIL9ggml_type8ELb0ELb0E", DOTS),
    Kernel("upstream multiply q4_0", "mmvq", "13mul_mat_vec_qIL9ggml_type2ELi1ELb0ELb0ELb0E", DOTS),
    Kernel("upstream multiply q8_0", "mmvq", "13mul_mat_vec_qIL9ggml_type8ELi1ELb0ELb0ELb0E", DOTS),
    Kernel("upstream flash attention, 16 rows", "fattn", "Li576ELi512ELi1ELi16E", INNERMOST),
    Kernel("upstream flash attention, 32 rows", "fattn", "Li576ELi512ELi2ELi16E", INNERMOST),
    Kernel("upstream flash attention, 64 rows", "fattn", "Li576ELi512ELi4ELi16E", INNERMOST),
    Kernel("upstream join", "fixup", "flash_attn_stream_k_fixup_uniformILi512ELi1ELi16E", LOOP),
    Kernel("upstream gated delta net, kda", "gated_delta_net", "Li128ELb1ELb0E", LOOP),
    Kernel("upstream gated delta net", "gated_delta_net", "Li128ELb0ELb0E", LOOP),
)  # fmt: skip

# Upstream's sources: what is compiled.
UPSTREAM = {
    "fattn": '#include "ggml-cuda/fattn-mma-f16.cuh"\nextern const void * const used[] = {\n'
    + "".join(
        f"    reinterpret_cast<const void *>(flash_attn_ext_f16<576, 512, {n}, 16, false, true, false>),\n"
        for n in (1, 2, 4)
    )
    + "};\n",
    "fixup": '#include "ggml-cuda/fattn-common.cuh"\nextern const void * const used =\n'
    "    reinterpret_cast<const void *>(flash_attn_stream_k_fixup_uniform<512, 1, 16>);\n",
    "gated_delta_net": '#include "ggml-cuda/gated_delta_net.cu"\n',
    "mmvq": '#include "ggml-cuda/mmvq.cu"\n',
}

# Constants that decide grids and shared memory. They are read from the name of a kernel that has them as arguments.
CONSTANTS = {
    _KDA + "kda-scan.cu": {
        "chunk": "kda_cuda::CHUNK",
        "run bytes": "kda_cuda::RUN_BYTES",
        "chunk bytes": "kda_cuda::chunk_layout<128>::SIZE",
        "prepare blocks": "kda_cuda::PREPARE_BLOCKS",
        "most waves": "kda_cuda::MAX_WAVES",
        "worth a wave": "kda_cuda::WORTH_A_WAVE",
        "long runs from": "kda_cuda::LONG_RUNS_FROM",
        "roomy": "kda_cuda::ROOMY",
    },
    _KDA + "kda-scan-prepare.cu": {
        "prepare bytes": "sizeof(kda_cuda::prepare_memory<2>)",
        "prepare bytes, one set": "sizeof(kda_cuda::prepare_memory<1>)",
    },
    _KDA + "kda-scan-states.cu": {
        "stage": "kda_cuda::STAGE",
        "deep ring": "kda_cuda::DEEP_RING",
        "short ring": "kda_cuda::SHORT_RING",
        "exchange": "sizeof(kda_cuda::exchange<4>)",
    },
    _LATENT + "latent-attend.cu": {
        "least tiles": "latent_cuda::MIN_TILES",
        "tiles of a piece": "latent_cuda::PIECE_TILES",
        "most waves of attend": "latent_cuda::MAX_WAVES",
        "attend worth a wave": "latent_cuda::WORTH_A_WAVE",
        "bytes of a partial row": "latent_cuda::PARTIAL_BYTES",
        "most partial bytes": "latent_cuda::MAX_PARTIAL",
        "most pieces": "latent_cuda::MAX_PIECES",
        "join threads": "latent_cuda::JOIN_THREADS",
        "tile": "latent_cuda::TILE_KEYS",
        "narrow rows": "latent_cuda::NARROW",
        "wide rows": "latent_cuda::WIDE",
        "attend threads": "latent_cuda::THREADS",
        **{
            f"attend {name} shared": "latent_cuda::shared_bytes<latent_cuda::form<"
            f"latent_cuda::cache_type::{form}>>()"
            for name, form in (
                *((kind, f"{kind}, 32") for kind in _CACHES),
                *((f"{kind}, wide, data centre", f"{kind}, 64") for kind in _QUANTIZED),
                *((f"{kind}, wide, GeForce", f"{kind}, 64, true") for kind in _QUANTIZED),
            )
        },
    },
    _LATENT + "latent-expand.cu": {
        "expand shared": "latent_cuda::expand_bytes<latent_cuda::modes::halves>()",
        "expand exact shared": "latent_cuda::expand_bytes<latent_cuda::modes::f16>()",
        "expand f32 shared": "latent_cuda::expand_bytes<latent_cuda::modes::f32>()",
        "expand keys": "latent_cuda::EXPAND_KEYS",
    },
    _LATENT + "latent-decompressed.cu": {
        "decompressed shared": "latent_cuda::tile_room<latent_cuda::modes::halves>::BYTES",
        "decompressed exact shared": "latent_cuda::tile_room<latent_cuda::modes::f16>::BYTES",
        "decompressed f32 shared": "latent_cuda::tile_room<latent_cuda::modes::f32>::BYTES",
        "block queries": "latent_cuda::BLOCK_QUERIES",
        "scratch": "latent_cuda::SCRATCH",
    },
    _LATENT + "latent-ggml.cu": {
        f"{kind} {what}, {device}": f"limit_of(latent_cuda::cache_type::{kind}, {sums}).{what}"
        for kind in _CACHES
        for what in ("rows", "keys")
        for device, sums in (("data centre", "true"), ("GeForce", "false"))
    }
    | {"largest copy": "MAX_COPY", "direct rows": "MOST_DIRECT"},
    _LATENT + "latent-runs.cu": {
        "run keys, data centre": "latent_cuda::DATA_CENTRE_RUNS.keys",
        "run keys, GeForce": "latent_cuda::GEFORCE_RUNS.keys",
        "group rows": "latent_cuda::GEFORCE_RUNS.rows",
        "group unit": "latent_cuda::GROUP_UNIT",
        "unit of a run": "latent_cuda::KEYS_UNIT",
        "add threads": "latent_cuda::ADD_THREADS",
    },
    _MATMUL + "matvec.cu": {
        "multiply warps": "matvec_cuda::WARPS",
        "multiply rows": "matvec_cuda::ROWS",
        "multiply enough warps": "matvec_cuda::ENOUGH_WARPS",
        "multiply most steps": "matvec_cuda::MAX_STEPS",
        **{
            f"{kind} ints": f"matvec_cuda::format<GGML_TYPE_{kind.upper()}>::ints"
            for kind in ("q4_0", "q8_0")
        },
        **{f"{kind} qi": f"matvec_cuda::format<GGML_TYPE_{kind.upper()}>::qi" for kind in ("q4_0", "q8_0")},
    },
}
_PROBE = """\
#include "{source}"
template <long long... N> __global__ void kimi_probe() {{}}
template __global__ void kimi_probe<{values}>();
"""
_USE = re.compile(
    r"Compiling entry function '(\w+)'.*?Used (\d+) registers[^\n]*?(?:, (\d+) bytes smem)?[,\n]", re.DOTALL
)


def find_nvdisasm() -> Path:
    """nvdisasm next to nvcc, on PATH, or of its Python package. Raises `EngineError` if there is none."""
    places = [
        find_nvcc().parent / "nvdisasm",
        *Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvdisasm"),
    ]
    for place in places:
        if place.is_file():
            return place
    if found := shutil.which("nvdisasm"):
        return Path(found)
    raise EngineError(
        "no nvdisasm found",
        expected="nvdisasm next to nvcc, on PATH, or its Python package",
        todo=f"install NVIDIA's CUDA toolkit, or in the checkout: {install('-e', '.[cuda]')}",
    )


def compiler() -> str:
    """nvcc's release."""
    said = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release .*", said)
    return f"nvcc {release[0]}" if release else "nvcc"


def sources_digest() -> str:
    """Identifies what the counts are made from: our CUDA sources without comments and blank lines, and the rules."""
    return hashlib.sha256((sources_text() + repr(KERNELS) + repr(CONSTANTS)).encode()).hexdigest()[:16]


def count(architectures: tuple[int, ...], only: str = "") -> Data:
    """Counts of all kernels, or of those of one source. Raises `EngineError`."""
    kernels: Data = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in dict.fromkeys(each.source for each in KERNELS):
            if only and source != only:
                continue
            path = OPERATORS / source
            if source in UPSTREAM:
                path = Path(folder) / f"{source}.cu"
                path.write_text(UPSTREAM[source])
            for architecture in architectures:
                for name, found in _count(source, path, architecture, Path(folder)).items():
                    kernels.setdefault(name, {})[str(architecture)] = found
    return kernels


def _count(source: str, path: Path, architecture: int, folder: Path) -> Data:
    """The counts of the kernels of a compiled source."""
    cubin = folder / "out.cubin"
    said = compile_cubin(path, architecture, cubin, ("-Xptxas", "-v"))
    uses = {name: (int(registers), int(shared or 0)) for name, registers, shared in _USE.findall(said)}
    command = [str(find_nvdisasm()), "-c", "-hex", str(cubin)]
    codes = dict(
        cuda_sass.kernels(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    )
    return {each.name: measured(each, codes, uses, architecture) for each in KERNELS if each.source == source}


def measured(
    kernel: Kernel, codes: Mapping[str, Code], uses: Mapping[str, tuple[int, int]], architecture: int
) -> Data:
    """The counts of one kernel. Raises `EngineError` if it is not in the code."""
    names = [name for name in codes if kernel.mangled in name]
    if len(names) != 1:
        raise EngineError(
            f"{kernel.source}: {kernel.name}: expected one kernel whose name has {kernel.mangled}, found {len(names)}",
            todo="correct KERNELS in scripts/cuda_counts.py",
        )
    code, (registers, shared) = codes[names[0]], uses[names[0]]
    whole = Loop(0, len(code.instructions) - 1, code.loops())
    if kernel.main == DOTS:
        main = cuda_sass.dot_products_loop(code)
    else:
        main = whole if kernel.main == WHOLE else cuda_sass.main_loop(code, kernel.main == INNERMOST)
    if main is None:
        raise EngineError(
            f"{kernel.source}: {kernel.name}: no loop", todo="correct KERNELS in scripts/cuda_counts.py"
        )
    latency = {"LDG": float(L2_LATENCY[architecture])}
    times = dict(_turns(code, whole.inner if main is whole else main.inner, kernel.rules))
    phases = cuda_sass.phases(code, main, times, latency=latency)
    rest = (
        []
        if main is whole
        else cuda_sass.phases(code, whole, dict.fromkeys(_begins(whole.inner), 1.0), main, latency)
    )
    dots = {"dots": code.count(main, "IDP")} if kernel.main == DOTS else {}
    if dots == {"dots": 0}:
        raise EngineError(
            f"{kernel.source}: {kernel.name}: no dot products",
            todo="correct KERNELS in scripts/cuda_counts.py",
        )
    return {"registers": registers, "shared": shared, **dots, "main": _stored(phases), "rest": _stored(rest)}


def _begins(loops: tuple[Loop, ...]) -> Iterator[int]:
    for loop in loops:
        yield loop.begin
        yield from _begins(loop.inner)


def _turns(code: Code, loops: tuple[Loop, ...], rules: tuple[Rule, ...]) -> Iterator[tuple[int, float]]:
    for loop in loops:
        for op, least, turns in rules:
            if code.count(loop, op) >= least:
                yield loop.begin, turns
                break
        yield from _turns(code, loop.inner, rules)


def _stored(phases: list[Phase]) -> list[Data]:
    """Rounded, without zeros."""
    found = []
    for each in phases:
        if each.issued:
            values = {name: value for name, value in asdict(each).items() if name != "mma" and value}
            found.append({name: round(value) for name, value in values.items()} | {
                "mma": {name: round(value) for name, value in each.mma.items()}})  # fmt: skip
    return found


def constants() -> dict[str, int]:
    """The values of CONSTANTS. Raises `EngineError`."""
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        probe, cubin = Path(folder) / "probe.cu", Path(folder) / "out.cubin"
        for source, named in CONSTANTS.items():
            values = ", ".join(f"(long long) ({each})" for each in named.values())
            probe.write_text(_PROBE.format(source=OPERATORS / source, values=values))
            said = compile_cubin(probe, 80, cubin, ("-Xptxas", "-v"))
            mangled = re.search(r"kimi_probeIJ((?:Lx\d+E)+)E", said)
            if mangled is None:
                raise EngineError(
                    f"{source}: its constants are not in the compiler's output", found=said[-300:]
                )
            found |= dict(zip(named, map(int, re.findall(r"Lx(\d+)E", mangled[1])), strict=True))
    return found
