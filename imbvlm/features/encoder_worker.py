"""The worker of an extraction pass: it runs blocks of crops through an encoder and stores the outputs."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import ComputeDtype, OutputName
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.image_blocks import BlockSummary, LoadedBlock
from imbvlm.features.shard_file import as_tensor
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder

# Large batches fall out of a CPU's cache. One core computes 320, 250 and 230 images a second in batches of 16, 32 and
# 64 with the embedded encoder at 96 px, and 9.0, 8.4 and 4.9 with a ViT-B/32.
BATCH_ON_CPU, BATCH_ON_GPU = 16, 256


class EncoderWorker:
    """Holds an encoder in one process; a call with a loaded block writes its shards.

    Several threads may call it: one block at a time is computed while others are written. With `compile_for`, the
    images of a block, the encoder is compiled first, if torch can: for one size of batches, to which the last of a
    block is filled up.
    """

    def __init__(self, encoder: Encoder, *, compile_for: int = 0) -> None:
        self.encoder = encoder
        self.batch_size = BATCH_ON_GPU if encoder.device.type == "cuda" else BATCH_ON_CPU
        self._running = threading.Lock()
        self._not_compiled, self._fills_batches = None, False
        if compile_for:
            # As many batches as before, of one size.
            self.batch_size = math.ceil(compile_for / math.ceil(compile_for / self.batch_size))
            self._not_compiled = encoder.compile(self.batch_size)
            self._fills_batches = self._not_compiled is None

    def __call__(self, block: LoadedBlock) -> BlockSummary:
        """Store the block's outputs."""
        bad = {number: reason for number, reason in enumerate(block.reasons) if reason is not None}
        written = {}
        if len(block.images):
            store = FeatureStore.open(block.folder)
            with self._running:
                computed = self._run(block.images, block.outputs, store)
            for output, values in computed.items():
                # The outputs of a missing image mean nothing.
                values[np.isin(block.entry_rows, list(bad))] = 0
                reasons = [block.reasons[row] for row in block.entry_rows]
                contents = block.contents[block.entry_rows]
                written[output] = store.append(output, contents, block.entry_views, values, reasons)
        return BlockSummary(
            block.part,
            block.rows,
            block.contents,
            block.num_images,
            len(block.images),
            written,
            {int(block.rows[number]): reason for number, reason in bad.items()},
            self._not_compiled,
        )

    def _run(
        self, images: npt.NDArray[np.uint8], outputs: Sequence[OutputName], store: FeatureStore
    ) -> dict[OutputName, npt.NDArray[Any]]:
        on_gpu = self.encoder.device.type == "cuda"
        shapes = {output: (len(images), *store.layout.shapes[output]) for output in outputs}
        precision = getattr(torch, store.layout.precision)
        # Pinned, so that a batch is copied to main memory while the next one is computed.
        buffers = {output: torch.empty(shape, dtype=precision, pin_memory=on_gpu) for output, shape in shapes.items()}
        for start in range(0, len(images), self.batch_size):
            batch = as_tensor(images[start : start + self.batch_size])
            size = len(batch)
            if self._fills_batches and size < self.batch_size:
                batch = torch.cat([batch, batch[:1].expand(self.batch_size - size, *batch.shape[1:])])
            result = self.encoder.forward_images(batch.pin_memory() if on_gpu else batch)
            for output, values in buffers.items():
                values[start : start + size].copy_(getattr(result, output)[:size], non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(self.encoder.device)
        return {output: values.numpy() for output, values in buffers.items()}


def make_encoder_worker(
    encoder: EncoderConfig,
    evaluation: EvalConfig,
    fingerprint: str,
    computed_in: ComputeDtype,
    num_threads: int,
    use_gpu: bool,
    compile_for: int,
) -> EncoderWorker:
    """Load an encoder in a process of its own.

    Raises ImbvlmError where its weights here aren't those that the store is for, or where the store is computed in
    bfloat16 and the GPU has no units for it.
    """
    if not use_gpu:
        torch.set_num_threads(num_threads)
    loaded = create_encoder(encoder, evaluation, "cuda" if use_gpu else "cpu")
    if loaded.info.weights_fingerprint != fingerprint:
        raise ImbvlmError(
            f"the weights of {encoder.name} on {socket.gethostname()} are not those of the machine that began the "
            "extraction. Give every machine the same file."
        )
    return EncoderWorker(loaded.compute_in(computed_in), compile_for=compile_for)
