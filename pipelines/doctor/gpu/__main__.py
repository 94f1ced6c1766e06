"""The selftest of GPUs without the command line: python -m pipelines.doctor.gpu [--ranks N] [--json]"""

from __future__ import annotations

import argparse
import json
import os
import sys

from pipelines.doctor.check import answer
from pipelines.doctor.gpu import ranks_of_machine, selftest
from pipelines.doctor.gpu.facts import report_section
from pipelines.environment.credentials import redact
from pipelines.presentation import markdown
from pipelines.presentation.lines import check_line


def main() -> int:
    """Run the selftest, and return 0 where all is well, 1 where something is not."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.doctor.gpu", description=selftest.__doc__)
    parser.add_argument("--ranks", type=int, help="number of processes; default: the GPUs, or 2 on a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    asked = parser.parse_args()
    try:
        ranks = ranks_of_machine(asked.ranks)
    except ValueError as error:
        parser.error(str(error))
    out = sys.stderr if asked.json else sys.stdout
    checks = []
    for check in selftest(ranks):
        checks.append(check)
        print(redact(check_line(check.status, check.name, check.found, check.fix)), file=out, flush=True)
    report = markdown.section(report_section(os.environ))
    print(f"\n{report}", file=out)
    found = answer(checks)
    if asked.json:
        print(json.dumps(found | {"report": report}))
    return int(not found["ok"])


if __name__ == "__main__":
    sys.exit(main())
