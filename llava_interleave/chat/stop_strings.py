"""Stop strings across token borders. Knows only text."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on piece by piece, never a part of a stop string; the first one that is complete ends the text before it."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self.stops = list(stops)
        self.held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is now certain to be shown. After a stop string `stopped` is set and nothing more may be pushed."""
        assert not self.stopped
        self.held += piece
        found = [
            (start + len(stop), start)
            for stop in self.stops
            if (start := self.held.find(stop)) >= 0
        ]
        if found:
            self.stopped = True
            shown, self.held = self.held[: min(found)[1]], ""
            return shown
        keep = max((self._begun(stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back as the possible beginning of a stop string that never came."""
        shown, self.held = self.held, ""
        return shown

    def _begun(self, stop: str) -> int:
        """How many characters at the end of the held text are a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
