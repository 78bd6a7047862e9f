"""Files and variables that cannot be taken: one line that says which, where and what was meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aci_p2p.config import ConfigError, load, unknown_variables
from aci_p2p.config.sources import MAX_FILE_BYTES

Refused = Callable[[str], ConfigError]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration file."""
    return tmp_path / "some.toml"


@pytest.fixture
def refused(file: Path) -> Refused:
    """What a text is refused for as a file."""

    def refuse(text: str) -> ConfigError:
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load(file=file)
        assert caught.value.exit_code == 2
        assert "\n" not in caught.value.message
        return caught.value

    return refuse


@pytest.mark.parametrize(
    ("text", "where", "words", "hint"),
    [
        ("\nslots = 3\n", ":2: slots", "no such setting", "did you mean provider.slots?"),
        ("[provider]\n\nslot = 3\n", ":3: provider.slot", "no such setting", "did you mean provider.slots?"),
        ("provider.slot = 3\n", ":1: provider.slot", "no such setting", "did you mean provider.slots?"),
        ("[providr]\nslots = 3\n", ":1: providr", "no such setting", "did you mean provider"),
        ("\n[p2p.listen]\na = 3\n", ": p2p.listen", "{'a': 3} is not a list of texts", ""),
        ("zzz = 1\n", ":1: zzz", "no such setting", "`aci-p2p config example` lists all"),
        ("provider = 3\n", ":1: provider", "no such setting", "write [provider] and its settings below"),
        ("[[provider]]\nslots = 3\n", ": provider", "no such setting", "write [provider]"),
        ("[provider]\nslots = '3'\n", ":2: provider.slots", "'3' is not a whole number", ""),
        ("[provider]\nslots = 0\n", ":2: provider.slots", "between 1 and 1024", ""),
        ("[provider]\nthreads = 0\n", ":2: provider.threads", "between 1 and 1024", ""),
        ("network = 'Aci'\n", ":1: network", "is not a network id", "lower-case letters"),
        ("key = '../x'\n", ":1: key", "'../x' is not a key name", "letters, digits"),
        ("[client]\nmax_tokens = 99999\n", ":2: client.max_tokens", "between 1 and 32768", ""),
        ("[client]\ntemperature = 10.5\n", ":2: client.temperature", "between 0 and 10", ""),
        ("[client]\ntemperature = nan\n", ":2: client.temperature", "between 0 and 10", ""),
        ("[log]\nlevel = 'loud'\n", ":2: log.level", "'loud' is not one of debug, info", ""),
        (
            "[p2p]\nlow_water = 20\nhigh_water = 10\n",
            ":3: p2p.low_water and p2p.high_water",
            "20 and 10 are no low and high water marks",
            "below",
        ),
        (
            "[p2p]\nlisten = []\nhigh_water = 95\n",
            ":3: p2p.high_water",
            "96 and 95 are no low and high water marks",
            "",
        ),
        ("[provider]\nslots = 0\nthreads = 0\n", ":3: provider.slots and provider.threads", "between 1", ""),
        ("[p2p]\nlow_water = 150\nhigh_water = 120\n", "p2p.low_water and p2p.high_water", "water marks", "below"),
        ("a = \n", "", "is not TOML: Invalid value (at line 1, column 5)", ""),
        ("a = 1\na = 2\n", "", "is not TOML: Cannot overwrite a value", ""),
        (f"slots = {'9' * 5000}", "", "is not TOML that we can read", ""),
        (f"slots = {'[' * 100_000}", "", "is not TOML that we can read", ""),
        (f"offline = '{'a' * 5000}'", ":1: offline", "a... is not true or false", ""),
    ],
)
def test_what_is_refused_in_a_file(refused: Refused, file: Path, text: str, where: str, words: str, hint: str) -> None:
    error = refused(text)
    assert error.message.startswith(f"{file}")
    assert where in error.message
    assert words in error.message
    assert hint in error.hint
    assert len(error.message) < 400


def test_files_that_cannot_be_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"some\.toml: there is no such file"):
        load(file=file)
    monkeypatch.setenv("ACI_CONFIG", str(file))
    with pytest.raises(ConfigError, match=r"some\.toml: there is no such file"):
        load()
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        load(file=tmp_path)
    file.write_bytes(b"\n\n# \xff\n")
    with pytest.raises(ConfigError, match=r"some.toml:3: is not UTF-8 text"):
        load()
    file.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="is longer than 1048576 bytes"):
        load()
    file.write_bytes(b"#" * MAX_FILE_BYTES)
    assert load().found


def test_variables_and_flags_are_named_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^--slots: 'x' is not a whole number$"):
        load({"provider.slots": "x"})
    with pytest.raises(ConfigError, match=r"^--slots: slots and threads are between"):
        load({"provider.slots": "0"})
    monkeypatch.setenv("ACI_PROVIDER_SLOTS", "x")
    with pytest.raises(ConfigError, match=r"^ACI_PROVIDER_SLOTS: 'x' is not a whole number$") as caught:
        load()
    assert caught.value.key == "provider.slots"
    assert caught.value.origin.source == "variable"


def test_the_file_is_looked_for_in_the_home_or_in_the_xdg_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().file == home / ".config" / "aci-p2p" / "config.toml"
    assert not load().found
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "xdg"))
    assert load().file == home / "xdg" / "aci-p2p" / "config.toml"
    monkeypatch.setenv("ACI_HOME", str(home / "aci"))
    assert load().file == home / "aci" / "config.toml"
    assert load({"home": str(home / "flag")}).file == home / "flag" / "config.toml"
    load().file.parent.mkdir()
    load().file.write_text("network = 'aci-found'")
    assert load().found
    assert load().config.node.network == "aci-found"
    monkeypatch.setenv("ACI_CONFIG", "~/some.toml")
    (home / "some.toml").write_text("network = 'aci-variable'")
    assert load().config.node.network == "aci-variable"
    (home / "flag.toml").write_text("network = 'aci-flag'")
    assert load(file=home / "flag.toml").config.node.network == "aci-flag"


def test_folders_of_a_file_are_relative_to_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "etc").mkdir()
    (home / "etc" / "some.toml").write_text("home = 'data'\nstate = '~/state'\nruntime = '/run/aci-p2p'")
    monkeypatch.chdir(home)
    node = load(file=Path("etc/some.toml")).config.node
    assert (node.home, node.state, node.runtime) == (home / "etc" / "data", home / "state", Path("/run/aci-p2p"))
    assert load({"home": "data"}).config.node.home == Path("data")


def test_variables_that_only_look_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACI_CONFIG", "ACI_DEBUG", "ACI_P2P_LISTEN", "OTHER"):
        monkeypatch.setenv(name, "1")
    assert list(unknown_variables()) == []
    monkeypatch.setenv("ACI_PROVIDER_SLOT", "1")
    assert list(unknown_variables()) == ["ACI_PROVIDER_SLOT is no setting; did you mean ACI_PROVIDER_SLOTS?"]
