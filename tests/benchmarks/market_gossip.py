"""What gossip of the market costs a node, by the number of nodes, for `market.py`: pacers simulated, the rest computed.

Assumed: PROVIDERS of the nodes serve a model each, of MODELS that do not become more with the nodes, so that topics
become crowded; every node takes part in TOPICS of them; every node offers a job each JOB_S seconds, BROADCASTS of which
no ask answers. What is broadcast is computed for as many models as nodes demand, too: one for NODES_PER_MODEL. Every
message goes once to each mesh neighbour but the one that it came from, and its id to some others.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from random import Random
from typing import Final

from aci_p2p.network.delivery import message_id
from aci_p2p.network.libp2p.router import DEGREE, DEGREE_LAZY, HISTORY_GOSSIP
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.hashing import digest
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.messages import MAX_BIDS, Bid, Offer
from aci_p2p.protocol.pacing import LIFETIME_MS, AskPacer
from aci_p2p.protocol.publications import Ask, Engine
from aci_p2p.protocol.terms import Verification

SIZES: Final = (1_000, 10_000, 100_000, 1_000_000)
"""Nodes of the networks."""
PROVIDERS: Final = 0.3
"""Share of the nodes that serve a model."""
MODELS: Final = 64
"""Models with topics of their own."""
NODES_PER_MODEL: Final = 1_000
"""Where the models become more with the nodes."""
TOPICS: Final = 3
"""Of them that a node takes part in: it serves one or asks for some."""
JOB_S: Final = 300.0
"""Seconds between two jobs of a node."""
BROADCASTS: Final = 0.01
"""Share of the jobs that are broadcast: rare models, first contacts."""
SETTLED_S: Final = 240
"""After all providers of a topic have started at once, and before asks are counted, seconds."""
COUNTED_S: Final = 360
"""For which they are counted, seconds."""
FRAMING_BYTES: Final = 48
"""Of protobuf, yamux and Noise around a message and its topic's name."""
MS_PER_S: Final = 1_000
NOW: Final = 1_750_000_000_000
"""Unix milliseconds at which the messages are made whose bytes are counted."""
ADDRESS: Final = "/ip4/203.0.113.17/tcp/9400"
"""Where providers say they are."""
ROOT: Final = digest("benchmark", b"model")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a network of one size."""

    providers_per_model: int
    """Who share a topic of asks, beside those that listen."""
    asks_per_second: float
    """On one such topic."""
    asks_bytes: int
    """Bytes per second that a node sends for the asks of all its topics; as many come."""
    broadcast_bytes: int
    """Bytes per second that a node sends for the offers for all its models and for the bids; as many come."""
    more_models_bytes: int
    """The same where the models become more with the nodes."""


def cost(nodes: int) -> Cost:
    """What a node spends in a network of so many."""
    providers = max(round(PROVIDERS * nodes / MODELS), 1)
    rate = asks_per_second(providers)
    asks = TOPICS * rate * _sent(_messages()[0], f"/aci/aci-main/asks/{ROOT.hex()}/1")
    broadcasts = [round(_broadcasts(nodes, models)) for models in (MODELS, max(nodes // NODES_PER_MODEL, 1))]
    return Cost(providers, round(rate, 2), round(asks), *broadcasts)


def _broadcasts(nodes: int, models: int) -> float:
    """Bytes per second that a node sends for offers and bids."""
    _, offer, bid = _messages()
    bids = min(max(round(PROVIDERS * nodes / models), 1), MAX_BIDS)
    job = _sent(offer, f"/aci/aci-main/offers/{ROOT.hex()}/1") + bids * _sent(bid, f"/aci/aci-main/bids/{ROOT.hex()}/1")
    return TOPICS * BROADCASTS * nodes / models / JOB_S * job


def asks_per_second(providers: int) -> float:
    """Asks on a topic whose providers all hear each other at once, when their rate has settled."""
    random = Random(1)  # noqa: S311 - is to repeat
    pacers = [AskPacer(random, 0) for _ in range(providers)]
    heard = [0] * providers
    said = counted = 0
    live: deque[tuple[int, int]] = deque()
    last: dict[int, int] = {}
    looks = [(0, number) for number in range(providers)]
    ask = _ask()
    while looks[0][0] < (SETTLED_S + COUNTED_S) * MS_PER_S:
        now, number = heapq.heappop(looks)
        while live and live[0][0] <= now - LIFETIME_MS:
            at, gone = live.popleft()
            if last.get(gone) == at:
                del last[gone]
        pacer = pacers[number]
        pacer.observe(said - heard[number], len(last) - (number in last), now)
        if pacer.is_due(ask, now):
            pacer.published(ask, now)
            said += 1
            counted += now >= SETTLED_S * MS_PER_S
            live.append((now, number))
            last[number] = now
        heard[number] = said
        heapq.heappush(looks, (max(pacer.next_look(ask, now), now + 1), number))
    return counted / COUNTED_S


def _sent(message: Envelope[Ask] | Envelope[Offer] | Envelope[Bid], topic: str) -> int:
    """Bytes that a node sends for a message on average, itself or for others."""
    announced = DEGREE_LAZY * HISTORY_GOSSIP * len(message_id(topic, message.data))
    return (DEGREE - 1) * (len(message.data) + len(topic) + FRAMING_BYTES) + announced


def _ask() -> Ask:
    return Ask(
        model_root=ROOT,
        model_name="smollm2-135m-instruct",
        engine=Engine("aci-numpy/0.1.0", "fp32-ref", "cpu", "none"),
        context=8_192,
        input_token_price=250,
        output_token_price=1_000,
        price_curve=(),
        slots=4,
        free_slots=4,
        latency_ms=300,
        region="eu-west",
        addresses=(ADDRESS,),
    )


def _messages() -> tuple[Envelope[Ask], Envelope[Offer], Envelope[Bid]]:
    """One of each that gossip carries."""
    sealer, some = Sealer(KeyPair(bytes(32)), "aci-main"), digest("benchmark", b"anything")
    offer = Offer(
        job_id=some,
        model_root=ROOT,
        input_commitment=some,
        nonce_commitment=some,
        input_bytes=512,
        input_turns=1,
        max_tokens=256,
        temperature_milli=0,
        max_price=10**18,
        max_latency_ms=10_000,
        bid_deadline=NOW + MS_PER_S,
        verification=Verification.OPTIMISTIC,
        priority_fee=0,
    )
    bid = Bid(
        job_id=some,
        offer_digest=some,
        model_root=ROOT,
        input_token_price=250,
        output_token_price=1_000,
        latency_ms=300,
        addresses=(ADDRESS,),
        quantisation="none",
        region="eu-west",
    )
    return sealer.seal(_ask(), NOW), sealer.seal(offer, NOW), sealer.seal(bid, NOW)
