"""The control socket: who may ask, what a hostile or clumsy client can do (nothing), and what a killed node leaves."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from aci_p2p import ACI
from aci_p2p.control import ClocksReport, Journal, NoNode, PeersReport, StatusReport, ask, process, server
from aci_p2p.control.observer import Observer, judge_reachability
from aci_p2p.control.process import process_figures
from aci_p2p.control.server import MAX_CLIENTS, Command, ControlInUse, open_control
from aci_p2p.control.wire import (
    MAX_REQUEST_BYTES,
    VERSION,
    BadRequest,
    NotReady,
    Request,
    decode_answer,
    decode_request,
    encode_error,
    encode_request,
    encode_result,
)
from aci_p2p.network.api import Reachability
from aci_p2p.node import Node
from aci_p2p.protocol.errors import LocalError, ResourceError
from tests.node.conftest import MODEL, ROOT, OpenTestNode, ScriptedExecutor

BIG = "x" * (8 << 20)
"""An answer that no socket buffer holds."""


async def echo(argument: str) -> object:
    await trio.lowlevel.checkpoint()
    return {"said": argument}


async def fail(_: str) -> object:
    await trio.lowlevel.checkpoint()
    msg = "no luck"
    raise ResourceError(msg, hint="later")


async def crash(_: str) -> object:
    await trio.lowlevel.checkpoint()
    raise ZeroDivisionError


async def big(_: str) -> object:
    await trio.lowlevel.checkpoint()
    return BIG


COMMANDS = {"echo": echo, "fail": fail, "crash": crash, "big": big}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "node.sock"


async def asked(path: Path, command: str, argument: str = "") -> object:
    """What `ask` gives, from a thread as the node is in this one."""
    return await trio.to_thread.run_sync(ask, path, command, argument)


def modes(*paths: Path) -> list[int]:
    return [stat.S_IMODE(path.stat().st_mode) for path in paths]


@asynccontextmanager
async def connected(path: Path) -> AsyncGenerator[trio.SocketStream]:
    async with await trio.open_unix_socket(path) as stream:
        yield stream


async def read_line(stream: trio.SocketStream) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        part = await stream.receive_some(1_000)
        assert part
        line += part
    answer: dict[str, Any] = json.loads(line)
    return answer


@asynccontextmanager
async def answering(path: Path, commands: Mapping[str, Command]) -> AsyncGenerator[None]:
    async with open_control(path) as control:
        with control.answering(commands):
            yield


# The socket.


async def test_questions_and_answers(path: Path) -> None:
    async with answering(path, COMMANDS):
        assert modes(path, path.parent) == [0o600, 0o700]
        assert await asked(path, "echo", "hé\n") == {"said": "hé\n"}
        with pytest.raises(BadRequest, match="no luck") as failed:
            await asked(path, "fail")
        assert failed.value.hint == "later"
        with pytest.raises(BadRequest, match="no command 'nope'"):
            await asked(path, "nope")
        # Several on one connection.
        async with connected(path) as stream:
            for number in range(3):
                await stream.send_all(encode_request(Request("echo", str(number))))
                assert (await read_line(stream))["result"] == {"said": str(number)}
    assert modes(path.parent / "node.lock") == [0o600]
    with pytest.raises(FileNotFoundError):
        modes(path)


async def test_nobody_answers_where_no_node_runs(path: Path) -> None:
    with pytest.raises(NoNode, match="no such socket") as error:
        await asked(path, "echo")
    assert error.value.exit_code == 4
    assert error.value.hint == "start one with: aci-p2p join"
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(os.fspath(path))
    with pytest.raises(NoNode, match="is gone") as error:
        await asked(path, "echo")
    assert not error.value.runs


async def test_a_node_that_does_not_answer_is_said_to_run(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(os.fspath(path))
        mute.listen(1)
        with pytest.raises(NoNode, match=r"did not answer within 0\.2 s") as error:
            ask(path, "status", timeout_s=0.2)
        assert error.value.runs
        assert "restart" in error.value.hint
        # Nor does it take connections any more, and there are too many already.
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(os.fspath(path))
            with pytest.raises(NoNode, match="hung up") as error:
                ask(path, "status", timeout_s=0.2)
        assert error.value.runs


async def test_two_nodes_never_share_a_socket(path: Path, tmp_path: Path) -> None:
    async with answering(path, COMMANDS), answering(tmp_path / "other" / "node.sock", COMMANDS):
        with pytest.raises(ControlInUse, match="another node answers"):
            async with answering(path, COMMANDS):
                pytest.fail("both answer")
        # The first one goes on.
        assert await asked(path, "echo", "still there") == {"said": "still there"}
    async with answering(path, COMMANDS):
        assert await asked(path, "echo") == {"said": ""}


async def answer_once(path: Path) -> None:
    async with answering(path, COMMANDS):
        assert await asked(path, "echo") == {"said": ""}


def test_what_a_killed_node_leaves_is_replaced(path: Path) -> None:
    program = (
        "import sys, trio\n"
        "from pathlib import Path\n"
        "from aci_p2p.control.server import open_control\n"
        "async def main():\n"
        "    async with open_control(Path(sys.argv[1])):\n"
        "        print('up', flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        with pytest.raises(ControlInUse):
            trio.run(answer_once, path)
        process.send_signal(signal.SIGKILL)
    assert path.is_socket()
    trio.run(answer_once, path)


def test_what_is_not_a_socket_stays(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_text("mine")
    with pytest.raises(LocalError, match="is not a socket"):
        trio.run(answer_once, path)
    assert path.read_text() == "mine"


async def test_a_folder_of_everybody_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o777)
    with pytest.raises(LocalError, match="nobody else may write to"):
        async with answering(path, COMMANDS):
            pytest.fail("anybody can replace the socket")


# Clients that mean no good.


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"status",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"{}",
        b'{"version": 1}',
        b'{"version": true, "command": "echo"}',
        b'{"version": 2, "command": "echo"}',
        b'{"version": 1, "command": ["echo"]}',
        b'{"version": 1, "command": "echo", "argument": 1}',
        b'{"version": 1, "command": "no\\u001b[2Jne"}',
        b"[" * 3_000,
        b'{"a":' * 700,
    ],
)
async def test_nonsense_is_answered_and_harmless(path: Path, line: bytes) -> None:
    async with answering(path, COMMANDS), connected(path) as stream:
        await stream.send_all(line + b"\n")
        answer = await read_line(stream)
        assert answer["version"] == VERSION
        assert answer["error"]["code"] == "bad_request"
        # The connection is good for another try.
        await stream.send_all(encode_request(Request("echo")))
        assert "result" in await read_line(stream)


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_no_line_is_too_much_for_the_decoder(line: bytes) -> None:
    try:
        decode_request(line)
    except BadRequest:
        return
    assert json.loads(line)["version"] == VERSION


@given(st.text(), st.text())
def test_every_request_comes_back(command: str, argument: str) -> None:
    encoded = encode_request(Request(command, argument))
    assert encoded.count(b"\n") == 1
    if sum(map(encoded.count, (b"[", b"{"))) <= 8:
        assert decode_request(encoded[:-1]) == Request(command, argument)


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_every_answer_comes_back(result: dict[str, object]) -> None:
    encoded = encode_result(result)
    assert encoded.count(b"\n") == 1
    assert decode_answer(encoded) == result
    with pytest.raises(BadRequest, match=r"^told$"):
        decode_answer(encode_error(LocalError("told")))


@pytest.mark.parametrize("line", [b"", b"[]", b"{}", b'{"version": 7, "result": 1}', b"[" * 100_000, b'{"error": 3}'])
def test_an_answer_of_another_program(line: bytes) -> None:
    with pytest.raises(BadRequest, match="another protocol"):
        decode_answer(line)


async def test_a_line_without_end_is_cut_off(path: Path) -> None:
    async with answering(path, COMMANDS), connected(path) as stream:
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x" * MAX_REQUEST_BYTES)
            assert await stream.receive_some(1) == b""
            for _ in range(100):
                await stream.send_all(b"x" * MAX_REQUEST_BYTES)
        assert await asked(path, "echo") == {"said": ""}


async def test_the_longest_question_is_heard(path: Path) -> None:
    async with answering(path, COMMANDS):
        empty = len(encode_request(Request("echo", "x"))) - 1
        argument = "x" * (MAX_REQUEST_BYTES - empty)
        assert await asked(path, "echo", argument) == {"said": argument}
        with pytest.raises(NoNode, match="hung up"):
            await asked(path, "echo", argument + "x")


async def test_too_many_clients_are_turned_away_and_the_others_served(path: Path) -> None:
    async with answering(path, COMMANDS), AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(path)) for _ in range(MAX_CLIENTS)]
        for client in clients:
            await client.send_all(encode_request(Request("echo")))
            assert "result" in await read_line(client)
        with pytest.raises(NoNode, match="hung up") as error:
            await asked(path, "echo")
        assert error.value.runs
        await clients[0].aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert await asked(path, "echo") == {"said": ""}


async def test_a_silent_client_is_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_S", 0.05)
    async with answering(path, COMMANDS), connected(path) as stream:
        await stream.send_all(b'{"version"')
        with trio.fail_after(5):
            assert await stream.receive_some(1) == b""


async def test_a_client_that_does_not_read_is_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ANSWER_S", 0.1)
    async with answering(path, COMMANDS), connected(path) as stream:
        await stream.send_all(encode_request(Request("big")))
        received = 0
        await trio.sleep(0.3)
        with trio.fail_after(5):
            while part := await stream.receive_some(1 << 20):
                received += len(part)
        assert received < len(BIG)
        assert await asked(path, "echo") == {"said": ""}


async def test_a_client_that_hangs_up(path: Path) -> None:
    async with answering(path, COMMANDS):
        for command in ("big", "echo"):
            async with connected(path) as stream:
                await stream.send_all(encode_request(Request(command)))
        assert await asked(path, "echo") == {"said": ""}


async def test_a_bug_of_a_command_ends_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with answering(path, COMMANDS):
        with pytest.raises(BadRequest, match="its log says why"):
            await asked(path, "crash")
        assert "ZeroDivisionError" in caplog.text
        assert await asked(path, "echo") == {"said": ""}


async def test_a_command_that_takes_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_: str) -> object:
        await trio.sleep_forever()

    monkeypatch.setattr(server, "ANSWER_S", 0.05)
    async with answering(path, {"hang": hang}):
        with pytest.raises(BadRequest, match="too busy"):
            await asked(path, "hang")


async def test_a_node_that_starts_or_stops(path: Path) -> None:
    given_up: list[str] = []
    begun = trio.Event()

    async def hang(_: str) -> object:
        begun.set()
        await trio.sleep_forever()

    async def wait_in_vain() -> None:
        with pytest.raises(BadRequest, match="too busy"):
            await asked(path, "hang")
        given_up.append("hang")

    async with open_control(path) as control:
        with pytest.raises(NotReady, match="is starting or stopping") as early:
            await asked(path, "echo")
        assert "loads its models" in early.value.hint
        async with trio.open_nursery() as nursery:
            with control.answering({"echo": echo, "hang": hang}):
                assert await asked(path, "echo", "now") == {"said": "now"}
                nursery.start_soon(wait_in_vain)
                await begun.wait()
        assert given_up == ["hang"]
        with pytest.raises(NotReady):
            await asked(path, "echo")


# What is answered.


def misfits(value: Any, hint: Any, where: str = "") -> list[str]:  # noqa: ANN401 - any type
    """Where a document is not of the type that is declared for it."""
    if is_typeddict(hint):
        if type(value) is not dict or value.keys() != get_type_hints(hint).keys():
            return [f"{where}: {value!r} is no {hint.__name__}"]
        return [
            bad for key, kind in get_type_hints(hint).items() for bad in misfits(value[key], kind, f"{where}.{key}")
        ]
    if get_origin(hint) is list:
        return [bad for item in value for bad in misfits(item, get_args(hint)[0], f"{where}[]")]
    if get_origin(hint) is dict:
        return [bad for item in value.values() for bad in misfits(item, get_args(hint)[1], f"{where}{{}}")]
    if isinstance(hint, UnionType):
        return min((misfits(value, part, where) for part in get_args(hint)), key=len)
    good = type(value) is hint or (hint is float and type(value) is int) or (hint is type(None) and value is None)
    return [] if good else [f"{where}: {value!r} is no {hint}"]


async def through_json(report: object) -> Any:  # noqa: ANN401 - a document
    """As a client sees it."""
    await trio.lowlevel.checkpoint()
    return json.loads(json.dumps(report, allow_nan=False))


async def test_what_a_node_says_of_itself(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    executor = ScriptedExecutor(text=" ".join(["word"] * 100), pace=0.1)
    async with (
        open_test_node("provider", executor=executor, asks=False) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
        trio.open_nursery() as nursery,
    ):
        journal = Journal()
        observer = Observer(provider, journal, Path("/etc/aci.toml"))
        nursery.start_soon(observer.watch)
        ours = logging.getLogger("aci_p2p")
        ours.addHandler(journal)
        try:
            logging.getLogger("aci_p2p.test").warning("odd\x1b[2J", extra={"fields": {"peer": "a\nb", "n": 3}})
            await trio.sleep(3)
            async with aci.stream(model=ROOT.hex(), prompt="count", max_tokens=100) as stream:
                text = await anext(stream)
                await trio.sleep(4)
                status: StatusReport = await through_json(await observer.status())
                peers: PeersReport = await through_json(await observer.peers())
                clocks: ClocksReport = await through_json(await observer.clocks())
                async for _ in stream.updates:
                    pass
            await trio.sleep(3)
            after: StatusReport = await through_json(await observer.status())
        finally:
            ours.removeHandler(journal)
        nursery.cancel_scope.cancel()
    assert text
    for report, kind in ((status, StatusReport), (peers, PeersReport), (clocks, ClocksReport), (after, StatusReport)):
        assert misfits(report, kind) == []
    check_status(status, str(provider.node_id), str(consumer.node_id))
    assert after["provider"] is not None
    assert after["provider"]["running"] == []
    assert after["provider"]["finished"] == 1
    assert after["earned"] == after["provider"]["earned"] == str(stream.answer.receipt.body.price)
    assert [(job["role"], job["state"], job["jobs"]) for job in after["jobs"]] == [("provider", "pending", 1)]
    (peer,) = peers["peers"]
    assert (peer["peer"], peer["direction"], peer["relay"]) == (str(consumer.node_id), "in", None)
    assert peer["topics"] == ["offers", "bids"]
    (clock,) = clocks["clocks"]
    assert (clock["peer"], abs(clock["ahead_ms"]) < 5) == (str(consumer.node_id), True)


def check_status(status: StatusReport, provider: str, consumer: str) -> None:
    """While a job is running."""
    node = status["node"]
    assert (node["id"], node["network"], node["state"]) == (provider, "aci-test", "running")
    assert node["config_file"] == "/etc/aci.toml"
    assert node["uptime_s"] >= 3
    assert status["provider"] is not None
    (running,) = status["provider"]["running"]
    assert (running["consumer"], running["model"]) == (consumer, MODEL)
    assert running["tokens_per_s"] == pytest.approx(10, rel=0.1)
    assert 20 < running["tokens"] < 100
    assert (status["provider"]["slots"], status["provider"]["free_slots"]) == (2, 1)
    assert [model["root"] for model in status["provider"]["models"]] == [ROOT.hex()]
    assert (status["market"]["offers"]["heard"], status["market"]["offers"]["per_minute"]) == (1, 1)
    (offer,) = status["market"]["recent_offers"]
    assert (offer["job"], offer["consumer"], offer["max_tokens"]) == (running["job"], consumer, 100)
    assert status["network"]["peers"] == 1
    assert status["process"]["pid"] == os.getpid()
    assert (status["process"]["file_descriptors"] or 0) > 3
    assert status["process"]["tasks"] > 5
    assert status["log"]["warnings"] == 1
    (entry,) = status["log"]["last"]
    assert (entry["level"], entry["source"]) == ("warning", "test")
    assert entry["message"] == 'odd [2J peer="a b" n=3'


@pytest.mark.parametrize(
    ("reachability", "addresses", "state"),
    [
        (Reachability.PUBLIC, ["/ip4/127.0.0.1/tcp/9400", "/ip4/192.0.2.1/tcp/9400"], "public"),
        (Reachability.PUBLIC, ["/ip4/127.0.0.1/tcp/9400", "/ip6/::1/tcp/9400"], "local"),
        (Reachability.PRIVATE, [], "private"),
        (Reachability.UNKNOWN, ["/ip6/::10/tcp/9400"], "unknown"),
    ],
)
def test_peers_of_one_machine_make_nobody_public(reachability: Reachability, addresses: list[str], state: str) -> None:
    assert judge_reachability(reachability, addresses)[0] == state


async def test_rates_are_of_the_last_minute(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor(), asks=False) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
        trio.open_nursery() as nursery,
    ):
        observer = Observer(provider, Journal(), None)
        nursery.start_soon(observer.watch)
        await aci.inference(model=ROOT.hex(), prompt="count")
        status = await observer.status()
        assert status["node"]["config_file"] is None
        assert status["market"]["offers"]["per_minute"] == 1
        await trio.sleep(62)
        status = await observer.status()
        nursery.cancel_scope.cancel()
    assert status["market"]["offers"]["per_minute"] == 0
    assert status["market"]["offers"]["heard"] == 1


async def test_descriptors_are_counted_also_when_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = process_figures().file_descriptors
    assert counted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (counted + 8, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                stack.callback(os.close, os.dup(2))
        figures = process_figures()
    assert figures.file_descriptors == figures.file_descriptor_limit == counted + 8
    monkeypatch.setattr(process, "_DESCRIPTORS", (Path("/nonexistent"),))
    assert process_figures().file_descriptors is None


async def test_a_lost_network_is_logged(
    autojump_clock: MockClock, open_test_node: OpenTestNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aci_p2p.node")

    async def run_first(stop: trio.Event, *, task_status: trio.TaskStatus[Node]) -> None:
        async with open_test_node("first") as node, trio.open_nursery() as watching:
            watching.start_soon(Observer(node, Journal(), None).watch)
            task_status.started(node)
            await stop.wait()
            watching.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        stop = trio.Event()
        first: Node = await nursery.start(run_first, stop)
        async with open_test_node("second", first.addresses[:1]) as second:
            nursery.start_soon(Observer(second, Journal(), None).watch)
            await trio.sleep(3)
            stop.set()
            await trio.sleep(3)
            nursery.cancel_scope.cancel()
    assert [(record.levelname, record.message) for record in caplog.records if record.name == "aci_p2p.node"] == [
        ("INFO", "connected"),
        ("WARNING", "no peer is left"),
    ]
