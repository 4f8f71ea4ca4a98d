"""Draw the two pictures of README.md: a terminal in which the demo runs, and bars of the speed against upstream.

    tools/run pictures            both; the terminal runs the three commands with this machine's build (half a minute)
    tools/run pictures --speed    the bars alone, from docs/bench.md and docs/bench-48b.md, which come from the records

Text in the pictures stays text.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TERMINAL, SPEED = ROOT / "docs/readme-terminal.svg", ROOT / "docs/readme-speed.svg"
# Each command, and the lines of its output that the picture shows.
COMMANDS = (
    ("convert-kimi demo -o demo-Q8_0.gguf --type Q8_0", r"demo-"),
    (
        'kimi-llama chat demo-Q8_0.gguf --single-turn -n 60 --temp 0 -p "define: elephant"',
        r"> define|elephant",
    ),
    (
        "validate-kimi demo-Q8_0.gguf --checkpoint demo --text demo/heldout.txt --out report",
        r"pass  .*\(flash|PASS",
    ),
)
WHOLE, PART = "the whole 48B's shape, Q2_K", "8 of its 27 layers, Q4_0"
# Page, section, row of its table, and where the bar stands: the group and its label.
BARS = (
    ("bench-48b.md", "kimi-linear-48b-27L-256E-Q2_K", "pp512 at 0", f"Prompt of 512 tokens: {WHOLE}"),
    ("bench.md", "kimi-linear-48b-8L-32E-Q4_0", "pp512 at 0", f"Prompt of 512 tokens: {PART}"),
    ("bench-48b.md", "kimi-linear-48b-27L-256E-Q2_K", "tg at 4096", f"Decoding at depth 4096: {WHOLE}"),
    ("bench.md", "kimi-linear-48b-8L-32E-Q4_0", "tg at 16384", f"Decoding at depth 16384: {PART}"),
)
FRAME = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="{font}" font-size="13">\n'
    '<rect width="{width}" height="{height}" rx="6" fill="{fill}"/>\n{content}\n</svg>\n'
)


def text(x: float, y: float, words: str, attributes: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" xml:space="preserve" {attributes}>{escape(words)}</text>'


def terminal(lines: Iterable[str]) -> str:
    """The picture of a terminal with these lines; commands begin with `$`."""
    rows = [*lines]
    content = [
        text(
            16,
            28 + 19 * index,
            row,
            'fill="#ffffff" font-weight="bold"' if row[:1] == "$" else 'fill="#b9c4d0"',
        )
        for index, row in enumerate(rows)
    ]
    height = 28 + 19 * len(rows)
    return FRAME.format(
        width=800, height=height, font="monospace", fill="#1b2430", content="\n".join(content)
    )


def run_demo() -> list[str]:
    """What the three commands print, with each command before its output."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "demo").symlink_to(ROOT / "demo")
        for command, shown in COMMANDS:
            words = shlex.split(command)
            words[0] = str(Path(sys.executable).with_name(words[0]))
            ended = subprocess.run(
                words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            if ended.returncode:
                raise SystemExit(
                    f"pictures: error: {command}: exit status {ended.returncode}\n{ended.stderr}"
                )
            output = (ended.stdout + ended.stderr).splitlines()
            lines += [f"$ {command}", *(line for line in output if re.match(shown, line)), ""]
    return lines[:-1]


def cell(page: str, section: str, row: str) -> tuple[float, float]:
    """Tokens/s of upstream at its best and of the patched build, with 2 threads, from a bench page."""
    part = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.search(rf"^\| {row}, 2 threads \| ([\d.]+) ± [^|]*\| ([\d.]+) ± ", part, re.MULTILINE)
    if found is None:
        raise SystemExit(f"pictures: error: {section}: expected a row '{row}, 2 threads', found none")
    return float(found[1]), float(found[2])


def speed() -> str:
    """The picture with two bars for each entry of `BARS`; a pair's longer bar has the full width."""
    content = []
    for index, (page, section, row, label) in enumerate(BARS):
        top = 14 + 74 * index
        upstream, patched = cell((ROOT / "docs" / page).read_text(), section, row)
        content.append(text(16, top + 14, label, 'font-weight="bold"'))
        for y, name, value, colour in (
            (top + 22, "upstream", upstream, "#9aa5b1"),
            (top + 43, "patched", patched, "#1f6fb2"),
        ):
            width = 480 * value / max(upstream, patched)
            ratio = f", {patched / upstream:.1f} ×" if name == "patched" else ""
            content += [
                text(16, y + 14, name, 'fill="#333333"'),
                f'<rect x="90" y="{y}" width="{width:.0f}" height="18" fill="{colour}"/>',
                text(98 + width, y + 14, f"{value:g} tokens/s{ratio}", 'fill="#333333"'),
            ]
    height = 14 + 74 * len(BARS)
    return FRAME.format(
        width=800, height=height, font="sans-serif", fill="#ffffff", content="\n".join(content)
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed", action="store_true", help="draw the bars alone")
    if not parser.parse_args().speed:
        TERMINAL.write_text(terminal(run_demo()))
    SPEED.write_text(speed())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
