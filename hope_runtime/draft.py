"""A reply that answers from what the memory layer knows, or says that it does not.

The layer is asked twice. Where the reply begins: is the user asking for something about himself,
and is it known? From then on, for every token: what comes next? What stands before the answer is
the same for all, so that no word of it depends on what the base would have said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from hope_runtime.config import RecallConfig


class Draft:
    """The reply to one question about the user.

    >>> known = Draft(RecallConfig((0, 1)), 0.9, lambda text: [len(text)], 0)
    >>> known.fixed, known.recalls
    (deque([4]), True)
    >>> unknown = Draft(RecallConfig((0, 1)), 0.1, lambda text: [len(text)], 0)
    >>> unknown.fixed, unknown.recalls
    (deque([22, 0]), False)
    """

    def __init__(
        self,
        config: RecallConfig,
        known: float,
        encode: Callable[[str], Sequence[int]],
        end: int,
    ) -> None:
        """Decide by `known`, how like a value what was read is; `end` ends a reply."""
        self.recalls = known > config.knows
        # tokens that come first, whatever the model would say
        self.fixed: deque[int] = deque(
            encode(config.opening) if self.recalls else [*encode(config.unknown), end]
        )
