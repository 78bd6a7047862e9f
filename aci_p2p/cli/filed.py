"""Jobs that are filed in the home's database, as the commands `jobs` and `why` read them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from aci_p2p.config import NodeConfig
from aci_p2p.protocol.catalogue import CATALOGUE
from aci_p2p.protocol.envelope import Envelope, header_of, open_envelope
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.lifecycle import State
from aci_p2p.protocol.messages import Receipt
from aci_p2p.store import FiledJob, open_archive

if TYPE_CHECKING:
    from aci_p2p.protocol.terms import Price

_PREFIX: Final = re.compile(r"[0-9a-fA-F]{1,64}")


def find(config: NodeConfig, prefix: str) -> list[tuple[FiledJob, list[tuple[State, int]]]]:
    """The job whose id begins with `prefix`, in each role that we had in it, with its transitions.

    Raises LocalError when there is none, or more than one; StoreError.
    """
    if not _PREFIX.fullmatch(prefix):
        msg = f"{prefix!r} is no job id, nor the beginning of one"
        raise LocalError(msg, hint="aci-p2p jobs lists them")
    with open_archive(config.database_path) as archive:
        found = [(filed, archive.history(filed)) for filed in archive.find(prefix)]
    ids = sorted({filed.job.job_id.hex() for filed, _ in found})
    if not ids:
        msg = f"there is no job {prefix}"
        raise LocalError(msg, hint="aci-p2p jobs lists them")
    if len(ids) > 1:
        msg = f"{prefix} is the beginning of several jobs: {', '.join(one[:16] for one in ids)}"
        raise LocalError(msg, hint="give more of the id")
    return found


def receipt_of(filed: FiledJob) -> Envelope[Receipt] | None:
    """The receipt of a job, its signature checked; None before there is one. Raises MessageRefused."""
    data = filed.job.receipt
    return open_envelope(data, Receipt, network=header_of(data).network, now=None) if data else None


def moment(at: int) -> str:
    """Unix milliseconds as people write them, UTC."""
    return datetime.fromtimestamp(at / 1_000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def short_model(root: bytes) -> str:
    """A model by its catalogue name, else by the beginning of its root."""
    return next((model.name for model in CATALOGUE.values() if model.root == root), root.hex()[:16])


def items(price: Price) -> dict[str, str]:
    """A price item by item, base units in decimal."""
    return {
        "compute_base_units": str(price.compute),
        "licence_base_units": str(price.licence),
        "verification_base_units": str(price.verification),
        "priority_base_units": str(price.priority),
    }
