"""The worker process as the node sees it: it works, it dies, it is replaced, and it never outlives the node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

from aci_p2p.executor import connection, process
from aci_p2p.executor.api import (
    Executor,
    ExecutorFailed,
    FinishReason,
    GenerationRequest,
    Message,
    ModelUnavailable,
    PromptTooLong,
    Sampling,
    TemplateRefused,
    TokenChunk,
    WeightsMismatch,
)
from aci_p2p.executor.frames import (
    Accepted,
    Cancel,
    Chunk,
    Encoded,
    Ended,
    Ending,
    Failed,
    Load,
    Loaded,
    Logits,
    encode_frame,
)
from aci_p2p.executor.process import CREDIT, default_threads, open_process_executor
from aci_p2p.executor.store import ModelStore
from aci_p2p.protocol.errors import LocalError
from aci_p2p.version import VERSION
from tests.executor.tiny import CONTEXT, vocabulary, write_tiny_model

HOT = Sampling(2000, bytes(32))
"""Tiny models repeat themselves when greedy."""
SOON_S = 5.0
"""Longest time for what should happen at once, seconds: the machine may be busy."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """One tiny model that never ends by itself, `tiny`."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "tiny")
    (folder / "tiny" / "generation_config.json").unlink()
    config = (folder / "tiny" / "config.json").read_text().replace('"eos_token_id": 0', '"eos_token_id": []')
    (folder / "tiny" / "config.json").write_text(config)
    store = ModelStore(folder / "store")
    store.add_directory(folder / "tiny")
    return store


def request(text: str = "the", count: int = 10, sampling: Sampling = HOT) -> GenerationRequest:
    return GenerationRequest([Message("user", text)], count, sampling)


async def collect(executor: Executor, wanted: GenerationRequest) -> list[TokenChunk]:
    async with executor.generate("tiny", wanted) as chunks:
        return [chunk async for chunk in chunks]


def tokens_of(chunks: Sequence[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


async def until_idle(executor: Executor) -> None:
    """Until the worker has no generation any more; the test's timeout ends a wait in vain."""
    while executor.statistics().running or executor.statistics().waiting:  # noqa: ASYNC110 - counters, not events
        await trio.sleep(0.002)


def process_of(executor: Executor) -> trio.Process:
    """The worker behind an executor."""
    assert isinstance(executor, process._ProcessExecutor)
    assert executor._worker is not None
    assert executor._worker.process is not None
    return executor._worker.process


async def test_everything_that_an_executor_does(store: ModelStore) -> None:
    async with open_process_executor(store) as executor:
        info = await executor.load("tiny")
        assert (info.name, info.root) == ("tiny", store.open("tiny").root)
        assert (info.context, info.vocabulary) == (CONTEXT, len(vocabulary()))

        chunks = await collect(executor, request())
        assert [chunk.index for chunk in chunks] == list(range(10))
        assert [chunk.finish for chunk in chunks] == [None] * 9 + [FinishReason.LENGTH]
        assert tokens_of(await collect(executor, request())) == tokens_of(chunks)
        other_seed = Sampling(2000, bytes([1] * 32))
        assert tokens_of(await collect(executor, request(sampling=other_seed))) != tokens_of(chunks)

        prompt = await executor.encode("tiny", [Message("user", "the")])
        async with executor.generate("tiny", request(sampling=Sampling())) as generation:
            assert generation.input_tokens == len(prompt)
            greedy = tokens_of([chunk async for chunk in generation])
        result = await executor.forward("tiny", [*prompt, *greedy[:-1]], start=len(prompt) - 1)
        assert result.logits.dtype == np.float32
        assert result.logits.shape == (10, len(vocabulary()))
        assert result.logits.argmax(-1).tolist() == greedy

        description = executor.describe("tiny")
        assert (description.engine, description.profile) == (f"aci-numpy/{VERSION}", "fp32-ref")
        assert description.device.startswith("cpu ")
        statistics = executor.statistics()
        assert (statistics.running, statistics.waiting, statistics.produced, statistics.restarts) == (0, 0, 40, 0)


async def test_an_answer_goes_on_in_another_worker(store: ModelStore) -> None:
    async with open_process_executor(store) as executor:
        whole = await collect(executor, request(count=20))
    async with open_process_executor(store) as executor:
        for split in (1, 10, 19):
            wanted = replace(request(count=20), accepted=tuple(tokens_of(whole)[:split]))
            async with executor.generate("tiny", wanted) as generation:
                assert generation.input_tokens == len(await executor.encode("tiny", wanted.messages))
                assert [chunk async for chunk in generation] == whole[split:]
        with pytest.raises(LocalError, match="none of the model's"):
            await collect(executor, replace(request(), accepted=(len(vocabulary()),)))


async def test_many_at_once_get_what_they_would_alone(store: ModelStore) -> None:
    texts = ["the", "a" * 150, "abc", "ll the", "漢字", "b" * 70]
    async with open_process_executor(store, threads=2) as executor:
        alone = [tokens_of(await collect(executor, request(text))) for text in texts]
        together: dict[str, list[int]] = {}

        async def run(text: str) -> None:
            together[text] = tokens_of(await collect(executor, request(text)))

        async with trio.open_nursery() as nursery:
            for text in texts:
                nursery.start_soon(run, text)
        assert [together[text] for text in texts] == alone


async def test_errors_keep_their_types(store: ModelStore, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    store.add_directory(write_tiny_model(tmp_path / "tiny"))
    altered = store.add_directory(write_tiny_model(tmp_path / "altered", seed=1))
    with (altered.directory / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    async with open_process_executor(store) as executor:
        with pytest.raises(ModelUnavailable, match="there is no model 'none'"):
            await executor.load("none")
        with pytest.raises(WeightsMismatch) as caught:
            await executor.load("altered")
        assert (caught.value.model, caught.value.expected) == ("altered", altered.root)
        with pytest.raises(PromptTooLong):
            await collect(executor, request(count=CONTEXT))
        with pytest.raises(PromptTooLong):
            await executor.forward("tiny", [1] * (CONTEXT + 1), start=CONTEXT)
        with pytest.raises(TemplateRefused):
            await executor.encode("tiny", [Message("user", "a"), Message("system", "b")])
        with pytest.raises(LocalError, match="no role"):
            await executor.encode("tiny", [Message("robot", "a")])
        with pytest.raises(LocalError, match="seed of 32 bytes"):
            await collect(executor, request(sampling=Sampling(500)))
        with pytest.raises(LocalError, match="beyond the vocabulary"):
            await executor.forward("tiny", [len(vocabulary())])
        assert executor.statistics().restarts == 0
        assert len(await collect(executor, request())) <= 10


async def test_refused_without_a_worker(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_process_executor(store) as executor:
        with pytest.raises(LocalError, match="0 tokens"):
            await collect(executor, request(count=0))
        with pytest.raises(PromptTooLong):
            await executor.encode("tiny", [Message("user", "a")] * 5000)
        with pytest.raises(PromptTooLong):
            await collect(executor, request("é" * (5 << 20)))
        for accepted in ((-1,), (1 << 32,), (5,) * 11):
            with pytest.raises(LocalError, match="cannot"):
                await collect(executor, replace(request(), accepted=accepted))
        for tokens, start in (([], 0), ([1], 1), ([1], -1), ([-1], 0), ([1 << 32], 0)):
            with pytest.raises(LocalError, match="cannot compute"):
                await executor.forward("tiny", tokens, start=start)
        with pytest.raises(LocalError):
            await collect(executor, request(sampling=Sampling(500, bytes(33))))
        assert executor.statistics().restarts == 0
        monkeypatch.setattr(process, "FORWARD_BYTES_MAX", 10 * 4 * len(vocabulary()))
        assert (await executor.forward("tiny", [1] * 10)).logits.shape[0] == 10
        with pytest.raises(LocalError, match="11 tokens"):
            await executor.forward("tiny", [1] * 11)


async def test_leaving_early_stops_the_computation(store: ModelStore) -> None:
    async with open_process_executor(store) as executor:
        async with executor.generate("tiny", request(count=400)) as chunks:
            async for _ in chunks:
                break
        await until_idle(executor)
        produced = executor.statistics().produced
        assert produced < 400
        with trio.move_on_after(0.05):
            async with executor.generate("tiny", request(count=400)) as chunks:
                await trio.sleep_forever()
        await until_idle(executor)
        assert executor.statistics().produced < produced + 400
        assert len(await collect(executor, request())) == 10


async def test_a_slow_reader_pauses_its_own_generation_only(store: ModelStore) -> None:
    async with open_process_executor(store) as executor, executor.generate("tiny", request(count=300)) as chunks:
        while executor.statistics().produced < CREDIT:  # noqa: ASYNC110 - a counter, not an event
            await trio.sleep(0.002)
        assert len(await collect(executor, request("abc", 100))) == 100
        assert executor.statistics().produced == CREDIT + 100
        assert len([chunk async for chunk in chunks]) == 300


async def test_more_jobs_than_places_wait(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "JOBS_MAX", 2)
    finished: list[int] = []
    most = 0
    async with open_process_executor(store, max_batch=1) as executor:

        async def run(number: int) -> None:
            nonlocal most
            async with executor.generate("tiny", request(count=4 * CREDIT)) as chunks:
                async for _ in chunks:
                    statistics = executor.statistics()
                    most = max(most, statistics.running + statistics.waiting)
            finished.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(run, number)
    assert sorted(finished) == list(range(6))
    assert most == 2


async def test_a_killed_worker_fails_its_jobs_and_is_replaced(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "JOBS_MAX", 2)
    async with open_process_executor(store) as executor:
        expected = tokens_of(await collect(executor, request()))
        first = process_of(executor)
        async with (
            executor.generate("tiny", request(count=400)) as chunks,
            executor.generate("tiny", request()) as more,
        ):
            await anext(chunks)
            os.kill(first.pid, signal.SIGKILL)
            with pytest.raises(ExecutorFailed, match="killed by SIGKILL") as caught:
                [chunk async for chunk in chunks]
            assert "memory" in caught.value.hint
            with pytest.raises(ExecutorFailed, match="killed by SIGKILL"):
                [chunk async for chunk in more]
            assert [chunk async for chunk in chunks] == []
        assert (executor.statistics().running, executor.statistics().waiting) == (0, 0)
        assert tokens_of(await collect(executor, request())) == expected
        assert process_of(executor).pid != first.pid
        statistics = executor.statistics()
        assert statistics.restarts == 1
        assert statistics.produced > 20


def sends(data: bytes) -> str:
    """A program that takes a request, writes `data` and waits for the end of its input."""
    return f"import os; os.read(0, 1); os.write(1, bytes.fromhex('{data.hex()}')); os.read(0, 99999); os.read(0, 1)"


BROKEN_WORKERS = {
    "killed": (
        "import os, signal; os.read(0, 1); os.kill(os.getpid(), signal.SIGSEGV)",
        "the worker process was killed by SIGSEGV$",
    ),
    "ended": (
        "import os, sys; os.read(0, 1); print('Fatal:\\x1b[31m no  BLAS\\n', file=sys.stderr); sys.exit(3)",
        r"the worker process ended with status 3: Fatal: \[31m no  BLAS$",
    ),
    "no frame": (sends(b"GET / HTTP/1.1"), "nonsense: not a frame"),
    "another type": (sends(encode_frame(Ended(0))[:-1] + b"\x60"), "nonsense: Ended.job"),
    "another job": (sends(encode_frame(Ended(9))), "job 9, which is over"),
    "a request": (sends(encode_frame(Cancel(0))), "a request where"),
    "no answer": (sends(encode_frame(Ended(0))), "Ended out of turn"),
    "another answer": (sends(encode_frame(Encoded(0, b""))), "Encoded out of turn"),
}
"""Programs in the worker's place, and what is said about them."""


@pytest.mark.parametrize("name", BROKEN_WORKERS)
async def test_broken_workers(store: ModelStore, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    program, message = BROKEN_WORKERS[name]
    monkeypatch.setattr(connection, "_BOOT", program)
    async with open_process_executor(store) as executor:
        with pytest.raises(ExecutorFailed, match=message):
            await executor.load("tiny")


async def test_a_worker_that_does_not_accept_a_generation(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_BOOT", sends(encode_frame(Chunk(0, 0, (1,), "a", Ending.LENGTH))))
    async with open_process_executor(store) as executor:
        with pytest.raises(ExecutorFailed, match="Chunk out of turn"):
            await collect(executor, request())


async def test_a_worker_that_sends_more_than_asked_for(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [encode_frame(Chunk(0, index, (1,), "a", Ending.NONE)) for index in range(CREDIT + 3)]
    monkeypatch.setattr(connection, "_BOOT", sends(encode_frame(Accepted(0, 1)) + b"".join(chunks)))
    async with open_process_executor(store) as executor, executor.generate("tiny", request()) as taken:
        await trio.testing.wait_all_tasks_blocked(0.1)
        with pytest.raises(ExecutorFailed, match="more replies to job 0 than asked for"):
            [chunk async for chunk in taken]


@pytest.mark.parametrize("size", [0, 63, 3 * 64])
async def test_logits_that_are_no_rows(store: ModelStore, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    loaded, logits = encode_frame(Loaded(0, bytes(32), 64, 16)), encode_frame(Logits(1, bytes(size)))
    program = f"import os; os.read(0, 99999); os.write(1, {loaded!r}); {sends(logits)[len('import os; ') :]}"
    monkeypatch.setattr(connection, "_BOOT", program)
    async with open_process_executor(store) as executor:
        with pytest.raises(ExecutorFailed, match="Logits out of turn"):
            await executor.forward("tiny", (1, 2))


async def test_half_a_token(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_BOOT", sends(encode_frame(Encoded(0, bytes(7)))))
    async with open_process_executor(store) as executor:
        with pytest.raises(ExecutorFailed, match="Encoded out of turn"):
            await executor.encode("tiny", [Message("user", "the")])


def test_a_dead_worker_takes_no_job(store: ModelStore) -> None:
    worker = connection.WorkerProcess(store.path, threads=1, max_batch=1)
    worker.alive = False
    with pytest.raises(ExecutorFailed, match="as soon as it was started"):
        worker.start(lambda number: Load(number, "tiny"), 1, lambda: None)


async def test_a_generation_that_failed_has_no_more_chunks(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = (Accepted(0, 1), Chunk(0, 0, (1,), "a", Ending.NONE), Failed(0, "local", "no more", "", ()))
    monkeypatch.setattr(connection, "_BOOT", sends(b"".join(encode_frame(frame) for frame in frames)))
    async with open_process_executor(store) as executor, executor.generate("tiny", request()) as chunks:
        assert (await anext(chunks)).text == "a"
        with pytest.raises(LocalError, match="no more"):
            await anext(chunks)
        assert [chunk async for chunk in chunks] == []


async def test_a_worker_that_cannot_be_started(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "JOBS_MAX", 1)
    async with open_process_executor(store) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/nonexistent/python")
            with pytest.raises(ExecutorFailed, match="cannot be started: No such file"):
                await executor.load("tiny")
        await executor.load("tiny")
        assert executor.statistics().restarts == 0


async def test_closing_is_quick_and_fails_what_runs(store: ModelStore) -> None:
    failures: list[str] = []

    async def run(executor: Executor, started: trio.Event) -> None:
        with pytest.raises(ExecutorFailed) as caught:
            async with executor.generate("tiny", request(count=400)) as chunks:
                async for _ in chunks:
                    started.set()
        failures.append(caught.value.message)

    async with trio.open_nursery() as nursery:
        async with open_process_executor(store) as executor:
            started = trio.Event()
            nursery.start_soon(run, executor, started)
            await started.wait()
            worker = process_of(executor)
            before = time.perf_counter()
        assert time.perf_counter() - before < SOON_S
        assert worker.returncode is not None
    assert failures == ["the executor was closed"]
    with pytest.raises(ExecutorFailed, match="closed"):
        await executor.load("tiny")


async def test_closing_a_worker_that_does_not_end(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_BOOT", "import time; time.sleep(60)")
    before = time.perf_counter()
    async with open_process_executor(store) as executor:
        with trio.move_on_after(0.05):
            await executor.load("tiny")
        worker = process_of(executor)
    assert time.perf_counter() - before < SOON_S
    assert worker.returncode == -signal.SIGKILL


async def test_errors_of_the_block_come_out_as_they_are(store: ModelStore) -> None:
    with pytest.raises(KeyError):
        async with open_process_executor(store) as executor:
            await executor.load("tiny")
            raise KeyError


async def test_cancelled_while_the_worker_starts(store: ModelStore) -> None:
    async with open_process_executor(store) as executor:
        for _ in range(3):
            with trio.move_on_after(0.001):
                await executor.load("tiny")
        assert (await executor.load("tiny")).name == "tiny"
        assert executor.statistics().restarts == 0


async def test_the_worker_is_nice_and_alone_in_its_session(store: ModelStore) -> None:
    async with open_process_executor(store, threads=3) as executor:
        await executor.load("tiny")
        pid = process_of(executor).pid
        assert os.getpriority(os.PRIO_PROCESS, pid) == niceness()
        assert os.getsid(pid) == pid
        os.kill(pid, signal.SIGINT)
        await executor.load("tiny")
        assert process_of(executor).pid == pid
        if sys.platform == "linux":
            check_as_linux_sees_it(pid)


def niceness() -> int:
    """Of a worker that we start: 19 is the most that there is."""
    return min(os.nice(0) + connection.NICENESS, 19)


def check_as_linux_sees_it(pid: int) -> None:
    """Of three threads that compute, and one that reads; BLAS has none of its own. All are nice, and the process is the
    first to go when memory runs out."""
    tasks = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    assert len(tasks) == 4
    assert {os.getpriority(os.PRIO_PROCESS, task) for task in tasks} == {niceness()}
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"


NODE = """
import signal, sys, pathlib, trio
from aci_p2p.executor import GenerationRequest, Message, ModelStore, open_process_executor
async def main():
    async with open_process_executor(ModelStore(pathlib.Path(sys.argv[1]))) as executor:
        async with executor.generate("tiny", GenerationRequest([Message("user", "a")], 400)) as chunks:
            await anext(chunks)
            print(executor._worker.process.pid, flush=True)
            async for _ in chunks:
                pass
            await trio.sleep_forever()
# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
trio.run(main)
"""


def ends(pid: int, within: float) -> bool:
    """Whether a process that is no child of ours ends in time."""
    deadline = time.perf_counter() + within
    while time.perf_counter() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if sys.platform == "linux" and ") Z " in Path(f"/proc/{pid}/stat").read_text():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_orphan_is_left(store: ModelStore, how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", NODE, store.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as node:
        assert node.stdout is not None
        assert node.stderr is not None
        pid = int(node.stdout.readline())
        node.send_signal(how)
        assert ends(pid, SOON_S)
        node.wait(SOON_S)
        errors = node.stderr.read()
    assert errors == "" if how == signal.SIGKILL else "KeyboardInterrupt" in errors


async def test_nothing_reaches_the_terminal(store: ModelStore, capfd: pytest.CaptureFixture[str]) -> None:
    async with open_process_executor(store) as executor:
        await collect(executor, request())
    assert capfd.readouterr() == ("", "")


async def test_prints_of_libraries_do_not_disturb_the_frames(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = (
        "import threading; from aci_p2p.executor import worker, scheduling; step = scheduling.Scheduler.step; "
        "scheduling.Scheduler.step = lambda self: print('noise', flush=True) or step(self); worker.main()"
    )
    monkeypatch.setattr(connection, "_BOOT", noisy)
    async with open_process_executor(store) as executor:
        assert len(await collect(executor, request())) == 10


@pytest.mark.parametrize(("cores", "threads"), [({0, 3, 5}, 2), ({7}, 1)])
def test_default_threads(monkeypatch: pytest.MonkeyPatch, cores: set[int], threads: int) -> None:
    def affinity(_pid: int) -> set[int]:
        return cores

    monkeypatch.setattr(os, "sched_getaffinity", affinity, raising=False)
    assert default_threads() == threads


@pytest.mark.parametrize(("cores", "threads"), [(8, 7), (1, 1), (None, 1)])
def test_default_threads_elsewhere(monkeypatch: pytest.MonkeyPatch, cores: int | None, threads: int) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert default_threads() == threads


def test_the_package_is_light() -> None:
    """A node that only asks others starts without what only the worker needs."""
    program = "import sys, aci_p2p.executor; print(sorted({'tokenizers', 'jinja2', 'torch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
