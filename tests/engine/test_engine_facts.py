"""The name of the processor in reports."""

from __future__ import annotations

import pytest

from kimi_gguf.engine.facts import processor


@pytest.mark.parametrize(
    ("vendor", "family", "model", "expected"),
    [
        ("AuthenticAMD", "23", "1", "AMD EPYC (Zen 1)"),
        ("AuthenticAMD", "23", "49", "AMD EPYC (Zen 2)"),
        ("AuthenticAMD", "25", "1", "AMD EPYC (Zen 3)"),
        ("AuthenticAMD", "25", "17", "AMD EPYC (Zen 4)"),
        ("AuthenticAMD", "26", "2", "AMD EPYC (Zen 5)"),
        ("AuthenticAMD", "26", "80", "AMD EPYC"),  # not known
        ("GenuineIntel", "6", "143", "AMD EPYC"),  # an Intel family 6 is no Zen
        ("", "", "", "AMD EPYC"),  # another architecture
    ],
)
def test_the_generation_of_an_epyc_is_named(
    vendor: str, family: str, model: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"model name": "AMD EPYC", "vendor_id": vendor, "cpu family": family, "model": model}
    monkeypatch.setattr("kimi_gguf.engine.facts.cpuinfo", lambda name: info[name])
    assert processor() == expected
