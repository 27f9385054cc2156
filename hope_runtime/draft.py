"""A reply that answers from what the memory layer knows, or says that it does not.

The layer is asked twice. Where the reply begins: is the user asking for something about himself,
and is it known? From then on, for every token: what comes next? What stands before the answer is
the same for all, so that no word of it depends on what the base would have said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from hope_runtime.config import RecallConfig

LONGEST = 24  # tokens of a value; memory that says more goes round in a circle


class Draft:
    """The reply to one question about the user.

    >>> known = Draft(RecallConfig((0, 1)), 0.9, lambda text: [len(text)])
    >>> known.fixed, known.recalls
    (deque([4]), True)
    >>> unknown = Draft(RecallConfig((0, 1)), 0.1, lambda text: [len(text)])
    >>> unknown.fixed, unknown.recalls, unknown.over
    (deque([22]), False, False)
    """

    def __init__(
        self, config: RecallConfig, known: float, encode: Callable[[str], Sequence[int]]
    ) -> None:
        """Decide by `known`, how likely what was read was told (`layers.recall.familiar`)."""
        self._config, self._encode = config, encode
        self.recalls = known > config.knows
        self._said = 0  # tokens of the value
        self._spaced = False  # and before it, a space that it does not have
        self._last = not self.recalls  # nothing follows what is fixed
        # tokens that come next, whatever the model would say
        self.fixed = deque(encode(config.opening if self.recalls else config.unknown))

    @property
    def over(self) -> bool:
        """Whether all is said."""
        return self._last and not self.fixed

    def see(self, lead: float, before: str, likely: str) -> None:
        """Look at the next token; the reply ends where a stop is nearly as likely as any other.

        Args:
            lead: of the likeliest token before a full stop, in logits.
            before: the text of the token said last.
            likely: the text that the likeliest token would add to it.
        """
        least = self._config.digits if before[-1:].isdigit() else self._config.ends
        if self._said == LONGEST or (self._said and lead < least):
            self.fixed.extend(self._encode("." if not before.endswith(".") else ""))
            self._last = True
        if not (self._said or self._spaced) and likely[:1].isalnum():
            self.fixed.extend(self._encode(" "))  # as before a number, whose digits have none
            self._spaced = True
        else:
            self._said += 1


def asked(config: RecallConfig, asks: float, known: Callable[[], float]) -> bool:
    """Tell whether memory has the word: the user asks for something about himself.

    In doubt, one that is known is such a question, and one that is not is left to the base.

    >>> config = RecallConfig((0, 1), asks=0.0, knows=0.25, maybe=2.0)
    >>> pairs = ((1, 0.1), (-1, 0.9), (-1, 0.1), (-5, 0.9))
    >>> [asked(config, asks, lambda: known) for asks, known in pairs]
    [True, True, False, False]
    """
    if asks <= config.asks - config.maybe:
        return False  # as nearly all are: how much is known need not be looked at
    return asks > config.asks or known() > config.knows
