"""The `imbvlm` command, also `python -m imbvlm`."""

from __future__ import annotations

# isort: off
from imbvlm.base import interrupts

interrupts.from_first_line()
# isort: on

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated, Any, NoReturn

import typer

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.version import __version__
from imbvlm.cli.encoder_command import compare_encoders, fetch
from imbvlm.cli.export_command import export
from imbvlm.cli.manifest_command import build, check, show
from imbvlm.cli.options import GroupHelp, Json, ManifestPath, add_command, examples, make_app, run_program, with_plugins
from imbvlm.cli.predict_command import predict
from imbvlm.cli.sweep_command import (
    compare,
    plan,
    report,
    sweep_list,
    sweep_resume,
    sweep_run,
    sweep_show,
    sweep_update,
    with_sweep_action,
)

EPILOG = """\
\b
on your own images, a folder per class:
  imbvlm manifest build --folders photos/ --test-share 0.2 -o photos.parquet
  python sweeps/quickstart.py --manifest photos.parquet
  imbvlm report runs/quickstart-20261124-120000 -o report-files

\b
words such as manifest, encoder and shot group: docs/glossary.md

\b
exit codes:
  0    done, also for a sweep that ended at one of its limits with a result
  1    failed, with a sentence on standard error; or a check reports an error
  2    wrong usage
  130  interrupted (Ctrl-C); finished work is kept
  143  interrupted by SIGTERM (scancel, kubectl delete, systemctl stop)
"""
# A test compares it with OUTPUT_NAMES; typer takes a list of an enumeration, and not of a Literal.
Output = StrEnum("Output", ["tokens", "pooled", "image_embedding"])
# Outputs of another image size or crop are other outputs, which a sweep can't read.
READ_BY = (
    "A sweep with the same encoder, encoder.image_size, eval.resize and features reads these outputs. Any other sweep "
    "computes its own. With --encoder tinylit_lite0 --set eval.resize=1.0 sweeps/quickstart.py reads sizes 64 and 128, "
    "a small sweeps/paper.py 96."
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command; exits with 0, 1 for a failure (a sentence on stderr), 2 for wrong usage, 130, or 143."""
    # Pillow's warnings on images that it can read are not for the user, still less with lines of Pillow's code.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    run_program(APP, "imbvlm", with_sweep_action(sys.argv[1:] if arguments is None else arguments))


class _Commands(GroupHelp):
    """The commands in the order of a user's work."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(dict.fromkeys(words.split()[0] for words in COMMANDS))


def _make_imbvlm() -> typer.Typer:
    """`imbvlm` with all its commands."""
    app = make_app(
        "Find the best long-tailed image classifier that a vision-language model can give on your images.",
        EPILOG,
        cls=_Commands,
        add_completion=True,
    )
    app.callback()(_imbvlm)
    groups = {name: make_app(summary, examples(example)) for name, (summary, example) in GROUPS.items()}
    for words, (function, epilog) in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        add_command(groups.get(group, app), name, function, epilog=epilog)
    for name, actions in groups.items():
        app.add_typer(actions, name=name)
    return app


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


def _imbvlm(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def doctor(
    storage: Annotated[
        list[str] | None, typer.Argument(metavar="FOLDER", help="folders and s3:// URIs for sweeps; by default runs")
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="check this encoder and its weights; repeatable; by default tinylit_lite0"),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check this machine for everything a sweep needs. Each problem has a suggested fix."""
    from imbvlm.cli.doctor import describe, run_checks, to_dicts

    checks = run_checks(storage or ["runs"], encoder or ["tinylit_lite0"])
    print(json.dumps(to_dicts(checks), indent=1) if as_json else describe(checks))
    return int(any(check.state == "broken" for check in checks))


def extract_features(
    manifest: ManifestPath,
    encoder: Annotated[str, typer.Option(metavar="NAME", help="name of the encoder")],
    image_size: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="side of the encoder's input; by default the encoder's own")
    ] = None,
    output: Annotated[
        list[Output] | None,
        typer.Option(
            metavar="OUTPUT",
            help="an output to store: tokens, which a decoder reads, pooled or image_embedding; repeatable; by default "
            "pooled and image_embedding",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="a key of data, encoder, features or eval; repeatable"),
    ] = None,
    storage_folder: Annotated[
        str, typer.Option("--storage", metavar="FOLDER", help="folder or s3:// URI for sweeps")
    ] = "runs",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only print how many images and bytes are missing")
    ] = False,
    as_json: Json = False,
) -> int:
    """Run an encoder over a manifest's images and store its outputs."""
    from imbvlm.base import storage
    from imbvlm.base.console import Console
    from imbvlm.cli.features_command import extract
    from imbvlm.cli.sweep_script import parse_settings
    from imbvlm.config.trial_config import TrialConfig
    from imbvlm.data.manifest import Manifest
    from imbvlm.models.encoders.encoder_factory import describe_encoder

    tree = {
        "data": {"manifest": manifest},
        "encoder": {"name": encoder, "image_size": image_size},
        "method": "zero_shot",
    }
    config = TrialConfig.from_tree(tree).with_overrides(parse_settings(settings), "--set")
    storage.check_folder(storage_folder)
    # Checked before the log creates a folder.
    images, available = Manifest.read(config.data.manifest), describe_encoder(config.encoder).shapes
    requested = {*(output or ("pooled", "image_embedding"))}
    if output and not requested <= available.keys():
        raise ImbvlmError(f"{encoder} is image-only and has no image_embedding; leave out that --output.")
    console, outputs = Console(), frozenset(name for name in available if name in requested)
    is_local = storage.is_local(storage_folder) and not dry_run
    with console.redirect_output(storage.local_path(storage_folder) / "features.log" if is_local else None):
        progress = (lambda text: None) if as_json else console.update_live
        root = storage.join(storage_folder, "features")
        extraction = extract(config, images, root, outputs, report=progress, dry_run=dry_run)
        console.end_live()
    print(json.dumps(extraction.to_dict(), indent=1) if as_json else f"{extraction.describe()}\n{READ_BY}")
    return 0


def check_features(
    folders: Annotated[
        list[str] | None,
        typer.Argument(metavar="FOLDER", help="stores, or folders or s3:// URIs of stores; by default runs/features"),
    ] = None,
) -> int:
    """Verify every byte of stored features by its checksum."""
    from imbvlm.cli.features_command import check

    return check(folders or ["runs/features"])


StoreFolders = Annotated[
    list[str] | None,
    typer.Argument(metavar="FOLDER", help="folders or s3:// URIs of stores; by default runs/features"),
]


def list_features(folders: StoreFolders = None, as_json: Json = False) -> int:
    """List feature stores: content, size and use.

    Each has its encoder, image size, outputs, images, bytes, last use, and the sweeps that read it.
    """
    from imbvlm.cli.features_care import describe, list_stores, to_dicts

    stores = list_stores(folders or ["runs/features"])
    print(json.dumps(to_dicts(stores), indent=1) if as_json else describe(stores))
    return 0


def prune_features(
    manifests: Annotated[
        str, typer.Option(metavar="FOLDER", help="the folder or s3:// prefix with all your manifests, at any depth")
    ],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="folder or s3:// URI of stores")] = "runs/features",
    delete: Annotated[bool, typer.Option("--delete", help="delete them; without it nothing changes")] = False,
) -> int:
    """Show or delete stored features that no manifest refers to.

    Features of the last day and those of a running sweep stay.
    """
    from imbvlm.cli.features_care import prune

    print("\n".join(prune(folder, manifests, delete=delete)))
    return 0


def train(
    config: Annotated[str, typer.Argument(metavar="FILE", help="a trial's YAML, such as an exported best.yaml")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="a key of the configuration, such as optim.lr=0.05; repeatable; docs/reference/config.md lists all",
        ),
    ] = None,
    storage: Annotated[str, typer.Option(metavar="FOLDER", help="folder or s3:// URI for features")] = "runs",
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FOLDER", help="folder for the weights (model.safetensors)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the final metrics as JSON and nothing else")] = False,
) -> int:
    """Train one configuration and score it on validation."""
    from imbvlm.cli.sweep_script import parse_settings
    from imbvlm.cli.train_command import train_one
    from imbvlm.config.trial_config import TrialConfig

    trial = TrialConfig.from_yaml(config).with_overrides(parse_settings(settings), "--set")
    metrics, notes = train_one(trial, storage, out, quiet=as_json)
    if as_json:
        print(json.dumps({**metrics, "notes": notes}, indent=1))
    return 0


def check_cluster(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="a cluster's file, such as cluster/gpu.yaml or cluster/kuberay.yaml")
    ],
) -> int:
    """Check a cluster's file before anything is paid for."""
    from imbvlm.cli.cluster_file_check import check_cluster_file

    check_cluster_file(file)
    print(f"{file}: nothing is missing")
    return 0


GROUPS = {
    "manifest": (
        "Make, show and check the list of your images.",
        "imbvlm manifest build --folders photos/ -o photos.parquet",
    ),
    "features": (
        "Compute, check, list and prune stored encoder outputs.",
        "imbvlm features extract photos.parquet --encoder openai_vit_b16 --dry-run",
    ),
    "encoder": (
        "Compare encoders on your images, or fetch one.",
        "imbvlm encoder fetch openai_vit_b16 -o openai_vit_b16",
    ),
    "sweep": (
        "Run, resume, list and show sweeps. `sweep FILE` is `sweep run FILE`.",
        "imbvlm sweep run my-sweep.yaml --dry-run",
    ),
}
# Each command with the end of its help, in the order of a user's work.
COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "doctor": (with_plugins(doctor), examples("imbvlm doctor s3://my-bucket/sweeps --encoder openai_vit_b16")),
    "manifest build": (with_plugins(build), examples("imbvlm manifest build --folders photos/ -o photos.parquet")),
    "manifest show": (show, examples("imbvlm manifest show photos.parquet")),
    "manifest check": (check, examples("imbvlm manifest check photos.parquet --decode")),
    "encoder fetch": (
        with_plugins(fetch),
        examples(
            "imbvlm encoder fetch openai_vit_b16 -o openai_vit_b16",
            "imbvlm encoder fetch hf-hub:imageomics/bioclip-2 -o bioclip-2",
        ),
    ),
    "encoder compare": (
        with_plugins(compare_encoders),
        examples(
            "imbvlm encoder compare photos.parquet --encoders pe_core_b16,dinov3_vit_b16",
            "imbvlm encoder compare photos.parquet --encoders bioclip2 --sizes 224,336",
        ),
    ),
    "features extract": (
        with_plugins(extract_features),
        f"{READ_BY}\n\n" + examples("imbvlm features extract photos.parquet --encoder openai_vit_b16 --dry-run"),
    ),
    "features check": (check_features, examples("imbvlm features check runs/features")),
    "features list": (list_features, examples("imbvlm features list runs/features --json")),
    "features prune": (
        prune_features,
        examples("imbvlm features prune runs/features --manifests .", "imbvlm features prune --manifests . --delete"),
    ),
    "train": (with_plugins(train), examples("imbvlm train best.yaml --set optim.lr=0.05")),
    "sweep run": (
        sweep_run,
        examples("imbvlm sweep run my-sweep.yaml --dry-run", "imbvlm sweep my-sweep.yaml --smoke"),
    ),
    "sweep resume": (with_plugins(sweep_resume), examples("imbvlm sweep resume runs/inat-20261124-120000")),
    "sweep update": (
        with_plugins(sweep_update),
        examples("imbvlm sweep update runs/quickstart-20261124-120000 --manifest more.parquet"),
    ),
    "sweep list": (with_plugins(sweep_list), examples("imbvlm sweep list runs --json")),
    "sweep show": (with_plugins(sweep_show), examples("imbvlm sweep show runs/inat-20261124-120000")),
    "plan": (plan, examples("imbvlm plan my-sweep.yaml --price 2.5 --json")),
    "compare": (with_plugins(compare), examples("imbvlm compare runs/inat-20261124-* --json")),
    "report": (with_plugins(report), examples("imbvlm report runs/quickstart-20261124-120000 -o report-files")),
    "export": (
        with_plugins(export),
        examples(
            "imbvlm export runs/quickstart-20261124-120000 -o my-model",
            "imbvlm export runs/inat-20261124-120000 -o models --top 3 --license mit",
        ),
    ),
    "predict": (
        with_plugins(predict),
        examples(
            "imbvlm predict my-model photos/ --top 3 -o predictions.csv",
            "imbvlm predict s3://bucket/model s3://bucket/photos -o predictions.parquet",
        ),
    ),
    "check-cluster": (check_cluster, examples("imbvlm check-cluster cluster/gpu.yaml && ray up cluster/gpu.yaml")),
}
APP = _make_imbvlm()
