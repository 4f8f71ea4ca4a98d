"""What makes a family of models: a description for each architecture with Kimi Delta Attention.

To add one, write a module with a `FAMILY` and add it to families.py. The rest of the converter knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from kimi_gguf.convert.model.config import ModelConfig
from kimi_gguf.convert.model.config_keys import Keys
from kimi_gguf.convert.model.gguf_key import Key
from kimi_gguf.convert.model.layouts import Rule
from kimi_gguf.convert.model.tensor_table import FLOAT32, Table
from kimi_gguf.convert.model.vocab import Vocab


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp, and the checkpoints that become it."""

    title: str  # for people
    architecture: str  # general.architecture
    model_types: tuple[str, ...]  # of config.json
    read_config: Callable[[Keys], ModelConfig]
    table: Table
    load_vocab: Callable[[Path, ModelConfig], Vocab]
    rules: tuple[Rule, ...] = ()  # the layouts besides the hub's
    own_keys: Callable[[ModelConfig], Iterable[Key]] = lambda config: ()  # GGUF keys that others do not have
    ignored: tuple[str, ...] = ()  # how names of tensors begin that belong to other parts of the checkpoint
    float32: tuple[str, ...] = FLOAT32  # how names of tensors end that are F32 in published checkpoints
    # The config of a checkpoint that stores tensors of these names, with or without layers for further tokens.
    stored: Callable[[ModelConfig, Collection[str], bool], ModelConfig] = lambda config, names, mtp: config
    # As `ignored`, for tensors of the model that the file does not have.
    left_out: Callable[[ModelConfig], tuple[str, ...]] = lambda config: ()
    notes: Callable[[ModelConfig], Iterable[str]] = lambda config: ()  # information for the user
    template: str | None = None  # address of llama.cpp's chat template, for models that publish none
    # How names of vectors end that may be longer in the checkpoint than their shape; the rest is not used.
    padded: tuple[str, ...] = ()
    # Delicate matrices, by parts of their GGUF names, as in llama-quantize with the project's patches: those that are
    # never quantized (small ones before a sigmoid), and those that mixes give at least Q8_0.
    not_quantized: tuple[str, ...] = ()
    at_least_q8_0: tuple[str, ...] = ()
    # What MXFP4_MOE stores in MXFP4: the tensors of FFNs with several matrices, or all tensors with several.
    mxfp4_only_ffn: bool = False
    # For the model card: the tokenizer's end token, which is not the one that ends the model's answers.
    tokenizer_eos: str = "own end token"
