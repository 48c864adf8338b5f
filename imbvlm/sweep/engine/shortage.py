"""Says where no trial fits on what is left of a cluster: Tune waits for a machine without a word, for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from imbvlm.sweep.console import Console

LOOK_SECONDS = 10.0
# A machine may be back at once.
PATIENCE_SECONDS = 30.0
SAY_AGAIN_SECONDS = 1800.0


class Shortage(tune.Callback):
    """Asks now and then what keeps every trial from running, and says it; `lacking` gives a sentence, or None.

    The sweep goes on to wait: another machine may come.
    """

    def __init__(self, lacking: Callable[[], str | None], console: Console) -> None:
        self._lacking, self._console = lacking, console
        self._looked_at = time.monotonic()
        self._since: float | None = None
        self._say_at = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore that we don't use.
        return {}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        # Tune takes a step several times a second, whatever its trials do.
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        sentence = self._lacking()
        if sentence is None:
            self._since = None
        elif self._since is None:
            self._since, self._say_at = now, now + PATIENCE_SECONDS
        elif now >= self._say_at:
            self._say_at = now + SAY_AGAIN_SECONDS
            self._console.say(sentence)
