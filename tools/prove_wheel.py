"""Proves that a wheel needs nothing but Python: `tools/prove-wheel WHEEL`.

Input: a wheel of `tools/release`, and the demo checkpoint. Output: each command with its seconds. The exit status is
1 if a command fails or prints something else than it should, or if uninstalling leaves something. The commands see an
empty prefix (a new virtual environment), an empty home, and a PATH that has only the prefix: no compiler, no git. pip
installs wheels only, and builds nothing from source. This module imports nothing of the project and no packages, so
that it runs in a bare root.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEMO = Path(__file__).resolve().parents[1] / "demo"
# Programs that compile, link, build, or fetch sources, as in gcc, g++-12, x86_64-linux-gnu-gcc, ld.gold.
TOOLS = re.compile(
    r"([\w-]+-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+|tcc|as|ld(\.\w+)?|lld|gold|mold)(-[\d.]+)?"
    r"|c89|c99|nvcc|zig|cmake|ninja|samu|g?make|git"
)
NEEDED_BY_BUILDS = ("C++ compiler", "cmake", "ninja")  # which doctor must not find
PASSED_ON = (
    "PIP_",
    "SSL_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)  # variables that pip needs to find its index
CACHES = (".cache", ".config/matplotlib")  # in the home; they may remain
QUESTION = "define: elephant"
BEGINNING = "a large animal that"
END = "[end of text]"  # what llama-completion prints after the model's last token
STARTING = 60.0  # seconds that a server may take until its answer
SHOWN = 3000  # characters of a failed command's output

# Prints the files of all installed distributions.
_OWNED = """
import importlib.metadata as metadata
for one in metadata.distributions():
    for file in one.files or ():
        print(file.locate().resolve())
"""
_LLAMA = """
import sys
from kimi_gguf.engine import llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, verbose=False)
answer = model.create_chat_completion([{"role": "user", "content": sys.argv[2]}], max_tokens=60, temperature=0.0)
print(answer["choices"][0]["message"]["content"])
"""


class ProveError(Exception):
    """What is wrong with the wheel, or with the place where it should be proved."""


@dataclass(frozen=True)
class Sandbox:
    """An empty prefix and an empty home below a folder."""

    folder: Path

    @property
    def prefix(self) -> Path:
        return self.folder / "prefix"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def make(self) -> None:
        """Make the folders. Raises `ProveError` if Python cannot make virtual environments."""
        for folder in (self.home, self.temporary):
            folder.mkdir(parents=True)
        command = [sys.executable, "-m", "venv", str(self.prefix)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise ProveError(
                f"{shlex.join(command)} fails (Debian: apt-get install python3-venv)\n{ended.stdout}"
            )

    def environment(self) -> dict[str, str]:
        """All variables that the commands see."""
        kept = {name: text for name, text in os.environ.items() if name.upper().startswith(PASSED_ON)}
        pip = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pip"
        return {
            "PIP_CACHE_DIR": str(pip),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            **kept,
            "PATH": str(self.prefix / "bin"),
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "LANG": "C.UTF-8",
        }

    def install(self, wanted: str | Path) -> None:
        """Install from wheels alone, then look for compilers again. Raises `ProveError`."""
        self.call("python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:", wanted)
        check_tools(self.environment()["PATH"])

    def call(self, *words: str | Path) -> str:
        """Run a program of the prefix, print it with its seconds; its standard output. Raises `ProveError`."""
        command = [str(self.prefix / "bin" / words[0]), *map(str, words[1:])]
        began = time.monotonic()
        ended = subprocess.run(
            command, cwd=self.folder, env=self.environment(), capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        shown = shlex.join(
            "..." if "\n" in str(word) else str(word) for word in words
        )  # without Python's scripts
        print(f"{time.monotonic() - began:6.1f} s  {shown}", flush=True)
        if ended.returncode:
            raise ProveError(f"exit status {ended.returncode}\n{(ended.stdout + ended.stderr)[-SHOWN:]}")
        return ended.stdout

    def files(self) -> set[Path]:
        """All files and links of the prefix, and its empty folders."""
        found = self.prefix.rglob("*")
        return {path for path in found if path.is_symlink() or not path.is_dir() or not any(path.iterdir())}


def check_tools(path: str) -> None:
    """Raise `ProveError` if a program on `path` could compile or fetch sources."""
    files = [
        file for folder in map(Path, path.split(os.pathsep)) if folder.is_dir() for file in folder.iterdir()
    ]
    if found := sorted(str(file) for file in files if TOOLS.fullmatch(file.name)):
        raise ProveError(f"expected no compiler and no git, found {', '.join(found)}")


def check_doctor(printed: str) -> None:
    """Raise `ProveError` unless the wheel's engine runs, and doctor finds nothing to build another with.

    printed: the output of `kimi-llama doctor --json`.
    """
    found = json.loads(printed)
    if not found["build"]["seen"].startswith("wheel "):
        raise ProveError(f"doctor: expected the wheel's engine, found {found['build']['seen']}")
    if found["healthy"] is not True or found["build"]["passed"] is not True:
        raise ProveError(f"doctor: expected that all checks pass, found {printed[-SHOWN:]}")
    machine = {check["name"]: check["seen"] for check in found["machine"]}
    for name in NEEDED_BY_BUILDS:
        if not machine.get(name, "no check").startswith("not found"):
            raise ProveError(f"doctor: expected no {name}, found {machine.get(name, 'no check')}")


def check_inspect(printed: str, kind: str, layers: int) -> None:
    """Raise `ProveError` unless `convert-kimi inspect --json` printed this type and this number of layers."""
    found = json.loads(printed)
    numbers = [
        layer["index"] for layer in found["layers"] if layer["index"] >= 0
    ]  # -1: what is outside of layers
    if (found["type"], numbers) != (kind, [*range(layers)]):
        raise ProveError(
            f"inspect: expected {kind} with {layers} layers, found {found['type']} with the layers {numbers}"
        )


def check_run(printed: str) -> None:
    """Raise `ProveError` unless the model continued the prompt."""
    _, prompt, after = printed.partition(BEGINNING)
    if not prompt or not _words(after.replace(END, "")):
        raise ProveError(f"run: expected {BEGINNING!r} and words after it, found {printed[-SHOWN:]!r}")


def check_answer(name: str, answer: str, chat: str) -> None:
    """Raise `ProveError` unless `answer` has words that are not the question's, and `chat` shows it after the question.

    chat: the output of `kimi-llama chat`.
    """
    if not _words(answer) - _words(QUESTION):
        raise ProveError(f"{name}: expected an answer to {QUESTION!r}, found {answer!r}")
    if answer not in chat.partition(QUESTION)[2]:
        raise ProveError(f"{name}: expected the answer of kimi-llama chat, found {answer!r}\n{chat[-SHOWN:]}")


def check_bench(printed: str) -> None:
    """Raise `ProveError` unless llama-bench printed a table with the speeds of a prompt and of decoding, above zero."""
    rows = re.findall(r"\| *(pp|tg)\d+ *\| *(\S+)", printed)
    good = all(re.fullmatch(r"\d+(\.\d+)?", speed) and float(speed) > 0 for _, speed in rows)
    if {test for test, _ in rows} != {"pp", "tg"} or not good:
        raise ProveError(f"bench: expected tokens per second of pp and tg, found {printed[-SHOWN:]!r}")


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def leftovers(sandbox: Sandbox, before: set[Path]) -> list[Path]:
    """What is in prefix, home and temporary folder besides the other packages, what was there before, and caches."""
    owned = set(map(Path, sandbox.call("python", "-c", _OWNED).splitlines()))
    found = []
    for path in sandbox.files() - before:
        source = path.parent.parent / f"{path.name.split('.')[0]}.py"
        compiled = path.parent.name == "__pycache__" and source.exists()
        if path.parent.resolve() / path.name not in owned and not compiled:
            found.append(path)
    kept = [sandbox.home / name for name in CACHES]
    for path in (*sandbox.home.rglob("*"), *sandbox.temporary.rglob("*")):
        if not any(path.is_relative_to(each) or each.is_relative_to(path) for each in kept):
            found.append(path)
    return sorted(found)


def serve(sandbox: Sandbox, gguf: Path) -> str:
    """Start a server, ask it one question, end it; the answer. Raises `ProveError` with the end of the server's log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(sandbox.prefix / "bin/kimi-llama"), "serve", str(gguf), "--port", str(port)]
    began = time.monotonic()
    path = sandbox.folder / "serve.log"
    with path.open("w") as log:
        server = subprocess.Popen(
            command, cwd=sandbox.folder, env=sandbox.environment(), stdout=log, stderr=log
        )
        try:
            answer = _ask(server, port)
        except ProveError as error:
            raise ProveError(
                f"kimi-llama serve: {error}\n{path.read_text(errors='replace')[-SHOWN:]}"
            ) from error
        finally:
            server.terminate()
            server.wait()
    print(f"{time.monotonic() - began:6.1f} s  kimi-llama serve {gguf}, until its answer", flush=True)
    return answer


def _ask(server: subprocess.Popen[bytes], port: int) -> str:
    """The first answer of a server that is starting. Asks again only if it does not listen yet, or loads the model."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + STARTING
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ProveError(f"exit status {server.returncode}")
        try:
            with opener.open(request, timeout=STARTING) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            if error.code != 503:
                text = error.read().decode(errors="replace")
                raise ProveError(f"expected an answer, found HTTP {error.code}\n{text[-SHOWN:]}") from error
        except (OSError, ValueError, LookupError) as error:
            if not isinstance(getattr(error, "reason", None), ConnectionRefusedError):
                raise ProveError(f"expected an answer, found {error!r}") from error
        time.sleep(0.1)
    raise ProveError(f"no answer after {STARTING:.0f} s")


def prove(wheel: Path, checkpoint: Path, sandbox: Sandbox, report: bool) -> None:
    """All steps. Raises `ProveError` at the first that fails."""
    sandbox.make()
    check_tools(sandbox.environment()["PATH"])
    before = sandbox.files()
    sandbox.install(wheel)
    check_doctor(sandbox.call("kimi-llama", "doctor", "--json"))
    gguf, text = sandbox.folder / "demo-Q4_K_M.gguf", checkpoint / "heldout.txt"
    layers = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    sandbox.call("convert-kimi", checkpoint, "-o", gguf, "--type", "Q4_K_M")
    sandbox.call("convert-kimi", "verify", gguf, "--checkpoint", checkpoint)
    check_inspect(sandbox.call("convert-kimi", "inspect", gguf, "--json"), "Q4_K_M", layers)
    check_run(sandbox.call("kimi-llama", "run", gguf, "-p", BEGINNING, "-n", "16", "--temp", "0"))
    chat = sandbox.call(
        "kimi-llama", "chat", gguf, "--single-turn", "-p", QUESTION, "-n", "60", "--temp", "0"
    )
    check_answer("llama_cpp", sandbox.call("python", "-c", _LLAMA, gguf, QUESTION).strip(), chat)
    check_answer("kimi-llama serve", serve(sandbox, gguf).strip(), chat)
    check_bench(sandbox.call("kimi-llama", "bench", gguf, "--depth", "0"))
    if report:
        sandbox.install(f"{wheel}[validate]")
        folder = sandbox.folder / "report"
        options = ("--text", text, "--tokens", "256", "--out", folder)
        sandbox.call("validate-kimi", gguf, "--checkpoint", checkpoint, *options)
        if not (folder / "report.html").is_file():
            raise ProveError(f"{folder}: no report")
    check_doctor(sandbox.call("kimi-llama", "doctor", "--json"))
    sandbox.call("python", "-m", "pip", "uninstall", "--quiet", "--yes", "kimi-gguf")
    if left := leftovers(sandbox, before):
        raise ProveError("\n".join(["uninstalling left", *map(str, left[:20])]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/prove-wheel",
        description="Install a wheel into an empty prefix without a compiler or git, run its commands on the demo, "
        "uninstall it, and check that only caches remain.",
    )
    add = parser.add_argument
    add("wheel", type=Path, metavar="WHEEL", help="a wheel that tools/release made for this machine")
    add(
        "--checkpoint",
        type=Path,
        default=DEMO,
        metavar="DIR",
        help="run the commands on this checkpoint, the demo (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="work in this new folder and keep it (default: a temporary folder)",
    )
    add("--without-report", action="store_true", help="leave out validate-kimi, which needs torch")
    parsed = parser.parse_args(arguments)
    if not parsed.wheel.is_file():
        parser.error(f"{parsed.wheel}: no such file")
    try:
        with tempfile.TemporaryDirectory(prefix="prove-wheel-") as scratch:
            sandbox = Sandbox(parsed.out.resolve() if parsed.out else Path(scratch).resolve())
            prove(parsed.wheel.resolve(), parsed.checkpoint.resolve(), sandbox, not parsed.without_report)
    except (ProveError, OSError) as error:
        print(f"prove-wheel: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("The wheel needs nothing but Python, and uninstalling it left only caches.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
