"""The emulated Metal device, alone and as a ggml backend.

Input: .metal files; for the backend a llama.cpp source tree. Output: a shared library with the device (device/) and the
rewritten kernels, which it compiles when a pipeline first needs them. For the backend there is a second library, which
ggml_backend_load can load: ggml-metal's host code and our implementation of its C interfaces to Metal (host/).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compiled import FOLDER, compile_once, environment_digest
from emulators.common import INCLUDE as COMMON
from emulators.metal.rewrite import rewrite

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
HEADERS = (f"-I{INCLUDE}", f"-I{COMMON}")
STUBS = HERE / "stubs"
DEVICE = HERE / "device"
OURS = HERE / "host"

# ggml-metal's host code that is C++; the rest is Objective-C, which host/ replaces.
HOST = (
    "ggml-metal.cpp",
    "ggml-metal-common.cpp",
    "ggml-metal-device.cpp",
    "ggml-metal-fusion.cpp",
    "ggml-metal-ops.cpp",
    "ggml-metal-tuning.cpp",
)
# Plain C in ggml-metal-device.m: from the first line with this text to the one before the second.
PLAIN_C = (
    ("#define GGML_METAL_LIBS", "struct ggml_metal_library {"),
    ("static const struct {", "ggml_metal_device_t ggml_metal_device_init("),
    (
        "static bool ggml_metal_supports_mul_mat_op(",
        "const struct ggml_metal_device_props * ggml_metal_device_get_props(",
    ),
)
PLAIN_C_HEADERS = (
    "metal_device.h",
    "ggml-impl.h",
    "ggml-backend-impl.h",
    "ggml-metal-impl.h",
    "ggml-metal-common.h",
)

LANGUAGE = ("-D__METAL__", "-D__METAL_VERSION__=320", "-DGGML_METAL_HAS_BF16=1")
CHECKS = ("alignment", "bounds", "null", "shift-exponent", "integer-divide-by-zero")
KERNEL_OPTIONS = (
    "-std=c++17",
    "-O2",
    "-g1",
    "-gdwarf-4",  # with this version addr2line finds the lines of the preprocessor's markers
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # kernels access memory as several types
    "-fwrapv",
    "-fsingle-precision-constant",  # MSL has no double
    "-fno-threadsafe-statics",
    "-fno-exceptions",
    "-march=native",
    "-Werror=vla",
    "-fsanitize=thread",  # calls the device at each memory access: device/memory.cpp
    "--param=tsan-instrument-func-entry-exit=0",
    f"-fsanitize={','.join(CHECKS)}",
    f"-fno-sanitize-recover={','.join(CHECKS)}",
)
# Kernel files of ggml-metal -> checks that they do not pass, although they work on Apple's GPUs: vectors are read at
# any element, and words of quantized blocks at even addresses; remainders by sizes of operands that are not there are
# computed and not used.
UNCHECKED = {
    "fa_aux": ("alignment",),
    "fa_f16": ("alignment",),
    "fa_f32": ("alignment",),
    "fa_q8_0": ("alignment",),
    "mul_mm": ("alignment",),
    "mul_mv": ("alignment",),
    "norm": ("alignment", "integer-divide-by-zero"),
    "quantize": ("alignment",),
    "softmax": ("integer-divide-by-zero",),
    "ssm": ("alignment",),
}
# Those that read rows after the end of a tensor and do not use them.
READ_OUTSIDE = ("mul_mv",)
# Those that zero more threadgroup memory than the host reserves.
OVERRUN = ("fa_vec_",)
# Those in which a lane overwrites what the others of its simdgroup read, without a barrier: correct only because lanes
# run in step.
IN_STEP = ("fa_vec_",)
# Those that rely on a barrier without mem_threadgroup between reads and later writes of threadgroup memory.
BARRIER_ORDERS = ("softmax",)
FLAGS = {
    "outside": READ_OUTSIDE,
    "overrun": OVERRUN,
    "in-step": IN_STEP,
    "barrier-orders": BARRIER_ORDERS,
}
DEVICE_OPTIONS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror"),
    *("-flto", "-fno-semantic-interposition"),  # the check of each access is called from every kernel
)
# Upstream's code: its warnings are its own. ggml-metal.cpp does not include <memory>.
HOST_OPTIONS = ("-std=c++17", "-O0", "-g1", "-fPIC", "-w", "-include", "memory")
DEFINITIONS = ("-DGGML_BACKEND_DL", "-DGGML_BACKEND_BUILD", "-DGGML_BACKEND_SHARED", "-DGGML_SHARED")


class CompileError(Exception):
    """The compiler's output."""


def compile_device(folder: Path, kernels: Iterable[Path], *, include: Sequence[Path] = ()) -> Path:
    """Build the device in `folder` with the kernels of .metal files; return its library.

    include: more folders for #include "…" of the kernels. Raises `CompileError`, `RewriteError`.
    """
    folder = folder.resolve()
    (folder / "kernels").mkdir(parents=True, exist_ok=True)
    sources = sorted(DEVICE.glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        listed = pool.map(lambda source: _rewrite(source, folder / "kernels", include), kernels)
        objects = list(
            pool.map(lambda source: _compile(source, [*DEVICE_OPTIONS, *HEADERS], folder), sources)
        )
        (folder / "kernels" / "kernels").write_text("".join(listed), encoding="utf-8")
    library = _link(objects, folder / "libmetal-emulator.so", ["-ldl"])
    _write_script(folder / "kernels" / "compile", library)
    return library


def compile_backend(ggml: Path, folder: Path, *, link: Sequence[str], kernels: Iterable[Path] = ()) -> Path:
    """Build the device and the backend of the tree `ggml` in `folder`; return the backend's library.

    link: options of the linker that find ggml's libraries. kernels: more .metal files than ggml-metal's. Raises
    `CompileError`, `RewriteError`.
    """
    metal = ggml / "src" / "ggml-metal"
    objective_c = (metal / "ggml-metal-device.m").read_text(encoding="utf-8")
    sources = [metal / "kernels" / f"{name}.metal" for name in libraries(objective_c)]
    device = compile_device(folder, [*sources, *kernels], include=[metal / "kernels", metal, ggml / "src"])
    folder = device.parent
    plain_c = folder / "plain.c"
    plain_c.write_text(_plain_c(objective_c), encoding="utf-8")
    include = [f"-I{OURS}", f"-I{DEVICE}", *HEADERS]
    for path in (ggml / "include", ggml / "src", metal):
        include += ["-isystem", str(path)]
    ours = [*sorted(OURS.glob("*.cpp")), *sorted((metal / "kimi").glob("*.cpp"))]
    commands: dict[Path, Sequence[str]] = dict.fromkeys(ours, DEVICE_OPTIONS)
    commands |= {metal / name: HOST_OPTIONS for name in HOST}
    commands |= {plain_c: ("-x", "c", "-O0", "-g1", "-fPIC", "-w")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(
                lambda source: _compile(source, [*commands[source], *DEFINITIONS, *include], folder), commands
            )
        )
    return _link(objects, folder / "libggml-metal-emulated.so", [str(device), *link])


def _link(objects: Sequence[Path], library: Path, link: Sequence[str]) -> Path:
    options = [
        "-shared",
        "-pthread",
        "-O2",
        "-flto",
        "-fno-semantic-interposition",
        "-Wl,-z,defs",
        f"-Wl,-soname,{library.name}",
        "-Wl,-rpath,$ORIGIN",
    ]
    _once([_compiler(), *options, *map(str, objects), *link], library)
    return library


def libraries(objective_c: str) -> list[str]:
    """The names of ggml-metal's kernel files: its macro GGML_METAL_LIBS."""
    names = re.findall(r"^\s*X\(\w+,\s*(\w+)\)", objective_c, re.MULTILINE)
    if not names:
        raise CompileError("ggml-metal-device.m has no GGML_METAL_LIBS")
    return names


def _plain_c(objective_c: str) -> str:
    ours = re.findall(r'^#(?:import|include) "(kimi/.*)"$', objective_c, re.MULTILINE)
    parts = [f'#include "{name}"' for name in (*PLAIN_C_HEADERS, *ours)]
    for begin, end in PLAIN_C:
        first, last = objective_c.find(f"\n{begin}"), objective_c.find(f"\n{end}")
        if not 0 <= first < last:
            raise CompileError(f"ggml-metal-device.m has no '{begin}' before '{end}'")
        parts.append(objective_c[first:last])
    parts.append(
        "enum ggml_metal_device_id metal_emulator_device_id(const char * name) {\n"
        "    return ggml_metal_device_id_parse(name);\n}\n"
        "bool metal_emulator_log_missing(const char * library, const char * error) {\n"
        "    int kind = 0;\n"
        "    while (kind < GGML_METAL_LIB_COUNT && strcmp(k_lib_names[kind], library) != 0) {\n"
        "        kind++;\n"
        "    }\n"
        "    GGML_ASSERT(kind < GGML_METAL_LIB_COUNT);\n"
        "    return ggml_metal_library_log_missing(kind, error);\n}\n"
    )
    return "\n".join(parts)


def preprocess(source: Path, include: Sequence[Path]) -> str:
    """A .metal file after the preprocessor. Raises `CompileError`."""
    options = ["-std=c++17", "-E", "-x", "c++", "-nostdinc", "-w", f"-I{STUBS}", f"-I{source.parent}"]
    options += [f"-I{each}" for each in include]
    return _run([_compiler(), *options, *LANGUAGE, str(source)])


def _rewrite(source: Path, folder: Path, include: Sequence[Path]) -> str:
    """Write the C++ of a .metal file; return the lines of its kernels for the list."""
    text, kernels = rewrite(preprocess(source, include), str(source))
    target = folder / f"{source.stem}.metal.cpp"
    target.write_text(f'#include "metal_emulator/kernel_file.h"\n{text}', encoding="utf-8")
    unchecked = ",".join(UNCHECKED.get(source.stem, ()))
    flags = " ".join(flag for flag, stems in FLAGS.items() if source.stem.startswith(stems))
    fields = ((k.name, target.name, k.function, ", ".join(k.parameters), unchecked, flags) for k in kernels)
    return "".join("\t".join(each) + "\n" for each in fields)


def _compile(source: Path, options: Sequence[str], folder: Path) -> Path:
    target = folder / f"{source.name}.o"
    _once([_compiler(), *options, "-c", str(source)], target)
    return target


def _write_script(script: Path, library: Path) -> None:
    """`compile NAME SOURCE [CHECKS]`: NAME.cpp, which includes SOURCE, to NAME.so, without these checks.

    The compiler's output is in NAME.log. Objects are in the folder of compile_once: equal kernels are compiled once.
    """
    options = shlex.join([*HEADERS, *KERNEL_OPTIONS])
    digest = environment_digest(_compiler(), [INCLUDE, COMMON])
    script.write_text(
        f"""#!/bin/sh
cd "$(dirname "$0")" || exit 1
kept=${{{FOLDER}:-.}}
mkdir -p "$kept"
unchecked=${{3:+"-fno-sanitize=$3"}}
case "$3" in *alignment*) unchecked="$unchecked -DMETAL_EMULATOR_ANY_ADDRESS" ;; esac
paths='s|^\\(# [0-9]* "\\)/.*/|\1|' # of line markers
digest=$( (echo {digest} {shlex.quote(options)} "$3" && cat "$1.cpp" && sed "$paths" "$2") | sha256sum)
object=$kept/${{digest%% *}}.o
{{
    {{ touch -c "$object" && [ -e "$object" ]; }} || {{
        {_compiler()} {options} $unchecked -c "$1.cpp" -o "$object.$$" && mv "$object.$$" "$object"
    }} &&
    {_compiler()} -shared "$object" -o "$1.$$.so" {shlex.quote(str(library))} '-Wl,-rpath,$ORIGIN/..' &&
    mv "$1.$$.so" "$1.so"
}} > "$1.log" 2>&1
""",
        encoding="utf-8",
    )
    script.chmod(0o755)


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _once(command: Sequence[str], target: Path) -> None:
    try:
        compile_once(command, target)
    except subprocess.CalledProcessError as error:
        raise CompileError(f"$ {shlex.join(command)}\n{error.stderr}") from None


def _run(command: Sequence[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise CompileError(f"$ {shlex.join(command)}\n{ended.stderr}")
    return ended.stdout
