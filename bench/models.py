"""Generated models in the cache folder, and the facts about a GGUF file that the bench needs.

Input: a `BenchModel`, or a file of the user. Output: `ModelFile`: a path, the architecture and every
tensor's type, shape and size. A generated file gets its name when it is complete.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.bench.families import ARCHITECTURES, FAMILIES
from kimi_gguf.bench.report import one_line
from kimi_gguf.bench.shapes import BenchModel, plan_of, quantized_types
from kimi_gguf.bench.weights import Weights
from kimi_gguf.convert.output.unfinished import Identity, folder_of
from kimi_gguf.convert.output.writer import writing
from kimi_gguf.convert.plan import Plan
from kimi_gguf.convert.types.file_types import TYPES as FILE_TYPES
from kimi_gguf.convert.types.ggml import LIBRARY, Ggml
from kimi_gguf.engine.builds import Engine, cache_folder
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.gguf import GgufError, GgufModel, GgufTensor
from kimi_gguf.engine.gguf_check import check_gguf, damaged
from kimi_gguf.engine.limits import available_memory
from kimi_gguf.engine.progress import Reporter

GIB = 2**30
_TYPE_NAMES = {kind.number: name for name, kind in FILE_TYPES.items()}


@dataclass(frozen=True)
class ModelFile:
    """A GGUF file that can be measured."""

    path: Path
    name: str  # with its type, on one line
    key: str  # tells this file from others, for saved states
    architecture: str
    keys: Mapping[
        str, int | float | list[int]
    ]  # numbers among the GGUF keys, without the architecture's prefix
    tensors: tuple[GgufTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def bench_folder() -> Path:
    """The folder of generated models and saved states; it may be deleted at any time."""
    return cache_folder() / "bench"


def plan_file(model: BenchModel, engine: Engine) -> Plan:
    """The plan of the generated file. Raises `EngineError` or `ConvertError`."""
    return plan_of(model, quantized_types(model, engine.bin / "llama-quantize"))


def model_path(model: BenchModel) -> Path:
    """Where a generated model is kept."""
    return bench_folder() / "models" / f"{model.name}-{model.key}.gguf"


def missing(models: Iterable[BenchModel], engine: Engine) -> dict[str, int]:
    """Bytes of the generated files that are not in the cache yet, by name. Raises `EngineError` or `ConvertError`."""
    return {
        model.name: plan_file(model, engine).nbytes for model in models if not model_path(model).is_file()
    }


def check_room(models: Iterable[BenchModel], engine: Engine, reporter: Reporter) -> None:
    """Report the disk space that models need which are not generated yet.

    Raises `EngineError` if there is too little of it, or if one of them is larger than the free memory: then the disk
    would be measured. Files that exist are not checked.
    """
    sizes = missing(models, engine)
    if not sizes:
        return
    needed = sum(sizes.values())
    folder = bench_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    reporter.note(
        f"generated models need {needed / 1e9:.1f} GB of disk in {folder}, {free / 1e9:.0f} GB are free"
    )
    fewer = "choose fewer --layers, --experts or another --type"
    if needed > free:
        raise EngineError(
            "the disk is too small for the generated models",
            expected=f"{needed / 1e9:.1f} GB free in {folder}",
            found=f"{free / 1e9:.1f} GB",
            todo=f"free some space, set KIMI_GGUF_CACHE, or {fewer}",
        )
    name, largest = max(sizes.items(), key=lambda item: item[1])
    memory = available_memory()
    if memory is not None and largest > memory:
        raise EngineError(
            f"{name} does not fit in memory: its weights would be read from disk while it is measured",
            expected=f"{largest / 1e9:.1f} GB of free memory",
            found=f"{memory / 1e9:.1f} GB",
            todo=f"end other programs, or {fewer}",
        )


def generate(model: BenchModel, engine: Engine, reporter: Reporter) -> Path:
    """Return the generated file; make it if it is not in the cache. engine: its llama-quantize and mix are used."""
    path = model_path(model)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = plan_file(model, engine)
    total = plan.nbytes
    reporter.phase(f"making {model.name} ({total / GIB:.1f} GiB in {path.parent})")
    weights = Weights(Ggml(engine.lib / LIBRARY, engine.key), FAMILIES[model.family].gate)
    written = 0
    identity = Identity(plan=model.key, sources="")
    try:
        with writing(plan, path, identity, overwrite=True, resume=False, hashed=False) as writer:
            for tensor, chunk in weights.pieces(plan.tensors):
                if writer.append(tensor, chunk):
                    writer.finish_tensor()
                written += chunk.nbytes
                reporter.step(written >> 20, total >> 20)
    finally:  # the files that a conversion keeps for --resume are not needed here
        shutil.rmtree(folder_of(path), ignore_errors=True)
    return path


def open_model(path: Path) -> ModelFile:
    """Read a file's header. Raises `EngineError` if it is not a GGUF file or has another architecture."""
    check_gguf(path)
    try:
        with GgufModel(path) as model:
            keys, tensors = model.keys, tuple(model.tensors.values())
    except GgufError as error:
        raise damaged(path, error) from None
    architecture = str(keys.get("general.architecture", "none"))
    if architecture not in ARCHITECTURES:
        raise EngineError(
            f"{path}: the operators do not support this model",
            expected=f"general.architecture {' or '.join(ARCHITECTURES)}",
            found=architecture,
            todo="give a file of one of these architectures",
        )
    prefix = f"{architecture}."
    numbers = {
        name.removeprefix(prefix): value
        for name, value in keys.items()
        if name.startswith(prefix) and isinstance(value, int | float | list)
    }
    name = one_line(str(keys.get("general.name", ""))) or one_line(path.stem)
    stat = path.stat()
    return ModelFile(
        path=path,
        name=name_with_type(name, keys.get("general.file_type")),
        key=hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12],
        architecture=architecture,
        keys=numbers,
        tensors=tensors,
    )


def name_with_type(name: str, number: object) -> str:
    """Such as "Some-Model-Q4_K_M": the names in files of all types may be equal. number: the file's type, if it has it;
    generated files have it in their name."""
    kind = _TYPE_NAMES.get(number) if isinstance(number, int) else None
    return name if kind is None or re.search(rf"\b{kind}$", name) else f"{name}-{kind}"


def convert_demo(kind: str, reporter: Reporter) -> Path:
    """The demo checkpoint as a GGUF file of one of the converter's types, in the cache. Raises `EngineError`."""
    demo = Path(__file__).resolve().parents[1] / "demo"
    if not (demo / "config.json").is_file():
        raise EngineError("the demo checkpoint is not here", todo="run from a source checkout of kimi-gguf")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(demo.glob("*.safetensors"))))
    path = bench_folder() / "models" / f"demo-{kind}-{digest.hexdigest()[:12]}.gguf"
    if not path.is_file():
        reporter.phase(f"converting the demo to {kind}")
        path.parent.mkdir(parents=True, exist_ok=True)
        options = [str(demo), "-o", str(path), "--type", kind, "--quiet"]
        command = [sys.executable, "-P", "-m", "kimi_gguf.convert.cli", *options]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise EngineError(
                "the demo cannot be converted", found=ended.stderr.strip(), todo="convert-kimi demo ..."
            )
    return path
