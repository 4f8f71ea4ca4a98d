"""0008-log-flush-at-exit: all output of llama-completion is written, even if the log's thread is slow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from native_program import compile_shim
from random_checkpoint import Spec
from synthetic_case import make_case

from kimi_gguf.engine.builds import Engine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform != "linux", reason="slows a program down through LD_PRELOAD"),
]
PROMPT = "the hat is on the tin"


def output_with_a_slow_log(engine: Engine, folder: Path) -> str:
    """The output of the program if its log's thread takes 0.2 s for each piece of text."""
    shim = compile_shim("slow_flush.c", folder)
    command = [engine.bin / "llama-completion", "--model", make_case(folder, Spec(seed=80)).gguf]
    command += ["--prompt", PROMPT, "-n", "1", "--no-conversation", "--threads", "1", "--verbosity", "2"]
    slow = {"LD_PRELOAD": str(shim)}
    run = subprocess.run(
        command, env=slow, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_text_still_queued_at_the_end_is_written(tmp_path: Path, engine: Engine) -> None:
    assert output_with_a_slow_log(engine, tmp_path).startswith(PROMPT)


FREED = """
import ctypes, sys
common = ctypes.CDLL(sys.argv[1])
common._Z15common_log_mainv.restype = ctypes.c_void_p
common._Z15common_log_freeP10common_log(ctypes.c_void_p(common._Z15common_log_mainv()))
"""


def test_a_log_that_was_freed_is_not_flushed(engine: Engine) -> None:
    """As in upstream's test-log, which would never end."""
    command = [sys.executable, "-c", FREED, str(engine.lib / "libllama-common.so")]
    assert subprocess.run(command, env=engine.environment(), timeout=60).returncode == 0
