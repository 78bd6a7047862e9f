"""Scenarios as files: TOML or JSON, whose keys are the fields of `Scenario`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, TypeGuard, TypeVar, cast

from aci_p2p.network.model import NetworkModel
from aci_p2p.protocol.errors import LocalError
from aci_p2p.testing.simulator.adversaries import STRATEGIES
from aci_p2p.testing.simulator.scenario import Fault, PlannedJob, Scenario

T = TypeVar("T", Scenario, NetworkModel, PlannedJob)

_READABLE: Final = (bool, int, float, str)


class BadScenario(LocalError):
    """A scenario file that cannot be read."""

    code = "bad_scenario"

    def __init__(self, source: str, problem: str) -> None:
        """`source`: the file."""
        super().__init__(f"{source}: {problem}", hint=f"a scenario has {', '.join(_names(Scenario))}")
        self.source = source


def dump_scenario(scenario: Scenario) -> str:
    """A scenario as JSON; what it leaves to the defaults is left out."""
    everything = asdict(scenario)
    everything["faults"] = [fault.value for fault in Fault if fault in scenario.faults]
    usual = asdict(Scenario())
    usual["faults"] = []
    changed = {name: value for name, value in everything.items() if value != usual[name]}
    return json.dumps({"seed": scenario.seed, **changed}, indent=2) + "\n"


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file: TOML, or JSON if its name ends so. Raises BadScenario."""
    try:
        text = path.read_text(encoding="utf-8")
        data: object = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise BadScenario(str(path), error.strerror or "cannot be read") from error
    except ValueError as error:
        raise BadScenario(str(path), str(error)) from error
    try:
        return _scenario(data)
    except (LocalError, TypeError, ValueError) as error:
        raise BadScenario(str(path), str(error)) from error


def _scenario(data: object) -> Scenario:
    values = _table(data, Scenario)
    if "network" in values:
        values["network"] = _build(NetworkModel, values["network"])
    if "faults" in values:
        values["faults"] = frozenset(Fault(name) for name in _list(values["faults"]))
    if "strategies" in values and (unknown := sorted(set(_list(values["strategies"])) - STRATEGIES.keys())):
        msg = f"no strategy is called {', '.join(unknown)}"
        raise ValueError(msg)
    if "jobs" in values:
        values["jobs"] = tuple(_build(PlannedJob, job) for job in _list(values["jobs"]))
    return _build(Scenario, values)


def _names(cls: type[Any]) -> tuple[str, ...]:
    return tuple(one.name for one in fields(cls))


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _list(value: object) -> list[Any]:
    if not _is_list(value):
        msg = f"{value!r} is no list"
        raise TypeError(msg)
    return value


def _table(data: object, cls: type[Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        msg = f"{data!r} is no table"
        raise TypeError(msg)
    values = dict(cast("Mapping[str, Any]", data))
    unknown = sorted(values.keys() - _names(cls))
    if unknown:
        msg = f"it says nothing about {', '.join(unknown)}"
        raise ValueError(msg)
    return values


def _build(cls: type[T], data: object) -> T:
    values = _table(data, cls)
    usual = {one.name: one.type for one in fields(cls)}
    for name, value in values.items():
        if _is_list(value):
            values[name] = _tuple(value)
        elif not _fits(str(usual[name]), value):
            msg = f"{name} is a {usual[name]}, not {value!r}"
            raise TypeError(msg)
    return cls(**values)


def _tuple(values: list[Any]) -> tuple[Any, ...]:
    return tuple(_tuple(one) if _is_list(one) else one for one in values)


def _fits(annotation: str, value: object) -> bool:
    """Whether a plain value is of a field's type; others were built or are tuples by now."""
    match annotation:
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "bool":
            return isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case _:
            return not isinstance(value, _READABLE)
