"""`convert-kimi`: a Kimi-Linear checkpoint becomes a GGUF file.

Flows in: arguments. Flows out: the file, or with --dry-run a table of the plan; progress on standard error;
an exit status: 0 done, 1 something is wrong with the checkpoint or the place to write, 2 wrong arguments,
130 interrupted. Everything that parses arguments or prints results is here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Final

from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.inspect_model import inspect_model, summary_text
from kimi_gguf.convert.model.tensors import PlannedTensor
from kimi_gguf.convert.output.files import PlannedFile
from kimi_gguf.convert.output.unfinished import leftover
from kimi_gguf.convert.pipeline import Options, convert, plan_only
from kimi_gguf.convert.plan import Plan
from kimi_gguf.convert.progress import PROGRAM, Teller, for_people, for_programs, quiet, say
from kimi_gguf.convert.types.mixes import TypeRequest
from kimi_gguf.convert.types.named_mixes import RECIPES
from kimi_gguf.convert.types.tensor_types import ALIASES, TYPES, FileType
from kimi_gguf.convert.verify import verify
from kimi_gguf.engine.gguf import GgufError
from kimi_gguf.engine.tensor_types import TENSOR_TYPES, TensorType

FAILED: Final = 1
INTERRUPTED: Final = 130
SOURCE: Final = "its folder, its .safetensors file, or its hub id, OWNER/NAME[@REVISION]"
EXAMPLES: Final = f"""\
types: {", ".join(TYPES)}
  (all but F32, F16 and BF16 want the engine, which `kimi-llama build` makes)

examples:
  convert-kimi Kimi-Linear-48B-A3B-Instruct --type Q8_0 --dry-run
      check the checkpoint and show what would be written
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o kimi-linear-Q4_K_M.gguf --type Q4_K_M
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o kimi-linear-Q4_K_M.gguf --type Q4_K_M --resume
      go on after an interrupt, a full disk or a power cut
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o kimi-linear-q4.gguf --recipe kimi-q4
  convert-kimi moonshotai/Kimi-Linear-48B-A3B-Instruct -o kimi-linear-q4.gguf --recipe kimi-q4
      from the hub, by ranges: the weights are never on disk; @REVISION pins a branch, tag or commit
  convert-kimi model.safetensors -o model.gguf --type IQ3_M --imatrix imatrix.gguf --tensor-type attn_v_b=Q8_0
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o kimi-linear-BF16.gguf --split-max-size 40G --model-card
      parts kimi-linear-BF16-00001-of-00003.gguf .., and a README.md for a model hub
  convert-kimi verify kimi-linear-q4.gguf --checkpoint Kimi-Linear-48B-A3B-Instruct
      make every byte anew and compare; of a model in parts give the first, here and everywhere
  convert-kimi inspect kimi-linear-q4.gguf --context 131072
      layers, types, sizes, and what the caches take

exit status: 0 done; 1 the checkpoint or the place to write is at fault, said in one line; 2 wrong arguments;
130 interrupted. Whatever happens, OUT appears whole or not at all; of parts, the first only when all are there.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS.get(words[0]) if words else None
    parser, act = (command[0](), command[1]) if command else (_parser(), _convert)
    options = parser.parse_args(words[1:] if command else words)
    if act is _convert and options.output is None and not options.dry_run:
        parser.error("the output file is missing: give -o OUT, or --dry-run")
    try:
        with _terminable():
            status = act(options)
            sys.stdout.flush()
            return status
    except (ConvertError, GgufError) as error:
        return _failed(str(error), options.json)
    except KeyboardInterrupt:
        output = getattr(options, "output", None)
        left = leftover(output) if output else None
        what = f"go on with --resume ({left.name} is kept)" if left else "nothing was written"
        print(f"{PROGRAM}: interrupted; {what}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the table has seen enough
        with suppress(OSError):
            sys.stdout.close()
        return 0
    except OSError as error:
        return _failed(str(error), options.json)


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
    add("source", metavar="SRC", help=f"the checkpoint: {SOURCE}")
    add("-o", "--output", metavar="OUT", type=Path, help="the GGUF file to write")
    add("--type", metavar="TYPE", type=_file_type, help="of the file (default: BF16)")
    add("--recipe", choices=RECIPES, help="types measured to suit this model, instead of --type")
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
    add(
        "--model-card",
        action="store_true",
        help="write README.md beside OUT: what was made of what and how, for a model hub",
    )
    add("--quantized-by", metavar="WHO", help="who made the file, for its metadata and the model card")
    add("--name", help="the model's name inside the file (default: that of its folder)")
    add("--dry-run", action="store_true", help="check all but the values and print the plan")
    add(
        "--resume",
        action="store_true",
        help="go on with an unfinished OUT of the same checkpoint and options",
    )
    add("--force", action="store_true", help="overwrite OUT")
    add(
        "--split-max-size",
        metavar="SIZE",
        type=_part_size,
        help="where OUT would be larger, parts NAME-00001-of-00003.gguf of at most SIZE, as 40G or 500M "
        "(10^9, 10^6 bytes, as llama-gguf-split has it)",
    )
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


def _part_size(text: str) -> int:
    """As llama.cpp's own tools understand it: powers of ten."""
    match = re.fullmatch(r"(\d{1,15})([kmg]?)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size as 40G or 500M, found {text!r}")
    return int(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[match[2]]


def _request(options: argparse.Namespace) -> TypeRequest:
    """What the options ask for; a recipe's choices stand behind the user's own."""
    recipe = RECIPES[options.recipe] if options.recipe else TypeRequest(options.type or TYPES["BF16"])
    if options.recipe and (options.type or options.pure):
        raise ConvertError("--recipe: says all types; leave --type and --pure out")
    return replace(
        recipe,
        output_type=options.output_tensor_type or recipe.output_type,
        embedding_type=options.token_embedding_type or recipe.embedding_type,
        overrides=(*options.tensor_type, *recipe.overrides),
        pure=options.pure,
    )


def _options(options: argparse.Namespace) -> Options:
    return Options(
        options.name,
        options.imatrix,
        options.force,
        options.resume,
        options.max_memory,
        options.split_max_size,
        options.quantized_by,
        tuple(_command(options)) if options.model_card else (),
    )


def _command(options: argparse.Namespace) -> Iterator[str]:
    """The command with all that has a say in the bytes, paths without their folders: a card is to be shared."""
    yield from (PROGRAM, Path(options.source).absolute().name)
    if options.output:
        yield from ("-o", options.output.name)
    if options.recipe:
        yield from ("--recipe", options.recipe)
    else:
        yield from ("--type", (options.type or TYPES["BF16"]).name)
    words = (
        ("--imatrix", options.imatrix and options.imatrix.name),
        ("--output-tensor-type", options.output_tensor_type and options.output_tensor_type.name),
        ("--token-embedding-type", options.token_embedding_type and options.token_embedding_type.name),
        *(("--tensor-type", f"{pattern}={kind.name}") for pattern, kind in options.tensor_type),
        ("--split-max-size", options.split_max_size and str(options.split_max_size)),
        ("--name", options.name),
        ("--quantized-by", options.quantized_by),
    )
    for option, value in words:
        if value:
            yield from (option, value)
    yield from ["--pure"] if options.pure else []
    yield "--model-card"


def _convert(options: argparse.Namespace) -> int:
    if options.dry_run:
        plan = plan_only(options.source, _request(options), _options(options))
        print(plan_text(plan, options.output or Path("OUT.gguf")))
        return 0
    began = time.monotonic()
    tell: Teller = quiet if options.quiet else for_programs if options.json else for_people
    if not options.quiet and not options.resume and (left := leftover(options.output)):
        print(
            f"{PROGRAM}: note: {left.name} of an earlier run is begun anew (--resume goes on)",
            file=sys.stderr,
        )
    plan = convert(options.source, options.output, _request(options), _options(options), progress=tell)
    seconds = time.monotonic() - began
    files = plan.paths(options.output)
    if options.json:
        say(
            "done",
            file=os.fspath(files[0]),
            files=[os.fspath(file) for file in files],
            bytes=plan.nbytes,
            seconds=round(seconds, 3),
        )
    elif not options.quiet:
        parts = f" in {len(files)} parts" if len(files) > 1 else ""
        print(
            f"{files[0]}: {plan.nbytes:,} bytes{parts}, {len(plan.tensors)} tensors ({_types(plan)}) "
            f"in {seconds:.1f} s",
            file=sys.stderr,
        )
    return 0


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} verify",
        description="Make every byte of a GGUF file anew from its checkpoint; compare.",
    )
    add = parser.add_argument
    add(
        "file",
        metavar="GGUF",
        type=Path,
        help="the file to prove, of parts the first; its own types are used",
    )
    add("--checkpoint", metavar="SRC", required=True, help=f"what it was made of: {SOURCE}")
    add("--imatrix", metavar="FILE", type=Path, help="the importance matrix it was made with, if any")
    add("--max-memory", metavar="SIZE", type=_size, help="of the whole process, as 700M or 1.5G")
    add("--json", action="store_true", help="the verdict as a JSON line")
    return parser


def _verify(options: argparse.Namespace) -> int:
    verdict = verify(options.file, options.checkpoint, options.imatrix, options.max_memory)
    if options.json:
        say("verdict", proved=verdict.proved, **vars(verdict))
        return 0 if verdict.proved else FAILED
    for complaint in (*verdict.wrong_keys, *verdict.wrong_tensors):
        print(complaint)
    outcome = "the very bytes the checkpoint gives" if verdict.proved else "NOT what the checkpoint gives"
    print(f"{options.file}: {verdict.tensors} tensors, {verdict.nbytes:,} bytes: {outcome}")
    return 0 if verdict.proved else FAILED


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} inspect",
        description="Show what a GGUF file or a checkpoint holds; reads headers only.",
    )
    parser.add_argument(
        "path", metavar="PATH", help=f"a GGUF file (of parts the first), or a checkpoint: {SOURCE}"
    )
    parser.add_argument(
        "--context", metavar="N", type=int, default=32768, help="tokens the caches are for (32768)"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    return parser


def _inspect(options: argparse.Namespace) -> int:
    summary = inspect_model(options.path, options.context)
    print(json.dumps(summary.as_json()) if options.json else summary_text(summary))
    return 0


COMMANDS: Final = {"verify": (_verify_parser, _verify), "inspect": (_inspect_parser, _inspect)}


def plan_text(plan: Plan, output: Path = Path("OUT.gguf")) -> str:
    """The plan as a table: each output tensor, its type, shape (ggml order), bytes and sources; of several files
    each with its name and bytes before its tensors."""
    parts = plan.files
    rows = [("tensor", "type", "shape", "bytes", "from"), *(_row(tensor) for tensor in plan.tensors)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    head, *lines = [
        f"{name:{widths[0]}}  {kind:{widths[1]}}  {shape:{widths[2]}}  {size:>{widths[3]}}  {origin}"
        for name, kind, shape, size, origin in rows
    ]
    text, first = [head], 0
    for part, path in zip(parts, plan.paths(output), strict=True):
        text += [f"{path.name}: {_contents(part)}"] if len(parts) > 1 else []
        text += lines[first : first + len(part.tensors)]
        first += len(part.tensors)
    total = f"{len(plan.tensors)} tensors ({_types(plan)}), {len(plan.keys)} keys, {plan.nbytes:,} bytes"
    total += f" in {len(parts)} parts" if len(parts) > 1 else ""
    return "\n".join([*text, total, *(f"note: {note}" for note in plan.notes)])


def _row(tensor: PlannedTensor) -> tuple[str, str, str, str, str]:
    output = tensor.output
    first, last = output.sources[0], output.sources[-1]
    sources = first if first == last else f"{first} .. {last}"
    how = "" if output.transform.value == "copy" else f" ({output.transform.value})"
    shape = " x ".join(str(n) for n in output.ne)
    return tensor.name, tensor.type.name, shape, f"{tensor.nbytes:,}", sources + how


def _contents(part: PlannedFile) -> str:
    return f"{len(part.tensors)} tensors, {part.nbytes:,} bytes"


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
