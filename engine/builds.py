"""The llama.cpp build as a library: `ensure()` gives a finished build, making it where there is none.

Flows in: which build is wanted (patched or pristine, backend, test programs). Flows out: `Engine`, a frozen
description of a folder with bin/, lib/ and the Python package llama_cpp that loads the same libraries.
Patched and pristine libraries share their names: never load both into one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kimi_gguf.engine.build import Cache, build, build_lock, pristine_source, read_manifest
from kimi_gguf.engine.build_spec import make_recipe, provenance
from kimi_gguf.engine.progress import Reporter, reporting
from kimi_gguf.patches.errors import EngineError
from kimi_gguf.patches.pin import load_pin

__all__ = ["Engine", "EngineError", "builds", "cache_folder", "ensure", "find", "load", "upstream_source"]


@dataclass(frozen=True)
class Engine:
    """A finished build."""

    key: str
    prefix: Path  # holds bin/, lib/, python/, manifest.json, build.log
    pristine: bool
    backends: tuple[str, ...]
    manifest: Mapping[str, Any]

    @property
    def bin(self) -> Path:
        """Folder of the programs."""
        return self.prefix / "bin"

    @property
    def lib(self) -> Path:
        """Folder of the shared libraries."""
        return self.prefix / "lib"

    @property
    def tests(self) -> bool:
        """Whether upstream's test programs are in `bin`."""
        return bool(self.manifest["tests"])

    def environment(self) -> dict[str, str]:
        """The environment for a Python subprocess that is to `import llama_cpp` from this build."""
        paths = [str(self.prefix / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "LLAMA_CPP_LIB_PATH": str(self.lib), "PYTHONPATH": os.pathsep.join(paths)}


def cache_folder() -> Path:
    """Where builds live: KIMI_GGUF_CACHE, or kimi-gguf in the user's cache folder."""
    chosen = os.environ.get("KIMI_GGUF_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "kimi-gguf"


def ensure(
    pristine: bool = False,
    backend: str = "cpu",
    tests: bool = False,
    source: Path | None = None,
    archive: Path | None = None,
    defines: tuple[tuple[str, str], ...] = (),
    progress: Reporter | None = None,
) -> Engine:
    """The build asked for, made now if it is not there yet (minutes); a no-op in milliseconds if it is.

    pristine: the same sources and options without the patches. backend: cpu, cuda, metal or vulkan.
    tests: with upstream's test programs. source: a llama.cpp checkout instead of the pinned archive.
    archive: the pinned archive, where it is on disk already. defines: further CMake settings.
    progress: where to tell about the work; by default a bar or lines on standard error.
    Raises `EngineError`; no unfinished build is ever left under its final name.
    """
    recipe = make_recipe(pristine, backend, source, defines)
    cache = Cache(cache_folder())
    place = cache.engines / recipe.key
    engine = load(place)
    if engine is None or (tests and not engine.tests):
        if progress is None:
            with reporting() as told:
                build(recipe, cache, archive, tests, told)
        else:
            build(recipe, cache, archive, tests, progress)
        engine = load(place)
        assert engine is not None, place
    return engine


def find(pristine: bool = False, backend: str | None = None) -> Engine | None:
    """The finished build of the present pin and patches for this machine, or None.

    Without a backend: a GPU's before the CPU's; of equals the one built last.
    """
    ranked = [engine for engine in builds(pristine) if backend in (None, engine.backends[0])]
    return max(ranked, key=lambda e: (e.backends[0] != "cpu", e.manifest["built"]), default=None)


def builds(pristine: bool = False) -> list[Engine]:
    """All finished builds of the present pin, series and processor, whatever their options."""
    wanted, cache = provenance(pristine), Cache(cache_folder())
    places = sorted(cache.engines.glob("[0-9a-f]*")) if cache.engines.is_dir() else []
    engines = [engine for place in places if (engine := load(place))]
    return [e for e in engines if all(e.manifest.get(name) == value for name, value in wanted.items())]


def upstream_source(archive: Path | None = None, progress: Reporter | None = None) -> Path:
    """A folder with the pinned archive's llama.cpp/ (pristine) and llama_cpp/, verified; only to be read."""
    cache = Cache(cache_folder())
    with reporting() as told, build_lock(cache, progress or told):
        return pristine_source(load_pin(), cache, archive, progress or told)


def load(place: Path) -> Engine | None:
    """The finished build in a folder, or None where there is none."""
    manifest = read_manifest(place)
    if manifest is None:
        return None
    return Engine(
        manifest["key"], place, manifest["pristine"], tuple(manifest["backends"]), MappingProxyType(manifest)
    )
