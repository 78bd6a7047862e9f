"""Choosing the next token, in a way that a verifier can repeat exactly.

Greedy (temperature 0): the largest logit, the lowest id on a tie.

Sampled: seeded Gumbel-max (Gumbel 1954; Maddison et al. 2014): the id v with the largest

    logit[v] * (1000 / temperature_milli) + g[v],   g[v] = -log(-log(u[v])),

the lowest id on a tie, computed in binary64. The logits are fp32, so one draws from their softmax at the temperature.
The uniforms come from Philox4x64-10 (Salmon et al. 2011), read little-endian:

    key      = seed[0:8], seed[8:16]
    counter  = (block, token index in the output from 0, seed[16:24], seed[24:32]), block = 1, 2, 3, ...
    u[v]     = (word v of the concatenated blocks >> 12) * 2^-52 + 2^-53, exact in binary64 and inside (0, 1)

Blocks have four words and start at 1, as numpy increments the counter before it draws.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from aci_p2p.executor.api import Sampling
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.messages import MAX_TEMPERATURE_MILLI

SEED_BYTES: Final = 32
"""Bytes of a seed."""

_MILLI = 1000.0


def check_sampling(sampling: Sampling) -> None:
    """Raise LocalError unless the settings can be used: a temperature in range and, when sampling, a whole seed."""
    if not 0 <= sampling.temperature_milli <= MAX_TEMPERATURE_MILLI:
        msg = f"a temperature of {sampling.temperature_milli} thousandths is not between 0 and {MAX_TEMPERATURE_MILLI}"
        raise LocalError(msg)
    if sampling.temperature_milli and len(sampling.seed) != SEED_BYTES:
        msg = f"sampling needs a seed of {SEED_BYTES} bytes, not {len(sampling.seed)}"
        raise LocalError(msg)


def check_accepted(accepted: Sequence[int], vocabulary: int, stop_tokens: Container[int], max_tokens: int) -> None:
    """Raise LocalError unless the `accepted` tokens begin an output of at most `max_tokens`, or are all of it."""
    if len(accepted) > max_tokens:
        msg = f"an output of {max_tokens} tokens does not begin with {len(accepted)}"
        raise LocalError(msg)
    if not all(0 <= token < vocabulary for token in accepted):
        msg = f"an accepted token is none of the model's {vocabulary}"
        raise LocalError(msg)
    if any(token in stop_tokens for token in accepted[:-1]):
        msg = "tokens were accepted behind the end of the output"
        raise LocalError(msg)


def choose(logits: npt.NDArray[np.float32], sampling: Sampling, index: int) -> int:
    """The token id for output position `index`, from logits of shape (vocabulary,)."""
    if sampling.temperature_milli == 0:
        return int(np.argmax(logits))
    scores = logits.astype(np.float64)
    scores *= _MILLI / sampling.temperature_milli
    scores += gumbel_noise(sampling.seed, index, len(logits))
    return int(np.argmax(scores))


def gumbel_noise(seed: bytes, index: int, size: int) -> npt.NDArray[np.float64]:
    """The standard Gumbel draws of output position `index` for token ids 0 to `size` - 1."""
    words = np.frombuffer(seed, "<u8")
    counter = np.array([0, index, words[2], words[3]], np.uint64)
    draws = np.random.Philox(key=words[:2], counter=counter).random_raw(size)
    uniform = (draws >> np.uint64(12)) * 2.0**-52
    uniform += 2.0**-53
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise
