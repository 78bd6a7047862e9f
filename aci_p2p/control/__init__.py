"""The control socket: what a running node tells its user.

`observer` and `server` are the node's side; they are imported by name, so that asking stays cheap.
"""

from aci_p2p.control.client import NoNode, ask
from aci_p2p.control.journal import Event, Journal, LineFormatter
from aci_p2p.control.report import ClocksReport, PeersReport, StatusReport
from aci_p2p.control.wire import NotReady

__all__ = [
    "ClocksReport",
    "Event",
    "Journal",
    "LineFormatter",
    "NoNode",
    "NotReady",
    "PeersReport",
    "StatusReport",
    "ask",
]
