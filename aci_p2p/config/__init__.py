"""What a node is told: one frozen dataclass for each part, and the flags, variables and file that fill them."""

from aci_p2p.config.node import (
    DEFAULT_INPUT_PRICE,
    DEFAULT_NETWORK,
    DEFAULT_OUTPUT_PRICE,
    DEFAULT_SLOTS,
    NodeConfig,
    ProviderConfig,
)
from aci_p2p.config.paths import default_home, make_private_folder

__all__ = [
    "DEFAULT_INPUT_PRICE",
    "DEFAULT_NETWORK",
    "DEFAULT_OUTPUT_PRICE",
    "DEFAULT_SLOTS",
    "NodeConfig",
    "ProviderConfig",
    "default_home",
    "make_private_folder",
]
