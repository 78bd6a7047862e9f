"""What one endpoint accepts from its peers, whatever the transport."""

from __future__ import annotations

from aci_p2p.protocol.messages import RECORD_LIFETIME_MS, SECOND

MAX_STREAMS_PER_PEER = 64
"""Inbound streams served at once for one peer: a consumer holds one a job, a validator a few."""
MAX_STREAMS_TO_PEER = 48
"""Streams of one protocol that we have open to one peer: others, first of all the network's own, have room beside them
within MAX_STREAMS_PER_PEER, and so have those of which the peer has not seen the end."""
MAX_STREAMS = 1024
"""Inbound streams served at once in all: each holds a task and a receive window."""
MAX_REJECTS_PER_MINUTE = 16
"""REJECTed gossip messages that a forwarder may send us in a minute before it is disconnected. An honest node forwards
none that it judges as we do; the slack is for versions and clocks that differ a little."""
REJECT_WINDOW_SECONDS = 60.0
"""Over which REJECTs are counted, seconds."""
SEEN_SECONDS = 120.0
"""How long a gossip message is remembered as seen, seconds (gossipsub's usual value): longer than it can circulate."""
MAX_SEEN = 65_536
"""Gossip messages remembered as seen: 120 s of 500 messages a second."""
MAX_KNOWN_PEERS = 4096
"""Peers whose addresses are remembered; the oldest are forgotten first."""
MAX_ADDRESSES_PER_PEER = 8
"""Addresses remembered for one peer; the newest are kept."""
RECORD_SECONDS = RECORD_LIFETIME_MS / SECOND
"""How long a DHT value is kept, seconds: as long as the signed records in it hold."""
PROVIDER_SECONDS = RECORD_SECONDS
"""How long an announcement that somebody provides a key is kept, seconds: as long as the provider's signed record."""
MAX_TOPICS_PER_PEER = 192
"""Topics that one neighbour may subscribe to: three for each model that it serves or follows."""
MAX_TOPIC_BYTES = 128
"""Longest topic name, bytes."""
