"""The parts of one optimizer step: batches, mixing, losses, optimizers, workers."""
