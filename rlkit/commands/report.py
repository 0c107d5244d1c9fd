"""`rlkit report`: write a run's report again, or print its numbers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run folder")
    parser.add_argument("--json", action="store_true", help="the numbers, and no page")


def run(options: argparse.Namespace) -> int:
    from rlkit.report import summary as report

    if options.json:
        print(json.dumps(report.summary(options.folder), indent=2))
        return 0
    page = report.write(options.folder)
    print(report.sentence(report.summary(options.folder)))
    print(f"report: {page}")
    return 0
