"""Says where no trial fits on what is left of a cluster: Tune waits for a machine without a word, for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from imbvlm.data.waiting import LOOK_SECONDS, Patience
from imbvlm.sweep.console import Console


class Shortage(tune.Callback):
    """Asks now and then what keeps every trial from running, and says it; `lacking` gives a sentence, or None.

    The sweep goes on to wait: another machine may come.
    """

    def __init__(self, lacking: Callable[[], str | None], console: Console) -> None:
        self._lacking, self._console = lacking, console
        self._looked_at, self._patience = time.monotonic(), Patience()

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore that we don't use.
        return {}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        # Tune takes a step several times a second, whatever its trials do.
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        if sentence := self._patience.to_say(self._lacking()):
            self._console.say(sentence)
