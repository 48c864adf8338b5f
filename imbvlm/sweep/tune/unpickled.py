"""The base of Tune's searchers, schedulers and callbacks, which leaves their state out of Tune's own snapshots."""

from __future__ import annotations

from typing import Any


class Unpickled:
    """Pickled without its state: it holds the console, the manifest and open files.

    Tune pickles searchers, schedulers and callbacks for its own restore, which is not used.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {}
