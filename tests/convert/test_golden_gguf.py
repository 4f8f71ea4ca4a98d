"""The layout of the GGUF files, compared with golden files in tests/golden.

The golden files were written by this project's converter, so they prove nothing about correctness; other tests do that.
They notice a change of the format that nobody intended: users' programs and files of earlier versions depend on it.
After an intended change, describe it in CHANGELOG.md and run this file's tests once with KIMI_GOLDEN=write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_checkpoint
import random_k3
import random_ling3
from gguf import GGUFReader, GGUFValueType

from kimi_gguf.convert.conversion import convert
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.mixes import MXFP4

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "kimi-linear": lambda folder: random_checkpoint.write_checkpoint(
        folder, random_checkpoint.Spec(layers="KM", groups=2, topk_groups=1, experts=8)
    ),
    "bailingmoe3": lambda folder: random_ling3.write_checkpoint(
        folder, random_ling3.LingSpec(layers="KKM", mtp=True)
    ),
    "kimi-k3": lambda folder: random_k3.write_checkpoint(folder, random_k3.K3Spec(layers="KM")),
}
CHANGES = ("kimi_gguf.source.", "tokenizer.chat_template")  # of these keys only the type is compared


def layout(path: Path) -> dict[str, Any]:
    """Keys with type and value (of lists: the length), and tensors with type, shape and offset, in the file's order."""
    reader = GGUFReader(path)
    keys: dict[str, str] = {}
    for name, field in reader.fields.items():
        value, kind = field.contents(), " ".join(each.name for each in field.types)
        if field.types[0] == GGUFValueType.ARRAY:
            kind += f" of {len(value)}"
        elif not name.startswith(CHANGES):
            kind += f" {value}"
        keys[name] = kind
    start = min(int(tensor.data_offset) for tensor in reader.tensors)
    tensors = {
        tensor.name: f"{tensor.tensor_type.name} {[int(n) for n in tensor.shape]} at {int(tensor.data_offset) - start}"
        for tensor in reader.tensors
    }
    return {"keys": keys, "tensors": tensors}


def made(family: str, folder: Path) -> dict[str, Any]:
    """The layout of a small file of the family, converted with default types."""
    source = FAMILIES[family](folder / "golden")
    convert(source, folder / "golden.gguf", MXFP4 if family == "kimi-k3" else TYPES["BF16"])
    return layout(folder / "golden.gguf")


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_is_that_of_the_golden_file(family: str, tmp_path: Path) -> None:
    found = made(family, tmp_path)
    golden = GOLDEN / f"gguf-{family}.json"
    if os.environ.get("KIMI_GOLDEN") == "write":
        golden.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{golden} was written; compare it with git diff, and test again without KIMI_GOLDEN")
    expected = json.loads(golden.read_text())
    assert found == expected
    for part in ("keys", "tensors"):
        assert list(found[part]) == list(expected[part]), f"the order of {part}"
