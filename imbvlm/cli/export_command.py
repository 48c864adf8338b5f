"""`imbvlm export`."""

from __future__ import annotations

from typing import Annotated

import typer

from imbvlm.cli.options import MovedManifest, SweepFolder


def export(
    ctx: typer.Context,
    sweep: SweepFolder,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FOLDER", help="folder or s3:// URI for best.yaml and model/")
    ],
    top: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="number of trials to export, the best on validation first; by default 1"),
    ] = None,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="the trials that no other trial beats in all objectives, in place of --top")
    ] = False,
    single: Annotated[bool, typer.Option("--single", help="the best single trial in place of a blend")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="also write encoder and classifier as one ONNX graph")] = False,
    manifest: MovedManifest = None,
    license_id: Annotated[
        str, typer.Option("--license", metavar="ID", help="license in the model card, such as apache-2.0")
    ] = "other",
    # The spelling of version 0.1.
    old_spelling: Annotated[str | None, typer.Option("--licence", hidden=True)] = None,
) -> int:
    """Write the best configuration and its model, or several."""
    from imbvlm.sweep.export.exporter import export_sweep

    if pareto and top is not None:
        ctx.fail("--top and --pareto exclude each other")
    if single and (pareto or top is not None):
        ctx.fail("--single exports the best trial alone, and --top and --pareto export several single ones")
    exported = export_sweep(
        sweep,
        out,
        top=top or 1,
        pareto=pareto,
        single=single or top is not None,
        onnx=onnx,
        license_id=old_spelling or license_id,
        manifest=manifest,
    )
    for model in exported:
        print(f"{model.name} written to {model.folder}: best.yaml and model/, with its card in model/README.md")
        if model.onnx_difference is not None:
            print(f"  model/onnx/model.onnx gives its logits to {model.onnx_difference:.1g}")
    print(f"next: imbvlm predict {exported[0].folder} PHOTO.jpg")
    return 0
