"""A command beside a running node asks the network through it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from aci_p2p.cli import asking
from aci_p2p.cli.asking import client_beside
from aci_p2p.cli.options import Given
from aci_p2p.control import NoNode, NotReady
from aci_p2p.control.wire import BadRequest
from tests.cli.views import status

NAMED = "/dnsaddr/boot.example"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which a node of the network aci-test is configured."""
    monkeypatch.setenv("ACI_HOME", str(tmp_path))
    monkeypatch.setenv("ACI_NETWORK", "aci-test")
    monkeypatch.setenv("ACI_BOOTSTRAP", NAMED)
    return tmp_path


def test_it_joins_through_the_running_node_first(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    asked: list[tuple[Path, str]] = []

    def ask(path: Path, command: str, *, timeout_s: float) -> object:
        assert timeout_s < 5
        asked.append((path, command))
        return status()

    monkeypatch.setattr(asking, "ask", ask)
    assert client_beside(Given().load()).bootstrap == (*status()["addresses"], NAMED)
    assert asked == [(home / "run" / "node.sock", "status")]
    # What the command line says goes before everything.
    assert client_beside(Given({"bootstrap": ["/dnsaddr/other"]}).load()).bootstrap == ("/dnsaddr/other",)
    assert len(asked) == 1


def test_a_node_of_another_network_is_no_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> object:
        return status()

    monkeypatch.setattr(asking, "ask", ask)
    assert client_beside(Given({"network": "aci-other"}).load()).bootstrap == (NAMED,)


@pytest.mark.parametrize("error", [NoNode(Path("x"), "it hung up"), BadRequest("another version")])
def test_without_a_node_that_answers_it_goes_on(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def ask(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setattr(asking, "ask", ask)
    assert client_beside(Given().load()).bootstrap == (NAMED,)


def test_a_node_that_starts_is_told_of_only_without_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> object:
        msg = "it is starting"
        raise NotReady(msg)

    monkeypatch.setattr(asking, "ask", ask)
    monkeypatch.setattr(asking, "READY_S", 0.0)
    assert client_beside(Given().load()).bootstrap == (NAMED,)
    monkeypatch.delenv("ACI_BOOTSTRAP")
    assert client_beside(Given({"p2p.mdns": True}).load()).bootstrap == ()
    with pytest.raises(NotReady):
        client_beside(Given().load())


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited; nothing else takes time."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(naps))
    return naps


@pytest.mark.parametrize("then", ["it is up", "it was stopping"])
def test_a_node_that_starts_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slept: list[float], then: str
) -> None:
    def ask(path: Path, *_: object, **__: object) -> object:
        if len(slept) < 3:
            msg = "it is starting"
            raise NotReady(msg)
        if then == "it was stopping":
            raise NoNode(path, "it has gone")
        return status()

    monkeypatch.setattr(asking, "ask", ask)
    monkeypatch.delenv("ACI_BOOTSTRAP")
    assert client_beside(Given().load()).bootstrap == (tuple(status()["addresses"]) if then == "it is up" else ())
    assert slept == 3 * [asking.LOOK_S]
    told = "the node that runs here is starting or stopping; waiting for it ...\n"
    assert capsys.readouterr().err == told


def test_one_that_takes_its_time_to_say_that_it_starts_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    def ask(path: Path, *_: object, **__: object) -> object:
        if not slept:
            msg = "it is starting"
            raise NotReady(msg)
        if len(slept) < 3:
            raise NoNode(path, "it does not answer", runs=True)
        return status()

    monkeypatch.setattr(asking, "ask", ask)
    monkeypatch.delenv("ACI_BOOTSTRAP")
    assert client_beside(Given().load()).bootstrap == tuple(status()["addresses"])


def test_a_node_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    def ask(*_: object, **__: object) -> object:
        msg = "it is starting"
        raise NotReady(msg)

    monkeypatch.setattr(asking, "ask", ask)
    monkeypatch.delenv("ACI_BOOTSTRAP")
    with pytest.raises(NotReady):
        client_beside(Given().load())
    assert sum(slept) == asking.READY_S
