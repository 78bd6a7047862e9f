"""What a node is told: one frozen dataclass for each part, and the flags, variables and file that fill them."""

from aci_p2p.config.changes import Change, Changes, apply, compare
from aci_p2p.config.node import (
    DEFAULT_BID_WINDOW_MS,
    DEFAULT_BUSY_WAIT_MS,
    DEFAULT_INPUT_PRICE,
    DEFAULT_LATENCY_VALUE,
    DEFAULT_MAX_TOKENS,
    DEFAULT_NETWORK,
    DEFAULT_OUTPUT_PRICE,
    DEFAULT_PROVIDERS,
    DEFAULT_RETRY_COST,
    DEFAULT_SLOTS,
    ClientConfig,
    LogConfig,
    NodeConfig,
    ProviderConfig,
    parse_stakes,
)
from aci_p2p.config.paths import default_home, make_private_folder
from aci_p2p.config.settings import SETTINGS, Config, Setting, default_config
from aci_p2p.config.sources import ConfigError, Loaded, Origin, load, unknown_variables

__all__ = [
    "DEFAULT_BID_WINDOW_MS",
    "DEFAULT_BUSY_WAIT_MS",
    "DEFAULT_INPUT_PRICE",
    "DEFAULT_LATENCY_VALUE",
    "DEFAULT_MAX_TOKENS",
    "DEFAULT_NETWORK",
    "DEFAULT_OUTPUT_PRICE",
    "DEFAULT_PROVIDERS",
    "DEFAULT_RETRY_COST",
    "DEFAULT_SLOTS",
    "SETTINGS",
    "Change",
    "Changes",
    "ClientConfig",
    "Config",
    "ConfigError",
    "Loaded",
    "LogConfig",
    "NodeConfig",
    "Origin",
    "ProviderConfig",
    "Setting",
    "apply",
    "compare",
    "default_config",
    "default_home",
    "load",
    "make_private_folder",
    "parse_stakes",
    "unknown_variables",
]
