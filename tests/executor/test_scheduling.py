"""Which job runs when: batches, credit, cancellation, and errors that stay with their job. Without a process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aci_p2p.executor import scheduling
from aci_p2p.executor.api import ExecutorFailed, WeightsMismatch
from aci_p2p.executor.frames import (
    Accepted,
    Begun,
    Chunk,
    Credit,
    Encode,
    Encoded,
    Ended,
    Ending,
    Failed,
    Forward,
    Generate,
    Load,
    Loaded,
    Logits,
    Reply,
    Turn,
)
from aci_p2p.executor.parallel import Array, Team
from aci_p2p.executor.reference import PREFILL_CHUNK, KeyValueCache, LlamaModel, Stop
from aci_p2p.executor.scheduling import Flag, Scheduler
from aci_p2p.executor.store import ModelStore
from tests.executor.tiny import CONTEXT, END, byte_characters, vocabulary, write_tiny_model

SEED = bytes(32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """Three models: one, two, three."""
    folder = tmp_path_factory.mktemp("models")
    store = ModelStore(folder / "store")
    for seed, name in enumerate(("one", "two", "three")):
        store.add_directory(write_tiny_model(folder / name, seed=seed))
    return store


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids as frames hold them."""
    return np.array(tokens, "<u4").tobytes()


class Node:
    """The other side of a scheduler."""

    def __init__(self, store: ModelStore, max_batch: int = 4) -> None:
        self.replies: list[Reply] = []
        self.scheduler = Scheduler(store, self.replies.append, max_batch, Team(1))
        self.flags: dict[int, Flag] = {}

    def start(self, request: Load | Generate | Encode | Forward) -> None:
        self.flags[request.job] = Flag()
        self.scheduler.start(request, self.flags[request.job])

    def generate(
        self,
        job: int,
        text: str,
        count: int = 8,
        *,
        credit: int = 1000,
        model: str = "one",
        temperature: int = 2000,
        accepted: Sequence[int] = (),
    ) -> None:
        """Hot and with a seed by default: tiny models repeat themselves when greedy."""
        turns, seed = (Turn("user", text),), SEED if temperature else b""
        self.start(Generate(job, model, turns, count, temperature, seed, credit, packed(accepted)))

    def run(self, steps: int = 1000) -> int:
        """Step until nothing is left to do; the number of steps."""
        for step in range(steps):
            if not self.scheduler.step():
                return step
        return steps

    def of(self, job: int) -> list[Reply]:
        return [reply for reply in self.replies if reply.job == job]

    def chunks(self, job: int) -> list[Chunk]:
        return [reply for reply in self.of(job) if isinstance(reply, Chunk)]

    def tokens(self, job: int) -> list[int]:
        return [token for chunk in self.chunks(job) for token in chunk.tokens]

    def failed(self, job: int) -> Failed:
        (failed,) = [reply for reply in self.of(job) if isinstance(reply, Failed)]
        assert self.of(job)[-1] is failed
        return failed


@pytest.fixture
def node(store: ModelStore) -> Node:
    return Node(store)


def alone(store: ModelStore, text: str, count: int = 8, model: str = "one") -> list[int]:
    """The tokens of a generation that has the worker to itself."""
    node = Node(store)
    node.generate(1, text, count, model=model)
    node.run()
    return node.tokens(1)


def prompt_length(node: Node, text: str) -> int:
    """Tokens of a prompt, by job 99."""
    node.start(Encode(99, "one", (Turn("user", text),)))
    encoded, ended = node.replies[-2:]
    assert isinstance(encoded, Encoded)
    assert ended == Ended(99)
    del node.replies[-2:]
    return len(encoded.tokens) // 4


def test_load(node: Node, store: ModelStore) -> None:
    node.start(Load(7, "one"))
    assert node.replies == [Loaded(7, store.open("one").root, CONTEXT, len(vocabulary())), Ended(7)]


def test_encode(node: Node) -> None:
    node.start(Encode(1, "one", (Turn("user", "ab"),)))
    encoded, ended = node.replies
    assert isinstance(encoded, Encoded)
    assert ended == Ended(1)
    ids = np.frombuffer(encoded.tokens, "<u4").tolist()
    assert ids[0] == vocabulary()["<|start|>"]
    assert vocabulary()["ab"] in ids


def test_a_generation(node: Node) -> None:
    node.generate(3, "the", 5)
    assert node.replies == [Accepted(3, prompt_length(node, "the"))]
    node.run()
    begun, *chunks, ended = node.replies[1:]
    assert (begun, ended) == (Begun(3), Ended(3))
    assert [chunk.index for chunk in chunks if isinstance(chunk, Chunk)] == list(range(len(chunks)))
    endings = [chunk.ending for chunk in chunks if isinstance(chunk, Chunk)]
    assert endings[:-1] == [Ending.NONE] * (len(chunks) - 1)
    assert endings[-1] is (Ending.LENGTH if len(chunks) == 5 else Ending.STOP)


def test_an_end_token_ends(node: Node, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = alone(store, "the", 8)
    stop = tokens[3]
    assert stop not in tokens[:3]
    node.start(Load(1, "one"))
    monkeypatch.setattr(node.scheduler._models["one"].tokenizer, "stop_tokens", frozenset({stop}))
    node.generate(2, "the", 8)
    node.run()
    assert node.tokens(2) == tokens[:4]
    *_, last, ended = node.of(2)
    assert isinstance(last, Chunk)
    assert (last.ending, ended) == (Ending.STOP, Ended(2))


def test_a_character_cut_off_by_the_length(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    first_byte = vocabulary()[byte_characters()[0xF0]]

    def choose(*_: object) -> int:
        return first_byte

    monkeypatch.setattr(scheduling, "choose", choose)
    node.generate(1, "the", 1)
    node.run()
    assert Chunk(1, 0, (first_byte,), "\ufffd", Ending.LENGTH) in node.replies


def test_a_batch_gives_each_what_it_would_have_alone(node: Node, store: ModelStore) -> None:
    prompts = {1: "the", 2: "a" * 200, 3: "abc the lll", 4: "", 5: "漢字", 6: "b" * 80}
    for job, text in prompts.items():
        node.generate(job, text, 6)
    node.run()
    for job, text in prompts.items():
        assert node.tokens(job) == alone(store, text, 6)


def test_generations_of_two_models_at_once(node: Node, store: ModelStore) -> None:
    node.generate(1, "the", model="one")
    node.generate(2, "the", model="two")
    node.run()
    assert node.tokens(1) == alone(store, "the")
    assert node.tokens(2) == alone(store, "the", model="two") != node.tokens(1)


def test_greedy(node: Node) -> None:
    node.generate(1, "the", 4, temperature=0)
    node.start(Encode(2, "one", (Turn("user", "the"),)))
    node.run()
    encoded = node.of(2)[0]
    assert isinstance(encoded, Encoded)
    prompt = np.frombuffer(encoded.tokens, "<u4").tolist()
    node.start(Forward(3, "one", np.array([*prompt, *node.tokens(1)[:-1]], "<u4").tobytes(), len(prompt) - 1))
    node.run()
    assert rows_of(node, 3).argmax(-1).tolist() == node.tokens(1)


@pytest.mark.parametrize("temperature", [0, 2000])
def test_an_answer_goes_on_from_wherever_it_was_cut(node: Node, temperature: int) -> None:
    """What was produced by one generation and the rest by another are the chunks of one that nothing interrupted."""
    count = 40
    node.generate(100, "the", count, temperature=temperature)
    node.run()
    whole = node.chunks(100)
    assert len(whole) > count // 2
    for split in range(1, len(whole)):
        node.generate(split, "the", count, temperature=temperature, accepted=node.tokens(100)[:split])
        node.run()
        assert node.of(split)[0] == Accepted(split, prompt_length(node, "the"))
        assert node.chunks(split) == [replace(chunk, job=split) for chunk in whole[split:]]


def test_characters_that_were_cut_come_whole(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "aé漢😀👩‍👩‍👧🇪🇺"
    output = [vocabulary()[byte_characters()[byte]] for byte in text.encode()]

    def choose(_logits: object, _sampling: object, index: int) -> int:
        return output[index]

    monkeypatch.setattr(scheduling, "choose", choose)
    for split in range(len(output)):
        node.generate(split, "the", len(output), accepted=output[:split])
        node.run()
        before = text.encode()[:split].decode(errors="ignore")
        assert before + "".join(chunk.text for chunk in node.chunks(split)) == text


@pytest.mark.parametrize("accepted", [[300], [END, 5], [5] * 9])
def test_what_cannot_be_continued(node: Node, accepted: list[int]) -> None:
    node.generate(1, "the", 8, accepted=accepted)
    assert node.failed(1).code == "local"


@pytest.mark.parametrize(
    ("accepted", "ending"), [([5, END], Ending.STOP), ([5] * 8, Ending.LENGTH), ([END], Ending.STOP)]
)
def test_a_whole_output_only_ends(node: Node, accepted: list[int], ending: Ending) -> None:
    node.generate(1, "the", 8, accepted=accepted)
    assert node.of(1) == [
        Accepted(1, prompt_length(node, "the")), Chunk(1, len(accepted), (), "", ending), Ended(1),
    ]  # fmt: skip
    node.run()


def test_the_whole_output_must_fit_the_context(node: Node) -> None:
    room = CONTEXT - prompt_length(node, "the")
    node.generate(1, "the", room, accepted=[5] * (room - 1))
    node.generate(2, "the", room + 1, accepted=[5] * (room - 1))
    assert node.failed(2).code == "prompt_too_long"
    node.run()
    assert [chunk.index for chunk in node.chunks(1)] == [room - 1]


def rows_of(node: Node, job: int) -> Array:
    data = b"".join(reply.rows for reply in node.of(job) if isinstance(reply, Logits))
    return np.frombuffer(data, "<f4").reshape(-1, len(vocabulary()))


@pytest.mark.parametrize("start", [0, 1, PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 149])
def test_forward(node: Node, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "LOGITS_BYTES", 5 * len(vocabulary()) * 4)
    tokens = [index * 37 % 250 for index in range(150)]
    node.start(Forward(1, "one", np.array(tokens, "<u4").tobytes(), start))
    node.run()
    llama = node.scheduler._models["one"].llama
    cache, expected = llama.new_cache(), list[Array]()
    for at in range(0, 150, PREFILL_CHUNK):
        chunk = tokens[at : at + PREFILL_CHUNK]
        logits = llama.prefill(chunk, cache, Flag(), outputs=len(chunk))
        assert logits is not None
        expected.append(logits)
    found = rows_of(node, 1)
    assert found.shape[0] == 150 - start
    assert np.abs(found - np.concatenate(expected)[start:]).max() < 1e-4
    assert node.replies[-1] == Ended(1)
    assert all(len(reply.rows) <= 5 * len(vocabulary()) * 4 for reply in node.replies if isinstance(reply, Logits))


def test_at_most_a_batch_runs_and_the_others_wait_in_order(store: ModelStore) -> None:
    node = Node(store, max_batch=2)
    for job in range(5):
        node.generate(job, "the", 3)
    node.scheduler.step()
    assert [reply.job for reply in node.replies if isinstance(reply, Begun)] == [0, 1]
    node.run()
    assert [reply.job for reply in node.replies if isinstance(reply, Begun)] == [0, 1, 2, 3, 4]
    assert [reply.job for reply in node.replies if isinstance(reply, Ended)] == [0, 1, 2, 3, 4]


def test_a_long_prompt_lets_the_others_go_on(node: Node) -> None:
    node.generate(1, "the", 30)
    node.scheduler.step()
    node.generate(2, "b" * 300, 3)
    at = [len(node.tokens(1)) for _ in range(4) if node.scheduler.step()]
    assert at == [2, 3, 4, 5]
    assert node.tokens(2) == []


def test_without_credit_a_generation_pauses_and_the_others_do_not(node: Node, store: ModelStore) -> None:
    node.generate(1, "the", 8, credit=3)
    node.generate(2, "abc", 8)
    node.run()
    assert len(node.tokens(1)) == 3
    assert node.tokens(2) == alone(store, "abc")
    assert not node.scheduler.step()
    node.scheduler.add_credit(Credit(1, 2))
    node.run()
    assert len(node.tokens(1)) == 5
    node.scheduler.add_credit(Credit(1, 100))
    node.run()
    assert node.tokens(1) == alone(store, "the")
    node.scheduler.add_credit(Credit(1, 1))


def test_cancelled_at_every_stage(store: ModelStore) -> None:
    """Before its turn, while waiting, during prefill, during decoding: one Ended, nothing after it."""
    for steps in range(12):
        node = Node(store, max_batch=1)
        node.generate(1, "a" * 200, 20)
        node.generate(2, "the", 5)
        for _ in range(steps):
            node.scheduler.step()
        before = len(node.tokens(1))
        node.flags[1].up = True
        node.run()
        assert len(node.tokens(1)) == before
        assert node.of(1)[-1] == Ended(1)
        assert node.of(1).count(Ended(1)) == 1
        assert node.tokens(2) == alone(store, "the", 5)


def test_cancelled_within_a_step(node: Node, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    node.generate(1, "the", 8)
    node.generate(2, "abc", 8)
    node.scheduler.step()
    node.scheduler.step()
    decode = LlamaModel.decode

    def cancel_first(
        model: LlamaModel, tokens: Sequence[int], caches: Sequence[KeyValueCache], stops: Sequence[Stop]
    ) -> list[Array | None]:
        node.flags[1].up = True
        return decode(model, tokens, caches, stops)

    produced = len(node.tokens(1))
    monkeypatch.setattr(LlamaModel, "decode", cancel_first)
    node.run()
    assert len(node.tokens(1)) == produced
    assert node.of(1)[-1] == Ended(1)
    assert node.tokens(2) == alone(store, "abc")


def test_a_cancelled_request_is_not_even_begun(node: Node) -> None:
    node.scheduler.start(Load(1, "no such model"), Flag(up=True))
    assert node.replies == [Ended(1)]


def test_cancelled_forward(node: Node) -> None:
    node.start(Forward(1, "one", np.zeros(300, "<u4").tobytes(), 0))
    node.scheduler.step()
    node.flags[1].up = True
    node.run()
    assert len(rows_of(node, 1)) == PREFILL_CHUNK
    assert node.of(1)[-1] == Ended(1)


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


def test_out_of_memory_in_a_prompt(node: Node, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    node.generate(1, "the")
    node.generate(2, "abc")
    with monkeypatch.context() as patch:
        patch.setattr(LlamaModel, "prefill", raising(MemoryError()))
        node.scheduler.step()
    node.run()
    assert (node.failed(1).code, node.failed(1).message) == (ExecutorFailed.code, "the executor is out of memory")
    assert node.tokens(2) == alone(store, "abc")


def test_out_of_memory_in_one_cache_of_a_batch(node: Node, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for job, text in enumerate(("the", "abc", "ll")):
        node.generate(job, text)
    for _ in range(4):
        node.scheduler.step()
    poisoned = node.scheduler._decoding[1].cache
    reserve = KeyValueCache.reserve

    def poisonous(cache: KeyValueCache, tokens: int) -> None:
        if cache is poisoned:
            raise MemoryError
        reserve(cache, tokens)

    monkeypatch.setattr(KeyValueCache, "reserve", poisonous)
    node.run()
    assert node.failed(1).message == "the executor is out of memory"
    monkeypatch.undo()
    assert node.tokens(0) == alone(store, "the")
    assert node.tokens(2) == alone(store, "ll")


def test_an_unexpected_error_is_told_in_one_line(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LlamaModel, "prefill", raising(RuntimeError("two\nlines")))
    node.generate(1, "the")
    node.run()
    assert node.failed(1).code == ExecutorFailed.code
    assert node.failed(1).message == "the executor failed: RuntimeError: two lines"
    assert "Traceback" in capsys.readouterr().err


def test_prompts_and_answers_must_fit_the_context(node: Node) -> None:
    length = prompt_length(node, "the")
    room = CONTEXT - length
    node.generate(2, "the", room)
    node.generate(3, "the", room + 1)
    assert node.of(2) == [Accepted(2, length)]
    assert node.failed(3).code == "prompt_too_long"
    node.run()
    assert node.of(2)[-1] == Ended(2)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Generate(1, "one", (Turn("user", "a"),), 1, 100_001, SEED, 1), "local"),
        (Generate(1, "one", (Turn("user", "a"),), 1, 500, b"", 1), "local"),
        (Generate(1, "one", (Turn("robot", "a"),), 1, 0, b"", 1), "local"),
        (Encode(1, "one", (Turn("user", "a"), Turn("system", "b"))), "template_refused"),
        (Forward(1, "one", np.zeros(CONTEXT + 1, "<u4").tobytes(), 0), "prompt_too_long"),
        (Forward(1, "one", np.array([300], "<u4").tobytes(), 0), "local"),
        (Forward(1, "one", np.array([3], "<u4").tobytes(), 1), "local"),
        (Forward(1, "one", b"", 0), "local"),
        (Load(1, "four"), "model_unavailable"),
        (Load(1, "../one"), "model_unavailable"),
    ],
)
def test_refused(node: Node, request_: Load | Generate | Encode | Forward, code: str) -> None:
    node.start(request_)
    assert node.failed(1).code == code
    assert not node.scheduler.step()


def test_an_empty_prompt(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_messages: object) -> list[int]:
        return []

    node.start(Load(1, "one"))
    monkeypatch.setattr(node.scheduler._models["one"].tokenizer, "encode", nothing)
    node.generate(2, "")
    assert node.failed(2).message == "the prompt is empty"


def test_altered_weights_are_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaModel, "load", raising(AssertionError()))
    store = ModelStore(tmp_path / "store")
    stored = store.add_directory(write_tiny_model(tmp_path / "model"))
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    node = Node(store)
    node.start(Load(1, "model"))
    failed = node.failed(1)
    assert failed.code == WeightsMismatch.code
    assert failed.roots[0] == stored.root != failed.roots[1]


def test_weights_altered_while_they_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModelStore(tmp_path / "store")
    store.add_directory(write_tiny_model(tmp_path / "model"))
    load = LlamaModel.load

    def slow_load(directory: Path, team: Team) -> LlamaModel:
        write_tiny_model(directory, seed=5)
        return load(directory, team)

    monkeypatch.setattr(LlamaModel, "load", slow_load)
    node = Node(store)
    node.start(Load(1, "model"))
    assert node.failed(1).code == WeightsMismatch.code


def test_a_loaded_model_is_not_read_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.start(Load(1, "one"))
    monkeypatch.setattr(LlamaModel, "load", raising(AssertionError()))
    node.start(Load(2, "one"))
    assert isinstance(node.of(2)[0], Loaded)


def test_the_model_unused_longest_makes_room(node: Node) -> None:
    for job, name in enumerate(("one", "two", "one", "three")):
        node.start(Load(job, name))
    assert list(node.scheduler._models) == ["one", "three"]


def test_a_model_in_use_stays(node: Node) -> None:
    node.generate(1, "a" * 300, model="one")
    node.generate(2, "a" * 300, model="two")
    node.start(Load(3, "three"))
    assert node.failed(3).code == ExecutorFailed.code
    node.run()
    node.start(Load(4, "three"))
    assert isinstance(node.of(4)[0], Loaded)
