"""Providers that cheat in the jobs they win."""

# ruff: noqa: ARG002 - each strategy heeds what it needs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from aci_p2p.executor import FinishReason, Message, Sampling
from aci_p2p.protocol.envelope import kind_of, open_envelope
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.job import CloseStream, Effect, Send, StartGeneration
from aci_p2p.protocol.messages import KINDS, Commit, Kind
from aci_p2p.testing.simulator.adversaries.base import LIES, VERIFICATION, CheatingProvider
from aci_p2p.testing.simulator.node import NETWORK, TellingSealer
from aci_p2p.testing.simulator.serving import CHUNK_TOKENS, ProviderDriver, run_model
from aci_p2p.testing.simulator.transport import End
from aci_p2p.testing.toy_model import Step, ToyModel

ROUNDING: Final = 12
"""Bits that a cheaply quantised model drops of its 16."""
DRIP_MS: Final = 50_000
"""Milliseconds between two parts of an answer that is kept from ending: just within what its consumer waits."""
SURPLUS: Final = 8
"""Tokens by which an answer is made longer than was asked for."""


class WithheldResult(CheatingProvider):
    """Streams the answer, never commits to it, and holds the line."""

    name = "withheld result"
    goal = "keep the consumer waiting, and spoil its job"

    def performs(self, driver: ProviderDriver, effect: Effect) -> bool:
        """All but the end, whatever it is."""
        is_last = isinstance(effect, Send) and kind_of(effect.data) in {Kind.COMMIT, Kind.REVEAL, Kind.ABORT}
        return not (is_last or isinstance(effect, CloseStream))


class TruncatedResult(CheatingProvider):
    """Gives half of the answer, and says that the model ended there."""

    name = "truncated result"
    goal = "be paid for an answer after half of the work"
    pays = VERIFICATION

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        """Half of it."""
        return _cut(honest, FinishReason.STOP)


class CutShort(CheatingProvider):
    """Gives half of the answer, and says that the limit was reached."""

    name = "cut short"
    goal = "be paid for the whole length after half of the work"
    harms = LIES

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        """Half of it; an answer of one token cannot be halved."""
        return _cut(honest, FinishReason.LENGTH) if len(honest) > 1 else honest


class TooLong(CheatingProvider):
    """Goes on behind the last token that was asked for."""

    name = "overlong result"
    goal = "be paid for tokens that nobody wanted"
    pays = VERIFICATION

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        """More than the most."""
        if not honest:
            return honest
        padding = run.max_tokens + SURPLUS - len(run.accepted) - len(honest)
        steps = [replace(step, finish=None) for step in (*honest, *([honest[-1]] * padding))]
        return [*steps[:-1], replace(steps[-1], finish=FinishReason.STOP)]


class WrongModel(CheatingProvider):
    """Runs another, cheaper model."""

    name = "wrong model"
    goal = "be paid for a large model while running a small one"
    pays = VERIFICATION

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        """Another model's."""
        return run_model(ToyModel("small"), run)


class QuantisedModel(CheatingProvider):
    """Runs the right model with rounded weights."""

    name = "quantised model"
    goal = "be paid for full precision while saving memory"
    pays = VERIFICATION

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        """The rounded model's."""
        return run_model(ToyModel(model.name, rounding=ROUNDING), run)


class WrongPrompt(CheatingProvider):
    """Answers another question, whose answer it knows."""

    name = "wrong prompt"
    goal = "be paid without computing"
    pays = VERIFICATION

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        """The other question's."""
        prompt = model.encode([Message("user", "the usual question")])
        return list(model.answer(prompt, run.max_tokens, Sampling(), run.accepted))


class LooseCommitment(CheatingProvider):
    """Commits to nothing, and reveals whatever it likes afterwards."""

    name = "loose commitment"
    goal = "choose its answer when it has seen those of others"
    harms = LIES

    def performs(self, driver: ProviderDriver, effect: Effect) -> bool:
        """All but the commitment, in whose place another goes out."""
        if isinstance(effect, Send) and kind_of(effect.data) is Kind.COMMIT:
            empty = Commit(driver.machine.job_id, self.node.entropy())
            if driver.end:
                driver.end.send(self.node.sealer.seal(empty, self.node.clock).data)
            return False
        return True


class Impostor(CheatingProvider):
    """Signs what it says in its jobs with another key than the one that bid."""

    name = "impostor"
    goal = "have its answers count as somebody else's"

    def performs(self, driver: ProviderDriver, effect: Effect) -> bool:
        """All, under the other name."""
        if not isinstance(effect, Send):
            return True
        kind = kind_of(effect.data)
        frame: Any = open_envelope(effect.data, KINDS[kind].body, network=NETWORK, now=None)
        key = KeyPair(self.world.dice.secret(f"impostor/{self.node.index}"))
        if driver.end:
            other = TellingSealer(key, self.simulation.signed)
            driver.end.send(other.seal(frame.body, self.node.clock).data)
        return False


class SlowStream(CheatingProvider):
    """Sends the parts of its answers as late as it can."""

    name = "slow stream"
    goal = "hold consumers for as long as it can"

    def performs(self, driver: ProviderDriver, effect: Effect) -> bool:
        """All; the next part is late while jobs are offered."""
        provider = driver.provider
        is_late = self.world.now < self.simulation.ends_at
        provider.slowness = DRIP_MS // (CHUNK_TOKENS * provider.pace_ms) if is_late else 1
        return True


class BidDumping(CheatingProvider):
    """Wins with a price under everybody's, and then does not answer the award."""

    name = "bid dumping"
    goal = "win every job and spoil it"
    discount = 1_000

    def accepts(self, end: End) -> bool:
        """None."""
        return False


class FailsAfterWinning(CheatingProvider):
    """Wins with a price under everybody's, and gives the job up in the middle of the answer."""

    name = "fails after winning"
    goal = "win every job and spoil it late"
    discount = 1_000

    def performs(self, driver: ProviderDriver, effect: Effect) -> bool:
        """All up to the first part of the answer."""
        if isinstance(effect, Send) and kind_of(effect.data) is Kind.TOKENS:
            if driver.end:
                driver.end.close()
            return False
        return True


def _cut(honest: Sequence[Step], finish: FinishReason) -> Sequence[Step]:
    if not honest:
        return honest
    half = honest[: max(1, len(honest) // 2)]
    return [*half[:-1], replace(half[-1], finish=finish)]
