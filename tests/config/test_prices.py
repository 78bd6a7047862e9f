"""How a provider's prices are told: curves, bounds and regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aci_p2p.config import ProviderConfig, kinds
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.publications import PriceStep

CURVE = kinds.Curve()


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0.5:1.25,0.9:2", (PriceStep(500, 1_250), PriceStep(900, 2_000))),
        ("0.001:0 1:100", (PriceStep(1, 0), PriceStep(1_000, 100_000))),
        ("", ()),
        ("none", ()),
    ],
)
def test_curves(text: str, steps: tuple[PriceStep, ...]) -> None:
    assert CURVE.from_text(text) == steps
    assert CURVE.from_toml(text, Path()) == steps
    assert CURVE.from_text(str(CURVE.to_json(steps))) == steps


@pytest.mark.parametrize(
    "text", ["1", "0:1", "1.001:1", "0.5:100.001", "0.5:-1", "0.0005:1", "a:b", "0.5:nan", "1:1:1"]
)
def test_curves_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"steps of load:factor"):
        CURVE.from_text(text)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"price_curve": (PriceStep(500, 1_000), PriceStep(400, 1_000))}, "ascend"),
        ({"price_curve": tuple(PriceStep(load, 1_000) for load in range(1, 10))}, "at most 8 steps"),
        ({"price_floor": 10, "price_ceiling": 9}, "floor is above"),
        ({"price_floor": -1}, "floor"),
        ({"price_ceiling": 1 << 96}, "ceiling"),
        ({"price": "cheap"}, "no way to set prices"),
        ({"region": "x" * 33}, "32 bytes"),
    ],
)
def test_what_cannot_be_told_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(LocalError, match=problem):
        ProviderConfig(**changes)


def test_bounds_are_around_the_price_unless_they_are_told() -> None:
    assert ProviderConfig(output_token_price=100).price_bounds == (50, 200)
    assert ProviderConfig(output_token_price=100, price_floor=7, price_ceiling=9).price_bounds == (7, 9)
