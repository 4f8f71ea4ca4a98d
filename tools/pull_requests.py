"""Writes the fixes as pull requests to llama.cpp, or proves their tests.

Input: the series and the tests next to its fixes. Output: a folder with a patch and notes for each fix; or a line for
each test, which must fail on the pinned llama.cpp and pass with the fix.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kimi_gguf.engine.builds import upstream_source
from kimi_gguf.patches.errors import KimiError
from kimi_gguf.patches.export import write_folder
from kimi_gguf.patches.series import load_series
from kimi_gguf.tools.pull_request import NO_TEST, folder_files, load_pull_requests, select
from kimi_gguf.tools.upstream_tests import prove

EXAMPLES = """\
examples:
  tools/pull-requests out/prs              write NNNN-name.patch and NNNN-name.notes.md for each fix
  git -C llama.cpp am out/prs/0001-*.patch apply one to a checkout of the pinned llama.cpp
  tools/pull-requests --prove              compile and run all tests, without and with their fix (an hour on 2 cores)
  tools/pull-requests --prove 1 7          only those of the fixes 0001 and 0007

exit status: 0; 1 if a test proves nothing, or the folder cannot be written; 2 for an invalid command line
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/pull-requests",
        description="Write each fix as a pull request to llama.cpp. docs/upstream.md lists them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prove", action="store_true", help="run the tests instead of writing files")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("out/pull-requests"),
        help="build folder for --prove (default: %(default)s)",
    )
    parser.add_argument(
        "words", nargs="*", metavar="OUT|NUMBER", help="the folder; with --prove, numbers of fixes"
    )
    parsed = parser.parse_args(arguments)
    if not parsed.prove and len(parsed.words) != 1:
        parser.error("give one folder, or --prove")
    try:
        requests = load_pull_requests(load_series())
        if not parsed.prove:
            for path in write_folder(Path(parsed.words[0]), folder_files(requests)):
                print(path)
            return 0
        source = upstream_source() / "llama.cpp"
        failed = False
        for request in select(requests, parsed.words):
            if request.test is None:
                print(f"{request.name}: {NO_TEST}")
                continue
            problem = prove(request, source, parsed.work.absolute())
            failed |= problem is not None
            print(f"{request.name}: {problem or 'fails without the fix, passes with it'}", flush=True)
    except KimiError as error:
        print(f"pull-requests: error: {error}", file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
