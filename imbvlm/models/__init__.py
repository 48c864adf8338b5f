"""Models: decoders, classifiers, adapters, prompts, and their builders."""
