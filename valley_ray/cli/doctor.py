"""`valley-ray doctor`: looks at this machine and environment, and says for each trouble what to do about it."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from valley_ray.cli.finding import Finding

FAILED = 1
_NAME_WIDTH = 16


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Check versions, decoders, GPU, ports, Ray's tokens and disks."
    doctor = commands.add_parser(
        "doctor",
        help=about,
        description=f"{about} One line each: OK, WARN or FAIL, with what to do. Exit code 1 where something fails. "
        "Starts no Ray.",
        allow_abbrev=False,
    )
    doctor.set_defaults(run=_run)
    doctor.add_argument("--json", action="store_true", help="print one JSON object")


def _run(options: argparse.Namespace) -> int:
    findings = []
    for finding in find():
        findings.append(finding)
        if not options.json:
            _print_line(finding)
    has_failed = any(finding.level == "FAIL" for finding in findings)
    if options.json:
        print(json.dumps({"ok": not has_failed, "findings": [asdict(one) for one in findings]}, ensure_ascii=False))
    return FAILED if has_failed else 0


def find() -> Iterator[Finding]:
    """All checks, the quick ones first."""
    from valley_ray.cli import check_machine, check_software

    yield from check_software.check_python()
    yield from check_software.check_packages()
    yield from check_machine.check_ports()
    yield from check_machine.check_ray_auth()
    yield from check_machine.check_disks()
    yield from check_machine.check_shared_memory()
    yield from check_software.check_decoders()
    yield from check_software.check_torch()
    yield from check_software.check_deepspeed()


def _print_line(finding: Finding) -> None:
    print(f"{finding.level:<5} {finding.name:<{_NAME_WIDTH}} {finding.text}", flush=True)
    if finding.fix is not None:
        print(f"{'':<{6 + _NAME_WIDTH}} → {finding.fix}", flush=True)
