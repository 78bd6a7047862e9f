"""What a running node says of itself: the documents of `aci-p2p status --json` and `aci-p2p peers --json`.

Times are Unix milliseconds, amounts are base units (10^-18 ACI) as decimal text, since they go beyond what JSON's
readers count exactly.
"""

from __future__ import annotations

from typing import Final, TypedDict

LOCAL: Final = "local"
"""State of the reachability of a node that only its own machine can reach."""


class NodeSection(TypedDict):
    """Which node, and what it was told."""

    id: str
    name: str
    """Of its key."""
    version: str
    network: str
    state: str
    """`running`, or `stopping` once it finishes its jobs and takes no more."""
    uptime_s: float
    home: str
    config_file: str | None
    """None: no file was read."""
    control_socket: str


class ReachabilitySection(TypedDict):
    """Whether others can open connections to the node."""

    state: str
    """`public`, `private`, `unknown` or LOCAL."""
    why: str
    relays: list[str]
    """Peer ids of the relays through which it can be reached."""


class BootstrapFailure(TypedDict):
    """An attempt in vain."""

    address: str
    error: str


class BootstrapEntry(TypedDict):
    """A bootstrap address."""

    address: str
    reached: bool | None
    """None: not tried to the end yet."""
    attempts: int
    """Failed ones in a row."""
    failures: list[BootstrapFailure]


class NetworkSection(TypedDict):
    """Connections and gossip. The counters begin at the start of the node."""

    peers: int
    inbound: int
    outbound: int
    relayed: int
    relays: int
    reservations: int
    circuits: int
    holes_punched: int
    holes_failed: int
    known_peers: int
    streams: int
    trimmed: int
    banned: int
    handshakes: int
    handshakes_refused: int
    dials: int
    dial_failures: int
    handler_failures: int
    gossip_accepted: int
    gossip_refused: dict[str, int]
    gossip_dropped: int


class TopicSection(TypedDict):
    """One topic of the market."""

    heard: int
    per_minute: int
    """Heard in the last minute."""
    waiting: int
    dropped: int
    log_messages: int
    log_bytes: int
    exchanges: int
    failed_exchanges: int
    caught_up: int
    served: int


class OfferEntry(TypedDict):
    """An offer heard lately."""

    job: str
    consumer: str
    model_root: str
    max_tokens: int
    max_price: str
    heard_at_ms: int


class MarketSection(TypedDict):
    """Offers and bids."""

    offers: TopicSection
    bids: TopicSection
    job_bids_dropped: int
    waiting_jobs: int
    recent_offers: list[OfferEntry]
    """The latest first."""


class ModelEntry(TypedDict):
    """A model that is served."""

    name: str
    root: str
    context: int
    input_token_price: str
    output_token_price: str


class RunningJob(TypedDict):
    """A job that is being run."""

    job: str
    consumer: str
    model: str
    elapsed_s: float
    tokens: int
    tokens_per_s: float


class ProviderSection(TypedDict):
    """What a provider does. The counters begin at the start of the node."""

    models: list[ModelEntry]
    slots: int
    free_slots: int
    running: list[RunningJob]
    bids: int
    outstanding_bids: int
    finished: int
    failed: int
    earned: str
    executor_waiting: int
    executor_tokens: int
    executor_restarts: int


class JobCount(TypedDict):
    """Jobs in the node's database that stand in one state."""

    role: str
    """`provider` or `consumer`."""
    state: str
    jobs: int
    price: str


class ProcessSection(TypedDict):
    """What the node takes of the machine."""

    pid: int
    memory_bytes: int
    peak_memory_bytes: int
    file_descriptors: int | None
    """None: not known."""
    file_descriptor_limit: int
    threads: int
    tasks: int
    cpu_s: float


class LogEntry(TypedDict):
    """A warning or an error."""

    at: str
    level: str
    source: str
    message: str


class LogSection(TypedDict):
    """What went wrong lately."""

    warnings: int
    errors: int
    last: list[LogEntry]
    """The latest last."""


class StatusReport(TypedDict):
    """The answer to `status`."""

    node: NodeSection
    addresses: list[str]
    listen: list[str]
    """As the node was told."""
    reachability: ReachabilitySection
    bootstrap: list[BootstrapEntry]
    network: NetworkSection
    market: MarketSection
    provider: ProviderSection | None
    """None: it serves nothing."""
    jobs: list[JobCount]
    earned: str
    """With all jobs in the database that are paid."""
    process: ProcessSection
    log: LogSection


class PeerEntry(TypedDict):
    """A connection."""

    peer: str
    address: str
    direction: str
    """`in` or `out`."""
    relay: str | None
    age_s: float
    round_trip_ms: float | None
    streams: int
    agent: str
    score: float
    topics: list[str]
    """Of `offers` and `bids`, those that the peer has joined."""


class PeersReport(TypedDict):
    """The answer to `peers`."""

    peers: list[PeerEntry]
    """The oldest connection first."""


class ClockEntry(TypedDict):
    """What a peer says that the time is."""

    peer: str
    ahead_ms: float
    """How far its clock is ahead of the node's."""
    round_trip_ms: float


class ClocksReport(TypedDict):
    """The answer to `clocks`."""

    clocks: list[ClockEntry]
