"""A trial inside Tune's own process: no worker group starts; the next trial reuses the process and its open data."""

from __future__ import annotations

from collections.abc import Generator

from ray import tune

from imbvlm.config import Tree
from imbvlm.training.session import Report, TrialSession, TrialSettings, default_device


class InProcessTrial(tune.Trainable):
    """One `step` is one epoch; Tune's own checkpoints aren't used, the session keeps its own without pickling."""

    def setup(self, config: Tree) -> None:
        self._session = TrialSession(default_device())
        self._reports = self._start(config)

    def reset_config(self, new_config: Tree) -> bool:
        self._reports.close()
        self._reports = self._start(new_config)
        return True

    def step(self) -> Report:
        return next(self._reports)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to add to the session's own checkpoint."""

    def load_checkpoint(self, checkpoint: Tree | None) -> None:
        """The session has read its own checkpoint already."""

    def cleanup(self) -> None:
        # What the session writes when a trial ends is written now, and not when the process happens to forget it.
        self._reports.close()

    def _start(self, config: Tree) -> Generator[Report, None, None]:
        return self._session.reports(TrialSettings.from_dict(config["settings"]))
