"""Converts repeatedly, kills each conversion after a random time, and checks the files that are left.

Run as a program. Input: checkpoint, output, number of kills, file type, maximum size of a split (0: one file), and
folders, each with the files of an undisturbed conversion under the folder's name. Of several names each run uses a
random one, with --force and possibly with --resume. Output: the counts as a JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from kimi_gguf.convert.conversion import Options, convert
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.output import unfinished
from kimi_gguf.convert.types import ggml
from kimi_gguf.convert.types.file_types import TYPES

REFUSED = 7  # exit status of a child


def main() -> None:
    source, out, folders = Path(sys.argv[1]), Path(sys.argv[2]), [Path(word) for word in sys.argv[6:]]
    kills, kind, size = int(sys.argv[3]), TYPES[sys.argv[4]], int(sys.argv[5]) or None
    expected = {folder.name: contents(folder) for folder in folders}
    unfinished.SYNC_SECONDS = 0
    if kind.quantized:
        ggml.load()

    def child(name: str, resume: bool) -> int:
        process = os.fork()
        if process == 0:
            options = Options(name, overwrite=True, resume=resume, split_max_size=size)
            try:
                convert(source, out, kind, options)
            except ConvertError:
                os._exit(REFUSED)
            os._exit(0)
        return process

    names, alone = list(expected), len(expected) == 1
    first = min(expected[names[0]])  # through which the others are opened
    rng, found = random.Random(2), Counter(killed=0, ended=0, refused=0, resumed=0, loadable=0, wrong=0)
    began = time.monotonic()
    os.waitpid(child(names[0], False), 0)
    duration = time.monotonic() - began
    journal = out.with_name(f".{out.name}.unfinished") / "journal"
    while found["killed"] < kills:
        if alone:
            out.unlink(missing_ok=True)
        name, resume = rng.choice(names), alone or rng.random() < 0.7
        found["resumed"] += resume and journal.exists() and journal.read_bytes().count(b"\n") > 1
        process = child(name, resume)
        time.sleep(rng.uniform(0, duration))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        killed, refused = os.WIFSIGNALED(status), os.WEXITSTATUS(status) == REFUSED
        ended = "killed" if killed else "refused" if refused else "ended"
        found[ended] += 1
        here = contents(out.parent)
        if first in here:
            found["loadable"] += 1
            found["wrong"] += here not in expected.values()
        found["wrong"] += ended == "ended" and here != expected[name]
    for name in names:
        os.waitpid(child(name, alone), 0)
        found["wrong"] += contents(out.parent) != expected[name]
    print(json.dumps(found))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


if __name__ == "__main__":
    main()
