"""`validate-kimi`: is this GGUF file the checkpoint's model, and does llama.cpp compute it right?

Flows in: arguments. Flows out: report.html, report.json and report.md, a summary on standard output, progress
on standard error; an exit status: 0 all gates passed, 1 one failed, 2 bad input, 130 interrupted.
Everything that prints or parses arguments is here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.engine.builds import ensure, options_of, select
from kimi_gguf.engine.progress import reporting
from kimi_gguf.patches.errors import EngineError
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.llama import RunOptions
from kimi_gguf.validate.measure import Ids
from kimi_gguf.validate.metrics import Summary
from kimi_gguf.validate.pipeline import Request, validate
from kimi_gguf.validate.report import (
    Report,
    error_text,
    limit_text,
    number_text,
    plain_text,
    share_text,
    write,
)
from kimi_gguf.validate.sample_text import TEXT
from kimi_gguf.validate.tensors import open_gguf

PROGRAM: Final = "validate-kimi"
PASSED, GATE_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


EXAMPLES = """\
examples:
  validate-kimi kimi-BF16.gguf --checkpoint Kimi-Linear-48B-A3B-Instruct --out report
      on a built-in text; report/report.html is for people, .json for machines, .md for a model card
  validate-kimi kimi-Q8_0.gguf --checkpoint Kimi-Linear-48B-A3B-Instruct --text book.txt --tokens 2048 --pristine
      unpatched llama.cpp's figures on the same file beside
  validate-kimi other.gguf --checkpoint Kimi-Linear-48B-A3B-Instruct --against kimi-Q8_0.gguf --cache-type Q8_0

exit status: 0 all gates passed; 1 a gate failed; 2 bad input.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        request = _request(options)
        torch.set_num_threads(options.threads)
        engine = select(options.build)
        print(f"{PROGRAM}: build {engine.label()}", file=sys.stderr)
        pristine = None
        if options.pristine:  # of the same options
            pristine = ensure(pristine=True, backend=engine.backends[0], defines=engine.defines)
        with reporting() as reporter:
            report = validate(request, engine, pristine, reporter)
        html = write(report, options.out)
    except (ValidateError, ConvertError, EngineError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    if not options.quiet:
        _summary(report, html)
    return PASSED if report.passed else GATE_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Compare llama.cpp's logits for a GGUF file with a torch reference of its checkpoint.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("gguf", metavar="GGUF", type=Path, help="the file to validate")
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, required=True, help="what it was made of")
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument(
        "--text", metavar="FILE", type=Path, help="text to compare on (default: a built-in one)"
    )
    tokens.add_argument("--ids", metavar="FILE", type=Path, help="token ids, separated by spaces or commas")
    parser.add_argument(
        "--tokens", metavar="N", type=_positive, default=512, help="of the text at most (512)"
    )
    parser.add_argument(
        "--generate", metavar="N", type=_natural, default=32, help="tokens llama.cpp writes after it (32)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("validation"), help="for the reports")
    parser.add_argument("--pristine", action="store_true", help="show unpatched llama.cpp's figures beside")
    parser.add_argument("--against", metavar="GGUF", type=Path, help="show another file's figures beside")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of the reference (float32)"
    )
    parser.add_argument(
        "--build", "--backend", metavar="NAME", help="llama.cpp's build, as in kimi-llama path --help (cpu)"
    )
    parser.add_argument("--gpu-layers", metavar="N", type=_natural, help="on a GPU (all, with a GPU backend)")
    parser.add_argument(
        "--cache-type", metavar="TYPE", default="F32", help="of K and V: F32, F16, Q8_0 ... (F32)"
    )
    parser.add_argument(
        "--batch", metavar="N", type=_positive, default=512, help="tokens per llama_decode (512)"
    )
    parser.add_argument("--ubatch", metavar="N", type=_positive, default=512, help="tokens per graph (512)")
    parser.add_argument(
        "--threads", metavar="N", type=_positive, default=os.cpu_count() or 1, help="(all cores)"
    )
    parser.add_argument("--quiet", action="store_true", help="no summary on standard output")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _request(options: argparse.Namespace) -> Request:
    """The arguments with their files read; what is wrong with them is said before anything is built."""
    for path in (options.gguf, options.against):
        if path is not None:
            with open_gguf(path):
                pass
    with open_checkpoint(options.checkpoint):
        pass
    on_gpu = options_of(options.build)[0] != "cpu"
    text, ids, source = TEXT, None, "the built-in text"
    if options.text is not None:
        text, source = _read(options.text), options.text.name
    if options.ids is not None:
        ids, source = _read_ids(options.ids), options.ids.name
    return Request(
        gguf=options.gguf,
        checkpoint=options.checkpoint,
        text=None if ids is not None else text,
        ids=ids,
        source=source,
        tokens=options.tokens,
        generate=options.generate,
        options=RunOptions(
            n_batch=options.batch,
            n_ubatch=options.ubatch,
            threads=options.threads,
            cache_type=options.cache_type,
            n_gpu_layers=options.gpu_layers if options.gpu_layers is not None else (999 if on_gpu else 0),
        ),
        dtype=PRECISIONS[options.precision],
        against=options.against,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValidateError(f"{path}: not UTF-8 text: {error}") from error


def _read_ids(path: Path) -> Ids:
    words = _read(path).replace(",", " ").split()
    bad = next((word for word in words if not word.isdigit() or int(word) >= 2**31), None)
    if bad is not None:
        raise ValidateError(f"{path}: {bad!r:.40} is no token id; expected whole numbers")
    if not words:
        raise ValidateError(f"{path}: no token ids")
    return np.array([int(word) for word in words], dtype=np.int64)


def _summary(report: Report, html: Path) -> None:
    """The figures and gates in short."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # nobody's window: keep each line whole
    table = Table(title=f"{report.gguf['name']} against {report.checkpoint['name']}", title_justify="left")
    table.add_column("")
    for title in ("NMSE", "worst", "KLD mean", "99 %", "top 1", "perplexity", "other experts"):
        table.add_column(title, justify="right")
    rows = [("this file", run) for run in report.runs]
    rows += [(rival.title, run) for rival in report.rivals for run in rival.runs]
    for source, run in rows:
        table.add_row(f"{source}, {run.variant.key}", *_cells(run.all), str(int(run.choices.differs.sum())))
    table.add_row("noise floor", *_cells(report.floor), "")
    console.print(table)
    for gate in report.gates:
        verdict = "[green]pass[/]" if gate.passed else "[bold red]FAIL[/]"
        where = f" ({gate.variant})" if gate.variant else ""
        console.print(f"{verdict}  {gate.title}{where}: {number_text(gate.found)}, {limit_text(gate)}")
    console.print(f"[bold]{'PASS' if report.passed else 'FAIL'}[/]  report: {html}")


def _cells(summary: Summary) -> list[str]:
    return [
        *(error_text(x) for x in (summary.nmse, summary.nmse_worst, summary.kld_mean, summary.kld_p99)),
        share_text(summary.top1),
        plain_text(summary.ppl_test),
    ]


if __name__ == "__main__":
    sys.exit(main())
