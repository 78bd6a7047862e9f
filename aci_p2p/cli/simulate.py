"""`aci-p2p simulate`: a whole market in one process, from one seed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

import click
import trio
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.texts import print_table
from aci_p2p.protocol.errors import AciError, LocalError, ResourceError
from aci_p2p.protocol.pricing import format_amount
from aci_p2p.testing.rehearsal import open_scenario, run_scenario
from aci_p2p.testing.running import run
from aci_p2p.testing.simulator import (
    STRATEGIES,
    Fault,
    InvariantBroken,
    PlannedOutcome,
    Result,
    Scenario,
    Simulation,
    dump_scenario,
    load_scenario,
    page,
    random_scenario,
    summarise,
    trial,
)
from aci_p2p.testing.simulator import measure as measure_strategy
from aci_p2p.testing.simulator.scenario import MAX_HOURS, MAX_NODES

KEPT_SEEDS: Final = Path("tests/seeds")
"""Where scenarios that failed are kept, if it exists where the command runs."""
_USUAL: Final = Scenario()
_WORLD: Final = ("nodes", "hours", "adversaries", "strategies", "faults", "models", "interval")
"""Parameters that describe a world, and so make no sense beside another description."""
_FIGURES: Final = {"struck", "nodes", "paid", "unearned", "tokens", "price", "profit", "spoiled jobs"}
"""Columns of tables that hold figures."""
_SHOWN: Final = 40
"""Characters of a question or an answer in a table."""
_EPILOG: Final = """\b
Examples:
  aci-p2p simulate                                       a hundred nodes for an hour
  aci-p2p simulate --nodes 1000 --hours 1 --seed 7       a thousand
  aci-p2p simulate --faults all --adversaries 0.2        a bad day, and a fifth of the nodes cheat
  aci-p2p simulate --adversaries 0.1 --strategy "wrong model" --html a.html
  aci-p2p simulate --measure --strategy "bid spam"       what an attack gains and spoils
  aci-p2p simulate --random 42                           a world of which everything is left to chance
  aci-p2p simulate --scenario world.toml                 a world from a file
  aci-p2p simulate --scenario world.toml --real libp2p   its planned jobs on real nodes over loopback sockets
"""


class SimulationFailed(AciError):
    """Something happened in a simulated world that must never happen."""

    code = "simulation_failed"


@click.command("simulate", short_help="Simulate a market of thousands of nodes.", epilog=_EPILOG)
@click.option("--nodes", type=click.IntRange(2, MAX_NODES), default=_USUAL.nodes, show_default=True, help="Nodes.")
@click.option("--hours", type=click.FloatRange(0, MAX_HOURS, min_open=True), default=_USUAL.hours, show_default=True,
              help="Simulated time.")  # fmt: skip
@click.option("--seed", type=int, default=_USUAL.seed, show_default=True, help="Fixes everything left to chance.")
@click.option("--adversaries", type=click.FloatRange(0, 0.9), default=0.0, show_default=True, help="Share that cheats.")
@click.option("--strategy", "strategies", multiple=True, type=click.Choice(list(STRATEGIES)), metavar="NAME",
              help="How they cheat, of --strategies; several times, or any way.")  # fmt: skip
@click.option("--faults", multiple=True, type=click.Choice(["all", *(fault.value for fault in Fault)]),
              help="What goes wrong; may be given several times.")  # fmt: skip
@click.option("--models", type=click.IntRange(0), default=0, show_default="nodes / 25", help="Models that are served.")
@click.option("--interval", type=click.FloatRange(0, min_open=True), default=_USUAL.job_interval_s, show_default=True,
              help="Seconds between a consumer's jobs, on average.")  # fmt: skip
@click.option("--random", "lot", type=int, metavar="SEED", help="Leave everything to chance, as the tests do.")
@click.option("--scenario", "file", type=click.Path(path_type=Path, dir_okay=False), help="Read it from a file.")
@click.option("--real", type=click.Choice(["memory", "libp2p"]),
              help="Run the jobs of --scenario on real nodes instead, in memory or over loopback sockets.")  # fmt: skip
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False),
              help="Keep the scenario of a failure in this folder; tests/seeds where that exists.")  # fmt: skip
@click.option("--html", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with pictures.")
@click.option("--strategies", "listing", is_flag=True, help="List the ways to cheat, and end.")
@click.option(
    "--measure", is_flag=True, help="Try each --strategy, or all, in a small market, say what it gains, and end."
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    nodes: int,
    hours: float,
    seed: int,
    adversaries: float,
    strategies: tuple[str, ...],
    faults: tuple[str, ...],
    models: int,
    interval: float,
    lot: int | None,
    file: Path | None,
    real: Literal["memory", "libp2p"] | None,
    keep: Path | None,
    picture: Path | None,
    listing: bool,  # noqa: FBT001 - click passes flags so
    measure: bool,  # noqa: FBT001 - click passes flags so
    as_json: bool,  # noqa: FBT001 - click passes flags so
) -> None:
    """Simulate a market: the protocol's own state machines, an imagined network, any faults and attackers.

    The same seed gives the same world to the last message; the trace at the end proves it.
    """
    if listing or measure:
        print_table(_measured(strategies or sorted(STRATEGIES)) if measure else _strategies())
        return
    if lot is not None or file is not None:
        option = "--scenario" if lot is None else "--random"
        _refuse_others(context, option, both=lot is not None and file is not None)
        scenario = random_scenario(lot) if lot is not None else load_scenario(file or Path())
        again = f"--random {lot}" if lot is not None else f"--scenario {shlex.quote(str(file))}"
    else:
        chosen = frozenset(Fault) if "all" in faults else frozenset(Fault(name) for name in faults)
        scenario = Scenario(
            seed=seed, nodes=nodes, hours=hours, adversaries=adversaries, strategies=strategies, models=models,
            job_interval_s=interval, faults=chosen,
        )  # fmt: skip
        again = _options(scenario)
    if real is not None:
        if file is None or picture is not None:
            msg = "--real runs the jobs of a --scenario, and draws no pictures"
            raise click.UsageError(msg)
        _rehearse(scenario, real, as_json=as_json)
        return
    simulation = Simulation(scenario)
    try:
        result = _run(simulation, quiet=as_json)
    except Exception as error:
        # A world that breaks by itself is as much a find as one that breaks an invariant.
        why = str(error) if isinstance(error, InvariantBroken) else f"the world itself broke: {error!r}"
        kept = _keep(scenario, keep, f"seed-{seed}" if lot is None else f"random-{lot}")
        raise SimulationFailed(why, hint=f"see it again with: aci-p2p simulate {again}{kept}") from error
    if picture:
        _write(picture, page(result))
    if as_json:
        print_json(_document(simulation, result))
        return
    _show(simulation, result)
    click.echo(f"trace {result.trace}")


def _refuse_others(context: click.Context, option: str, *, both: bool) -> None:
    given = [name for name in (*_WORLD, "seed") if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given or both:
        other = "--scenario" if both else f"--{given[0].replace('strategies', 'strategy')}"
        msg = f"{option} describes the whole world; it does not go with {other}"
        raise click.UsageError(msg)


def _options(scenario: Scenario) -> str:
    """The options that give a scenario again."""
    parts = [f"--nodes {scenario.nodes} --hours {scenario.hours!r} --seed {scenario.seed}"]
    if scenario.adversaries:
        parts.append(f"--adversaries {scenario.adversaries!r}")
    parts += [f"--strategy {shlex.quote(name)}" for name in scenario.strategies]
    parts += [f"--faults {shlex.quote(fault.value)}" for fault in Fault if fault in scenario.faults]
    if scenario.models != _USUAL.models:
        parts.append(f"--models {scenario.models}")
    if scenario.job_interval_s != _USUAL.job_interval_s:
        parts.append(f"--interval {scenario.job_interval_s!r}")
    return " ".join(parts)


def _keep(scenario: Scenario, folder: Path | None, name: str) -> str:
    """Keep the scenario of a failure, if there is a place for it, and say where."""
    if folder is None and not KEPT_SEEDS.is_dir():
        return ""
    path = (folder or KEPT_SEEDS) / f"{name}.json"
    _write(path, dump_scenario(scenario))
    return f" (kept as {path})"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}"
        raise LocalError(msg, hint="give another place, in a folder that may be written") from error


def _progress(what: str, *, quiet: bool) -> Progress:
    """A bar for people who wait."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def _run(simulation: Simulation, *, quiet: bool) -> Result:
    with _progress("simulating", quiet=quiet) as progress:
        task = progress.add_task("simulating", total=1.0)
        return simulation.run(lambda share: progress.update(task, completed=share))


def _document(simulation: Simulation, result: Result) -> dict[str, Any]:
    return {
        **asdict(summarise(result)),
        "planned": [asdict(outcome) for outcome in result.planned],
        "faults": result.fired,
        "crashes_at_write": result.died_at,
        "refused": result.refused,
        "unread": result.unread,
        "attackers": [asdict(gain) for gain in simulation.gains()],
        "events": result.events,
        "checks": result.checks,
        "trace": result.trace,
    }


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in _FIGURES else "left")
    return table


def _measured(names: Sequence[str]) -> Table:
    """What strategies gain and spoil in a small market, against the same market without them."""
    table = _table("strategy", "goal", "profit", "spoiled jobs", "not stopped yet, for")
    with _progress("measuring", quiet=False) as progress:
        for name in progress.track(names):
            found, strategy = measure_strategy(trial(name)), STRATEGIES[name]
            figures = (format_amount(found.profit), f"{found.harm:.0%}")
            table.add_row(name, strategy.goal, *figures, strategy.pays or strategy.harms)
    return table


def _strategies() -> Table:
    table = _table("strategy", "goal", "not stopped yet, for")
    for name, strategy in sorted(STRATEGIES.items()):
        table.add_row(name, strategy.goal, strategy.pays or strategy.harms)
    return table


def _rehearse(scenario: Scenario, network: Literal["memory", "libp2p"], *, as_json: bool) -> None:
    """Run the planned jobs of a scenario on real nodes, and print what came of them."""

    async def rehearse() -> tuple[list[PlannedOutcome], str]:
        async with open_scenario(scenario, network=network) as swarm:
            outcomes = await run_scenario(swarm, scenario)
            await swarm.settle()
            return outcomes, swarm.trace

    try:
        outcomes, trace = trio.run(rehearse) if network == "libp2p" else run(rehearse, seed=scenario.seed)
    except InvariantBroken as broken:
        raise SimulationFailed(str(broken)) from broken
    except trio.TooSlowError as error:
        msg = "the nodes did not find each other in time"
        raise ResourceError(msg, hint="the machine is busy: try again later, or with fewer nodes") from error
    if as_json:
        print_json({"planned": [asdict(outcome) for outcome in outcomes], "trace": trace})
        return
    print_table(_planned(scenario, outcomes))
    if trace:
        click.echo(f"trace {trace}")


def _planned(scenario: Scenario, outcomes: Sequence[PlannedOutcome]) -> Table:
    """What came of the planned jobs."""
    table = _table("consumer", "asks", "provider", "answers", "tokens", "price")
    for job, outcome in zip(scenario.jobs, outcomes, strict=True):
        answer = f"failed: {outcome.error.replace('_', ' ')}" if outcome.error else _cut(outcome.text)
        figures = ("", "") if outcome.error else (str(outcome.tokens), format_amount(outcome.price))
        provider = "" if outcome.provider is None else str(outcome.provider)
        table.add_row(str(job.consumer), _cut(job.prompt), provider, answer, *figures)
    return table


def _cut(text: str) -> str:
    return escape(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…")


def _show(simulation: Simulation, result: Result) -> None:
    summary = summarise(result)
    if result.planned:
        print_table(_planned(result.scenario, result.planned))
        click.echo()
    jobs = _table("jobs of honest consumers", "")
    jobs.add_row("answered", f"{summary.answered} of {summary.jobs}")
    for failure, count in summary.failures.items():
        jobs.add_row(f"failed: {failure.replace('_', ' ')}", str(count))
    jobs.add_row("answers that the model does not give", str(summary.wrong))
    jobs.add_row("offer to first token", "{} ms, the slowest hundredth {} ms".format(*summary.first_token_ms))
    jobs.add_row("offer to receipt", "{} ms, the slowest hundredth {} ms".format(*summary.duration_ms))
    jobs.add_row("signed for", format_amount(summary.spent))
    print_table(jobs)
    if result.fired:
        faults = _table("what went wrong", "struck")
        for fault, count in result.fired.items():
            faults.add_row(fault, str(count))
        click.echo()
        print_table(faults)
    if simulation.attackers:
        cheats = _table("who cheated", "nodes", "paid", "unearned", "not stopped yet, for")
        for gain in simulation.gains():
            amounts = (format_amount(gain.income), format_amount(gain.unearned))
            cheats.add_row(gain.strategy, str(gain.nodes), *amounts, gain.undefended)
        click.echo()
        print_table(cheats)
    click.echo(f"\n{result.events} events, {result.checks} checks of invariants, none broken")
