"""The figures of the MTP layer: which positions have other experts than the reference."""

from __future__ import annotations

import numpy as np

from kimi_gguf.validate.llama import LlamaRun
from kimi_gguf.validate.measure import PLAIN, Answer, MtpTruth, Truth, measure_mtp


def test_experts_of_the_other_layers_count_one_position_later() -> None:
    """The MTP layer reads the hidden state of the token before."""
    logits = np.random.default_rng(3).standard_normal((4, 6))
    experts = np.tile([1, 2], (4, 1))
    margins = np.ones(4)
    mtp = MtpTruth(layer=2, logits=logits, experts=experts, margins=margins)
    expected = Truth(np.arange(4), logits, {}, {1: experts}, {1: margins}, {1: "kda"}, mtp)
    others, others_of_mtp = experts.astype(np.int32), experts.astype(np.int32)
    others[1] = others_of_mtp[3] = [1, 3]
    run = LlamaRun([logits], [logits], experts={1: others, 2: others_of_mtp})
    measured = measure_mtp(expected, Answer(PLAIN, run, run))
    assert measured.choices.differs.tolist() == [False, False, True, True]
    assert measured.choices.by_layer[1].tolist() == [False, False, True, False]
