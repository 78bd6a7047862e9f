"""What a running node takes of a changed configuration."""

from __future__ import annotations

import pytest

from aci_p2p.config import SETTINGS, Setting, apply, compare
from aci_p2p.config.settings import build
from tests.config.samples import ALL, Sample

LIVE = {
    "bootstrap",
    "log.level",
    "provider.models",
    "provider.input_token_price",
    "provider.output_token_price",
    "provider.price",
    "provider.price_floor",
    "provider.price_ceiling",
    "provider.price_curve",
    "provider.asks",
    "provider.region",
    "provider.slots",
    "provider.grace_s",
}


@pytest.mark.parametrize(("setting", "left", "right"), ALL, ids=[setting.key for setting in SETTINGS])
def test_each_change_is_taken_or_named(setting: Setting, left: Sample, right: Sample) -> None:
    old, new = build({setting.key: left.value}), build({setting.key: right.value})
    changes = compare(old, new, serving=True)
    (change,) = changes.live + changes.restart
    assert (change.setting, change.old, change.new) == (setting, left.value, right.value)
    assert str(change).startswith(f"{setting.key} {setting.kind.to_toml(left.value)} -> ")
    assert bool(changes.live) is (setting.key in LIVE)
    assert apply(old, changes) == (new if changes.live else old)
    assert changes.touch(setting.section) is bool(changes.live)


def test_a_node_that_serves_nothing_takes_no_prices() -> None:
    old, new = build({}), build({"provider.slots": 9, "log.level": "debug"})
    changes = compare(old, new, serving=False)
    assert [str(change) for change in changes.live] == ['log.level "info" -> "debug"']
    assert [str(change) for change in changes.restart] == ["provider.slots 4 -> 9"]
    assert apply(old, changes) == build({"log.level": "debug"})


def test_nothing_changed() -> None:
    changes = compare(build({}), build({}), serving=True)
    assert not changes.live
    assert not changes.restart
    unset = compare(build({}), build({"provider.threads": 3}), serving=True)
    assert [str(change) for change in unset.restart] == ["provider.threads unset -> 3"]
