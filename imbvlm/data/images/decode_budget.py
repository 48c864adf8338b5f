"""A limit on the memory of threads that decode images in parallel, however large the images are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from imbvlm.data.files.byte_ranges import parse_range
from imbvlm.data.files.object_reader import file_state
from imbvlm.data.images.decoding import MAX_PIXELS, ImageError, decoded_pixels, fetch

# Limit on the files that wait to be decoded.
_FILE_BYTES = 500_000_000
# Threads that share the pixels of one largest image: photos of 22 megapixels are decoded in parallel.
_THREADS_PER_IMAGE = 8


class DecodeBudget:
    """Let threads decode in parallel while files and pixels stay below a limit; a larger image is decoded alone."""

    def __init__(self, num_threads: int = 1) -> None:
        num_images = -(-num_threads // _THREADS_PER_IMAGE)
        self._files, self._pixels = _Budget(_FILE_BYTES * num_images), _Budget(MAX_PIXELS * num_images)

    @contextmanager
    def fetched(self, uri: str | None, data: bytes | None) -> Iterator[bytes]:
        """Fetch an image's file and reserve memory to decode it meanwhile; raises ImageError, StorageError."""
        # Files that wait to be decoded take memory, too.
        with self._files.take(_file_bytes(uri) if data is None else 0):
            content = fetch(uri, data)
            with self._pixels.take(decoded_pixels(content)):
                yield content

    def read(self, uri: str | None, data: bytes | None, use: Callable[[bytes], object]) -> str | None:
        """Fetch an image's file for `use`, which decodes it; returns the reason of a bad image. Raises StorageError."""
        try:
            with self.fetched(uri, data) as content:
                use(content)
        except ImageError as error:
            return error.reason
        return None


class _Budget:
    """Let threads hold amounts whose sum stays within a limit; a larger amount is granted alone."""

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
    """Size of an image's file or byte range; 0 where it is known only after the file is read."""
    part = parse_range(uri or "")
    if part is not None:
        return part.num_bytes
    state = file_state(uri or "")
    return 0 if state is None else state.st_size
