"""The arguments of `kimi-llama bench`.

Input: an argument parser. Output: the parser with the arguments of the sub-command.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import gguf

from kimi_gguf.bench import hybrid
from kimi_gguf.bench.cells import SIZES, THREADS, UBATCH
from kimi_gguf.bench.device_operators import TIMED
from kimi_gguf.bench.families import COMPARABLE, FAMILIES
from kimi_gguf.bench.shapes import SHAPES, TYPES
from kimi_gguf.convert.types.file_types import TYPES as FILE_TYPES
from kimi_gguf.engine.toolchain import CORES, MAX_THREADS


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


_QUICK, _GRID, _GPU_QUICK, _GPU_GRID = (
    {"batches": _listed(batches), "depths": _listed(depths)} for batches, depths in SIZES.values()
)

_FAMILIES = "".join(
    f"  {name:<16}{model.architecture:<13}{model.layers:>3} layers, {model.experts:>3} experts: {model.description}\n"
    for name, model in FAMILIES.items()
    if model.comparable
)

EXAMPLES = f"""\
  kimi-llama bench                                  a quick subset on a generated model of 1.6 GB: a few minutes,
                                                    and the first time some more: upstream is compiled, too
  kimi-llama bench --grid --json out/bench.json     types x batches x depths x threads: hours
  kimi-llama bench model.gguf --batch 1,512 --depth 0,16384
  kimi-llama bench --type Q8_0 --batch 1 --depth 16384 --cache-type f16,q8_0
  kimi-llama bench --batch 1 --sequences 1,4,8      decode for several users in one batch
  kimi-llama bench --demo                           the demo checkpoint; needs a source checkout
  kimi-llama bench --layers 27 --experts 256 --type Q2_K --batch 1,512    the whole 48B's shape
  kimi-llama bench --family ling-3.0-tiny --type Q4_0,Q4_K_M --depth 0,16384    the whole model, 4.5 and 4.8 GB
  kimi-llama bench --family deepseek2 --layers 4    latent attention and experts without KDA
  kimi-llama bench --operators --json out/operators.json
  kimi-llama bench --matmuls --threads 1 --json out/matmuls.json
  kimi-llama bench --hybrid --json out/hybrid.json
  kimi-llama bench --records out/*.json --page out/bench.md
  kimi-llama bench --draw docs/bench.toml           write docs/bench.md and its pictures from the committed records
  kimi-llama bench --backend cuda model.gguf --batch 1,512,8192 --depth 0,8192,65536 --cache-type f16,q8_0
  kimi-llama bench --backend cuda --operators --json out/gpu/operators.json
  kimi-llama bench --workers 10.0.0.2:50052,10.0.0.3:50052 --batch 1,512 --depth 0
  kimi-llama bench --libraries ~/llama.cpp/build/bin --batch 512    another build instead of the patched one

Families (--family), with the default --layers and --experts:
{_FAMILIES}
--quick: batches {_QUICK["batches"]} at depths {_QUICK["depths"]}, with the default number of threads.
--grid: {", ".join(TYPES)}; batches {_GRID["batches"]}; depths {_GRID["depths"]}; threads {_listed(THREADS)}.
On a GPU --quick is batches {_GPU_QUICK["batches"]} at depths {_GPU_QUICK["depths"]}, --grid batches
{_GPU_GRID["batches"]} at depths {_GPU_GRID["depths"]}; cells that do not fit in its memory are left out.
On a CPU, a model that does not fit in memory twice is measured one process at a time, in turns A B C C B A, repeated by
--rounds. FILE may be larger than memory: it is mapped, and upstream is measured without copies of the weights. This
reads from disk and takes long. On a device it must fit twice; otherwise the command ends with an error.
Builds that do not exist are made first (kimi-llama build). Without a compiler, FILE is measured with the patched build
alone, with no options but --threads, --depth and --build.
Generated models and saved states are kept in bench/ of the cache folder; you may delete it at any time. Generated
models have no tokenizer: run and chat refuse them.

exit status: 0 measured; 1 not possible (one line says why); 2 wrong arguments; 130 interrupted. The record on disk is
complete after every cell."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-command's arguments."""
    add = parser.add_mutually_exclusive_group().add_argument
    add("model", nargs="?", type=Path, metavar="FILE", help="a GGUF file (default: a generated model)")
    add("--demo", action="store_true", help="measure the converted demo checkpoint (--type Q8_0 or BF16)")
    add("--operators", nargs="?", const=TIMED, type=words(TIMED), metavar="OP,..",
        help="time single operators, with one layer of the 48B's sizes; on a device, all or those named")  # fmt: skip
    add("--matmuls", action="store_true", help="time single matmuls by weight type, with %% of roofline")
    add("--products", dest="matmuls", action="store_true", help=argparse.SUPPRESS)  # its old name
    add("--hybrid", action="store_true",
        help="compare one MLA layer in four with MLA in every layer (patched only)")  # fmt: skip
    add("--records", nargs="+", type=Path, metavar="JSON",
        help="measure nothing: write --page from these records")  # fmt: skip
    add(
        "--draw",
        type=Path,
        metavar="TOML",
        help="measure nothing: write the page that this manifest describes",
    )

    add = parser.add_argument_group("the generated model").add_argument
    add("--type", type=words(tuple(FILE_TYPES)), metavar="T,..",
        help="generate models of these types of llama-quantize, such as Q4_K_M,Q8_0 (default: Q4_0)")  # fmt: skip
    add("--family", choices=COMPARABLE, default="kimi-linear",
        help="generate the layers of this model, see below (default: %(default)s)")  # fmt: skip
    add("--layers", type=number, metavar="N", help="generate N layers (default: the family's)")
    add("--experts", type=number, metavar="N",
        help="generate N experts in every layer except the dense ones (default: the family's)")  # fmt: skip
    add("--shapes", choices=SHAPES, default="full",
        help="full: generate the published layer shapes; tiny is for a quick try (default: %(default)s)")  # fmt: skip

    what = parser.add_argument_group("what is measured")
    add = what.add_mutually_exclusive_group().add_argument
    add("--quick", action="store_true", help="measure a small subset (default)")
    add("--grid", action="store_true", help="measure all types, batches, depths and numbers of threads")
    add = what.add_argument
    add(
        "--batch",
        type=numbers(1),
        metavar="N,..",
        help="decode N tokens of each sequence at once (default: see --quick)",
    )
    add("--depth", type=numbers(0), metavar="N,..",
        help=f"measure with N tokens already in the cache (--hybrid: from {hybrid.SEED} on)")  # fmt: skip
    add("--build", "--backend", dest="backend", metavar="NAME",
        help="measure this build, see kimi-llama path --help; a GPU build computes all layers on the GPU "
        "(default: the build that runs)")  # fmt: skip
    add("--device", metavar="NAME",
        help="use this device of the backend, such as CUDA1 (default: the first)")  # fmt: skip
    add("--workers", metavar="HOST:PORT,..",
        help="print the speed on this machine and over these workers, and the bytes sent and received; "
        "makes no record")  # fmt: skip
    add("--threads", type=numbers(1, MAX_THREADS), metavar="N,..",
        help=f"use N CPU threads (default: {CORES}; 4 on a GPU)")  # fmt: skip
    add(
        "--ubatch",
        type=number,
        default=UBATCH,
        metavar="N",
        help=f"use ubatches of N tokens (default: {UBATCH})",
    )
    add("--cache-type", type=cache_types, default=("f16",), metavar="T,..",
        help="use these KV cache types, such as f16,q8_0 (default: f16)")  # fmt: skip
    add("--sequences", type=numbers(1), default=(1,), metavar="N,..",
        help="decode N sequences in one batch (default: 1)")  # fmt: skip
    add("--seconds", type=seconds, default=8.0, metavar="S",
        help="measure a cell for about S seconds; --in-turns: each variant and turn (default: 8)")  # fmt: skip
    add("--in-turns", action="store_true",
        help="keep one process in memory at a time (CPU only; default: if the model does not fit twice)")  # fmt: skip
    add("--rounds", type=number, default=1, metavar="N",
        help="one process at a time: repeat all turns N times, for a machine with other work (default: 1)")  # fmt: skip
    add(
        "--budget",
        type=seconds,
        default=math.inf,
        metavar="S",
        help="start no cell after S seconds (default: no limit)",
    )
    add("--libraries", type=Path, metavar="DIR",
        help="use these libraries instead of those of the patched build")  # fmt: skip

    add = parser.add_argument_group("what is written").add_argument
    add("--json", type=Path, metavar="FILE", help="write all measurements, for --records")
    add("--record", type=Path, metavar="FILE", help="add all measurements to the records of a machine")
    add("--page", type=Path, metavar="FILE", help="write a Markdown page, with a picture next to it")


def number(text: str, most: int | None = None) -> int:
    """A whole number from 1 on, and up to `most` if there is a limit."""
    try:
        (value,) = numbers(1, most)(text)
    except (argparse.ArgumentTypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one number {_range(1, most)}") from None
    return value


def numbers(least: int, most: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """A reader of whole numbers from `least` on, and up to `most` if there is a limit, separated by commas."""

    def read(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(word) for word in text.split(","))
        except ValueError:
            values = ()
        if not values or min(values) < least or (most is not None and max(values) > most):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected whole numbers {_range(least, most)}, separated by commas"
            )
        return values

    return read


def _range(least: int, most: int | None) -> str:
    return f"from {least} on" if most is None else f"from {least} to {most}"


def words(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A reader of words out of `allowed`, separated by commas."""

    def read(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        for word in chosen:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r}: expected one of {', '.join(allowed)}")
        return chosen

    return read


def cache_types(text: str) -> tuple[str, ...]:
    """Names of ggml's types, as llama.cpp spells them."""
    known = tuple(kind.name.lower() for kind in gguf.GGMLQuantizationType)
    return words(known)(text.lower())


def seconds(text: str) -> float:
    """A positive time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, more than 0")
    return value
