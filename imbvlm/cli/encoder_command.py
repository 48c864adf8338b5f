"""`imbvlm encoder fetch`."""

from __future__ import annotations

from typing import Annotated

import typer

from imbvlm.base.errors import ImbvlmError


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="an encoder, as encoder.name has it")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="a new or empty folder of this machine")],
) -> int:
    """Write an encoder with its tokenizer as a folder that local-dir: reads without a network."""
    import os
    import shutil

    from imbvlm.base import storage
    from imbvlm.base.formatting import size_text
    from imbvlm.config.input_sections import LOCAL_DIR, EncoderConfig, EvalConfig
    from imbvlm.models.encoders.encoder_factory import create_encoder
    from imbvlm.models.encoders.encoder_registry import resolve_encoder
    from imbvlm.models.encoders.open_clip_names import OTHER_TOKENIZER_FILES, TOKENIZER_FILES
    from imbvlm.models.encoders.open_clip_text import tokenizer_folder

    if not storage.is_local(out):
        raise ImbvlmError(f"--out must be a folder of this machine, got {out}. Copy it to other places afterwards.")
    folder = storage.local_path(out).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ImbvlmError(f"{folder} is there already. Remove it, or give another folder with -o.")
    config = EncoderConfig(name=name)
    source = resolve_encoder(config)
    hub_text = source.model_config.get("text_cfg", {}).get("hf_model_name")
    if hub_text:
        raise ImbvlmError(
            f"the text tower of {name} is {hub_text} of the hub, which a folder can't have. Load it once where there "
            "is a network, and copy the hub's cache."
        )
    encoder = create_encoder(config, EvalConfig())
    encoder.check()
    tokenizer = None if encoder.text is None else tokenizer_folder(source)
    encoder.save(str(folder))
    for path in [] if tokenizer is None else tokenizer.iterdir():
        if path.name in {*TOKENIZER_FILES, *OTHER_TOKENIZER_FILES}:
            shutil.copyfile(path, folder / path.name)
    num_bytes = sum(os.path.getsize(path) for path in folder.iterdir())
    revision = f" at revision {encoder.info.revision}" if encoder.info.revision else ""
    print(f"{name}{revision} written to {folder}, {size_text(num_bytes)}")
    print(f"next: encoder.name: {LOCAL_DIR}{folder}")
    return 0
