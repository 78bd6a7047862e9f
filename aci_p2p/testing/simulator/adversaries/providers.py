"""Providers that cheat in the jobs they win."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aci_p2p.executor import FinishReason, Message, Sampling
from aci_p2p.protocol.envelope import kind_of
from aci_p2p.protocol.job import Effect, Send, StartGeneration
from aci_p2p.protocol.messages import Kind
from aci_p2p.testing.simulator.adversaries.base import CheatingProvider
from aci_p2p.testing.simulator.roles import ProviderDriver
from aci_p2p.testing.simulator.transport import End
from aci_p2p.testing.toy_model import Step, ToyModel

VERIFICATION: Final = "nobody executes an answer again before proofs and disputes are built"
"""Why wrong answers are paid."""
ROUNDING: Final = 12
"""Bits that a cheaply quantised model drops of its 16."""


class WithheldResult(CheatingProvider):
    """Streams the answer, and never commits to it."""

    name = "withheld result"
    goal = "keep the consumer waiting, and spoil its job"

    def performs(self, driver: ProviderDriver, effect: Effect) -> bool:
        return not (isinstance(effect, Send) and kind_of(effect.data) in {Kind.COMMIT, Kind.REVEAL})


class TruncatedResult(CheatingProvider):
    """Gives half of the answer, and says that the model ended there."""

    name = "truncated result"
    goal = "be paid for an answer after half of the work"
    pays = VERIFICATION

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        half = honest[: max(1, len(honest) // 2)]
        return [*half[:-1], Step(half[-1].token, half[-1].text, FinishReason.STOP)]


class CutShort(CheatingProvider):
    """Gives half of the answer, and says that the limit was reached."""

    name = "cut short"
    goal = "be paid for the whole length after half of the work"

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        half = honest[: max(1, len(honest) // 2)]
        return [*half[:-1], Step(half[-1].token, half[-1].text, FinishReason.LENGTH)]


class WrongModel(CheatingProvider):
    """Runs another, cheaper model."""

    name = "wrong model"
    goal = "be paid for a large model while running a small one"
    pays = VERIFICATION

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        return _run(ToyModel("small"), run)


class QuantisedModel(CheatingProvider):
    """Runs the right model with rounded weights."""

    name = "quantised model"
    goal = "be paid for full precision while saving memory"
    pays = VERIFICATION

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        return _run(ToyModel(model.name, rounding=ROUNDING), run)


class WrongPrompt(CheatingProvider):
    """Answers another question, whose answer it knows."""

    name = "wrong prompt"
    goal = "be paid without computing"
    pays = VERIFICATION

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        prompt = model.encode([Message("user", "the usual question")])
        return list(model.answer(prompt, run.max_tokens, Sampling()))


class BidDumping(CheatingProvider):
    """Wins with a price under everybody's, and then does not answer the award."""

    name = "bid dumping"
    goal = "win every job and spoil it"
    discount = 1_000

    def accepts(self, end: End) -> bool:
        return False


class FailsAfterWinning(CheatingProvider):
    """Wins with a price under everybody's, and gives the job up in the middle of the answer."""

    name = "fails after winning"
    goal = "win every job and spoil it late"
    discount = 1_000
    pays = "a job whose provider fails while it streams is not taken over by another one yet"

    def performs(self, driver: ProviderDriver, effect: Effect) -> bool:
        if isinstance(effect, Send) and kind_of(effect.data) is Kind.TOKENS:
            if driver.end:
                driver.end.close()
            return False
        return True


def _run(model: ToyModel, run: StartGeneration) -> list[Step]:
    prompt = model.encode([Message(turn.role, turn.content) for turn in run.conversation.turns])
    sampling = Sampling(run.temperature_milli, run.seed if run.temperature_milli else b"")
    return list(model.answer(prompt, run.max_tokens, sampling))
