"""One key of a GGUF file's metadata."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGUFValueType as ValueType

Value = int | float | bool | str | list[int] | list[float] | list[str]


@dataclass(frozen=True)
class Key:
    """One key; `items` is the type of an array's elements."""

    name: str
    type: ValueType
    value: Value
    items: ValueType | None = None


def u32(name: str, value: int) -> Key:
    return Key(name, ValueType.UINT32, value)
