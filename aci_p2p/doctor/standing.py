"""What the doctor makes of the node's place in the network: can it be reached, and how; is its clock right."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import trio

from aci_p2p import version
from aci_p2p.clock import MS_PER_S
from aci_p2p.doctor.findings import Finding, ok, problem, warning
from aci_p2p.doctor.reaching import Probe, Standing
from aci_p2p.doctor.subject import Subject
from aci_p2p.network.api import Reachability
from aci_p2p.peer_clocks import ClockReading, median_ahead_ms, read_peer_clocks
from aci_p2p.protocol.envelope import MAX_SKEW_MS
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import SECOND

SLIGHT_SKEW_MS: Final = MAX_SKEW_MS // 3
"""Milliseconds from which on a clock is worth a warning: a drift that takes weeks to become a problem."""
MINUTES_FROM_MS: Final = 120 * SECOND
"""Milliseconds from which on a difference is given in minutes."""
PUNCHING_S: Final = 60.0
"""Seconds after which a relayed connection will not become direct any more."""

_FORWARD: Final = "forward its TCP port to this machine in the router, and name it with --announce"


async def check_reachability(subject: Subject, standing: Standing) -> list[Finding]:
    """Whether others can open connections to the node."""
    await trio.lowlevel.checkpoint()
    if not subject.config.p2p.listen:
        return [ok("reachability", "the node is told to listen nowhere; it can be a consumer")]
    return [_look_at_reachability(standing)]


def _look_at_reachability(standing: Standing) -> Finding:
    match standing.reachability:
        case _ if standing.is_local:
            return ok("reachability", "it listens on this machine alone")
        case Reachability.PUBLIC:
            return ok("reachability", "public: peers have dialled back")
        case Reachability.PRIVATE if standing.relays:
            text = "private: a NAT or a firewall is between; others come through a relay, which costs time"
            return warning("reachability", text, _FORWARD)
        case Reachability.PRIVATE:
            text = "private: a NAT or a firewall is between, and no relay helps: others cannot open connections"
            return problem("reachability", text, _FORWARD)
        case Reachability.UNKNOWN:
            return _look_at_unknown(standing)


def _look_at_unknown(standing: Standing) -> Finding:
    if not standing.can_listen:
        return ok("reachability", "unknown until the node can listen; see ports")
    if not standing.has_peers:
        return ok("reachability", "unknown: there is no peer to ask")
    text = "unknown: no peer has tried to dial back yet"
    return warning("reachability", text, "run the doctor again in a minute")


async def check_relay(subject: Subject, standing: Standing) -> list[Finding]:
    """Whether relays help a node that others cannot reach."""
    await trio.lowlevel.checkpoint()
    if standing.relays:
        names = ", ".join(standing.relays)
        return [ok("relay", f"reserved at {names}")]
    if standing.is_local:
        return [ok("relay", "none is used: it listens on this machine alone")]
    if standing.reachability is not Reachability.PRIVATE:
        why = "others can reach the node" if standing.reachability is Reachability.PUBLIC else "not known to be needed"
        return [ok("relay", f"none is used: {why}")]
    if not subject.config.p2p.relay_client:
        return [problem("relay", "one is needed, and the node may use none", "--relay-client")]
    text = "one is needed, and no peer has given a reservation"
    return [problem("relay", text, "join through a node that others can reach: it relays unless told not to")]


async def check_hole_punching(subject: Subject, standing: Standing) -> list[Finding]:
    """Whether relayed connections become direct ones."""
    if standing.reachability is Reachability.PUBLIC:
        return [ok("hole punching", "not needed: others can reach the node")]
    if not subject.config.p2p.hole_punching:
        text = "it is off: connections through relays stay there"
        if standing.reachability is Reachability.PRIVATE:
            return [warning("hole punching", text, "--hole-punching")]
        return [ok("hole punching", text)]
    if subject.status is None:
        return [ok("hole punching", "it is on; only a running node shows whether the NATs allow it")]
    connections = (await subject.peers())["peers"]
    stuck = [one for one in connections if one["relay"] and one["age_s"] > PUNCHING_S]
    if stuck:
        text = f"{len(stuck)} of {len(connections)} connections stay at a relay: the NATs between do not allow more"
        return [warning("hole punching", text, _FORWARD)]
    return [ok("hole punching", f"it is on; none of {len(connections)} connections stays at a relay")]


async def check_clock(subject: Subject, probe: Probe) -> list[Finding]:
    """Whether the machine's clock is right, as far as peers or files tell."""
    readings = await _readings(subject, probe)
    if not readings:
        return [await trio.to_thread.run_sync(_compare_with_files, subject, subject.clock(), abandon_on_cancel=True)]
    ahead = median_ahead_ms(readings)
    # What is asked takes time: no difference is known better than that.
    by = _difference(abs(ahead))
    whose = "the clock of the only peer asked" if len(readings) == 1 else f"most clocks of {len(readings)} peers"
    text = f"it is {by} {'behind' if ahead > 0 else 'ahead of'} {whose}"
    action = "set it by the network: timedatectl set-ntp true"
    if abs(ahead) > MAX_SKEW_MS:
        return [problem("clock", f"{text}: messages are refused", action)]
    if abs(ahead) > SLIGHT_SKEW_MS:
        return [warning("clock", f"{text}; from {MAX_SKEW_MS // SECOND} s on messages are refused", action)]
    return [ok("clock", f"within {by} of {whose}")]


async def _readings(subject: Subject, probe: Probe) -> list[ClockReading]:
    if subject.status is None:
        return await read_peer_clocks(probe.network, subject.clock)
    told = (await subject.clocks())["clocks"]
    return [ClockReading(NodeId.parse(entry["peer"]), entry["ahead_ms"], entry["round_trip_ms"]) for entry in told]


def _compare_with_files(subject: Subject, now: int) -> Finding:
    """Without peers: time cannot be before something that was written already."""
    config = subject.config
    written = [config.database_path, config.address_cache_path, config.keys_path, Path(version.__file__)]
    times = {path: path.stat().st_mtime * MS_PER_S for path in written if path.exists()}
    latest = max(times, key=lambda path: times[path])
    behind = times[latest] - now
    if behind > MAX_SKEW_MS:
        text = f"it is {_difference(behind)} behind the last change of {latest}"
        return problem("clock", text, "set it by the network: timedatectl set-ntp true")
    return ok("clock", "no file of this node is newer than it; there is no peer to compare it with")


def _difference(by_ms: float) -> str:
    if by_ms < SECOND:
        return f"{by_ms:.0f} ms"
    return f"{by_ms / SECOND:.1f} s" if by_ms < MINUTES_FROM_MS else f"{by_ms / SECOND / 60:.0f} min"
