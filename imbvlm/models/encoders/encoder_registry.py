"""The meaning of an encoder's name, of any kind."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.constants import DEFAULT_REVISION

from imbvlm.assets import encoder_path
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_entries import ENCODERS
from imbvlm.config.input_sections import HF_HUB, LOCAL_DIR, TIMM, EncoderConfig, absolute_encoder_name
from imbvlm.models.encoders.encoder_source import EncoderSource
from imbvlm.models.encoders.hub_files import HubFile
from imbvlm.models.encoders.open_clip_names import ANY_WEIGHTS, CONFIG_FILE, SAFE_WEIGHTS, folder_source, tag_source
from imbvlm.models.encoders.timm_names import TIMM_CONFIG_FILE, TIMM_WEIGHTS_FILE, timm_folder_source, timm_source

# OWNER/REPO[@REVISION]; a revision is a branch, a tag or a commit.
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*))?")


def has_text(config: EncoderConfig) -> bool:
    """Whether an encoder embeds texts too; reads or fetches its description at most.

    A name that can't be resolved counts as if it did: the encoder is rejected where it is described.
    """
    try:
        return resolve_encoder(config).loader == "open_clip"
    except ImbvlmError:
        return True


def resolve_encoder(config: EncoderConfig) -> EncoderSource:
    """What `encoder.name` means; reads small files only, or fetches them from the hub.

    Raises ImbvlmError with the nearest name or the fix.
    """
    entry = ENCODERS.get(config.name)
    name = absolute_encoder_name(config.name if entry is None else entry.name)
    if entry is not None and entry.tag is None and not name.startswith((HF_HUB, LOCAL_DIR)):
        return folder_source(config, str(encoder_path(entry.model)))
    if name.startswith(LOCAL_DIR):
        folder = Path(name.removeprefix(LOCAL_DIR))
        is_timm = (folder / TIMM_CONFIG_FILE).exists() and not (folder / CONFIG_FILE).exists()
        return (timm_folder_source if is_timm else folder_source)(config, str(folder))
    if name.startswith(HF_HUB):
        return _hub_source(config, name.removeprefix(HF_HUB), SAFE_WEIGHTS if entry is None else ANY_WEIGHTS)
    if name.startswith(TIMM):
        return timm_source(config, name.removeprefix(TIMM))
    return tag_source(config, name, ENCODERS)


def _hub_source(config: EncoderConfig, name: str, weights_names: tuple[str, ...]) -> EncoderSource:
    """The model of a repository on the hub, whose description is fetched unless cached; raises ImbvlmError."""
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise ImbvlmError(
            f"encoder.name must be {HF_HUB}OWNER/REPO or {HF_HUB}OWNER/REPO@REVISION, got {config.name!r}. Name a "
            "repository of the hub and a branch, a tag or a commit."
        )
    repository, revision = match[1], match[2] or DEFAULT_REVISION
    # Repositories of open_clip may have a description for timm or transformers, too.
    description = Path(HubFile(repository, (CONFIG_FILE, TIMM_CONFIG_FILE), revision).fetch(config.name))
    is_timm, commit = description.name == TIMM_CONFIG_FILE, description.parent.name
    weights = HubFile(repository, (TIMM_WEIGHTS_FILE,) if is_timm else weights_names, commit)
    return (timm_folder_source if is_timm else folder_source)(config, str(description.parent), weights)
