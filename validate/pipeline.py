"""The steps of a validation: from a `Request` to a `Report`.

Input: `Request`, the builds of llama.cpp, a progress reporter. Output: `Report`, with the results of the gates.
Raises ValidateError, ConvertError or EngineError for bad input.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from kimi_gguf.convert.adapter.merge import open_merged
from kimi_gguf.convert.output.journal import stamp
from kimi_gguf.convert.source.checkpoint import Checkpoint, open_checkpoint
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.facts import engine_facts, machine_facts
from kimi_gguf.engine.gguf_check import all_splits, has_mtp
from kimi_gguf.engine.progress import Reporter
from kimi_gguf.engine.version import VERSION
from kimi_gguf.validate import provenance
from kimi_gguf.validate.errors import ValidateError
from kimi_gguf.validate.gates import Evidence, judge
from kimi_gguf.validate.llama import RunOptions, continue_greedily, pieces, tokenize
from kimi_gguf.validate.measure import (
    VARIANTS,
    Ids,
    Measured,
    Truth,
    answer,
    measure,
    measure_mtp,
    noise_floor,
    truth,
    variants_for,
)
from kimi_gguf.validate.probe import reference_of, write_quiet_gguf
from kimi_gguf.validate.report import UPSTREAM, Greedy, Report, Rival, Worst
from kimi_gguf.validate.tensors import check_layers, open_gguf, prove

FLOOR_UBATCH = 48  # ubatch size of the noise floor; does not divide the default of 512
WORST = 12  # worst positions listed
CONTEXT = 10  # tokens of text shown for each of them


@dataclass(frozen=True)
class Request:
    """What to validate, and how."""

    gguf: Path
    checkpoint: Path
    text: str | None  # one of text and ids
    ids: Ids | None
    source: str  # name of the text or the ids, for the report
    tokens: int  # maximum number of tokens of the text
    generate: int  # number of tokens that llama.cpp generates after the text; they are evaluated too
    options: RunOptions
    dtype: torch.dtype
    against: Path | None = None  # another GGUF file whose figures are shown too
    adapters: tuple[
        tuple[Path, float], ...
    ] = ()  # PEFT folders that the reference has merged, and their scales
    lora: tuple[
        tuple[Path, float], ...
    ] = ()  # GGUF adapters with which the file runs; without, it is a merged file

    @property
    def run_options(self) -> RunOptions:
        """The options with the adapters of the file."""
        return replace(self.options, lora=tuple((str(file.absolute()), scale) for file, scale in self.lora))


@dataclass
class Shared:
    """What is known before a GGUF file is validated: of the checkpoint, kept for its next file, and hashes."""

    checkpoint: provenance.Facts | None = None
    ggufs: dict[Path, provenance.Facts] = field(default_factory=dict)  # of files that are already hashed
    # GGUF file or checkpoint -> its files, as they were before they were hashed
    stamps: dict[Path, dict[Path, str]] = field(default_factory=dict)
    # by token ids, quiet and MTP layer
    truths: dict[tuple[bytes, bool, bool], Truth] = field(default_factory=dict)

    def gguf_facts(self, path: Path, reporter: Reporter) -> provenance.Facts:
        """The facts of a GGUF file, which is hashed the first time."""
        if path not in self.ggufs:
            reporter.phase(f"{path.name}: hashing")
            self.stamps[path] = {split: stamp(split) for split in all_splits(path)}
            self.ggufs[path] = provenance.gguf_facts(path, reporter.step)
        return self.ggufs[path]

    def checkpoint_facts(self, checkpoint: Checkpoint, reporter: Reporter) -> provenance.Facts:
        """The facts of the checkpoint, which is hashed the first time."""
        if self.checkpoint is None:
            reporter.phase("hashing the checkpoint")
            self.stamps[checkpoint.folder] = {file: stamp(file) for file in provenance.files_of(checkpoint)}
            self.checkpoint = provenance.checkpoint_facts(checkpoint, reporter.step)
        return self.checkpoint

    def check_unchanged(self, of: Path) -> None:
        """Raise `ValidateError` if a file of the GGUF file or checkpoint was replaced since it was hashed."""
        for path, before in self.stamps[of].items():
            if stamp(path) != before:
                what = (
                    f"{path}: was replaced, changed or removed while it was measured; no report was written"
                )
                raise ValidateError(what, todo="run the command again")


def validate(
    request: Request,
    engine: Engine,
    upstream: Engine | None,
    reporter: Reporter,
    shared: Shared | None = None,
) -> Report:
    """Measure one GGUF file and apply the gates. Raises `ValidateError`, also if a file was replaced meanwhile."""
    began, shared = time.monotonic(), shared or Shared()
    gguf_facts = shared.gguf_facts(request.gguf, reporter) | provenance.lora_facts(
        request.lora, reporter.step
    )
    reporter.phase("tokenizing")
    ids, generated = ids_of(request, engine)
    with open_gguf(request.gguf) as file:
        mtp, architecture = has_mtp(file), file.keys.get("general.architecture")
    with open_merged(request.checkpoint, request.adapters, mtp) as checkpoint:
        if architecture != checkpoint.config.architecture:
            raise ValidateError(
                f"{request.gguf}: general.architecture",
                expected=f"'{checkpoint.config.architecture}', as in the checkpoint",
                found=f"{architecture!r:.40}",
                todo="give the checkpoint that the file was made from",
            )
        if int(ids.max()) >= checkpoint.config.vocab_size:
            below = f"token ids: expected ids below the checkpoint's vocabulary size {checkpoint.config.vocab_size}"
            where, todo = request.gguf.name, "give the checkpoint that the file was made from"
            if request.ids is not None:
                where, todo = request.source, "give ids of this model's tokenizer"
            raise ValidateError(f"{where}: {below}, found {int(ids.max())}", todo=todo)
        if request.against is not None:
            check_model(request.against, request.checkpoint)
        checkpoint_facts = shared.checkpoint_facts(checkpoint, reporter)
        reporter.phase("comparing tensors with the checkpoint")
        with open_checkpoint(request.checkpoint, mtp) if request.lora else nullcontext(checkpoint) as written:
            tensors = prove(request.gguf, written, reporter.step)
        if tensors.misfits:
            raise ValidateError(
                f"{request.gguf}: does not match the checkpoint's shape: "
                f"{tensors.failures[0]}{(f' (and {tensors.misfits - 1} more)' if tensors.misfits > 1 else '')}",
                todo="give the checkpoint that the file was made from",
            )
        is_f32 = gguf_facts["lowest_type"] == "F32"
        expected = {}
        for quiet in [False, True] if is_f32 else [False]:
            key = ids.tobytes(), quiet, mtp
            if key not in shared.truths:
                reporter.phase("reference" + (", quiet probe" if quiet else ""))
                shared.truths[key] = truth(reference_of(checkpoint, quiet, request.dtype), ids, reporter.step)
            expected[quiet] = shared.truths[key]
    possible = variants_for(request.options.cache_type)
    if possible != VARIANTS:
        reporter.note(f"a {request.options.cache_type} cache requires flash attention: nothing else is run")
    variants = [variant for variant in possible if variant.quiet in expected]
    with TemporaryDirectory(prefix="kimi-validate-") as folder:
        files = {False: request.gguf, True: Path(folder) / "quiet.gguf"}
        if is_f32:
            files[True] = write_quiet_gguf(request.gguf, files[True])

        def runs(on: Engine, label: str) -> list[Measured]:
            measured, of_mtp = [], []
            options = replace(request.run_options, mtp=mtp)
            for variant in variants:
                reporter.phase(f"{label}: {variant.title}")
                found = answer(on, files[variant.quiet], ids, variant, options, reporter.step)
                measured.append(measure(expected[variant.quiet], found))
                if mtp:
                    of_mtp.append(measure_mtp(expected[variant.quiet], found))
            return measured + of_mtp

        own = runs(engine, "llama.cpp")
        rivals = []
        if upstream is not None:
            rivals.append(_rival(UPSTREAM, lambda: runs(upstream, UPSTREAM), reporter))
    if request.against is not None:
        other = request.against

        def run_other() -> list[Measured]:
            reporter.phase(f"{other.name}: {variants[0].title}")
            found = answer(engine, other, ids, variants[0], request.options, reporter.step)
            return [measure(expected[False], found)]

        rivals.append(_rival(provenance.readable(other.name), run_other, reporter))
    reporter.phase("noise floor")
    floor = noise_floor(engine, request.gguf, ids, request.run_options, FLOOR_UBATCH)
    upstream_runs = rivals[0].runs if upstream is not None else []
    worst = _worst(engine, request.gguf, own[0], expected[False])
    for of in (request.gguf, checkpoint.folder):  # everything is read: the hashes are of what was measured
        shared.check_unchanged(of)
    return Report(
        version=VERSION,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=round(time.monotonic() - began, 1),
        gguf=gguf_facts,
        checkpoint=checkpoint_facts,
        ids=provenance.ids_facts(ids, request.source, generated),
        engine=engine_facts(engine),
        machine=machine_facts(),
        reference=provenance.reference_facts(checkpoint.config.architecture, request.dtype),
        options=request.options,
        floor_ubatch=FLOOR_UBATCH,
        runs=own,
        rivals=rivals,
        floor=floor,
        tensors=tensors,
        greedy=_greedy(own[0], expected[False], generated),
        worst=worst,
        gates=judge(Evidence(gguf_facts["lowest_type"], own, upstream_runs, tensors)),
    )


def check_model(path: Path, source: Path) -> None:
    """Raise ValidateError for a file of another model than the checkpoint `source`, with or without its MTP layer."""
    with open_gguf(path) as file:
        mtp = has_mtp(file)
    with open_checkpoint(source, mtp) as checkpoint:
        check_layers(path, checkpoint)


def ids_of(request: Request, engine: Engine) -> tuple[Ids, int]:
    """The token ids, including those that llama.cpp generates after them, and the number of the latter."""
    if request.ids is not None:
        given = request.ids
    else:
        given = np.array(tokenize(engine, request.gguf, request.text or ""), dtype=np.int64)[: request.tokens]
    if len(given) == 0:
        raise ValidateError(
            request.source, expected="at least one token", found="none", todo="give a longer text"
        )
    if not request.generate:
        return given, 0
    written = continue_greedily(engine, request.gguf, given, request.generate, request.run_options)
    return np.concatenate([given, np.array(written, dtype=np.int64)]), len(written)


def _rival(title: str, runs: Callable[[], list[Measured]], reporter: Reporter) -> Rival:
    """Figures of another engine or file; if it cannot run, this is reported and is not an error."""
    try:
        return Rival(title, runs(), "")
    except ValidateError as error:
        reporter.note(f"{title}: cannot run: {error}")
        return Rival(title, [], provenance.readable(str(error)))


def _greedy(measured: Measured, expected: Truth, generated: int) -> Greedy:
    """Compare each token that llama.cpp generated with the reference's greedy choice."""
    start = len(expected.ids) - generated
    wrote, would = expected.ids[start:], measured.at.best_reference[start - 1 : -1]
    other = np.flatnonzero(wrote != would)
    if len(other) == 0:
        return Greedy(generated, generated, None, None)
    first = int(other[0])
    logits = expected.logits[start - 1 + first]
    gap = float(logits[would[first]]) - float(logits[wrote[first]])
    return Greedy(generated, generated - len(other), first, gap)


def _worst(engine: Engine, gguf: Path, measured: Measured, expected: Truth) -> list[Worst]:
    """The positions with the largest KLD, with their tokens."""
    at, ids = measured.at, expected.ids
    order = np.argsort(-np.nan_to_num(at.kld, nan=np.inf), kind="stable")[:WORST]
    margins = np.min([*expected.margins.values(), np.full(len(ids), np.inf)], axis=0)
    contexts = {position: ids[max(0, position - CONTEXT + 1) : position + 1] for position in order}
    wanted = np.concatenate([*contexts.values(), at.best_reference[order], at.best_test[order]])
    text = dict(zip(wanted.tolist(), pieces(engine, gguf, wanted), strict=True))

    def said(*tokens: int) -> str:
        return b"".join(text[token] for token in tokens).decode(errors="replace")

    return [
        Worst(
            position=int(position),
            context=said(*contexts[position]),
            reference=said(at.best_reference[position]),
            test=said(at.best_test[position]),
            kld=float(at.kld[position]),
            nmse=float(at.nmse[position]),
            other_experts=bool(measured.choices.differs[position]),
            margin=float(margins[position]),
        )
        for position in order
    ]
