"""Trials in a process of Tune, one or a pack; the next ones reuse the process and its open data."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Generator

from ray import tune

from imbvlm.base import storage
from imbvlm.base.schema import Tree
from imbvlm.training.trial_pack import TrialPack
from imbvlm.training.trial_session import TrialReport, TrialSession, TrialSettings, default_device


class InProcessTrial(tune.Trainable):
    """One `step` is one epoch of every member that has not ended; `reports` has one report for each.

    Tune's checkpoints are not used, since the members' sessions write their own without pickling.
    """

    def setup(self, config: Tree) -> None:
        self._session = TrialSession(default_device())
        self._start(config)

    def reset_config(self, new_config: Tree) -> bool:
        self.cleanup()
        self._start(new_config)
        return True

    def step(self) -> TrialReport:
        for name in self._stopped():
            if name in self._members:
                self._members.pop(name).close()
        reports = []
        for name, member in list(self._members.items()):
            report = next(member)
            reports.append({**report, "member": name})
            if report.get("done"):
                self._members.pop(name).close()
        epoch = max((report.get("epoch", 0) for report in reports), default=0)
        return {"reports": reports, "epoch": epoch, "done": not self._members}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: each member's session writes its own checkpoint."""

    def load_checkpoint(self, checkpoint: Tree | None) -> None:
        """Load nothing: the sessions have read their own checkpoints."""

    def cleanup(self) -> None:
        for member in self._members.values():
            member.close()
        self._members.clear()

    def _start(self, config: Tree) -> None:
        names: list[str] = config["names"]
        pack = TrialPack() if config["together"] else None
        self._stop_file: str = config["stop_file"]
        self._members: dict[str, Generator[TrialReport, None, None]] = {}
        for name, settings in zip(names, _decompress_settings(config["settings"]), strict=True):
            self._members[name] = self._session.reports(TrialSettings.from_dict(settings), pack)
        if pack is not None:
            # All members join the pack before the first of them trains.
            for name, reports in self._members.items():
                first = next(reports)
                if first:
                    self._members[name] = _only(first)

    def _stopped(self) -> list[str]:
        """Return the members that the trial scheduler has stopped; the driver writes them before it asks for a step."""
        if len(self._members) < 2 or not storage.exists(self._stop_file):
            return []
        names: list[str] = json.loads(storage.read_bytes(self._stop_file))
        return names


def compress_settings(settings: list[Tree]) -> str:
    """Compress members' settings into one string, since Tune keeps a copy of a trial's configuration in each report."""
    return base64.b85encode(zlib.compress(json.dumps(settings).encode())).decode()


def _decompress_settings(text: str) -> list[Tree]:
    settings: list[Tree] = json.loads(zlib.decompress(base64.b85decode(text)))
    return settings


def _only(report: TrialReport) -> Generator[TrialReport, None, None]:
    yield report
