"""What goes to standard output and comes from standard input, whatever stands behind them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from rich.console import Console

from aci_p2p.attempts import Hedged, Update, Waiting
from aci_p2p.cli.answering import Show
from aci_p2p.cli.common import print_json
from aci_p2p.client import AnswerStream
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import Deliver, FailedOver
from tests.cli.conftest import one_line
from tests.cli.views import NODE


def test_an_answer_is_printed_as_it_is() -> None:
    out = io.StringIO()
    console = Console(file=out, width=10)

    async def updates() -> AsyncGenerator[Update]:
        for text in ("a\tb :smile:", " [red]x[/red]  \n", "long " * 9):
            yield Deliver((1,), text)

    stream = cast("AnswerStream", SimpleNamespace(updates=updates(), answer=None))
    trio.run(Show(console, console, steps=False).run, stream)
    assert out.getvalue() == "a\tb :smile: [red]x[/red]  \n" + "long " * 9 + "\n"


def test_setbacks_are_told() -> None:
    out = io.StringIO()
    provider = NodeId(bytes(32))
    told: dict[Update, str] = {
        FailedOver(
            provider, "it died [at once]", 0
        ): "failed before its first token (it died [at once]); another is to go on",
        FailedOver(provider, "it died", 3): "failed after 3 tokens (it died); another is to go on",
        Hedged(provider, 1_500): "is late: no token after 1.5 s; another is asked too",
        Waiting(700, "all slots are taken"): "all slots are taken; asking again in 0.7 s",
    }

    async def updates() -> AsyncGenerator[Update]:
        for update in told:
            yield update

    stream = cast("AnswerStream", SimpleNamespace(updates=updates(), answer=None))
    trio.run(Show(Console(file=out, width=200), None, steps=False).run, stream)
    assert out.getvalue().splitlines() == [
        news if "asking" in news else f"{provider.short} {news}" for news in told.values()
    ]


def test_a_document_fits_every_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": "é\u2028\U0001f600"}
    print_json(value)
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == value


def test_a_terminal_of_few_characters() -> None:
    code = "import sys; sys.argv[1:] = ['--version']; from aci_p2p.cli import main\ntry: main()\nexcept SystemExit: "
    code += "print('\u00e9')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii"}
    )
    assert result.returncode == 0
    assert result.stdout.endswith(b"?\n")


@pytest.mark.parametrize(("output", "code"), [(">&-", 0), ("> /dev/full", 2), ("| true", 0)])
def test_an_output_that_takes_nothing(home: Path, output: str, code: int) -> None:
    if output == "> /dev/full" and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = f'"$0" -c \'from aci_p2p.cli import main; main()\' keys list --home "$1" {output}'
    result = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable, str(home)], capture_output=True, text=True, check=False
    )
    if code:
        assert one_line(result, code) == "aci-p2p: cannot write the output: No space left on device"
    else:
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"", "is empty"),
        (b"x" * ((512 << 10) - 1) + "é".encode(), "longer than 524288 bytes"),
    ],
)
def test_a_prompt_from_standard_input(home: Path, data: bytes, words: str) -> None:
    command = [sys.executable, "-c", "from aci_p2p.cli import main; main()"]
    arguments = ["infer", "--home", str(home), "--bootstrap", f"/ip4/127.0.0.1/tcp/1/p2p/{NODE}", "-"]
    result = subprocess.run([*command, *arguments], input=data, capture_output=True, check=False)
    text = subprocess.CompletedProcess(result.args, result.returncode, "", result.stderr.decode())
    assert words in one_line(text, 2)
