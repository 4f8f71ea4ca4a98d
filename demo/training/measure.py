"""Measures the demo checkpoint: perplexity, memorized definitions, answers, expert load.

Input: a model and an encoder. Output: numbers and text for the log and the README.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from batches import windows
from corpus import exchange
from model import KDA, DemoModel
from tokenizer import Encoder, chat_ids
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from kimi_gguf.tools.tokenizer_files import SYSTEM_MESSAGE

WINDOW = 512


@torch.no_grad()
def heldout_perplexity(model: DemoModel, encoder: Encoder, texts: list[str]) -> float:
    """exp of the mean loss over windows of the joined texts, each window on its own."""
    rows = windows(encoder.encode("".join(texts)), WINDOW)
    with _undisturbed(model):
        losses = [
            F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none").double() for row in rows
        ]
    return float(torch.cat(losses).mean().exp())


@torch.no_grad()
def known_share(model: DemoModel, encoder: Encoder, definitions: dict[str, str], batch: int = 32) -> float:
    """Share of words that greedy decoding answers verbatim.

    Computed without decoding: the answer is given if and only if each of its tokens is the most likely one.
    """
    rows = []
    for word, definition in definitions.items():
        segments = chat_ids(encoder, [("system", SYSTEM_MESSAGE), *exchange(word, definition)])
        rows.append(([token for ids, _ in segments for token in ids], len(segments[-1][0])))
    rows.sort(key=lambda row: len(row[0]))
    known = 0
    with _undisturbed(model):
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            width = max(len(ids) for ids, _ in part)
            best = model(torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part])).argmax(-1)
            for predicted, (ids, length) in zip(best.tolist(), part, strict=True):
                first = len(ids) - length
                known += predicted[first - 1 : len(ids) - 1] == ids[first:]
    return known / len(rows)


def reply(model: DemoModel, encoder: Encoder, question: str, limit: int = 60) -> str:
    """The greedy answer to one question in the chat template, without `<|im_end|>`."""
    segments = chat_ids(encoder, [("system", SYSTEM_MESSAGE), ("user", question)])
    head = [
        encoder.special("<|im_assistant|>"),
        *encoder.encode("assistant"),
        encoder.special("<|im_middle|>"),
    ]
    return continued(model, encoder, [token for ids, _ in segments for token in ids] + head, limit)


@torch.no_grad()
def continued(model: DemoModel, encoder: Encoder, prompt: list[int], limit: int) -> str:
    """Greedy continuation of `prompt` up to a special token or `limit` tokens."""
    ids = list(prompt)
    with _undisturbed(model):
        while len(ids) < len(prompt) + limit:
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
            if token >= len(encoder.ranks):
                break
            ids.append(token)
    return encoder.decode(ids[len(prompt) :])


@contextmanager
def without_routing_bias(model: DemoModel) -> Iterator[None]:
    """Within the block, experts are chosen without the routing bias."""
    biases = [router.e_score_correction_bias for router in model.routers()]
    with _restored(biases):
        for bias in biases:
            bias.zero_()
        yield


@torch.no_grad()
def expert_loads(model: DemoModel, encoder: Encoder, texts: list[str]) -> list[Tensor]:
    """For each MoE layer the share of the choices that each expert gets, [experts], on windows of `texts`."""
    rows = windows(encoder.encode("".join(texts)), WINDOW)
    with _undisturbed(model):
        for router in model.routers():
            router.load.zero_()
        for row in rows:
            model(row[None, :-1])
        return [router.load / router.load.sum() for router in model.routers()]


@torch.no_grad()
def log_gates(model: DemoModel, encoder: Encoder, texts: list[str]) -> Tensor:
    """All log-gates of all KDA layers on windows of `texts`, sorted, flat."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, KDA)
        seen.append(module.log_gate(inputs[0]).flatten())

    hooks = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, KDA)]
    with _undisturbed(model):
        for row in windows(encoder.encode("".join(texts)), WINDOW):
            model(row[None, :-1])
    for hook in hooks:
        hook.remove()
    return torch.cat(seen).sort().values


def _undisturbed(model: DemoModel) -> AbstractContextManager[None]:
    """Within the block, the load counts used for balancing do not change."""
    return _restored([router.load for router in model.routers()])


@contextmanager
def _restored(tensors: list[Tensor]) -> Iterator[None]:
    """After the block, the tensors have their values from before it."""
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, values in zip(tensors, kept, strict=True):
            tensor.copy_(values)
