"""What a setting can hold: each kind reads text (flags, variables) and TOML values, and writes TOML."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Final, cast

from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.pricing import format_amount, parse_amount
from aci_p2p.protocol.publications import LOAD_MILLI_MAX, MAX_FACTOR_MILLI, PriceStep

NONE: Final = "none"
"""What stands for an empty list, or for leaving a setting to the node, in flags and variables."""
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


class BadItem(ValueError):
    """One item of a list is none of its kind; the text says what would do."""

    def __init__(self, wanted: str, item: str) -> None:
        """`wanted`: with its article."""
        super().__init__(wanted)
        self.item = item


class Kind(ABC):
    """What a setting can hold. The methods raise ValueError, saying what would do: "a whole number"."""

    name: str
    """What it is called in messages, with its article."""
    metavar: str
    """What it is called in `--help`."""

    @abstractmethod
    def from_text(self, text: str) -> object:
        """Read a flag or a variable."""

    @abstractmethod
    def from_toml(self, value: object, folder: Path) -> object:
        """Read a value of a file in `folder`."""

    @abstractmethod
    def to_toml(self, value: object) -> str:
        """Write a value as the file would have it; from_toml reads it again."""

    def to_json(self, value: object) -> object:
        """The value for `--json`; amounts and paths as text."""
        return value

    def refusal(self) -> ValueError:
        """The error of a value that is none of this kind."""
        return ValueError(self.name)


class Text(Kind):
    """Any text."""

    name = "a text"
    metavar = "TEXT"

    def from_text(self, text: str) -> object:
        """As it is."""
        return text

    def from_toml(self, value: object, folder: Path) -> object:  # noqa: ARG002 - not a path
        """A string."""
        if not isinstance(value, str):
            raise self.refusal()
        return value

    def to_toml(self, value: object) -> str:
        """A basic string: JSON's escapes are TOML's."""
        return _quoted(str(value))


class Choice(Text):
    """One of some words."""

    def __init__(self, *words: str) -> None:
        """`words`: all of them, in lower case."""
        self.name = f"one of {', '.join(words)}"
        self.metavar = "|".join(words)
        self._words = words

    def from_text(self, text: str) -> object:
        """In either case."""
        return self.from_toml(text.lower(), Path())

    def from_toml(self, value: object, folder: Path) -> object:  # noqa: ARG002 - not a path
        """One of the words."""
        if value not in self._words:
            raise self.refusal()
        return value


class Whole(Kind):
    """A whole number."""

    name = "a whole number"
    metavar = "INTEGER"

    def from_text(self, text: str) -> object:
        """Decimal digits."""
        digits = text.strip().removeprefix("-")
        if not (digits.isascii() and digits.isdigit()):
            raise self.refusal()
        return int(text)

    def from_toml(self, value: object, folder: Path) -> object:  # noqa: ARG002 - not a path
        """An integer; booleans are none."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal()
        return value

    def to_toml(self, value: object) -> str:
        """Decimal digits."""
        return str(value)


class Number(Kind):
    """A number that need not be whole."""

    name = "a number"
    metavar = "NUMBER"

    def from_text(self, text: str) -> object:
        """As Python writes floats."""
        try:
            return float(text)
        except ValueError:
            raise self.refusal() from None

    def from_toml(self, value: object, folder: Path) -> object:  # noqa: ARG002 - not a path
        """A float or an integer."""
        if not isinstance(value, int | Decimal) or isinstance(value, bool):
            raise self.refusal()
        return float(value)

    def to_toml(self, value: object) -> str:
        """As Python writes floats, which TOML reads."""
        return str(value)


class Amount(Kind):
    """An amount of ACI; held in base units, written in ACI, exact both ways."""

    name = "an amount of ACI, such as 0.00045"
    metavar = "ACI"

    def from_text(self, text: str) -> object:
        """Decimal digits with a point."""
        try:
            return parse_amount(text)
        except LocalError:
            raise self.refusal() from None

    def from_toml(self, value: object, folder: Path) -> object:  # noqa: ARG002 - not a path
        """A string, or a number of ACI."""
        if isinstance(value, Decimal) or (isinstance(value, int) and not isinstance(value, bool)):
            return self.from_text(f"{value:f}" if isinstance(value, Decimal) else str(value))
        if isinstance(value, str):
            return self.from_text(value)
        raise self.refusal()

    def to_toml(self, value: object) -> str:
        """A string."""
        return _quoted(str(self.to_json(value)))

    def to_json(self, value: object) -> object:
        """ACI as text, without the unit."""
        assert isinstance(value, int)  # the table says so
        return format_amount(value).removesuffix(" ACI")


class Curve(Kind):
    """Steps of a price curve, as a load and a factor each."""

    name = "steps of load:factor, such as 0.5:1.25,0.9:2"
    metavar = "LOAD:FACTOR,..."

    def from_text(self, text: str) -> object:
        """Separated by blanks or commas; `none` is no step."""
        parts = text.replace(",", " ").split()
        return () if [part.lower() for part in parts] == [NONE] else tuple(self._step(part) for part in parts)

    def from_toml(self, value: object, folder: Path) -> object:  # noqa: ARG002 - no paths
        """The same, in a string."""
        if not isinstance(value, str):
            raise self.refusal()
        return self.from_text(value)

    def to_toml(self, value: object) -> str:
        """A string."""
        return _quoted(str(self.to_json(value)))

    def to_json(self, value: object) -> object:
        """As text."""
        steps = cast("tuple[PriceStep, ...]", _items(value))
        return ",".join(f"{step.load_milli / 1_000:g}:{step.factor_milli / 1_000:g}" for step in steps)

    def _step(self, text: str) -> PriceStep:
        try:
            load, factor = (Decimal(part) * 1_000 for part in text.split(":"))
            whole = load % 1 == 0 == factor % 1
        except (ArithmeticError, ValueError):
            raise self.refusal() from None
        if not (whole and 0 < load <= LOAD_MILLI_MAX and 0 <= factor <= MAX_FACTOR_MILLI):
            raise self.refusal()
        return PriceStep(int(load), int(factor))


class Switch(Kind):
    """On or off."""

    name = "true or false"
    metavar = "BOOLEAN"

    def from_text(self, text: str) -> object:
        """The usual words."""
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise self.refusal()
        return word in _TRUE

    def from_toml(self, value: object, folder: Path) -> object:  # noqa: ARG002 - not a path
        """A boolean."""
        if not isinstance(value, bool):
            raise self.refusal()
        return value

    def to_toml(self, value: object) -> str:
        """TOML's words."""
        return "true" if value else "false"


class Folder(Kind):
    """A folder. Relative ones start from the working directory, in a file from the file's folder."""

    name = "a folder"
    metavar = "FOLDER"

    def from_text(self, text: str) -> object:
        """A path; `~` is the user's home."""
        return self.from_toml(text, Path())

    def from_toml(self, value: object, folder: Path) -> object:
        """The same, in a string."""
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.refusal()
        return folder / Path(value).expanduser()

    def to_toml(self, value: object) -> str:
        """A string."""
        return _quoted(str(value))

    def to_json(self, value: object) -> object:
        """As text."""
        return str(value)


class Texts(Kind):
    """A list of texts without blanks and commas in them."""

    name = "a list of texts"
    metavar = "TEXT"

    def from_text(self, text: str) -> object:
        """Separated by blanks or commas; `none` is the empty list."""
        return self.from_texts(text.replace(",", " ").split())

    def from_texts(self, texts: Sequence[str]) -> tuple[str, ...]:
        """From a flag that was repeated."""
        return () if [text.lower() for text in texts] == [NONE] else tuple(texts)

    def from_toml(self, value: object, folder: Path) -> tuple[str, ...]:  # noqa: ARG002 - no paths
        """An array of strings."""
        if not isinstance(value, list):
            raise self.refusal()
        items = cast("list[object]", value)
        texts = tuple(item for item in items if isinstance(item, str))
        if len(texts) < len(items):
            raise self.refusal()
        return texts

    def to_toml(self, value: object) -> str:
        """An array."""
        return "[" + ", ".join(_quoted(str(item)) for item in _items(value)) + "]"

    def to_json(self, value: object) -> object:
        """A list."""
        return list(_items(value))


class Optional(Kind):
    """Another kind, or left to the node: None, which the file says by not having the key."""

    def __init__(self, inner: Kind) -> None:
        """`inner`: what it is otherwise."""
        self.name, self.metavar = inner.name, inner.metavar
        self._inner = inner

    def from_text(self, text: str) -> object:
        """`none`, or what it is otherwise."""
        return None if text.strip().lower() == NONE else self._inner.from_text(text)

    def from_toml(self, value: object, folder: Path) -> object:
        """What it is otherwise."""
        return self._inner.from_toml(value, folder)

    def to_toml(self, value: object) -> str:
        """Empty for None."""
        return "" if value is None else self._inner.to_toml(value)

    def to_json(self, value: object) -> object:
        """None, or what it is otherwise."""
        return None if value is None else self._inner.to_json(value)


def _items(value: object) -> tuple[object, ...]:
    assert isinstance(value, tuple)  # the table says so
    return cast("tuple[object, ...]", value)


def _quoted(text: str) -> str:
    # TOML knows no surrogate pairs; it wants DEL escaped, which JSON leaves.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
