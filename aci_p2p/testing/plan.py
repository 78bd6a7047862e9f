"""Scenario files: which consumer asks what and when. The same file runs in memory and over real sockets."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import trio

from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.testing.swarm import Swarm
from aci_p2p.testing.swarm_node import DEFAULT_MAX_TOKENS

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One question."""

    prompt: str
    """What is asked."""
    consumer: int = 0
    """Who asks: index of a consumer."""
    at_s: float = 0.0
    """When, seconds from the beginning."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    """Longest answer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A scenario: the swarm that it needs, and what happens in it."""

    jobs: tuple[PlannedJob, ...]
    """What is asked."""
    providers: int = 3
    """Providers, the first of which is the cheapest."""
    consumers: int = 1
    """Consumers."""
    seed: int = 1
    """For keys, nonces and choices."""


@dataclass(frozen=True, slots=True)
class PlannedOutcome:
    """What came of one question."""

    provider: str
    """Name of the node that answered; empty when none did."""
    text: str
    """Its answer."""
    price: int
    """What it cost, base units."""
    error: str
    """Code of the error that ended it otherwise."""


def read_plan(path: Path) -> Plan:
    """Read a scenario file: TOML, fields as those of Plan, and a table `[[job]]` for each job. Raises LocalError."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        jobs = cast("list[dict[str, Any]]", table.pop("job", []))
        plan = _build(Plan, {**table, "jobs": tuple(_build(PlannedJob, job) for job in jobs)})
    except (OSError, ValueError, TypeError) as error:
        msg = f"{path} is no scenario: {error}"
        raise LocalError(msg) from error
    for job in plan.jobs:
        if not 0 <= job.consumer < plan.consumers:
            msg = f"{path} is no scenario: there is no consumer {job.consumer}"
            raise LocalError(msg)
    return plan


def _build(kind: type[T], values: dict[str, Any]) -> T:
    unknown = values.keys() - {field.name for field in fields(cast("Any", kind))}
    if unknown:
        msg = f"unknown: {', '.join(sorted(unknown))}"
        raise ValueError(msg)
    return kind(**values)


async def run_plan(swarm: Swarm, plan: Plan) -> list[PlannedOutcome]:
    """Do what a scenario plans on a swarm of its size; what came of each job, in their order."""
    outcomes: list[PlannedOutcome | None] = [None] * len(plan.jobs)
    names = {provider.node_id: provider.name for provider in swarm.providers}
    began = trio.current_time()

    async def ask(index: int, job: PlannedJob) -> None:
        await trio.sleep_until(began + job.at_s)
        try:
            answer = await swarm.consumers[job.consumer].ask(job.prompt, max_tokens=job.max_tokens)
        except AciError as error:
            outcomes[index] = PlannedOutcome("", "", 0, error.code)
        else:
            provider = names[answer.provider]
            outcomes[index] = PlannedOutcome(provider, answer.text, answer.receipt.body.price, "")

    async with trio.open_nursery() as nursery:
        for index, job in enumerate(plan.jobs):
            nursery.start_soon(ask, index, job)
    return [outcome for outcome in outcomes if outcome is not None]
