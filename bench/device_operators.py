"""Times single operators on a device, with the test-backend-ops of both builds.

Input: both builds with their test programs, a device. Output: rows with an operator's parameters and microseconds
in each build; None if the build lacks the operator.

test-backend-ops lacks some cases: GATED_DELTA_NET with the 48B's lengths, and MUL_MAT of one column by matrices that do
not fit in a GPU's L2 cache. They are passed with its --test-file option.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from kimi_gguf.bench.programs import ask
from kimi_gguf.engine.builds import Engine, upstream_source
from kimi_gguf.engine.progress import Reporter

OPERATORS = ("KDA_CONV", "KDA_SCAN", "FLASH_ATTN_EXT", "LATENT_ATTN")
LATENT = "hsk=576,hsv=512.*"  # only these cases of FLASH_ATTN_EXT
SMALL = "(n_seq_tokens=1,n_seqs=1|kv=512,nb=1,.*type_K=q8_0|keys=512,.*type_cache=q8_0)"  # for a quick try
RECURRENCE, MATMUL = "GATED_DELTA_NET", "MUL_MAT"
TIMED = (*OPERATORS, RECURRENCE, MATMUL)
HEADS, HEAD = 32, 128
TOKENS = (1, 64, 512, 2048, 8192)
MATRICES = ((2304, 163840), (4096, 65536))  # columns, rows; the first is the 48B's output layer
SMALL_MATRIX = (512, 2304)
TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")
F32 = int(GGMLQuantizationType.F32)

_ROW = re.compile(r"^INSERT INTO test_backend_ops \((.*?)\) VALUES \((.*)\);$")
_VALUE = re.compile(r"'([^']*)'")


def measure_device_operators(
    engines: Mapping[str, Engine], device: str, wanted: Collection[str], small: bool, reporter: Reporter
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each wanted operator. engines: by build. small: only few cases. Raises `EngineError`."""
    for operator in OPERATORS:
        if operator not in wanted:
            continue
        reporter.phase(f"{operator} on {device}")
        pattern = (LATENT if operator == "FLASH_ATTN_EXT" else "") + (SMALL if small else "")
        words = ("-o", operator, *(("-p", pattern) if pattern else ()))
        yield _rows({build: _ask(engine, device, *words) for build, engine in engines.items()})
    for operator, cases in ((RECURRENCE, recurrence_cases), (MATMUL, matmul_cases)):
        if operator in wanted:
            reporter.phase(f"{operator} on {device}")
            yield _rows(_time_cases(engines, device, cases(small)))


def recurrence_cases(small: bool) -> list[str]:
    """Lines of a file of cases: upstream's recurrence with the 48B's heads."""
    number = operator_number(RECURRENCE)
    return [recurrence_case(number, tokens) for tokens in TOKENS[: 1 if small else None]]


def recurrence_case(number: int, tokens: int) -> str:
    """The recurrence over this many tokens of one sequence."""
    per_channel, per_head, state = (HEAD, HEADS, tokens, 1), (1, HEADS, tokens, 1), (HEAD, HEAD, HEADS, 1)
    shapes = [*4 * [per_channel], per_head, state]  # q, k, v, gate; beta; state
    result = (HEAD * HEADS, tokens + HEAD, 1, 1)
    return case_line(number, result, [1], [(F32, shape) for shape in shapes], f"kda=1;n_seq_tokens={tokens}")


def matmul_cases(small: bool) -> list[str]:
    """Lines of a file of cases: matrices times one column."""
    number = operator_number(MATMUL)
    matrices = [SMALL_MATRIX] if small else MATRICES
    return [
        matmul_case(number, kind, *matrix) for kind in TYPES[: 1 if small else None] for matrix in matrices
    ]


def matmul_case(number: int, kind: str, n_columns: int, n_rows: int) -> str:
    """A matrix of this type times one column."""
    matrix = (int(GGMLQuantizationType[kind]), (n_columns, n_rows, 1, 1))
    name = f"type={kind};n_columns={n_columns};n_rows={n_rows}"
    return case_line(number, (n_rows, 1, 1, 1), [], [matrix, (F32, (n_columns, 1, 1, 1))], name)


def case_line(
    number: int,
    result: Sequence[int],
    parameters: Sequence[int],
    sources: Sequence[tuple[int, Sequence[int]]],
    name: str,
) -> str:
    """A line of the file: operator, type, ne, parameters, sources with type, ne and nb, and the name of the case."""
    words = [number, F32, *result, len(parameters), *parameters, len(sources)]
    for kind, shape in sources:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        strides = [block_bytes, shape[0] // block * block_bytes]
        for size in shape[1:3]:
            strides.append(strides[-1] * size)
        words += [kind, *shape, *strides]
    return f"{' '.join(map(str, words))} {name}\n"


def operator_number(name: str) -> int:
    """The number of an operator in upstream's enum ggml_op; the patches only append to it."""
    header = (upstream_source() / "llama.cpp" / "ggml" / "include" / "ggml.h").read_text()
    listed = header.partition("enum ggml_op {")[2].partition("}")[0]
    return re.findall(r"^ *GGML_OP_(\w+)", listed, re.MULTILINE).index(name)


def _time_cases(
    engines: Mapping[str, Engine], device: str, cases: Sequence[str]
) -> dict[str, dict[tuple[str, str], float]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases"
        file.write_text("".join(cases))
        return {build: _ask(engine, device, "--test-file", str(file)) for build, engine in engines.items()}


def _ask(engine: Engine, device: str, *words: str) -> dict[tuple[str, str], float]:
    """Microseconds by operator and parameters."""
    options = ("perf", "-b", device, "--output", "sql", *words)
    environment = {**engine.environment(), "GGML_NO_BACKTRACE": "1"}
    return parsed(ask(engine.bin / "test-backend-ops", *options, environment=environment))


def parsed(text: str) -> dict[tuple[str, str], float]:
    """Microseconds by operator and parameters, from the SQL output of the program."""
    found = {}
    for line in text.splitlines():
        if match := _ROW.match(line):
            row = dict(zip(match[1].split(", "), _VALUE.findall(match[2]), strict=True))
            if row["supported"] == "1":
                name = re.match(r"name=(.*?),type=", row["op_params"])
                parameters = name[1].replace(";", ",") if name else row["op_params"]
                found[row["op_name"], parameters] = float(row["time_us"])
    return found


def _rows(by_build: Mapping[str, Mapping[tuple[str, str], float]]) -> list[dict[str, Any]]:
    """A row for each case that a build supports, in the order of the program."""
    cases = dict.fromkeys(case for build in ("patched", "upstream") for case in by_build[build])
    return [
        {"operator": operator, "parameters": parameters}
        | {build: times.get((operator, parameters)) for build, times in by_build.items()}
        for operator, parameters in cases
    ]
