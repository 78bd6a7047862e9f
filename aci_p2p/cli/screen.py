"""What the one-screen view shows: a node at a glance, whatever the size of the terminal. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.text import Text

from aci_p2p.cli.texts import amount, duration, mebibytes, plural, short_job, short_peer
from aci_p2p.clock import MS_PER_S
from aci_p2p.control import Event, StatusReport
from aci_p2p.control.market import ModelSummary
from aci_p2p.control.report import LOCAL, PeerEntry, ProcessSection, ProviderSection
from aci_p2p.protocol.catalogue import CATALOGUE
from aci_p2p.protocol.pricing import format_amount
from aci_p2p.protocol.text import printable

WIDE: Final = 110
"""Columns from which on two panels stand side by side."""
HEADER_ROWS: Final = 5
"""Rows of the header, its frame included."""
FRAME_ROWS: Final = 2
"""Rows of a panel's frame."""
MIN_ROWS: Final = 4
"""Rows of the smallest panel that says something; one that would get fewer is left out."""

BOOK_ROWS: Final = 4
"""Models of the order book, of which `aci-p2p market` shows all: the latest offers have the rest of the panel."""

_LEVELS: Final = {"warning": "yellow", "error": "red", "critical": "red", "debug": "dim"}
_REACHABILITY: Final = {"public": "green", "private": "yellow", "unknown": "dim", LOCAL: "dim"}


@dataclass(frozen=True, slots=True)
class View:
    """What there is to show."""

    status: StatusReport
    """The node."""
    peers: Sequence[PeerEntry]
    """Its connections."""
    book: Sequence[ModelSummary]
    """What providers ask, by model."""
    events: Sequence[Event]
    """What it logged lately, the oldest first."""
    now_ms: int
    """Unix milliseconds."""


@dataclass(frozen=True, slots=True)
class _Section:
    """A panel, and how many rows it would like."""

    title: str
    lines: Sequence[RenderableType]
    """Each of one row; of the last ones as many as there is room for."""
    keep_end: bool = False
    """Whether the last lines matter more than the first."""

    @property
    def rows(self) -> int:
        return len(self.lines) + FRAME_ROWS


def draw(view: View, width: int, height: int, *, utf8: bool = True) -> RenderableType:
    """The screen, of exactly that size."""
    frame = box.ROUNDED if utf8 else box.ASCII
    # Laying out what has no room would take most of the time.
    newest = sorted(view.peers, key=lambda peer: peer["age_s"])[:height]
    view = replace(view, peers=newest, events=view.events[-height:])
    header = _header(view, min(HEADER_ROWS, height), frame)
    jobs, market, peers, log = _jobs(view), _market(view), _peers(view), _log(view)
    left = height - HEADER_ROWS
    rows: list[tuple[tuple[_Section, ...], int]]
    if width >= WIDE:
        top = (jobs, market)
        rows = _share(left, [(top, max(section.rows for section in top)), ((peers,), peers.rows), ((log,), log.rows)])
    else:
        rows = _share(left, [((section,), section.rows) for section in (jobs, peers, market, log)])
    screen = Layout()
    parts = [Layout(header, size=min(HEADER_ROWS, height))]
    for sections, size in rows:
        part = Layout(size=size)
        part.split_row(*(Layout(_panel(section, size, frame)) for section in sections))
        parts.append(part)
    screen.split_column(*parts)
    return screen


def _share(left: int, wanted: Sequence[tuple[tuple[_Section, ...], int]]) -> list[tuple[tuple[_Section, ...], int]]:
    """Share rows out: each gets what it wants as far as the others leave it; the last one takes what remains."""
    shown = list(wanted[: max(left // MIN_ROWS, 0)])
    if not shown:
        return []
    if len(shown) < len(wanted) and len(shown) > 1:
        # The log tells most in a small place.
        shown[-1] = wanted[-1]
    sizes: list[tuple[tuple[_Section, ...], int]] = []
    for at, (sections, rows) in enumerate(shown):
        behind = len(shown) - at - 1
        # Those behind need their smallest size at least, and a fair part of what is left.
        most = left - behind * max(MIN_ROWS, left // (len(shown) + 1))
        size = left if not behind else max(MIN_ROWS, min(rows, most))
        sizes.append((sections, size))
        left -= size
    return sizes


def _panel(section: _Section, rows: int, frame: box.Box) -> Panel:
    room = max(rows - FRAME_ROWS, 0)
    lines = section.lines[-room:] if section.keep_end and room else section.lines[:room]
    return Panel(
        Group(*lines), title=_plain(section.title, "bold"), title_align="left", box=frame, border_style="dim",
        padding=(0, 1),
    )  # fmt: skip


def _header(view: View, rows: int, frame: box.Box) -> Panel:
    status = view.status
    node, reachability, process, log = status["node"], status["reachability"], status["process"], status["log"]
    title = f"aci-p2p {node['version']}  network {node['network']}  {node['state']} for {duration(node['uptime_s'])}"
    more = len(status["addresses"]) - 1
    address = _plain(status["addresses"][0] if status["addresses"] else "no address: nobody can dial it")
    if more > 0:
        address.append(f"  and {more} more", "dim")
    facts = Text.assemble(
        "reachability ",
        (reachability["state"], _REACHABILITY.get(reachability["state"], "")),
        *([f" through {plural(len(reachability['relays']), 'relay')}"] if reachability["relays"] else []),
        _bootstrap(status),
        f"  {mebibytes(process['memory_bytes'])}",
        _files(process),
        f"  {plural(process['tasks'], 'task')}",
        (f"  {plural(log['warnings'], 'warning')}", "yellow" if log["warnings"] else "dim"),
        (f"  {plural(log['errors'], 'error')}", "red" if log["errors"] else "dim"),
    )
    lines = [_plain(f"node {node['id']}"), address, _line(facts)]
    return _panel(_Section(title, lines), rows, frame)


def _files(process: ProcessSection) -> str:
    opened = process["file_descriptors"]
    return f"  {'unknown files' if opened is None else plural(opened, 'file')}"


def _bootstrap(status: StatusReport) -> str:
    reached = sum(entry["reached"] is True for entry in status["bootstrap"])
    return f"  bootstrap {reached} of {len(status['bootstrap'])}" if status["bootstrap"] else ""


def _jobs(view: View) -> _Section:
    provider = view.status["provider"]
    checkpoints = _plain("checkpoints  none: no chain configured", "dim")
    if provider is None:
        return _Section("jobs", [_plain("it serves no model: it helps others to find each other"), checkpoints])
    busy = len(provider["running"])
    counts = f"{provider['finished']} done, {provider['failed']} failed, {amount(provider['earned'])} earned"
    counts += f"; {amount(view.status['earned'])} with all jobs"
    models = ", ".join(model["name"] for model in provider["models"]) or "no model"
    lines: list[RenderableType] = [_plain(counts), _plain(f"serving {models}", "dim"), checkpoints]
    title = f"jobs  {busy} of {plural(provider['slots'], 'slot')}"
    return _Section(title, [*lines[:1], *_running(provider), *lines[1:]])


def _running(provider: ProviderSection) -> Iterable[RenderableType]:
    cells = [
        (
            short_job(job["job"]),
            f"for {short_peer(job['consumer'])}",
            plural(job["tokens"], "token"),
            f"{job['tokens_per_s']:.1f}/s",
            duration(job["elapsed_s"]),
            job["model"],
        )
        for job in provider["running"]
    ]
    return _rows(cells, "green", right=(2, 3, 4))


def _market(view: View) -> _Section:
    market, provider = view.status["market"], view.status["provider"]
    offers, bids = market["offers"], market["bids"]
    heard = f"{plural(offers['per_minute'], 'offer')} and {plural(bids['per_minute'], 'bid')} in the last minute"
    ours = f"; {plural(provider['bids'], 'bid')} of ours, {provider['outstanding_bids']} open" if provider else ""
    lost = offers["dropped"] + bids["dropped"] + market["job_bids_dropped"]
    total = f"{offers['heard']} and {bids['heard']} in all, {lost} lost{ours}"
    cells = [
        (
            f"{duration((view.now_ms - offer['heard_at_ms']) / MS_PER_S)} ago",
            short_job(offer["job"]),
            f"of {short_peer(offer['consumer'])}",
            plural(offer["max_tokens"], "token"),
            f"<= {amount(offer['max_price'])}",
            _model_name(offer["model_root"]),
        )
        for offer in market["recent_offers"]
    ]
    lines = [_plain(heard), _plain(total, "dim"), *_rows(_book(view.book), "cyan"), *_rows(cells, "", right=(0, 3))]
    return _Section("market", lines)


def _book(models: Sequence[ModelSummary]) -> list[tuple[str, ...]]:
    """The order book in short: the models that most ask something for."""
    most = sorted(models, key=lambda model: (-model.providers, model.model_root))[:BOOK_ROWS]
    return [
        (
            plural(model.providers, "provider"),
            f"{model.free_slots} of {plural(model.slots, 'slot')} free",
            f"from {format_amount(model.output_token_price)}",
            _model_name(model.model_root),
        )
        for model in most
    ]


def _model_name(root: str) -> str:
    names = {model.root.hex(): name for name, model in CATALOGUE.items()}
    return names.get(root, short_job(root))


def _peers(view: View) -> _Section:
    cells = [
        (
            short_peer(peer["peer"]),
            peer["direction"],
            "direct" if peer["relay"] is None else f"relay {short_peer(peer['relay'])}",
            "" if peer["round_trip_ms"] is None else f"{peer['round_trip_ms']:.1f} ms",
            duration(peer["age_s"]),
            f"{peer['score']:.0f}",
            peer["agent"] or "-",
            peer["address"].partition("/p2p/")[0],
        )
        for peer in view.peers
    ]
    titles = [("peer", "", "way", "rtt", "age", "score", "program", "address")] if cells else []
    lines = list(_rows([*titles, *cells], "", right=(3, 4, 5), heading=True))
    network = view.status["network"]
    title = f"peers  {network['peers']}: {network['inbound']} in, {network['outbound']} out"
    return _Section(title, lines or [_plain("connected to nobody yet", "yellow")])


def _log(view: View) -> _Section:
    lines = [
        _plain(f"{event.at[11:19]} {event.level:<7} {event.tail()}", _LEVELS.get(event.level, ""))
        for event in view.events
    ]
    return _Section("log", lines or [_plain("nothing yet", "dim")], keep_end=True)


def _rows(
    cells: Sequence[Sequence[str]], style: str, *, right: Sequence[int] = (), heading: bool = False
) -> Iterable[RenderableType]:
    """One row for each, in columns; the last column takes what is left."""
    widths = [max(len(printable(cell)) for cell in column) for column in zip(*cells, strict=True)]
    for at, row in enumerate(cells):
        parts = [
            printable(cell).rjust(width) if column in right else printable(cell).ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield _plain("  ".join(parts), "dim" if heading and not at else style)


def _plain(text: str, style: str = "") -> Text:
    return _line(Text(printable(text), style=style))


def _line(text: Text) -> Text:
    """One row, whatever it holds."""
    text.no_wrap = True
    text.overflow = "ellipsis"
    return text
