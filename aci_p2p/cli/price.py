"""`aci-p2p price`: what a model costs at this moment, and what a provider might ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Final

import click
from rich.table import Table
from rich.text import Text

from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.market import OPTIONS, asks_of, market_report, nobody_asks
from aci_p2p.cli.options import Given, configured
from aci_p2p.cli.texts import plural, print_table
from aci_p2p.control.market import AskEntry
from aci_p2p.protocol.advice import Suggestion, quartiles, suggest
from aci_p2p.protocol.messages import MAX_TOKENS
from aci_p2p.protocol.pricing import format_amount

_EPILOG: Final = """\b
Examples:
  aci-p2p price                                       the default model
  aci-p2p price MODEL --tokens 2000                   a long answer
  aci-p2p price MODEL --bootstrap ADDRESS --json      without a running node, for programs
"""
DEFAULT_TOKENS: Final = 500
"""Output tokens of the job whose price is told: a long answer."""
DEFAULT_PROMPT_TOKENS: Final = 100
"""Its prompt tokens: a question of some sentences."""
BAR: Final = 24
"""Characters of the bar of the highest price."""
_NAMES: Final = ("lowest", "quarter", "half", "three quarters", "highest")


@dataclass(frozen=True, slots=True)
class _Book:
    """Asks of one model, and what a job costs under each, base units."""

    asks: Sequence[AskEntry]
    inputs: list[int]
    outputs: list[int]
    jobs: list[int]

    @property
    def slots(self) -> tuple[int, int]:
        """All of them, and the free ones."""
        return sum(ask["slots"] for ask in self.asks), sum(ask["free_slots"] for ask in self.asks)

    @property
    def cheapest(self) -> int | None:
        """The least that the job costs with a provider that has a free slot."""
        free = (job for ask, job in zip(self.asks, self.jobs, strict=True) if ask["free_slots"])
        return min(free, default=None)


@click.command("price", short_help="Show what a model costs now.", epilog=_EPILOG)
@click.argument("model", required=False)
@click.option(
    "--tokens",
    type=click.IntRange(1, MAX_TOKENS),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="Output tokens of the job.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(0, MAX_TOKENS),
    default=DEFAULT_PROMPT_TOKENS,
    show_default=True,
    help="Prompt tokens of the job.",
)
@configured(*OPTIONS)
@json_option
def command(model: str | None, tokens: int, prompt_tokens: int, given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Show how the prices of MODEL spread, what a job costs now, and what a provider might ask, with the reason.

    MODEL is a name or a weights root in hex. Where the order book comes from is as for `market`; exit code 4 when
    nobody asks anything.
    """
    market = asks_of(market_report(given, model))
    book = _book(market["asks"], prompt_tokens, tokens)
    if not book.asks:
        raise nobody_asks(model or "the default model")
    others = [output for ask, output in zip(book.asks, book.outputs, strict=True) if not ask["own"]]
    advice = suggest(others or book.outputs, *book.slots)
    if as_json:
        print_json(
            {
                "model_root": market["model_root"],
                "tokens": tokens,
                "prompt_tokens": prompt_tokens,
                **_document(book, advice),
            }
        )
    else:
        _show(book, advice, f"{prompt_tokens} + {tokens} tokens")


def _book(asks: Sequence[AskEntry], prompt_tokens: int, tokens: int) -> _Book:
    inputs = [int(ask["input_token_price"]) for ask in asks]
    outputs = [int(ask["output_token_price"]) for ask in asks]
    jobs = [prompt_tokens * paid + tokens * made for paid, made in zip(inputs, outputs, strict=True)]
    return _Book(asks, inputs, outputs, jobs)


def _document(book: _Book, advice: Suggestion) -> dict[str, object]:
    slots, free = book.slots
    columns = {"input_token_price": book.inputs, "output_token_price": book.outputs, "job": book.jobs}
    return {
        "asks": len(book.asks),
        "slots": slots,
        "free_slots": free,
        "quartiles": {name: [str(price) for price in astuple(quartiles(prices))] for name, prices in columns.items()},
        "cheapest_free": None if book.cheapest is None else str(book.cheapest),
        "suggestion": {"output_token_price": str(advice.price), "reason": advice.reason},
    }


def _show(book: _Book, advice: Suggestion, job: str) -> None:
    slots, free = book.slots
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in ("", "prompt token", "output token", job, " "):
        table.add_column(name, justify="right" if name.strip() else "left", no_wrap=True)
    rows = zip(_NAMES, *(astuple(quartiles(prices)) for prices in (book.inputs, book.outputs, book.jobs)), strict=True)
    highest = max(book.jobs)
    for name, inputs, outputs, cost in rows:
        bar = "#" * (-(-cost * BAR // highest) if highest else 0)
        table.add_row(*map(Text, (name, format_amount(inputs), format_amount(outputs), format_amount(cost), bar)))
    print_table(table)
    click.echo(f"\n{plural(len(book.asks), 'ask')}, {free} of {slots} slots free")
    now = "nobody has a free slot" if book.cheapest is None else f"{format_amount(book.cheapest)} at the cheapest"
    click.echo(f"a job of {job} now: {now}")
    click.echo(f"to providers: ask {format_amount(advice.price)} for an output token; {advice.reason}")
