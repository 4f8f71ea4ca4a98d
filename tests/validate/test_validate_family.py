"""`validate-kimi` on random checkpoints of Ling 3 and Kimi K3: sound files pass, faults of each family are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
import random_k3
import random_ling3
from random_k3 import K3Spec
from random_ling3 import LingSpec

from kimi_gguf.convert.conversion import Options, convert
from kimi_gguf.convert.source.checkpoint import open_checkpoint
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.convert.types.mixes import MXFP4, TypeRequest
from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.faults import faults_of
from kimi_gguf.validate.cli import main
from kimi_gguf.validate.gates import Evidence, judge
from kimi_gguf.validate.llama import RunOptions
from kimi_gguf.validate.measure import VARIANTS, Answer, answer, measure, measure_mtp, truth
from kimi_gguf.validate.probe import reference_of, write_quiet_gguf
from kimi_gguf.validate.reference import Reference
from kimi_gguf.validate.tensors import TensorProof, prove

pytestmark = pytest.mark.engine

# Limits of a size that clamps some values; groups; steep gates; more than one block of residual attention.
LING = LingSpec(
    experts=8, experts_used=3, groups=4, topk_groups=2, limits=(0.0, *[0.02] * 5), shared_limits=(0.0, *[0.03] * 5),
    q_lora=24, mtp=True, rms_norm_eps=1e-5, std=0.3, seed=5,
)  # fmt: skip
# With larger weights this model amplifies the rounding of the float32 reference to NMSE 7e-10.
K3 = K3Spec(layers="KKMKM", situ_beta=1.0, situ_linear_beta=0.5, seed=6)
IDS = 72
WRITE: dict[str, Callable[[Path], Path]] = {
    "ling3": lambda folder: random_ling3.write_checkpoint(folder, LING),
    "k3": lambda folder: random_k3.write_checkpoint(folder, K3),
}
FAULTS = [
    *(("ling3", name, model) for name, model in faults_of("bailingmoe3").items()),
    *(("k3", name, model) for name, model in faults_of("kimi-k3").items()),
]


@dataclass(frozen=True)
class Made:
    """A checkpoint, its F32 file, and llama.cpp's results for some tokens."""

    checkpoint: Path
    gguf: Path
    ids: np.ndarray
    answers: list[Answer]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> dict[str, Made]:
    found = {}
    for name, write in WRITE.items():
        folder = tmp_path_factory.mktemp(name)
        checkpoint = write(folder / "checkpoint")
        gguf = folder / "model.gguf"
        convert(checkpoint, gguf, TYPES["F32"])
        quiet = write_quiet_gguf(gguf, folder / "quiet.gguf")
        with open_checkpoint(checkpoint) as opened:
            ids = np.random.default_rng(3).integers(0, opened.config.vocab_size, IDS)
        answers = [
            answer(engine, quiet if variant.quiet else gguf, ids, variant, RunOptions(mtp=name == "ling3"))
            for variant in VARIANTS
        ]
        found[name] = Made(checkpoint, gguf, ids, answers)
    return found


def gates_pass(made: Made, model: type[Reference] | None) -> bool:
    """Whether the gates of an F32 file hold for this reference."""
    with open_checkpoint(made.checkpoint) as checkpoint:
        expected = {
            quiet: truth(reference_of(checkpoint, quiet, model=model), made.ids) for quiet in (False, True)
        }
    runs = [measure(expected[each.variant.quiet], each) for each in made.answers]
    if expected[False].mtp is not None:
        runs += [measure_mtp(expected[each.variant.quiet], each) for each in made.answers]
    return all(gate.passed for gate in judge(Evidence("F32", runs, [], TensorProof())))


@pytest.mark.parametrize("family", WRITE)
def test_the_gates_hold_for_a_sound_file(made: dict[str, Made], family: str) -> None:
    assert gates_pass(made[family], None)


@pytest.mark.parametrize(
    "family, fault, model", FAULTS, ids=[f"{family}-{name}" for family, name, _ in FAULTS]
)
def test_each_fault_is_found(made: dict[str, Made], family: str, fault: str, model: type[Reference]) -> None:
    assert not gates_pass(made[family], model), fault


@pytest.mark.parametrize("family", WRITE)
def test_the_command_passes_a_sound_file_and_not_one_with_a_wrong_weight(
    made: dict[str, Made], family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(map(str, made[family].ids[:40])))
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(made[family].gguf.read_bytes())
    reader = gguf_py.GGUFReader(wrong, "r+")
    next(t for t in reader.tensors if t.name == "blk.2.attn_kv_a_norm.weight").data[3] += 1.0
    reader.data.flush()
    del reader
    options = ["--checkpoint", str(made[family].checkpoint), "--ids", str(ids), "--generate", "2"]
    options += ["--threads", "1"]
    assert main([str(made[family].gguf), *options, "--out", str(tmp_path / "sound")]) == 0
    report = json.loads((tmp_path / "sound" / "report.json").read_text())
    assert report["passed"] and report["tensors"]["proved"]
    assert {"ling3": "validate.ling3", "k3": "validate.kimi_k3"}[family] in report["reference"][
        "implementation"
    ]
    keys = ["plain", "flash", "quiet"]
    keys += [f"{key}-mtp" for key in keys if family == "ling3"]
    assert [run["variant"]["key"] for run in report["runs"]] == keys
    assert {gate["variant"] for gate in report["gates"]} == {
        "",
        *(run["variant"]["title"] for run in report["runs"]),
    }
    assert main([str(wrong), *options, "--out", str(tmp_path / "wrong")]) == 1
    assert "tensors that differ from the checkpoint: 1" in capsys.readouterr().out


def test_a_checkpoint_of_another_family_is_refused(
    made: dict[str, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(made["ling3"].gguf), "--checkpoint", str(made["k3"].checkpoint), "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "expected 'kimi-k3', as in the checkpoint, found 'bailingmoe3'" in capsys.readouterr().err


def test_a_file_without_the_mtp_layer_passes(made: dict[str, Made], tmp_path: Path) -> None:
    """`convert-kimi --no-mtp` leaves it out; the other layers are compared."""
    file, ids = tmp_path / "model.gguf", tmp_path / "ids.txt"
    ids.write_text(" ".join(map(str, made["ling3"].ids[:20])))
    convert(made["ling3"].checkpoint, file, TYPES["F32"], Options(mtp=False))
    options = ["--checkpoint", str(made["ling3"].checkpoint), "--ids", str(ids), "--generate", "2"]
    assert main([str(file), *options, "--threads", "1", "--out", str(tmp_path / "report")]) == 0


@pytest.mark.parametrize("has_mtp", [True, False])
def test_files_with_and_without_the_mtp_layer_are_compared(
    made: dict[str, Made], tmp_path: Path, has_mtp: bool
) -> None:
    """--against: the MTP layer takes no part in the logits."""
    file, ids = tmp_path / "without.gguf", tmp_path / "ids.txt"
    ids.write_text(" ".join(map(str, made["ling3"].ids[:20])))
    convert(made["ling3"].checkpoint, file, TYPES["F32"], Options(mtp=False))
    files = [made["ling3"].gguf, file]
    one, other = files if has_mtp else files[::-1]
    options = ["--checkpoint", str(made["ling3"].checkpoint), "--ids", str(ids), "--generate", "2"]
    options += ["--threads", "1", "--out", str(tmp_path / "report"), "--against", str(other)]
    assert main([str(one), *options]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    (rival,) = report["rivals"]
    assert rival["runs"][0]["all"] == report["runs"][0]["all"]


@pytest.mark.parametrize(
    "name, request_",
    [("mxfp4", MXFP4), ("Q8_0", TypeRequest(TYPES["Q8_0"])), ("BF16", TypeRequest(TYPES["BF16"]))],
)
def test_tensors_of_kimi_k3_are_proved(
    made: dict[str, Made], tmp_path: Path, name: str, request_: TypeRequest
) -> None:
    """MXFP4 experts are compared value by value: they are copied."""
    gguf = tmp_path / "model.gguf"
    convert(made["k3"].checkpoint, gguf, request_)
    with open_checkpoint(made["k3"].checkpoint) as checkpoint:
        assert prove(gguf, checkpoint).proved
        reader = gguf_py.GGUFReader(gguf, "r+")
        scores = next(t for t in reader.tensors if t.name == "output_res_score.weight")
        experts = next(t for t in reader.tensors if t.name == "blk.1.ffn_up_exps.weight")
        scores.data[5] *= 1.001
        experts.data.reshape(-1).view(np.uint8)[3] ^= 0x07
        reader.data.flush()
        del reader, scores, experts
        proof = prove(gguf, checkpoint)
    assert proof.failed == 2, (name, proof.failures)
