"""CPU seconds of a command and of everything that it starts, over time; other work on the machine isn't in them."""

import bisect
import os
import subprocess
import threading
import time
from pathlib import Path

SECONDS_PER_TICK = 1 / os.sysconf("SC_CLK_TCK")
EVERY_SECONDS = 0.25


class WatchedCommand:
    """Runs a command to its end; raises SystemExit with the end of what it printed where it fails."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._spent: dict[int, float] = {}
        self._history: list[tuple[float, float]] = []
        self.began = time.time()
        with log.open("w") as out:
            process = subprocess.Popen(arguments, stdout=out, stderr=subprocess.STDOUT)
            watcher = threading.Thread(target=self._watch, args=(process,))
            watcher.start()
            code = process.wait()
            watcher.join()
        self.seconds = time.time() - self.began
        if code:
            raise SystemExit(f"{' '.join(arguments)} ended with {code}:\n{log.read_text()[-3000:]}")

    def cpu_seconds(self, until: float | None = None) -> float:
        """All of them, or up to a time (of time.time())."""
        place = len(self._history) if until is None else bisect.bisect_right(self._history, (until, float("inf")))
        return self._history[max(0, place - 1)][1]

    def _watch(self, process: subprocess.Popen) -> None:
        ours = {process.pid}
        while process.poll() is None:
            found = sorted(_processes())
            # A process that outlives its parent has been seen under it.
            for _ in range(2):
                ours |= {pid for pid, parent, _ in found if parent in ours}
            self._spent |= {pid: spent for pid, _, spent in found if pid in ours}
            self._history.append((time.time(), sum(self._spent.values())))
            time.sleep(EVERY_SECONDS)


def _processes() -> list[tuple[int, int, float]]:
    """Id, parent and CPU seconds so far of every process that is seen."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found.append((int(name), int(fields[1]), (int(fields[11]) + int(fields[12])) * SECONDS_PER_TICK))
    return found
