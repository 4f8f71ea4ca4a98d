"""Trains the demo checkpoint on WordNet with one CPU thread and writes it in the hub's layout.

    PYTHONPATH=src .venv/bin/python demo/training/train.py --out demo

Input: WordNet's database. Output: a folder with config, shards, tokenizer, held-out text and README. The result
depends on the seed and on the version of torch.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpus as wordnet
import torch
from batches import Batches
from corpus import Corpus, CorpusError, build_corpus, question
from export import export, load
from measure import heldout_perplexity, known_share
from model import DemoModel, demo_config
from readme import write_readme
from tokenizer import Encoder, train_ranks
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from kimi_gguf.bench.files import atomically
from kimi_gguf.tools.tokenizer_files import SYSTEM_MESSAGE

EXAMPLES = """examples:
  PYTHONPATH=src .venv/bin/python demo/training/train.py --out demo
  PYTHONPATH=src .venv/bin/python demo/training/train.py --out out/try --steps 100 --work out/try-state
"""
WARM_UP_STEPS = 60
FINAL_RATE = 0.03  # of the peak
BALANCE_RATE = 3e-3  # step of the routing bias, times the learning-rate schedule
WEIGHT_DECAY = 0.1
CHAT_WEIGHT = 300  # how often each question counts for the tokenizer: taught words become single tokens


@dataclass(frozen=True)
class Settings:
    steps: int
    rows: int
    length: int
    rate: float
    seed: int


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to `FINAL_RATE`."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    done = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: DemoModel, rate: float) -> torch.optim.Optimizer:
    """AdamW; only matrices decay, not embeddings, norms, convolutions, A_log or biases."""
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (WEIGHT_DECAY, 0.0)]
    for name, weight in model.named_parameters():
        plain = weight.ndim < 2 or any(part in name for part in ("embed_tokens", "conv1d", "A_log"))
        groups[plain]["params"].append(weight)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def train_step(model: DemoModel, optimizer: torch.optim.Optimizer, ids: Tensor, mask: Tensor) -> float:
    """One update; ids [B, T+1], mask [B, T]. Returns the mean loss over the tokens to learn, in nats."""
    logits = model(ids[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    loss = (losses * mask.flatten()).sum() / mask.sum()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def chat_texts(corpus: Corpus) -> list[str]:
    """The fixed text of conversations, and each word with and without a leading space."""
    words = list(corpus.definitions)
    return ["system", "user", "assistant", SYSTEM_MESSAGE, *map(question, words), *words]


def fingerprint(corpus: Corpus, encoder: Encoder) -> str:
    """A hash of the training data: text, taught words, vocabulary."""
    known = (corpus.documents, corpus.heldout, corpus.definitions, encoder.ranks)
    return hashlib.sha256(repr(known).encode()).hexdigest()


class Run:
    """The state of a training run: model, optimizer, batches and step; saved to a file."""

    def __init__(self, corpus: Corpus, encoder: Encoder, settings: Settings, state_file: Path) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.state_file = settings, state_file
        self.data = fingerprint(corpus, encoder)
        self.model = DemoModel(demo_config())
        self.optimizer = make_optimizer(self.model, settings.rate)
        self.batches = Batches(corpus, encoder, settings.seed, settings.rows, settings.length)
        self.step, self.seconds = 0, 0.0

    def save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "data": self.data,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        atomically(self.state_file, lambda part: torch.save(state, part))

    def resume(self) -> None:
        """Continue from the state file. It is a pickle: load only files written by this script."""
        state: dict[str, Any] = torch.load(self.state_file, weights_only=False)
        if state["settings"] != asdict(self.settings):
            raise SystemExit(
                f"{self.state_file}: belongs to a run with {state['settings']}, this one has "
                f"{asdict(self.settings)}; give the same options or another --work folder"
            )
        if state["data"] != self.data:
            raise SystemExit(
                f"{self.state_file}: belongs to a run on other text or another vocabulary; "
                "train again with another --work folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.resume(state["batches"])
        self.step, self.seconds = state["step"], state["seconds"]

    def advance(self) -> float:
        """Run one step and return its loss."""
        began = time.monotonic()
        factor = schedule(self.step, self.settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * factor
        loss = train_step(self.model, self.optimizer, *self.batches.next())
        for router in self.model.routers():
            router.balance(BALANCE_RATE * factor)
        self.step += 1
        self.seconds += time.monotonic() - began
        return loss


def say(text: str, log: Path) -> None:
    """Print a line, and add it to the log."""
    print(text, flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train",
        description="Train the demo checkpoint from WordNet and write it in the hub's layout.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write the checkpoint to")
    add("--work", type=Path, default=Path("out/demo-training"),
        help="folder for the state and log; an interrupted run continues from it (default: %(default)s)")  # fmt: skip
    add(
        "--wordnet",
        type=Path,
        default=wordnet.WORDNET,
        help="folder with WordNet's data.* (default: %(default)s)",
    )
    add("--notice", type=Path, default=wordnet.NOTICE, help="WordNet's licence notice (default: %(default)s)")
    add("--steps", type=int, default=1500, help="optimiser steps (default: %(default)s)")
    add("--rows", type=int, default=4, help="sequences per step (default: %(default)s)")
    add("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    add("--rate", type=float, default=2.5e-3, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of data and weights (default: %(default)s)")
    add("--save-every", type=int, default=150, help="steps between saves (default: %(default)s)")
    add("--snapshots", type=Path, help="also export at every save, to this folder")
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except CorpusError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    settings = Settings(args.steps, args.rows, args.length, args.rate, args.seed)
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    log = work / "log"

    corpus = build_corpus(args.wordnet, args.seed)
    notice = wordnet.read_notice(args.notice)
    say(f"{len(corpus.documents)} documents, {len(corpus.definitions)} taught words", log)
    began = time.monotonic()
    ranks = train_ranks(corpus.documents, frequent=dict.fromkeys(chat_texts(corpus), CHAT_WEIGHT))
    say(f"{len(ranks)} ranks in {time.monotonic() - began:.0f} s", log)
    encoder = Encoder(ranks)
    training = Run(corpus, encoder, settings, work / "state.pt")
    untrained = heldout_perplexity(training.model, encoder, corpus.heldout)
    say(f"untrained: held-out perplexity {untrained:.1f}", log)
    if training.state_file.exists():
        training.resume()
        say(f"continues at step {training.step}", log)

    average = 0.0
    while training.step < settings.steps:
        loss = training.advance()
        average = loss if average == 0.0 else 0.95 * average + 0.05 * loss
        step = training.step
        if step % 10 == 0:
            left = training.seconds / step * (settings.steps - step) / 60
            speed = step * settings.rows * settings.length / training.seconds
            progress = f"step {step}/{settings.steps}  loss {average:.3f}  {speed:.0f} tokens/s"
            say(f"{progress}  {left:.1f} min left", log)
        if step % args.save_every == 0 or step == settings.steps:
            training.save()
            perplexity = heldout_perplexity(training.model, encoder, corpus.heldout)
            known = known_share(training.model, encoder, corpus.definitions)
            say(f"step {step}: held-out perplexity {perplexity:.2f}, knows {known:.1%} of its words", log)
            if args.snapshots:
                export(args.snapshots, training.model, ranks, corpus.heldout, notice)

    export(args.out, training.model, ranks, corpus.heldout, notice)
    write_readme(
        args.out,
        model=load(args.out, training.model.config),
        encoder=encoder,
        corpus=corpus,
        untrained=untrained,
        seconds=training.seconds,
        tokens=training.batches.tokens,
        steps=settings.steps,
    )
    say(f"wrote {args.out}", log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
