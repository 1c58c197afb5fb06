"""Values, words and texts that nobody wants to be given."""

from collections.abc import Sequence
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")

INTEGERS = (0, -1, 1, 2, 3, 2**16 + 1, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400)
REALS = (float("nan"), float("inf"), float("-inf"), 1e308, 5e-324, 0.1, 0.5, -0.0, 1.0, -1e-9)
WORDS = (
    "",
    " ",
    "null",
    "yes",
    "4",
    "４",
    "٣",
    "auto",
    "NaN",
    "1e3",
    "0x10",
    "../..",
    "/",
    "/etc/passwd",
    "~nobody-at-all/x",
    "~",
    "\0",
    "\n",
    "a\tb",
    "x" * 5000,
    "\u202egnp.x",
    "e\u0301",
    "\U0001f600",
    "\ufeff",
    "$(touch trace)",
    "`touch trace`",
    "; touch trace",
    "{x}",
    "%s%n",
    "${HOME}",
    "__class__",
    "model_config",
    "os:system",
    "<b>",
)
CHARACTERS = "aZ0_-. :=[]{}#&*!|>'\"%@`,?\t\n\\\0é\u202e\U0001f600"


def anything(random: Random, depth: int = 3) -> Any:
    """A value of any kind, containers of such values among them."""
    kind = random.randrange(9 if depth else 6)
    if kind < 2:
        return random.choice(INTEGERS)
    if kind == 2:
        return random.choice(REALS)
    if kind == 3:
        return random.choice((None, True, False))
    if kind < 6:
        return random.choice(WORDS)
    if kind == 6:
        return [anything(random, depth - 1) for _ in range(random.randrange(4))]
    if kind == 7:
        return {random.choice(WORDS): anything(random, depth - 1) for _ in range(random.randrange(4))}
    return {random.choice((1, None, True, 0.5)): anything(random, depth - 1)}


def misspelt(random: Random, word: str) -> str:
    """The word with a slip of the finger in it."""
    place = random.randrange(len(word))
    left, letter, right = word[:place], word[place], word[place + 1 :]
    slips = (
        left + right,
        left + letter * 2 + right,
        left + random.choice("aeioxyz_") + right,
        left + right[:1] + letter + right[1:],
        word.upper(),
        word.replace("_", "-"),
        word + " ",
        word + "s",
        left + "é" + right,
    )
    return random.choice([slip for slip in slips if slip != word and slip.strip()])


def noisy(random: Random, text: str) -> str:
    """The text with some characters replaced, inserted or cut out."""
    for _ in range(random.randint(1, 6)):
        place = random.randrange(len(text) + 1)
        cut = place + random.choice((0, 1, 1, 5, 40))
        text = text[:place] + "".join(some(random, CHARACTERS, 3)) + text[cut:]
    return text


def some(random: Random, things: Sequence[T], at_most: int) -> list[T]:
    """Up to so many of the things."""
    return [random.choice(things) for _ in range(random.randint(0, at_most))]


def damaged(random: Random, data: bytes) -> bytes:
    """Bytes with bits flipped, ranges zeroed or overwritten, cut off, or with some put in or taken out."""
    kind, place = random.randrange(8), random.randrange(max(len(data), 1))
    length = random.choice((1, 4, 16, 200, 4096))
    if kind < 3:
        changed = bytearray(data)
        for _ in range(random.choice((1, 1, 2, 8))):
            changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(changed)
    if kind == 3:
        return data[:place]
    if kind == 4:
        return data[:place] + bytes(min(length, len(data) - place)) + data[place + length :]
    if kind == 5:
        return data[:place] + random.randbytes(min(length, len(data) - place)) + data[place + length :]
    if kind == 6:
        return data[:place] + random.randbytes(length) + data[place:]
    return data[:place] + data[place + length :]
