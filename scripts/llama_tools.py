"""llama.cpp's programs as sub-commands of `kimi-llama`: the defaults that they get, and how they are run.

Input: the name of a sub-command, a model, and what follows it. Output: the program, which replaces this process, so
that the caller gets its output, signals and exit status. Child processes are those that write a file, which gets its
name when it is complete, and `run` without a prompt, to say what is missing if the program fails.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from kimi_gguf.engine import gguf_split, quantize
from kimi_gguf.engine.addresses import addresses
from kimi_gguf.engine.build import check_runs
from kimi_gguf.engine.builds import Engine, select
from kimi_gguf.engine.errors import EngineError, UsageError
from kimi_gguf.engine.gguf import GgufError, GgufModel
from kimi_gguf.engine.gguf_check import check_mtp, check_tokenizer, check_whole, may_begin_text
from kimi_gguf.engine.hidden_output import check_outputs, run_for_output
from kimi_gguf.engine.interrupts import exit_status
from kimi_gguf.engine.limits import available_memory
from kimi_gguf.engine.split_names import place_in_set
from kimi_gguf.engine.toolchain import cores
from kimi_gguf.patches.errors import KimiError

# Lengths of ubatches, the first one that takes at most a quarter of the available memory; the last one is llama.cpp's.
_UBATCHES = (2048, 1024, 512)
# Bytes for a token of a ubatch: its row of the mask per token of the context (F16), and the graph's tensors and
# activations (computed: 40 nodes of 20 KB in ggml_backend_sched, 0.2 MiB of activations of the 48B).
_MASK, _GRAPH = 2, 1 << 20
_MOST_OF_MEMORY = 0.75  # weights up to this share of the available memory are loaded into memory


@dataclass(frozen=True)
class Default:
    """Arguments that are added unless the caller gives one of the options, or sets llama.cpp's variable for it. note:
    when they are, for the help."""

    options: tuple[str, ...]
    arguments: tuple[str, ...]
    note: str = ""
    variable: str = ""

    def __str__(self) -> str:
        note = f"  ({self.note})" if self.note else ""
        return " ".join(self.arguments).format(cores="CORES", ubatch="N") + note


@dataclass(frozen=True)
class Output:
    """The file that a tool writes, named by an option. default: its name, None for no file. unless: with these options
    it is not written."""

    options: tuple[str, ...]
    default: str | None
    unless: tuple[str, ...]


@dataclass(frozen=True)
class FilesByPosition:
    """How a tool is run that takes its output after the model, without an option."""

    check: Callable[[Path, Sequence[str]], object]  # of (model, arguments): raises `EngineError`
    run: Callable[[Path, Path, Sequence[str]], int]  # of (program, model, arguments): the exit status


@dataclass(frozen=True)
class Tool:
    """One of llama.cpp's programs as a sub-command."""

    program: str
    help: str
    example: str
    defaults: tuple[Default, ...]
    drafted: str | None = None  # the program that is used with drafts
    output: Output | None = None
    by_position: FilesByPosition | None = None

    @property
    def writes(self) -> bool:
        """Whether its result is a file."""
        return self.output is not None or self.by_position is not None

    def without(self, default: Default) -> Tool:
        """The tool without one of its defaults."""
        return replace(self, defaults=tuple(other for other in self.defaults if other is not default))


_THREADS = Default(("-t", "--threads"), ("--threads", "{cores}"), variable="LLAMA_ARG_THREADS")
_FLASH = Default(("-fa", "--flash-attn"), ("--flash-attn", "auto"), variable="LLAMA_ARG_FLASH_ATTN")
_JINJA = Default(("--jinja", "--no-jinja"), ("--jinja",), variable="LLAMA_ARG_JINJA")
_NO_CONVERSATION = Default(("-cnv", "--conversation", "-no-cnv", "--no-conversation"), ("--no-conversation",))
_QUIET = Default(  # only text and warnings: no list of the model's metadata and tensors
    ("-lv", "--verbosity", "--log-verbosity", "-v", "--verbose", "--log-verbose"),
    ("--verbosity", "2"),
    variable="LLAMA_ARG_LOG_VERBOSITY",
)
_ERRORS = replace(
    _QUIET, arguments=("--verbosity", "1")
)  # llama-tokenize loads no weights: its warnings are of those
# Prompts of one user: LATENT_ATTN expands the cache once per ubatch. Not for servers, where the other slots wait for a
# ubatch and states are saved every n_ubatch tokens. Not on GPUs, where it was not measured.
_UBATCH = Default(
    ("-ub", "--ubatch-size"),
    ("--ubatch-size", "{ubatch}"),
    f"patched CPU builds; N is {_UBATCHES[0]}, or less if memory or the context's length demand it",
    variable="LLAMA_ARG_UBATCH",
)
# Weights in memory instead of a mapped file: a token takes less time, loading takes longer.
_IN_MEMORY = Default(
    ("-lm", "--load-mode"),
    ("--load-mode", "none"),
    f"CPU builds on Linux, for weights of at most {_MOST_OF_MEMORY:.0%} of the available memory",
    variable="LLAMA_ARG_LOAD_MODE",
)
# Options of earlier versions of llama.cpp, which --load-mode replaced.
_MMAP, _NO_MMAP, _MLOCK, _DIRECT = "--mmap", "--no-mmap", "--mlock", "--direct-io"
# Where `run` has its prompt from; the last three pairs read it from the terminal.
_PROMPT = {
    "-p", "--prompt", "-f", "--file", "-bf", "--binary-file",
    "-cnv", "--conversation", "-i", "--interactive", "-if", "--interactive-first",
}  # fmt: skip
_ONLY_PRINT = {
    "-h", "--help", "--usage", "--version", "--license", "--list-devices", "-cl", "--cache-list", "--completion-bash",
}  # fmt: skip
# With these `run` needs no prompt: a saved one, another value of the model's key, what only prints something and ends.
_NO_PROMPT = {"--prompt-cache", "--override-kv", *_ONLY_PRINT}
_INPUT_IS_EMPTY = 255  # exit status of llama-completion without a prompt, and only then
_SEGFAULT = 139
_PROMPTS = "-p TEXT or -f FILE (-f /dev/stdin reads standard input)"
WORKERS = "--workers"  # kimi-llama's name for llama.cpp's option
_REMOTE = {WORKERS, "--rpc"}
_DRAFT = {"-md", "--model-draft", "--spec-draft-model"}
_KIND = "--spec-type"  # of drafts
_MTP = "draft-mtp"
# Unset, llama.cpp does not use the draft model.
_SPECULATE = Default((_KIND,), (_KIND, "draft-simple"))

TOOLS = {
    "run": Tool(
        "llama-completion",
        "continue a text once",
        'kimi-llama run model.gguf -p "The sea is" -n 64 --temp 0\n'
        '  kimi-llama run model.gguf -md draft.gguf -p "The sea is" -n 64 --temp 0\n'
        '  kimi-llama run ling.gguf --spec-type draft-mtp -p "The sea is" -n 64 --temp 0\n'
        '  kimi-llama run model.gguf --workers 10.0.0.2:50052,10.0.0.3:50052 -p "The sea is"',
        (_THREADS, _FLASH, _UBATCH, _NO_CONVERSATION, _QUIET),
        drafted="llama-speculative-simple",
    ),
    "chat": Tool(
        "llama-cli",
        "chat with the model in the terminal",
        'kimi-llama chat model.gguf\n  kimi-llama chat model.gguf --single-turn -p "define: sea"',
        (_THREADS, _FLASH, _UBATCH, _JINJA, _IN_MEMORY),
        drafted="llama-cli",
    ),
    "serve": Tool(
        "llama-server",
        "serve the model over HTTP with an OpenAI-compatible API",
        "kimi-llama serve model.gguf --port 8080 -c 32768\n  kimi-llama serve model.gguf -md draft.gguf\n"
        "  kimi-llama serve ling.gguf --spec-type draft-mtp\n"
        "  kimi-llama serve model.gguf --workers 10.0.0.2:50052,10.0.0.3:50052",
        (_THREADS, _FLASH, _JINJA, _IN_MEMORY),
        drafted="llama-server",
    ),
    "imatrix": Tool(
        "llama-imatrix",
        "collect importances of a text for quantization",
        "kimi-llama imatrix model-bf16.gguf -f calibration.txt -o imatrix.gguf\n"
        "  kimi-llama imatrix model-bf16.gguf -f calibration.txt -o imatrix.gguf --no-ppl --save-frequency 100\n"
        "  kimi-llama imatrix model-bf16.gguf --in-file imatrix.gguf --show-statistics",
        (_THREADS, _FLASH),
        output=Output(("-o", "--output", "--output-file"), "imatrix.gguf", ("--show-statistics",)),
    ),
    "perplexity": Tool(
        "llama-perplexity",
        "measure a model's perplexity on a text, or its KLD from another's logits",
        "kimi-llama perplexity model-q4.gguf -f heldout.txt\n"
        "  kimi-llama perplexity model-bf16.gguf -f heldout.txt --save-all-logits base.logits\n"
        "  kimi-llama perplexity model-q4.gguf --kl-divergence --kl-divergence-base base.logits",
        (_THREADS, _FLASH),
        output=Output(("--save-all-logits", "--kl-divergence-base"), None, ("--kl-divergence",)),
    ),
    "tokenize": Tool(
        "llama-tokenize",
        "show the tokens of a text",
        'kimi-llama tokenize model.gguf -p "The sea is"\n  kimi-llama tokenize model.gguf --ids --stdin < text.txt',
        (_ERRORS,),
    ),
    "split": Tool(
        "llama-gguf-split",
        "split a GGUF file, or merge splits",
        "kimi-llama split model.gguf model.gguf --split-max-size 4G   (model-00001-of-0000N.gguf, ...)\n"
        "  kimi-llama split model-00001-of-00003.gguf model.gguf --merge",
        (),
        by_position=FilesByPosition(gguf_split.check_arguments, gguf_split.split),
    ),
    "quantize": Tool(
        "llama-quantize",
        "quantize a GGUF file",
        "kimi-llama quantize model-bf16.gguf model-q8_0.gguf Q8_0\n"
        "  kimi-llama quantize model-bf16.gguf model-q4_k_m.gguf Q4_K_M --imatrix imatrix.gguf",
        (),
        by_position=FilesByPosition(quantize.check_arguments, quantize.quantize),
    ),
}


def run_tool(name: str, model: Path, given: Sequence[str], build: str | None, upstream: bool) -> int:
    """Run a tool in place of this process, or return the exit status of its own. Raises `EngineError`.

    given: what follows the model. build, upstream: see `select`.
    """
    tool = TOOLS[name]
    check_whole(model)
    if misplaced := _options(given) & {"--build", "--backend", "--upstream"}:
        raise UsageError(
            f"{misplaced.pop()}: what follows MODEL is passed to {tool.program}, which does not know it",
            todo=f"write it in front of MODEL: kimi-llama {name} --build NAME {model} ...",
        )
    _check_workers(given)
    drafts = _values(given, _DRAFT)
    for draft in drafts:
        check_whole(Path(draft))
    if not drafts and any(_MTP in kinds.split(",") for kinds in _values(given, {_KIND})):
        check_mtp(model)
    if name not in ("serve", "quantize", "split"):  # a server can also compute embeddings of token ids
        check_tokenizer(model)
    if tool.by_position is not None:
        tool.by_position.check(model, given)
    given, output = _without_output(tool, given)
    if output is not None:
        check_outputs([output], [model])
    without_prompt = name == "run" and not _options(given) & _PROMPT
    if without_prompt and not _options(given) & _NO_PROMPT and not may_begin_text(model):
        raise UsageError("no prompt was given", expected=_PROMPTS, todo=_give_prompt(model))
    engine = select(build, upstream)
    print(f"kimi-llama: build {engine.label()}", file=sys.stderr)
    if engine.for_gpus:
        _expect_to_run(engine)
    if tool.by_position is not None:
        return tool.by_position.run(engine.bin / tool.program, model, given)
    if engine.for_gpus or upstream:
        tool = tool.without(_UBATCH)
    if engine.for_gpus or not fits_memory(model):
        tool = tool.without(_IN_MEMORY)
    program, *arguments = tool_command(tool, model, given)
    command = [str(engine.bin / program), *arguments]
    sys.stdout.flush()
    if tool.output is not None and output is not None:
        option = tool.output.options[0]
        return run_for_output(output, lambda hidden: [*command, option, str(hidden)])
    if without_prompt:
        return _run_without_prompt(command, model)
    # Python ignores SIGPIPE, and the program would too: it would go on after its reader has ended. Only programs with
    # connections want that.
    if name != "serve" and not _REMOTE & _options(given):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execv(command[0], command)


def _without_output(tool: Tool, given: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments without the option that names the tool's output, and the output; None if it writes none."""
    words = list(given)
    if tool.output is None or _options(words) & {*tool.output.unless, *_ONLY_PRINT}:
        return words, None
    name = tool.output.default
    while option := next((word for word in words if word in tool.output.options), None):
        index = words.index(option)
        if index + 1 == len(words):
            raise UsageError(option, expected="a file name", found="nothing")
        name = words[index + 1]
        del words[index : index + 2]
    return words, None if name is None else Path(name)


def _run_without_prompt(command: list[str], model: Path) -> int:
    """Some models begin a text by themselves. If this one does not, llama.cpp says no more than "input is empty"."""
    status = exit_status(command)
    if status in (_INPUT_IS_EMPTY, _SEGFAULT):  # it crashes with a draft model
        print(f"kimi-llama: no prompt was given: expected {_PROMPTS}; {_give_prompt(model)}", file=sys.stderr)
    return 2 if status == _INPUT_IS_EMPTY else status


def _give_prompt(model: Path) -> str:
    return f"write: kimi-llama run {model} -p TEXT; to chat: kimi-llama chat {model}"


def _check_workers(given: Sequence[str]) -> None:
    """Raise `EngineError` unless workers are named by their addresses."""
    if _REMOTE & _options(given):
        addresses(",".join(_values(given, _REMOTE)))


def _expect_to_run(engine: Engine) -> None:
    """A GPU build needs its vendor's libraries, which may have been removed; the CPU build is not used instead."""
    try:
        check_runs(engine.folder)
    except KimiError as error:
        todo = f"{error.todo}; or use the CPU build: --build cpu"
        raise EngineError(error.what, found=error.found, todo=todo) from error


def tool_command(tool: Tool, model: Path, given: Sequence[str]) -> list[str]:
    """The program and its arguments: the model, defaults that the caller did not set, the caller's own."""
    given = ["--rpc" if word == WORKERS else word for word in _with_load_mode(given)]
    options = _options(given)
    program, defaults = tool.program, tool.defaults
    if tool.drafted is not None and options & {*_DRAFT, _KIND}:
        program = tool.drafted
        defaults = (*tool.without(_NO_CONVERSATION).defaults, _SPECULATE)
    chosen = [d for d in defaults if not options & set(d.options) and not os.environ.get(d.variable)]
    values = {"cores": cores(), "ubatch": _ubatch(model, given) if _UBATCH in chosen else 0}
    added = [word.format(**values) for default in chosen for word in default.arguments]
    return [program, "--model", str(model), *added, *given]


def _with_load_mode(given: Sequence[str]) -> list[str]:
    """The arguments with --load-mode in place of the options that it replaced."""
    old = {word for word in given if word in (_MMAP, _NO_MMAP, _MLOCK, _DIRECT)}
    if not old:
        return list(given)
    mode = "mlock" if _NO_MMAP in old else "mmap+mlock"
    if _MLOCK not in old:
        mode = "dio" if _DIRECT in old else "none" if _NO_MMAP in old else "mmap"
    return ["--load-mode", mode, *(word for word in given if word not in old)]


def defaults_help(tool: Tool) -> str:
    """The tool's defaults, a line each, for its help."""
    lines = [f"  {default}" for default in tool.defaults]
    head = f"{tool.program} gets, unless you give the option, or set llama.cpp's variable for it (LLAMA_ARG_...):"
    return "\n".join([head, *lines, "", ""]) if lines else "\n"


def _ubatch(model: Path, given: Sequence[str]) -> int:
    """Tokens of a ubatch that memory has room for, with the context that the caller or else the model gives."""
    word = [os.environ.get("LLAMA_ARG_CTX_SIZE", ""), *_values(given, {"-c", "--ctx-size"})][-1]
    context, free = int(word) if word.isdecimal() else 0, available_memory()
    if not context:
        with contextlib.suppress(GgufError), GgufModel(model) as file:
            context = int(file.keys.get(f"{file.keys.get('general.architecture')}.context_length", 0))
    room = (1 << 62 if free is None else free) // 4
    return next((n for n in _UBATCHES if n * (_MASK * context + _GRAPH) <= room), _UBATCHES[-1])


def fits_memory(model: Path) -> bool:
    """Whether memory has room for the model's weights and more; False if the available memory is unknown."""
    _, files = place_in_set(model) or (1, [model])
    free = available_memory()
    return (
        free is not None
        and sum(path.stat().st_size for path in files if path.exists()) <= _MOST_OF_MEMORY * free
    )


def _options(given: Sequence[str]) -> set[str]:
    """The arguments without what follows an equals sign."""
    return {argument.partition("=")[0] for argument in given}


def _values(given: Sequence[str], options: Collection[str]) -> list[str]:
    """The values that the caller gives to one of these options."""
    words = [part for argument in given for part in argument.split("=", 1)]
    return [value for option, value in pairwise(words) if option in options]
