"""Watches a running node, and says how it is."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, cast

import trio

from aci_p2p.control.journal import Journal
from aci_p2p.control.market import ModelSummary, read_market, summarise_market
from aci_p2p.control.process import process_figures
from aci_p2p.control.providers import find_providers
from aci_p2p.control.report import (
    LOCAL,
    BootstrapEntry,
    ClocksReport,
    JobCount,
    LogSection,
    MarketSection,
    NetworkSection,
    NodeSection,
    OfferEntry,
    PeersReport,
    ProcessSection,
    ProviderSection,
    ReachabilitySection,
    StatusReport,
    TopicSection,
)
from aci_p2p.control.server import Command
from aci_p2p.gossip import TopicStatistics
from aci_p2p.network.api import Reachability, are_local
from aci_p2p.node import Node
from aci_p2p.peer_clocks import read_peer_clocks
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.text import printable
from aci_p2p.store import JobTotal
from aci_p2p.version import VERSION

SAMPLE_S: Final = 1.0
"""Seconds between looks at the counters and at what changed."""
RATE_S: Final = 60
"""Seconds over which offers and bids are counted."""
TOTALS_S: Final = 2.0
"""Seconds for which a count of all jobs in the database is good enough."""
PAID: Final = frozenset({State.RECEIPTED, State.PENDING, State.FINAL, State.DISMISSED})
"""States of jobs whose price is the provider's."""

_CIRCUIT: Final = "/p2p-circuit"
_WHY: Final = {
    Reachability.PUBLIC: "peers have dialled back",
    Reachability.PRIVATE: "peers could not dial back: a NAT or a firewall is between",
    Reachability.UNKNOWN: "no peer has tried to dial back yet",
}

log = logging.getLogger("aci_p2p.node")


def judge_reachability(verdict: Reachability, addresses: Sequence[str]) -> tuple[str, str]:
    """Whether others can open connections to a node with these addresses (as in reports), and how it knows."""
    if are_local(addresses):
        # That others of this machine have dialled back says nothing of the rest of the world.
        return LOCAL, "it listens on this machine alone"
    return verdict.value, _WHY[verdict]


class Observer:
    """Answers what a node is asked about itself."""

    def __init__(self, node: Node, journal: Journal, config_file: Path | None) -> None:
        """`journal` keeps what is logged; `config_file` was read at the start, if any was."""
        self._node = node
        self._journal = journal
        self._config_file = config_file
        self._started = trio.current_time()
        self._samples: deque[tuple[int, int]] = deque(maxlen=RATE_S + 1)
        self._totals: list[JobTotal] = []
        self._totals_at = float("-inf")
        self.stopping = False
        """Whether the node finishes its jobs and takes no more."""

    @property
    def commands(self) -> dict[str, Command]:
        """What the control socket answers."""
        return {
            "status": lambda _: self.status(),
            "peers": lambda _: self.peers(),
            "clocks": lambda _: self.clocks(),
            "market": lambda model_root: read_market(self._node, model_root),
            "providers": lambda model_root: find_providers(self._node, model_root),
        }

    async def watch(self) -> None:
        """Count what comes each minute, and log what becomes of the node's place in the network; until cancelled."""
        network = self._node.network
        reachability, addresses, connected = self._judged(), tuple(network.addresses), bool(network.peers)
        while True:
            statistics = self._node.market.statistics()
            self._samples.append((statistics.offers_heard, statistics.bids_heard))
            if self._judged() != reachability:
                reachability = state, why = self._judged()
                log.info("reachability", extra={"fields": {"is": state, "why": why}})
            if tuple(network.addresses) != addresses:
                addresses = tuple(network.addresses)
                log.info("addresses", extra={"fields": {"are": ",".join(addresses) or "none"}})
            if bool(network.peers) is not connected:
                connected = bool(network.peers)
                # Whoever was given nobody to join waits to be found, which is no trouble.
                level = logging.WARNING if self._node.config.bootstrap and not connected else logging.INFO
                log.log(level, "connected" if connected else "no peer is left")
            await trio.sleep(SAMPLE_S)

    async def status(self) -> StatusReport:
        """Everything in short. Raises StoreError."""
        totals = await self._job_totals()
        earned = sum(total.price for total in totals if total.role is Party.PROVIDER and total.state in PAID)
        network = self._node.network
        return StatusReport(
            node=self._node_section(),
            addresses=list(network.addresses),
            listen=list(self._node.config.p2p.listen),
            reachability=self._reachability(),
            bootstrap=self._bootstrap(),
            network=self._network(),
            market=self._market(),
            provider=self._provider(),
            jobs=[
                JobCount(role=total.role.value, state=total.state.value, jobs=total.jobs, price=str(total.price))
                for total in totals
            ],
            earned=str(earned),
            process=cast("ProcessSection", asdict(process_figures())),
            log=self._log(),
        )

    async def peers(self) -> PeersReport:
        """All connections."""
        await trio.lowlevel.checkpoint()
        network = self._node.network
        members = dict(zip(("offers", "bids"), self._node.market.members(), strict=True))
        return PeersReport(
            peers=[
                {
                    "peer": str(one.peer),
                    "address": printable(one.address),
                    "direction": "out" if one.outbound else "in",
                    "relay": str(one.relay) if one.relay else None,
                    "age_s": round(one.age_s, 1),
                    "round_trip_ms": None if one.round_trip_ms is None else round(one.round_trip_ms, 2),
                    "streams": one.streams,
                    "agent": printable(one.agent),
                    "score": round(one.score, 2),
                    "topics": [name for name, peers in members.items() if one.peer in peers],
                }
                for one in network.connections()
            ]
        )

    async def book(self) -> list[ModelSummary]:
        """What providers ask, in short."""
        return await summarise_market(self._node)

    async def clocks(self) -> ClocksReport:
        """What peers say that the time is; takes seconds when some do not answer."""
        readings = await read_peer_clocks(self._node.network, self._node.clock)
        return ClocksReport(
            clocks=[
                {
                    "peer": str(reading.peer),
                    "ahead_ms": round(reading.ahead_ms, 1),
                    "round_trip_ms": round(reading.round_trip_ms, 1),
                }
                for reading in readings
            ]
        )

    def _node_section(self) -> NodeSection:
        config = self._node.config
        return NodeSection(
            id=str(self._node.node_id),
            name=config.key,
            version=VERSION,
            network=config.network,
            state="stopping" if self.stopping else "running",
            uptime_s=round(trio.current_time() - self._started, 1),
            home=str(config.home),
            config_file=str(self._config_file) if self._config_file else None,
            control_socket=str(config.control_socket_path),
        )

    def _reachability(self) -> ReachabilitySection:
        network = self._node.network
        through = [address.partition(_CIRCUIT)[0] for address in network.addresses if _CIRCUIT in address]
        relays = list(dict.fromkeys(address.rpartition("/p2p/")[2] for address in through))
        state, why = self._judged()
        return ReachabilitySection(state=state, why=why, relays=relays)

    def _judged(self) -> tuple[str, str]:
        return judge_reachability(self._node.network.reachability, self._node.network.addresses)

    def _bootstrap(self) -> list[BootstrapEntry]:
        return [
            BootstrapEntry(
                address=report.address,
                reached=report.reached,
                attempts=report.attempts,
                failures=[
                    {"address": printable(address), "error": printable(error.message)}
                    for address, error in report.failures
                ],
            )
            for report in self._node.discovery.bootstrap_report()
        ]

    def _network(self) -> NetworkSection:
        network = self._node.network
        statistics = {**asdict(network.statistics()), "known_peers": len(network.known_peers())}
        return cast("NetworkSection", {name: statistics[name] for name in NetworkSection.__annotations__})

    def _market(self) -> MarketSection:
        market = self._node.market
        statistics = market.statistics()
        offers, bids = self._samples[0] if self._samples else (statistics.offers_heard, statistics.bids_heard)
        return MarketSection(
            offers=_topic(statistics.offers, statistics.offers_heard, statistics.offers_heard - offers),
            bids=_topic(statistics.bids, statistics.bids_heard, statistics.bids_heard - bids),
            job_bids_dropped=statistics.job_bids_dropped,
            waiting_jobs=statistics.waiting_jobs,
            recent_offers=[
                OfferEntry(
                    job=heard.offer.body.job_id.hex(),
                    consumer=str(heard.offer.sender),
                    model_root=heard.offer.body.model_root.hex(),
                    max_tokens=heard.offer.body.max_tokens,
                    max_price=str(heard.offer.body.max_price),
                    heard_at_ms=heard.heard_at,
                )
                for heard in market.recent_offers()
            ],
        )

    def _provider(self) -> ProviderSection | None:
        if (serving := self._node.serving) is None:
            return None
        role = serving.role
        statistics, computing = role.statistics(), serving.executor.statistics()
        return ProviderSection(
            models=[
                {
                    "name": record.model_name,
                    "root": record.model_root.hex(),
                    "context": record.context,
                    "input_token_price": str(record.input_token_price),
                    "output_token_price": str(record.output_token_price),
                }
                for record in role.capabilities()
            ],
            slots=statistics.slots,
            free_slots=0 if statistics.draining else max(statistics.slots - statistics.running, 0),
            running=[
                {
                    "job": job.job_id.hex(),
                    "consumer": str(job.consumer),
                    "model": job.model,
                    "elapsed_s": round(job.elapsed_s, 1),
                    "tokens": job.tokens,
                    "tokens_per_s": round(job.tokens_per_s, 1),
                }
                for job in role.progress()
            ],
            bids=statistics.bids,
            outstanding_bids=statistics.outstanding,
            finished=statistics.finished,
            failed=statistics.failed,
            earned=str(statistics.earned),
            executor_waiting=computing.waiting,
            executor_tokens=computing.produced,
            executor_restarts=computing.restarts,
        )

    def _log(self) -> LogSection:
        return LogSection(
            warnings=self._journal.warnings,
            errors=self._journal.errors,
            last=[
                {"at": event.at, "level": event.level, "source": event.source, "message": event.tail()}
                for event in self._journal.troubles
            ],
        )

    async def _job_totals(self) -> list[JobTotal]:
        if trio.current_time() - self._totals_at > TOTALS_S:
            self._totals = await self._node.store.totals()
            self._totals_at = trio.current_time()
        return self._totals


def _topic(statistics: TopicStatistics, heard: int, per_minute: int) -> TopicSection:
    return cast("TopicSection", {"heard": heard, "per_minute": per_minute, **asdict(statistics)})
