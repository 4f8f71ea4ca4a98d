"""The emulator's rewriter: the C++ that it makes of CUDA's own syntax, and the source that it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulators.cuda import RewriteError
from emulators.cuda.ptx import translate
from emulators.cuda.rewrite import rewrite, rewrite_tree

HERE = "cuda_emulator::Place::here()"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("f<<<1, 32>>>(x);", 'cuda_emulator::configure("f", f, 1, 32)(x);'),
        (
            "return ns::f<64, (A > B)> <<<dim3(n, m), b.x, sizeof(float) * n, stream>>> (x, y);",
            'return cuda_emulator::configure("ns::f<64,(A>B)>", ns::f<64, (A > B)>, '
            "dim3(n, m), b.x, sizeof(float) * n, stream) (x, y);",
        ),
        (
            "else table.kernels[i + (j)]<<<1, 2>>>(x);",
            'else cuda_emulator::configure("table.kernels[i+(j)]", table.kernels[i + (j)], 1, 2)(x);',
        ),
        (
            "if (a) f<T><<<g, size<std::array<int, 3>>(h)>>>(x);",
            'if (a) cuda_emulator::configure("f<T>", f<T>, g, size<std::array<int, 3>>(h))(x);',
        ),
    ],
)
def test_launches(source: str, wanted: str) -> None:
    assert rewrite(source, "a.cu") == wanted


def shared(name: str, kind: str, alignment: str = "1") -> str:
    return (
        f"[[maybe_unused]] auto & {name} = "
        f'cuda_emulator::shared_variable<{kind}>("{name}", {alignment}, [] {{}})'
    )


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("__shared__ float s[32];", shared("s", "float[32]") + ";"),
        ("static __shared__ int n;", shared("n", "int") + ";"),
        ("__shared__ int n[A > B ? A : B][2];", shared("n", "int[(A > B ? A : B)][2]") + ";"),
        (
            "__shared__ __align__(16) half2 a[N][M + 1], b[1 << 4];",
            shared("a", "half2[N][M + 1]", "16") + "; " + shared("b", "half2[1 << 4]", "16") + ";",
        ),
        (
            "__shared__ alignas(T) std::array<float, 4> s[2];",
            shared("s", "std::array<float, 4>[2]", "T") + ";",
        ),
        ("__shared__ float * p, v[3];", shared("p", "float *") + "; " + shared("v", "float[3]") + ";"),
        (
            "__shared__ __attribute__((aligned(8))) unsigned char c[8];",
            shared("c", "unsigned char[8]", "(8)") + ";",
        ),
        (
            "extern __shared__ float d[];",
            '[[maybe_unused]] auto * const d = cuda_emulator::dynamic_shared<float>("d");',
        ),
        (
            "extern __shared__ __align__(16) char d[][8];",
            '[[maybe_unused]] auto * const d = cuda_emulator::dynamic_shared<char[8]>("d");',
        ),
    ],
)
def test_shared_memory(source: str, wanted: str) -> None:
    assert rewrite(source, "a.cu") == wanted


@pytest.mark.parametrize(
    ("source", "calls"),
    [
        ('asm volatile("cp.async.commit_group;");', f"cuda_emulator::cp_async_commit({HERE});"),
        (
            '__asm__ __volatile__("cp.async.wait_group %0;" :: "n"(N - 1) : "memory");',
            f"cuda_emulator::cp_async_wait({HERE}, (N - 1));",
        ),
        (
            'asm("cp.async.cg.shared.global.L2::128B [%0 + 32], [%1], 16;" :: "r"(to), "l"(ns::from));',
            f"cuda_emulator::cp_async({HERE}, (cuda_emulator::address_of(to) + 32), (ns::from), 16);",
        ),
        (
            'asm("{ cvt.rna.tf32.f32 %0, %1; }\\n" : "=r"(y[0]) : "f"(x));',
            f"cuda_emulator::cvt_tf32({HERE}, cuda_emulator::out((y[0])), cuda_emulator::in((x)));",
        ),
        (
            'asm("cvt.rna.tf32.f32 %0, %2;\\n\\tex2.approx.f32 %1, %3;" : "=r"(a), "=f"(b) : "f"(c), "f"(d));',
            f"cuda_emulator::cvt_tf32({HERE}, cuda_emulator::out((a)), cuda_emulator::in((c))); "
            f"cuda_emulator::unary<cuda_emulator::exp2_flushed>({HERE}, cuda_emulator::out((b)), "
            "cuda_emulator::in((d)));",
        ),
    ],
)
def test_inline_ptx(source: str, calls: str) -> None:
    assert rewrite(source, "a.cu") == f"do {{ {calls} }} while (0);"


@pytest.mark.parametrize(
    "statement",
    [
        "vabsdiff4.u32.u32.u32 %0, %1, %2, %3",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.bf16.f32 {%0}, {%1}, {%2}, {%0}",
        "mma.sync.aligned.m16n8k16.col.row.f32.f16.f16.f32 {%0}, {%1}, {%2}, {%0}",
        "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%0}, [%1]",
        ".reg .pred p",
        "@p st.global.f32 [%0], %1",
        "ex2.approx.f32 %0, %9",
    ],
)
def test_what_is_not_understood_names_itself(statement: str) -> None:
    assert translate(statement + ";", ["a", "b", "c", "d"]) == [
        f'cuda_emulator::unknown_ptx({HERE}, "{statement}")'
    ]


@pytest.mark.parametrize(
    "source",
    [
        "// f<<<1, 2>>>(x); __shared__ int a[3] = 5;",
        '/* asm("x"); */ const char * s = "f<<<1>>>(x) __shared__"; char c = \'"\';',
        'const char * s = R"(asm("x");)";',
        "int __shared__x; x = a << b; y = a >> (b); t<u<v<int>>> w;",
    ],
)
def test_everything_else_stays(source: str) -> None:
    assert rewrite(source, "a.cu") == source


def test_lines_keep_their_numbers() -> None:
    source = """\
f<T,
  2><<<grid,
       block>>>(x);
__shared__ float a[2],
                 b[3];
#define WAIT(n) \\
    asm volatile("cp.async" \\
                 ".wait_group %0;" : : "n"(n))
asm("cp.async.commit_group;"
    // a comment
    );
int last;
"""
    lines = rewrite(source, "a.cu").split("\n")
    assert len(lines) == len(source.split("\n"))
    assert lines[-2] == "int last;"
    assert lines[3].count("shared_variable") == 2
    assert [line.endswith("\\") for line in lines[5:8]] == [True, True, False]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("int a;\n__shared__ float s[2] = {};", "a.cu:2: a __shared__ declaration must be"),
        ("extern __shared__ float s;", "a.cu:1: an extern __shared__ array must be"),
        ('asm("mma" KIND ";" : "=r"(x));', "a.cu:1: the PTX of an asm must be written out as strings"),
        ("\n\nf<<<1, 2;", "a.cu:3: '<<<' without '>>>('"),
        ("(f)<<<1, 2>>>(x);", "a.cu:1: no kernel's name before '<<<'"),
        ('asm("x" : "=r"(y);', "a.cu:1: '(' is never closed"),
    ],
)
def test_refusals_name_the_line(source: str, words: str) -> None:
    with pytest.raises(RewriteError) as refusal:
        rewrite(source, "a.cu")
    assert str(refusal.value).startswith(words)


def test_included_kernels_are_rewritten_once(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n#include "c.cuh"\n#include "d.h"\n#include <e.cuh>\n')
    (tmp_path / "b.cuh").write_text('#pragma once\n#include "c.cuh"\n')
    (tmp_path / "other" / "c.cuh").write_text("#pragma once\nvoid g() { f<<<1, 2>>>(); }\n")
    (tmp_path / "d.h").write_text("f<<<1, 2>>>();\n")
    (tmp_path / "out").mkdir()
    main = rewrite_tree(tmp_path / "a.cu", tmp_path / "out", [tmp_path / "other"])
    assert len(list((tmp_path / "out").iterdir())) == 3
    lines = main.read_text().splitlines()
    assert lines[0] == f'#line 1 "{tmp_path / "a.cu"}"'
    inner = Path(lines[1].split('"')[1]).read_text()
    assert lines[2] in inner
    assert "configure" in Path(lines[2].split('"')[1]).read_text()
    assert lines[3:] == [f'#include "{tmp_path / "d.h"}"', "#include <e.cuh>"]
