"""Every setting works by flag, variable and file, with that precedence, and nothing else is a setting."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from aci_p2p.cli.options import Given, configured
from aci_p2p.config import (
    SETTINGS,
    ClientConfig,
    Config,
    NodeConfig,
    ProviderConfig,
    Setting,
    default_config,
    kinds,
    load,
    parse_stakes,
)
from aci_p2p.config.settings import build, fields_without_setting
from aci_p2p.network import NetworkConfig
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.pricing import ONE_ACI
from tests.config.samples import ALL, Sample

PEER = str(KeyPair(bytes(32)).node_id)
IDS = [setting.key for setting in SETTINGS]


def given_by(arguments: list[str]) -> Given:
    """What the options of the command line make of its arguments."""
    found: list[Given] = []

    @click.command()
    @configured("*")
    def command(given: Given) -> None:
        found.append(given)

    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


def test_every_field_has_a_setting() -> None:
    assert fields_without_setting() == []


def test_names_are_unique_and_follow_the_key() -> None:
    flags = [name for setting in SETTINGS for name in re.split("[ /]", setting.flag)]
    assert len(set(flags)) == len(flags)
    assert all(re.fullmatch("--[a-z][a-z0-9-]+|-[a-z]", flag) for flag in flags)
    assert len({setting.variable for setting in SETTINGS}) == len(SETTINGS)
    assert len({setting.key for setting in SETTINGS}) == len(SETTINGS)
    slots = next(setting for setting in SETTINGS if setting.key == "provider.slots")
    assert (slots.section, slots.name, slots.variable) == ("provider", "slots", "ACI_PROVIDER_SLOTS")


@pytest.mark.parametrize(("setting", "left", "right"), ALL, ids=IDS)
def test_flag_before_variable_before_file_before_default(
    setting: Setting, left: Sample, right: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def effective(*arguments: str) -> tuple[object, str]:
        loaded = given_by(list(arguments)).load()
        return setting.of(loaded.config), str(loaded.origins[setting.key])

    default = setting.of(default_config())
    assert effective() == (default, "default")
    assert left.value != right.value
    assert default != left.value or default != right.value
    file = tmp_path / "some.toml"
    file.write_text(f"\n# A comment.\n{left.line}")
    monkeypatch.setenv("ACI_CONFIG", str(file))
    line = 4 if setting.section else 3
    assert effective() == (left.value, f"{file}:{line}")
    monkeypatch.setenv(setting.variable, right.text)
    assert effective() == (right.value, setting.variable)
    assert effective(*left.flags) == (left.value, re.split("[ /]", setting.flag)[0])
    # Empty counts as unset.
    monkeypatch.setenv(setting.variable, "")
    assert effective()[0] == left.value


@pytest.mark.parametrize(("setting", "left", "right"), ALL, ids=IDS)
def test_what_is_written_is_read_again(setting: Setting, left: Sample, right: Sample, tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    for sample in (left, right):
        file.write_text(sample.line)
        assert setting.of(load(file=file).config) == sample.value


def test_a_configuration_is_built_of_its_values() -> None:
    values = {setting.key: left.value for setting, left, _ in ALL}
    config = build(values)
    assert {setting.key: setting.of(config) for setting in SETTINGS} == values
    assert build({}) == default_config()


def test_the_defaults_of_a_node_that_serves() -> None:
    node = default_config().node
    assert node.p2p.listen == ("/ip4/0.0.0.0/tcp/9400",)
    assert node.own_key
    assert node.key == "node"
    assert node.provider is not None
    assert node.provider.serve


def test_a_client_neither_listens_nor_serves() -> None:
    node = replace(
        default_config().node,
        home=Path("/h"), network="aci-x", bootstrap=("/a",), model_store=Path("/m"), state=Path("/s"),
        runtime=Path("/r"), offline=True,
        p2p=NetworkConfig(listen=("/b",), relay_client=False, hole_punching=False, mdns=True, low_water=3),
    )  # fmt: skip
    assert Config(node).client_node == NodeConfig(
        home=Path("/h"), network="aci-x", bootstrap=("/a",), model_store=Path("/m"), state=Path("/s"),
        runtime=Path("/r"), offline=True,
        p2p=NetworkConfig(listen=(), relay_server=False, relay_client=False, hole_punching=False, mdns=True),
    )  # fmt: skip


def test_lists_can_be_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.toml"
    file.write_text('[p2p]\nlisten = ["/ip4/127.0.0.1/tcp/1"]\n[provider]\nthreads = 3\n')
    monkeypatch.setenv("ACI_CONFIG", str(file))
    assert given_by(["--listen", "none"]).load().config.node.p2p.listen == ()
    monkeypatch.setenv("ACI_P2P_LISTEN", "none")
    monkeypatch.setenv("ACI_PROVIDER_THREADS", "none")
    node = load().config.node
    assert node.p2p.listen == ()
    assert node.provider is not None
    assert node.provider.threads is None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (kinds.Whole(), "1.5"),
        (kinds.Whole(), ""),
        (kinds.Whole(), "²"),
        (kinds.Number(), "x"),
        (kinds.Amount(), "cheap"),
        (kinds.Amount(), "-1"),
        (kinds.Switch(), "maybe"),
        (kinds.Folder(), ""),
        (kinds.Choice("a", "b"), "c"),
        (kinds.Optional(kinds.Whole()), "x"),
    ],
)
def test_text_of_another_kind_is_refused(kind: kinds.Kind, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(kind.name)):
        kind.from_text(text)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (kinds.Text(), 1),
        (kinds.Whole(), "1"),
        (kinds.Whole(), True),
        (kinds.Number(), "1"),
        (kinds.Number(), True),
        (kinds.Amount(), True),
        (kinds.Amount(), ["1"]),
        (kinds.Switch(), 1),
        (kinds.Switch(), "true"),
        (kinds.Folder(), 1),
        (kinds.Folder(), "a\0b"),
        (kinds.Texts(), "a"),
        (kinds.Texts(), ["a", 1]),
        (kinds.Choice("a", "b"), "A"),
        (kinds.Optional(kinds.Whole()), "none"),
    ],
)
def test_values_of_another_type_are_refused(kind: kinds.Kind, value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(kind.name)):
        kind.from_toml(value, Path("/"))


def test_amounts_are_exact_however_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    for text, units in (("0.000000000000000001", 1), ('"0.1"', 10**17), ("1e-6", 10**12), ("3", 3 * 10**18)):
        file.write_text(f"client.max_price = {text}\n")
        assert load(file=file).config.client.max_price == units


def test_words_of_a_switch_and_text_with_escapes() -> None:
    for text in ("1", "True", "yes", "ON"):
        assert kinds.Switch().from_text(text) is True
    for text in ("0", "false", "No", "off"):
        assert kinds.Switch().from_text(text) is False
    assert kinds.Choice("debug").from_text("DEBUG") == "debug"
    assert kinds.Texts().from_text(" a, b\tc ") == ("a", "b", "c")


def test_the_readme_names_settings_that_there_are() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    rows = re.findall(r"\| `([^`]+)`(?: below `\[([^`]+)\]`)? \| `(ACI_[^`]+)` \| `(--[^`]+)` \|", text)
    assert len(rows) >= 6
    for line, section, variable, flag in rows:
        setting = next(setting for setting in SETTINGS if setting.variable == variable)
        assert line.startswith(f"{setting.name} = ")
        assert setting.section == section
        assert setting.flag.split()[0] == flag


def test_stakes_are_read_as_a_table() -> None:
    one, other = (KeyPair(bytes([number]) * 32).node_id for number in (1, 2))
    assert parse_stakes((f"{one}=1000", f"{other}=0.5")) == {one: 1_000 * ONE_ACI, other: ONE_ACI // 2}
    assert not parse_stakes(())


@pytest.mark.parametrize("text", ["", "=5", "12D3KooW=5", PEER, f"{PEER}=x"])
def test_what_is_no_stake(text: str) -> None:
    with pytest.raises(LocalError):
        NodeConfig(stakes=(text,))


@pytest.mark.parametrize("label", ["x" * 33, "\x1b[31m", "\u00fc" * 17])
def test_labels_that_no_bid_can_carry(label: str) -> None:
    with pytest.raises(LocalError, match="longer than 32 bytes"):
        ProviderConfig(region=label)
    with pytest.raises(LocalError, match="longer than 32 bytes"):
        ClientConfig(regions=("eu", label))
    assert ProviderConfig(region="\u00fc" * 16).region


@pytest.mark.parametrize("name", ["min_provider_stake", "priority_fee", "latency_value", "retry_cost"])
def test_nothing_asked_for_is_negative(name: str) -> None:
    changes: dict[str, Any] = {name: -1}
    with pytest.raises(LocalError, match="not negative"):
        replace(ClientConfig(), **changes)
