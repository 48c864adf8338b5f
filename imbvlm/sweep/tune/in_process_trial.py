"""Trials in a process of Tune, one or a pack; the next ones reuse the process and its open data."""

from __future__ import annotations

import pickle
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from ray import tune

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError
from imbvlm.base.plugins import Plugins
from imbvlm.base.schema import Tree
from imbvlm.ray_runtime.job_records import record_process
from imbvlm.training.trial_pack import TrialPack
from imbvlm.training.trial_session import (
    HAS_JOINED,
    TrialReport,
    TrialSession,
    TrialSettings,
    compress,
    decompress,
    default_device,
    to_result,
)


@dataclass(frozen=True)
class PackPayload:
    """Input of a process: its trials' settings, whether they train as one pack, and the file of ended trials."""

    settings: tuple[TrialSettings, ...]
    trains_together: bool
    ended_file: str

    def encode(self) -> str:
        """Compress the payload, since Tune keeps a copy of a trial's configuration in each report."""
        return compress(pickle.dumps(self))

    @staticmethod
    def decode(text: str) -> PackPayload:
        """The inverse of `encode`."""
        payload: PackPayload = pickle.loads(decompress(text))
        return payload


class InProcessTrial(tune.Trainable):
    """One `step` is one epoch of every member that has not ended; `reports` has one report for each.

    Tune's checkpoints are not used, since the members' sessions write their own without pickling.
    """

    _plugins: Plugins
    _ended_file: str | None
    _members: dict[str, Generator[TrialReport, None, None]]

    def setup(self, config: Tree) -> None:
        self._session = TrialSession(default_device())
        self._begin(config)

    def reset_config(self, new_config: Tree) -> bool:
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        with self._plugins.active():
            self._close(self._ended())
            reports = [next(member) for member in self._members.values()]
            self._close([report.trial_id for report in reports if report.is_last])
        return to_result(reports)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: each member's session writes its own checkpoint."""

    def load_checkpoint(self, checkpoint: Tree | None) -> None:
        """Load nothing: the sessions have read their own checkpoints."""

    def cleanup(self) -> None:
        with self._plugins.active():
            self._close(list(self._members))

    def _begin(self, config: Tree) -> None:
        self._plugins, self._ended_file = Plugins(), None
        # Tune adds this attribute to each result, and keeps the last one.
        self.config: Tree = {}
        try:
            payload = PackPayload.decode(config["payload"])
        except ConfigError as error:
            # A plug-in that doesn't run on this machine, which may lack a library, won't run in a retry.
            failed = [TrialReport(trial_id, 0, failure=str(error)) for trial_id in config["trial_ids"]]
            self._members = {report.trial_id: _only(report) for report in failed}
            return
        self._plugins = payload.settings[0].config.plugins
        with self._plugins.active():
            self._start(payload)

    def _start(self, payload: PackPayload) -> None:
        record_process(self.trial_id)
        pack = TrialPack() if payload.trains_together else None
        self._ended_file = payload.ended_file
        self._members = {settings.trial_id: self._session.reports(settings, pack) for settings in payload.settings}
        # A process that is started again after a loss leaves out what has ended.
        self._close(self._ended())
        if pack is not None:
            # All members join the pack before the first of them trains.
            for trial_id, reports in self._members.items():
                first = next(reports)
                if first is not HAS_JOINED:
                    self._members[trial_id] = _only(first)

    def _ended(self) -> list[str]:
        """Return the members that have ended; the driver writes them before it asks for a step."""
        if len(self._members) < 2 or self._ended_file is None or not storage.exists(self._ended_file):
            return []
        trial_ids: list[str] = storage.read_json(self._ended_file)
        return trial_ids

    def _close(self, trial_ids: list[str]) -> None:
        for trial_id in trial_ids:
            if trial_id in self._members:
                self._members.pop(trial_id).close()


def _only(report: TrialReport) -> Generator[TrialReport, None, None]:
    yield report
