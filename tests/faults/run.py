"""Show that the tests catch every seeded fault: `python -m tests.faults.run [NAME ...]`.

The faults of `seeded.py` are written one at a time into a copy of this checkout, where their tests have to fail.
Without any fault they have to pass there. The exit status is 1 where a fault is missed, or a test fails without one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.faults.seeded import FAULTS, Fault

ROOT = Path(__file__).parents[2]
TESTS_FAILED = 1
"""Exit code of pytest where tests were run and some have failed; others are those of usage and collection."""
IMPORTED = "import ddpm, pipelines, tests; print(ddpm.__file__, pipelines.__file__, tests.__file__, sep='\\n')"


def copy_checkout(target: Path) -> None:
    """Copy every file of this checkout that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if (ROOT / name).is_file():  # a tracked file may have been deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def check_imports(copy: Path, environ: dict[str, str]) -> None:
    """Raise unless Python imports the copy from any folder, although this checkout may be installed."""
    command = [sys.executable, "-c", IMPORTED]
    found = subprocess.run(command, cwd=copy.parent, env=environ, check=True, capture_output=True, text=True).stdout
    assert all(Path(line).is_relative_to(copy) for line in found.splitlines()), f"another checkout is imported: {found}"


def run_tests(copy: Path, environ: dict[str, str], tests: Iterable[str]) -> tuple[int, str]:
    """Run tests in the copy, and return pytest's exit code and output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]
    done = subprocess.run(command, cwd=copy, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def catching_test(copy: Path, environ: dict[str, str], fault: Fault) -> str | None:
    """Return the test that fails with a fault; None where the fault is missed. The copy is as before afterwards."""
    path = copy / fault.path
    shutil.copy2(path, kept := copy / "without-fault")
    path.write_text(fault.apply(path.read_text()))
    try:
        code, output = run_tests(copy, environ, fault.tests)
    finally:
        kept.replace(path)
    # An error while a test is collected or set up is none of its own findings.
    failed = re.search(r"^FAILED (\S+::.+?)(?: - .*)?$", output, re.MULTILINE)
    return failed[1] if code == TESTS_FAILED and failed else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named faults, or all of them, print a line for each, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description="Seed faults that tests catch.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="fault to seed; all of them where none is named")
    names = parser.parse_args(arguments).names
    if unknown := set(names) - {fault.name for fault in FAULTS}:
        parser.error(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(f.name for f in FAULTS)}")
    chosen = [fault for fault in FAULTS if not names or fault.name in names]
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        copy = Path(scratch).resolve() / "copy"
        copy_checkout(copy)
        environ = {**os.environ, "PYTHONPATH": str(copy)}
        check_imports(copy, environ)
        began = time.monotonic()
        code, output = run_tests(copy, environ, dict.fromkeys(test for fault in chosen for test in fault.tests))
        if code != 0:
            print(f"{output}\nwithout any fault the tests above fail")
            return 1
        print(f"without a fault all tests pass, {time.monotonic() - began:.1f} s", flush=True)
        environ["PYTHONDONTWRITEBYTECODE"] = "1"  # compiled code of a fault must not outlive it
        missed = 0
        for fault in chosen:
            began = time.monotonic()
            test = catching_test(copy, environ, fault)
            missed += test is None
            said = f"caught  {fault.name}: by {test}" if test else f"MISSED  {fault.name}: {fault.promise}"
            print(f"{said}, {time.monotonic() - began:.1f} s", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults are caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
