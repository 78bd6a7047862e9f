"""The worker process: runs models apart from the node, so that neither their load nor their death is the node's.

It reads requests from standard input and writes replies to standard output (frames.py), and ends when its input does:
a node that is killed leaves no worker behind. (PR_SET_PDEATHSIG would not do: it follows the thread that started the
process, and that of trio ends before the node.)
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from aci_p2p.executor.frames import (
    Cancel,
    Credit,
    Encode,
    Ended,
    Failed,
    Forward,
    FrameReader,
    Generate,
    Load,
    Reply,
    Start,
    encode_frame,
)
from aci_p2p.executor.parallel import Team
from aci_p2p.executor.scheduling import Flag, Scheduler
from aci_p2p.executor.store import ModelStore

READ_BYTES: Final = 1 << 16
"""Bytes of one read: the capacity of a pipe on Linux."""
OOM_SCORE: Final = "1000"
"""Out of memory, the kernel kills the worker first."""

_Inbox: TypeAlias = "queue.SimpleQueue[tuple[Start, Flag] | Credit | Cancel]"


def main() -> None:
    """Run until standard input ends. Arguments: the model store's path, the threads and the largest batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # only Linux has it
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, "ascii")
    # Whatever a library prints goes to standard error.
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    inbox: _Inbox = queue.SimpleQueue()
    flags: dict[int, Flag] = {}
    threading.Thread(target=_read, args=(inbox, flags), daemon=True).start()
    store, threads, max_batch = ModelStore(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    try:
        with Team(threads) as team:
            _serve(Scheduler(store, _sender(output, flags), max_batch, team), inbox)
    except BaseException:  # noqa: BLE001 - the reading thread would keep a broken worker alive
        traceback.print_exc()
        os._exit(1)


def _sender(output: int, flags: dict[int, Flag]) -> Callable[[Reply], None]:
    """Writes replies to a file descriptor; a job that is over loses its flag."""

    def send(reply: Reply) -> None:
        if isinstance(reply, Ended | Failed):
            flags.pop(reply.job, None)
        data = memoryview(encode_frame(reply))
        try:
            while data:
                data = data[os.write(output, data) :]
        except OSError:  # the node is gone
            os._exit(0)

    return send


def _serve(scheduler: Scheduler, inbox: _Inbox) -> None:
    """Take requests and compute, for ever."""
    working = False
    while True:
        while not working or not inbox.empty():
            match inbox.get():
                case (request, flag):
                    scheduler.start(request, flag)
                case Credit() as credit:
                    scheduler.add_credit(credit)
                case Cancel():
                    pass  # its flag is up already
            working = True
        working = scheduler.step()


def _read(inbox: _Inbox, flags: dict[int, Flag]) -> None:
    """Pass requests on and raise the flags of those cancelled; the process ends with the input."""
    frames = FrameReader()
    try:
        while data := os.read(sys.stdin.fileno(), READ_BYTES):
            for message in frames.feed(data):
                match message:
                    case Load() | Generate() | Encode() | Forward():
                        flags[message.job] = flag = Flag()
                        inbox.put((message, flag))
                    case Cancel():
                        flags.get(message.job, Flag()).up = True
                        inbox.put(message)
                    case Credit():
                        inbox.put(message)
                    case _:
                        msg = f"the node sent {type(message).__name__}"
                        raise AssertionError(msg)  # noqa: TRY301 - reported as any other failure to read
    except Exception:  # noqa: BLE001 - whatever it is, there is nothing more to read
        traceback.print_exc()
    os._exit(0)
