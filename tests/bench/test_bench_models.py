"""Generated models: published shapes, llama-quantize's types, random weights that both builds can run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_file import write_gguf

from kimi_gguf.bench import models
from kimi_gguf.bench.cells import Cell
from kimi_gguf.bench.families import COMPARABLE, FAMILIES
from kimi_gguf.bench.models import ModelFile, generate, open_model
from kimi_gguf.bench.roofline import demand
from kimi_gguf.bench.shapes import TYPES, BenchModel, chosen_model, plan_of
from kimi_gguf.bench.weights import Weights
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.model.kimi_linear import published_config
from kimi_gguf.convert.model.tensor_table import PlannedTensor
from kimi_gguf.convert.output import unfinished
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.gguf import GgufTensor
from kimi_gguf.engine.progress import Silent
from kimi_gguf.engine.tensor_types import TENSOR_TYPES
from kimi_gguf.validate.llama import RunOptions, run


def tiny(family: str = "kimi-linear", kind: str = "Q8_0", experts: int = 8) -> BenchModel:
    return BenchModel(family, 4, experts, kind, "tiny")


def made(model: BenchModel, engine: Engine) -> ModelFile:
    return open_model(generate(model, engine, Silent()))


def test_layers_have_the_48b_s_shapes() -> None:
    shapes = {tensor.name: tensor.output.ne for tensor in plan_of(BenchModel()).tensors}
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (2304, 163840)
    assert shapes["blk.0.ffn_up.weight"] == (2304, 9216)
    assert shapes["blk.0.attn_q.weight"] == (2304, 4096)
    assert shapes["blk.0.ssm_conv1d_v.weight"] == (4, 1, 4096, 1)
    assert shapes["blk.1.ffn_down_exps.weight"] == (1024, 2304, 32)
    assert shapes["blk.3.attn_q.weight"] == (2304, 6144)
    assert shapes["blk.3.attn_kv_a_mqa.weight"] == (2304, 576)
    assert shapes["blk.3.attn_k_b.weight"] == (128, 512, 32)
    latent = [name for name in shapes if name.endswith("attn_kv_a_mqa.weight")]
    assert latent == ["blk.3.attn_kv_a_mqa.weight", "blk.7.attn_kv_a_mqa.weight"]
    assert "blk.0.ffn_gate_exps.weight" not in shapes


def shapes_of(family: str) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.output.ne for tensor in plan_of(chosen_model(family)).tensors}


def test_the_whole_48b_has_the_published_kinds_of_layers() -> None:
    names = {tensor.name for tensor in plan_of(BenchModel(layers=27, experts=256)).tensors}
    latent = [number for number in range(1, 28) if f"blk.{number - 1}.attn_kv_a_mqa.weight" in names]
    assert latent == published_config()["linear_attn_config"]["full_attn_layers"]
    assert len(latent) == 7


def test_the_whole_ling_3_0_tiny_has_the_published_size() -> None:
    shapes = shapes_of("ling-3.0-tiny")
    assert round(sum(np.prod(ne) for ne in shapes.values()) / 1e9, 2) == 7.89
    latent = [name for name in shapes if name.endswith("attn_kv_a_mqa.weight")]
    assert latent == [f"blk.{i}.attn_kv_a_mqa.weight" for i in range(3, 24, 4)]
    assert shapes["blk.3.attn_q_b.weight"] == (256, 3072)
    assert shapes["blk.0.ssm_f_a.weight"] == (1536, 2048)
    assert shapes["blk.23.ffn_down_exps.weight"] == (512, 1536, 128)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("ling-3.0-flash", {
            "token_embd.weight": (2560, 157184),
            "blk.1.ffn_up.weight": (2560, 6144),
            "blk.2.ffn_up_exps.weight": (2560, 768, 32),
            "blk.5.attn_q.weight": (2560, 32 * 192),
            "blk.5.attn_gate.weight": (2560, 32),
            "blk.6.ssm_g_a.weight": (2560, 4096),
        }),
        ("glm-5.3-flash", {
            "output.weight": (4096, 154880),
            "blk.2.ffn_up.weight": (4096, 12288),
            "blk.3.ffn_up_exps.weight": (4096, 2048, 32),
            "blk.3.attn_k_b.weight": (256, 512, 64),
            "blk.3.attn_kv_a_mqa.weight": (4096, 512),
            "blk.3.indexer.attn_q_b.weight": (1536, 32 * 128),
            "blk.3.indexer_compressor_ape.weight": (128, 4),
            "blk.4.ssm_f_b.weight": (128, 8192),
            "blk.4.hc_attn_fn.weight": (4 * 4096, 24),
        }),
        ("kimi-k3", {
            "token_embd.weight": (7168, 163840),
            "blk.0.ffn_up.weight": (7168, 33792),
            "blk.1.ffn_up_exps.weight": (3584, 3072, 32),
            "blk.1.ffn_up_shexp.weight": (7168, 6144),
            "blk.1.ssm_g.weight": (7168, 96 * 128),
            "blk.3.attn_q_b.weight": (1536, 96 * 192),
            "blk.3.attn_gate.weight": (7168, 96 * 128),
        }),
    ],
)  # fmt: skip
def test_layers_have_the_shapes_of_their_family(family: str, expected: dict[str, tuple[int, ...]]) -> None:
    shapes = shapes_of(family)
    assert {name: shapes[name] for name in expected} == expected


def test_as_many_layers_of_ling_3_0_flash_are_clamped_as_in_the_model() -> None:
    keys = {key.name: key.value for key in plan_of(chosen_model("ling-3.0-flash")).keys}
    assert keys["bailingmoe3.swiglu_clamp_exp"] == [0] * 10 + [4, 4]  # 7 of 42
    assert keys["bailingmoe3.swiglu_clamp_shexp"] == [0] * 10 + [7, 7]  # 8 of 42
    assert "bailingmoe3.swiglu_clamp_exp" not in {
        key.name for key in plan_of(chosen_model("ling-3.0-tiny")).keys
    }


def test_few_layers_of_kimi_k3_have_several_blocks_of_residual_attention() -> None:
    def block(layers: int) -> object:
        keys = {key.name: key.value for key in plan_of(chosen_model("kimi-k3", layers)).keys}
        return keys["kimi-k3.attn_res.block_size"]

    assert [block(layers) for layers in (4, 8, 24, 93)] == [2, 4, 12, 12]


@pytest.mark.parametrize(
    ("family", "latent", "recurrent"),
    [
        ("kimi-linear", 1, 3), ("all-mla", 4, 0), ("deepseek2", 4, 0), ("ling-3.0-tiny", 1, 3),
        ("ling-3.0-flash", 1, 3), ("glm-5.3-flash", 1, 3), ("kimi-k3", 1, 3),
    ],
)  # fmt: skip
def test_families_differ_in_their_kinds_of_layers(family: str, latent: int, recurrent: int) -> None:
    names = [tensor.name for tensor in plan_of(tiny(family)).tensors]
    assert sum(name.endswith("attn_kv_a_norm.weight") for name in names) == latent
    assert sum(name.endswith("ssm_a") for name in names) == recurrent


@pytest.mark.engine
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "BF16"])
def test_types_are_those_that_llama_quantize_writes(kind: str, tmp_path: Path, upstream: Engine) -> None:
    wide = generate(tiny(kind="BF16"), upstream, Silent())
    wanted = tmp_path / "quantised.gguf"
    program = [str(upstream.bin / "llama-quantize"), str(wide), str(wanted), kind]
    subprocess.run(program, check=True, capture_output=True)
    types = {tensor.name: tensor.type for tensor in open_model(wanted).tensors}
    assert {tensor.name: tensor.type for tensor in made(tiny(kind=kind), upstream).tensors} == types


def test_each_family_is_tested() -> None:
    assert set(COMPARABLE) == set(FAMILIES) - {"all-mla"}


@pytest.mark.engine
@pytest.mark.parametrize("family", FAMILIES)
def test_both_builds_run_them_with_finite_logits(family: str, engine: Engine, upstream: Engine) -> None:
    file = made(tiny(family), upstream)
    ids = np.random.default_rng(0).integers(0, 512, 96)
    builds = [engine] if family == "all-mla" else [engine, upstream]  # upstream requires a KDA layer
    logits = [run(build, file.path, [ids], RunOptions()).logits[0] for build in builds]
    for each in logits:
        assert np.isfinite(each).all()
        assert 0.1 < each.std() < 10
    assert np.square(logits[0] - logits[-1]).sum() < 0.05 * np.square(logits[0]).sum()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("family", "low", "high"),
    [("kimi-linear", -16, -1), ("ling-3.0-tiny", 0.5, 2), ("glm-5.3-flash", -2, -0.5), ("kimi-k3", -2, -0.5)],
)
def test_the_factor_of_the_log_gate_has_the_sign_of_its_architecture(
    family: str, low: float, high: float, upstream: Engine
) -> None:
    reader = gguf.GGUFReader(made(tiny(family), upstream).path)
    values = np.stack([each.data.reshape(-1) for each in reader.tensors if each.name.endswith("ssm_a")])
    assert values.shape == (3, 4)
    assert low <= values.min() and values.max() <= high


@pytest.mark.engine
def test_tokens_spread_over_all_experts(engine: Engine, upstream: Engine) -> None:
    file = made(tiny(), upstream)
    ids = np.random.default_rng(0).integers(0, 512, 256)
    traced = run(engine, file.path, [ids], RunOptions(trace=True))
    assert sorted(traced.experts) == [1, 2, 3]
    # every token uses all 8 experts; with 8 of 32 used, each expert should get a quarter of the tokens
    traced = run(engine, made(tiny(experts=32), upstream).path, [ids], RunOptions(trace=True))
    for chosen in traced.experts.values():
        counts = np.bincount(chosen.reshape(-1), minlength=32)
        assert counts.min() > 0
        assert counts.max() < 4 * counts.mean()


@pytest.mark.engine
def test_the_same_choice_is_the_same_file_and_is_made_once(
    upstream: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = generate(tiny(), upstream, Silent())
    first = path.read_bytes()
    path.unlink()
    assert generate(tiny(), upstream, Silent()).read_bytes() == first
    monkeypatch.setattr(models, "writing", None)  # it exists already: nothing is written
    assert generate(tiny(), upstream, Silent()) == path


@pytest.mark.engine
def test_an_interrupted_file_leaves_nothing(upstream: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "SYNC_SECONDS", 0)  # a conversion would keep the steps finished so far
    whole = Weights.pieces

    def pieces(self: Weights, tensors: Sequence[PlannedTensor]) -> Iterator[tuple[PlannedTensor, Any]]:
        for i, piece in enumerate(whole(self, tensors)):
            if i == 20:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Weights, "pieces", pieces)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny(), upstream, Silent())
    assert list((models.bench_folder() / "models").iterdir()) == []


@pytest.mark.engine
def test_what_a_decode_must_read_is_counted(upstream: Engine) -> None:
    file, wide = made(tiny(), upstream), made(tiny(experts=32), upstream)
    embeddings = next(tensor.nbytes for tensor in file.tensors if tensor.name == "token_embd.weight")
    experts, routed = (
        sum(tensor.nbytes for tensor in each.tensors if "_exps." in tensor.name) for each in (file, wide)
    )
    assert routed == 4 * experts
    one = demand(file, Cell("f16", 1, 1000, 1, 1))
    # every token uses all 8 experts
    assert one.weight_bytes == file.nbytes - embeddings + embeddings / 512
    assert one.cache_bytes == 1001 * 576 * 2
    assert one.state_bytes == 2 * 3 * (4 * 128 * 128 * 4 + 3 * 3 * 512 * 4)
    few, many = demand(wide, Cell("f16", 1, 0, 1, 1)), demand(wide, Cell("f16", 1, 0, 1, 512))
    assert many.weight_bytes - few.weight_bytes == pytest.approx(
        0.75 * routed + 511 * embeddings / 512, rel=1e-6
    )


@pytest.mark.engine
def test_attention_with_an_indexer_reads_the_chosen_keys_only(upstream: Engine) -> None:
    file = made(tiny("glm-5.3-flash"), upstream)  # one layer with latent attention, 4 heads of 256 + 256
    near, far = (demand(file, Cell("f16", 1, depth, 1, 1)) for depth in (1000, 10000))
    assert near.cache_bytes == 1001 * (512 + 128 / 4) * 2
    assert far.cache_bytes == (2048 * 512 + 10001 * 128 / 4) * 2  # keys that are read, pools that are scored
    folding = 4 * 512 * (256 + 256)
    assert near.attention_macs == 4 * 1001 * 2 * 512 + folding + 1001 * 4 * 128 / 4
    assert far.attention_macs == 4 * 2048 * 2 * 512 + folding + 10001 * 4 * 128 / 4
    # a batch that passes the limit: 48 queries read all keys, 16 read 2048
    across = demand(file, Cell("f16", 1, 2000, 1, 64))
    pairs = sum(min(2000 + i, 2048) for i in range(1, 65))
    assert across.attention_macs == 4 * pairs * 2 * 512 + 64 * folding + sum(range(2001, 2065)) * 4 * 128 / 4


def of_tensors(names: Sequence[str], keys: dict[str, int | float | list[int]]) -> ModelFile:
    """A model with 8 x 4 matrices of F32."""
    tensors = tuple(GgufTensor(name, (8, 4), TENSOR_TYPES["F32"], 0) for name in names)
    return ModelFile(Path("model.gguf"), "m", "key", "bailingmoe3", keys, tensors)


@pytest.mark.parametrize("keys", [{}, {"block_count": 2}, {"nextn_predict_layers": 1}])
def test_layers_count_without_keys_of_an_mtp_layer(keys: dict[str, int | float | list[int]]) -> None:
    names = ["blk.0.attn_q.weight", "blk.1.attn_q.weight", "output.weight"]
    assert demand(of_tensors(names, keys), Cell("f16", 1, 0, 1, 1)).weight_macs == {"F32": 3 * 32}


def test_an_mtp_layer_does_not_count_because_it_does_not_run() -> None:
    sizes: dict[str, int | float | list[int]] = {
        "attention.kv_lora_rank": 8, "rope.dimension_count": 2, "attention.head_count": 1,
    }  # fmt: skip
    names = ["output.weight"]
    for layer in range(11):
        names += [f"blk.{layer}.attn_kv_a_norm.weight", f"blk.{layer}.attn_q.weight"]
    cell = Cell("f16", 1, 100, 1, 1)
    without = demand(of_tensors(names, sizes | {"block_count": 11}), cell)
    added = ["blk.11.attn_kv_a_norm.weight", "blk.11.attn_q.weight", "blk.11.nextn.eh_proj.weight"]
    keys = sizes | {"block_count": 12, "nextn_predict_layers": 1}
    assert demand(of_tensors(names + added, keys), cell) == without
    assert demand(of_tensors(names + added, sizes | {"block_count": 12}), cell).nbytes > without.nbytes


EMBEDDING = {"token_embd.weight": np.zeros((4, 4), np.float32)}


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("Some Model", 15, "Some Model-Q4_K_M"),
        ("some-Q8_0", 7, "some-Q8_0"),
        ("some-BF16", 1, "some-BF16-F16"),
        ("a/b\n| c", 7, "a/b | c-Q8_0"),
        ("some", None, "some"),
        ("some", 999, "some"),
        (None, 7, "file-Q8_0"),
        ("", 7, "file-Q8_0"),
    ],
)
def test_a_model_s_name_has_its_type(
    name: str | None, number: int | None, expected: str, tmp_path: Path
) -> None:
    keys = {key: value for key, value in (("name", name), ("file_type", number)) if value is not None}
    assert open_model(write_gguf(tmp_path / "file.gguf", tensors=EMBEDDING, **keys)).name == expected


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", "llama", EMBEDDING)
    with pytest.raises(EngineError, match=r"(?s)other\.gguf.*kimi-linear.*llama"):
        open_model(other)
    (tmp_path / "cut.gguf").write_bytes(other.read_bytes()[:40])
    with pytest.raises(EngineError, match=r"cut\.gguf: a damaged GGUF file"):
        open_model(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(EngineError, match=r"text\.gguf: not a GGUF file"):
        open_model(tmp_path / "text.gguf")


@pytest.mark.engine
def test_a_model_that_does_not_fit_in_memory_is_not_generated(
    upstream: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("ling-3.0-tiny")
    (nbytes,) = models.missing([model], upstream).values()
    monkeypatch.setattr(models, "available_memory", lambda: nbytes)
    models.check_room([model], upstream, Silent())
    monkeypatch.setattr(models, "available_memory", lambda: nbytes - 1)
    with pytest.raises(
        EngineError, match=r"(?s)ling-3\.0-tiny-tiny-4L-8E-Q8_0 does not fit in memory.*--layers"
    ):
        models.check_room([model], upstream, Silent())
    made(model, upstream)
    models.check_room([model], upstream, Silent())  # it exists: nothing is generated


def test_more_experts_than_llama_cpp_has_are_refused() -> None:
    for family in ("kimi-linear", "ling-3.0-tiny", "kimi-k3"):
        with pytest.raises(ConvertError, match="num_experts"):
            plan_of(chosen_model(family, experts=2000))
