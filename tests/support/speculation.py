"""How much a target model evaluated for drafts, and how much it would have to.

Input: answers of a server, or a run of llama-speculative-simple. Output: an `Account` without replay, or `Figures`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_server import Account, Answer

from kimi_gguf.engine.builds import Engine


def without_replay(answers: Sequence[Answer], accepts: bool = True) -> Account:
    """The work for these answers if no token is evaluated twice; batches are counted per slot.

    accepts: whether any drafted tokens must have been accepted. Some must have been rejected.
    """
    drafted = sum(a.timings["draft_n"] for a in answers)
    accepted = sum(a.timings["draft_n_accepted"] for a in answers)
    assert accepted < drafted and (accepted > 0) == accepts, (
        f"{accepted} of {drafted} drafted tokens accepted"
    )
    followed = sum(len(a.ids) - 1 for a in answers)  # the first token is sampled from the prompt's logits
    return Account(tokens=followed + drafted - accepted, batches=followed - accepted, restored=0)


@dataclass(frozen=True)
class Figures:
    """The statistics that llama-speculative-simple prints at its end."""

    predicted: int
    drafted: int
    accepted: int
    generated: int  # drafted tokens, according to the statistics of the drafts
    evaluated: int  # tokens that the target evaluated, including the prompt and tests of its memory
    prompt: int

    @property
    def once(self) -> int:
        """`evaluated` if no token is evaluated twice. The prompt's last token is evaluated with the first draft."""
        return self.prompt - 1 + self.predicted + self.drafted - self.accepted


def figures(engine: Engine, target: Path, prompt: str, count: int, *options: str, tries: int = 1) -> Figures:
    """The tool's statistics. Upstream may exit before they are printed (patch 0008): run it up to `tries` times."""
    command = [engine.bin / "llama-speculative-simple", "-m", target, "-p", prompt, "-n", str(count)]
    command += ["--temp", "0", "--ignore-eos", "-t", "1", "-ctk", "f32", "-ctv", "f32", "-lv", "4", *options]
    for _ in range(tries):
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
        said = ended.stdout + ended.stderr
        if all(part in said for part in ("n_predict", "#gen tokens", "  eval time")):
            break

    def number(pattern: str) -> int:
        found = re.findall(pattern, said)
        assert found, (pattern, said[-2000:])
        return int(found[-1])

    prompt_evaluated = number(r"prompt eval time = .*?/ +(\d+) tokens")
    return Figures(
        predicted=number(r"n_predict = +(\d+)"),
        drafted=number(r"n_drafted = +(\d+)"),
        accepted=number(r"n_accept  = +(\d+)"),
        generated=number(r"#gen tokens = +(\d+)"),
        evaluated=prompt_evaluated + number(r"  eval time = .*?/ +(\d+) runs"),
        prompt=number(r"encoded +(\d+) tokens"),
    )
