"""The `imbvlm` command, also `python -m imbvlm`."""

from __future__ import annotations

# isort: off
from imbvlm import interrupts

interrupts.from_first_line()
# isort: on

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from imbvlm import __version__
from imbvlm.errors import LINE_BREAKS, ImbvlmError, printable

if TYPE_CHECKING:
    from imbvlm.inference import Prediction
    from imbvlm.sweep.spec import SweepSpec

SWEEP_ACTIONS = ("run", "resume", "list", "show")
Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 1 for a failure (a sentence on stderr), 2 for wrong usage, 130, or 143."""
    with interrupts.handled() as signals:
        try:
            code = signals.outlast(lambda: _run(sys.argv[1:] if arguments is None else arguments))
        except ImbvlmError as error:
            _say_on_stderr(str(error))
            code = 1
        except BrokenPipeError:
            code = 1
        if code is None:
            signals.end()
            print(f"\nimbvlm: {signals.sentence}", file=sys.stderr)
            code = signals.exit_code
        sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(_with_sweep_action(arguments))
    # What Pillow finds odd in an image that it reads all the same isn't for the user, least of all with its own lines.
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


def _parser() -> argparse.ArgumentParser:
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
    _add_sweep(commands)
    _add_plan(commands)
    _add_compare(commands)
    _add_report(commands)
    _add_export(commands)
    _add_predict(commands)
    _add_check_cluster(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=what,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# ------------------------------------------------------------------------------------------------------ doctor


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands, "doctor", "What a sweep will find on this machine, and the mend for what is missing.",
        "imbvlm doctor s3://my-bucket/sweeps --encoder openai_vit_b16",
    )  # fmt: skip
    parser.add_argument(
        "storage", nargs="*", default=["runs"], help="folders and s3:// URIs for sweeps (default: runs)"
    )
    parser.add_argument(
        "--encoder", action="append", metavar="NAME", help="a tower whose weights are wanted (default: tinylit_lite0)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from imbvlm.doctor import describe, examine, to_dicts

    checks = examine(options.storage, options.encoder or ["tinylit_lite0"])
    print(json.dumps(to_dicts(checks), indent=1) if options.json else describe(checks))
    return int(any(check.state == "broken" for check in checks))


# ---------------------------------------------------------------------------------------------------- manifest


def _add_manifest(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    # Fetched here: importing the data side costs half a second that the other commands need not pay.
    from imbvlm.data import commands as manifest

    parser = _command(
        commands, "manifest", "Make, show and check the list of your images.",
        "imbvlm manifest build --folders photos/ -o photos.parquet",
    )  # fmt: skip
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, what, example, add, run in (
        ("build", "Turn folders, lists, tables, shards or a benchmark into a manifest.",
         "imbvlm manifest build --folders photos/ -o photos.parquet", manifest.add_build_arguments, manifest.build),
        ("show", "Classes, counts, shot groups and splits of a manifest.",
         "imbvlm manifest show photos.parquet", manifest.add_show_arguments, manifest.show),
        ("check", "Everything that is wrong or odd in a manifest, and a verdict.",
         "imbvlm manifest check photos.parquet --decode", manifest.add_check_arguments, _check_manifest),
    ):  # fmt: skip
        action = _command(actions, name, what, example)
        add(action)
        action.set_defaults(command=run)


def _check_manifest(options: argparse.Namespace) -> int:
    from imbvlm.data.commands import check

    def truncated(names: Sequence[str]) -> Sequence[str]:
        # Fetched here: importing a tower's side costs seconds.
        from imbvlm.config import EncoderConfig
        from imbvlm.models.encoder import TextSide
        from imbvlm.models.prompts import truncated_names
        from imbvlm.models.towers import find_tower

        return truncated_names(TextSide(find_tower(EncoderConfig(name=options.encoder))), names, ["{}"])

    return check(options, truncated)


# ---------------------------------------------------------------------------------------------------- features


# Another image size or crop is another input of the encoder, whose outputs a sweep can't read.
READ_BY = (
    "A sweep reads these outputs where its encoder, encoder.image_size, eval.resize and features are the same, and "
    "computes others itself; sweeps/quickstart.py and a small sweeps/paper.py need --encoder tinylit_lite0 "
    "--image-size 96 --set eval.resize=1.0"
)


def _add_features(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands, "features", "Compute and check the stored outputs of towers.",
        "imbvlm features extract photos.parquet --encoder openai_vit_b16 --dry-run",
    )  # fmt: skip
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = _command(
        actions, "extract", "Run a tower over a manifest's images and keep its outputs, for sweeps to come.",
        "imbvlm features extract photos.parquet --encoder openai_vit_b16 --set features.num_views=4",
    )  # fmt: skip
    action.description = f"{action.description} {READ_BY}."
    action.add_argument("manifest", help="path or s3:// URI of a manifest, or embedded:NAME")
    action.add_argument("--encoder", required=True, metavar="NAME", help="a tower's name")
    action.add_argument("--image-size", type=int, metavar="PIXELS", help="side of its input (default: the tower's own)")
    action.add_argument(
        "--output", action="append", choices=("tokens", "pooled", "image_embedding"),
        help="what to keep, may be given again (default: pooled and image_embedding; a decoder reads tokens)",
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
    action = _command(
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
    from imbvlm import storage
    from imbvlm.config import TrialConfig
    from imbvlm.data.manifest import Manifest
    from imbvlm.features.commands import extract
    from imbvlm.models.encoder import describe_encoder
    from imbvlm.sweep.command import parse_settings
    from imbvlm.sweep.console import Console

    tree = {
        "data": {"manifest": options.manifest},
        "encoder": {"name": options.encoder, "image_size": options.image_size},
        "method": "zero_shot",
    }
    config = TrialConfig.from_tree(tree).with_overrides(parse_settings(options.set), "--set")
    console, outputs = Console(), frozenset(options.output or ("pooled", "image_embedding"))
    # The log makes a folder, so mistakes are found first.
    manifest = Manifest.read(config.data.manifest)
    describe_encoder(config.encoder)
    is_local = storage.is_local(options.storage) and not options.dry_run
    with console.others_to(storage.local_path(options.storage) / "features.log" if is_local else None):
        report = (lambda text: None) if options.json else console.live
        root = storage.join(options.storage, "features")
        found = extract(config, manifest, root, outputs, report=report, dry_run=options.dry_run)
        console.end_live()
    print(json.dumps(found.to_dict(), indent=1) if options.json else f"{found.describe()}\n{READ_BY}")
    return 0


def _check_features(options: argparse.Namespace) -> int:
    from imbvlm.features.commands import check

    return check(options.folders)


# ------------------------------------------------------------------------------------------------------ train


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
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
    from imbvlm.config import TrialConfig
    from imbvlm.sweep.command import parse_settings
    from imbvlm.sweep.single import train_one

    config = TrialConfig.from_yaml(options.config).with_overrides(parse_settings(options.set), "--set")
    metrics = train_one(config, options.storage, options.out, quiet=options.json)
    if options.json:
        print(json.dumps(metrics, indent=1))
    return 0


# ------------------------------------------------------------------------------------------------------ sweep


def _add_sweep(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from imbvlm.sweep.command import add_arguments, positive

    parser = _command(
        commands, "sweep", "Run sweeps, go on with them, list and show them; `sweep FILE` is `sweep run FILE`.",
        "imbvlm sweep run my-sweep.yaml --dry-run",
    )  # fmt: skip
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    run = _command(actions, "run", "Run a sweep from its YAML.", "imbvlm sweep run my-sweep.yaml --smoke")
    run.add_argument("spec", help="a SweepSpec as YAML, such as the sweep.yaml of an earlier sweep")
    add_arguments(run)
    run.set_defaults(command=_sweep_run)
    resume = _command(
        actions, "resume", "Go on with a sweep; no trial is run twice.", "imbvlm sweep resume runs/inat-20261124-120000"
    )
    resume.add_argument("sweep", help="a sweep's folder")
    resume.add_argument("--add-trials", type=positive, default=0, metavar="N", help="so many trials more than before")
    resume.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a limit to raise, such as max_hours=8"
    )
    resume.set_defaults(command=_sweep_resume)
    listing = _command(actions, "list", "The sweeps in a storage folder.", "imbvlm sweep list runs --json")
    listing.add_argument("storage", nargs="?", default="runs", help="folder or s3:// URI (default: runs)")
    listing.set_defaults(command=_sweep_list)
    show = _command(actions, "show", "A sweep's tables by now.", "imbvlm sweep show runs/inat-20261124-120000")
    show.add_argument("sweep", help="a sweep's folder")
    show.set_defaults(command=_sweep_show)
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="print JSON, accuracies as fractions")


def _with_sweep_action(arguments: Sequence[str]) -> list[str]:
    """`sweep FILE` as `sweep run FILE`."""
    given = list(arguments)
    if given[:1] == ["sweep"] and len(given) > 1 and given[1] not in (*SWEEP_ACTIONS, "-h", "--help"):
        return ["sweep", "run", *given[1:]]
    return given


def _sweep_run(options: argparse.Namespace) -> int:
    from imbvlm.sweep.command import run_command

    return run_command(_spec(options.spec, "" if not options.dry_run else " --dry-run"), options)


def _spec(path: str, more: str) -> SweepSpec:
    """A sweep's YAML; raises ImbvlmError for a script, which runs itself."""
    from imbvlm.sweep.spec import SweepSpec

    if path.endswith(".py"):
        raise ImbvlmError(f"{path} is a script and no sweep's YAML; run: python {path}{more}")
    return SweepSpec.from_yaml(path)


def _sweep_resume(options: argparse.Namespace) -> int:
    from imbvlm.sweep.command import resume_command

    return resume_command(options.sweep, options.set, options.add_trials)


def _sweep_list(options: argparse.Namespace) -> int:
    from imbvlm.sweep.listing import list_text, sweeps_under

    states, unreadable = sweeps_under(options.storage)
    if options.json:
        print(json.dumps([*(one.to_dict() for one in states), *(one.to_dict() for one in unreadable)], indent=1))
    elif states or unreadable:
        print(printable(list_text(states, unreadable), keep=LINE_BREAKS))
    else:
        print(f"no sweep under {options.storage}")
    return 0


def _sweep_show(options: argparse.Namespace) -> int:
    from imbvlm.sweep.listing import SweepState, show_text

    state = SweepState.read(options.sweep)
    print(json.dumps(state.to_dict(), indent=1) if options.json else printable(show_text(state), keep=LINE_BREAKS))
    return 0


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from imbvlm.sweep.command import add_measure_argument, add_setting_arguments

    parser = _command(
        commands, "plan", "What a sweep would do, read, take and cost; starts and writes nothing of it.",
        "imbvlm plan my-sweep.yaml --price 2.5 --json",
    )  # fmt: skip
    parser.add_argument("spec", help="a SweepSpec as YAML, such as the sweep.yaml of an earlier sweep")
    add_setting_arguments(parser)
    add_measure_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> int:
    from imbvlm.sweep.command import print_plan, with_options

    spec = with_options(_spec(options.spec, " --dry-run"), options)
    return print_plan(spec, options.measure, as_json=options.json, num_gpus=options.gpus)


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "compare", "Several sweeps side by side.", "imbvlm compare runs/inat-20261124-* --json")
    parser.add_argument("sweeps", nargs="+", metavar="SWEEP", help="sweeps' folders")
    parser.add_argument("--json", action="store_true", help="print JSON, accuracies as fractions")
    parser.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    from imbvlm.sweep.listing import SweepState, compare_text

    states = [SweepState.read(folder) for folder in options.sweeps]
    print(json.dumps([state.to_dict() for state in states], indent=1) if options.json else compare_text(states))
    return 0


# ----------------------------------------------------------------------------------------------------- report


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "report",
        "Write a sweep's report, one page that needs no network.",
        "imbvlm report runs/quickstart-20261124-120000 -o report-files",
    )
    parser.add_argument("sweep", help="a sweep's folder or s3:// URI, also while it runs")
    parser.add_argument(
        "-o",
        "--out",
        help="a page (.html; default: report.html in the sweep's folder), or a folder: beside the page go "
        "figures as SVG and PNG, their numbers as CSV, tables as CSV and LaTeX",
    )
    parser.add_argument("--manifest", help="where the sweep's manifest is, if it was moved; for images on the page")
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from imbvlm.sweep.report.write import write_report

    print(write_report(options.sweep, options.out, options.manifest, _say_on_stderr))
    return 0


# ----------------------------------------------------------------------------------------------------- export


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from imbvlm.sweep.command import positive

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
    from imbvlm.sweep.export import export_sweep

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


# ---------------------------------------------------------------------------------------------------- predict


def _add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from imbvlm.sweep.command import positive

    parser = _command(
        commands,
        "predict",
        "Classify images with an exported model.",
        "imbvlm predict my-model photos/ --top 3 -o predictions.csv\n"
        "  imbvlm predict s3://my-bucket/my-model s3://my-bucket/photos -o s3://my-bucket/predictions.parquet",
    )
    parser.add_argument("model", help="what `imbvlm export` wrote, a folder or s3:// URI")
    parser.add_argument("images", nargs="+", help="files, folders, manifests (.parquet) or s3:// prefixes")
    parser.add_argument("--split", choices=("train", "val", "test"), help="of manifests; all rows without it")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="classes per image (default: 5)")
    parser.add_argument("-o", "--out", help="a .csv, .parquet or .jsonl to write (also s3://) instead of printing")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument(
        "--ray",
        action=argparse.BooleanOptionalAction,
        help="classify on every GPU or CPU of the cluster through Ray Data (default: from 5,000 images on)",
    )
    parser.set_defaults(command=_predict)


def _predict(options: argparse.Namespace) -> int:
    from imbvlm import prediction_table as table
    from imbvlm import storage
    from imbvlm.data.table import count_of

    storage.check_location(options.model)
    if options.out:
        table.check_out(options.out)
    images = table.find_images(options.images, options.split)
    ray = options.ray if options.ray is not None else len(images) >= table.RAY_FROM
    top, bad = table.limited_top(options.model, options.top), 0

    def counted() -> Iterator[Prediction]:
        nonlocal bad
        for one in table.predictions(options.model, images, top, ray=ray, waits=_say_on_stderr):
            bad += one.error is not None
            yield one

    if options.out:
        table.write_predictions(counted(), options.out, top)
        print(f"{count_of(len(images), 'row')} written to {options.out}")
    else:
        write = table.write_json_lines if options.json else table.write_lines
        write(counted(), sys.stdout, top)
        sys.stdout.flush()
    if bad:
        where = "; the column error says why" if options.out else ""
        _say_on_stderr(f"{bad:,} of {count_of(len(images), 'image')} could not be read{where}")
    return 1 if bad == len(images) else 0


def _say_on_stderr(text: str) -> None:
    print(f"imbvlm: {printable(text, keep=LINE_BREAKS)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- check-cluster


def _add_check_cluster(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "check-cluster",
        "Check a cluster's file before anything is started or paid for.",
        "imbvlm check-cluster cluster/gpu.yaml && ray up cluster/gpu.yaml",
    )
    parser.add_argument("file", help="such as cluster/gpu.yaml or cluster/kuberay.yaml")
    parser.set_defaults(command=_check_cluster)


def _check_cluster(options: argparse.Namespace) -> int:
    from imbvlm.cluster_file import check_cluster_file

    check_cluster_file(options.file)
    print(f"{options.file}: nothing is missing")
    return 0
