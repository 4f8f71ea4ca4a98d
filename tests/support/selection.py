"""Parameters of tests of which `scripts/test` runs only some, and `scripts/test --full` all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some_of(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """The values as parameters; those that are not chosen are marked `full`."""
    return [pytest.param(value, marks=() if value in chosen else pytest.mark.full) for value in values]
