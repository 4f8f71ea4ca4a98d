"""Quantized checkpoints as their publishers release them: equal to checkpoints that torch dequantized beforehand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_tools import convert, gguf_types
from gguf import GGUFReader
from random_checkpoint import Spec, write_checkpoint
from random_ling3 import LingSpec
from random_ling3 import write_checkpoint as write_ling3
from safetensors.torch import load_file, save_file

from kimi_gguf.validate.cli import main as validate_kimi

Tensors = dict[str, torch.Tensor]
FLOAT8 = torch.float8_e4m3fn
KIMI = Spec(layers="KM", hidden=256, heads=2, kda_head_dim=64, moe_intermediate=128, intermediate=320, seed=5)
LING = LingSpec(layers="KM", hidden=256, moe_intermediate=128, seed=6)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def spread(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """A scale for each element."""
    rows = scales.repeat_interleave(block[0], -2)[..., : shape[-2], :]
    return rows.repeat_interleave(block[1], -1)[..., : shape[-1]]


def blocks_of(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest magnitude of each block."""
    rows, columns = (-(-n // size) for n, size in zip(weight.shape[-2:], block, strict=True))
    padded = torch.zeros(*weight.shape[:-2], rows * block[0], columns * block[1])
    padded[..., : weight.shape[-2], : weight.shape[-1]] = weight
    return padded.unflatten(-1, (columns, block[1])).unflatten(-3, (rows, block[0])).abs().amax((-1, -3))


def power(values: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.ceil(torch.log2(values)))


def fp8(
    weight: torch.Tensor, block: tuple[int, int], name: str, dtype: torch.dtype, exact: bool
) -> tuple[Tensors, torch.Tensor]:
    scales = blocks_of(weight, block) / 448
    scales = power(scales) if exact else scales.to(dtype).float()
    stored = (weight / spread(scales, block, weight.shape)).to(FLOAT8)
    values = stored.float() * spread(scales, block, weight.shape)
    kept = (torch.log2(scales) + 127).to(torch.uint8) if dtype is torch.uint8 else scales.to(dtype)
    return {"": stored, name: kept}, values


def e2m1(weight: torch.Tensor, scales: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two per byte, and their values."""
    each = spread(scales, (1, group), weight.shape)
    codes = (weight[..., None] / each[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, E2M1[codes.int()] * each


def mxfp4(weight: torch.Tensor, suffix: str) -> tuple[Tensors, torch.Tensor]:
    scales = power(blocks_of(weight, (1, 32)) / 6)
    packed, values = e2m1(weight, scales, 32)
    return {
        suffix: packed,
        "_scale" if suffix else "_scale_inv": (torch.log2(scales) + 127).to(torch.uint8),
    }, values


def nvfp4(weight: torch.Tensor, suffix: str) -> tuple[Tensors, torch.Tensor]:
    divides = bool(suffix)  # compressed-tensors divides by the factor, ModelOpt multiplies
    factor = torch.tensor([37.0 if divides else 0.011])
    whole = 1 / factor if divides else factor
    scales = (blocks_of(weight, (1, 16)) / 6 / whole).to(FLOAT8)
    exact = scales.float() / factor if divides else scales.float() * factor
    packed, values = e2m1(weight, exact, 16)
    return {suffix: packed, "_scale": scales, "_global_scale" if divides else "_scale_2": factor}, values


def integers(
    weight: torch.Tensor, bits: int, group: int | None, zeros: bool, packed: bool
) -> tuple[Tensors, torch.Tensor]:
    """By compressed-tensors itself."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = "group" if group else "channel"
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=not zeros, strategy=strategy, group_size=group
    )
    grouped = weight.unflatten(-1, (-1, group)) if group else weight[:, None]
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale.float()}
    state |= {"weight_zero_point": zero} if zeros else {}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized" if packed else "int-quantized")
    stored = compressor.compress(state, scheme)
    if zeros:  # compressed-tensors 0.20.1 cannot unpack its own zero points
        unpacked = unpack_from_int32(stored["weight_packed"], bits, weight.shape)
        exact = dequantize(unpacked, scale.float(), zero, args)
    else:
        exact = compressor.decompress(stored, scheme)["weight"]
    return {name.removeprefix("weight"): tensor.contiguous() for name, tensor in stored.items()}, exact


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "format": format}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Form:
    """A published form: its config, and what makes it of a matrix, with the exact values."""

    config: dict[str, Any]
    of: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
    experts: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]] | None = None


LING_FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
UE8M0 = LING_FP8 | {"scale_fmt": "ue8m0"}
FORMS = {
    "fp8-blocks": Form(LING_FP8, lambda w: fp8(w, (128, 128), "_scale_inv", torch.float32, False)),
    "fp8-exponents": Form(UE8M0, lambda w: fp8(w, (128, 128), "_scale_inv", torch.uint8, True)),
    "fp8-powers": Form(UE8M0, lambda w: fp8(w, (128, 128), "_scale_inv", torch.float32, True)),
    "fp4-experts": Form(
        LING_FP8 | {"routed_experts_quant_method": "mxfp4", "routed_experts_group_size": 32},
        lambda w: fp8(w, (128, 128), "_scale_inv", torch.float32, True),
        lambda w: mxfp4(w, ""),
    ),
    "int4-group": Form(
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
        lambda w: integers(w, 4, 32, False, True),
    ),
    "int4-zeros": Form(
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=64, symmetric=False),
        lambda w: integers(w, 4, 64, True, True),
    ),
    "int8-packed-channel": Form(
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel"),
        lambda w: integers(w, 8, None, False, True),
    ),
    "int8": Form(
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        lambda w: integers(w, 8, None, False, False),
    ),
    "float8-channel": Form(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        lambda w: fp8(w, (1, w.shape[-1]), "_scale", torch.bfloat16, False),
    ),
    "float8-block": Form(
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[64, 32]),
        lambda w: fp8(w, (64, 32), "_scale", torch.float32, False),
    ),
    "nvfp4": Form(
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        lambda w: nvfp4(w, "_packed"),
    ),
    "mxfp4": Form(
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        lambda w: mxfp4(w, "_packed"),
    ),
    "modelopt-fp8": Form(
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        lambda w: fp8(w, tuple(w.shape[-2:]), "_scale", torch.float32, False),
    ),
    "modelopt-nvfp4": Form(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head*"]},
        lambda w: nvfp4(w, ""),
    ),
}  # fmt: skip


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    kept = ("embed_tokens", "lm_head", "norm", "conv1d", "gate.weight", "A_log", "bias", "word_embeddings")
    return tensor.ndim in (2, 3) and not any(part in name for part in kept) and tensor.shape[-1] % 64 == 0


def write(folder: Path, form: Form, family: str, layout: Any = "hub") -> tuple[Path, Path]:
    """The quantized checkpoint, and the same with exact values in F32."""
    quantized, dequantized = folder / "model", folder / "dequantized"
    for place in (quantized, dequantized):
        if family == "kimi":
            write_checkpoint(place, KIMI, layout, shards=2)
        else:
            write_ling3(place, LING, layout, shards=2)
    index = quantized / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    for file in quantized.glob("*.safetensors"):
        stored, exact = {}, {}
        for name, tensor in load_file(file).items():
            if not is_quantized(name, tensor):
                stored[name] = exact[name] = tensor
                continue
            of = form.experts if form.experts and ".experts." in name else form.of
            parts, exact[name] = of(tensor.float())
            stored |= {name + suffix: part.contiguous() for suffix, part in parts.items()}
        save_file(stored, file)
        save_file({name: tensor.contiguous() for name, tensor in exact.items()}, dequantized / file.name)
        places["weight_map"] |= dict.fromkeys(stored, file.name)
        for name in set(exact) - set(stored):
            del places["weight_map"][name]
    index.write_text(json.dumps(places))
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": form.config}))
    return quantized, dequantized


def tensors(file: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, np.asarray(t.data).tobytes()) for t in GGUFReader(file).tensors}


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_has_the_values_that_torch_dequantizes(name: str, kind: str, tmp_path: Path) -> None:
    family = "kimi" if list(FORMS).index(name) % 2 else "ling"
    quantized, dequantized = write(tmp_path, FORMS[name], family)
    for source in (quantized, dequantized):
        run = convert(source, "-o", tmp_path / f"{source.name}.gguf", "--type", kind)
        assert run.status == 0, run.err
    expected = tensors(tmp_path / "dequantized.gguf")
    found = tensors(tmp_path / "model.gguf")
    assert found.keys() == expected.keys()
    assert [tensor for tensor in found if found[tensor] != expected[tensor]] == []


@pytest.mark.parametrize(("family", "layout"), [("kimi", "native"), ("kimi", "resaved"), ("ling", "native")])
def test_every_layout_is_read(family: str, layout: str, tmp_path: Path) -> None:
    """Fused experts have a scale per block of each expert."""
    quantized, dequantized = write(tmp_path, FORMS["fp8-blocks"], family, layout)
    for source in (quantized, dequantized):
        assert convert(source, "-o", tmp_path / f"{source.name}.gguf", "--type", "F32").status == 0
    assert tensors(tmp_path / "dequantized.gguf") == tensors(tmp_path / "model.gguf")


def test_experts_in_mxfp4_keep_their_bits(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, FORMS["fp4-experts"], "ling")
    run = convert(quantized, "-o", tmp_path / "x.gguf")
    assert run.status == 0 and "the routed experts keep their MXFP4 values, bit for bit" in run.err
    kinds = {kind for name, kind in gguf_types(tmp_path / "x.gguf").items() if "_exps" in name}
    assert kinds == {"MXFP4"}
    assert "FP8 with a scale per 128 x 128 elements" in run.err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fp8-powers", r"the file has all [\d,]+ dequantized values exactly"),
        ("fp8-blocks", r"[\d,]+ of [\d,]+ dequantized values were rounded, by at most 0\.3\d%"),
    ],
)
def test_a_rounding_is_said(name: str, said: str, tmp_path: Path) -> None:
    """BF16 has every product of an element of FP8 and a power of two."""
    quantized, _ = write(tmp_path, FORMS[name], "ling")
    assert re.search(said, convert(quantized, "-o", tmp_path / "x.gguf").err)


def test_a_file_is_verified_against_the_quantized_checkpoint(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, FORMS["int4-group"], "kimi")
    assert convert(quantized, "-o", tmp_path / "x.gguf", "--type", "F16").status == 0
    assert convert("verify", tmp_path / "x.gguf", "--checkpoint", quantized).status == 0
    run = convert("inspect", quantized)
    assert run.status == 0 and re.search(r"^int4 +31 tensors +\d", run.out, re.MULTILINE), run.out


def change(folder: Path, edit: Callable[[Tensors], None]) -> None:
    """Edit the tensors of all files, and their index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored = load_file(file)
        edit(stored)
        save_file(stored, file)
        index["weight_map"] |= dict.fromkeys(stored, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def edit_scale(make: Callable[[torch.Tensor], torch.Tensor | None], name: str) -> Callable[[Tensors], None]:
    def edit(stored: Tensors) -> None:
        if name in stored:
            made = make(stored.pop(name))
            if made is not None:
                stored[name] = made.contiguous()

    return edit


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8)[0, 0] = int(value) if tensor.dtype is FLOAT8 else 0
        if tensor.dtype is not FLOAT8:
            tensor[0, 0] = value
        return tensor

    return fill


DAMAGED = {
    "no-scale": ("fp8-blocks", "_scale_inv", lambda t: None, "missing tensor"),
    "shape": ("fp8-blocks", "_scale_inv", lambda t: t[:, :-1], "expected shape [2, 1], found [2, 0]"),
    "dtype": ("fp8-blocks", "_scale_inv", lambda t: t.int(), "expected dtype F32 or BF16"),
    "e5m2": ("fp8-blocks", "", lambda t: t.to(torch.float8_e5m2), "expected dtype F8_E4M3, found F8_E5M2"),
    "one-row": ("fp8-blocks", "", lambda t: t[:-1], "expected shape [256, 128] by config.json, found [255, 128]"),
    "nan": ("fp8-blocks", "", put(0x7F), "element [0, 0]: expected a finite number, found nan"),
    "infinite-scale": ("fp8-blocks", "_scale_inv", put(float("inf")), "expected a finite number"),
    "words": ("int4-group", "_packed", lambda t: t.long(), "expected dtype I32, found I64"),
    "groups": ("int4-group", "_packed", lambda t: t[:, :-1], "expected columns in groups of 32, found 120"),
    "no-zeros": ("int4-zeros", "_zero_point", lambda t: None, "missing tensor"),
    "zeros": ("int4-zeros", "_zero_point", lambda t: t[:-1], "expected I32 [32, 2], found I32 [31, 2]"),
    "no-factor": ("nvfp4", "_global_scale", lambda t: None, "missing tensor"),
    "factor": ("nvfp4", "_global_scale", lambda t: t.half(), "expected one number in F32, found F16 [1]"),
    "scales": ("nvfp4", "_scale", lambda t: t.half(), "expected dtype F8_E4M3, found F16"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_form_is_refused_by_name(name: str, tmp_path: Path) -> None:
    form, suffix, make, said = DAMAGED[name]
    quantized, _ = write(tmp_path, FORMS[form], "kimi")
    change(quantized, edit_scale(make, O_PROJ + suffix))
    run = convert(quantized, "-o", tmp_path / "x.gguf")
    error = run.err.splitlines()[-1]
    assert run.status == 1 and said in error and O_PROJ in error and "Traceback" not in run.err, run.err
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "found F8_E4M3; config.json has no quantization_config"),
        (
            {"quant_method": "gptq", "bits": 4},
            'found "GPTQ\'s format"; fp8, compressed-tensors and modelopt are read',
        ),
        ({"quant_method": "bitsandbytes"}, "found 'bitsandbytes'"),
        (LING_FP8 | {"fmt": "e5m2"}, "quantization_config.fmt: expected 'e4m3' or nothing, found 'e5m2'"),
        (LING_FP8 | {"weight_block_size": [128]}, "weight_block_size: expected two sizes"),
        (LING_FP8 | {"modules_to_not_convert": ["self_attn.o_proj"]}, "does not describe this tensor"),
        (LING_FP8 | {"weight_block_size": [64, 64]}, "expected shape [4, 5], found [2, 3]"),
        (
            LING_FP8 | {"routed_experts_quant_method": "int4"},
            "expected nothing or 'mxfp4' or 'fp8', found 'int4'",
        ),
        (
            compressed("pack-quantized", num_bits=3, type="int", strategy="tensor"),
            "num_bits: expected 4 or 8, found 3",
        ),
        (
            compressed("marlin-24", num_bits=4, type="int", strategy="channel"),
            "found 'marlin-24, int4, channel'",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": []}, "config_groups: expected an object"),
        ("fp8", "quantization_config: expected an object, found 'fp8'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config: Any, said: str, tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, FORMS["fp8-blocks"], "kimi")
    values = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    run = convert(quantized, "-o", tmp_path / "x.gguf")
    assert run.status == 1 and said in run.err and "Traceback" not in run.err, run.err


@pytest.mark.engine
@pytest.mark.usefixtures("engine")
def test_a_file_is_validated_against_the_quantized_checkpoint(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, FORMS["int4-group"], "kimi")
    assert convert(quantized, "-o", tmp_path / "x.gguf", "--type", "F32").status == 0
    words = [str(tmp_path / "x.gguf"), "--checkpoint", str(quantized), "--tokens", "40", "--generate", "4"]
    assert validate_kimi([*words, "--threads", "1", "--out", str(tmp_path / "report"), "--quiet"]) == 0
