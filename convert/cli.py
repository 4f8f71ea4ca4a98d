"""`convert-kimi`: a Kimi-Linear checkpoint becomes a GGUF file.

Flows in: arguments. Flows out: the file, or with --dry-run a table of the plan; progress on standard error;
an exit status: 0 done, 1 something is wrong with the checkpoint or the place to write, 2 wrong arguments,
130 interrupted. Everything that parses arguments or prints results is here.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final

from .errors import ConvertError
from .mixes import Request
from .pipeline import Options, convert, plan_only
from .plan import Plan
from .progress import PROGRAM, Teller, for_people, for_programs, quiet, say
from .quantise import ALIASES, TENSOR_TYPES, TYPES, FileType, TensorType
from .unfinished import leftover
from .writer import file_size

FAILED: Final = 1
INTERRUPTED: Final = 130
EXAMPLES: Final = f"""\
types: {", ".join(TYPES)}
  (all but F32, F16 and BF16 want the engine, which `kimi-llama build` makes)

examples:
  convert-kimi Kimi-Linear-48B-A3B-Instruct --type Q8_0 --dry-run
      check the checkpoint and show what would be written
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o kimi-linear-Q4_K_M.gguf --type Q4_K_M
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o kimi-linear-Q4_K_M.gguf --type Q4_K_M --resume
      go on after an interrupt, a full disk or a power cut
  convert-kimi model.safetensors -o model.gguf --type IQ3_M --imatrix imatrix.gguf --tensor-type attn_v_b=Q8_0

exit status: 0 done; 1 the checkpoint or the place to write is at fault, said in one line; 2 wrong arguments;
130 interrupted. Whatever happens, OUT appears whole or not at all.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.output is None and not options.dry_run:
        parser.error("the output file is missing: give -o OUT, or --dry-run")
    try:
        with _terminable():
            if options.dry_run:
                print(plan_text(plan_only(options.source, _request(options), _options(options))))
            else:
                _convert(options)
            sys.stdout.flush()
    except ConvertError as error:
        return _failed(str(error), options.json)
    except KeyboardInterrupt:
        left = leftover(options.output) if options.output else None
        what = f"go on with --resume ({left.name} is kept)" if left else "nothing was written"
        print(f"{PROGRAM}: interrupted; {what}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the table has seen enough
        with suppress(OSError):
            sys.stdout.close()
    except OSError as error:
        return _failed(str(error), options.json)
    return 0


def _failed(message: str, as_json: bool) -> int:
    if as_json:
        say("error", message=message)
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Convert a Kimi-Linear checkpoint (safetensors) to GGUF, running none of its code.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="checkpoint folder, or its .safetensors file")
    add("-o", "--output", metavar="OUT", type=Path, help="the GGUF file to write")
    add("--type", metavar="TYPE", type=_file_type, default=TYPES["BF16"], help="of the file (default: BF16)")
    add("--imatrix", metavar="FILE", type=Path, help="importance matrix, made by llama-imatrix")
    add("--output-tensor-type", metavar="T", type=_tensor_type, help="type of output.weight")
    add("--token-embedding-type", metavar="T", type=_tensor_type, help="type of token_embd.weight")
    add(
        "--tensor-type",
        metavar="PATTERN=T",
        type=_override,
        action="append",
        default=[],
        help="type of the tensors whose name the regular expression finds; may be given more than once",
    )
    add("--pure", action="store_true", help="no mix: all tensors of the one type")
    add("--name", help="the model's name inside the file (default: that of its folder)")
    add("--dry-run", action="store_true", help="check all but the values and print the plan")
    add(
        "--resume",
        action="store_true",
        help="go on with an unfinished OUT of the same checkpoint and options",
    )
    add("--force", action="store_true", help="overwrite OUT")
    add("--max-memory", metavar="SIZE", type=_size, help="of the whole process, as 700M or 1.5G")
    add("--quiet", action="store_true", help="print errors only")
    add("--json", action="store_true", help="progress and outcome as JSON lines on standard output")
    return parser


def _file_type(text: str) -> FileType:
    name = ALIASES.get(text.upper(), text.upper())
    if name not in TYPES:
        raise argparse.ArgumentTypeError(f"no type {text!r}; there are {', '.join(TYPES)}")
    return TYPES[name]


def _tensor_type(text: str) -> TensorType:
    if text.upper() not in TENSOR_TYPES:
        raise argparse.ArgumentTypeError(f"no tensor type {text!r}; there are {', '.join(TENSOR_TYPES)}")
    return TENSOR_TYPES[text.upper()]


def _override(text: str) -> tuple[str, TensorType]:
    pattern, mark, kind = text.partition("=")
    if not pattern or not mark:
        raise argparse.ArgumentTypeError(f"expected PATTERN=TYPE, found {text!r}")
    return pattern, _tensor_type(kind)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size as 700M or 1.5G, found {text!r}")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def _request(options: argparse.Namespace) -> Request:
    return Request(
        options.type,
        options.output_tensor_type,
        options.token_embedding_type,
        tuple(options.tensor_type),
        options.pure,
    )


def _options(options: argparse.Namespace) -> Options:
    return Options(options.name, options.imatrix, options.force, options.resume, options.max_memory)


def _convert(options: argparse.Namespace) -> None:
    began = time.monotonic()
    tell: Teller = quiet if options.quiet else for_programs if options.json else for_people
    if not options.quiet and not options.resume and (left := leftover(options.output)):
        print(
            f"{PROGRAM}: note: {left.name} of an earlier run is begun anew (--resume goes on)",
            file=sys.stderr,
        )
    plan = convert(options.source, options.output, _request(options), _options(options), progress=tell)
    seconds = time.monotonic() - began
    if options.json:
        say("done", file=os.fspath(options.output), bytes=file_size(plan), seconds=round(seconds, 3))
    elif not options.quiet:
        print(
            f"{options.output}: {file_size(plan):,} bytes, {len(plan.tensors)} tensors ({_types(plan)}) "
            f"in {seconds:.1f} s",
            file=sys.stderr,
        )


def plan_text(plan: Plan) -> str:
    """The plan as a table: each output tensor, its type, shape (ggml order), bytes and sources."""
    rows = [("tensor", "type", "shape", "bytes", "from")]
    for tensor in plan.tensors:
        output = tensor.output
        sources = (
            output.sources[0] if len(output.sources) == 1 else f"{output.sources[0]} .. {output.sources[-1]}"
        )
        how = "" if output.transform.value == "copy" else f" ({output.transform.value})"
        shape = " x ".join(str(n) for n in output.ne)
        rows.append((tensor.name, tensor.type.name, shape, f"{tensor.nbytes:,}", sources + how))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{name:{widths[0]}}  {kind:{widths[1]}}  {shape:{widths[2]}}  {size:>{widths[3]}}  {origin}"
        for name, kind, shape, size, origin in rows
    ]
    total = f"{len(plan.tensors)} tensors ({_types(plan)}), {len(plan.keys)} keys, {file_size(plan):,} bytes"
    return "\n".join([*lines, total, *(f"note: {note}" for note in plan.notes)])


def _types(plan: Plan) -> str:
    counts = Counter(tensor.type.name for tensor in plan.tensors)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


@contextmanager
def _terminable() -> Iterator[None]:
    """A polite kill ends as Ctrl-C does. What nohup ignores stays ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [name for name in names if signal.getsignal(name) is not signal.SIG_IGN]
    before = [(name, signal.signal(name, stop)) for name in heeded]
    try:
        yield
    finally:
        for name, handler in before:
            signal.signal(name, handler)


if __name__ == "__main__":
    sys.exit(main())
