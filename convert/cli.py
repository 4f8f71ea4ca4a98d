"""`convert-kimi`: convert a checkpoint with Kimi Delta Attention to a GGUF file; verify and inspect GGUF files.

Input: arguments. Output: the file, or with --dry-run a table of the plan; progress on standard error; the exit
status (0 done, 1 the checkpoint or the output cannot be used, 2 wrong arguments, 130 interrupted). This is the only
module of the package that parses arguments or prints results.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from kimi_gguf.convert.adapter.argument import scaled_path
from kimi_gguf.convert.adapter.gguf import TYPES_OF_ADAPTERS, convert_adapter
from kimi_gguf.convert.adapter.pairs import has_adapter, is_adapter
from kimi_gguf.convert.adapter.peft_config import read_peft_config
from kimi_gguf.convert.card.text import licence_note
from kimi_gguf.convert.conversion import Options, convert, plan_only, silent, silently
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.inspect_model import inspect_model, summary_text
from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.output.unfinished import leftover
from kimi_gguf.convert.plan import Plan, type_counts
from kimi_gguf.convert.progress import PROGRAM, for_people, for_programs, say
from kimi_gguf.convert.source.checkpoint import exists
from kimi_gguf.convert.source.origin import CARD
from kimi_gguf.convert.types.file_types import ALIASES, TYPES, FileType
from kimi_gguf.convert.types.mixes import RECIPES, TypeRequest
from kimi_gguf.convert.verify import verify
from kimi_gguf.engine.interrupts import INTERRUPTED, terminable
from kimi_gguf.engine.path_check import check_paths
from kimi_gguf.engine.progress import reporting
from kimi_gguf.engine.tensor_types import TENSOR_TYPES, TensorType
from kimi_gguf.engine.version import VERSION
from kimi_gguf.patches.errors import KimiError

T = TypeVar("T")
FAILED: Final = 1
SPLIT_UNITS: Final = {"G": 10**9, "M": 10**6, "K": 10**3, "B": 1}
SOURCE: Final = "a folder, a .safetensors file, or a Hugging Face id OWNER/NAME[@REVISION]"
EXAMPLES: Final = f"""\
types: {", ".join(TYPES)}
  (all types except F32, F16, BF16 and packed experts that stay MXFP4 use llama.cpp: the wheel contains it,
  elsewhere run `kimi-llama build`)

examples:
  convert-kimi Kimi-Linear-48B-A3B-Instruct --type Q8_0 --dry-run
      check the checkpoint and print the plan
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o kimi-linear-Q4_K_M.gguf --type Q4_K_M
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o kimi-linear-Q4_K_M.gguf --type Q4_K_M --resume
      continue after an interrupt, a full disk or a power failure; without --resume this is refused, and
      --force would start again
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o kimi-linear-q4.gguf --recipe kimi-q4
  convert-kimi moonshotai/Kimi-Linear-48B-A3B-Instruct -o kimi-linear-q4.gguf --recipe kimi-q4
      stream from Hugging Face without storing the weights; @REVISION selects a branch, tag or commit
  convert-kimi model.safetensors -o model.gguf --type IQ3_M --imatrix imatrix.gguf --tensor-type attn_v_b=Q8_0
  convert-kimi moonshotai/Kimi-K3 -o kimi-k3.gguf --split-max-size 50G --chat-template Kimi-K3.jinja
      routed experts keep their MXFP4 values, all other matrices are BF16
  convert-kimi Kimi-Linear-48B-A3B-Instruct -o kimi-linear-BF16.gguf --split-max-size 40G --model-card
      write splits kimi-linear-BF16-00001-of-00003.gguf ..., and a README.md for Hugging Face
  convert-kimi my-adapter -o my-adapter.gguf --base Kimi-Linear-48B-A3B-Instruct
      convert a LoRA adapter of PEFT, for --lora of kimi-llama run, chat and serve
  convert-kimi Kimi-Linear-48B-A3B-Instruct --adapter my-adapter -o merged-q4.gguf --recipe kimi-q4
      merge the adapter into the weights, in float32, before they are quantized
  convert-kimi verify kimi-linear-q4.gguf --checkpoint Kimi-Linear-48B-A3B-Instruct
      verify a file by converting it again and comparing bytes; of a split model give the first split
  convert-kimi inspect kimi-linear-q4.gguf --context 131072
      show layers, types, sizes, and the memory that the caches need

exit status: 0 done; 1 the checkpoint or the output cannot be used (one line says why); 2 wrong arguments;
130 interrupted. OUT appears only when it is complete; of splits, the first appears last.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS.get(words[0]) if words else None
    parser, act = (command[0](), command[1]) if command else (_parser(), _convert)
    if not command and (wrong := _unknown_command(words)):
        parser.error(wrong)
    options = parser.parse_args(words[1:] if command else words)
    if act is _convert and options.output is None and not options.dry_run:
        parser.error("expected an output file: give -o OUT, or --dry-run")
    if act is _convert and options.recipe and (given := _types_of_all(options)):
        parser.error(f"--recipe: sets the types of all tensors; remove {' and '.join(given)}")
    try:
        check_paths(options)
        if act is _convert and is_adapter(options.source):
            act = _convert_adapter
        elif act is _convert and options.base is not None:
            parser.error("--base: SRC is not the folder of an adapter (adapter_config.json)")
        with terminable():
            return act(options)
    except KimiError as error:
        return _failed(str(error), options.json)
    except KeyboardInterrupt:
        output = getattr(options, "output", None)
        left = leftover(output) if output else None
        what = f"continue with --resume ({left.name} is kept)" if left else "nothing was written"
        print(f"{PROGRAM}: interrupted; {what}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise  # see scripts/commands.py
    except OSError as error:
        return _failed(str(error), options.json)


def _unknown_command(words: Sequence[str]) -> str:
    """What is wrong if the first word seems to be meant as a command; empty if it does not."""
    word, *others = words or [""]
    if not word.isalpha() or exists(Path(word)):
        return ""
    hint = _did_you_mean(word, COMMANDS)
    alone = not others or others[0].startswith("-")
    if alone and not hint:
        return ""
    return f"{word!r}: expected a checkpoint, {' or '.join(COMMANDS)}{hint}"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f"; did you mean {found[0]}?" if found else ""


def _failed(message: str, as_json: bool) -> int:
    if as_json:
        say("error", message=message)
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} SRC -o OUT [options]\n       {PROGRAM} ADAPTER -o OUT --base CHECKPOINT [--type T]\n"
        f"       {PROGRAM} verify OUT --checkpoint SRC [--imatrix FILE]\n"
        f"       {PROGRAM} inspect PATH [--context N]",
        description="Convert a model with KDA (Kimi-Linear, Ling 3, Kimi K3) to GGUF without running its code.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    flag = partial(add, action="store_true")
    add("--version", action="version", version=f"kimi-gguf {VERSION}")
    add("source", metavar="SRC", help=f"the checkpoint: {SOURCE}; or the folder of a LoRA adapter of PEFT")
    add("-o", "--output", metavar="OUT", type=Path, help="the GGUF file to write")
    text = "quantize to this file type (default: BF16; MXFP4 routed experts of the checkpoint stay MXFP4, as with "
    add("--type", metavar="TYPE", type=_file_type, help=f"{text}--recipe mxfp4)")
    add(
        "--recipe", choices=RECIPES, help="use one of the project's own quantization mixes, instead of --type"
    )
    add("--imatrix", metavar="FILE", type=Path, help="use this importance matrix, made by llama-imatrix")
    add("--output-tensor-type", metavar="T", type=_tensor_type, help="set the type of output.weight")
    add("--token-embedding-type", metavar="T", type=_tensor_type, help="set the type of token_embd.weight")
    add(
        "--tensor-type",
        metavar="PATTERN=T",
        type=_override,
        action="append",
        default=[],
        help="set the type of the tensors whose names match a regular expression; may be repeated",
    )
    text = "the checkpoint of an adapter (default: the one that its config names)"
    add("--base", metavar="CHECKPOINT", help=text)
    _add_adapters(
        parser, "merge this LoRA adapter of PEFT into the weights, times SCALE (default: 1); may be repeated"
    )
    flag("--no-mtp", help="leave out layers that predict further tokens (Ling 3); the file cannot draft then")
    flag("--pure", help="use TYPE for all tensors instead of its mix")
    flag(
        "--model-card",
        help="also write README.md, a model card for Hugging Face, to the folder of OUT; it lists "
        "all GGUF files there of the same checkpoint",
    )
    add(
        "--quantized-by", metavar="WHO", help="name the author of the file in its metadata and the model card"
    )
    text = "use this chat template (Jinja) instead of the checkpoint's"
    add("--chat-template", metavar="FILE", type=Path, help=text)
    add("--name", help="set the model's name in the metadata (default: that of the checkpoint's folder)")
    flag("--dry-run", help="check the checkpoint without reading weights; print the plan")
    flag("--resume", help="continue an unfinished OUT of the same checkpoint and options")
    flag(
        "--force",
        help="overwrite OUT if it exists, with --model-card also README.md; without --resume, discard an unfinished "
        "OUT",
    )
    add(
        "--split-max-size",
        metavar="SIZE",
        type=_split_size,
        help="split OUT into files NAME-00001-of-00003.gguf of at most SIZE, for example 40G or 500M "
        "(10^9 and 10^6 bytes, as in llama-gguf-split; also K, and B for bytes; default: one file)",
    )
    _add_max_memory(parser)
    flag("--quiet", help="print errors only")
    flag("--json", help="print progress and result as JSON lines on standard output")
    return parser


def _add_adapters(parser: argparse.ArgumentParser, text: str) -> None:
    add = parser.add_argument
    add("--adapter", metavar="FOLDER[:SCALE]", type=scaled_path, action="append", default=[], help=text)


def _add_max_memory(parser: argparse.ArgumentParser) -> None:
    text = "limit the memory of the process, for example 700M or 1.5G (default: what is available)"
    parser.add_argument("--max-memory", metavar="SIZE", type=_memory_size, help=text)


def _one_of(table: Mapping[str, T], name: str, text: str) -> T:
    if name not in table:
        hint = _did_you_mean(name, table)
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(table)}, found {text!r}{hint}")
    return table[name]


def _file_type(text: str) -> FileType:
    if text.lower() in RECIPES:
        raise argparse.ArgumentTypeError(f"{text!r} is a mix of several types: --recipe {text.lower()}")
    return _one_of(TYPES, ALIASES.get(text.upper(), text.upper()), text)


def _tensor_type(text: str) -> TensorType:
    return _one_of(TENSOR_TYPES, text.upper(), text)


def _override(text: str) -> tuple[str, TensorType]:
    pattern, mark, kind = text.partition("=")
    if not pattern or not mark:
        raise argparse.ArgumentTypeError(f"expected PATTERN=TYPE, found {text!r}")
    return pattern, _tensor_type(kind)


def _memory_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 700M or 1.5G, found {text!r}")
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
    if size < 1 << 20:
        raise argparse.ArgumentTypeError(f"expected at least 1M, such as 700M or 1.5G, found {text!r}")
    return size


def _split_size(text: str) -> int:
    """A size in powers of ten, as in llama-gguf-split. Bytes without a unit are accepted from 1 MiB on: a smaller
    number lacks its unit."""
    match = re.fullmatch(r"(\d{1,15})([BKMG]?)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 40G or 500M, found {text!r}")
    number, unit = int(match[1]), match[2]
    if not unit and number < 1 << 20:
        what = f"expected a size with its unit, such as 40G or 500M, found {text!r}"
        raise argparse.ArgumentTypeError(f"{what}; {number}B would be bytes")
    return number * SPLIT_UNITS[unit or "B"]


def _split_size_text(size: int) -> str:
    return next(f"{size // factor}{unit}" for unit, factor in SPLIT_UNITS.items() if size % factor == 0)


def _types_of_all(options: argparse.Namespace) -> list[str]:
    """The given options that a recipe replaces."""
    return [word for word, value in (("--type", options.type), ("--pure", options.pure)) if value]


def _request(options: argparse.Namespace) -> TypeRequest:
    """The requested types; the user's options take precedence over those of a mix."""
    plain = TypeRequest(options.type or TYPES["BF16"], default=options.type is None and not options.pure)
    recipe = RECIPES[options.recipe] if options.recipe else plain
    return replace(
        recipe,
        output_type=options.output_tensor_type or recipe.output_type,
        embedding_type=options.token_embedding_type or recipe.embedding_type,
        overrides=(*options.tensor_type, *recipe.overrides),
        pure=options.pure,
    )


def _command(options: argparse.Namespace) -> Iterator[str]:
    """The options that determine the file's content, for the model card; paths have no folders."""
    yield from (PROGRAM, Path(options.source).absolute().name)
    if options.output:
        yield from ("-o", options.output.name)
    if options.recipe:
        yield from ("--recipe", options.recipe)
    elif options.type:
        yield from ("--type", options.type.name)
    words = (
        ("--imatrix", options.imatrix and options.imatrix.name),
        ("--output-tensor-type", options.output_tensor_type and options.output_tensor_type.name),
        ("--token-embedding-type", options.token_embedding_type and options.token_embedding_type.name),
        *(("--tensor-type", f"{pattern}={kind.name}") for pattern, kind in options.tensor_type),
        *(("--adapter", f"{folder.absolute().name}:{scale}") for folder, scale in options.adapter),
        ("--split-max-size", options.split_max_size and _split_size_text(options.split_max_size)),
        ("--chat-template", options.chat_template and options.chat_template.name),
        ("--name", options.name),
        ("--quantized-by", options.quantized_by),
    )
    for option, value in words:
        if value:
            yield from (option, value)
    yield from ["--pure"] if options.pure else []
    yield from ["--no-mtp"] if options.no_mtp else []
    yield "--model-card"


def _convert(options: argparse.Namespace) -> int:
    request = _request(options)
    wanted = Options(
        options.name,
        options.imatrix,
        options.force,
        options.resume,
        options.max_memory,
        options.split_max_size,
        options.quantized_by,
        mtp=not options.no_mtp,
        card=tuple(_command(options)) if options.model_card else (),
        chat_template=options.chat_template,
        adapters=tuple(options.adapter),
    )
    if has_adapter(options.source) and not options.adapter and not options.quiet:
        print(
            f"{PROGRAM}: note: {options.source} also has a LoRA adapter, which is not merged: --adapter "
            f"{options.source} merges it",
            file=sys.stderr,
        )
    if options.dry_run:
        print(plan_text(plan_only(options.source, request, wanted), options.output or Path("OUT.gguf")))
        return 0
    began = time.monotonic()
    display = silent if options.quiet else for_programs if options.json else for_people
    if options.force and not options.resume and not options.quiet and (left := leftover(options.output)):
        print(f"{PROGRAM}: note: discarding {left.name} of an earlier run", file=sys.stderr)
    shown = silently if options.quiet or options.json else reporting
    plan = convert(options.source, options.output, request, wanted, display, shown)
    seconds = time.monotonic() - began
    files = [str(file) for file in plan.paths(options.output)]
    if options.json:
        say("done", file=files[0], files=files, bytes=plan.nbytes, seconds=round(seconds, 3))
    elif not options.quiet:
        size = f"{plan.nbytes:,} bytes{_in_splits(plan)}"
        tensors = f"{len(plan.tensors)} tensors ({type_counts(plan.tensors)})"
        print(f"{files[0]}: {size}, {tensors} in {seconds:.1f} s", file=sys.stderr)
        for note in plan.results:
            print(f"{PROGRAM}: note: {note}", file=sys.stderr)
        facts = {key.name: key.value for key in plan.keys}
        card = options.output.with_name(CARD)
        if options.model_card and (note := licence_note(facts, card, options.source)):
            print(f"{PROGRAM}: note: {note}", file=sys.stderr)
    return 0


# Options that adapters take; the others belong to models.
_OF_ADAPTERS: Final = ("source", "output", "type", "base", "name", "force", "quiet", "json")


def _convert_adapter(options: argparse.Namespace) -> int:
    """Convert an adapter instead of a model."""
    defaults = vars(_parser().parse_args(["x"]))
    if ignored := [name for name, value in vars(options).items()
                   if name not in _OF_ADAPTERS and value != defaults[name]]:  # fmt: skip
        option = f"--{ignored[0].replace('_', '-')}"
        raise ConvertError(
            f"{options.source}: is an adapter", todo=f"leave out {option}, which is for models"
        )
    kind = options.type or TYPES["F32"]
    if kind.name not in TYPES_OF_ADAPTERS:
        raise ConvertError(
            f"{options.source}: is an adapter",
            expected=f"--type {', '.join(TYPES_OF_ADAPTERS)}",
            found=kind.name,
        )
    folder = Path(options.source)
    base = options.base or read_peft_config(folder).base
    if base is None:
        raise ConvertError(f"{folder}: names no base model", todo="give its checkpoint: --base CHECKPOINT")
    display = silent if options.quiet else for_programs if options.json else for_people
    plan = convert_adapter(
        folder, base, options.output, kind, name=options.name, overwrite=options.force, progress=display
    )
    if options.json:
        say("done", file=str(options.output), files=[str(options.output)], bytes=plan.nbytes)
    elif not options.quiet:
        tensors = f"{len(plan.tensors)} tensors ({type_counts(plan.tensors)})"
        print(f"{options.output}: {plan.nbytes:,} bytes, {tensors}, an adapter of {base}", file=sys.stderr)
    return 0


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} verify",
        description="Verify a GGUF file by converting its checkpoint again and comparing all tensors and metadata.",
    )
    add = parser.add_argument
    add(
        "file",
        metavar="GGUF",
        type=Path,
        help="file to verify (of a split model, the first split); it determines the types",
    )
    add("--checkpoint", metavar="SRC", required=True, help=f"checkpoint that it was made from: {SOURCE}")
    add("--imatrix", metavar="FILE", type=Path, help="importance matrix that it was made with, if any")
    add("--chat-template", metavar="FILE", type=Path, help="chat template that it was made with, if any")
    _add_adapters(parser, "adapter that was merged into it, if any; may be repeated")
    _add_max_memory(parser)
    add("--json", action="store_true", help="print the result as a JSON line")
    return parser


def _verify(options: argparse.Namespace) -> int:
    display = silent if options.json else for_people
    verdict = verify(
        options.file, options.checkpoint, options.imatrix, options.max_memory, options.chat_template, display,
        options.adapter,
    )  # fmt: skip
    if options.json:
        say("verdict", proved=verdict.proved, **vars(verdict))
    else:
        outcome = "identical to a new conversion" if verdict.proved else "NOT identical to a new conversion"
        summary = f"{options.file}: {verdict.tensors} tensors, {verdict.nbytes:,} bytes: {outcome}"
        print(*verdict.wrong_keys, *verdict.wrong_tensors, summary, sep="\n")
    return 0 if verdict.proved else FAILED


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} inspect",
        description="Show the layers, types and sizes of a GGUF file or a checkpoint; reads headers only.",
    )
    add = parser.add_argument
    what = f"a GGUF file (of a split model, the first split), or a checkpoint: {SOURCE}"
    add("path", metavar="PATH", help=what)
    what = "show cache sizes for N tokens (default: %(default)s)"
    add("--context", metavar="N", type=int, default=32768, help=what)
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _inspect(options: argparse.Namespace) -> int:
    summary = inspect_model(options.path, options.context)
    print(json.dumps(asdict(summary)) if options.json else summary_text(summary))
    return 0


COMMANDS: Final = {"verify": (_verify_parser, _verify), "inspect": (_inspect_parser, _inspect)}


def plan_text(plan: Plan, output: Path) -> str:
    """The plan as a table: name, type, shape (ggml order), bytes and sources of each output tensor. If there are
    several files, the name and size of each are printed before its tensors."""
    rows = [("tensor", "type", "shape", "bytes", "from"), *(_row(tensor) for tensor in plan.tensors)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    head, *lines = [
        f"{name:{widths[0]}}  {kind:{widths[1]}}  {shape:{widths[2]}}  {size:>{widths[3]}}  {origin}"
        for name, kind, shape, size, origin in rows
    ]
    text, first = [head], 0
    for file, path in zip(plan.files, plan.paths(output), strict=True):
        count = len(file.tensors)
        text += [f"{path.name}: {count} tensors, {file.nbytes:,} bytes"] if len(plan.files) > 1 else []
        text += lines[first : first + count]
        first += count
    tensors = f"{len(plan.tensors)} tensors ({type_counts(plan.tensors)})"
    total = f"{tensors}, {len(plan.keys)} keys, {plan.nbytes:,} bytes{_in_splits(plan)}"
    return "\n".join([*text, total, *(f"note: {note}" for note in plan.notes)])


def _in_splits(plan: Plan) -> str:
    return f" in {len(plan.files)} splits" if len(plan.files) > 1 else ""


def _row(tensor: PlannedTensor) -> tuple[str, str, str, str, str]:
    output = tensor.output
    first, last = output.sources[0], output.sources[-1]
    sources = first if first == last else f"{first} .. {last}"
    how = "" if output.transform.value == "copy" else f" ({output.transform.value})"
    sources += f" x {output.factor[0]}" if output.factor else ""
    shape = " x ".join(str(n) for n in output.ne)
    return tensor.name, tensor.type.name, shape, f"{tensor.nbytes:,}", sources + how


if __name__ == "__main__":
    sys.exit(main())
