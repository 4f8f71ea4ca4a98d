"""Measure the time that drafts take, and the speed of llama-server with drafts.

    tools/run drafts cost --layers 4 --experts 256 --threads 1
    tools/run drafts server
    tools/run drafts mtp FILE

Input: a target model, and a lower-bit quantization of it as the draft model. Output: rows of two tables. `measure_cost`
times the verification of n drafted tokens relative to the decoding of one token, and computes the break-even acceptance
rate. `measure_server` runs llama-server with several kinds of drafts, and counts tokens, drafted tokens and accepted
tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kimi_gguf.bench.cells import PATCHED
from kimi_gguf.bench.families import COMPARABLE
from kimi_gguf.bench.load import undisturbed
from kimi_gguf.bench.models import ModelFile, check_room, convert_demo, generate, open_model
from kimi_gguf.bench.report import Rows, markdown
from kimi_gguf.bench.runner import Runner, environment_of
from kimi_gguf.bench.shapes import SHAPES, TYPES, chosen_model
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.types.file_types import TYPES as FILE_TYPES
from kimi_gguf.engine.builds import Engine, ensure
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.gguf_check import check_mtp, check_whole
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.engine.toolchain import CORES, cores
from kimi_gguf.tools.server import RunningServer, running

LENGTHS = (1, 2, 3, 5, 8)  # drafted tokens
SLOTS = (1, 4)
ROUNDS = 9  # samples per context; the contexts alternate
CELLS = 512  # KV cells per sequence
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
COST = """\
Time the verification of n drafted tokens relative to the decoding of one token, and print the break-even rates of
n-gram drafts and of drafts by a file of --draft-type. Both models are generated."""
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


def break_even(length: int, cost: float) -> float | None:
    """The break-even acceptance rate (0 to 1) of each token of a draft of `length` tokens; None: there is none.

    cost: time of the draft and of its verification, in decodes of one token. With acceptance rate p, a draft and its
    verification give 1 + p + p² + … + p^length tokens. Above the break-even rate this is more than the cost.
    """
    if cost >= length + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(middle**i for i in range(length + 1)) > cost else (middle, high)
    return high


def measure_cost(
    target: ModelFile,
    draft: ModelFile,
    environments: Mapping[str, Mapping[str, str]],
    threads: int,
    reporter: Reporter,
) -> Iterator[Row]:
    """Yield a row for each number of sequences and each length of drafts. Raises `EngineError`."""
    with ExitStack() as stack:
        places = {}
        for name, build, model in (
            ("patched", "patched", target), ("upstream", "upstream", target), ("draft", "patched", draft),
        ):  # fmt: skip
            reporter.phase(f"loading {model.name}: {name}")
            places[name] = stack.enter_context(Runner(name, environments[build]))
            places[name].ask("load", gguf=str(model.path), repack=True)
        own = {process.pid for process in places.values()}
        for sequences in SLOTS:
            samples: dict[tuple[str, int, int], list[float]] = {}
            wanted = [  # process, states for rollback, tokens in one batch
                *((name, 0, 1) for name in ("patched", "upstream")),
                *((name, n, n + 1) for n in LENGTHS for name in places),
                *(("draft", n, 1) for n in LENGTHS),
            ]
            for name, n, _ in wanted:
                places[name].ask(
                    "context", name=f"{sequences}x{n}", n_ctx=CELLS, n_batch=CELLS, n_ubatch=CELLS,
                    sequences=sequences, flash=PATCHED.flash, cache_type="f16", threads=threads, n_rs_seq=n,
                )  # fmt: skip
            for turn in range(ROUNDS):
                reporter.phase(f"sequences: {sequences}, round {turn + 1} of {ROUNDS}")
                for name, n, batch in wanted:
                    ask = partial(
                        places[name].ask, "time", name=f"{sequences}x{n}", batch=batch, steps=3, warm=1,
                        threads=threads, all_logits=True,
                    )  # fmt: skip
                    seconds = undisturbed(ask, threads, own).answer["seconds"]
                    samples.setdefault((name, n, batch), []).append(statistics.mean(seconds))
            took = {key: statistics.median(each) for key, each in samples.items()}
            for process in places.values():
                for n in (0, *LENGTHS):
                    if process is not places["draft"] or n:
                        process.ask("free", name=f"{sequences}x{n}")
            for n in LENGTHS:
                yield cost_row(n, sequences, took)


def cost_row(n: int, sequences: int, took: Mapping[tuple[str, int, int], float]) -> Row:
    """A row of the table of costs. Costs are in decodes of one token without drafts; `took` is in seconds."""
    single = took["patched", 0, 1]
    verify = took["patched", n, n + 1] / single
    drafting = (n * took["draft", n, 1] + took["draft", n, n + 1]) / single
    return {
        "length": n,
        "sequences": sequences,
        "single_seconds": single,
        "verify": verify,
        "upstream_verify": took["upstream", n, n + 1] / took["upstream", 0, 1],
        "draft": drafting,
        "break_even": break_even(n, verify),
        "break_even_draft": break_even(n, verify + drafting),
        "samples": {" ".join(map(str, key)): value for key, value in took.items()},
    }


def cost_table(rows: Sequence[Row]) -> Rows:
    """The table of costs."""
    table: Rows = [(
        "slots", "drafted tokens", "verification, in decodes", "the same upstream", "draft model, in decodes",
        "break-even rate, n-gram", "break-even rate, draft model",
    )]  # fmt: skip

    def rate(found: float | None) -> str:
        return "never" if found is None else f"{100 * found:.0f} %"

    return table + [
        (
            str(row["sequences"]), str(row["length"]), f"{row['verify']:.2f}", f"{row['upstream_verify']:.2f}",
            f"{row['draft']:.2f}", rate(row["break_even"]), rate(row["break_even_draft"]),
        )
        for row in rows
    ]  # fmt: skip


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
    cost, server, mtp = (
        modes.add_parser(
            name,
            description=text,
            help=text.partition("\n")[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, text in (("cost", COST), ("server", SERVER), ("mtp", MTP))
    )
    mtp.add_argument("model", metavar="FILE", type=Path, help="a GGUF file of Ling 3 with its MTP layer")
    mtp.add_argument(
        "--all",
        action="store_true",
        help="more lengths and rates, the layer's own rate, and four slots: hours instead of minutes",
    )
    cost.add_argument(
        "--family", choices=COMPARABLE, default="kimi-linear", help="generate layers of this model"
    )
    cost.add_argument("--layers", type=int, help="generate this many layers (default: the family's)")
    cost.add_argument("--experts", type=int, help="generate this many experts (default: the family's)")
    cost.add_argument(
        "--shapes", choices=SHAPES, default="full", help="sizes of layers (default: %(default)s)"
    )
    for mode, kind in ((cost, "Q8_0"), (server, "BF16")):
        mode.add_argument(
            "--type",
            choices=FILE_TYPES,
            default=kind,
            metavar="T",
            help="of the target (default: %(default)s)",
        )
        mode.add_argument(
            "--draft-type", choices=TYPES, default="Q4_0", help="of the draft model (default: %(default)s)"
        )
    for mode in (cost, server, mtp):
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
            if given.mode == "cost":
                table = cost_table(list(cost_of_generated(given, builds, reporter)))
            elif given.mode == "server":
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


def cost_of_generated(
    given: argparse.Namespace, builds: Mapping[str, Engine], reporter: Reporter
) -> Iterator[Row]:
    """`measure_cost` with two generated models of the given family, sizes and types."""
    sizes = (given.family, given.layers, given.experts)
    models = [chosen_model(*sizes, kind, given.shapes) for kind in (given.type, given.draft_type)]
    check_room(models, builds["upstream"], reporter)
    target, draft = (open_model(generate(model, builds["upstream"], reporter)) for model in models)
    environments = {
        "patched": environment_of(builds["patched"], None, "require"),
        "upstream": environment_of(builds["upstream"]),
    }
    yield from measure_cost(target, draft, environments, given.threads, reporter)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
