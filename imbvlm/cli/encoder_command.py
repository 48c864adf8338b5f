"""`imbvlm encoder fetch | compare`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from imbvlm.base.errors import LINE_BREAKS, ImbvlmError, printable
from imbvlm.cli.options import Json, ManifestPath

COMPARISON_LOG = "encoder-compare.log"


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="an encoder, as encoder.name has it")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="a new or empty folder of this machine")],
) -> int:
    """Write an encoder into a folder that needs no network.

    The folder has the tokenizer, too, and encoder.name takes it as local-dir:FOLDER.
    """
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


def compare_encoders(
    manifest: ManifestPath,
    encoders: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="the encoders, each as encoder.name has it, between commas")
    ],
    sizes: Annotated[
        str, typer.Option(metavar="PIXELS,...", help="sizes of images to compare; by default each encoder's own")
    ] = "",
    images: Annotated[
        int,
        typer.Option(metavar="N", min=10, help="largest sample; each class gives as many as any other, or all"),
    ] = 2000,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="selects the sample and its folds")] = 0,
    features: Annotated[
        str, typer.Option(metavar="FOLDER", help="folder or s3:// URI for the sample's features")
    ] = "runs/features",
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="auto: what a sweep would use; cpu, cuda: this machine alone, without or with its GPUs"),
    ] = "auto",
    as_json: Json = False,
) -> int:
    """Compare encoders on a sample of the training images.

    A linear probe, class means and zero-shot are scored by folds on features as a sweep computes them.
    """
    import json
    import os
    from contextlib import nullcontext

    from imbvlm.base import storage
    from imbvlm.base.console import Console
    from imbvlm.base.yaml_file import parse_scalar
    from imbvlm.data.manifest import Manifest
    from imbvlm.features.store_sizes import check_disk_space
    from imbvlm.ray_runtime.connection import on_this_machine
    from imbvlm.sweep.plan.encoder_comparison import (
        OUTPUTS,
        Comparison,
        EncoderResult,
        compare_encoder,
        find_encoders,
        sample_images,
    )
    from imbvlm.training.trial_session import default_device

    if device == "cpu":
        # Before torch looks for them. Ray's processes inherit it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device == "cuda" and default_device().type != "cuda":
        raise ImbvlmError("--device is cuda, and torch finds no GPU here. `imbvlm doctor` says why; or set it to cpu.")
    names, pixels = ([item.strip() for item in text.split(",") if item.strip()] for text in (encoders, sizes))
    storage.check_folder(features)
    whole = Manifest.read(manifest)
    compared = find_encoders(manifest, names, [parse_scalar(size) for size in pixels], seed)
    sample = sample_images(whole, images, seed)
    check_disk_space([encoder.config for encoder in compared], sample, features, OUTPUTS)
    console, results, doing = Console(), list[EncoderResult](), ""

    def report(text: str) -> None:
        if not as_json:
            console.update_live(f"{doing}: {text}")

    log = storage.local_path(features) / COMPARISON_LOG if storage.is_local(features) else None
    try:
        with console.redirect_output(log), nullcontext() if device == "auto" else on_this_machine():
            for number, encoder in enumerate(compared, 1):
                doing = f"{encoder.name} at {encoder.info.image_size} px, {number} of {len(compared)}"
                results.append(compare_encoder(encoder, sample, features, report))
    finally:
        # Also after a Ctrl-C, for the encoders before it.
        if results:
            comparison = Comparison(whole, sample, seed, results, has_sizes=bool(pixels))
            text = json.dumps(comparison.to_dict(), indent=1) if as_json else comparison.describe(console.width)
            print(printable(text, keep=LINE_BREAKS), flush=True)
    return int(any(result.failure is not None for result in results))
