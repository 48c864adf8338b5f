"""What threads that decode side by side hold in memory: bounded, however large the images are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from imbvlm.data.files.byte_ranges import parse_range
from imbvlm.data.files.object_reader import file_state
from imbvlm.data.images.decoding import MAX_PIXELS, decoded_pixels, fetch

# Of files that wait to be decoded.
_FILE_BYTES = 500_000_000
# Threads that share the pixels of one largest image: photos of 22 megapixels are decoded side by side.
_THREADS_PER_IMAGE = 8


class DecodeBudget:
    """Lets threads go on side by side while their files and pixels stay below a limit; a larger image goes alone."""

    def __init__(self, num_threads: int = 1) -> None:
        num_images = -(-num_threads // _THREADS_PER_IMAGE)
        self._files, self._pixels = _Budget(_FILE_BYTES * num_images), _Budget(MAX_PIXELS * num_images)

    @contextmanager
    def fetched(self, uri: str | None, data: bytes | None) -> Iterator[bytes]:
        """Within, an image's file, as `fetch` gives it, with room to decode it; raises ImageError, StorageError."""
        # What waits to be decoded lies in memory as well.
        with self._files.take(_file_bytes(uri) if data is None else 0):
            content = fetch(uri, data)
            with self._pixels.take(decoded_pixels(content)):
                yield content


class _Budget:
    """Lets threads go on side by side while what they hold adds up to a limit or less; more than that only alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._freed = limit, 0, threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(lambda: self._used == 0 or self._used + amount <= self._limit)
            self._used += amount
        try:
            yield
        finally:
            with self._freed:
                self._used -= amount
                self._freed.notify_all()


def _file_bytes(uri: str | None) -> int:
    """The size of an image's file or of its part of one; 0 where that isn't known before it is read."""
    part = parse_range(uri or "")
    state = file_state(uri or "") if part is None else None
    return part.num_bytes if part is not None else state.st_size if state is not None else 0
