"""Machines and routers of a test network: Linux network namespaces, veth pairs, bridges and nftables.

Everything is inside user, network and mount namespaces of its own, which end with the block: nothing of the machine
that runs the tests is changed, and nothing outside can be reached.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import cache
from pathlib import Path
from typing import IO

TOOLS = ("unshare", "nsenter", "ip", "nft", "mount", "sysctl")
"""Programs that a laboratory needs (Debian: util-linux, iproute2, nftables, mount, procps)."""
COMMAND_SECONDS = 20
"""Time for one of them, seconds."""


class Nat(Enum):
    """How a router treats connections from inside."""

    PORT_PRESERVING = "masquerade"
    """The outside port is the inside one where it is free: holes can be punched (endpoint-independent in effect)."""
    RANDOM_PORTS = "masquerade fully-random"
    """Each connection gets an unforeseeable port: no hole can be punched."""


class Laboratory:
    """A network of namespaces. Made only by `open_laboratory`."""

    def __init__(self, holder: int) -> None:
        """`holder` is the process whose namespaces surround the laboratory."""
        self._enter = ("nsenter", f"--target={holder}", "--user", "--net", "--mount", "--preserve-credentials")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._cables = 0
        self.run("mount", "-t", "tmpfs", "tmpfs", "/run")

    def run(self, *command: str, machine: str | None = None, text: str | None = None) -> str:
        """Run a command to its end, on a machine or around all of them; returns its output, fails as it fails."""
        done = subprocess.run(
            [*self._enter, *_on(machine), *command],
            input=text,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode:
            msg = f"{' '.join(command)} failed: {done.stderr.strip()}"
            raise RuntimeError(msg)
        return done.stdout

    def start(
        self,
        machine: str,
        *command: str,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program on a machine; its pid is the program's own. It is killed at the end of the laboratory."""
        process = subprocess.Popen(
            [*self._enter, *_on(machine), *command], env=env, stdin=stdin, stdout=stdout, stderr=stderr
        )
        self._processes.append(process)
        return process

    def add_machine(self, name: str) -> None:
        """A machine with nothing but loopback."""
        self.run("ip", "netns", "add", name)
        self.run("ip", "link", "set", "lo", "up", machine=name)

    def add_segment(self, name: str) -> None:
        """A segment (bridge) to which machines can be attached; the name has at most 15 characters."""
        self.run("ip", "link", "add", name, "type", "bridge")
        self.run("ip", "link", "set", name, "up")

    def attach(self, machine: str, segment: str, address: str, *, gateway: str | None = None) -> None:
        """Connect a machine to a segment with an address such as `10.0.0.1/24`; the interface is named as the segment.

        What is not local goes to `gateway`, if there is one.
        """
        self._cables += 1
        cable = f"cable{self._cables}"
        self.run("ip", "link", "add", cable, "type", "veth", "peer", "name", segment, "netns", machine)
        self.run("ip", "link", "set", cable, "master", segment, "up")
        self.run("ip", "address", "add", address, "dev", segment, *_quick(address), machine=machine)
        self.run("ip", "link", "set", segment, "up", machine=machine)
        if gateway is not None:
            self.run("ip", "route", "add", "default", "via", gateway, machine=machine)

    def add_router(self, name: str, outside: tuple[str, str], inside: tuple[str, str], nat: Nat) -> None:
        """A machine that translates between two segments, each given with the router's address there.

        From outside nothing gets in but answers.
        """
        self.add_machine(name)
        for segment, address in (outside, inside):
            self.attach(name, segment, address)
        self.run("sysctl", "-qw", "net.ipv4.ip_forward=1", machine=name)
        rules = f"""
        table ip nat {{
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                oifname "{outside[0]}" {nat.value};
            }}
        }}
        table ip filter {{
            chain forward {{
                type filter hook forward priority filter; policy drop;
                ct state established,related accept;
                iifname "{inside[0]}" oifname "{outside[0]}" accept;
            }}
            chain input {{
                type filter hook input priority filter; policy drop;
                ct state established,related accept;
                iifname "{inside[0]}" accept;
            }}
        }}
        """
        self.run("nft", "-f", "-", machine=name, text=rules)

    def replace_file(self, target: str, source: Path) -> None:
        """Let all machines see `source` in the place of a file that exists, such as `/etc/hosts`."""
        self.run("mount", "--bind", str(source), target)

    def set_link(self, machine: str, segment: str, *, up: bool) -> None:
        """Plug a machine's cable to a segment in, or pull it (its routes go with it)."""
        self.run("ip", "link", "set", segment, "up" if up else "down", machine=machine)

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            # Waits for it and closes what we hold of its pipes.
            process.__exit__(None, None, None)


def _on(machine: str | None) -> tuple[str, ...]:
    return () if machine is None else ("ip", "netns", "exec", machine)


def _quick(address: str) -> tuple[str, ...]:
    """IPv6 addresses are usable at once, without duplicate detection."""
    return ("nodad",) if ":" in address else ()


@contextmanager
def open_laboratory() -> Generator[Laboratory]:
    """An empty laboratory for the block. Raises RuntimeError or OSError where the system does not allow it."""
    # `cat` runs until we close its input; it says so when its namespaces are there.
    holder = subprocess.Popen(
        ["unshare", "--map-root-user", "--net", "--mount", "sh", "-c", "echo ready && exec cat"],  # noqa: S607 - on PATH
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != b"ready\n":
            msg = f"unshare failed: {holder.stderr.read().decode().strip()}"
            raise RuntimeError(msg)
        laboratory = Laboratory(holder.pid)
        try:
            yield laboratory
        finally:
            laboratory.close()
            holder.stdin.close()


@cache
def why_unavailable() -> str | None:
    """Why this system cannot run a laboratory; None when it can: tried once, with all that the tests need."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"missing programs: {', '.join(missing)}"
    try:
        with open_laboratory() as laboratory:
            laboratory.add_segment("outside")
            laboratory.add_segment("inside")
            laboratory.add_router("router", ("outside", "11.0.0.1/24"), ("inside", "10.0.0.1/24"), Nat.RANDOM_PORTS)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None
