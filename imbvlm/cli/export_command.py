"""`imbvlm export`."""

from __future__ import annotations

import argparse

from imbvlm.cli.options import _command


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from imbvlm.cli.sweep_script import positive

    parser = _command(
        commands,
        "export",
        "Write the best configuration and its model, or several.",
        "imbvlm export runs/quickstart-20261124-120000 -o my-model\n"
        "  imbvlm export runs/inat-20261124-120000 -o models --top 3 --onnx --licence apache-2.0",
    )
    parser.add_argument("sweep", help="a sweep's folder or s3:// URI")
    parser.add_argument("-o", "--out", required=True, help="folder or s3:// URI for best.yaml and model/")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--top", type=positive, default=1, metavar="N", help="the N best by validation (default: 1)")
    which.add_argument("--pareto", action="store_true", help="the trials that none beats in every objective")
    parser.add_argument("--onnx", action="store_true", help="tower and classifier as one ONNX graph besides")
    parser.add_argument("--manifest", help="where the sweep's manifest is, if it was moved")
    parser.add_argument("--licence", default="other", metavar="ID", help="for the model card, such as apache-2.0")
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from imbvlm.sweep.export.exporter import export_sweep

    exported = export_sweep(
        options.sweep, options.out, top=options.top, pareto=options.pareto, onnx=options.onnx, licence=options.licence,
        manifest=options.manifest,
    )  # fmt: skip
    for one in exported:
        print(f"{one.record.trial_id} written to {one.folder}: best.yaml and model/, with its card in model/README.md")
        if one.onnx_difference is not None:
            print(f"  model/onnx/model.onnx gives its logits to {one.onnx_difference:.1g}")
    print(f"next: imbvlm predict {exported[0].folder} PHOTO.jpg")
    return 0
