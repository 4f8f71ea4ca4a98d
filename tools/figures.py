"""Measure the demo checkpoint for docs/measurements.md.

    tools/run figures

Input: demo/. Output: docs/measurements.md. Each type is converted and validated with the
project's own commands, with patched and upstream llama.cpp on the same file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TYPES = ("F32", "F16", "BF16", "Q8_0")
TOKENS = 2048
ROW = "| {type} | {run} | {build} | {nmse:.1e} | {nmse_median:.1e} | {nmse_worst:.1e} | {kld_mean:.1e} | {kld_p99:.1e} | {kld_max:.1e} | {top1:.2%} | {top5:.2%} | {ppl_test:.3f} | {other} |"  # noqa: E501
HEADER = """\
| weights | run | llama.cpp | NMSE | median | worst position | KLD mean | 99 % | max | top-1 | top-5 | perplexity | expert mismatches |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""  # noqa: E501
PAGE = """\
# Measurements

Written by `tools/run figures` on {date}; do not edit.
{machine}; llama.cpp {commit} from {package}, patched ({build}) and upstream built from the
same archive with the same options. The cache is in F32.

## The demo checkpoint against the torch reference

{positions} positions: held-out text, followed by tokens that llama.cpp generated. The reference is plain torch in
float32; its perplexity is {ppl_reference:.3f}. KLD is KL(reference || llama.cpp) in nats. The quiet probe scales
the attention layers' input by 2^-8 in the file and in the reference, so that the epsilons of the norms affect the
result ([validation](validation.md)). *Expert mismatches* counts the positions at which llama.cpp chose other
experts than the reference in at least one layer: these few positions cause most of the total error. The noise
floor (the same file with ubatches of {n_ubatch}) is NMSE {floor:.1e} for F32. Hashes, options and the error at every
position are in the JSON report that `validate-kimi` writes.

{table}"""

Report = dict[str, Any]


def command(*words: str | Path, allow: tuple[int, ...] = (0,)) -> None:
    """Run one of the project's commands."""
    path = Path(sys.executable).parent / words[0]
    status = subprocess.run([str(path), *map(str, words[1:])], stdout=subprocess.DEVNULL).returncode
    if status not in allow:
        raise SystemExit(f"figures: error: {' '.join(map(str, words))}: exit status {status}")


def measure(checkpoint: Path, weights: str, tokens: int, scratch: Path) -> Report:
    """Convert to one type and validate it; a failed gate is not an error here."""
    gguf, out = scratch / f"{weights}.gguf", scratch / weights
    command("convert-kimi", checkpoint, "-o", gguf, "--type", weights, "--quiet")
    options = ("--text", checkpoint / "heldout.txt", "--tokens", str(tokens), "--upstream", "--out", out)
    command("validate-kimi", gguf, "--checkpoint", checkpoint, *options, allow=(0, 1))
    report: Report = json.loads((out / "report.json").read_text())
    return report


def builds(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Runs of patched and of upstream llama.cpp."""
    return {"patched": report["runs"], "upstream": report["rivals"][0]["runs"]}


def table(reports: dict[str, Report]) -> str:
    """One row for each type, variant and build."""
    rows = []
    for weights, report in reports.items():
        for runs in zip(*builds(report).values(), strict=True):
            for build, run in zip(builds(report), runs, strict=True):
                other = run["other_experts"]["positions"] if run["other_experts"] else 0
                names = {"type": weights, "run": run["variant"]["title"], "build": build, "other": other}
                rows.append(ROW.format(**names, **run["all"]))
    return HEADER + "\n".join(rows) + "\n"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure the demo and write docs/measurements.md.")
    add = parser.add_argument
    add(
        "--checkpoint", type=Path, default=Path("demo"), help="measure this checkpoint (default: %(default)s)"
    )
    add("--docs", type=Path, default=Path("docs"), help="write here (default: %(default)s)")
    add("--tokens", type=int, default=TOKENS, help="evaluate on N tokens (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        reports = {kind: measure(args.checkpoint, kind, args.tokens, Path(scratch)) for kind in TYPES}
    exact = reports["F32"]
    machine, engine, first = exact["machine"], exact["engine"], exact["runs"][0]["all"]
    page = PAGE.format(
        date=exact["created"][:10],
        machine=f"{machine['processor']}, {machine['cores']} cores, {machine['system'].split()[0]}",
        commit=engine["llama_cpp_commit"][:7],
        package=engine["package"],
        build=engine["commit"],
        positions=first["positions"],
        ppl_reference=first["ppl_reference"],
        n_ubatch=exact["noise_floor"]["n_ubatch"],
        floor=exact["noise_floor"]["nmse"],
        table=table(reports),
    )
    (args.docs / "measurements.md").write_text(page)


if __name__ == "__main__":
    main()
