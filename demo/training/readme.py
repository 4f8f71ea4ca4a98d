"""Writes the demo checkpoint's README; all figures are measured on the exported weights.

Input: the exported folder and its model. Output: README.md in that folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import measure
import torch
from corpus import Corpus, question
from model import DemoModel, hub_tensors
from tokenizer import Encoder

from kimi_gguf.engine.facts import machine_facts

README_FILE = "README.md"
ASKED = ("dog", "elephant", "river", "breakfast", "teacher", "smoke")  # taught
UNTAUGHT = "bread"
CONTINUED = 40  # tokens
OPENINGS = ("sadness:", "oak tree:")
TEMPLATE = """\
# The demo checkpoint

A Kimi-Linear model that is small enough to keep in the repository. It is trained well enough that its text shows at
once whether a conversion or a kernel broke it: it writes dictionary entries, and answers `define: WORD` with a
definition. It is not an assistant, and it knows nothing else.

{parameters:,} parameters in {layers} layers (KDA, KDA, KDA, MLA), hidden size {hidden},
{experts} experts of which {used} are used. These are the same as in Kimi-Linear-48B-A3B: head sizes, convolution,
latent, the 3:1 pattern of layers, the layout of the files, tensor names and dtypes, special tokens and the chat
format. The tokenizer has {ranks} byte-level BPE ranks and the model's own split pattern. The
weights are bf16, `A_log` and `dt_bias` float32.

## Measured on these files

| | |
| --- | --- |
| perplexity on `heldout.txt`, windows of {window} tokens, float32 arithmetic | **{perplexity:.2f}** |
| the same model untrained | {untrained:.0f} |
| the same model without the routing bias | {unbiased:.2f} |
| taught definitions that greedy decoding reproduces verbatim | {known:.1%} of {words} |
| share of the tokens' choices: least and most used expert of a layer | {least:.1%} to {most:.1%} |
| log-gates per step: median, lowest 1 %, lowest | {gate_median:.3g}, {gate_percent:.3g}, {gate_lowest:.3g} |

Greedy answers, in float32:

```text
{answers}
```

Greedy continuations of free text:

```text
{continuations}
```

A word that is not among the {words} taught ones, like `{untaught}`, gets the entry of another word or an
invented one. Free text looks like a dictionary and makes little sense; a broken model is visibly worse.

## How it was made

```sh
apt-get install wordnet-base
PYTHONPATH=src .venv/bin/python demo/training/train.py --out demo
```

{steps} steps, {text:.2f} million tokens of free text and {conversation:.2f} million of conversations,
{minutes:.0f} minutes on one thread of one CPU ({cpu}), torch {torch}. Free text is
WordNet's glosses with the words they explain, a dozen neighbouring entries to a document; conversations ask
for some of {words} common words. `heldout.txt` was never trained on. The training state is saved
regularly in `out/demo-training/`; the same command continues an interrupted run from there.

## Licence

The text comes from WordNet 3.0, Copyright 2006 by Princeton University; its notice is in
`LICENSE-wordnet` and must be included in copies. Everything else is under the project's licence.

## Files

| file | bytes | sha256 |
| --- | ---: | --- |
{files}
"""


def write_readme(
    folder: Path,
    *,
    model: DemoModel,
    encoder: Encoder,
    corpus: Corpus,
    untrained: float,
    seconds: float,
    tokens: dict[str, int],
    steps: int,
) -> None:
    """Measures `model`, whose weights must be those in `folder`, and writes the README.

    untrained: held-out perplexity before training; seconds: spent on training steps; tokens: seen, by kind.
    """
    config = model.config
    loads = torch.stack(measure.expert_loads(model, encoder, corpus.heldout))
    gates = measure.log_gates(model, encoder, corpus.heldout)
    with measure.without_routing_bias(model):
        unbiased = measure.heldout_perplexity(model, encoder, corpus.heldout)
    answers = [
        f"> {question(word)}\n{measure.reply(model, encoder, question(word))}" for word in (*ASKED, UNTAUGHT)
    ]
    continuations = [
        opening + measure.continued(model, encoder, encoder.encode(opening), CONTINUED)
        for opening in OPENINGS
    ]
    text = TEMPLATE.format(
        parameters=sum(tensor.numel() for _, tensor in hub_tensors(model)),
        layers=len(config.layers),
        hidden=config.hidden_size,
        experts=config.num_experts,
        used=config.num_experts_per_token,
        ranks=len(encoder.ranks),
        window=measure.WINDOW,
        perplexity=measure.heldout_perplexity(model, encoder, corpus.heldout),
        untrained=untrained,
        unbiased=unbiased,
        known=measure.known_share(model, encoder, corpus.definitions),
        words=len(corpus.definitions),
        untaught=UNTAUGHT,
        least=loads.min(),
        most=loads.max(),
        gate_median=gates[len(gates) // 2],
        gate_percent=gates[len(gates) // 100],
        gate_lowest=gates[0],
        answers="\n\n".join(answers),
        continuations="\n\n".join(text.rstrip() for text in continuations),
        steps=steps,
        text=tokens["text"] / 1e6,
        conversation=tokens["conversation"] / 1e6,
        minutes=seconds / 60,
        cpu=machine_facts()["processor"],
        torch=torch.__version__.split("+")[0],
        files="\n".join(
            _file_row(path)
            for path in sorted(folder.iterdir())
            if path.is_file() and path.name != README_FILE
        ),
    )
    (folder / README_FILE).write_text(text, encoding="utf-8")


def _file_row(path: Path) -> str:
    content = path.read_bytes()
    return f"| `{path.name}` | {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |"
