"""`validate-kimi`: compare llama.cpp's logits for a GGUF file with a torch reference of its checkpoint.

Input: arguments. Output: report.html, report.json and report.md, a summary on standard output, progress on
standard error, and the exit status (0 all gates passed, 1 a gate failed, 2 bad input, 130 interrupted).
This module alone parses arguments and prints results. What imports torch is imported by the functions that run a
validation: help, wrong arguments and `show` do not need it, and loading it takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kimi_gguf.convert.adapter.argument import scaled_path
from kimi_gguf.convert.adapter.merge import open_merged
from kimi_gguf.convert.card.text import licence_note
from kimi_gguf.convert.plan import model_notes
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.engine.build_spec import CPU_BACKENDS
from kimi_gguf.engine.builds import Engine, ensure, options_of, select
from kimi_gguf.engine.errors import install
from kimi_gguf.engine.file_kind import kind_of
from kimi_gguf.engine.folder_lock import folder_lock
from kimi_gguf.engine.interrupts import INTERRUPTED, interrupt_ends_process, terminable
from kimi_gguf.engine.path_check import check_paths
from kimi_gguf.engine.progress import reporting
from kimi_gguf.engine.toolchain import CORES, MAX_THREADS, cores
from kimi_gguf.engine.version import VERSION
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.llama import CACHE_TYPES, RunOptions, is_quantized
from kimi_gguf.validate.metrics import Summary
from kimi_gguf.validate.report import (
    FORMATS,
    NO_NOISE,
    PRECISIONS,
    Report,
    check_place,
    limit_text,
    number_text,
    perplexity_text,
    plain_text,
    write,
)
from kimi_gguf.validate.sample_text import BUILT_IN, TEXT
from kimi_gguf.validate.stored import printable, read_report
from kimi_gguf.validate.tensors import open_gguf

if TYPE_CHECKING:
    from kimi_gguf.validate.measure import Ids
    from kimi_gguf.validate.pipeline import Request

PROGRAM: Final = "validate-kimi"
PASSED, GATE_FAILED, BAD_INPUT = 0, 1, 2
PACKAGES: Final = ("torch", "safetensors", "matplotlib")
# Of the summary: title, field of Summary, format.
COLUMNS = (
    ("NMSE", "nmse", "error"), ("worst NMSE", "nmse_worst", "error"), ("mean KLD", "kld_mean", "error"),
    ("99 % KLD", "kld_p99", "error"), ("top-1", "top1", "share"), ("perplexity", "ppl_test", "plain"),
)  # fmt: skip


ALL_LAYERS = 999
MOST_TOKENS = 2**20  # the context that the 48B was trained for

EXAMPLES = """\
examples:
  validate-kimi kimi-BF16.gguf --checkpoint Kimi-Linear-48B-A3B-Instruct --out report
      use the built-in text; write report/report.html, report.json and report.md (for a model card)
  validate-kimi kimi-Q8_0.gguf --checkpoint Kimi-Linear-48B-A3B-Instruct --text book.txt --tokens 2048 --upstream
      also run the file on upstream llama.cpp and compare
  validate-kimi other.gguf --checkpoint Kimi-Linear-48B-A3B-Instruct --against kimi-Q8_0.gguf --cache-type Q8_0
      also run kimi-Q8_0.gguf and show its figures next to those of other.gguf
  validate-kimi merged.gguf --checkpoint Kimi-Linear-48B-A3B-Instruct --adapter my-adapter
      the reference with a LoRA adapter, against a file into which it was merged
  validate-kimi kimi-Q8_0.gguf --checkpoint Kimi-Linear-48B-A3B-Instruct --adapter my-adapter --lora my-adapter.gguf
      the same against the file of the base with the converted adapter
  validate-kimi card hub --checkpoint Kimi-Linear-48B-A3B-Instruct
      validate all files in hub/ and write hub/README.md, a model card with table and plots
  validate-kimi show report/report.json older/report.json
      print the figures of reports

exit status: 0 all gates passed; 1 a gate failed; 2 bad input; 130 interrupted.
"""


@terminable()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["show"]:
        return _show(words[1:])
    if words[:1] == ["card"]:
        return _card(words[1:])
    options = _parser().parse_args(words)
    try:
        check_paths(options)
        _load_packages()
        from kimi_gguf.validate.pipeline import validate

        request = _request(options, options.gguf, options.against)
        check_place(options.out)
        engine, upstream = _engines(options)
        with reporting() as reporter:
            report = validate(request, engine, upstream, reporter)
        html = write(report, options.out)
    except BrokenPipeError:
        raise  # see scripts/commands.py
    except (KimiError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; no report was written", file=sys.stderr)
        return INTERRUPTED
    if not options.quiet:
        _summary(report, html)
    return PASSED if report.passed else GATE_FAILED


def _load_packages() -> None:
    """Import all packages that a validation uses; raise `ValidateError` if one is missing."""
    try:
        with interrupt_ends_process():
            import_module("kimi_gguf.validate.card_files")  # it imports torch and matplotlib
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        what = f"{error.name} is missing; it is part of the extra [validate]: {install(*PACKAGES)}"
        raise ValidateError(what) from error


def _engines(options: argparse.Namespace) -> tuple[Engine, Engine | None]:
    """The build that runs, and upstream's if it is compared."""
    import torch

    torch.set_num_threads(options.threads)
    engine = select(options.build)
    print(f"{PROGRAM}: build {engine.label()}", file=sys.stderr)
    if not options.upstream:
        return engine, None
    return engine, ensure(upstream=True, backend=engine.backends[0], defines=engine.defines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} GGUF --checkpoint DIR [options]\n       {PROGRAM} card FOLDER --checkpoint DIR [options]\n"
        f"       {PROGRAM} show REPORT...",
        description="Compare llama.cpp's logits for a GGUF file with a torch reference of its checkpoint: "
        "Kimi-Linear, Ling 3 or Kimi K3, the models with KDA.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kimi-gguf {VERSION}")
    parser.add_argument("gguf", metavar="GGUF", type=Path, help="the file to validate")
    add = parser.add_argument
    out = Path("validation")
    add(
        "--out", metavar="DIR", type=Path, default=out, help="write the reports to DIR (default: %(default)s)"
    )
    against = "also run this file and show its metrics next to those of GGUF"
    add("--against", metavar="FILE", type=Path, help=against)
    text = "give the reference this LoRA adapter of PEFT, times SCALE (default: 1); may be repeated"
    scaled = partial(add, type=scaled_path, action="append", default=[])
    scaled("--adapter", metavar="FOLDER[:SCALE]", help=text)
    text = "run GGUF with this GGUF adapter; without, GGUF is a merged file; may be repeated"
    scaled("--lora", metavar="FILE[:SCALE]", help=text)
    written = "also evaluate on N tokens that llama.cpp generates after the text (default: %(default)s)"
    add("--generate", metavar="N", type=partial(_between, 0, MOST_TOKENS), default=32, help=written)
    _add_run_options(parser, "file was")
    return parser


def _add_run_options(parser: argparse.ArgumentParser, subject: str) -> None:
    """The options that a report of one file and a card of several have in common."""
    add = parser.add_argument
    made = f"checkpoint that the {subject} made from"
    add("--checkpoint", metavar="DIR", type=Path, required=True, help=made)
    tokens = parser.add_mutually_exclusive_group().add_argument
    tokens("--text", metavar="FILE", type=Path, help="evaluate on this text (default: built-in)")
    tokens(
        "--ids", metavar="FILE", type=Path, help="evaluate on these token ids, separated by spaces or commas"
    )

    def number(name: str, least: int, most: int, default: int | None, meaning: str) -> None:
        add(name, metavar="N", type=partial(_between, least, most), default=default, help=meaning)

    number("--tokens", 1, MOST_TOKENS, 512, "use at most N tokens of the text (default: %(default)s)")
    add("--upstream", action="store_true", help="also run the file on upstream llama.cpp and compare")
    precision = "set the precision of the torch reference (default: %(default)s)"
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help=precision)
    build = "use this build of llama.cpp, named as in kimi-llama path --help (default: the build that runs)"
    add("--build", "--backend", metavar="NAME", help=build)
    layers = "offload N layers to the GPU (default: all with a GPU backend, else 0)"
    number("--gpu-layers", 0, ALL_LAYERS, None, layers)
    cache_type = f"set the type of the K and V cache: {', '.join(CACHE_TYPES)} (default: %(default)s)"
    add("--cache-type", metavar="TYPE", type=_cache_type, default="F32", help=cache_type)
    number(
        "--batch", 1, MOST_TOKENS, 512, "pass at most N tokens to each llama_decode (default: %(default)s)"
    )
    number("--ubatch", 1, MOST_TOKENS, 512, "compute at most N tokens in each graph (default: %(default)s)")
    number("--threads", 1, MAX_THREADS, cores(), f"use N CPU threads (default: {CORES})")
    add("--quiet", action="store_true", help="print no summary on standard output")


def _cache_type(text: str) -> str:
    if text.upper() not in CACHE_TYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(CACHE_TYPES)}, found {text!r:.40}")
    return text.upper()


def _is_number(text: str, least: int, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most


def _between(least: int, most: int, text: str) -> int:
    if not _is_number(text, least, most):
        raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}, found {text!r:.40}")
    return int(text)


def _request(options: argparse.Namespace, gguf: Path, against: Path | None = None) -> Request:
    """Read the files that the arguments name. Raises an error for bad input before anything is built."""
    import torch

    from kimi_gguf.validate.pipeline import Request

    for path in filter(None, (gguf, against)):
        with open_gguf(path):
            pass
    adapters, lora = getattr(options, "adapter", ()), getattr(options, "lora", ())  # a card has neither
    if lora and not adapters:
        raise ValidateError(
            "--lora: the reference has no adapter",
            todo="give the PEFT adapter that the file was made from: --adapter",
        )
    for path, _ in lora:
        with open_gguf(path):
            pass
    with open_merged(options.checkpoint, adapters):
        pass
    on_gpu = options_of(options.build)[0] not in CPU_BACKENDS
    text, ids, source = TEXT, None, BUILT_IN
    if options.text is not None:
        text, source = _read(options.text), options.text.name
    if options.ids is not None:
        ids, source = _read_ids(options.ids), options.ids.name
    return Request(
        gguf=gguf,
        checkpoint=options.checkpoint,
        text=None if ids is not None else text,
        ids=ids,
        source=source,
        tokens=options.tokens,
        generate=getattr(options, "generate", 0),  # of a card: none, so that all files have the same tokens
        options=RunOptions(
            n_batch=options.batch,
            n_ubatch=options.ubatch,
            threads=options.threads,
            cache_type=options.cache_type,
            flash_attention=is_quantized(options.cache_type),
            n_gpu_layers=options.gpu_layers
            if options.gpu_layers is not None
            else (ALL_LAYERS if on_gpu else 0),
        ),
        dtype=getattr(torch, options.precision),
        against=against,
        adapters=tuple(adapters),
        lora=tuple(lora),
    )


def _read(path: Path) -> str:
    if path.exists() and not path.is_file() and not path.is_fifo():
        raise ValidateError(path, expected="a file", found=kind_of(path))
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValidateError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValidateError(path, expected=f"UTF-8 text: {error}") from error


def _read_ids(path: Path) -> Ids:
    words = _read(path).replace(",", " ").split()
    bad = next((word for word in words if not _is_number(word, 0, 2**31 - 1)), None)
    if bad is not None:
        raise ValidateError(path, expected="token ids (integers)", found=f"{bad!r:.40}")
    if not words:
        raise ValidateError(path, expected="token ids", found="an empty file")
    return np.array([int(word) for word in words], dtype=np.int64)


class _Output(Console):
    """Standard output."""

    def __init__(self, width: int) -> None:
        """width: columns in a file or a pipe, where rich would wrap lines at 80."""
        super().__init__(highlight=False)
        if not self.is_terminal:
            self.width = width

    def on_broken_pipe(self) -> None:
        """Let the BrokenPipeError through that rich is handling; it would end the process with status 1."""
        raise


def _summary(report: Report, html: Path) -> None:
    """Print the main figures and the gates."""
    console = _Output(120)
    table = Table(title=f"{report.gguf['name']} against {report.checkpoint['name']}", title_justify="left")
    table.add_column("")
    for title in (*(title for title, _, _ in COLUMNS), "expert mismatches"):
        table.add_column(title, justify="right")
    for source, run in report.columns:
        table.add_row(f"{source}, {run.variant.key}", *_cells(run.all), str(int(run.choices.differs.sum())))
    table.add_row("noise floor", *_cells(report.floor), "")
    console.print(table)
    for gate in report.gates:
        verdict = "[green]pass[/]" if gate.passed else "[bold red]FAIL[/]"
        where = f" ({gate.variant})" if gate.variant else ""
        console.print(f"{verdict}  {gate.title}{where}: {number_text(gate.found)}, {limit_text(gate)}")
    for failure in report.tensors.failures:
        console.print(f"      {failure}", markup=False, soft_wrap=True)
    reference = f"The reference has perplexity {plain_text(report.headline.all.ppl_reference)}."
    noise = [NO_NOISE] if report.floor.nmse == 0 else []
    perplexity = perplexity_text([report.ids["source"]])
    for said in (*report.unchecked, *noise, f"{reference} {perplexity}"):
        console.print(f"note  {said}", markup=False, soft_wrap=True)
    console.print(f"[bold]{'PASS' if report.passed else 'FAIL'}[/]  report: {html}")


CARD_EXAMPLES = """\
examples:
  mkdir -p hub
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o hub/kimi-Q8_0.gguf --type Q8_0
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o hub/kimi-q4.gguf --recipe kimi-q4
  validate-kimi card hub --checkpoint Kimi-Linear-48B-A3B-Instruct
      validate both files; write hub/README.md, the reports and the plots; hub/ is ready to be uploaded

After adding a file, run the command again with --force. It does not validate a file again if the report in
FOLDER/validation is of the same bytes, checkpoint, tokens, cache type and precision, and with --upstream compares with
upstream llama.cpp. If a file is added, replaced or removed while the others are validated, no card is written.

exit status: 0 all gates of all files passed; 1 a gate failed (the card says so); 2 bad input; 130 interrupted.
"""


def _card_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} card",
        description="Validate all GGUF files of a folder. Write their reports, and README.md, a model card with a "
        "table and plots.",
        epilog=CARD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="folder of GGUF files that were made from one checkpoint")
    add(
        "--force",
        action="store_true",
        help="overwrite README.md if it exists; what convert-kimi --model-card wrote there is kept",
    )
    _add_run_options(parser, "files were")
    return parser


def _card(words: Sequence[str]) -> int:
    """`validate-kimi card`: validate the files of a folder and write their model card."""
    options = _card_parser().parse_args(words)
    try:
        check_paths(options)
        _load_packages()
        from kimi_gguf.validate.card import facts_of
        from kimi_gguf.validate.card_files import (
            card_files,
            check_card_place,
            check_licences,
            check_unchanged,
            models_of,
            other_kinds,
            stamps_in,
            write_card,
        )
        from kimi_gguf.validate.pipeline import check_model

        found = stamps_in(options.folder)
        paths = models_of(options.folder)
        for path, kind in other_kinds(options.folder).items():
            print(
                f"{PROGRAM}: note: {path.name} is left out: it is no model ({printable(kind):.40})",
                file=sys.stderr,
            )
        check_card_place(options.folder, paths, options.force, options.checkpoint)
        requests = [_request(options, path) for path in paths]
        for path in paths:  # before the first of them is validated, which takes long
            check_model(path, options.checkpoint)
        check_licences(paths, options.checkpoint)
        engine, upstream = _engines(options)
        with reporting() as reporter:
            files = card_files(requests, options.folder, engine, upstream, reporter)
        with open_checkpoint(options.checkpoint) as checkpoint:
            notes = list(model_notes(checkpoint.config))
        # not while convert-kimi --model-card writes its file and the card
        with folder_lock(options.folder, wait=True):
            check_unchanged(options.folder, found)
            check_card_place(options.folder, paths, options.force, options.checkpoint)
            card = write_card(files, options.folder, notes)
    except BrokenPipeError:
        raise  # see scripts/commands.py
    except (KimiError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; finished reports are kept, no card was written", file=sys.stderr)
        return INTERRUPTED
    failed = [file.path.name for file in files if not file.report.passed]
    if not options.quiet:
        print(f"{card}: {len(files)} files" + "".join(f"\nFAIL  {name}" for name in failed))
        if note := licence_note(facts_of(files), card, options.checkpoint):
            print(f"{PROGRAM}: note: {note}", file=sys.stderr)
    return GATE_FAILED if failed else PASSED


def _show_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} show",
        description="Print the figures of reports.",
    )
    parser.add_argument("reports", metavar="REPORT", type=Path, nargs="+", help="a report.json")
    return parser


def _show(words: Sequence[str]) -> int:
    """`validate-kimi show`: print the figures of stored reports."""
    options = _show_parser().parse_args(words)
    try:
        check_paths(options)
        reports = [read_report(path) for path in options.reports]
    except KimiError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    table = Table()
    for title in ("file", "type", "gates"):
        table.add_column(title)
    for title in ("bytes", *(title for title, _, _ in COLUMNS)):
        table.add_column(title, justify="right")
    for each in reports:
        verdict = f"{'pass' if each.passed else 'FAIL'}, {sum(each.gates)} of {len(each.gates)}"
        for run in each.runs:
            cells = (printable(f"{each.name}, {run.title}"), printable(each.type), verdict, f"{each.bytes:,}")
            table.add_row(*map(Text, (*cells, *_cells(run.all))))
        table.add_row("  noise floor", "", "", "", *_cells(each.floor), end_section=True)
    _Output(160).print(table)
    print(perplexity_text([each.source for each in reports]))
    if len({each.basis.ids_sha256 for each in reports}) > 1:
        print("The reports are of different tokens: their figures cannot be compared.")
    return PASSED if all(each.passed for each in reports) else GATE_FAILED


def _cells(summary: Summary) -> list[str]:
    return [FORMATS[form](getattr(summary, figure)) for _, figure, form in COLUMNS]


if __name__ == "__main__":
    sys.exit(main())
