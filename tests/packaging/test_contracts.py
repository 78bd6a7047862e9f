"""Each contract between the rooms fires when its rule is broken."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PLANTED = {
    "protocol/planted.py": "import sqlite3, trio\nimport aci_p2p.network\nimport cbor2",
    "dht/planted.py": "import aci_p2p.gossip\nfrom aci_p2p.network import libp2p",
    "gossip/planted.py": "import aci_p2p.network.libp2p.planted",
    "executor/planted.py": "import aci_p2p.network\nimport libp2p",
    "aci_p2p/network/planted.py": "import aci_p2p.executor",
    "aci_p2p/network/libp2p/planted.py": "import libp2p",
    "aci_p2p/unplaced.py": "",
}
"""A module's place and its text: together they break every contract."""
FOUND = (
    "aci_p2p.protocol.planted -> aci_p2p.network",
    "aci_p2p.dht.planted -> aci_p2p.gossip",
    "aci_p2p.network.planted -> aci_p2p.executor",
    "aci_p2p.unplaced",
    "aci_p2p.executor.planted -> aci_p2p.network",
    "aci_p2p.dht.planted -> aci_p2p.network.libp2p",
    "aci_p2p.gossip.planted -> aci_p2p.network.libp2p.planted",
    "aci_p2p.protocol.planted -> sqlite3",
    "aci_p2p.protocol.planted -> trio",
    "aci_p2p.executor.planted -> libp2p",
    "aci_p2p.network.libp2p.planted -> libp2p",
    "aci_p2p.protocol.planted -> cbor2",
)
"""What the report must name."""
ALLOWED = "aci_p2p.network.libp2p.upstream -> libp2p"
"""What it must not name."""


def test_every_contract_fires(root: Path, pyproject: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("aci_p2p", "protocol", "gossip", "dht", "executor"):
        shutil.copytree(root / folder, tmp_path / folder, symlinks=True)
    shutil.copy(root / "pyproject.toml", tmp_path)
    for place, text in PLANTED.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).with_name("__init__.py").touch()
        (tmp_path / place).write_text(text)

    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    broken = set(re.findall(r"^(.+) BROKEN", done.stdout, flags=re.MULTILINE))
    contracts = {contract["name"] for contract in pyproject["tool"]["importlinter"]["contracts"]}
    assert broken == contracts, done.stdout
    lines = {re.sub(r"^- +|( \(l\.\d+\))$", "", line) for line in done.stdout.splitlines()}
    assert not set(FOUND) - lines
    assert ALLOWED not in lines
