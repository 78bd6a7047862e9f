"""`aci-p2p batch`: ask a model of the network many questions."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from aci_p2p.cli.answering import document_of
from aci_p2p.cli.asking import check_reachable, client_beside, proof_path
from aci_p2p.cli.common import json_option
from aci_p2p.cli.options import CLIENT, Given, configured
from aci_p2p.cli.output import write_text
from aci_p2p.cli.running import Stop, run
from aci_p2p.cli.texts import plural
from aci_p2p.client import (
    ACI,
    DEFAULT_AT_ONCE,
    Answer,
    BatchResult,
    conversation_of,
    fallback_of,
    requirements_of,
    resolve_model,
)
from aci_p2p.config import ClientConfig, NodeConfig
from aci_p2p.files import write_atomically
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.pricing import format_amount
from aci_p2p.protocol.proof import encode_proof
from aci_p2p.protocol.text import printable, printable_lines

BUSY_WAIT_MS: Final = 600_000
"""How long a question waits for a free slot unless it is set, milliseconds: nobody watches it."""
MAX_FILE_BYTES: Final = 64 << 20
"""Bytes of questions, all of which are held in memory: a million short ones."""

_EPILOG = """\b
Examples:
  aci-p2p batch questions.txt                          one question on each line
  aci-p2p batch --at-once 16 --json questions.txt > answers.jsonl
  generate | aci-p2p batch --max-tokens 32 --json -    from standard input
"""


@click.command("batch", short_help="Ask a model of the network many questions.", epilog=_EPILOG)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True, allow_dash=True))
@configured(*CLIENT)
@click.option(
    "--at-once",
    type=click.IntRange(min=1),
    default=DEFAULT_AT_ONCE,
    show_default=True,
    help="Questions at once; those beyond the providers' free slots wait for one.",
)
@json_option
def command(file: Path, given: Given, at_once: int, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Ask a model of the network each line of FILE ('-' is standard input), several at once, and save the proofs.

    Answers come in the order in which they are finished; with --json each is one line, with the number and the text of
    its question. A question that fails ends none of the others: it is named on standard error, and the exit code is
    that of the first one. Questions wait ten minutes for a free slot, unless --busy-wait is set.
    """
    loaded = given.load()
    config, wanted = client_beside(loaded), loaded.config.client
    if loaded.origins["client.busy_wait_ms"].source == "default":
        wanted = replace(wanted, busy_wait_ms=BUSY_WAIT_MS)
    check_reachable(config)
    questions = _read(file)
    # What can be refused here is refused before anybody is dialled.
    resolve_model(wanted.model, config)
    for _, question in questions:
        conversation_of(question)
    batch = _Batch(config, wanted, questions, as_json=as_json)

    async def work(stop: Stop) -> None:
        await batch.run(stop, at_once)

    run(work)
    if batch.failures:
        # Each was told when it came.
        click.get_current_context().exit(batch.failures[0].exit_code)


def _read(file: Path) -> list[tuple[int, str]]:
    """The questions, with the numbers of their lines. Raises LocalError."""
    try:
        stream = sys.stdin.buffer if str(file) == "-" else file.open("rb")
        with stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        msg = f"{file} cannot be read: {error.strerror}"
        raise LocalError(msg) from None
    if len(data) > MAX_FILE_BYTES:
        msg = f"{file} holds more than {MAX_FILE_BYTES >> 20} MiB"
        raise LocalError(msg, hint="ask in several batches")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        msg = f"{file} is not UTF-8 text"
        raise LocalError(msg) from None
    questions = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        msg = f"{file} has no question"
        raise LocalError(msg, hint="write one on each line")
    return questions


class _Batch:
    """Asks, and shows what comes."""

    def __init__(
        self, config: NodeConfig, wanted: ClientConfig, questions: Sequence[tuple[int, str]], *, as_json: bool
    ) -> None:
        self.failures: list[AciError] = []
        """What went wrong, in order of arrival: questions without an answer, and proofs that could not be saved."""
        self._config = config
        self._wanted = wanted
        self._questions = questions
        self._as_json = as_json
        self._status = Console(stderr=True, highlight=False, soft_wrap=True)
        self._answers = self._price = 0

    async def run(self, stop: Stop, at_once: int) -> None:
        """Ask all questions."""
        status, wanted = self._status, self._wanted
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        # Answers on the same terminal would land in the middle of a bar, and show the progress themselves.
        bars = Progress(*columns, console=status, transient=True, disable=not status.is_terminal or sys.stdout.isatty())
        async with ACI(self._config) as aci:
            with bars, stop:
                task = bars.add_task("asking", total=len(self._questions))
                async with aci.batch(
                    [question for _, question in self._questions],
                    at_once=at_once,
                    model=wanted.model,
                    max_tokens=wanted.max_tokens,
                    temperature=wanted.temperature,
                    requirements=requirements_of(wanted),
                    fallback=fallback_of(wanted),
                ) as results:
                    async for result in results:
                        await self._show(result)
                        bars.advance(task)
        failed = f"; {len(self.failures)} failed" if self.failures else ""
        status.print(f"{plural(self._answers, 'answer')}{failed}; {format_amount(self._price)}", style="dim")

    async def _show(self, result: BatchResult) -> None:
        line, question = self._questions[result.number]
        outcome = result.outcome
        if isinstance(outcome, AciError):
            self._fail(line, outcome)
            fields: dict[str, object] = {"error": outcome.message, "hint": outcome.hint, "code": outcome.code}
        else:
            self._answers += 1
            self._price += outcome.receipt.body.price
            fields = {**document_of(outcome), "proof_file": self._save(line, outcome)}
        shown = ""
        if self._as_json:
            shown = json.dumps({"line": line, "question": question, **fields}) + "\n"
        elif isinstance(outcome, Answer):
            shown = f"{line}: {printable(question)}\n{printable_lines(outcome.text).strip()}\n\n"
        # A reader that takes its time holds up no job.
        await write_text(sys.stdout, shown)

    def _save(self, line: int, answer: Answer) -> str | None:
        """Keep the proof; in which file, if it could be written."""
        path = proof_path(self._config, answer)
        try:
            write_atomically(path, encode_proof(answer.proof))
        except AciError as error:
            # What was paid for is shown all the same.
            self._fail(line, error)
            return None
        return str(path)

    def _fail(self, line: int, error: AciError) -> None:
        self.failures.append(error)
        hint = f"; {error.hint}" if error.hint else ""
        self._status.print(f"line {line}: {printable(error.message + hint)}", style="yellow", markup=False)
