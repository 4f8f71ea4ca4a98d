"""`convert-kimi ADAPTER`: base + adapter in GGUF is the conversion of the checkpoint that was merged beforehand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import random_checkpoint
import random_k3
import random_ling3
import torch
from llama_script import Setup, adapters, assert_same, batches, play
from random_adapter import EMBEDDING
from random_peft import RANK, merged, write_adapter
from safetensors.torch import load_file, save_file
from synthetic_case import error_of

from kimi_gguf.convert import cli
from kimi_gguf.convert.adapter.gguf import convert_adapter
from kimi_gguf.convert.conversion import Options, convert
from kimi_gguf.convert.errors import ConvertError
from kimi_gguf.convert.output import stream, unfinished
from kimi_gguf.convert.output.writer import Writer
from kimi_gguf.convert.types.file_types import TYPES
from kimi_gguf.engine.builds import Engine

Tensors = dict[str, np.ndarray[Any, Any]]
F32 = TYPES["F32"]
# an expert's gate and up together have another shape than [hidden, hidden]
KIMI = random_checkpoint.Spec(q_lora=24, moe_intermediate=48, dtype=torch.float32)
LING = random_ling3.LingSpec(mtp=True, q_lora=24, moe_intermediate=48, dtype=torch.float32)
BASES: dict[str, Callable[[Path], Path]] = {
    **{
        f"kimi-linear, {layout}": lambda path, layout=layout: random_checkpoint.write_checkpoint(path, KIMI, layout)
        for layout in ("hub", "resaved", "native")
    },
    **{
        f"ling3, {layout}": lambda path, layout=layout: random_ling3.write_checkpoint(path, LING, layout)
        for layout in ("hub", "resaved", "native")
    },
    "kimi-k3": lambda path: random_k3.write_checkpoint(path, random_k3.K3Spec(), packed=False),
}  # fmt: skip


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    folder.mkdir()
    return BASES[request.param](folder)


def tensors_of(file: Path) -> Tensors:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}


def with_adapter(model: Tensors, file: Path, scale: float = 1.0) -> Tensors:
    """The model with an adapter as llama.cpp applies it: scale * alpha / rank * B A."""
    alpha = gguf.GGUFReader(file).fields["adapter.lora.alpha"].contents()
    pairs, out = tensors_of(file), dict(model)
    for name in {name.rpartition(".lora_")[0] for name in pairs}:
        a, b = (pairs[f"{name}.lora_{half}"].astype(np.float64) for half in "ab")
        product = a @ b.T if name == EMBEDDING else b @ a
        out[name] = model[name] + scale * float(alpha) / b.shape[-1] * product
    return out


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = np.abs(found[name] - tensor.astype(np.float64)).max()
        assert error <= 1e-6 * np.abs(tensor).max(), name


def test_an_adapter_of_all_matrices_is_the_merged_checkpoint(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    convert(base, tmp_path / "base.gguf", F32)
    convert_adapter(adapter, base, tmp_path / "adapter.gguf")
    convert(merged(tmp_path / "merged", base, [(adapter, 1.0)]), tmp_path / "merged.gguf", F32)
    before, after = (tensors_of(tmp_path / f"{name}.gguf") for name in ("base", "merged"))
    changed = {name for name, tensor in after.items() if not np.array_equal(tensor, before[name])}
    assert changed == {name.rpartition(".lora_")[0] for name in tensors_of(tmp_path / "adapter.gguf")}
    assert any("attn_k_b" in name for name in changed) and any("exps" in name for name in changed)
    assert_equal(with_adapter(before, tmp_path / "adapter.gguf"), after)


@pytest.mark.engine
@pytest.mark.usefixtures("one_core")
def test_the_logits_with_an_adapter_are_those_of_the_merged_model(
    base: Path, tmp_path: Path, engine: Engine
) -> None:
    """tests/ops/test_adapters.py has all ways in which llama.cpp decodes."""
    adapter = write_adapter(tmp_path / "adapter", base)
    convert(base, tmp_path / "base.gguf", F32)
    convert_adapter(adapter, base, tmp_path / "adapter.gguf")
    convert(merged(tmp_path / "merged", base, [(adapter, 1.0)]), tmp_path / "merged.gguf", F32)
    steps, setup = batches(np.arange(60), (60,)), Setup(flash_attention=True)
    got = play(engine, tmp_path / "base.gguf", setup, [adapters({tmp_path / "adapter.gguf": 1.0}), *steps])
    assert_same(got.logits, play(engine, tmp_path / "merged.gguf", setup, steps).logits)
    assert error_of(play(engine, tmp_path / "base.gguf", setup, steps).logits, got.logits).in_all > 0.001


@pytest.mark.parametrize("layout", ["hub", "native"])
def test_ranks_scales_and_missing_experts(layout: random_checkpoint.Layout, tmp_path: Path) -> None:
    """Pairs of several ranks and alphas in one stacked tensor, with rsLoRA; two adapters with scales."""
    (tmp_path / "base").mkdir()
    base = random_checkpoint.write_checkpoint(tmp_path / "base", KIMI, layout)
    patterns = {"q_proj": 5, "experts.1.w1": 2} if layout == "hub" else {"q_proj": 5, "experts.down_proj": 2}
    one = write_adapter(
        tmp_path / "one", base, lambda name: "experts.2." not in name,
        rank_pattern=patterns, alpha_pattern={"q_proj": 1.5, "o_proj": 9}, use_rslora=True,
    )  # fmt: skip
    two = write_adapter(tmp_path / "two", base, lambda name: "kv_b" in name or "experts" in name, seed=1)
    for adapter in (one, two):
        convert_adapter(adapter, base, adapter.with_suffix(".gguf"))
    convert(base, tmp_path / "base.gguf", F32)
    scaled = merged(tmp_path / "merged", base, [(one, 0.5), (two, -1.0)])
    convert(scaled, tmp_path / "merged.gguf", F32)
    found = with_adapter(tensors_of(tmp_path / "base.gguf"), tmp_path / "one.gguf", 0.5)
    found = with_adapter(found, tmp_path / "two.gguf", -1.0)
    assert_equal(found, tensors_of(tmp_path / "merged.gguf"))


@pytest.mark.parametrize("parameter", ["down_proj", "gate_up_proj"])
def test_the_transposed_pairs_of_older_versions_of_peft(parameter: str, tmp_path: Path) -> None:
    """A parameter [experts, rows, columns] had A [rank * experts, rows] and B [columns, rank * experts] there. With as
    many rows as columns, as those of gate_up_proj here, only the version tells which it is."""
    (tmp_path / "base").mkdir()
    spec = replace(KIMI, moe_intermediate=KIMI.hidden // 2)
    base = random_checkpoint.write_checkpoint(tmp_path / "base", spec, "native")
    new = write_adapter(
        tmp_path / "new", base, lambda name: f"mlp.experts.{parameter}" in name, peft_version="0.19.0"
    )
    old = write_adapter(tmp_path / "old", base, lambda name: False, peft_version="0.18.1")
    halves = load_file(new / "adapter_model.safetensors")
    for key in [key for key in halves if "lora_A" in key]:
        a = halves[key].reshape(spec.experts, RANK, -1)  # [experts, rank, columns]
        b = halves[key.replace("_A", "_B")].reshape(-1, RANK, spec.experts)  # [rows, rank, experts]
        halves[key] = b.permute(2, 1, 0).reshape(spec.experts * RANK, -1).contiguous()
        halves[key.replace("_A", "_B")] = a.permute(2, 1, 0).reshape(-1, RANK * spec.experts).contiguous()
    save_file(halves, old / "adapter_model.safetensors")
    for adapter in (new, old):
        convert_adapter(adapter, base, adapter.with_suffix(".gguf"))
    assert_equal(tensors_of(tmp_path / "old.gguf"), tensors_of(tmp_path / "new.gguf"))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "F32"), (torch.float32, "Q4_K_M"), (torch.bfloat16, "BF16")]
)
@pytest.mark.parametrize("layout", ["hub", "native"])
def test_a_merged_file_has_the_bytes_of_a_conversion_of_the_merged_checkpoint(
    dtype: torch.dtype,
    kind: str,
    layout: random_checkpoint.Layout,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many rows are read at once; `verify` proves it, and asks for the adapters that the file names."""
    (tmp_path / "base").mkdir()
    spec = replace(KIMI, hidden=256, moe_intermediate=160, dtype=dtype)
    base = random_checkpoint.write_checkpoint(tmp_path / "base", spec, layout)
    one = write_adapter(tmp_path / "one", base)
    two = write_adapter(tmp_path / "two", base, lambda name: "experts" in name, seed=1, use_rslora=True)
    merged(tmp_path / "merged", base, [(one, 0.5), (two, -1.0)], exactly=True)
    convert(tmp_path / "merged", tmp_path / "beforehand.gguf", TYPES[kind])
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", 256 * 37)
    out, given = str(tmp_path / "out.gguf"), ["--adapter", f"{one}:0.5", "--adapter", f"{two}:-1"]
    assert cli.main([str(base), *given, "-o", out, "--type", kind, "--quiet"]) == 0
    found, expected = (
        {t.name: (t.tensor_type, bytes(t.data)) for t in gguf.GGUFReader(path).tensors}
        for path in (out, tmp_path / "beforehand.gguf")
    )
    # of a BF16 checkpoint only what is rounded to BF16 in both: here F32 tensors are not rounded in between
    wanted = {name for name, (kind_, _) in expected.items() if dtype is torch.float32 or kind_.name == "BF16"}
    assert {name: found[name] for name in wanted} == {name: expected[name] for name in wanted}
    assert found.keys() == expected.keys()
    assert cli.main(["verify", out, "--checkpoint", str(base), *given]) == 0
    assert cli.main(["verify", out, "--checkpoint", str(base), *given[:2]]) == 1
    fields = gguf.GGUFReader(out).fields
    assert [fields[f"kimi_gguf.adapter.{i}.{key}"].contents() for i in range(2) for key in ("name", "scale")] == [
        "one", 0.5, "two", -1.0,
    ]  # fmt: skip


def test_what_is_no_adapter_is_named(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, found in (
        ("absent", "no such folder"),
        ("base", "no adapter_config.json"),
        ("base/config.json", "a file"),
    ):
        words = [str(small / "base"), "-o", str(tmp_path / "out.gguf"), "--adapter", str(small / path)]
        assert cli.main(words) == 1
        error = capsys.readouterr().err
        assert f"{small / path}: is not the folder of a PEFT adapter: expected a folder with" in error
        assert f"found {found}" in error


def test_an_adapter_that_is_not_always_active_cannot_be_merged(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alora_invocation_tokens": [7]}))
    options = Options(adapters=((tmp_path / "adapter", 1.0),))
    with pytest.raises(ConvertError, match=r"alora_invocation_tokens: expected none, found \[7\]"):
        convert(small / "base", tmp_path / "out.gguf", F32, options)


def test_another_adapter_does_not_resume(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SYNC_SECONDS", 0.0)
    options = Options(adapters=((small / "adapter", 1.0),), resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish_tensor", interrupt_after(Writer.finish_tensor, 5))
        with pytest.raises(KeyboardInterrupt):
            convert(small / "base", tmp_path / "out.gguf", F32, options)
    with pytest.raises(ConvertError, match="--resume"):
        changed = replace(options, adapters=((small / "adapter", 2.0),))
        convert(small / "base", tmp_path / "out.gguf", F32, changed)
    convert(small / "base", tmp_path / "out.gguf", F32, options)
    convert(small / "base", tmp_path / "at-once.gguf", F32, replace(options, resume=False))
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "at-once.gguf").read_bytes()


def interrupt_after(function: Callable[..., None], count: int) -> Callable[..., None]:
    """The function, until it was called that often."""
    calls = iter(range(count))

    def called(*words: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        function(*words)

    return called


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Kimi-Linear, and next to it an adapter of its attention."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "base").mkdir()
    random_checkpoint.write_checkpoint(folder / "base", KIMI)
    write_adapter(folder / "adapter", folder / "base", lambda name: "layers.3.self_attn" in name)
    return folder


KEY = "base_model.model.model.layers.3.self_attn.q_a_proj.lora_{}.weight"
DAMAGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], object], str]] = {
    "DoRA": (lambda config, _: config.update(use_dora=True), "use_dora: expected none, found True; DoRA also"),
    "biases": (lambda config, _: config.update(bias="all"), "bias: expected none, found 'all'; it trains biases"),
    "modules": (lambda config, _: config.update(modules_to_save=["lm_head"]), "modules_to_save: expected none"),
    "tokens": (lambda config, _: config.update(trainable_token_indices=[1]), "it trains rows of the embedding"),
    "another type": (lambda config, _: config.update(peft_type="IA3"), "peft_type: expected LORA, found 'IA3'"),
    "an unknown key": (lambda config, _: config.update(use_xlora=1), "use_xlora: expected no such key"),
    "another base": (lambda config, _: config.update(init_lora_weights="pissa_niter_4"), "it changed the base weights"),
    "no rank": (lambda config, _: config.update(r=0), "r: expected a positive whole number, found 0"),
    "no alpha": (lambda config, _: config.update(lora_alpha="8"), "lora_alpha: expected a positive number"),
    "a slow pattern": (lambda config, _: config.update(rank_pattern={"(a+)+": 3}), "expected names of modules"),
    "another rank": (lambda config, _: config.update(r=4), "expected rank 4 by adapter_config.json"),
    "half a pair": (lambda _, tensors: tensors.pop(KEY.format("B")), "q_a_proj.lora_A.weight' has no lora_B"),
    "ranks that differ": (
        lambda _, tensors: tensors.update({KEY.format("B"): torch.zeros(24, 2)}), "expected rank 3 by adapter_config",
    ),
    "another shape": (
        lambda _, tensors: tensors.update({KEY.format("A"): torch.zeros(3, 65)}),
        "found a product of shape [24, 65]; adapter and base do not belong together",
    ),
    "a vector": (
        lambda _, tensors: tensors.update({KEY.format("A").replace("q_a_proj", "q_a_layernorm"): torch.zeros(3)}),
        "biases, magnitudes, convolutions and whole modules have no form",
    ),
    "a magnitude": (
        lambda _, tensors: tensors.update({KEY.format("magnitude_vector"): torch.zeros(24)}),
        "expected lora_A or lora_B",
    ),
    "another module": (
        lambda _, tensors: tensors.update({KEY.format(half).replace("q_a", "q_c"): torch.zeros(3, 3) for half in "AB"}),
        "is of no tensor of the base model: expected a module of",
    ),
    "NaN": (lambda _, tensors: tensors[KEY.format("A")].fill_(torch.nan), "element [0, 0]: expected a finite number"),
    "integers": (
        lambda _, tensors: tensors.update({KEY.format("A"): torch.zeros(3, 64, dtype=torch.int8)}), "found I8 [3, 64]",
    ),
    "nothing": (lambda _, tensors: tensors.clear(), "has no pairs"),
    "two names": (
        lambda _, tensors: tensors.update({KEY.format("A.default"): tensors[KEY.format("A")].clone()}),
        "are of one matrix; keep one of the two",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_gguf_cannot_express_is_refused_before_a_file_is_written(
    small: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small / "adapter", tmp_path / "adapter")
    config_file, weights = (
        tmp_path / "adapter" / f"adapter_{name}" for name in ("config.json", "model.safetensors")
    )
    config, tensors = json.loads(config_file.read_text()), load_file(weights)
    change, message = DAMAGES[damage]
    change(config, tensors)
    config_file.write_text(json.dumps(config))
    save_file(tensors, weights)
    out = tmp_path / "out.gguf"
    assert cli.main([str(tmp_path / "adapter"), "-o", str(out), "--base", str(small / "base")]) == 1
    error = capsys.readouterr().err
    assert message in error and str(tmp_path / "adapter") in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_pickles_are_not_read(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(ConvertError, match=r"found adapter_model\.bin; pickled weights run code"):
        convert_adapter(tmp_path / "adapter", small / "base", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--type", "Q4_K_M"], 1, "expected --type F32, F16, BF16, Q8_0, found Q4_K_M"),
        (["--recipe", "kimi-q4"], 1, "leave out --recipe, which is for models"),
        (["--imatrix", "i.gguf"], 1, "leave out --imatrix, which is for models"),
        ([], 1, "names no base model; give its checkpoint: --base CHECKPOINT"),
    ],
)
def test_options_of_models_are_refused(
    small: Path,
    tmp_path: Path,
    words: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([str(small / "adapter"), "-o", str(tmp_path / "out.gguf"), *words]) == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_base_with_an_adapter_in_its_folder_is_a_model(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A note says that the adapter is not merged; `--adapter` with the same folder merges it."""
    both, out = tmp_path / "both", tmp_path / "out.gguf"
    shutil.copytree(small / "base", both)
    shutil.copytree(small / "adapter", both, dirs_exist_ok=True)
    assert cli.main([str(both), "-o", str(out), "--type", "F32"]) == 0
    note = f"also has a LoRA adapter, which is not merged: --adapter {both} merges it"
    assert note in capsys.readouterr().err
    words = [str(both), "-o", str(tmp_path / "merged.gguf"), "--type", "F32"]
    assert cli.main([*words, "--adapter", str(both)]) == 0
    assert note not in capsys.readouterr().err
    before, after = tensors_of(out), tensors_of(tmp_path / "merged.gguf")
    assert {name for name in after if not np.array_equal(before[name], after[name])}


def test_a_base_belongs_to_an_adapter(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([str(small / "base"), "-o", "out.gguf", "--base", "x"])
    assert "--base: SRC is not the folder of an adapter" in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.parametrize(("kind", "limit"), [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 2e-2)])
def test_the_types_of_adapters(small: Path, tmp_path: Path, kind: str, limit: float) -> None:
    """The base that the config names is used; rows shorter than a block are F16."""
    shutil.copytree(small / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(small / "base")})
    )
    out = tmp_path / "out.gguf"
    assert cli.main([str(tmp_path / "adapter"), "-o", str(out), "--type", kind]) == 0
    convert_adapter(small / "adapter", small / "base", tmp_path / "exact.gguf")
    exact, tensors = tensors_of(tmp_path / "exact.gguf"), gguf.GGUFReader(out).tensors
    assert {tensor.tensor_type.name for tensor in tensors} == {kind, "F16"} if kind == "Q8_0" else {kind}
    for tensor in tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(exact[tensor.name].shape)
        assert np.abs(values - exact[tensor.name]).max() <= limit * np.abs(exact[tensor.name]).max(), (
            tensor.name
        )


def test_an_adapter_that_is_active_after_a_text(small: Path, tmp_path: Path) -> None:
    """aLoRA: the tokens that begin it are a key of the file."""
    shutil.copytree(small / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alora_invocation_tokens": [7, 8]}))
    convert_adapter(tmp_path / "adapter", small / "base", tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["adapter.alora.invocation_tokens"].contents() == [7, 8]
    assert [fields[f"{key}.type"].contents() for key in ("general", "adapter")] == ["adapter", "lora"]


def test_the_copy_of_an_embedding_must_be_that_of_the_base(small: Path, tmp_path: Path) -> None:
    """PEFT saves one when the embedding is adapted."""
    adapter = write_adapter(tmp_path / "adapter", small / "base", lambda name: "embed_tokens" in name)
    weights = adapter / "adapter_model.safetensors"
    (embedding,) = (
        tensors["model.embed_tokens.weight"]
        for tensors in map(load_file, sorted((small / "base").glob("*.safetensors")))
        if "model.embed_tokens.weight" in tensors
    )
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(load_file(weights) | {copy: embedding}, weights)
    convert_adapter(adapter, small / "base", tmp_path / "out.gguf")
    embedding[3, 4] += 1
    save_file(load_file(weights) | {copy: embedding}, weights)
    with pytest.raises(ConvertError, match="the adapter changes the whole matrix"):
        convert_adapter(adapter, small / "base", tmp_path / "other.gguf")
