"""Background tasks: they end with their block, and their errors come out by type."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.protocol.errors import LocalError, RemoteError
from aci_p2p.tasks import open_background


class Log:
    """What tasks did, in order."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    async def sleep(self, name: str) -> None:
        """Sleep until cancelled, then clean up for a while."""
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            self.entries.append(f"{name} ended")


@pytest.fixture
def log() -> Log:
    return Log()


async def fail(error: BaseException) -> None:
    await trio.lowlevel.checkpoint()
    raise error


async def fail_at_the_end() -> None:
    try:
        await trio.sleep_forever()
    finally:
        msg = "at the end"
        raise LocalError(msg)


async def fail_at_once(error: BaseException) -> None:
    raise error


async def test_tasks_end_with_their_block(autojump_clock: MockClock, log: Log) -> None:
    with trio.fail_after(2):
        async with open_background() as tasks:
            tasks.start_soon(log.sleep, "task")
            await trio.lowlevel.checkpoint()
            log.entries.append("block ended")
    assert log.entries == ["block ended", "task ended"]
    assert trio.current_time() == 1


async def test_a_task_that_ends_does_not_end_the_block(autojump_clock: MockClock) -> None:
    async with open_background() as tasks:
        tasks.start_soon(trio.sleep, 1)
        await trio.sleep(2)
    assert trio.current_time() == 2


@pytest.mark.parametrize("error", [LocalError("ours"), ValueError("a bug"), KeyboardInterrupt(), SystemExit(3)])
async def test_an_error_of_the_block_comes_out_as_itself(
    autojump_clock: MockClock, log: Log, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        async with open_background() as tasks:
            tasks.start_soon(log.sleep, "task")
            await fail(error)
    assert caught.value is error
    assert log.entries == ["task ended"]


@pytest.mark.parametrize("error", [LocalError("ours"), ValueError("a bug"), KeyboardInterrupt(), SystemExit(3)])
async def test_an_error_of_a_task_comes_out_as_itself(
    autojump_clock: MockClock, log: Log, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        async with open_background() as tasks:
            tasks.start_soon(log.sleep, "other task")
            tasks.start_soon(fail, error)
            await log.sleep("block")
    assert caught.value is error
    assert sorted(log.entries) == ["block ended", "other task ended"]


async def test_an_error_comes_out_of_blocks_in_blocks() -> None:
    error = RemoteError("theirs")
    with pytest.raises(RemoteError) as caught:
        async with open_background() as outer, open_background(), open_background() as inner:
            inner.start_soon(fail, error)
            outer.start_soon(trio.sleep_forever)
            await trio.sleep_forever()
    assert caught.value is error


async def test_an_error_comes_out_of_a_nursery_within() -> None:
    error = RemoteError("theirs")

    async def nest(depth: int) -> None:
        async with trio.open_nursery() as nursery:
            if depth:
                nursery.start_soon(nest, depth - 1)
            else:
                nursery.start_soon(fail, error)

    with pytest.raises(RemoteError) as caught:
        async with open_background() as tasks:
            tasks.start_soon(nest, 3)
            await trio.sleep_forever()
    assert caught.value is error


async def test_a_cause_is_kept() -> None:
    cause = OSError("the disk")

    async def translate() -> None:
        try:
            await fail(cause)
        except OSError as error:
            msg = "the store"
            raise LocalError(msg) from error

    with pytest.raises(LocalError, match="the store") as caught:
        async with open_background():
            await translate()
    assert caught.value.__cause__ is cause


async def test_several_errors_come_out_in_a_group() -> None:
    errors = [LocalError("ours"), RemoteError("theirs")]
    with pytest.raises(ExceptionGroup) as caught:
        async with open_background(), open_background() as tasks:
            for error in errors:
                tasks.start_soon(fail_at_once, error)
            await trio.sleep_forever()
    assert sorted(map(str, caught.value.exceptions)) == ["ours", "theirs"]


async def start_and_wait(log: Log) -> None:
    async with open_background() as tasks:
        tasks.start_soon(log.sleep, "task")
        tasks.start_soon(log.sleep, "task")
        await trio.sleep_forever()


async def start_in_a_nursery(log: Log) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(start_and_wait, log)


@pytest.mark.parametrize("serve", [start_and_wait, start_in_a_nursery])
async def test_cancellation_ends_block_and_tasks(
    autojump_clock: MockClock, log: Log, serve: Callable[[Log], Awaitable[None]]
) -> None:
    with trio.move_on_after(5) as scope:
        await serve(log)
        log.entries.append("not reached")
    assert scope.cancelled_caught
    assert log.entries == ["task ended"] * 2
    assert trio.current_time() == 6


async def test_an_error_during_cancellation_is_not_lost(autojump_clock: MockClock) -> None:
    with pytest.raises(LocalError, match="at the end"), trio.move_on_after(5):
        async with open_background():
            await fail_at_the_end()


async def test_an_error_while_the_block_ends_comes_out(autojump_clock: MockClock) -> None:
    with pytest.raises(LocalError, match="at the end"):
        async with open_background() as tasks:
            tasks.start_soon(fail_at_the_end)
            await trio.sleep(1)


async def test_an_error_comes_out_as_itself_though_all_was_cancelled(autojump_clock: MockClock) -> None:
    with pytest.raises(LocalError, match="at the end"), trio.move_on_after(5):
        async with open_background() as tasks:
            tasks.start_soon(fail_at_the_end)
            await trio.sleep_forever()
