"""Build, convert, run and validate the real 48B checkpoint.

Input: a folder or a hub id. Output: a GGUF file, text generated from it, a validation report. Disk and memory
requirements are printed first. Each step is one of the project's commands, printed before it runs. `--rehearse`
shows the requirements and the plan with a sparse checkpoint of full size, then runs all steps on the demo checkpoint.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.convert.conversion import plan_only
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.tools.synthetic_checkpoint import write_synthetic

GB = 1_000_000_000
CHECKPOINT_BYTES = 98_245_528_576  # published, 20 shards
REFERENCE_MEMORY = 16 * GB  # the torch reference streams layer by layer
RUN_OVERHEAD = 2 * GB  # compute buffers and caches at the contexts used here
BUILD_BYTES = 3 * GB  # llama.cpp twice, with objects
PROMPT = "Linear attention is"


class ProveError(KimiError):
    """A step cannot run; the message says why and what to do."""


@dataclass(frozen=True)
class Needs:
    """Disk space of all steps together, and memory of the step that needs most, in bytes."""

    download: int
    gguf: int

    @property
    def disk(self) -> int:
        return self.download + self.gguf + BUILD_BYTES

    @property
    def memory(self) -> int:
        return max(self.gguf + RUN_OVERHEAD, REFERENCE_MEMORY)

    def lines(self) -> list[str]:
        return [
            f"disk    {self.disk / GB:6.1f} GB: {self.download / GB:.1f} to download, "
            f"{self.gguf / GB:.1f} for the GGUF, {BUILD_BYTES / GB:.1f} for the two builds",
            f"memory  {self.memory / GB:6.1f} GB to run the model without paging (less works, but slowly); "
            f"{REFERENCE_MEMORY / GB:.0f} for the reference",
        ]


def planned_bytes(folder: Path, out_type: str) -> int:
    """Size of the GGUF that converting `folder` would make."""
    return plan_only(folder, TYPES[out_type]).nbytes


def check_disk(needs: Needs, out: Path) -> None:
    """Raise `ProveError` if the disk of `out` is too small."""
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < needs.disk:
        raise ProveError(
            out,
            expected=f"{needs.disk / GB:.1f} GB of free disk space",
            found=f"{free / GB:.1f} GB",
            todo="choose another disk with --out",
        )


def call(step: str, *command: str | Path) -> None:
    """Print a command and run it. Raises `ProveError` if it fails."""
    words = [str(word) for word in command]
    print(f"\n== {step}\n$ {shlex.join(words)}", flush=True)
    words[0] = str(Path(sys.executable).parent / words[0])
    status = subprocess.run(words).returncode
    if status:
        raise ProveError(f"{step}: the command above failed with exit status {status}")


def fetch(hub_id: str, out: Path) -> Path:
    """Download a checkpoint from the hub; an interrupted download is resumed."""
    folder = out / hub_id.replace("/", "--")
    call("Download", "hf", "download", hub_id, "--local-dir", folder, "--exclude", "*.py")
    return folder


def run_all(source: Path, out: Path, out_type: str, tokens: int, text: Path | None = None) -> None:
    """Build, convert, run, validate on a text (default: validate-kimi's)."""
    gguf = out / f"{source.name}-{out_type}.gguf"
    call("Build", "kimi-llama", "build")
    call("Build upstream llama.cpp", "kimi-llama", "build", "--upstream")
    call("Convert", "convert-kimi", source, "-o", gguf, "--type", out_type, "--force")
    call("Run", "kimi-llama", "run", gguf, "-p", PROMPT, "-n", "32", "--temp", "0")
    report = out / f"report-{out_type}"
    options = ["--tokens", str(tokens), "--upstream", "--out", str(report)]
    if text is not None:
        options = ["--text", str(text), *options]
    call("Validate", "validate-kimi", gguf, "--checkpoint", source, *options)
    print(f"\nDone: {gguf} and {report}")


def rehearse(out: Path, out_type: str, tokens: int) -> None:
    """Show requirements and plan with a sparse checkpoint of full size, then run all steps on the demo."""
    with tempfile.TemporaryDirectory() as scratch:
        sparse = write_synthetic(Path(scratch) / "Kimi-Linear-48B-A3B-sparse")
        needs = Needs(CHECKPOINT_BYTES, planned_bytes(sparse, out_type))
        print(f"The real checkpoint, as {out_type}, requires:", *needs.lines(), sep="\n  ")
        program = str(Path(sys.executable).parent / "convert-kimi")
        command = [program, str(sparse), "--dry-run", "--type", out_type]
        plan = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        lines = plan.splitlines()
        print(f"\n== The conversion's plan, {len(lines)} lines", *lines[:12], "...", *lines[-6:], sep="\n")
    print("\nAll steps, with the demo checkpoint:")
    out.mkdir(parents=True, exist_ok=True)
    # The limits were measured on this text. The demo was not trained on texts like the built-in one.
    run_all(Path("demo"), out, out_type, tokens, Path("demo/heldout.txt"))


def main(arguments: list[str] | None = None) -> int:
    """Run tools/prove-48b; return 0 if all gates pass."""
    parser = argparse.ArgumentParser(prog="tools/prove-48b")  # the shell script has the help
    add = parser.add_argument
    add("source", nargs="?")
    add("--type", default="Q8_0", choices=TYPES)
    add("--out", type=Path, default=Path("out/48b"))
    add("--tokens", type=int, default=512)
    add("--rehearse", action="store_true")
    args = parser.parse_args(arguments)
    if args.rehearse == bool(args.source):
        parser.error("expected either a checkpoint or --rehearse")
    try:
        if args.rehearse:
            rehearse(args.out, args.type, args.tokens)
            return 0
        source = Path(args.source).expanduser()
        absent = not source.exists()
        if absent and args.source.startswith(("/", ".", "~")):
            raise ProveError(args.source, expected="a folder", found="none")
        if absent and args.source.count("/") != 1:
            raise ProveError(args.source, expected="a folder or a hub id (OWNER/NAME)", found="neither")
        with tempfile.TemporaryDirectory() as scratch:
            planned = write_synthetic(Path(scratch)) if absent else source
            needs = Needs(CHECKPOINT_BYTES if absent else 0, planned_bytes(planned, args.type))
        print("Required:", *needs.lines(), sep="\n  ")
        check_disk(needs, args.out)
        if absent:
            source = fetch(args.source, args.out)
        run_all(source, args.out, args.type, args.tokens)
    except KimiError as error:
        print(f"prove-48b: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
