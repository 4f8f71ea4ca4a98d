"""How many layers' experts of the 48B fit on a graphics card, from the sizes of its tensors.

Output: the table of docs/gpu.md. Nothing is loaded or measured.

    python -m kimi_gguf.scripts.gpu_memory
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kimi_gguf.convert.model.families import outputs, read_config
from kimi_gguf.convert.model.kimi_linear import published_config
from kimi_gguf.convert.plan import in_file_order
from kimi_gguf.convert.types.mixes import RECIPES, choose_types
from kimi_gguf.engine.tensor_types import F32

GIB = 1 << 30
CARDS = (12, 16, 24, 32, 80)  # GiB
MIXES = ("kimi-q4", "kimi-q3")
CONTEXT = 32768  # tokens
LATENT = 576  # halves per token and layer with attention
STATES = (
    20 * (32 * 128 * 128 + 3 * 3 * 4096) * 4
)  # of one sequence: 20 KDA layers, state and three convolutions

# Left free: what --fit leaves by default, and what a driver takes.
MARGIN = 1 * GIB
DRIVER = GIB // 2
# Logits of a ubatch of 512, LATENT_ATTN and KDA_SCAN (64 and 48 MiB of scratch), activations; estimated.
COMPUTE = GIB // 2


@dataclass(frozen=True)
class Sizes:
    """Bytes of a file's tensors."""

    experts: int  # of the routed experts of a layer
    layers: int  # with experts
    embedding: int  # stays in the memory of the CPU
    rest: int

    @property
    def total(self) -> int:
        return self.experts * self.layers + self.embedding + self.rest


def sizes(mix: str) -> Sizes:
    """The tensors of the 48B in a mix."""
    config = read_config(published_config(), "config.json")
    every = sorted(outputs(config), key=in_file_order)
    chosen = choose_types(config, every, RECIPES[mix], False)
    nbytes = {each.name: (chosen[each.name] or F32).nbytes(each.ne) for each in every}
    experts = {name: n for name, n in nbytes.items() if "_exps." in name}
    layers = len({name.split(".")[1] for name in experts})
    embedding = nbytes["token_embd.weight"]
    return Sizes(
        sum(experts.values()) // layers,
        layers,
        embedding,
        sum(nbytes.values()) - sum(experts.values()) - embedding,
    )


def on_the_cpu(mix: str, card: int) -> int:
    """The smallest --n-cpu-moe with which the model fits on the card."""
    found = sizes(mix)
    cache = 7 * LATENT * 2 * CONTEXT + STATES
    # a layer's experts are copied to the card for long batches, one of its three tensors at a time, ahead of use
    room = card * GIB - MARGIN - DRIVER - COMPUTE - cache - found.rest
    for n in range(found.layers + 1):
        copies = found.experts * 2 // 3 if n else 0
        if found.experts * (found.layers - n) + copies <= room:
            return n + 1 if n else 0  # the first layer has no experts, and llama.cpp counts it
    raise ValueError(f"{mix} does not fit on a card of {card} GiB")


def table() -> Iterator[str]:
    totals = [(mix, sizes(mix).total) for mix in MIXES]
    titles = (f"{mix}, {total / 1e9:.1f} GB ({total / GIB:.1f} GiB)" for mix, total in totals)
    yield f"| card | {' | '.join(titles)} |"
    yield "| --- |" + " --- |" * len(MIXES)
    for card in CARDS:
        cells = []
        for mix in MIXES:
            n, found = on_the_cpu(mix, card), sizes(mix)
            moved = max(0, n - 1) * found.experts
            cells.append(
                f"`--n-cpu-moe {n}`: {moved / GIB:.1f} GiB of experts in the CPU's memory"
                if n
                else "all experts on the card"
            )
        yield f"| {card} GiB | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
