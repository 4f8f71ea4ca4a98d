"""Which build runs: the default one, unless an option, the environment or `kimi-llama use` names another."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_llama
from selection import some_of
from shell_program import write_program
from tiny_llama import call

from kimi_gguf.engine import doctor, toolchain
from kimi_gguf.engine.build_spec import (
    BACKENDS,
    OPTIONS,
    VERIFY,
    BuildSpec,
    make_build_spec,
    processor,
    provenance,
)
from kimi_gguf.engine.builds import Engine, builds, cache_folder, cpu_library, find, load
from kimi_gguf.engine.doctor import Check, list_devices
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.toolchain import find_compilers
from kimi_gguf.patches.series import PATCH_FOLDER, Series
from kimi_gguf.scripts import kimi_llama

# name of a build, its key, and when it was built: the default build is the oldest, and a CPU build
BUILDS = {
    "cpu": ("11111111aaaaaaaa", "2026-01-01"),
    "cpu+GGML_NATIVE=OFF": ("22222222bbbbbbbb", "2026-01-03"),
    "cuda": ("33333333cccccccc", "2026-01-02"),
    "cpu-all": ("44444444dddddddd", "2026-01-04"),
}


def add(
    folder: Path, name: str, key: str, built: str, upstream: bool = False, variables: object = None
) -> None:
    """Add a build with this name to the miniature's cache; its llama-completion prints its key.

    variables: those of the environment that it was made with; None as in the manifests of earlier versions.
    """
    tiny = tiny_llama.load(folder)
    backend, *defines = name.split("+")
    options = {**OPTIONS, **BACKENDS[backend], **dict(each.split("=") for each in defines)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kimi_gguf.engine.build_spec.load_pin", lambda: tiny.pin)
        patch.setattr("kimi_gguf.engine.build_spec.load_series", lambda: tiny.series)
        manifest = provenance(upstream)
    manifest |= {"key": key, "tests": False, "options": options, "built": built, "commit": "none"}
    manifest |= {"package": "none==0", "patches": [], "compilers": {}, "tree_sha256": "0" * 64}
    manifest |= {"backends": [backend, "cpu"] if backend == "cuda" else [backend], "cpu": processor(backend)}
    manifest |= {} if variables is None else {"environment": variables}
    place = tiny.cache.engines / key
    for program in ("llama-completion", "llama-cli"):
        write_program(place / "bin" / program, f"echo {key}")
    (place / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The miniature with three builds in its cache."""
    tiny_llama.make(tmp_path)
    for name, (key, built) in BUILDS.items():
        add(tmp_path, name, key, built)
    (tmp_path / "model.gguf").write_bytes(tiny_llama.NO_TENSORS)
    return tmp_path


def key_of(folder: Path, *arguments: str, **environment: str) -> str:
    """The key of the build whose folder `kimi-llama path` prints."""
    done = call(folder, "path", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Path(done.stdout.strip()).name


def path_of(folder: Path, *arguments: str, **environment: str) -> str:
    """The name of the folder."""
    key = key_of(folder, *arguments, **environment)
    return next(name for name, build in BUILDS.items() if build[0] == key)


@pytest.mark.parametrize("name", some_of(BUILDS, "cpu+GGML_NATIVE=OFF", "cuda"))
def test_each_way_names_a_build_and_the_nearer_one_wins(folder: Path, name: str) -> None:
    others = [other for other in BUILDS if other != name]
    assert path_of(folder) == "cpu", "not the newest one, nor one for a GPU"
    assert path_of(folder, "--build", name) == path_of(folder, "--build", BUILDS[name][0][:8]) == name
    assert path_of(folder, KIMI_BUILD=name) == name
    assert call(folder, "use", name).returncode == 0
    assert path_of(folder) == name
    assert path_of(folder, KIMI_BUILD=others[0]) == others[0]
    assert path_of(folder, "--build", others[1], KIMI_BUILD=others[0]) == others[1]
    assert call(folder, "use", "cpu").returncode == 0
    assert path_of(folder) == "cpu"
    assert path_of(folder, "--backend", "cuda") == "cuda"


def test_a_name_outlives_the_build_it_named(folder: Path) -> None:
    """`use` stores a name, not a key, so that it also selects the build of the next version."""
    assert call(folder, "use", BUILDS["cuda"][0]).returncode == 0
    assert (folder / "cache/build-in-use").read_text() == "cuda\n"


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "XDG_CACHE_HOME", "KIMI_GGUF_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 9)  # no user has this number
    with pytest.raises(EngineError, match="found neither; set KIMI_GGUF_CACHE to a folder"):
        cache_folder()
    monkeypatch.setenv("KIMI_GGUF_CACHE", "~no-such-user/cache")
    with pytest.raises(EngineError, match="found KIMI_GGUF_CACHE=~no-such-user/cache"):
        cache_folder()


def test_in_the_home_of_another_user_there_are_no_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `sudo -u` with the caller's HOME: a wheel's build runs nevertheless."""
    (tmp_path / "cache/engines").mkdir(parents=True)
    (tmp_path / "cache/build-in-use").write_text("abacus")
    monkeypatch.setenv("KIMI_GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KIMI_BUILD", raising=False)
    with pytest.raises(EngineError, match="abacus"):
        find()
    tmp_path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may look everywhere
        assert find() is None and builds() == []
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("command", ["path", "run"])
def test_without_the_default_build_the_others_are_listed_and_none_is_taken(
    tmp_path: Path, command: str
) -> None:
    tiny_llama.make(tmp_path)
    (tmp_path / "model.gguf").write_bytes(tiny_llama.NO_TENSORS)
    for name in ("cpu+GGML_NATIVE=OFF", "cuda"):
        add(tmp_path, name, *BUILDS[name])
    done = call(tmp_path, command, *([str(tmp_path / "model.gguf")] if command == "run" else []))
    assert done.returncode == 1
    assert done.stdout == ""
    for part in ("cpu+GGML_NATIVE=OFF (22222222)", "cuda (33333333)", "kimi-llama build", "kimi-llama use"):
        assert part in done.stderr


@pytest.mark.parametrize(
    "arguments", [["path", "--build", "abacus"], ["use", "cpu+GGML_LTO=ON"]], ids=" ".join
)
def test_a_name_of_no_build_is_refused_with_those_there_are(folder: Path, arguments: list[str]) -> None:
    done = call(folder, *arguments)
    assert done.returncode == 1
    assert all(name in done.stderr for name in BUILDS)
    assert ("kimi-llama build -D GGML_LTO=ON" in done.stderr) == (arguments[0] == "use")


@pytest.mark.parametrize(
    ("options", "variables"), [(["--build", "vulkan"], {}), ([], {"KIMI_BUILD": "vulkan"})], ids=str
)
def test_a_named_build_is_not_made_by_a_program_that_needs_it(
    options: list[str], variables: dict[str, str], folder: Path
) -> None:
    done = call(folder, "run", *options, str(folder / "model.gguf"), **variables)
    assert done.returncode == 1
    assert "it is not built yet" in done.stderr and "kimi-llama build --backend vulkan" in done.stderr


def test_a_build_with_flags_runs_only_with_these_flags(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`CXXFLAGS="-O0 -g" kimi-llama build`, once, slows down nothing that runs later, unless its key is chosen."""
    forget(monkeypatch)
    add(folder, "cpu", "55555555dddddddd", "2026-02-01", variables={})
    add(folder, "cpu", "66666666eeeeeeee", "2026-03-01", variables={"CXXFLAGS": "-O0 -g"})
    assert key_of(folder) == "55555555dddddddd"
    assert key_of(folder, CXXFLAGS="-O0 -g") == "66666666eeeeeeee"
    assert key_of(folder, CXXFLAGS="-O1") == "66666666eeeeeeee", "none has these flags: the latest"
    used = call(folder, "use", "66666666", CXXFLAGS="-O0 -g")
    assert used.stdout.endswith("; with CXXFLAGS='-O0 -g')\n")
    assert key_of(folder) == "66666666eeeeeeee"
    assert "cpu (66666666; with CXXFLAGS='-O0 -g')" in call(folder, "path", KIMI_BUILD="abacus").stderr
    assert "with      CXXFLAGS=-O0 -g" in call(folder, "doctor").stdout


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"key": "55555555dddddddd"}', "options", "environment"],
)
def test_a_damaged_build_is_none(folder: Path, content: str) -> None:
    add(folder, "cpu", "55555555dddddddd", "2026-02-01")
    manifest = folder / "cache/engines/55555555dddddddd/manifest.json"
    if content.isalpha():  # without this key
        kept = {k: v for k, v in json.loads(manifest.read_text()).items() if k != content}
        content = json.dumps(kept | ({"environment": ["-O0"]} if content == "environment" else {}))
    manifest.write_text(content)
    assert path_of(folder) == "cpu"
    assert "Traceback" not in call(folder, "doctor").stderr


def test_a_choice_that_cannot_be_read(folder: Path) -> None:
    choice = folder / "cache/build-in-use"
    choice.write_bytes(b"\xff\n")
    told = call(folder, "path")
    assert told.returncode == 1 and "named by kimi-llama use" in told.stderr
    assert "Traceback" not in told.stderr + call(folder, "doctor").stderr
    choice.write_bytes(b"")
    assert path_of(folder) == "cpu"


def test_the_choice_holds_for_upstreams_build_too(folder: Path) -> None:
    add(folder, "cpu", "55555555eeeeeeee", "2026-01-01", upstream=True)
    add(folder, "cuda", "66666666ffffffff", "2026-01-01", upstream=True)
    assert key_of(folder, "--upstream") == "55555555eeeeeeee"
    assert key_of(folder, "--upstream", KIMI_BUILD="cuda") == "66666666ffffffff"


@pytest.mark.parametrize(("name", "kind"), [("cpu+GGML_NATIVE=OFF", "portable"), ("cuda", "native")])
def test_one_line_at_start_up_says_which_build_runs(folder: Path, name: str, kind: str) -> None:
    key = BUILDS[name][0]
    done = call(folder, "run", "--build", name, str(folder / "model.gguf"))
    assert done.stdout == f"{key}\n", "the tool's own output"
    assert done.stderr == f"kimi-llama: build {name} {key[:8]} ({kind}: instruction set unknown)\n"


def test_a_gpu_build_without_a_device_is_not_well(tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "llama-cli", "printf 'Available devices:\n  (none)\n'")
    assert list_devices(Engine("key", tmp_path, False, ("cpu",), {})) == "CPU"
    with pytest.raises(EngineError, match="built for cuda, but there is no device"):
        list_devices(Engine("key", tmp_path, False, ("cuda",), {}))


RESULT = "result\\tKDA_CONV\\tWRONG\\tinf\\t1e-07\\t1 token\\n"
CHECKED = f"device\\tGPU0 (a GPU)\\ndriver\\t1\\nbuild\\tb\\nstarted\\t0.5\\nchecked\\t0.25\\n{RESULT}"


def verifier(folder: Path, key: str, script: str) -> Path:
    return write_program(tiny_llama.load(folder).cache.engines / key / "bin" / VERIFY, script)


def test_doctor_shows_first_what_failed_and_the_build_that_runs(folder: Path) -> None:
    ended = call(folder, "doctor", KIMI_BUILD="cpu+GGML_NATIVE=OFF")
    first, *rest = ended.stdout.splitlines()
    assert ended.returncode == 1
    assert first.startswith("failed: programs run (build cpu 11111111); ")
    assert "build that runs" not in first, "it exists"
    builds = [line.split()[1] for line in rest if re.match(r"build \S+ [0-9a-f]{16}:", line)]
    assert builds[0] == "cpu+GGML_NATIVE=OFF" and sorted(builds) == sorted(BUILDS)
    fixes, ops = (len(list((PATCH_FOLDER / kind).glob("*.patch"))) for kind in ("fixes", "ops"))
    patches = [line for line in rest if line.startswith("patches ")]
    assert patches[0].startswith(f"patches   {fixes + ops}: {fixes} fixes of upstream, {ops} for operators ")
    assert "patches" not in "".join(rest[: rest.index("machine")]) and ".patch" not in ended.stdout
    listed = json.loads(call(folder, "doctor", "--json").stdout)["patches"]
    assert len(listed) == fixes + ops and all(each["name"] and each["subject"] for each in listed)


@pytest.mark.parametrize("chosen", ["cpu", "cuda"])
def test_a_gpu_is_needed_if_the_build_that_runs_is_for_gpus(
    chosen: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CUDA build may be left from a time when the machine had a GPU."""
    engines = {name: load(folder / "cache/engines" / BUILDS[name][0]) for name in ("cpu", "cuda")}
    monkeypatch.setattr(doctor, "builds", lambda upstream: [] if upstream else [*engines.values()])
    monkeypatch.setattr(doctor, "select", lambda make: engines[chosen])
    monkeypatch.setattr(
        doctor, "examine", lambda engine, _: [Check("devices", not engine.for_gpus, "what it says")]
    )
    status = kimi_llama.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert status == (1 if chosen == "cuda" else 0)
    if chosen == "cuda":
        assert lines[:2] == ["failed: devices (build cuda 33333333)", ""]
        assert "  BAD devices: what it says" in lines
    else:
        assert lines[0] == "all checks pass"
        assert lines[1] == (
            "build cuda 33333333, which runs only if it is named, does not work here: what it says "
            f"(if you do not need it, remove {folder / 'cache/engines' / BUILDS['cuda'][0]})"
        )
        assert "  -   devices: what it says" in lines


@pytest.mark.parametrize(
    ("script", "mark", "said"),
    [
        (
            '[ "$1" = --version ]',
            "-  ",
            "release 13, without cuBLAS: --backend cuda needs NVIDIA's whole toolkit",
        ),
        (None, "-  ", "not found (only --backend cuda needs it)"),
    ],
)
def test_doctor_marks_a_toolkit_that_is_incomplete(
    script: str | None, mark: str, said: str, folder: Path
) -> None:
    nvcc = folder / "nvcc"
    if script:
        write_program(nvcc, f"[ $1 != --version ] || echo release 13\n{script}")
    (line,) = (
        each for each in call(folder, "doctor", CUDACXX=str(nvcc)).stdout.splitlines() if "CUDA" in each
    )
    assert line == f"  {mark} CUDA toolkit: {f'{nvcc}: ' if script else ''}{said}"


def test_doctor_shows_what_kimi_verify_prints(folder: Path) -> None:
    verifier(folder, BUILDS["cuda"][0], f"printf '{CHECKED}'; exit 1")
    done = call(folder, "doctor", "--devices", KIMI_BUILD="cuda")
    assert done.returncode == 1
    assert "checked  in 0.25 s, after 0.50 s of start-up" in done.stdout
    assert re.search(r"^KDA_CONV +WRONG +inf +1.0e-07  1 token$", done.stdout, re.MULTILINE)
    report = json.loads(call(folder, "doctor", "--devices", "--json", KIMI_BUILD="cuda").stdout)
    assert report["devices"][0]["parts"] == [
        {"name": "KDA_CONV", "state": "WRONG", "nmse": None, "bound": 1e-7, "case": "1 token"}
    ]


def test_doctor_names_a_program_that_is_missing(folder: Path) -> None:
    done = call(folder, "doctor", "--devices", "--json", KIMI_BUILD="cuda")
    assert (done.returncode, done.stdout) == (1, "")
    place = tiny_llama.load(folder).cache.engines / BUILDS["cuda"][0]
    assert f"error: {place / 'bin' / VERIFY}: " in done.stderr
    assert f"remove {place} and run kimi-llama build --backend cuda" in done.stderr


def test_doctor_says_if_kimi_verify_crashes(folder: Path) -> None:
    program = verifier(folder, BUILDS["cuda"][0], "kill -SEGV $$")
    done = call(folder, "doctor", "--devices", KIMI_BUILD="cuda")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: {program}: " in done.stderr
    assert "exit status -11" in done.stderr


@pytest.mark.parametrize(("name", "status"), [("cpu", 0), ("cuda", 1)])
def test_doctor_without_a_device(folder: Path, name: str, status: int) -> None:
    """Only a build for GPUs needs one."""
    key = BUILDS[name][0]
    verifier(folder, key, "echo this build finds no GPU: no device needs the check")
    done = call(folder, "doctor", "--devices", KIMI_BUILD=name)
    assert done.returncode == status
    if status:
        assert "built for cuda, but there is no device" in done.stderr
    else:
        assert f"cpu {key[:8]}" in done.stdout
        assert "no GPU was checked" in done.stdout


def test_of_several_cpu_libraries_the_one_that_ggml_loads(tmp_path: Path) -> None:
    """ggml asks each library for a score, which is 0 if the processor lacks an instruction set."""
    for name, score in (("x64", 1), ("haswell", 7), ("zen4", 0)):
        source = (
            f"int ggml_backend_score(void) {{ return {score}; }} int ggml_cpu_has_avx2(void) {{ return 1; }}"
        )
        library = tmp_path / f"libggml-cpu-{name}.so"
        command = [find_compilers("cpu")["C"].path, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=source, text=True, check=True)
    assert cpu_library(tmp_path).name == "libggml-cpu-haswell.so"


def test_a_build_for_all_cpus_does_not_depend_on_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {name: make_build_spec(backend=name).key for name in ("cpu", "cpu-all")}
    monkeypatch.setattr("kimi_gguf.engine.build_spec.cpu_fingerprint", lambda: "another")
    assert make_build_spec(backend="cpu").key != keys["cpu"]
    assert make_build_spec(backend="cpu-all").key == keys["cpu-all"]


VARIABLES = [(backend or "cpu", name) for backend, names in toolchain.VARIABLES.items() for name in names]
COMPILERS = [("cpu", "CC"), ("cpu", "CXX"), ("cuda", "CUDACXX")]


def forget(patch: pytest.MonkeyPatch) -> None:
    """Remove the variables from the environment."""
    for _, name in (*VARIABLES, *COMPILERS):
        patch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def plain() -> BuildSpec:
    """The spec of this machine's build without variables in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        forget(patch)
        spec = make_build_spec()
    assert spec.variables == ()
    return spec


@pytest.mark.parametrize(("backend", "name"), [*VARIABLES, *COMPILERS])
def test_a_variable_that_changes_a_build_changes_its_key(
    backend: str, name: str, plain: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)

    def key(text: str, backend: str = backend) -> str:
        monkeypatch.setenv(name, text)
        return replace(plain, variables=toolchain.build_variables(backend)).work_key

    first, second = ("program -O0", "program -O1") if (backend, name) in COMPILERS else ("-O0", "-O1")
    assert len({plain.work_key, key(first), key(second)}) == 3
    assert key("") == plain.work_key
    if (backend, name) in COMPILERS:
        assert key("program") == plain.work_key  # which program it is has its own part in the key
    elif backend != "cpu":
        assert key("-O0", "cpu") == plain.work_key


def test_other_patches_make_another_build(plain: BuildSpec) -> None:
    fewer = replace(plain, series=Series(plain.series.patches[1:]))
    assert len({plain.key, fewer.key, replace(plain, upstream=True).key}) == 3


def test_flags_are_in_the_spec(plain: BuildSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    (path,) = (each.path for language, each in plain.compilers if language == "C++")
    monkeypatch.setenv("CXX", f"{path} -O0 -DNAME='a b'")
    monkeypatch.setenv("CPATH", "/opt/headers")
    spec = make_build_spec()
    assert spec.variables == (("CPATH", "/opt/headers"), ("CXX", "-O0 '-DNAME=a b'"))
    assert [each.version for _, each in spec.compilers] == [each.version for _, each in plain.compilers]
    assert spec.key != plain.key


@pytest.mark.parametrize("launcher", ["ccache", "env NAME=1"])
def test_the_compiler_behind_a_launcher_is_in_the_key(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its assembler and linker. An upgrade of it would otherwise not make another build."""
    forget(monkeypatch)
    write_program(tmp_path / "ccache", 'exec "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    keys = set()
    for version in ("Mine 1.0", "Mine 2.0"):
        toolchain._version.cache_clear()  # another process
        for tool in ("as", "ld"):
            write_program(tmp_path / f"my-{tool}", f"echo {tool} of {version}")
        tell = f'case "$1" in --version) echo {version};; *-name=*) echo {tmp_path}/my-${{1#*-name=}};; esac'
        write_program(tmp_path / "mine", tell)
        monkeypatch.setenv("CXX", f"{launcher} mine")
        spec = make_build_spec()
        assert dict(spec.compilers)["C++"].version == version
        assert spec.binutils == (f"as of {version}", f"ld of {version}")
        keys.add(spec.key)
    assert len(keys) == 2


@pytest.mark.parametrize(("backend", "name"), COMPILERS)
def test_a_variable_that_is_no_command_is_named(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)
    monkeypatch.setenv(name, 'g++ "')
    said = rf'{name} in the environment is not a command.*found g\+\+ " \(No closing quotation\)'
    for look in (toolchain.find_compilers, toolchain.build_variables):
        with pytest.raises(EngineError, match=said):
            look(backend)


def test_doctor_answers_if_a_variable_is_no_command(folder: Path) -> None:
    done = call(folder, "doctor", CXX='g++ "', CUDACXX='nvcc "')
    assert "BAD C++ compiler: CXX in the environment is not a command" in done.stdout
    assert "build that runs: cpu 11111111" in done.stdout and done.stderr == ""


def test_another_assembler_or_linker_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the compiler finds on PATH, as Debian's GCC does."""
    key = make_build_spec().key
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for tool in ("as", "ld"):
        program = write_program(tmp_path / tool, "echo Another 99.0")
        spec = make_build_spec()
        assert "Another 99.0" in spec.binutils and spec.key != key
        program.unlink()
    assert make_build_spec().key == key
