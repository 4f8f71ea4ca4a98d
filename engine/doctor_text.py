"""A diagnosis as text for users. Input: `Diagnosis`. Output: lines for a terminal."""

from __future__ import annotations

from collections import Counter

from kimi_gguf.engine.builds import SHORT_KEY, cache_folder
from kimi_gguf.engine.doctor import Check, Diagnosis, Health
from kimi_gguf.patches.series import FIXES, OPS


def as_text(diagnosis: Diagnosis) -> str:
    """The whole report: what failed, the builds, the one that runs first, and then from what they were made."""
    pin = diagnosis.pin
    kinds = Counter(patch.kind for patch in diagnosis.patches)
    lines = _summary(diagnosis)
    if diagnosis.patched:
        lines += [
            "",
            "build that runs (--build, KIMI_BUILD or kimi-llama use names another)",
            _line(diagnosis.chosen),
        ]
    if diagnosis.installed:
        lines += [*([] if diagnosis.patched else [""]), _line(diagnosis.installed)]
    for health in sorted(
        diagnosis.engines, key=lambda health: health.engine.label() != diagnosis.chosen.seen
    ):
        lines += ["", *_engine(health)]
    lines += [
        "",
        "machine",
        *map(_line, diagnosis.machine),
        "",
        f"cache     {cache_folder()}",
        f"upstream  {pin['package']}=={pin['version']}, llama.cpp {pin['llama_cpp_commit'][:7]}, "
        f"ggml {pin['ggml_version']}",
        f"patches   {len(diagnosis.patches)}: {kinds[FIXES]} fixes of upstream, {kinds[OPS]} for operators and what "
        "uses them (kimi-llama doctor --json lists them)",
    ]
    return "\n".join(lines)


def _summary(diagnosis: Diagnosis) -> list[str]:
    """What failed, and what to do if nothing is built."""
    failed = [name for name in diagnosis.failed if diagnosis.patched or name != diagnosis.chosen.name]
    lines = [] if diagnosis.patched else [f"nothing to run: {diagnosis.chosen.seen}"]
    lines += [f"failed: {'; '.join(failed)}"] if failed else []
    lines = lines or ["all checks pass"]
    for health in diagnosis.unusable:
        engine = health.engine
        seen = next(check.seen for check in health.checks if not check.passed)
        lines += [
            f"build {engine.name} {engine.key[:SHORT_KEY]}, which runs only if it is named, does not work here: {seen} "
            f"(if you do not need it, remove {engine.folder})"
        ]
    return lines


def _engine(health: Health) -> list[str]:
    engine, manifest = health.engine, health.engine.manifest
    kind = "upstream" if engine.is_upstream else f"patched, series of {len(manifest['patches'])}"
    tests = ", with llama.cpp's tests" if engine.tests else ""
    source = manifest["source"] or manifest["package"]
    return [
        f"build {engine.name} {engine.key}: {kind}, for {' and '.join(engine.backends)}{tests}",
        f"      for       {engine.instructions()}",
        *map(_line, health.checks),
        f"      at        {engine.folder}",
        f"      from      {source}, tree {manifest['tree_sha256'][:16]}, {manifest['built']}",
        *(f"      compiler  {language}: {text}" for language, text in manifest["compilers"].items()),
        *(f"      with      {text}" for text in manifest.get("binutils", ())),
        *(f"      with      {name}={text}" for name, text in engine.variables.items()),
    ]


def _line(check: Check) -> str:
    seen = check.seen.replace("\n", "\n        ")
    mark = "ok " if check.passed else "BAD" if check.needed else "-  "
    return f"  {mark} {check.name}: {seen}"
