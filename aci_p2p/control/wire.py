"""What goes over the control socket: one JSON document on a line for each question, and one for its answer.

A question is `{"version": 1, "command": "status"}`, with an `argument` where the command takes one; an answer is
`{"version": 1, "result": {...}}`, or `{"version": 1, "error": {"code": "...", "message": "...", "hint": "..."}}`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, cast

from aci_p2p.protocol.errors import AciError, LocalError, ResourceError

VERSION: Final = 1
"""Of the protocol; raised when an old client would misread a new answer."""
MAX_REQUEST_BYTES: Final = 4_096
"""Longest question, bytes, with its line end; ours take 40."""
MAX_ANSWER_BYTES: Final = 4 << 20
"""Longest answer that a client reads, bytes; a thousand connections take half a MiB."""
MAX_DEPTH: Final = 8
"""Brackets within brackets of a question; ours have one. Python's parser would recurse into thousands."""


class BadRequest(LocalError):
    """A question that this node does not understand."""

    code = "bad_request"


class NotReady(ResourceError):
    """The node that runs is starting, or about to end."""

    code = "not_ready"


@dataclass(frozen=True, slots=True)
class Request:
    """A question."""

    command: str
    """What is asked."""
    argument: str = ""
    """About what; empty where there is nothing to say."""


def encode_request(request: Request) -> bytes:
    """A question."""
    argument = {"argument": request.argument} if request.argument else {}
    return _line({"version": VERSION, "command": request.command, **argument})


def decode_request(line: bytes) -> Request:
    """A question. Raises BadRequest."""
    if sum(line.count(bracket) for bracket in b"[{") > MAX_DEPTH:
        msg = "the question is not a simple object"
        raise BadRequest(msg)
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        msg = "the question is no JSON document on one line"
        raise BadRequest(msg) from None
    question = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    version, command, argument = question.get("version"), question.get("command"), question.get("argument", "")
    if type(version) is not int or not isinstance(command, str) or not isinstance(argument, str):
        msg = "a question has a version, a command and maybe an argument"
        raise BadRequest(msg)
    if version != VERSION:
        msg = f"this node speaks version {VERSION} of the control protocol, not {version}"
        raise BadRequest(msg, hint="use the aci-p2p that the node runs with")
    return Request(command, argument)


def encode_result(result: object) -> bytes:
    """An answer."""
    return _line({"version": VERSION, "result": result})


def encode_error(error: AciError) -> bytes:
    """An answer that says what went wrong."""
    return _line({"version": VERSION, "error": {"code": error.code, "message": error.message, "hint": error.hint}})


def decode_answer(line: bytes) -> object:
    """The result of an answer. Raises NotReady, BadRequest with what the node says, or when the answer is none."""
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    answer = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    if answer.get("version") == VERSION and "result" in answer:
        return answer["result"]
    error = answer.get("error")
    if isinstance(error, dict):
        told = cast("dict[str, object]", error)
        kind = NotReady if told.get("code") == NotReady.code else BadRequest
        raise kind(str(told.get("message", "")), hint=str(told.get("hint", "")))
    msg = "what answers on the control socket speaks another protocol"
    raise BadRequest(msg, hint="restart the node with this version of aci-p2p")


def _line(value: object) -> bytes:
    # In ASCII: a line end in a peer's text must not end the line.
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
