"""What is loaded of py-libp2p, and that a program which uses py-libp2p itself is not disturbed."""

from __future__ import annotations

import subprocess
import sys
from threading import Thread

import pytest

from aci_p2p.network.libp2p.upstream import _EmptyPackages

UNUSED = {"aioquic", "fastecdsa", "httpx", "miniupnpc", "requests", "trio_websocket", "zeroconf"}
"""Modules that py-libp2p loads for what this package does not use."""

STOCK = """
import trio
from libp2p import new_host
from libp2p.tools.utils import connect
from multiaddr import Multiaddr

async def meet():
    listening, dialling = new_host(), new_host()
    async with listening.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]), dialling.run([]):
        await connect(dialling, listening)
        assert listening.get_id() in dialling.get_connected_peers()

trio.run(meet)
"""
"""A program with hosts of py-libp2p."""

OURS = """
import trio
from aci_p2p.network.config import NetworkConfig
from aci_p2p.network.libp2p import open_libp2p_network
from aci_p2p.protocol.identity import KeyPair

def open_host(number):
    config = NetworkConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    return open_libp2p_network(
        KeyPair(bytes([number]) * 32), config, record_validator=lambda *_: None, record_selector=lambda *_: 0
    )

async def meet_ours():
    async with open_host(1) as a, open_host(2) as b:
        await a.connect(b.addresses[0])
        assert b.node_id in a.peers

trio.run(meet_ours)
"""
"""The same with our own."""


def run_program(text: str) -> str:
    """What a program prints, which must end well."""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(module: str) -> set[str]:
    """What is loaded with a module."""
    return set(run_program(f"import sys, {module}; print(*sys.modules)").split())


def test_the_rest_is_not_loaded() -> None:
    assert loaded("libp2p") >= UNUSED
    assert not loaded("aci_p2p.network.libp2p") & UNUSED


@pytest.mark.parametrize("text", [OURS + STOCK + OURS, STOCK + OURS + STOCK], ids=["ours first", "theirs first"])
def test_programs_with_hosts_of_both(text: str) -> None:
    run_program(text)


def test_what_the_program_has_loaded_is_shared() -> None:
    run_program(
        "import libp2p.peer.id, sys\n"
        "before = set(sys.modules)\n"
        "from aci_p2p.network.libp2p import upstream\n"
        "assert upstream.ID is libp2p.peer.id.ID\n"
        "assert before <= set(sys.modules)\n"
    )


def test_one_that_another_finder_finds() -> None:
    run_program(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        return hidden(name, found) if name == 'libp2p' else None\n"
        "hidden, found = PathFinder.find_spec, list(sys.path)\n"
        "class Blind:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        return None if name == 'libp2p' else hidden(name, path, target)\n"
        "sys.meta_path[:] = [Finder, *(Blind if one is PathFinder else one for one in sys.meta_path)]\n"
        "PathFinder.find_spec = Blind.find_spec\n"
        "from aci_p2p.network.libp2p import upstream\n"
        "assert upstream.RPC and 'requests' not in sys.modules\n"
    )


def test_other_threads_find_quic_meanwhile() -> None:
    finder = _EmptyPackages()
    with pytest.raises(ModuleNotFoundError, match="nothing here uses QUIC"):
        finder.find_spec("aioquic", None)
    found: list[object] = []
    other = Thread(target=lambda: found.append(finder.find_spec("aioquic", None)))
    other.start()
    other.join()
    # That is for the finders behind it.
    assert found == [None]


@pytest.mark.parametrize("text", ["", "import libp2p"], ids=["alone", "before theirs"])
def test_mistakes_of_peers_are_not_printed(text: str) -> None:
    """Those that Noise logs, whoever else imports py-libp2p."""
    program = f"import logging, aci_p2p.network.libp2p\n{text}\n"
    program += "logging.getLogger('libp2p.security.noise.patterns').error('a mistake')\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_nothing_stays_behind() -> None:
    run_program(
        "import sys\n"
        "finders = list(sys.meta_path)\n"
        "from aci_p2p.network.libp2p import upstream\n"
        "assert sys.meta_path == finders\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'libp2p']\n"
        "import libp2p\n"
        "from libp2p.transport.quic.stream import QuicConnectionError\n"
        "assert libp2p.__spec__.loader is not None and libp2p.new_host and QuicConnectionError\n"
    )


def test_nothing_stays_behind_when_a_part_is_missing() -> None:
    run_program(
        "import sys\n"
        "finders = list(sys.meta_path)\n"
        "sys.modules['noise'] = None\n"
        "try:\n"
        "    from aci_p2p.network.libp2p import upstream\n"
        "except ImportError as error:\n"
        "    assert 'noise' in str(error)\n"
        "else:\n"
        "    sys.exit('it was found')\n"
        "assert sys.meta_path == finders\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'libp2p']\n"
    )
