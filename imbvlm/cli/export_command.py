"""`imbvlm export`."""

from __future__ import annotations

import argparse

from imbvlm.cli.options import add_command, positive


def add_export_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "export",
        "Write the best configuration and its model, or several.",
        "imbvlm export runs/quickstart-20261124-120000 -o my-model\n"
        "  imbvlm export runs/inat-20261124-120000 -o models --top 3 --onnx --license apache-2.0",
    )
    parser.add_argument("sweep", help="a sweep's folder or s3:// URI")
    parser.add_argument("-o", "--out", required=True, help="folder or s3:// URI for best.yaml and model/")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--top", type=positive, default=1, metavar="N", help="the N best by validation (default: 1)")
    which.add_argument("--pareto", action="store_true", help="the trials that no other beats in all objectives")
    parser.add_argument("--onnx", action="store_true", help="also write encoder and classifier as one ONNX graph")
    parser.add_argument("--manifest", help="the manifest's present location, if it was moved")
    parser.add_argument("--license", default="other", metavar="ID", help="for the model card, such as apache-2.0")
    # The spelling of version 0.1.
    parser.add_argument("--licence", dest="license", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from imbvlm.sweep.export.exporter import export_sweep

    exported = export_sweep(
        options.sweep,
        options.out,
        top=options.top,
        pareto=options.pareto,
        onnx=options.onnx,
        license_id=options.license,
        manifest=options.manifest,
    )
    for export in exported:
        trial_id, folder = export.record.trial_id, export.folder
        print(f"{trial_id} written to {folder}: best.yaml and model/, with its card in model/README.md")
        if export.onnx_difference is not None:
            print(f"  model/onnx/model.onnx gives its logits to {export.onnx_difference:.1g}")
    print(f"next: imbvlm predict {exported[0].folder} PHOTO.jpg")
    return 0
