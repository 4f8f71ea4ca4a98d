"""The command `kimi-llama`: builds the patched llama.cpp, reports on it, and runs its tools with the right libraries.

Input: the command line. Output: a finished build, a report on it, or what one of llama.cpp's own programs does.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kimi_gguf.bench import cli as bench_cli
from kimi_gguf.engine.build_spec import BACKENDS
from kimi_gguf.engine.builds import DEFAULT, ensure, select, use
from kimi_gguf.engine.errors import EngineError, UsageError
from kimi_gguf.engine.interrupts import INTERRUPTED, terminable
from kimi_gguf.engine.path_check import check_paths
from kimi_gguf.engine.toolchain import CORES, MAX_THREADS, cores
from kimi_gguf.engine.version import VERSION
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.patches.series import load_series
from kimi_gguf.scripts.llama_tools import TOOLS, WORKERS, defaults_help, run_tool

_WHICH = """\
which build runs: the first of --build NAME, $KIMI_BUILD, the choice of `kimi-llama use NAME`, and the default: in an
installed wheel its own build (wheel), otherwise the one that `kimi-llama build` makes (cpu). A name is a backend and
the settings that are not the defaults (cpu, cuda, cpu+GGML_NATIVE=OFF); `kimi-llama doctor` lists the builds. Standard
error names the one that runs."""

_WORKER_HELP = """\
  kimi-llama worker                                      on loopback, for an ssh tunnel
  kimi-llama worker --host 10.0.0.2 --cache              on a private network

A worker computes for one client at a time: kimi-llama serve|run|chat|bench MODEL --workers HOST:PORT,...
The client sends the weights; a worker needs no model file. The operators of the patched build run on workers of the
same build; other workers run upstream's graph.

There is no authentication and no encryption: anyone who can reach the port can use the worker, end it, and read what
it computes. A worker listens on loopback unless --host is given. Give --host only on a network that you trust, for
example the address of a WireGuard interface. Or tunnel the port: ssh -N -L 50052:127.0.0.1:50052 MACHINE. For more,
see docs/serving.md."""

_NO_GPU = (
    "this build computes on the CPU: no GPU was checked (kimi-llama build --backend NAME, then use NAME)"
)
_ALL_USED = """\
All operators that the device has are used (absent: it does not have the operator). To report this result, paste the
text above into an issue of this project."""
_NOT_USED = """\
Operators that did not pass, or could not be checked, are not used on that device; upstream's graph or kernels are used
instead. To report this result, paste the text above into an issue of this project."""

_ELSEWHERE = f"{WORKERS} HOST:PORT,... computes on other machines: kimi-llama worker --help\n\n"
_WHOLE = (
    "A file of the output's name is replaced when the new one is complete. If the command fails or is interrupted, "
    "it is unchanged, and nothing of the new one is left.\n\n"
)


@terminable()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status (most sub-commands of tools do not return)."""
    parser = _parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        where = (
            f" (options of {TOOLS[parsed.command].program} follow MODEL)" if parsed.command in TOOLS else ""
        )
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{where}")
    parsed.words = list(sys.argv[1:] if arguments is None else arguments)
    action: Callable[[argparse.Namespace], int] = parsed.action
    try:
        check_paths(parsed)
        return action(parsed)
    except BrokenPipeError:
        raise  # see scripts/commands.py
    except (KimiError, OSError) as error:
        print(f"kimi-llama: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("kimi-llama: interrupted; no unfinished file is left", file=sys.stderr)
        return INTERRUPTED


def _build(parsed: argparse.Namespace) -> int:
    if words := os.environ.get("CMAKE_ARGS"):
        raise UsageError(
            "CMAKE_ARGS",
            expected="settings as options of this command: -D NAME=VALUE; --backend for a GPU",
            found=f"{words!r:.100}",
            todo="unset it, so that no build has settings that its name does not show",
        )
    engine = ensure(
        parsed.upstream, parsed.backend, tests=parsed.tests, source=parsed.source, archive=parsed.archive,
        defines=tuple(parsed.defines),
    )  # fmt: skip
    if parsed.wheel is not None:
        from kimi_gguf.engine.wheel import make_wheel

        print(make_wheel(engine, parsed.wheel))
    else:
        print(engine.folder)
    return 0


def _path(parsed: argparse.Namespace) -> int:
    print(select(parsed.build, parsed.upstream, make=False).folder)
    return 0


def _use(parsed: argparse.Namespace) -> int:
    print(use(parsed.name).label())
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from kimi_gguf.engine.device_report import check_devices
    from kimi_gguf.engine.doctor import diagnose
    from kimi_gguf.engine.doctor_text import as_text

    if parsed.devices:
        report = check_devices()
        if parsed.json:
            print(report.as_json())
        elif not report.devices:
            print(f"{report.build}: {_NO_GPU}")
        else:
            print(f"```\n{report.as_text()}\n```")
            print("\n" + (_ALL_USED if report.passed else _NOT_USED), file=sys.stderr)
        return 0 if report.passed else 1
    diagnosis = diagnose()
    print(diagnosis.as_json() if parsed.json else as_text(diagnosis))
    return 0 if diagnosis.healthy else 1


def _export(parsed: argparse.Namespace) -> int:
    from kimi_gguf.patches.export import export_patches

    series = load_series()
    for path in export_patches(series.fixes() if parsed.fixes else series, parsed.folder):
        print(path)
    return 0


def _bench(parsed: argparse.Namespace) -> int:
    from kimi_gguf.bench.run import run

    return run(parsed, parsed.words)


def _tool(parsed: argparse.Namespace) -> int:
    return run_tool(parsed.command, parsed.model, parsed.arguments, parsed.build, parsed.upstream)


def _worker(parsed: argparse.Namespace) -> int:
    _check_address(parsed.host, parsed.port)
    engine = select(parsed.build, parsed.upstream)
    print(f"kimi-llama: build {engine.label()}", file=sys.stderr)
    command = [str(engine.bin / "ggml-rpc-server"), "--host", parsed.host, "--port", str(parsed.port)]
    command += ["--threads", str(parsed.threads)]
    command += ["--device", parsed.device] if parsed.device else []
    command += ["--cache"] if parsed.cache else []
    sys.stdout.flush()
    os.execv(command[0], command)


def _check_address(host: str, port: int) -> None:
    """Raise `EngineError` if nothing can listen there: ggml-rpc-server would end with exit status 0."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((str(ipaddress.IPv4Address(host)), port))
    except (OSError, ValueError, OverflowError) as error:
        raise EngineError(
            f"cannot listen on {host}:{port}",
            expected="an IPv4 address of this machine, and a free port",
            found=str(error),
            todo="give others with --host and --port",
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kimi-llama",
        description="Build llama.cpp with the project's patches, and run it with models of the KDA family.",
    )
    parser.add_argument("--version", action="version", version=f"kimi-gguf {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, action: Callable[[argparse.Namespace], int], help_text: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help_text,
            description=f"{help_text[0].upper()}{help_text[1:]}.",
            epilog=f"examples:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(action=action)
        return sub

    sub = command(
        "build",
        _build,
        "build llama.cpp into the cache (takes minutes; does nothing if it is built)",
        "kimi-llama build\n  kimi-llama build --upstream --tests\n  kimi-llama build --backend cuda\n"
        "  kimi-llama build --backend cpu-all\n"
        "  kimi-llama build --source ~/llama.cpp\n  kimi-llama build --wheel dist -D GGML_NATIVE=OFF\n\n"
        "The default build is compiled for this processor. --backend cpu-all makes a build for any processor of\n"
        "the architecture: it has a CPU backend for each kind, and loads the best one. Building takes twice as long.\n"
        "--backend cuda needs NVIDIA's whole toolkit, nvcc and cuBLAS: kimi-llama doctor shows what is installed.\n"
        "It compiles for the card that it finds. If there is none, name the card's architecture:\n"
        "-D CMAKE_CUDA_ARCHITECTURES=90 (an H200). --backend metal is for Macs: docs/metal.md.\n"
        "The cache is $KIMI_GGUF_CACHE, by default ~/.cache/kimi-gguf. Its engines/ holds finished builds\n"
        "only; you may remove all of it at any time.",
    )
    _upstream(sub)
    add = sub.add_argument
    add("--backend", choices=tuple(BACKENDS), default=DEFAULT,
        help="the backend that computes (default: %(default)s)")  # fmt: skip
    add("--tests", action="store_true", help="also build llama.cpp's test programs")
    add("--source", type=Path, metavar="DIR", help="build this llama.cpp checkout, not the pinned archive")
    add("--archive", type=Path, metavar="FILE",
        help="use this copy of the pinned archive (default: download it)")  # fmt: skip
    add("--wheel", type=Path, metavar="DIR",
        help="write a llama-cpp-python wheel with this build (for processors like this one)")  # fmt: skip
    add("-D", dest="defines", type=_define, action="append", default=[], metavar="NAME=VALUE",
        help="add a CMake setting")  # fmt: skip

    sub = command(
        "doctor",
        _doctor,
        "show which builds exist, from what they were made, and whether they work",
        "kimi-llama doctor\n  kimi-llama doctor --devices",
    )
    sub.add_argument(
        "--devices",
        action="store_true",
        help="check, on each GPU, the operators of the build that runs, and print the results as text for an issue; "
        "the exit status is 1 if an operator is not used",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(
        "path",
        _path,
        "print the folder that holds a build's bin/ and lib/",
        f'kimi-llama path --upstream\n  "$(kimi-llama path)/bin/llama-bench" -m model.gguf\n\n{_WHICH}',
    )
    _selection(sub)

    sub = command(
        "use",
        _use,
        "choose the build that runs if none is named",
        f"kimi-llama use cuda\n  kimi-llama use cpu+GGML_NATIVE=OFF\n  kimi-llama use cpu\n\n{_WHICH}",
    )
    sub.add_argument("name", metavar="NAME", help="a build's name or key, as kimi-llama doctor lists them")

    sub = command(
        "bench",
        _bench,
        "measure the patched llama.cpp against upstream, alternating in one run",
        bench_cli.EXAMPLES.strip(),
    )
    bench_cli.add_arguments(sub)

    for name, tool in TOOLS.items():
        sub = command(
            name,
            _tool,
            f"{tool.help} ({tool.program})",
            f"{tool.example}\n\n{_ELSEWHERE if tool.defaults else ''}{_WHOLE if tool.writes else ''}"
            f"Everything after MODEL is passed to {tool.program}; "
            f'its own help: "$(kimi-llama path)/bin/{tool.program}" --help\n'
            f"{defaults_help(tool)}{_WHICH}",
        )
        _selection(sub)
        sub.add_argument("model", type=Path, metavar="MODEL", help="a GGUF file")
        rest = sub.add_argument(
            "arguments", nargs=argparse.REMAINDER, metavar="...", help=f"options of {tool.program}"
        )
        rest.required = False  # otherwise argparse names it too if MODEL is missing

    sub = command(
        "worker", _worker, "compute for kimi-llama on another machine (ggml-rpc-server)", _WORKER_HELP.strip()
    )
    _selection(sub)
    add = sub.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="listen on this IPv4 address; there is no authentication (default: %(default)s)")  # fmt: skip
    add(
        "--port",
        type=lambda text: bench_cli.number(text, 65535),
        default=50052,
        metavar="PORT",
        help="listen on this port (default: %(default)s)",
    )
    add(
        "--threads",
        type=lambda text: bench_cli.number(text, MAX_THREADS),
        default=cores(),
        metavar="N",
        help=f"use this many threads on the CPU device (default: {CORES})",
    )
    add(
        "--device",
        metavar="NAME,..",
        help="serve these devices (default: all GPUs, or the CPU if there is none)",
    )
    add("--cache", action="store_true",
        help="store tensors of more than 10 MiB in llama.cpp's cache folder; they are not sent again")  # fmt: skip

    sub = command(
        "export-patches",
        _export,
        "write the patches as a series for git am",
        "kimi-llama export-patches /tmp/kimi && git -C ~/llama.cpp am /tmp/kimi/*.patch",
    )
    sub.add_argument("--fixes", action="store_true", help="write only the corrections of upstream")
    sub.add_argument("folder", type=Path, metavar="DIR", help="folder to write to")
    return parser


def _selection(parser: argparse.ArgumentParser) -> None:
    _upstream(parser)
    parser.add_argument(
        "--build", "--backend", metavar="NAME", help="use this build, by name or key (default: see below)"
    )


def _upstream(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--upstream", action="store_true", help="use upstream llama.cpp, without the patches")


def _define(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
