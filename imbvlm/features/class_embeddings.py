"""Stored text features of the class names, for zero-shot, prompts and text initialization."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from imbvlm.base import storage
from imbvlm.base.formatting import pluralize
from imbvlm.config.input_sections import PromptsConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.models.classifier_init import centered_by_parent
from imbvlm.models.encoders.class_texts import read_class_texts
from imbvlm.models.encoders.encoder import Encoder, require_text
from imbvlm.models.encoders.text_prompts import (
    are_truncated,
    class_embeddings,
    class_sentences,
    templates_of,
    truncated_names,
)

_FOLDER = "class-embeddings"
_CHECKSUM = "sha256"
TEXT_KEY = "prompts.center_by_parent"


def ensure_class_embeddings(
    config: TrialConfig,
    class_names: Sequence[str],
    root: str,
    encoder: Encoder,
    report: Callable[[str], None],
    taxonomy: Taxonomy | None = None,
) -> str:
    """Path of a safetensors file with `class_embeddings` (C, E), written where it is missing or damaged.

    Raises ImbvlmError for an image-only encoder, where the text side is not available, for wrong `prompts.texts`, and
    where embeddings are to be centered by a taxonomy that isn't there.
    """
    text, prompts = require_text(encoder), config.prompts or PromptsConfig()
    templates = templates_of(prompts)
    texts = read_class_texts(prompts.texts, class_names)
    key: dict[str, object] = {"tower": text.fingerprint(), "names": list(class_names), "templates": templates}
    if texts:
        key |= {"texts": texts, "add_templates": prompts.add_templates}
    if prompts.center_by_parent:
        key["lineages"] = None if taxonomy is None else taxonomy.lineages
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = storage.join(root, _FOLDER, f"{digest}.safetensors")
    if not _is_intact(path):
        named = [name for name in class_names if prompts.add_templates or name not in texts]
        truncated = truncated_names(text, named, templates)
        if truncated:
            shown = ", ".join(repr(name) for name in truncated[:3])
            report(f"{len(truncated)} class names are longer than the text tower reads, and are truncated: {shown}")
        own = [sentence for sentences in texts.values() for sentence in sentences]
        if num_long := sum(are_truncated(text, own)):
            report(
                f"{num_long:,} of {pluralize(len(own), 'text')} are longer than the text tower reads, and are truncated"
            )
        also = f"; {pluralize(len(own), 'text')} of {pluralize(len(texts), 'class')}" if texts else ""
        report(
            f"text features: {pluralize(len(named), 'class name')}, {pluralize(len(templates), 'sentence')} each{also}"
        )
        device = encoder.device
        encoder.to("cuda" if torch.cuda.is_available() else device)
        tensor = class_embeddings(text, class_sentences(prompts, class_names, texts)).contiguous()
        encoder.to(device)
        if prompts.center_by_parent:
            tensor = centered_by_parent(tensor, taxonomy, TEXT_KEY)
        checksum = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        storage.write_bytes(path, safetensors.torch.save({"class_embeddings": tensor}, {_CHECKSUM: checksum}))
    return path


def _is_intact(path: str) -> bool:
    """Whether the file has the values that were written; a file in an object store is downloaded first."""
    if not storage.exists(path):
        return False
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "embeddings"
        if storage.is_local(path):
            local = storage.local_path(path)
        else:
            storage.download(path, local)
        try:
            with safe_open(local, framework="pt") as file:
                tensor, metadata = file.get_tensor("class_embeddings").clone(), file.metadata() or {}
        except (OSError, SafetensorError):
            return False
    return metadata.get(_CHECKSUM) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
