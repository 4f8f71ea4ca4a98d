"""What was published or measured of kernels on GPUs, next to what the model says of them (gpu_model.py).

Input: the model, measured times of records. Output: the table "How far it is off" of docs/gpu-roofline.md, and the
range of the errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kimi_gguf.bench.device_operators import RECURRENCE
from kimi_gguf.bench.page import short_time
from kimi_gguf.bench.report import Rows
from kimi_gguf.scripts.gpu_devices import GPUS, Gpu
from kimi_gguf.scripts.gpu_model import (
    HEAD,
    HEADS,
    TOKENS,
    Model,
    attend,
    decompressed,
    flash_attention,
    gated_delta_net,
    kda_forward,
    kda_step,
    upstream_attention,
)

Measured = dict[tuple[str, str, str], float]  # seconds by device, operator and parameters

# Upstream's recurrence, 32 heads of 128, on an RTX 5090 (llama.cpp pull request 22587): seconds by tokens, timed from
# the host. One token takes 28 µs there, so the difference of two lengths is what the kernel takes.
DELTA_NET_GPU = "RTX 5090"
DELTA_NET = {128: 84.7e-6, 256: 155.6e-6, 512: 279.6e-6, 1024: 525.1e-6}
# Upstream's attention: llama-bench of DeepSeek-V2-Lite in Q4_0 (27 layers, 16 heads over a latent of 576) on an RTX
# 3090, 512 tokens in microbatches: tokens/s with an empty cache (pull request 15525) and with 32768 keys (19057).
FLASH_GPU, FLASH_LAYERS, FLASH_HEADS, FLASH_DEPTH, FLASH_TEST = "RTX 3090", 27, 16, 32768, 512
FLASH = {16: (784.29, 587.24), 32: (1209.58, 770.71), 64: (1802.95, 946.42), 128: (2253.15, 1033.12)}


@dataclass(frozen=True)
class Attention:
    """One layer's attention on an H200 (docs/measure-on-gpu.md): µs of our kernel and of upstream's."""

    kind: str
    queries: int
    keys: int
    ours: float
    upstream: float

    @property
    def is_absorbed(self) -> bool:
        """Whether ours was the absorbed kernel; else LATENT_ATTN."""
        return self.queries <= 8


ATTENTION_GPU = "H200"
ATTENTION = (
    Attention("f16", 1, 4096, 15.6, 25.3),
    Attention("f16", 1, 16384, 23.1, 44.4),
    Attention("f16", 1, 65536, 54.1, 67.0),
    Attention("f16", 1, 131072, 92.2, 94.3),
    Attention("q8_0", 1, 4096, 18.3, 26.6),
    Attention("q8_0", 1, 16384, 27.0, 54.1),
    Attention("q8_0", 1, 65536, 66.9, 98.7),
    Attention("f16", 8, 16384, 83, 78),
    Attention("f16", 8, 131072, 609, 483),
    Attention("q8_0", 8, 65536, 303, 284),
    Attention("f16", 512, 4096, 595, 868),
    Attention("f16", 512, 16384, 2170, 3200),
)


@dataclass(frozen=True)
class Compared:
    """A published or measured time and the model's, in seconds. whole_call: with the time of a call from the host."""

    name: str
    found: float
    model: float
    measured: bool = False
    whole_call: bool = False

    @property
    def share(self) -> float:
        """model / found."""
        return self.model / self.found


def _gpu(name: str) -> Gpu:
    return next(gpu for gpu in GPUS if gpu.name == name)


def recurrence(model: Model) -> Iterator[Compared]:
    """Upstream's recurrence on an RTX 5090."""
    gpu, name = _gpu(DELTA_NET_GPU), f"upstream's recurrence, {HEADS} heads, {DELTA_NET_GPU}"
    if not model.knows(gpu):
        return
    ours = {n: model.estimate(gated_delta_net(HEADS, n, False), gpu).seconds for n in DELTA_NET}
    for n, seconds in DELTA_NET.items():
        yield Compared(f"{name}: {n} tokens", seconds, ours[n], whole_call=True)
    least, most = min(DELTA_NET), max(DELTA_NET)
    yield Compared(
        f"{name}: from {least} to {most} tokens", DELTA_NET[most] - DELTA_NET[least], ours[most] - ours[least]
    )


def flash(model: Model) -> Iterator[Compared]:
    """Upstream's attention of one layer on an RTX 3090, by the microbatch. Half of the test's tokens are keys."""
    gpu = _gpu(FLASH_GPU)
    name = f"upstream's attention of {FLASH_HEADS} heads over {FLASH_DEPTH} keys, {FLASH_GPU}"
    if not model.knows(gpu):
        return
    for queries, (empty, deep) in FLASH.items():
        published = queries * (1 / deep - 1 / empty) / FLASH_LAYERS
        ours = [
            model.total(flash_attention("f16", queries, keys + FLASH_TEST // 2, FLASH_HEADS)(model, gpu), gpu)
            for keys in (0, FLASH_DEPTH)
        ]
        yield Compared(f"{name}: {queries} queries", published, ours[1] - ours[0])


def scan_shape(tokens: int) -> str:
    """How a record names KDA_SCAN of one sequence."""
    return f"head_size={HEAD},head_count={HEADS},n_seq_tokens={tokens},n_seqs=1"


def recorded(model: Model, measured: Measured) -> Iterator[Compared]:
    """What records have of KDA_SCAN, and of upstream's recurrence with decays by channel."""
    for gpu in filter(model.knows, GPUS):
        for tokens in (1, 64, 256, 512, 2048, TOKENS):
            if found := measured.get((gpu.name, "KDA_SCAN", scan_shape(tokens))):
                if tokens == 1:
                    ours = model.estimate(kda_step(gpu, 1), gpu).seconds
                else:
                    ours = kda_forward(model, gpu, tokens=tokens).seconds(model, gpu)
                name = f"KDA_SCAN, {HEADS} heads, {gpu.name}: {tokens} token{'s' if tokens > 1 else ''}"
                yield Compared(name, found, ours, measured=True)
        for tokens in (512, TOKENS):
            if found := measured.get((gpu.name, RECURRENCE, f"kda=1,n_seq_tokens={tokens}")):
                ours = model.estimate(gated_delta_net(HEADS, tokens, True), gpu).seconds
                name = f"upstream's recurrence, {HEADS} heads, {gpu.name}: {tokens} tokens"
                yield Compared(name, found, ours, measured=True)


def attention(model: Model) -> Iterator[tuple[Compared, Compared]]:
    """Ours and upstream's attention of 32 heads on an H200."""
    gpu = _gpu(ATTENTION_GPU)
    if not model.knows(gpu):
        return
    for each in ATTENTION:
        if each.is_absorbed:
            launches = attend(model, gpu, each.kind, each.queries, each.keys)
        else:
            launches = decompressed(model, each.kind, each.queries, each.keys)
        noun = "query" if each.queries == 1 else "queries"
        what = f"attention of {HEADS} heads over {each.keys} keys, {each.kind.upper()}, H200: {each.queries} {noun}"
        theirs = upstream_attention(model, gpu, each.kind, each.queries, each.keys)
        yield (
            Compared(f"our {what}", each.ours / 1e6, model.total(launches, gpu), measured=True),
            Compared(f"upstream's {what}", each.upstream / 1e6, theirs, measured=True),
        )


def compared(model: Model, measured: Measured) -> list[Compared]:
    """All comparisons, in the order of the table."""
    pairs = [each for pair in attention(model) for each in pair]
    return [*recorded(model, measured), *pairs, *recurrence(model), *flash(model)]


def calibration_table(model: Model, measured: Measured) -> Rows:
    """Published and measured times next to the model's."""
    rows: Rows = [("kernel", "published or measured", "model", "model / the other")]
    for each in compared(model, measured):
        found = short_time(each.found) + (", measured" if each.measured else "")
        rows.append((each.name, found, short_time(each.model), f"{each.share:.2f}"))
    return rows


def errors(model: Model, measured: Measured) -> tuple[float, float]:
    """The least and the largest model / published or measured, without the times of whole calls."""
    shares = [each.share for each in compared(model, measured) if not each.whole_call]
    return min(shares), max(shares)


def ratio_errors(model: Model) -> tuple[float, float]:
    """The least and the largest error of upstream's time / ours: the model's ratio / the measured ratio."""
    shares = [theirs.share / ours.share for ours, theirs in attention(model)]
    return min(shares, default=1.0), max(shares, default=1.0)
