"""Showing an inference as it happens, and what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from aci_p2p.attempts import Hedged, Waiting
from aci_p2p.cli.filed import items
from aci_p2p.cli.output import write_text
from aci_p2p.cli.verify import describe, model_name
from aci_p2p.clock import MS_PER_S
from aci_p2p.consumer import Offered
from aci_p2p.protocol.job import BidSeen, Chosen, Deliver, FailedOver
from aci_p2p.protocol.messages import BidSummary
from aci_p2p.protocol.pricing import format_amount, total_of
from aci_p2p.protocol.proof import encode_proof, verify_proof
from aci_p2p.protocol.text import printable, printable_lines

if TYPE_CHECKING:
    from rich.console import Console

    from aci_p2p.client import Answer, AnswerStream


@dataclass(slots=True)
class Timing:
    """When things happened, seconds on the monotonic clock; 0 until they do."""

    offered: float = 0.0
    """The first offer went out."""
    chosen: float = 0.0
    """A provider was awarded the job."""
    first: float = 0.0
    """The first tokens arrived."""
    last: float = 0.0
    """The last tokens arrived."""
    first_tokens: int = 0
    """Tokens in the first part."""
    tokens: int = 0
    """All tokens."""

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first part; 0 when there is no second."""
        elapsed = self.last - self.first
        return (self.tokens - self.first_tokens) / elapsed if elapsed > 0 else 0.0

    def note(self, tokens: int, now: float) -> None:
        """Note the arrival of tokens."""
        if not self.first:
            self.first, self.first_tokens = now, tokens
        self.last = now
        self.tokens += tokens


@dataclass(slots=True)
class Show:
    """Prints a job's updates: what happens on `status`, the text on `answer`."""

    status: Console
    """Where news goes."""
    answer: Console | None
    """Where the text goes; None: nowhere."""
    steps: bool
    """Tell every step with headings, as the demo does; else one line at the choice."""
    timing: Timing = field(default_factory=Timing)
    """When things happened."""
    bids: list[BidSummary] = field(default_factory=list[BidSummary])
    """Bids that arrived for the latest offer."""
    is_hedged: bool = False
    """Whether a second provider is asked while the first is late."""

    async def run(self, stream: AnswerStream) -> Answer:
        """Show the job to its end. Raises the AciError that ends it."""
        async for update in stream.updates:
            now = time.monotonic()
            match update:
                case Offered(offer):
                    self.timing.offered = self.timing.offered or now
                    self.bids.clear()
                    if self.steps:
                        body = offer.body
                        self.status.print("\n[bold]Offer[/]  signed; the prompt is not in it")
                        self.status.print(f"  job {body.job_id.hex()[:16]}, {model_name(body.model_root)}")
                        price = format_amount(body.max_price)
                        self.status.print(f"  at most {body.max_tokens} tokens for at most {price}")
                case BidSeen(bid):
                    self.bids.append(bid)
                case Chosen():
                    self._choice(update, now)
                case FailedOver() | Hedged() | Waiting():
                    self._setback(update)
                case Deliver(tokens, text):
                    self.timing.note(len(tokens), now)
                    if self.answer:
                        # Not through rich, which expands tabs and turns `:x:` into an emoji.
                        await write_text(self.answer.file, printable_lines(text))
        if self.answer:
            self.answer.print()
        return stream.answer

    def _setback(self, update: FailedOver | Hedged | Waiting) -> None:
        match update:
            case FailedOver(provider, problem, tokens):
                after = f"after {tokens} tokens" if tokens else "before its first token"
                news = f"{provider.short} failed {after} ({printable(problem)}); another is to go on"
            case Hedged(provider, waited_ms):
                self.is_hedged = True
                news = f"{provider.short} is late: no token after {waited_ms / MS_PER_S:g} s; another is asked too"
            case Waiting(wait_ms, problem):
                news = f"{printable(problem)}; asking again in {wait_ms / MS_PER_S:.1f} s"
        self.status.print(escape(news), style="yellow")

    def _choice(self, choice: Chosen, now: float) -> None:
        self.timing.chosen = now
        if self.steps:
            self.status.print(f"\n[bold]Bids[/]  {len(self.bids)} arrived, each signed by its provider")
            table = Table("provider", "at most", "first token", "", box=None, padding=(0, 2))
            for bid in self.bids:
                mark = "<- winner" if bid.provider == choice.provider else ""
                price, latency = format_amount(bid.worst_price), f"{bid.latency_ms} ms"
                table.add_row(bid.provider.short, price, latency, mark)
            self.status.print(table, soft_wrap=False)
            self.status.print(f"\n[bold]Winner[/]  {choice.provider.short}: {escape(choice.ranking.why)}")
            self.status.print("\n[bold]Answer[/]")
        else:
            bids = f"{len(self.bids)} bid" + ("" if len(self.bids) == 1 else "s")
            verb = "is asked too" if self.is_hedged else "wins"
            self.status.print(f"{bids}; {choice.provider.short} {verb}: {escape(choice.ranking.why)}", style="dim")


def speed_line(timing: Timing) -> str:
    """Tokens and times in one line."""
    after = timing.first - timing.offered
    speed = f"{timing.tokens_per_second:.1f} tokens/s" if timing.tokens_per_second else "one part"
    return f"{timing.tokens} tokens, {speed}, first after {after:.2f} s"


def document_of(answer: Answer) -> dict[str, object]:
    """An answer for programs."""
    receipt = answer.receipt.body
    return {
        **describe(verify_proof(encode_proof(answer.proof))),
        "tokens": list(answer.tokens),
        "price": format_amount(receipt.price),
        "price_base_units": str(receipt.price),
        "charges": items(total_of(receipt.shares)),
        "bids": [
            {
                "provider": str(bid.provider),
                "worst_price_base_units": str(bid.worst_price),
                "latency_ms": bid.latency_ms,
            }
            for bid in receipt.bids
        ],
        "rule": receipt.rule,
    }


def summary(answer: Answer, timing: Timing) -> dict[str, object]:
    """The same, with how long it took."""
    return {
        **document_of(answer),
        "first_token_s": round(timing.first - timing.offered, 4),
        "tokens_per_second": round(timing.tokens_per_second, 2),
    }
