"""The seam over libp2p: TCP, Noise, yamux, gossipsub and Kademlia, in py-libp2p's wire formats.

Identity, Noise and the protobuf messages are py-libp2p's. What lies between them is ours where py-libp2p 0.8.1 lets a
peer end or starve the node; each module says what it takes the place of and why.
"""

from aci_p2p.network.libp2p.network import open_libp2p_network

__all__ = ["open_libp2p_network"]
