"""Running all checks: side by side where they do not need each other, each for a limited time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias

import trio

from aci_p2p.doctor.findings import Finding, problem, problem_of, warning
from aci_p2p.doctor.machine import (
    check_chain,
    check_compute,
    check_configuration,
    check_disk,
    check_files,
    check_key,
    check_models,
    check_node,
)
from aci_p2p.doctor.reaching import check_bootstrap, check_names, check_ports, find_standing, open_probe
from aci_p2p.doctor.standing import check_clock, check_hole_punching, check_reachability, check_relay
from aci_p2p.doctor.subject import Subject
from aci_p2p.protocol.errors import AciError

CHECK_S: Final = 40.0
"""Seconds for one check; the longest waits for peers to dial back."""
ORDER: Final = (
    "node", "configuration", "key", "clock", "ports", "DNS", "bootstrap", "reachability", "relay", "hole punching",
    "chain", "models", "disk", "files", "compute",
)  # fmt: skip
"""All checks, as they are shown: what the later ones need comes first."""

Check: TypeAlias = Callable[[], Awaitable[list[Finding]]]
Report: TypeAlias = Callable[[str, list[Finding]], None]
"""Told once for each check of ORDER, in whatever order they end."""


async def diagnose(subject: Subject, report: Report) -> list[Finding]:
    """Run all checks; what they found, in their order."""
    found: dict[str, list[Finding]] = {}

    async def run(name: str, check: Check) -> None:
        found[name] = await _limited(name, check)
        report(name, found[name])

    async with trio.open_nursery() as nursery:
        for name, check in (
            ("node", check_node),
            ("configuration", check_configuration),
            ("key", check_key),
            ("DNS", check_names),
            ("chain", check_chain),
            ("models", check_models),
            ("disk", check_disk),
            ("files", check_files),
            ("compute", check_compute),
        ):
            nursery.start_soon(run, name, partial(check, subject))
        try:
            # The inner nursery ends first: its checks use the probe.
            async with open_probe(subject) as probe, trio.open_nursery() as probing:
                await run("ports", partial(check_ports, subject, probe))
                await run("bootstrap", partial(check_bootstrap, subject, probe))
                probing.start_soon(run, "clock", partial(check_clock, subject, probe))
                standing = await find_standing(subject, probe)
                await run("reachability", partial(check_reachability, subject, standing))
                await run("relay", partial(check_relay, subject, standing))
                await run("hole punching", partial(check_hole_punching, subject, standing))
        except AciError as error:
            name = next(name for name in ORDER if name not in found)
            found[name] = [problem_of(name, error, "see the checks above")]
    return [finding for name in ORDER for finding in found.get(name, ())]


async def _limited(name: str, check: Check) -> list[Finding]:
    """What a check finds, whatever happens in it."""
    try:
        with trio.fail_after(CHECK_S):
            return await check()
    except trio.TooSlowError:
        return [warning(name, f"it took over {CHECK_S:g} s", "run the doctor again when the machine is less busy")]
    except AciError as error:
        return [problem_of(name, error, "run the doctor again")]
    except OSError as error:
        return [problem(name, f"it cannot be checked: {error}", "run the doctor as the user that runs the node")]
