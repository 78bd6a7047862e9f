"""A running node as its control socket describes it, for tests of what is shown."""

from __future__ import annotations

import copy
from typing import Final

from aci_p2p.cli.screen import View
from aci_p2p.control import Event, StatusReport
from aci_p2p.control.market import ModelSummary
from aci_p2p.control.report import PeerEntry, TopicSection
from aci_p2p.protocol.catalogue import CATALOGUE, DEFAULT_MODEL
from aci_p2p.protocol.identity import KeyPair

NODE: Final = str(KeyPair(bytes([1]) * 32).node_id)
CONSUMER: Final = str(KeyPair(bytes([2]) * 32).node_id)
NOW: Final = 1_800_000_000_000
HOSTILE: Final = "\x1b[2J\x07\u202eliam\n\r[red]x[/red] :smile:"
"""What a peer could send to a terminal."""
TOPIC: Final[TopicSection] = {
    "heard": 120, "per_minute": 12, "waiting": 0, "dropped": 1, "log_messages": 4, "log_bytes": 2_000, "exchanges": 9,
    "failed_exchanges": 0, "caught_up": 2, "served": 3,
}  # fmt: skip

_STATUS: Final[StatusReport] = {
    "node": {
        "id": NODE, "name": "node", "version": "0.1.0", "network": "aci-test", "state": "running",
        "uptime_s": 273_845.0, "home": "/var/lib/aci", "config_file": None, "control_socket": "/run/aci/node.sock",
    },
    "addresses": [f"/ip4/192.0.2.1/tcp/9400/p2p/{NODE}", f"/ip4/127.0.0.1/tcp/9400/p2p/{NODE}"],
    "listen": ["/ip4/0.0.0.0/tcp/9400"],
    "reachability": {"state": "private", "why": "peers could not dial back", "relays": [CONSUMER]},
    "bootstrap": [
        {"address": "/dns4/boot.aci/tcp/9400", "reached": True, "attempts": 0, "failures": []},
        {
            "address": "/ip4/192.0.2.9/tcp/9400", "reached": False, "attempts": 3,
            "failures": [{"address": "/ip4/192.0.2.9/tcp/9400", "error": "connection refused"}],
        },
    ],
    "network": {
        "peers": 7, "inbound": 3, "outbound": 5, "relayed": 1, "relays": 1, "reservations": 2, "circuits": 1,
        "holes_punched": 3, "holes_failed": 1, "known_peers": 40, "streams": 14, "trimmed": 2,
        "banned": 1, "handshakes": 0, "handshakes_refused": 0, "dials": 30, "dial_failures": 4, "handler_failures": 0,
        "gossip_accepted": 900, "gossip_refused": {"expired": 3}, "gossip_dropped": 0,
    },
    "market": {
        "offers": TOPIC, "bids": TOPIC, "job_bids_dropped": 0, "waiting_jobs": 0,
        "recent_offers": [
            {
                "job": f"{number:064x}", "consumer": CONSUMER, "model_root": CATALOGUE[DEFAULT_MODEL].root.hex(),
                "max_tokens": 160, "max_price": str(10**18), "heard_at_ms": NOW - number * 1_000,
            }
            for number in range(16)
        ],
    },
    "provider": {
        "models": [
            {
                "name": "smollm2", "root": "00" * 32, "context": 8_192, "input_token_price": str(10**12),
                "output_token_price": str(4 * 10**12),
            }
        ],
        "slots": 4, "free_slots": 3,
        "running": [
            {
                "job": "7f4b5ff3" * 8, "consumer": CONSUMER, "model": "smollm2", "elapsed_s": 4.2, "tokens": 67,
                "tokens_per_s": 22.8,
            }
        ],
        "bids": 15, "outstanding_bids": 2, "finished": 31, "failed": 2, "earned": str(123 * 10**14),
        "executor_waiting": 0, "executor_tokens": 2_000, "executor_restarts": 0,
    },
    "jobs": [
        {"role": "provider", "state": "final", "jobs": 120, "price": str(10**18)},
        {"role": "provider", "state": "provider_fault", "jobs": 2, "price": "0"},
    ],
    "earned": str(10**18),
    "process": {
        "pid": 4_242, "memory_bytes": 120 << 20, "peak_memory_bytes": 130 << 20, "file_descriptors": 34,
        "file_descriptor_limit": 1_024, "threads": 5, "tasks": 41, "cpu_s": 12.5,
    },
    "log": {
        "warnings": 2, "errors": 0,
        "last": [{"at": "2026-11-24T18:57:30.123Z", "level": "warning", "source": "node", "message": "no peer"}],
    },
}  # fmt: skip

_PEER: Final[PeerEntry] = {
    "peer": CONSUMER, "address": f"/ip4/192.0.2.7/tcp/50412/p2p/{CONSUMER}", "direction": "in", "relay": None,
    "age_s": 71.0, "round_trip_ms": 12.34, "streams": 2, "agent": "aci-p2p/0.1.0", "score": 1.25,
    "topics": ["offers", "bids"],
}  # fmt: skip


def status() -> StatusReport:
    """A provider behind a NAT, with a job running; a copy of its own."""
    return copy.deepcopy(_STATUS)


def peer(number: int = 0, **changes: object) -> PeerEntry:
    """A connection; the higher the number, the older."""
    entry = copy.deepcopy(_PEER)
    entry["age_s"] += number
    entry.update(changes)  # type: ignore[typeddict-item]  # pyright: ignore[reportCallIssue, reportArgumentType]
    return entry


def book() -> list[ModelSummary]:
    """The default model, and others that fewer serve."""
    others = [ModelSummary(f"{number:02x}" * 32, 1, 10**12, 1, 0) for number in range(9)]
    return [*others, ModelSummary(CATALOGUE[DEFAULT_MODEL].root.hex(), 2, 4 * 10**12, 8, 3)]


def view() -> View:
    """All that there is to show."""
    events = tuple(Event("2026-11-24T18:57:30.123Z", "info", "node", f"event {number}", {}) for number in range(100))
    return View(status(), tuple(peer(number) for number in range(30)), book(), events, NOW)
