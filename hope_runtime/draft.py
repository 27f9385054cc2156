"""A reply that answers from what the memory layer knows: whether it does is decided once.

Not at the first word, which looks alike for what is known and what is not, but where the value
comes: "Your dog's name is" is said first, and then either the name, or that it is not known.
"""

from __future__ import annotations

from collections import deque
from enum import Enum, auto

from hope_runtime.config import RecallConfig

LONGEST = 24  # tokens until the value; a draft that takes more is none


class Known(Enum):
    """Whether the value that was asked for is known."""

    OPEN = auto()
    YES = auto()
    NO = auto()


class Draft:
    """One reply's way to its value."""

    def __init__(self, config: RecallConfig) -> None:
        self._config = config
        self._seen = 0
        self.known = Known.OPEN
        self.fixed: deque[int] = deque()  # tokens that come next, whatever the model would say

    def see(self, slot: float, known: float) -> Known:
        """Look at the next token's logits: that it is the value's first, and that it is known."""
        if self.known is Known.OPEN:
            self._seen += 1
            if slot > 0.0 or self._seen > LONGEST:
                self.known = Known.YES if known > self._config.knows else Known.NO
                return self.known
        return Known.YES if self.known is Known.YES else Known.OPEN

    def refusal(self, begun: bool) -> str:
        """Return how a reply goes on whose value is not known."""
        return "... " + self._config.unknown if begun else self._config.unknown
