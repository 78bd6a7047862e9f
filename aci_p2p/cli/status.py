"""`aci-p2p status`: how the node that runs on this machine is doing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final, TypeAlias, cast

import click
from rich.table import Table
from rich.text import Text

from aci_p2p.cli.asking import NAMING, ask_node
from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.options import Given, configured
from aci_p2p.cli.texts import amount, duration, mebibytes, plural, print_table, short_job, short_peer
from aci_p2p.control import StatusReport
from aci_p2p.control.report import BootstrapEntry, ProviderSection, TopicSection
from aci_p2p.protocol.text import printable

_EPILOG: Final = """\b
Examples:
  aci-p2p status                              the node of this machine
  aci-p2p status --key second                 the one that runs under that key
  aci-p2p status --json | jq .process         for programs
"""
_SHOWN_TROUBLES: Final = 5
"""Warnings and errors shown; `--json` has more."""

Row: TypeAlias = tuple[str, str]


@click.command("status", short_help="Show how the running node is doing.", epilog=_EPILOG)
@configured(*NAMING)
@json_option
def command(given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Show how the node that runs on this machine is doing: network, market, jobs, what it takes of the machine.

    Exit code 4 when none runs.
    """
    answer = ask_node(given, "status")
    if as_json:
        print_json(answer)
        return
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in status_rows(cast("StatusReport", answer)):
        table.add_row(name, Text(printable(value)))
    print_table(table)


def status_rows(status: StatusReport) -> Iterator[Row]:
    """What is shown: each line with what stands before it."""
    node, reachability = status["node"], status["reachability"]
    yield "node", node["id"]
    yield "", f"key {node['name']}, network {node['network']}, aci-p2p {node['version']}"
    yield node["state"], f"for {duration(node['uptime_s'])}, process {status['process']['pid']}"
    yield from _labelled("addresses", status["addresses"] or ["none: nobody can dial it"])
    yield "reachability", f"{reachability['state']}: {reachability['why']}"
    yield from _labelled("relays", reachability["relays"])
    yield from _labelled("bootstrap", [bootstrap_line(entry) for entry in status["bootstrap"]])
    yield from _network(status)
    yield from _labelled("market", [_topic(name, status["market"][name]) for name in ("offers", "bids")])
    if status["provider"]:
        yield from _provider(status["provider"])
    yield from _jobs(status)
    yield "machine", _machine(status)
    yield "home", node["home"]
    yield "config file", node["config_file"] or "none"
    log = status["log"]
    yield "log", f"{plural(log['errors'], 'error')}, {plural(log['warnings'], 'warning')}"
    for entry in log["last"][-_SHOWN_TROUBLES:]:
        yield "", f"{entry['at']} {entry['level'].upper()} {entry['message']}"


def bootstrap_line(entry: BootstrapEntry) -> str:
    """How it stands with a bootstrap address."""
    why = "; ".join(dict.fromkeys(failure["error"] for failure in entry["failures"]))
    if entry["reached"]:
        return f"{entry['address']}: reached" + (f" (in part: {why})" if why else "")
    if entry["reached"] is None:
        return f"{entry['address']}: being tried"
    return f"{entry['address']}: not reached, {plural(entry['attempts'], 'attempt')}: {why}"


def _network(status: StatusReport) -> Iterator[Row]:
    network = status["network"]
    relayed = f", {network['relayed']} through relays" if network["relayed"] else ""
    yield "peers", f"{network['peers']} connected ({network['inbound']} in, {network['outbound']} out{relayed})"
    limits = f"{network['trimmed']} connections trimmed, {plural(network['banned'], 'peer')} banned"
    yield "", f"{network['known_peers']} known, {network['dial_failures']} of {network['dials']} dials failed, {limits}"
    if network["reservations"] or network["circuits"]:
        circuits = plural(network["circuits"], "connection")
        yield "relaying", f"for {plural(network['reservations'], 'peer')}, {circuits} of others under way"
    if network["holes_punched"] or network["holes_failed"]:
        punched = plural(network["holes_punched"], "connection")
        yield "hole punching", f"{punched} made direct, {network['holes_failed']} not"
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(network["gossip_refused"].items())) or "none"
    gossip = f"{plural(network['gossip_accepted'], 'message')} accepted, {network['gossip_dropped']} dropped"
    yield "gossip", f"{gossip}, refused: {refused}"


def _topic(name: str, topic: TopicSection) -> str:
    queue = f"{topic['waiting']} waiting, {topic['dropped']} dropped, {topic['caught_up']} caught up"
    return f"{name}: {topic['per_minute']} in the last minute, {topic['heard']} in all; {queue}"


def _provider(provider: ProviderSection) -> Iterator[Row]:
    for at, model in enumerate(provider["models"]):
        prices = f"{amount(model['input_token_price'])} a prompt token, "
        prices += f"{amount(model['output_token_price'])} an output token"
        yield "" if at else "serves", f"{model['name']}: context {model['context']}, {prices}"
    yield "slots", f"{provider['slots']}, of which {provider['free_slots']} free"
    for at, job in enumerate(provider["running"]):
        progress = f"{plural(job['tokens'], 'token')}, {job['tokens_per_s']:.1f} tokens/s, {duration(job['elapsed_s'])}"
        name = f"{short_job(job['job'])} for {short_peer(job['consumer'])}"
        yield "" if at else "working on", f"{name}, {job['model']}: {progress}"
    bids = f"{plural(provider['bids'], 'bid')} ({provider['outstanding_bids']} open)"
    jobs = f"{plural(provider['finished'], 'job')} done, {provider['failed']} failed"
    yield "since start", f"{bids}, {jobs}, {amount(provider['earned'])} earned"


def _jobs(status: StatusReport) -> Iterator[Row]:
    roles: dict[str, Counter[str]] = {}
    for entry in status["jobs"]:
        roles.setdefault(entry["role"], Counter())[entry["state"]] += entry["jobs"]
    lines = [
        f"as {role}: " + ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in counts.most_common())
        for role, counts in sorted(roles.items())
    ]
    yield from _labelled("all jobs", lines or ["none yet"])
    yield "earned", amount(status["earned"])


def _machine(status: StatusReport) -> str:
    process = status["process"]
    memory = f"{mebibytes(process['memory_bytes'])} (at most {mebibytes(process['peak_memory_bytes'])})"
    opened = process["file_descriptors"]
    files = f"{'unknown' if opened is None else opened} of {process['file_descriptor_limit']} files"
    work = f"{plural(process['threads'], 'thread')}, {plural(process['tasks'], 'task')}"
    return f"{memory}, {files}, {work}, {duration(process['cpu_s'])} of CPU"


def _labelled(label: str, lines: list[str]) -> Iterator[Row]:
    for at, line in enumerate(lines):
        yield "" if at else label, line
