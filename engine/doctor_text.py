"""A diagnosis as text for users. Input: `Diagnosis`. Output: lines for a terminal."""

from __future__ import annotations

from kimi_gguf.engine.builds import cache_folder
from kimi_gguf.engine.doctor import Check, Diagnosis, Health


def as_text(diagnosis: Diagnosis) -> str:
    """The whole report."""
    pin = diagnosis.pin
    lines = [
        f"cache     {cache_folder()}",
        f"upstream  {pin['package']}=={pin['version']}, llama.cpp {pin['llama_cpp_commit'][:7]}, "
        f"ggml {pin['ggml_version']}",
        *(f"patch     {name}: {subject}" for name, subject in diagnosis.patches),
        "",
        "machine",
        *map(_line, diagnosis.machine),
        "",
        "build that runs (--build, KIMI_BUILD or kimi-llama use names another)",
        _line(diagnosis.chosen),
        *([_line(diagnosis.installed)] if diagnosis.installed else []),
    ]
    for health in diagnosis.engines:
        lines += ["", *_engine(health)]
    if not any(not health.engine.is_upstream for health in diagnosis.engines):
        missing = "The patched llama.cpp is not built for this pin, series and processor: kimi-llama build"
        lines += ["", missing]
    lines += ["", "all checks pass" if diagnosis.healthy else "a check failed, see above"]
    return "\n".join(lines)


def _engine(health: Health) -> list[str]:
    engine, manifest = health.engine, health.engine.manifest
    kind = "upstream" if engine.is_upstream else f"patched, series of {len(manifest['patches'])}"
    tests = ", with llama.cpp's tests" if engine.tests else ""
    source = manifest["source"] or manifest["package"]
    return [
        f"build {engine.name} {engine.key}: {kind}, for {' and '.join(engine.backends)}{tests}",
        f"      for       {engine.instructions()}",
        f"      at        {engine.prefix}",
        f"      from      {source}, tree {manifest['tree_sha256'][:16]}, {manifest['built']}",
        *(f"      compiler  {language}: {text}" for language, text in manifest["compilers"].items()),
        *(f"      with      {text}" for text in manifest.get("binutils", ())),
        *(f"      with      {name}={text}" for name, text in engine.variables.items()),
        *map(_line, health.checks),
    ]


def _line(check: Check) -> str:
    seen = check.seen.replace("\n", "\n        ")
    return f"  {'ok ' if check.passed else 'BAD'} {check.name}: {seen}"
