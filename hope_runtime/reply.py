"""What is being said: tokens to text, and where to stop."""

from __future__ import annotations

from collections.abc import Sequence

from hope_runtime.tokenizer import Tokenizer


class Reply:
    """The text of one reply as it grows; holds back what may turn out to be a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._stream = tokenizer.stream()
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that may now be shown; sets `stopped` when a stop string is complete."""
        return self._release(self._stream.push(token))

    def flush(self) -> str:
        """Return what was held back; call once, at the end of a reply that met no stop string."""
        text = self._release(self._stream.flush())
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`.

    >>> _overlap("so: <|e", "<|end|>")
    3
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
