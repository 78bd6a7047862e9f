"""Where values come from: a flag, else an environment variable, else the file, else the default."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

from aci_p2p.config import kinds
from aci_p2p.config.paths import default_config_file
from aci_p2p.config.settings import BY_KEY, SECTIONS, SETTINGS, Config, Setting, build
from aci_p2p.protocol.errors import LocalError

FILE_VARIABLE: Final = "ACI_CONFIG"
"""Names the file, as `--config` does."""
MAX_FILE_BYTES: Final = 1 << 20
"""Bytes; a file with every setting and a thousand addresses has a tenth of it. More is something else."""
OTHER_VARIABLES: Final = frozenset({FILE_VARIABLE, "ACI_DEBUG", "ACI_DEMO_PROMPT"})
"""Variables of ours that are no settings."""
TESTS_PREFIX: Final = "ACI_REQUIRE_"
"""How variables begin that tell the tests what must not be missing."""

_HEADER: Final = re.compile(r"\s*\[\s*([A-Za-z0-9_-]+)\s*\]")
_ASSIGNMENT: Final = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*=")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from."""

    source: Literal["flag", "variable", "file", "default"]
    """The kind of place, in the order of precedence."""
    name: str = ""
    """Flag, variable or path; empty for a default."""
    line: int | None = None
    """Line of the file, from 1, if it was found."""

    def __str__(self) -> str:
        if self.source == "default":
            return "default"
        return f"{self.name}:{self.line}" if self.line else self.name


Flag: TypeAlias = str | bool | Sequence[str]
"""A flag's value: text, or on or off, or all texts of one that is repeated."""

DEFAULT: Final = Origin("default")
"""Of what nobody set."""


class ConfigError(LocalError):
    """A setting that does not exist or cannot have the value it is given, or a file that cannot be read."""

    code = "config"

    def __init__(self, origin: Origin, key: str, problem: str, *, hint: str = "") -> None:
        """`key`: the setting, empty when the whole file is at fault."""
        named = key if origin.source in ("file", "default") else ""
        super().__init__(": ".join(part for part in (str(origin), named, problem) if part), hint=hint)
        self.origin = origin
        self.key = key
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Loaded:
    """Effective values, and where each comes from."""

    config: Config
    """The values."""
    origins: Mapping[str, Origin]
    """By key, for every setting."""
    file: Path
    """The file that is read if it exists."""
    found: bool
    """Whether it exists."""


def load(flags: Mapping[str, Flag] | None = None, file: Path | None = None) -> Loaded:
    """Read everything. `flags` holds by key what the command line says; `file` is the one that it names.

    Raises ConfigError.
    """
    given = {key: (_flag_value(BY_KEY[key], value), _flag_origin(BY_KEY[key])) for key, value in (flags or {}).items()}
    path, required = _choose_file(file, given.get("home"))
    values = {**_read_file(path, required=required), **_read_variables(), **given}
    config = _build(
        {key: value for key, (value, _) in values.items()}, {key: place for key, (_, place) in values.items()}
    )
    origins = {setting.key: values[setting.key][1] if setting.key in values else DEFAULT for setting in SETTINGS}
    return Loaded(config, origins, path, path.exists())


def unknown_variables() -> Iterator[str]:
    """Names that begin like ours in the environment and are none, each with what may be meant."""
    known = {setting.variable for setting in SETTINGS} | OTHER_VARIABLES
    for name in sorted(os.environ):
        if name.startswith("ACI_") and name not in known and not name.startswith(TESTS_PREFIX):
            yield f"{name} is no setting{_suggest(name, sorted(known))}"


def _choose_file(named: Path | None, home: tuple[object, Origin] | None) -> tuple[Path, bool]:
    """The file, and whether it must exist."""
    variable = os.environ.get(FILE_VARIABLE)
    if named or variable:
        return (named or Path(cast("str", variable))).expanduser(), True
    return default_config_file(cast("Path", home[0]) if home else None), False


def _flag_value(setting: Setting, value: Flag) -> object:
    if isinstance(value, bool):
        return value
    if isinstance(setting.kind, kinds.Texts):
        texts = [value] if isinstance(value, str) else value
        return _read(setting, _flag_origin(setting), partial(setting.kind.from_texts, texts), texts)
    assert isinstance(value, str)  # only lists are repeated
    return _read(setting, _flag_origin(setting), lambda: setting.kind.from_text(value), value)


def _flag_origin(setting: Setting) -> Origin:
    return Origin("flag", re.split("[ /]", setting.flag)[0])


def _read_variables() -> dict[str, tuple[object, Origin]]:
    """Settings in the environment; an empty variable counts as none, as in the XDG specification."""
    found: dict[str, tuple[object, Origin]] = {}
    for setting in SETTINGS:
        text = os.environ.get(setting.variable, "")
        if text:
            origin = Origin("variable", setting.variable)
            found[setting.key] = (_read(setting, origin, lambda: setting.kind.from_text(text), text), origin)  # noqa: B023
    return found


def _read_file(path: Path, *, required: bool) -> dict[str, tuple[object, Origin]]:
    text = _text_of(path, required=required)
    whole = Origin("file", str(path))
    try:
        document = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(whole, "", f"is not TOML: {error}") from None
    except (ValueError, ArithmeticError, RecursionError):
        # Numbers beyond what Python reads, brackets within brackets.
        raise ConfigError(whole, "", "is not TOML that we can read") from None
    found: dict[str, tuple[object, Origin]] = {}
    for key, value in _flatten(document):
        origin = Origin("file", str(path), _line_of(text, key))
        if key not in BY_KEY:
            raise ConfigError(origin, key, "there is no such setting", hint=_meant(key))
        setting = BY_KEY[key]
        folder = path.absolute().parent
        found[key] = (_read(setting, origin, lambda: setting.kind.from_toml(value, folder), value), origin)  # noqa: B023
    return found


def _text_of(path: Path, *, required: bool) -> str:
    whole = Origin("file", str(path))
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if required:
            raise ConfigError(whole, "", "there is no such file") from None
        return ""
    except OSError as error:
        raise ConfigError(whole, "", f"cannot be read: {str(error.strerror).lower()}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(whole, "", f"is longer than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(Origin("file", str(path), line), "", "is not UTF-8 text") from None


def _flatten(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Dotted keys and values; what should be a table and is none keeps its bare name, which no setting has."""
    for name, value in document.items():
        if isinstance(value, dict) and name in SECTIONS:
            yield from ((f"{name}.{inner}", item) for inner, item in cast("dict[str, object]", value).items())
        else:
            yield name, value


def _line_of(text: str, key: str) -> int | None:
    """The line of a key, from 1; the parser does not tell. Keys in quotes or inline tables are not found."""
    section, header_line = "", None
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = f"{header[1]}."
            if header[1] == key:
                header_line = number
        elif (assignment := _ASSIGNMENT.match(line)) and section + assignment[1] == key:
            return number
    return header_line


def _read(setting: Setting, origin: Origin, reading: Callable[[], object], raw: object) -> object:
    try:
        return reading()
    except ValueError as error:
        blamed = error.item if isinstance(error, kinds.BadItem) else raw
        raise ConfigError(origin, setting.key, f"{_shown(blamed)} is not {error}") from None


def _shown(raw: object) -> str:
    text = str(raw) if isinstance(raw, Decimal) else repr(raw)
    return text if len(text) <= 160 else f"{text[:160]}..."  # noqa: PLR2004 - two peer ids fit


def _build(values: Mapping[str, object], origins: Mapping[str, Origin]) -> Config:
    """Build the configuration. When a table is refused, those of its values are named that the refusal comes from."""
    for section in SECTIONS:
        given = {key: value for key, value in values.items() if BY_KEY[key].section == section}
        error = _refusal(given)
        if error is None:
            continue
        without = {key: _refusal({other: given[other] for other in given if other != key}) for key in given}
        blamed = [key for key, rest in without.items() if rest is None or rest.message != error.message] or list(given)
        raise ConfigError(origins[blamed[-1]], " and ".join(blamed), error.message, hint=error.hint)
    return build(values)


def _refusal(values: Mapping[str, object]) -> LocalError | None:
    try:
        build(values)
    except LocalError as error:
        return error
    return None


def _meant(key: str) -> str:
    """A hint for a key that does not exist."""
    if key in SECTIONS:
        return f"{key} is a table: write [{key}] and its settings below"
    same = [known for known in BY_KEY if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return _suggest(key, list(BY_KEY), same).removeprefix("; ") or "`aci-p2p config example` lists all"


def _suggest(name: str, known: Sequence[str], same: Sequence[str] = ()) -> str:
    close = list(same) or get_close_matches(name, known, 1)
    return f"; did you mean {' or '.join(close)}?" if close else ""
