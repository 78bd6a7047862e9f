"""One node of a swarm: a real one, that can be killed and come back."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

import trio

from aci_p2p.client import ACI, Answer, AnswerStream, Requirements
from aci_p2p.clock import Clock
from aci_p2p.config import NodeConfig
from aci_p2p.executor import Executor
from aci_p2p.keys import KeyRing
from aci_p2p.node import Node, NodeParts, OpenNetwork, open_node
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import SEED_BYTES, NodeId
from aci_p2p.protocol.job import JobRecord, Payment
from aci_p2p.store import Store, open_store
from aci_p2p.tasks import Notice
from aci_p2p.testing.ledger import Ledger, WatchedStore

CHEAPEST: Final = Requirements(latency_value=0, retry_cost=0)
"""Whoever is cheapest answers, whatever has happened before: what tests expect."""
DEFAULT_MAX_TOKENS: Final = 64
"""Longest answer to `ask` for: two seconds of the toy model at most."""


class NodeDown(LocalError):
    """The node does not run, or ceased to while something was asked through it."""

    code = "node_down"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all nodes of a swarm have in common."""

    seed: int
    """What fixes keys, nonces and choices."""
    clock: Clock
    """True time, Unix milliseconds."""
    threads: bool
    """Whether databases may be written in threads."""
    open_network: OpenNetwork
    """Opens a node's endpoint."""
    cut: Callable[[NodeId], None]
    """Cuts a node's cable, at once."""
    mend: Callable[[NodeId], None]
    """Plugs it in again."""
    ledger: Ledger
    """Hears what is stored."""
    model_root: bytes
    """Weights root of the model that the providers serve."""


class SwarmNode:
    """A node that runs, is stopped or killed, and comes back. Made by `open_swarm`."""

    def __init__(
        self,
        name: str,
        config: NodeConfig,
        around: Surroundings,
        open_executor: Callable[[], AbstractAsyncContextManager[Executor]] | None,
    ) -> None:
        """`open_executor`: None for a node that only consumes."""
        self.name = name
        """What it is called in messages."""
        self.skew_ms = 0
        """How far its clock is ahead, milliseconds."""
        self.address = ""
        """Where it can be dialled, or could when it ran; empty before."""
        self.idle_tasks = 0
        """Tasks that it had when it had found everybody, and nothing to do."""
        self._config = config
        self._around = around
        self._open_executor = open_executor
        self._node: Node | None = None
        self._task: trio.lowlevel.Task | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._ended.set()
        self._users: dict[trio.CancelScope, None] = {}
        self._users_left = Notice()
        self._is_dead = False
        self._cache_left: bytes | None = None
        self._drawn = 0
        self._countdown = 0
        seed = self._entropy(SEED_BYTES)
        self.node_id: NodeId = KeyRing(config.keys_path).create(name, seed=seed).node_id
        """Its identity."""
        self._random = Random(seed)  # noqa: S311 - what it picks is to repeat

    def __repr__(self) -> str:
        return f"<{self.name}{'' if self.is_up else ', down'}>"

    @property
    def is_up(self) -> bool:
        """Whether it runs."""
        return self._node is not None and not self._is_dead

    @property
    def node(self) -> Node:
        """The node itself. Raises NodeDown."""
        if self._node is None or self._is_dead:
            msg = f"{self.name} is down"
            raise NodeDown(msg)
        return self._node

    @property
    def jobs(self) -> list[JobRecord]:
        """The latest record of each of its jobs that has reached its disk, in the order of their beginnings."""
        return self._around.ledger.jobs(self.name)

    @property
    def tasks(self) -> int:
        """Tasks that it runs at the moment."""
        return 0 if self._task is None else _count(self._task)

    async def ask(self, prompt: str, *, max_tokens: int = DEFAULT_MAX_TOKENS, **options: Any) -> Answer:  # noqa: ANN401 - what `ACI.inference` takes
        """Run one inference from here. Raises what `ACI.inference` raises, and NodeDown when the node goes down."""
        async with self.stream(prompt, max_tokens=max_tokens, **options) as stream:
            async for _ in stream:
                pass
            return stream.answer

    @asynccontextmanager
    async def stream(
        self,
        prompt: str,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        **options: Any,  # noqa: ANN401 - what `ACI.stream` takes
    ) -> AsyncGenerator[AnswerStream]:
        """Run one inference from here, streaming, as `ACI.stream` does. Raises NodeDown when the node goes down."""
        options.setdefault("model", self._around.model_root.hex())
        options.setdefault("requirements", CHEAPEST)
        with self._using() as node:
            async with ACI(node) as aci, aci.stream(prompt=prompt, max_tokens=max_tokens, **options) as stream:
                yield stream

    @contextmanager
    def _using(self) -> Generator[Node]:
        """What a user does with the node; ends with it, as a program does that the node is a part of."""
        node, scope = self.node, trio.CancelScope()
        self._users[scope] = None
        try:
            with scope:
                yield node
        finally:
            del self._users[scope]
            self._users_left.notify()
        if scope.cancel_called:
            msg = f"{self.name} went down"
            raise NodeDown(msg)

    def _entropy(self, size: int) -> bytes:
        self._drawn += 1
        return hashlib.shake_256(f"{self._around.seed}/{self.name}/{self._drawn}".encode()).digest(size)

    def _clock(self) -> int:
        return self._around.clock() + self.skew_ms

    def _open_store(self, path: Path, node: NodeId) -> AbstractAsyncContextManager[Store]:
        make = partial(WatchedStore, is_dead=lambda: self._is_dead, stored=self._stored)
        return open_store(path, node, threads=self._around.threads, make=make)

    def _stored(self, records: Sequence[JobRecord], payments: Sequence[Payment]) -> None:
        self._around.ledger.stored(self.name, self.node_id, records, payments)
        if self._countdown:
            self._countdown -= 1
            if not self._countdown:
                self.kill()

    async def start(self, nursery: trio.Nursery, bootstrap: Sequence[str]) -> None:
        """Start it, with the disk that it left, and wait until it runs."""
        await self._ended.wait()
        self._around.mend(self.node_id)
        self._is_dead, self._ended, self._scope = False, trio.Event(), trio.CancelScope()
        await nursery.start(self._run, tuple(bootstrap))
        self.address = self.node.addresses[0]

    async def _run(self, bootstrap: tuple[str, ...], task_status: trio.TaskStatus[None]) -> None:
        around = self._around
        parts = NodeParts(
            open_network=around.open_network, open_executor=self._open_executor, clock=self._clock,
            entropy=self._entropy, random=self._random, open_store=self._open_store, threads=around.threads,
        )  # fmt: skip
        self._task = trio.lowlevel.current_task()
        try:
            with self._scope:
                config = replace(self._config, bootstrap=bootstrap)
                async with open_node(config, parts=parts, require_bootstrap=False) as node:
                    self._node = node
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            if self._is_dead:
                self._leave_cache()
            self._node = self._task = None
            self._ended.set()

    def _leave_cache(self) -> None:
        """Undo what its last breath wrote into the address cache."""
        cache = self._config.address_cache_path
        if self._cache_left is None:
            cache.unlink(missing_ok=True)
        else:
            cache.write_bytes(self._cache_left)

    async def stop(self) -> None:
        """Stop in good order, as SIGTERM does."""
        for scope in self._users:
            scope.cancel()
        while self._users:
            await self._users_left.wait()
        self._scope.cancel()
        await self._ended.wait()

    def kill(self) -> None:
        """Crash: from now on nothing that it does reaches its disk or anybody else."""
        if not self.is_up:
            return
        self._is_dead, self._countdown = True, 0
        self._around.cut(self.node_id)
        cache = self._config.address_cache_path
        self._cache_left = cache.read_bytes() if cache.exists() else None
        for scope in (*self._users, self._scope):
            scope.cancel()

    def kill_after(self, transitions: int) -> None:
        """Crash as soon as so many more transactions are on its disk, before anything is sent of the last one."""
        self._countdown = transitions

    async def wait_until_down(self) -> None:
        """Wait until nothing of it runs."""
        await self._ended.wait()


def _count(task: trio.lowlevel.Task) -> int:
    return 1 + sum(_count(child) for nursery in task.child_nurseries for child in nursery.child_tasks)
