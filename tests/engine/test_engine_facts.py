"""The name of the processor in reports."""

from __future__ import annotations

import pytest

from kimi_gguf.engine.facts import processor


@pytest.mark.parametrize(
    ("name", "family", "model", "expected"),
    [
        ("AMD EPYC", "25", "17", "AMD EPYC (Zen 4)"),
        ("AMD EPYC", "26", "2", "AMD EPYC (Zen 5)"),
        ("AMD EPYC", "26", "80", "AMD EPYC"),  # not known
        # a number says which it is; QEMU's models have the family of the first EPYC with such a name
        ("AMD EPYC 7763 64-Core Processor", "25", "1", "AMD EPYC 7763 64-Core Processor"),
        ("AMD EPYC-Rome Processor", "23", "49", "AMD EPYC-Rome Processor"),
    ],
)
def test_the_generation_of_an_epyc_without_a_number_is_named(
    name: str, family: str, model: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"model name": name, "cpu family": family, "model": model}
    monkeypatch.setattr("kimi_gguf.engine.facts.cpuinfo", lambda key: info[key])
    assert processor() == expected
