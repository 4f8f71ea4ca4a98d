"""`kimi-llama`: errors with an exit status, defaults for the tools, their output and exit status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_llama
from gguf_file import write_gguf
from tiny_llama import call

from kimi_gguf.engine.builds import Engine
from kimi_gguf.scripts import kimi_llama, llama_tools


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with a patched and an upstream build."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny = tiny_llama.make(folder)
    tiny.build()
    tiny.build(upstream=True)
    (folder / "model.gguf").write_bytes(tiny_llama.NO_TENSORS)
    return folder


def test_path_prints_the_folder_with_bin_and_lib(built: Path) -> None:
    patched, upstream = call(built, "path"), call(built, "path", "--upstream")
    assert patched.returncode == upstream.returncode == 0
    assert patched.stdout != upstream.stdout
    for told in (patched, upstream):
        assert Path(told.stdout.rstrip("\n"), "bin", "llama-cli").is_file()
        assert Path(told.stdout.rstrip("\n"), "lib").is_dir()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--workers", "foo"], "foo"),
        (["--rpc", "10.0.0.2"], "10.0.0.2"),
        (["--workers", "10.0.0.2:50052,other:"], "other:"),
        (["--workers", "[::1]:50052"], "[::1]:50052"),
        (["-n", "3", "--workers"], "nothing"),
    ],
)
def test_a_worker_is_named_by_its_address(built: Path, words: list[str], found: str) -> None:
    ended = call(built, "run", str(built / "model.gguf"), "-p", "x", *words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"expected HOST:PORT,... such as 10.0.0.2:50052, found {found}; " in ended.stderr
    assert "kimi-llama worker --help" in ended.stderr


def test_addresses_of_workers_are_passed_on(built: Path) -> None:
    ended = call(built, "run", str(built / "model.gguf"), "-p", "x", "--workers", "10.0.0.2:50052,host-1:1")
    assert ended.returncode == 7, "the tool's own exit status"
    words = ended.stdout.splitlines()
    assert words[words.index("--rpc") + 1] == "10.0.0.2:50052,host-1:1"


def test_a_tool_gets_the_model_the_defaults_and_the_callers_arguments(built: Path) -> None:
    told = call(built, "run", str(built / "model.gguf"), "-p", "two words", "-n", "3")
    assert told.returncode == 7, "the tool's own exit status"
    words = told.stdout.splitlines()
    assert words[:2] == ["--model", str(built / "model.gguf")]
    assert words[-4:] == ["-p", "two words", "-n", "3"]
    assert "--threads" in words
    assert "--no-conversation" in words


def with_key(path: Path, begins: bool) -> str:
    """Write a GGUF file that says whether the model begins a text by itself; return its name."""
    return str(write_gguf(path, add_bos_token=begins))


@pytest.mark.parametrize("words", [[], ["-md", "DRAFT"]], ids=" ".join)
def test_a_model_that_begins_no_text_needs_a_prompt(tmp_path: Path, words: list[str]) -> None:
    """Said before a build is made."""
    tiny_llama.make(tmp_path)
    model = with_key(tmp_path / "model.gguf", begins=False)
    ended = call(tmp_path, "run", model, *(model if word == "DRAFT" else word for word in words))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "kimi-llama: error: no prompt was given: expected -p TEXT or -f FILE (-f /dev/stdin reads standard input); "
        f"write: kimi-llama run {model} -p TEXT; to chat: kimi-llama chat {model}\n"
    )


@pytest.mark.parametrize(
    ("begins", "words"),
    [
        (True, []),
        (False, ["-p", "x"]),
        (False, ["-cnv"]),
    ],
)
def test_what_needs_no_prompt_is_run(built: Path, begins: bool, words: list[str]) -> None:
    """The miniature's program always fails, with status 7; llama-completion without a prompt has another one."""
    model = with_key(built / f"begins-{begins}.gguf", begins)
    ended = call(built, "run", model, *words)
    assert ended.returncode == 7 and "no prompt was given" not in ended.stderr
    assert call(built, "serve", model).returncode != 2, "only run needs a prompt"


@pytest.mark.engine
def test_a_model_that_turns_out_to_need_a_prompt(engine: Engine, demo_gguf: Callable[[str], Path]) -> None:
    """llama.cpp decides, as the key could have another value."""
    words = ["run", demo_gguf("F32"), "-n", "1", "--override-kv", "a.key=int:1"]
    command = [sys.executable, "-m", "kimi_gguf.scripts.kimi_llama", *map(str, words)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "input is empty" in ended.stderr
    assert ended.returncode == 2
    assert "no prompt was given: expected -p TEXT or -f FILE" in ended.stderr.splitlines()[-1]


def test_a_gpus_build_that_lost_its_libraries_is_said_and_not_replaced_silently(tmp_path: Path) -> None:
    tiny = tiny_llama.make(tmp_path)
    lost = tiny.cache.engines / "0123456789abcdef"
    shutil.copytree(tiny.build(), lost)
    manifest = json.loads((lost / "manifest.json").read_text())
    (lost / "manifest.json").write_text(json.dumps({**manifest, "backends": ["cuda", "cpu"]}))
    (lost / "bin" / "llama-cli").write_text("#!/bin/sh\necho libcublas.so.13: no such file >&2; exit 127\n")
    (tmp_path / "model.gguf").write_bytes(tiny_llama.NO_TENSORS)
    told = call(tmp_path, "run", "--backend", "cuda", str(tmp_path / "model.gguf"))
    assert told.returncode == 1
    assert "libcublas.so.13" in told.stderr
    assert "--build cpu" in told.stderr
    assert call(tmp_path, "run", "--backend", "cpu", str(tmp_path / "model.gguf")).returncode == 7


@pytest.mark.parametrize(
    ("words", "ignored"), [("run", False), ("chat", False), ("serve", True), ("run --rpc x:1", True)]
)
def test_a_program_ends_with_the_reader_of_its_text(
    words: str, ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python ignores SIGPIPE. A server needs that, and so does a program whose workers may end."""
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny_llama.NO_TENSORS)
    engine = SimpleNamespace(bin=tmp_path, for_gpus=False, label=lambda: "x")
    monkeypatch.setattr(llama_tools, "select", lambda *_: engine)
    found = []
    monkeypatch.setattr("os.execv", lambda *_: found.append(signal.getsignal(signal.SIGPIPE)))
    before = signal.getsignal(signal.SIGPIPE), signal.getsignal(signal.SIGTERM)
    command, *options = words.split()
    try:
        kimi_llama.main([command, str(model), "-p", "x", *options])
    finally:
        signal.signal(signal.SIGPIPE, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert found == [signal.SIG_IGN if ignored else signal.SIG_DFL]


def test_what_the_caller_sets_is_not_set_again(built: Path) -> None:
    told = call(built, "run", str(built / "model.gguf"), "-t", "1", "-cnv", "-fa=on", "-v", "-ub", "64")
    words = told.stdout.splitlines()
    assert words == ["--model", str(built / "model.gguf"), "-t", "1", "-cnv", "-fa=on", "-v", "-ub", "64"]


@pytest.mark.parametrize(
    ("command", "variable", "option"),
    [
        ("run", "LLAMA_ARG_THREADS", "--threads"),
        ("run", "LLAMA_ARG_UBATCH", "--ubatch-size"),
        ("chat", "LLAMA_ARG_JINJA", "--jinja"),
        ("serve", "LLAMA_ARG_FLASH_ATTN", "--flash-attn"),
        ("serve", "LLAMA_ARG_LOAD_MODE", "--load-mode"),
    ],
)
def test_variables_of_llama_cpp_come_before_the_defaults(
    command: str, variable: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their text in llama.cpp's help says that they exist."""
    tool = llama_tools.TOOLS[command]
    assert option in llama_tools.tool_command(tool, Path("model.gguf"), ())
    monkeypatch.setenv(variable, "1")
    assert option not in llama_tools.tool_command(tool, Path("model.gguf"), ())


@pytest.mark.engine
def test_the_variables_of_the_defaults_are_llama_cpp_s(engine: Engine) -> None:
    command = [engine.bin / "llama-server", "--help"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    defaults = {
        default for tool in llama_tools.TOOLS.values() for default in tool.defaults if default.variable
    }
    assert len(defaults) > 4
    assert [default for default in defaults if f"env: {default.variable})" not in text] == []


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (["--no-mmap"], "none"),
        (["--mmap"], "mmap"),
        (["--mlock"], "mmap+mlock"),
        (["--no-mmap", "--mlock"], "mlock"),
        (["--direct-io"], "dio"),
    ],
)
def test_options_that_load_mode_replaced_are_translated(given: list[str], mode: str) -> None:
    words = llama_tools.tool_command(llama_tools.TOOLS["serve"], Path("model.gguf"), ["-c", "64", *given])
    assert words[-4:] == ["--load-mode", mode, "-c", "64"] and words.count("--load-mode") == 1


def test_settings_in_a_variable_are_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
    told = call(built, "build")
    assert (
        told.returncode == 2 and "-D NAME=VALUE; --backend for a GPU, found '-DGGML_CUDA=on'" in told.stderr
    )


def test_prompts_of_one_user_are_evaluated_in_long_ubatches(built: Path) -> None:
    """Not those of a server's slots, which wait for each other, and not upstream's, which are slower with them."""

    for name, expected in {"run": ["2048"], "chat": ["2048"], "serve": []}.items():
        words = llama_tools.tool_command(llama_tools.TOOLS[name], Path("model.gguf"), ())
        assert [value for option, value in pairwise(words) if option == "--ubatch-size"] == expected
    model = str(built / "model.gguf")
    assert "--ubatch-size" in call(built, "run", model).stdout
    assert "--ubatch-size" not in call(built, "run", "--upstream", model).stdout


@pytest.mark.parametrize(
    ("sizes", "free", "fits"),
    [
        ((300,), 400, True),
        ((300,), 399, False),
        ((150, 151), 400, False),
        ((1,), None, False),
    ],
)
def test_weights_fit_if_they_take_three_quarters_of_the_available_memory(
    sizes: tuple[int, ...], free: int | None, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"m-{i:05d}-of-{len(sizes):05d}.gguf" for i in range(1, len(sizes) + 1)]
    for name, size in zip(names, sizes, strict=True):
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setattr(llama_tools, "available_memory", lambda: free)
    assert llama_tools.fits_memory(tmp_path / names[0]) == fits


def test_a_servers_weights_are_in_memory_unless_the_caller_says_otherwise() -> None:
    """Not those of `run`, which would load longer than it computes."""

    def command(name: str, *given: str) -> list[str]:
        return llama_tools.tool_command(llama_tools.TOOLS[name], Path("model.gguf"), given)

    in_memory = {name for name in ("run", "chat", "serve") if command(name)[-2:] == ["--load-mode", "none"]}
    assert in_memory == {"chat", "serve"}
    assert "--load-mode" not in command("serve", "-lm", "mmap")


@pytest.mark.parametrize("draft", ["-md", "--model-draft", "--spec-draft-model"])
def test_a_draft_model_is_used_and_not_only_loaded(built: Path, draft: str) -> None:
    model = str(built / "model.gguf")
    told = call(built, "run", model, draft, model, "-n", "3")
    assert told.returncode == 8, "llama-completion knows no drafts"
    words = told.stdout.splitlines()
    assert words[-6:] == ["--spec-type", "draft-simple", draft, model, "-n", "3"]
    assert "--no-conversation" not in words, "llama-speculative-simple knows no conversations"


@pytest.mark.parametrize("kind", [["--spec-type", "draft-mtp"], ["--spec-type=ngram-cache,draft-mtp"]])
def test_a_file_must_have_the_mtp_layer_that_drafts(built: Path, kind: list[str]) -> None:
    for layers, status in ((0, 1), (1, 8)):
        path = write_gguf(built / f"mtp-{layers}.gguf", "bailingmoe3", nextn_predict_layers=layers)
        result = call(built, "run", str(path), *kind)
        assert result.returncode == status
        assert ("mtp-0.gguf: cannot draft with draft-mtp" in result.stderr) == (layers == 0)
        assert ("--no-mtp" in result.stderr) == (layers == 0)


@pytest.mark.parametrize("command", ["run", "quantize"])
def test_run_and_chat_refuse_a_model_without_a_tokenizer(built: Path, command: str) -> None:
    path = write_gguf(built / "generated.gguf", tokenizer_model="no_vocab")
    result = call(built, command, str(path), str(built / "out.gguf"), "Q8_0")
    refused = command in ("run", "chat")
    assert ("generated.gguf: has no tokenizer" in result.stderr) == refused
    assert (f"kimi-llama bench {path}" in result.stderr) == refused
    assert result.returncode == 1 or not refused


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["serve", "MODEL", "-md", "absent.gguf"], 1, "absent.gguf: no such file"),
        *(
            (
                (
                    [command, "absent.gguf"],
                    1,
                    "absent.gguf: no such file: expected a GGUF file; make one with: convert-kimi",
                )
            )
            for command in ("run", "quantize")
        ),
        *(([command, "."], 1, ".: is a folder") for command in ("run", "quantize")),
        (["run", "model.safetensors"], 1, "model.safetensors: not a GGUF file"),
        (
            ["run", "-p", "x", "MODEL"],
            2,
            "unrecognized arguments: -p (options of llama-completion follow MODEL)",
        ),
        (
            ["chat", "MODEL", "--build", "cuda"],
            2,
            "--build: what follows MODEL is passed to llama-cli, which does",
        ),
        (["serve", "MODEL", "--build=cuda"], 2, "write it in front of MODEL: kimi-llama serve --build NAME"),
        (["path", "--wrong"], 2, "unrecognized arguments: --wrong\n"),
        (["worker", "--port", "99999"], 2, "argument --port: '99999': expected one number from 1 to 65535"),
    ],
)
def test_wrong_words_are_refused_at_once(
    words: list[str], status: int, said: str, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built)
    Path("model.safetensors").write_bytes(b"\x10" + bytes(20))
    ended = call(built, *(str(built / "model.gguf") if word == "MODEL" else word for word in words))
    assert (ended.returncode, ended.stdout) == (status, "")
    assert said in ended.stderr


@pytest.mark.parametrize("place", [["--host", "nope"], ["--host", "203.0.113.7"]], ids=" ".join)
def test_a_worker_that_cannot_listen_says_so(place: list[str], built: Path) -> None:
    """203.0.113.7 is an address of no machine (RFC 5737)."""
    ended = call(built, "worker", *place)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert (
        f"kimi-llama: error: cannot listen on {'127.0.0.1:' if 'port' in place[0] else ''}{place[1]}"
        in ended.stderr
    )


DAMAGED = {
    "a version that does not exist": (b"GGUF" + bytes(60), "expected GGUF version 3, found 0"),
    "numbers at random": (b"GGUF\xba\xad\xf0\x0d" * 9, "expected GGUF version 3, found 233876922"),
    "only the first bytes": (b"GGUF", "the header ends early, at byte 4; truncated"),
    "without the end of a tensor": (
        b"",
        "'weight': expected 256 bytes at offset 128, but the file has 300 bytes",
    ),
}


@pytest.mark.parametrize(
    ("damage", "command"), [*zip(DAMAGED, ["run", "serve", "quantize", "run -md"], strict=True)]
)
def test_a_damaged_file_is_said_before_a_build_is_made(tmp_path: Path, damage: str, command: str) -> None:
    tiny_llama.make(tmp_path)
    path, (content, said) = tmp_path / "model.gguf", DAMAGED[damage]
    path.write_bytes(content)
    if not content:
        os.truncate(write_gguf(path, tensors={"weight": np.zeros(64, np.float32)}), 300)
    (tmp_path / "whole.gguf").write_bytes(tiny_llama.NO_TENSORS)
    name, *draft = command.split()
    words = [str(tmp_path / "whole.gguf"), *draft, str(path)] if draft else [str(path), "out.gguf", "Q8_0"]
    ended = call(tmp_path, name, *words)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"kimi-llama: error: {path}: a damaged GGUF file: {said}")
    assert ended.stderr.endswith("; convert or download it again\n") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [2, 4])
def test_another_version_of_gguf_is_left_to_llama_cpp(built: Path, number: int) -> None:
    """It reads version 2, and a later one may read more."""
    path = built / f"version-{number}.gguf"
    path.write_bytes(b"GGUF" + bytes([number]) + bytes(19))
    assert call(built, "run", str(path), "-p", "x").returncode == 7


def test_an_unknown_type_of_tensor_is_left_to_llama_cpp(built: Path) -> None:
    for number, status in ((999, 7), (1 << 20, 1)):
        path = built / f"type-{number}.gguf"
        tensor = struct.pack("<Q1sIQIQ", 1, b"w", 1, 32, number, 0)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor + bytes(512))
        assert call(built, "run", str(path), "-p", "x").returncode == status


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "--source", "absent"],
        ["build", "--archive", "absent.tar.gz", "-DNEW=1"],
        ["export-patches", "/dev/null/x"],
        ["path", "--backend", "cuda"],
    ],
    ids=" ".join,
)
def test_errors_have_a_status_and_no_traceback(built: Path, arguments: list[str]) -> None:
    told = call(built, *arguments)
    assert told.returncode not in (0, 130)
    assert "Traceback" not in told.stderr
    assert "\nkimi-llama: " in "\n" + told.stderr


def test_export_patches_writes_the_series(built: Path, tmp_path: Path) -> None:
    told = call(built, "export-patches", str(tmp_path / "out"))
    assert told.returncode == 0
    assert told.stdout.splitlines() == [str(tmp_path / "out/fixes-0001-answer.patch")]
    told = call(built, "export-patches", "--fixes", str(tmp_path / "fixes"))
    assert told.stdout.splitlines() == [str(tmp_path / "fixes/fixes-0001-answer.patch")]


def test_help_shows_examples() -> None:
    (commands,) = (
        action.choices for action in kimi_llama._parser()._actions if isinstance(action.choices, dict)
    )
    for command, parser in commands.items():
        assert f"kimi-llama {command}" in parser.format_help().split("examples:")[1]


def test_doctor_says_once_that_nothing_is_built(tmp_path: Path) -> None:
    tiny_llama.make(tmp_path)
    for variables, said in (
        ({}, "build cpu: it is not built yet; make it: kimi-llama build"),
        (
            {"KIMI_BUILD": "cuda"},
            "build cuda (named by KIMI_BUILD): it is not built yet; make it: kimi-llama build --backend cuda",
        ),
    ):
        lines = call(tmp_path, "doctor", **variables).stdout.splitlines()
        assert lines[:3] == [f"nothing to run: {said}", "", "machine"]
        assert not any("built" in line or "kimi-llama build" in line for line in lines[1:])
