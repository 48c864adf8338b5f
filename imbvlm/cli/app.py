"""The `imbvlm` command, also `python -m imbvlm`."""

from __future__ import annotations

# isort: off
from imbvlm.base import interrupts

interrupts.from_first_line()
# isort: on

import argparse
import json
import sys
import warnings
from collections.abc import Sequence

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.version import __version__
from imbvlm.cli.export_command import add_export_command
from imbvlm.cli.options import Command, add_command, print_to_stderr
from imbvlm.cli.predict_command import add_predict_command
from imbvlm.cli.sweep_command import (
    add_compare_command,
    add_plan_command,
    add_report_command,
    add_sweep_command,
    with_sweep_action,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 1 for a failure (a sentence on stderr), 2 for wrong usage, 130, or 143."""
    with interrupts.handled() as signals:
        try:
            code = signals.outlast(lambda: _run(sys.argv[1:] if arguments is None else arguments))
        except ImbvlmError as error:
            print_to_stderr(str(error))
            code = 1
        except BrokenPipeError:
            code = 1
        if code is None:
            signals.end()
            print(f"\nimbvlm: {signals.sentence}", file=sys.stderr)
            code = signals.exit_code
        sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    options = make_parser().parse_args(with_sweep_action(arguments))
    # Pillow's warnings on images that it can read are not for the user, still less with lines of Pillow's code.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    command: Command = options.command
    return command(options)


EPILOG = """\
on your own images, a folder per class:
  imbvlm manifest build --folders photos/ --test-share 0.2 -o photos.parquet
  python sweeps/quickstart.py --manifest photos.parquet
  imbvlm report runs/quickstart-20261124-120000 -o report-files

exit codes:
  0    done; a sweep that ended at one of its limits with a result, too
  1    it failed, with a sentence on standard error; a check found something broken
  2    wrong usage
  130  interrupted (Ctrl-C); what was finished is kept
  143  interrupted by SIGTERM (scancel, kubectl delete, systemctl stop); likewise
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `imbvlm` with all its commands."""
    parser = argparse.ArgumentParser(
        prog="imbvlm",
        description="Finds the best long-tailed image classifier that a vision-language model can give on your images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_manifest(commands)
    _add_features(commands)
    _add_train(commands)
    add_sweep_command(commands)
    add_plan_command(commands)
    add_compare_command(commands)
    add_report_command(commands)
    add_export_command(commands)
    add_predict_command(commands)
    _add_check_cluster(commands)
    return parser


# ------------------------------------------------------------------------------------------------------ doctor


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "doctor", "Check this machine for everything a sweep needs and suggest fixes.",
        "imbvlm doctor s3://my-bucket/sweeps --encoder openai_vit_b16",
    )  # fmt: skip
    parser.add_argument(
        "storage", nargs="*", default=["runs"], help="folders and s3:// URIs for sweeps (default: runs)"
    )
    parser.add_argument(
        "--encoder", action="append", metavar="NAME", help="an encoder that is needed (default: tinylit_lite0)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from imbvlm.cli.doctor import describe, run_checks, to_dicts

    checks = run_checks(options.storage, options.encoder or ["tinylit_lite0"])
    print(json.dumps(to_dicts(checks), indent=1) if options.json else describe(checks))
    return int(any(check.state == "broken" for check in checks))


# ---------------------------------------------------------------------------------------------------- manifest


def _add_manifest(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    # Imported here, since the import costs half a second that the other commands need not pay.
    from imbvlm.cli import manifest_command as manifest

    parser = add_command(
        commands, "manifest", "Make, show and check the list of your images.",
        "imbvlm manifest build --folders photos/ -o photos.parquet",
    )  # fmt: skip
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, summary, example, add_arguments, run in (
        ("build", "Turn folders, lists, tables, shards or a benchmark into a manifest.",
         "imbvlm manifest build --folders photos/ -o photos.parquet", manifest.add_build_arguments, manifest.build),
        ("show", "Classes, counts, shot groups and splits of a manifest.",
         "imbvlm manifest show photos.parquet", manifest.add_show_arguments, manifest.show),
        ("check", "All errors and oddities of a manifest, and a verdict.",
         "imbvlm manifest check photos.parquet --decode", manifest.add_check_arguments, _check_manifest),
    ):  # fmt: skip
        action = add_command(actions, name, summary, example)
        add_arguments(action)
        action.set_defaults(command=run)


def _check_manifest(options: argparse.Namespace) -> int:
    from imbvlm.cli.manifest_command import check

    def truncated(names: Sequence[str]) -> Sequence[str]:
        # Imported here, since the import costs seconds.
        from imbvlm.config.input_sections import EncoderConfig
        from imbvlm.models.encoders.encoder_registry import has_text, resolve_encoder
        from imbvlm.models.encoders.open_clip_text import OpenClipTokenizer
        from imbvlm.models.encoders.text_prompts import truncated_names

        config = EncoderConfig(name=options.encoder)
        return truncated_names(OpenClipTokenizer(resolve_encoder(config)), names, ["{}"]) if has_text(config) else ()

    return check(options, truncated)


# ---------------------------------------------------------------------------------------------------- features


# Outputs of another image size or crop are other outputs, which a sweep can't read.
READ_BY = (
    "A sweep reads these outputs where its encoder, encoder.image_size, eval.resize and features are the same, and "
    "computes others itself; sweeps/quickstart.py and a small sweeps/paper.py need --encoder tinylit_lite0 "
    "--image-size 96 --set eval.resize=1.0"
)


def _add_features(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "features", "Compute and check the stored outputs of encoders.",
        "imbvlm features extract photos.parquet --encoder openai_vit_b16 --dry-run",
    )  # fmt: skip
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = add_command(
        actions, "extract", "Run an encoder over a manifest's images and store its outputs for later sweeps.",
        "imbvlm features extract photos.parquet --encoder openai_vit_b16 --set features.num_views=4",
    )  # fmt: skip
    action.description = f"{action.description} {READ_BY}."
    action.add_argument("manifest", help="path or s3:// URI of a manifest, or embedded:NAME")
    action.add_argument("--encoder", required=True, metavar="NAME", help="an encoder's name")
    action.add_argument("--image-size", type=int, metavar="PIXELS", help="side of its input (default: the encoder's)")
    action.add_argument(
        "--output", action="append", choices=("tokens", "pooled", "image_embedding"),
        help="an output to store, repeatable (default: pooled and image_embedding; a decoder reads tokens)",
    )  # fmt: skip
    action.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of data, encoder, features or eval",
    )
    action.add_argument("--storage", default="runs", help="folder or s3:// URI that sweeps are kept in (default: runs)")
    action.add_argument("--dry-run", action="store_true", help="only say how many images and bytes are missing")
    action.add_argument("--json", action="store_true", help="print JSON and nothing else")
    action.set_defaults(command=_extract_features)
    action = add_command(
        actions, "check", "Read every byte of stored features and compare it with its checksum.",
        "imbvlm features check runs/features",
    )  # fmt: skip
    action.add_argument(
        "folders",
        nargs="*",
        default=["runs/features"],
        help="stores, or folders or s3:// URIs of stores (default: runs/features)",
    )
    action.set_defaults(command=_check_features)


def _extract_features(options: argparse.Namespace) -> int:
    from imbvlm.base import storage
    from imbvlm.base.console import Console
    from imbvlm.cli.features_command import extract
    from imbvlm.cli.sweep_script import parse_settings
    from imbvlm.config.trial_config import TrialConfig
    from imbvlm.data.manifest import Manifest
    from imbvlm.models.encoders.encoder_factory import describe_encoder

    tree = {
        "data": {"manifest": options.manifest},
        "encoder": {"name": options.encoder, "image_size": options.image_size},
        "method": "zero_shot",
    }
    config = TrialConfig.from_tree(tree).with_overrides(parse_settings(options.set), "--set")
    storage.check_folder(options.storage)
    # Checked before the log creates a folder.
    manifest, available = Manifest.read(config.data.manifest), describe_encoder(config.encoder).shapes
    console, outputs = Console(), frozenset(options.output or ("pooled", "image_embedding"))
    if options.output and not outputs <= available.keys():
        raise ImbvlmError(f"{options.encoder} is image-only and has no image_embedding; leave out that --output.")
    outputs &= available.keys()
    is_local = storage.is_local(options.storage) and not options.dry_run
    with console.redirect_output(storage.local_path(options.storage) / "features.log" if is_local else None):
        report = (lambda text: None) if options.json else console.update_live
        root = storage.join(options.storage, "features")
        extraction = extract(config, manifest, root, outputs, report=report, dry_run=options.dry_run)
        console.end_live()
    print(json.dumps(extraction.to_dict(), indent=1) if options.json else f"{extraction.describe()}\n{READ_BY}")
    return 0


def _check_features(options: argparse.Namespace) -> int:
    from imbvlm.cli.features_command import check

    return check(options.folders)


# ------------------------------------------------------------------------------------------------------ train


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "train",
        "Train one configuration and score it on validation.",
        "imbvlm train best.yaml --set optim.lr=0.05",
    )
    parser.add_argument("config", help="a trial's YAML, such as an exported best.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a dotted key of the configuration"
    )
    parser.add_argument("--storage", default="runs", help="folder or s3:// URI for features (default: runs)")
    parser.add_argument("-o", "--out", help="folder for the trained weights (model.safetensors)")
    parser.add_argument("--json", action="store_true", help="print the final metrics as JSON and nothing else")
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> int:
    from imbvlm.cli.sweep_script import parse_settings
    from imbvlm.cli.train_command import train_one
    from imbvlm.config.trial_config import TrialConfig

    config = TrialConfig.from_yaml(options.config).with_overrides(parse_settings(options.set), "--set")
    metrics = train_one(config, options.storage, options.out, quiet=options.json)
    if options.json:
        print(json.dumps(metrics, indent=1))
    return 0


# ---------------------------------------------------------------------------------------------- check-cluster


def _add_check_cluster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "check-cluster",
        "Check a cluster's file before anything is started or paid for.",
        "imbvlm check-cluster cluster/gpu.yaml && ray up cluster/gpu.yaml",
    )
    parser.add_argument("file", help="such as cluster/gpu.yaml or cluster/kuberay.yaml")
    parser.set_defaults(command=_check_cluster)


def _check_cluster(options: argparse.Namespace) -> int:
    from imbvlm.cli.cluster_file_check import check_cluster_file

    check_cluster_file(options.file)
    print(f"{options.file}: nothing is missing")
    return 0
