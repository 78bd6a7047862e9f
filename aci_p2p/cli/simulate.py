"""`aci-p2p simulate`: a whole market in one process, from one seed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from aci_p2p.cli.common import json_option, print_json
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.pricing import format_amount
from aci_p2p.testing.simulator import STRATEGIES, Fault, InvariantBroken, Result, Scenario, Simulation, page, summarise

_EPILOG: Final = """\b
Examples:
  aci-p2p simulate                                       a hundred nodes for an hour
  aci-p2p simulate --nodes 1000 --hours 1 --seed 7       a thousand
  aci-p2p simulate --faults all --adversaries 0.2        a bad day, and a fifth of the nodes cheat
  aci-p2p simulate --strategy "wrong model" --html a.html
"""


class SimulationFailed(AciError):
    """Something happened in a simulated world that must never happen."""

    code = "simulation_failed"


@click.command("simulate", short_help="Simulate a market of thousands of nodes.", epilog=_EPILOG)
@click.option("--nodes", type=click.IntRange(2, 100_000), default=100, show_default=True, help="Nodes of the world.")
@click.option("--hours", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="How long.")
@click.option("--seed", type=int, default=1, show_default=True, help="Fixes everything that is left to chance.")
@click.option("--adversaries", type=click.FloatRange(0, 0.9), default=0.0, show_default=True, help="Share that cheats.")
@click.option("--strategy", "strategies", multiple=True, type=click.Choice(list(STRATEGIES)), help="How they cheat.")
@click.option(
    "--faults",
    multiple=True,
    type=click.Choice(["all", *(fault.value for fault in Fault)]),
    help="What goes wrong; may be given several times.",
)
@click.option("--models", type=click.IntRange(0), default=0, show_default="nodes / 25", help="Models that are served.")
@click.option("--interval", type=float, default=300.0, show_default=True, help="Seconds between a consumer's jobs.")
@click.option("--html", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with pictures.")
@json_option
def command(
    nodes: int,
    hours: float,
    seed: int,
    adversaries: float,
    strategies: tuple[str, ...],
    faults: tuple[str, ...],
    models: int,
    interval: float,
    picture: Path | None,
    as_json: bool,  # noqa: FBT001 - click passes flags so
) -> None:
    """Simulate a market: the protocol's own state machines, an imagined network, any faults and attackers.

    The same seed gives the same world to the last message; the trace at the end proves it.
    """
    chosen = frozenset(Fault) if "all" in faults else frozenset(Fault(name) for name in faults)
    scenario = Scenario(
        seed=seed, nodes=nodes, hours=hours, adversaries=adversaries, strategies=strategies, models=models,
        job_interval_s=interval, faults=chosen,
    )  # fmt: skip
    simulation = Simulation(scenario)
    try:
        result = _run(simulation, quiet=as_json)
    except InvariantBroken as broken:
        raise SimulationFailed(str(broken), hint=f"see it again with: {replay(scenario)}") from broken
    if picture:
        try:
            picture.write_text(page(result), encoding="utf-8")
        except OSError as error:
            msg = f"cannot write {picture}: {error.strerror}"
            raise LocalError(msg) from error
    if as_json:
        print_json({**asdict(summarise(result)), "faults": result.fired, "refused": result.refused,
                    "events": result.events, "checks": result.checks, "trace": result.trace})  # fmt: skip
        return
    _show(simulation, result)
    click.echo(f"trace {result.trace}")


def replay(scenario: Scenario) -> str:
    """The command that runs a scenario again."""
    parts = [f"aci-p2p simulate --nodes {scenario.nodes} --hours {scenario.hours:g} --seed {scenario.seed}"]
    if scenario.adversaries:
        parts.append(f"--adversaries {scenario.adversaries:g}")
    parts += [f"--strategy {name!r}" for name in scenario.strategies]
    parts += [f"--faults {fault.value!r}" for fault in Fault if fault in scenario.faults]
    default = Scenario()
    if scenario.models != default.models:
        parts.append(f"--models {scenario.models}")
    if scenario.job_interval_s != default.job_interval_s:
        parts.append(f"--interval {scenario.job_interval_s:g}")
    return " ".join(parts)


def _run(simulation: Simulation, *, quiet: bool) -> Result:
    console = Console(stderr=True)
    columns = (TextColumn("simulating"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("simulating", total=1.0)
        return simulation.run(lambda share: progress.update(task, completed=share))


def _show(simulation: Simulation, result: Result) -> None:
    console = Console(highlight=False)
    summary = summarise(result)
    table = Table(title="jobs of honest consumers", title_justify="left", show_header=False)
    table.add_row("answered", f"{summary.answered} of {summary.jobs}")
    for failure, count in summary.failures.items():
        table.add_row(f"failed: {failure.replace('_', ' ')}", str(count))
    table.add_row("answers that the model does not give", str(summary.wrong))
    table.add_row("offer to first token", "{} ms (p99 {} ms)".format(*summary.first_token_ms))
    table.add_row("offer to receipt", "{} ms (p99 {} ms)".format(*summary.duration_ms))
    table.add_row("signed for", format_amount(summary.spent))
    console.print(table)
    if result.fired:
        faults = Table("fault", "struck", title="what went wrong", title_justify="left")
        for fault, count in result.fired.items():
            faults.add_row(fault, str(count))
        console.print(faults)
    if simulation.attackers:
        cheats = Table("strategy", "nodes", "goal", "gained", title="who cheated", title_justify="left")
        for gain in simulation.gains():
            cheats.add_row(gain.strategy, str(gain.nodes), gain.goal, format_amount(gain.gained))
        console.print(cheats)
    console.print(f"{result.events} events, {result.checks} checks of invariants, none broken")
