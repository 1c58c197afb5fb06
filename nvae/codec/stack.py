"""Stacks of bits, which distributions push integers on and pop them from (asymmetric numeral systems, Duda 2009)."""

import hashlib
from functools import cache
from typing import Any

import numpy as np

from ..core.errors import UserError

WORD_BITS = 32
STATE_WORDS = 3
"""Words of a stack that stay in its coder: 64 bits, and one for what seals it."""


@cache
def library() -> Any:
    """Constriction's streams. Raises UserError where it is not installed."""
    try:
        import constriction
    except ImportError as error:
        raise UserError("compression needs constriction: pip install 'nvae[codec]'") from error
    return constriction.stream


class Stack:
    """One of them: what was pushed last is popped first.

    Bits back needs something to pop before anything was pushed: random words, of which `begun` counts those that were
    ever reached. Only what was reached is kept.
    """

    def __init__(self, words: np.ndarray, *, is_new: bool) -> None:
        """New, on top of random words; or as `words` had it."""
        self._coder = library().stack.AnsCoder(words, seal=is_new)
        self.start = self.lowest = int(self._coder.num_words())

    @staticmethod
    def new(seed: str, words: int) -> "Stack":
        """On so many random words, which are the same everywhere: the output of SHAKE-256."""
        random = hashlib.shake_256(seed.encode()).digest(words * WORD_BITS // 8)
        return Stack(np.frombuffer(random, "<u4").astype(np.uint32), is_new=True)

    def pop(self, model: Any, *params: np.ndarray) -> np.ndarray:
        """An integer from each of the distributions that the params give, in order: (N,) int32."""
        popped: np.ndarray = self._coder.decode(model, *params)
        self.lowest = min(self.lowest, int(self._coder.num_words()))
        return popped

    def push(self, integers: np.ndarray, model: Any, *params: np.ndarray) -> None:
        """The opposite of `pop` with the same distributions."""
        self._coder.encode_reverse(np.ascontiguousarray(integers, dtype=np.int32), model, *params)

    @property
    def bits(self) -> int:
        """On the stack."""
        return int(self._coder.num_valid_bits())

    @property
    def _unreached(self) -> int:
        return max(self.lowest - STATE_WORDS, 0)

    @property
    def begun(self) -> int:
        """Of the random words that it began with, those that were reached."""
        return self.start - self._unreached

    def words(self) -> np.ndarray:
        """What `Stack(words, is_new=False)` goes on from."""
        words: np.ndarray = self._coder.get_compressed()
        return words[self._unreached :]
