"""No command, operator, patch or gate is without a test. The names come from the code: a new one fails here until it
has a test in the default tier, or is listed with the reason why only `scripts/test --ci` can run its test.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

from kimi_gguf.patches.series import load_series
from kimi_gguf.scripts import kimi_llama
from kimi_gguf.tools import testing_page
from kimi_gguf.validate import gates

TESTS = Path(__file__).parent
LATER = ("devices", "platforms", "long")  # folders of the other tiers

# Command -> a test of what it does.
COMMANDS = {
    "convert-kimi": "convert/test_convert_values.py",
    "validate-kimi": "validate/test_validate_cli.py",
    "build": "engine/test_engine_real.py::test_building_again_makes_nothing",
    "doctor": "engine/test_engine_real.py::test_doctor_finds_all_well",
    "path": "engine/test_engine_cli.py::test_path_prints_the_folder_with_bin_and_lib",
    "use": "engine/test_engine_builds.py::test_each_way_names_a_build_and_the_nearer_one_wins",
    "export-patches": "engine/test_engine_cli.py::test_export_patches_writes_the_series",
    "bench": "bench/test_bench_cli.py::test_a_tiny_grid_from_end_to_end",
    "run": "engine/test_engine_cli.py::test_a_tool_gets_the_model_the_defaults_and_the_callers_arguments",
    "chat": "engine/test_engine_cli.py::test_prompts_of_one_user_are_evaluated_in_long_ubatches",
    "serve": "serving/test_mtp_drafts.py::test_the_command_uses_the_mtp_layer",
    "imatrix": "engine/test_engine_outputs.py::test_importances_and_splits_of_the_demo",
    "perplexity": "engine/test_engine_outputs.py::test_a_command_without_an_output_gets_its_words_as_they_are",
    "tokenize": "engine/test_engine_outputs.py::test_a_command_without_an_output_gets_its_words_as_they_are",
    "split": "engine/test_engine_outputs.py::test_importances_and_splits_of_the_demo",
    "quantize": "engine/test_engine_outputs.py::test_importances_and_splits_of_the_demo",
    "worker": "engine/test_engine_cli.py::test_a_worker_that_cannot_listen_says_so",
}
# Patches that need an emulated GPU, or another processor than this one.
CI_ONLY = {
    "0023": "a build with AMX",
    "0025": "a build for all processors",
    "0046": "CUDA",
    "0058": "Metal",
    "0061": "a device to be verified",
    "0063": "CUDA",
    "0069": "CUDA",
}


def functions(name: str) -> dict[str, ast.FunctionDef]:
    """The tests of a file that the default tier contains, without those marked as full."""
    path = TESTS / name
    assert path.is_file() and path.parent.name not in LATER, f"{name}: expected a file of the default tier"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    return {
        node.name: node
        for node in found
        if "mark.full" not in " ".join(ast.unparse(mark) for mark in node.decorator_list if not _lists(mark))
    }


def _lists(mark: ast.expr) -> bool:
    """A mark of the parameters may be that of some cases only."""
    return isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("parametrize")


def test_every_command_has_a_test() -> None:
    (subcommands,) = (
        action.choices
        for action in kimi_llama._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    assert set(COMMANDS) == {"convert-kimi", "validate-kimi", *subcommands}
    for command, where in COMMANDS.items():
        name, _, function = where.partition("::")
        tests = functions(name)
        assert tests if not function else function in tests, f"{command}: no test {where}"
        words = (
            {node.value for node in ast.walk(tests[function]) if isinstance(node, ast.Constant)}
            if function
            else ()
        )
        assert not function or command in words, f"{command}: {where} does not run it"


def test_every_patch_and_every_operator_has_a_test() -> None:
    """The header of a patch names its test; a folder of operators has those of the patches that bring its sources."""
    series = load_series()
    later = {}
    for patch in series.patches:
        test = patch.field("Test") or ""
        if Path(test).parent.name in LATER:
            later[patch.name[:4]] = test
        else:
            assert functions(test.removeprefix("tests/")), f"{patch.name}: {test} has no test"
    assert later.keys() == CI_ONLY.keys(), "patches whose tests are not in the default tier"
    assert not [test for test in later.values() if Path(test).parent.name == "long"]
    tested = {overlay.source.parts[0] for patch in series.patches for overlay in patch.overlays}
    operators = Path(kimi_llama.__file__).resolve().parents[1] / "ggml_ops"
    assert tested == {
        path.name for path in operators.iterdir() if path.is_dir() and path.name != "__pycache__"
    }


def test_the_page_on_tests_has_the_recorded_durations() -> None:
    text = testing_page.PAGE.read_text(encoding="utf-8")
    assert testing_page.page(text) == text, "run: tools/run testing_page"


def test_every_gate_has_a_test() -> None:
    """Limits of a summary are cases of a test, made from the table of limits; the others are asserted by title."""
    source = ast.parse(Path(gates.__file__).read_text(encoding="utf-8"))
    titles = {title for _, title in gates.NO_WORSE}
    titles |= {limit.title for limits in gates.LIMITS.values() for limit in limits if not limit.over}
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("GateResult", "result"):
            titles |= {str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant)}
    assert len(titles) >= 7
    text = (TESTS / "validate" / "test_validate_gates.py").read_text(encoding="utf-8")
    assert not [title for title in sorted(titles) if f'"{title}"' not in text]
