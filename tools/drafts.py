"""Measure the speed of llama-server with drafts.

    tools/run drafts server
    tools/run drafts mtp FILE

Input: a target model, and a lower-bit quantization of it as the draft model. Output: a table of tokens, drafted tokens
and accepted tokens for several kinds of drafts, patched and upstream.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_gguf.bench.models import convert_demo
from kimi_gguf.bench.report import Rows, markdown
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.types.file_types import TYPES as FILE_TYPES
from kimi_gguf.engine.builds import Engine, ensure
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.gguf_check import check_mtp, check_whole
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.engine.toolchain import CORES, cores
from kimi_gguf.tools.server import RunningServer, running

SLOTS = (1, 4)
COUNT = 128  # tokens per answer
PROMPTS = tuple(
    f"define: {word}"
    for word in ("elephant", "river", "to walk", "ivory", "stone", "to sing", "green", "house")
)
NGRAM = ("--spec-ngram-simple-size-n", "4", "--spec-ngram-simple-size-m", "8")
DRAFTS: dict[str, tuple[str, ...]] = {  # options of llama-server; {draft}: the path of the draft model
    "none": (),
    "model, up to 3 tokens": ("--spec-type", "draft-simple", "-md", "{draft}", "--spec-draft-n-max", "3"),
    "model, up to 8 tokens": ("--spec-type", "draft-simple", "-md", "{draft}", "--spec-draft-n-max", "8"),
    "ngram-simple, 12 then 48": ("--spec-type", "ngram-simple"),
    "ngram-simple, 4 then 8": ("--spec-type", "ngram-simple", *NGRAM),
    "ngram-map-k": ("--spec-type", "ngram-map-k"),
    "ngram-map-k4v": ("--spec-type", "ngram-map-k4v"),
    "ngram-mod": ("--spec-type", "ngram-mod"),
    "ngram-cache": ("--spec-type", "ngram-cache"),
}
MTP = """\
Measure llama-server without drafts and with drafts of the MTP layer in FILE, patched and upstream, and print a table.
The drafts have acceptance rates that llama-server simulates, for files with generated weights; with --all also the
layer's own.
Answers with simulated rates are meaningless; the work is that of a model with these rates."""
SERVER = "Measure llama-server with several kinds of drafts, patched and upstream, with the demo, and print a table."
MTP_LENGTHS = (1, 2, 3)
MTP_RATES = (0.0, 0.5, 0.7, 0.9)  # simulated: accepted tokens among those whose predecessor is accepted
FEW_LENGTHS = (1, 3)
FEW_RATES = (0.5, 0.9)
Row = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """What is asked of each server."""

    slots: tuple[int, ...]  # numbers of slots
    runs: int  # servers of each build, of which the median counts
    prompts: tuple[str, ...]
    count: int  # tokens per answer


FEW = Load(slots=(1,), runs=2, prompts=PROMPTS[:4], count=64)


def mtp_drafts(every: bool = False) -> dict[str, tuple[str, ...]]:
    """Like `DRAFTS`, for a model with an MTP layer. every: with the layer's own rate, and all lengths and rates."""
    found: dict[str, tuple[str, ...]] = {"none": ()}
    for length in MTP_LENGTHS if every else FEW_LENGTHS:
        options = ("--spec-type", "draft-mtp", "--spec-draft-n-max", str(length))
        if every:
            found[f"MTP, up to {length}"] = options
        for rate in MTP_RATES if every else FEW_RATES:
            rates = ",".join(f"{rate**i:.6f}" for i in range(1, length + 1))
            found[f"MTP, up to {length}, rate {rate:g} simulated"] = (*options, "--spec-synth-rates", rates)
    return found


def measure_server(
    target: Path,
    draft: Path | None,
    builds: Mapping[str, Engine],
    threads: int,
    reporter: Reporter,
    drafts: Mapping[str, tuple[str, ...]] | None = None,
    load: Load | None = None,
) -> Iterator[Row]:
    """Yield a row for each number of slots and each kind of draft: the median of the runs of each build.

    drafts: by name, options of llama-server; default: `DRAFTS`. load: default: all prompts, three runs. Raises
    `EngineError`.
    """
    load = load or Load(SLOTS, 3, PROMPTS, COUNT)
    for slots in load.slots:
        for name, options in (DRAFTS if drafts is None else drafts).items():
            row: Row = {"slots": slots, "draft": name}
            runs: dict[str, list[Row]] = {build: [] for build in builds}
            for _ in range(load.runs):
                for build, engine in builds.items():
                    reporter.phase(f"slots: {slots}, draft: {name}, {build}")
                    given = ["-np", str(slots), "-t", str(threads), "--flash-attn", "on"]
                    given += [option.format(draft=draft) for option in options]
                    with (
                        tempfile.TemporaryDirectory() as folder,
                        running(
                            Path(folder) / "log", engine.bin / "llama-server", "-m", target, *given
                        ) as server,
                    ):
                        runs[build].append(answer_all(server, slots, load))
            for build, each in runs.items():
                rates = [run["tokens"] / run["seconds"] for run in each]
                row[build] = {**each[0], "tokens_per_second": statistics.median(rates), "rates": rates}
            yield row


def server_table(rows: Sequence[Row]) -> Rows:
    """The table of the server's runs. The speedup is relative to the same build without drafts."""
    table: Rows = [(
        "slots", "draft", "drafted", "accepted", "tokens/s", "speedup", "upstream: drafted", "accepted", "tokens/s",
        "speedup",
    )]  # fmt: skip
    plain = {
        (row["slots"], build): row[build]["tokens_per_second"]
        for row in rows
        for build in ("patched", "upstream")
        if row["draft"] == "none"
    }
    for row in rows:
        cells = [str(row["slots"]), row["draft"]]
        for build in ("patched", "upstream"):
            drafted, speed = row[build]["drafted"], row[build]["tokens_per_second"]
            cells += [
                str(drafted),
                f"{100 * row[build]['accepted'] / drafted:.0f} %" if drafted else "",
                f"{speed:.0f}",
                f"{speed / plain[row['slots'], build]:.2f}",
            ]
        table.append(tuple(cells))
    return table


def answer_all(server: RunningServer, slots: int, load: Load) -> Row:
    """Send the prompts, as many at once as there are slots, after one request that is not counted.

    Returns the sums of tokens, drafted tokens and accepted tokens, and the seconds until all answers are complete.
    """
    complete(server, load.prompts[0], load.count, seed=0)
    began = time.monotonic()
    with ThreadPoolExecutor(slots) as pool:
        seeds = range(1, len(load.prompts) + 1)
        timings = list(
            pool.map(lambda prompt, seed: complete(server, prompt, load.count, seed), load.prompts, seeds)
        )
    return {
        "seconds": time.monotonic() - began,
        "tokens": sum(each["predicted_n"] for each in timings),
        "drafted": sum(each.get("draft_n", 0) for each in timings),
        "accepted": sum(each.get("draft_n_accepted", 0) for each in timings),
    }


def complete(server: RunningServer, prompt: str, count: int, seed: int) -> Row:
    """The server's timings of one greedy answer of `count` tokens.

    seed: of the acceptance that `--spec-synth-rates` simulates, so that all builds and runs draw the same numbers.
    """
    request = {
        "prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
        "seed": seed,
    }  # fmt: skip
    timings: Row = server.post("/completion", request)["timings"]
    return timings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/run drafts", description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    server, mtp = (
        modes.add_parser(
            name,
            description=text,
            help=text.partition("\n")[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, text in (("server", SERVER), ("mtp", MTP))
    )
    mtp.add_argument("model", metavar="FILE", type=Path, help="a GGUF file of Ling 3 with its MTP layer")
    mtp.add_argument(
        "--all",
        action="store_true",
        help="more lengths and rates, the layer's own rate, and four slots: hours instead of minutes",
    )
    for option, kind, of in (("--type", "BF16", "target"), ("--draft-type", "Q4_0", "draft model")):
        server.add_argument(
            option, choices=FILE_TYPES, default=kind, metavar="T", help=f"of the {of} (default: %(default)s)"
        )
    for mode in (server, mtp):
        mode.add_argument(
            "--threads", type=int, default=cores(), choices=range(1, cores() + 1), metavar="N",
            help=f"CPU threads (default: {CORES})",
        )  # fmt: skip
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the table of a mode. Returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        if given.mode == "mtp":
            check_whole(given.model)
            check_mtp(given.model)
        builds = {"patched": ensure(), "upstream": ensure(upstream=True)}
        with reporting() as reporter:
            if given.mode == "server":
                target, draft = (convert_demo(kind, reporter) for kind in (given.type, given.draft_type))
                table = server_table(list(measure_server(target, draft, builds, given.threads, reporter)))
            else:
                load, drafts = None if given.all else FEW, mtp_drafts(given.all)
                rows = measure_server(given.model, None, builds, given.threads, reporter, drafts, load)
                table = server_table(list(rows))
        print(markdown(table))
    except (EngineError, ConvertError) as error:
        print(f"drafts: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
