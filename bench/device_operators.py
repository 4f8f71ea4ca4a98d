"""Times single operators on a device, with the test-backend-ops of both builds.

Input: both builds with their test programs, a device. Output: rows with an operator's parameters and microseconds
in each build; None if the build lacks the operator.

test-backend-ops has no GATED_DELTA_NET cases of the 48B's lengths: they are passed with its --test-file option.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from kimi_gguf.bench.programs import ask
from kimi_gguf.engine.builds import Engine, upstream_source
from kimi_gguf.engine.progress import Reporter

OPERATORS = ("KDA_CONV", "KDA_SCAN", "FLASH_ATTN_EXT", "LATENT_ATTN")
LATENT = "hsk=576,hsv=512.*"  # only these cases of FLASH_ATTN_EXT
SMALL = "(n_seq_tokens=1,n_seqs=1|kv=512,nb=1,.*type_K=q8_0|keys=512,.*type_cache=q8_0)"  # for a quick try
RECURRENCE = "GATED_DELTA_NET"
TIMED = (*OPERATORS, RECURRENCE)
HEADS, HEAD = 32, 128
TOKENS = (1, 64, 512, 2048, 8192)
F32, F32_BYTES = 0, 4

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
    if RECURRENCE not in wanted:
        return
    reporter.phase(f"{RECURRENCE} on {device}")
    with tempfile.TemporaryDirectory() as folder:
        cases = Path(folder) / "cases"
        number = operator_number(RECURRENCE)
        cases.write_text(
            "".join(recurrence_case(number, tokens) for tokens in TOKENS[: 1 if small else None])
        )
        found = {b: _ask(engine, device, "--test-file", str(cases)) for b, engine in engines.items()}
    yield _rows(found)


def recurrence_case(number: int, tokens: int) -> str:
    """A line of the file: operator, type, ne, parameters, sources with type, ne, nb, and the name of the case."""
    per_channel, per_head, state = (HEAD, HEADS, tokens, 1), (1, HEADS, tokens, 1), (HEAD, HEAD, HEADS, 1)
    shapes = [*4 * [per_channel], per_head, state]  # q, k, v, gate; beta; state
    words = [number, F32, HEAD * HEADS, tokens + HEAD, 1, 1, 1, 1, len(shapes)]
    for shape in shapes:
        strides = [F32_BYTES]
        for size in shape[:3]:
            strides.append(strides[-1] * size)
        words += [F32, *shape, *strides]
    return f"{' '.join(map(str, words))} kda=1;n_seq_tokens={tokens}\n"


def operator_number(name: str) -> int:
    """The number of an operator in upstream's enum ggml_op; the patches only append to it."""
    header = (upstream_source() / "llama.cpp" / "ggml" / "include" / "ggml.h").read_text()
    listed = header.partition("enum ggml_op {")[2].partition("}")[0]
    return re.findall(r"^ *GGML_OP_(\w+)", listed, re.MULTILINE).index(name)


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


def _rows(found: Mapping[str, Mapping[tuple[str, str], float]]) -> list[dict[str, Any]]:
    """A row for each case that a build supports, in the order of the program."""
    cases = dict.fromkeys(case for build in ("patched", "upstream") for case in found[build])
    return [
        {"operator": operator, "parameters": parameters}
        | {build: times.get((operator, parameters)) for build, times in found.items()}
        for operator, parameters in cases
    ]
