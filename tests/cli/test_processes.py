"""Nodes as people run them: processes of their own, over loopback libp2p, with real models, killed and interrupted."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aci_p2p.executor import ModelStore
from aci_p2p.protocol.proof import MAX_PROOF_BYTES, ProofInvalid, verify_proof
from tests.cli.conftest import LOOPBACK, SOON_S, Cli, Start, finish, one_line, wait_for, wait_for_text
from tests.conftest import MODEL_HOME
from tests.executor.tiny import write_tiny_model

MARK = "TEST_PROCESSES_OF"
"""Variable by which processes are known to be a test's own."""


def workers(mark: str) -> set[int]:
    """Executor workers that run on this machine and have inherited a mark, of a test's own, in their environment."""
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"aci_p2p.executor import worker" in (folder / "cmdline").read_bytes()
            if is_worker and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


@contextmanager
def no_orphans() -> Generator[None]:
    """No worker that began within the block outlives it; those of other test runs do not count."""
    mark = secrets.token_hex()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        yield
    deadline = time.monotonic() + SOON_S
    while workers(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers(mark)


@pytest.fixture
def model_home(home: Path) -> Path:
    """An ACI home of its own with the default model in it."""
    if not (MODEL_HOME / "models").is_dir():
        if os.environ.get("ACI_REQUIRE_MODEL"):
            pytest.fail("the default model is missing: make model")
        pytest.skip("the default model is missing: make model")
    home.mkdir()
    (home / "models").symlink_to(MODEL_HOME / "models")
    return home


@pytest.fixture
def tiny_home(home: Path, tmp_path: Path) -> Path:
    """An ACI home of its own with a tiny model in it."""
    ModelStore(home / "models").add_directory(write_tiny_model(tmp_path / "tiny"), "tiny")
    return home


def test_a_tiny_model_end_to_end(cli: Cli, start: Start, tiny_home: Path, tmp_path: Path) -> None:
    with no_orphans():
        provider = start("join", *LOOPBACK)
        address = wait_for(provider, "listening on ")
        assert len(workers(os.environ[MARK])) == 1
        path = tmp_path / "a.aciproof"
        ask = ("infer", "--bootstrap", address, "--model", "tiny", "--max-tokens", "20", "--proof", str(path))
        result = cli(*ask, "--json", "--temperature", "0.9", "Hello!")
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        assert 1 <= answer["output_tokens"] <= 20
        assert len(answer["tokens"]) == answer["output_tokens"]
        assert answer["temperature_milli"] == 900
        assert cli("verify", str(path)).returncode == 0
        data = path.read_bytes()
        for position in range(0, len(data), 7):
            with pytest.raises(ProofInvalid):
                verify_proof(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        assert len(data) < MAX_PROOF_BYTES
        # From standard input, streamed as text.
        piped = cli(*ask, "-", stdin="Hello from a pipe")
        assert piped.returncode == 0, piped.stderr
        provider.terminate()
        done = finish(provider)
        assert done.returncode == 0
        assert done.stdout.endswith("stopped\n")
        # One line of log for each job.
        assert [' ACI"' in line for line in done.stderr.splitlines() if "INFO job done" in line] == [True, True]


def test_a_consumer_beside_a_node_asks_through_it(cli: Cli, start: Start, tiny_home: Path) -> None:
    ask = ("infer", "--model", "tiny", "--max-tokens", "3", "Hello!")
    node = start("join", *LOOPBACK)
    wait_for(node, "listening on ")
    answer = cli(*ask, "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["provider"] == json.loads(cli("status", "--json").stdout)["node"]["id"]


def test_a_paid_answer_is_shown_though_its_proof_cannot_be_saved(
    cli: Cli, start: Start, tiny_home: Path, tmp_path: Path
) -> None:
    address = wait_for(start("join", *LOOPBACK), "listening on ")
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "a.aciproof")
    ask = ("infer", "--bootstrap", address, "--model", "tiny", "--max-tokens", "3", "--proof", nowhere, "Hello!")
    result = cli(*ask, "--json")
    assert "cannot write" in one_line(result, 2)
    document = json.loads(result.stdout)
    assert document["output_tokens"]
    assert document["proof_file"] is None


def test_what_a_consumer_is_told(cli: Cli, start: Start, tiny_home: Path) -> None:
    provider = start("join", *LOOPBACK)
    ask = ("infer", "--bootstrap", wait_for(provider, "listening on "), "--model", "tiny", "--max-tokens", "5")
    assert "ACI under the cheapest of 1 providers" in one_line(cli(*ask, "--max-price", "0.0000001", "Hello!"), 4)
    assert "slower than the maximum latency by" in one_line(cli(*ask, "--max-latency", "1", "Hello!"), 4)
    assert "no provider has the model" in one_line(
        cli("infer", "--bootstrap", ask[2], "--model", "ab" * 32, "--bid-window", "200", "Hello!"), 4
    )
    long = cli(*ask, "-", stdin="word " * 3_000)
    assert long.returncode == 2
    assert "tokens" in long.stderr.strip().splitlines()[-1]
    assert "Traceback" not in long.stderr
    assert cli(*ask, "Hello!").returncode == 0


def test_altered_weights_are_not_served(cli: Cli, tiny_home: Path, tmp_path: Path) -> None:
    weights = tmp_path / "tiny" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    line = one_line(cli("join", *LOOPBACK), 2)
    assert "tiny" in line
    weights.unlink()
    assert "tiny" in one_line(cli("join", *LOOPBACK), 2)


def test_one_key_one_node_one_port(cli: Cli, start: Start, tiny_home: Path, tmp_path: Path) -> None:
    address = wait_for(start("join", *LOOPBACK), "listening on ")
    assert "another node answers on" in one_line(cli("join", *LOOPBACK), 2)
    elsewhere = ("--runtime", str(tmp_path / "run"))
    assert "another node of this machine runs with it" in one_line(cli("join", *LOOPBACK, *elsewhere), 2)
    taken = address.partition("/p2p/")[0]
    line = one_line(cli("join", "--no-serve", "--listen", taken, "--home", str(tmp_path / "other")), 4)
    assert taken.rpartition("/")[2] in line


def test_a_node_that_listens_nowhere(start: Start, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[p2p]\nlisten = []\n")
    assert wait_for(start("join", "--no-serve", at=tmp_path), "listening ") == "nowhere: it only dials"


def test_a_node_that_serves_nothing_is_not_to_be_asked(start: Start) -> None:
    helper = start("join", "--no-serve", *LOOPBACK)
    address = wait_for(helper, "listening on ")
    assert wait_for(helper, "join through it with: ").endswith(f" join --bootstrap {address}")


def test_a_second_provider_joins_through_the_first(cli: Cli, start: Start, tiny_home: Path, tmp_path: Path) -> None:
    first = wait_for(start("join", *LOOPBACK, "--no-asks"), "listening on ")
    other = tmp_path / "other"
    ModelStore(other / "models").add_directory(write_tiny_model(tmp_path / "tiny2"), "tiny")
    second = start("join", *LOOPBACK, "--bootstrap", first, "--output-price", "0.000001", "--no-asks", at=other)
    assert wait_for(second, "joined: ") == "connected to 1 of 1 nodes given"
    answer = json.loads(
        cli("infer", "--bootstrap", first, "--model", "tiny", "--max-tokens", "3", "--json", "Hello!").stdout
    )
    assert len(answer["bids"]) == 2
    assert answer["provider"] == min(answer["bids"], key=lambda bid: int(bid["worst_price_base_units"]))["provider"]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "words"), [(signal.SIGKILL, "after"), (signal.SIGTERM, "shutting down")])
def test_a_provider_that_ends_mid_stream(start: Start, model_home: Path, how: signal.Signals, words: str) -> None:
    with no_orphans():
        provider = start("join", *LOOPBACK, "--key", "killed", "--grace", "0")
        address = wait_for(provider, "listening on ")
        consumer = start("infer", "--bootstrap", address, "--max-tokens", "2000", "Count from one to one thousand.")
        wait_for_text(consumer)
        provider.send_signal(how)
        result = finish(consumer, SOON_S)
        assert result.returncode == 3
        assert words in result.stderr.strip().splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert finish(provider).returncode == (0 if how is signal.SIGTERM else -how)


@pytest.mark.slow
def test_a_provider_that_is_stopped_finishes_its_jobs(start: Start, cli: Cli, model_home: Path) -> None:
    with no_orphans():
        provider = start("join", *LOOPBACK)
        address = wait_for(provider, "listening on ")
        consumer = start("infer", "--bootstrap", address, "--max-tokens", "100", "Count from one to one thousand.")
        wait_for_text(consumer)
        provider.terminate()
        result = finish(consumer)
        assert result.returncode == 0, result.stderr
        done = finish(provider)
        assert done.returncode == 0
        assert re.search(r"INFO stopping jobs=1 grace_s=30\n.* INFO job done ", done.stderr, re.DOTALL)


@pytest.mark.slow
def test_a_provider_that_is_stopped_twice_hands_its_jobs_back(start: Start, cli: Cli, model_home: Path) -> None:
    with no_orphans():
        provider = start("join", *LOOPBACK)
        address = wait_for(provider, "listening on ")
        consumer = start("infer", "--bootstrap", address, "--max-tokens", "2000", "Tell me a long story.")
        wait_for_text(consumer)
        provider.terminate()
        status = json.loads(cli("status", "--json").stdout)
        assert (status["node"]["state"], status["provider"]["free_slots"]) == ("stopping", 0)
        assert consumer.poll() is None
        provider.terminate()
        result = finish(consumer, SOON_S)
        assert result.returncode == 3
        assert "shutting down" in result.stderr.strip().splitlines()[-1]
        assert finish(provider).returncode == 0


@pytest.mark.slow
def test_interrupting_the_consumer_frees_the_provider(start: Start, cli: Cli, model_home: Path) -> None:
    provider = start("join", *LOOPBACK, "--slots", "1")
    address = wait_for(provider, "listening on ")
    ask = ("infer", "--bootstrap", address, "--max-tokens")
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        consumer = start(*ask, "2000", "Count from one to one thousand.")
        wait_for_text(consumer)
        consumer.send_signal(how)
        result = finish(consumer, SOON_S)
        assert "Traceback" not in result.stderr
        if how is not signal.SIGKILL:
            assert result.returncode == 130
            assert result.stderr.strip().splitlines()[-1] == "aci-p2p: interrupted"
        # The only slot is free again at once.
        assert cli(*ask, "4", "Hi").returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_demo_can_be_interrupted_at_any_moment(start: Start, model_home: Path) -> None:
    with no_orphans():
        for delay in (0.0, 0.7, 1.6, 3.0):
            demo = start("demo", "--max-tokens", "400")
            wait_for(demo, "Peers")
            time.sleep(delay)
            demo.send_signal(signal.SIGINT)
            result = finish(demo, SOON_S)
            assert result.returncode == 130
            assert result.stderr.strip() == "aci-p2p: interrupted"


@pytest.mark.slow
def test_the_demo(cli: Cli, model_home: Path) -> None:
    result = cli("demo", "--max-tokens", "12", "--prompt", "What is the capital of France?")
    assert result.returncode == 0, result.stderr
    for part in ("Peers", "Offer", "3 arrived", "of 3 bids", "Paris", "tokens/s", "verified"):
        assert part in result.stdout


@pytest.mark.slow
def test_the_demo_for_programs(cli: Cli, model_home: Path) -> None:
    document = json.loads(cli("demo", "--max-tokens", "8", "--json").stdout)
    assert document["valid"] is True
    assert len(document["bids"]) == 3
    assert verify_proof(Path(document["proof_file"]).read_bytes()).file.text == document["text"]
