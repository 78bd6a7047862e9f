"""`aci-p2p batch` against a running provider."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, one_line
from tests.scenarios.daemons import Daemon, run_command

pytestmark = pytest.mark.slow

ASK = ("--model", "rare", "--max-tokens", "3")


def test_many_questions(provider: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_text("\ufeffHello!\r\n\nWho\u2028are you?\n  And :x: I?  \n", encoding="utf-8")
    asked = run_command(provider.home, "batch", *ASK, "--json", str(file))
    assert asked.returncode == 0, asked.stderr
    answers = {answer["line"]: answer for answer in map(json.loads, asked.stdout.splitlines())}
    assert {line: answer["question"] for line, answer in answers.items()} == {
        1: "Hello!", 3: "Who\u2028are you?", 4: "And :x: I?",
    }  # fmt: skip
    assert "3 answers; " in asked.stderr
    for answer in answers.values():
        assert len(answer["tokens"]) == 3
        checked = run_command(provider.home, "verify", "--json", answer["proof_file"])
        assert json.loads(checked.stdout)["job_id"] == answer["job_id"]

    text = run_command(provider.home, "batch", *ASK, "--at-once", "1", str(file))
    assert text.stdout.splitlines()[0] == "1: Hello!"
    assert [line for line in text.stdout.splitlines() if line.startswith(("3: ", "4: "))] == [
        "3: Who are you?", "4: And :x: I?",
    ]  # fmt: skip


def test_one_of_them_fails(provider: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_text("Hello!\n" + "word " * 5_000 + "\n")
    asked = run_command(provider.home, "batch", *ASK, "--json", str(file))
    assert asked.returncode == 2
    first, second = sorted(map(json.loads, asked.stdout.splitlines()), key=lambda answer: answer["line"])
    assert first["text"]
    assert (second["code"], second["line"]) == ("prompt_refused", 2)
    told = [line for line in asked.stderr.splitlines() if line.startswith("line 2: ")]
    assert len(told) == 1
    assert second["hint"] in told[0]
    assert "1 answer; 1 failed" in asked.stderr
    text = run_command(provider.home, "batch", *ASK, str(file))
    assert (text.returncode, text.stdout.splitlines()[0]) == (2, "1: Hello!")
    assert "line 2: " not in text.stdout


def test_what_cannot_be_asked(cli: Cli, tmp_path: Path) -> None:
    at = ("--bootstrap", "/ip4/192.0.2.1/tcp/9/p2p/12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X")
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe")
    assert "has no question" in one_line(cli("batch", *at, str(empty)), 2)
    assert "is not UTF-8" in one_line(cli("batch", *at, str(binary)), 2)
    assert "has no question" in one_line(cli("batch", *at, "-"), 2)
    assert "does not exist" in one_line(cli("batch", *at, str(tmp_path / "none")), 2)
    assert "unknown model" in one_line(cli("batch", *at, "--model", "none", "-", stdin="Hello!"), 2)
    assert "no node is known" in one_line(cli("batch", "-", stdin="Hello!"), 2)
