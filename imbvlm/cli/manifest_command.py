"""`imbvlm manifest build`, `show` and `check`: options and output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from imbvlm.base.errors import ImbvlmError, suggest_name
from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.cli.options import Json, ManifestPath
from imbvlm.data.sources.benchmark_registry import BENCHMARKS

if TYPE_CHECKING:
    from imbvlm.data.manifest import Manifest
    from imbvlm.inference.near_duplicates import NearDuplicates

# Names of RANKS, NAMES and SHAPES, which a test compares: importing those costs half a second.
Rank = Literal["species", "genus", "family", "order", "class", "phylum", "kingdom", "supercategory"]
Names = Literal["scientific", "common"]
TailShape = Literal["exponential", "pareto"]
SplitSeed = Annotated[
    int, typer.Option(metavar="SEED", help="seed of the images held out for validation where there is no such split")
]

_TABLE_SUFFIXES = frozenset((".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"))
ONE_SOURCE = "Exactly one of --dataset, --folders, --list, --table, --inaturalist and --webdataset is needed"
_source, _reading, _splits = (
    partial(typer.Option, rich_help_panel=title)
    for title in ("Source (one of these)", "Names and columns", "Splits and imbalance")
)


def build(
    ctx: typer.Context,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="the manifest: a .parquet path or s3:// URI")
    ],
    dataset: Annotated[
        str | None,
        _source(
            metavar="NAME",
            help=f"a benchmark, its official files below --root: {', '.join(BENCHMARKS)}, or a plug-in's",
            autocompletion=lambda: list(BENCHMARKS),
        ),
    ] = None,
    folders: Annotated[
        str | None, _source(metavar="FOLDER", help="a folder per class, or train, val and test folders of them")
    ] = None,
    lists: Annotated[
        list[str] | None,
        _source(
            "--list",
            metavar="SPLIT=FILE",
            help="text files of lines `path label`, one or more, such as train=train.txt test=test.txt",
        ),
    ] = None,
    table: Annotated[
        list[str] | None,
        _source(
            metavar="FILE", help="CSV, TSV, JSON lines or Parquet files, manifests among them, or a folder of them"
        ),
    ] = None,
    inaturalist: Annotated[
        list[str] | None, _source(metavar="SPLIT=FILE", help="iNaturalist's annotation JSON, one or more")
    ] = None,
    webdataset: Annotated[
        list[str] | None,
        _source(metavar="TAR", help="WebDataset's tar files of images and labels, one or more, or a folder of them"),
    ] = None,
    root: Annotated[
        str, typer.Option(metavar="FOLDER", help="folder or s3:// prefix that relative image paths are below")
    ] = "",
    name: Annotated[str | None, _reading(metavar="NAME", help="name of the data; by default the source's")] = None,
    class_names: Annotated[
        str | None, _reading(metavar="FILE", help="one name a line, in the order of the class ids")
    ] = None,
    column: Annotated[
        list[str] | None,
        _reading(
            metavar="KEY=NAME",
            help="the table's column that has uri, label, split or bytes, such as label=species; repeatable",
        ),
    ] = None,
    categories: Annotated[
        str | None, _reading(metavar="FILE", help="iNaturalist's categories.json, with names and ranks")
    ] = None,
    taxonomy: Annotated[
        str | None,
        _reading(
            metavar="TREE",
            help="the tree over the classes: a CSV of each class and its ancestors, or columns of the table from the "
            "highest rank on, such as family,genus,species",
        ),
    ] = None,
    rank: Annotated[
        Rank, _reading(metavar="RANK", help=f"rank of iNaturalist's classes: {', '.join(get_args(Rank))}")
    ] = "species",
    names: Annotated[Names, _reading(help="which names iNaturalist's classes get")] = "scientific",
    group_by: Annotated[
        str | None,
        _splits(
            metavar="COLUMN",
            help="column of --table, or field of --inaturalist's images, with the group of each image, such as its "
            "camera; no split divides a group",
        ),
    ] = None,
    group_from: Annotated[
        str | None,
        _splits(
            metavar="REGEX",
            help="the group of each image from its path: a regular expression with the group in parentheses, such as "
            "'(cam[0-9]+)/'; or from the image itself: exif:serial or exif:day",
        ),
    ] = None,
    test_share: Annotated[
        float | None,
        _splits(metavar="SHARE", help="hold out this share of each class as the test split, in whole groups if any"),
    ] = None,
    test_groups: Annotated[
        list[str] | None,
        _splits(
            metavar="GROUP",
            help="make these groups the test split, one or more; test images of other groups join training",
        ),
    ] = None,
    imbalance_factor: Annotated[
        float | None,
        _splits(
            metavar="FACTOR",
            help="make balanced data long-tailed: images of the largest class divided by those of the smallest",
        ),
    ] = None,
    tail_shape: Annotated[
        TailShape | None,
        _splits(
            metavar="SHAPE",
            help="how counts fall from the largest class to the smallest: exponential (the default) or pareto",
        ),
    ] = None,
    class_order: Annotated[
        str | None, _splits(metavar="FILE", help="class names from head to tail; by default random by --seed")
    ] = None,
    seed: Annotated[
        int, _splits(metavar="SEED", help="seed of the held-out images, and of the tail's order and images")
    ] = 0,
    update: Annotated[
        str | None,
        _splits(
            metavar="MANIFEST",
            help="the manifest of the same data before it has grown: its images keep their splits and classes their "
            "numbers, --test-share is of the added images, and what is added, gone or changed is named",
        ),
    ] = None,
) -> int:
    """Turn folders, lists, tables, shards or a benchmark into a manifest."""
    from imbvlm.base import storage
    from imbvlm.data.duplicate_files import mark_duplicates
    from imbvlm.data.imbalance import make_imbalanced
    from imbvlm.data.manifest import Manifest, manifest_location
    from imbvlm.data.manifest_schema import SPLITS
    from imbvlm.data.manifest_summary import summary
    from imbvlm.data.manifest_update import modification_time, update_manifest
    from imbvlm.data.sources.benchmarks import build_dataset
    from imbvlm.data.sources.folders_and_lists import from_folders, from_lists
    from imbvlm.data.sources.group_reader import with_groups, with_groups_from
    from imbvlm.data.sources.inaturalist import from_inaturalist
    from imbvlm.data.sources.manifest_builder import read_class_names
    from imbvlm.data.sources.table_files import from_table
    from imbvlm.data.sources.taxonomy_files import read_taxonomy
    from imbvlm.data.sources.webdataset import from_shards
    from imbvlm.data.splits import hold_out_test_groups, hold_out_test_split

    if sum(map(bool, (dataset, folders, lists, table, inaturalist, webdataset))) > 1:
        ctx.fail(ONE_SOURCE)
    if dataset is not None and dataset not in BENCHMARKS:
        raise typer.BadParameter(
            f"{dataset!r} is no benchmark; {suggest_name(dataset, BENCHMARKS)}", param_hint="--dataset"
        )
    storage.check_location(output)
    if update is not None and (imbalance_factor is not None or test_groups is not None):
        raise ImbvlmError(
            f"--update keeps the splits of {update}, and --imbalance-factor and --test-groups make new ones. Leave "
            "them out."
        )
    old = None if update is None else Manifest.read(update)
    written_ns = None if update is None else modification_time(manifest_location(update))
    _check_groups(group_by, group_from, test_share, test_groups, has_fields=bool(table or inaturalist))
    if imbalance_factor is None:
        for option, value in (("--class-order", class_order), ("--tail-shape", tail_shape)):
            if value is not None:
                raise ImbvlmError(
                    f"{option} needs --imbalance-factor, which makes a tail. Add one, or leave {option} out."
                )
    tree_file = taxonomy if taxonomy is not None and taxonomy.lower().endswith(".csv") else None
    if taxonomy is not None and tree_file is None and not (table and taxonomy):
        raise ImbvlmError(
            f"--taxonomy takes a .csv file, or columns of a --table, got {taxonomy!r}. Write the tree as a CSV file."
        )
    own_names = read_class_names(class_names) if class_names else None
    if dataset:
        manifest = build_dataset(dataset, root)
    elif folders:
        manifest = from_folders(folders, name or _stem(folders), class_names=own_names)
    elif lists:
        paths = _pairs(lists, "--list", SPLITS)
        manifest = from_lists(paths, root, name or _stem(next(iter(paths.values()))), class_names=own_names)
    elif table:
        tables = _files([manifest_location(source) for source in table], _TABLE_SUFFIXES)
        manifest = from_table(
            tables,
            root or tables[0].rpartition("/")[0],
            name or _stem(table[0]),
            columns={
                **_pairs(column or (), "--column", ("uri", "label", "split", "bytes")),
                **({"group": group_by} if group_by is not None else {}),
            },
            class_names=own_names,
            pack_prefix=output.removesuffix(".parquet") + ".images",
            taxonomy=_columns(taxonomy) if taxonomy and tree_file is None else (),
        )
    elif inaturalist:
        annotations = _pairs(inaturalist, "--inaturalist", SPLITS)
        manifest = from_inaturalist(
            annotations,
            root,
            name or "inaturalist",
            categories=categories,
            rank=rank,
            names=names,
            group_by=group_by,
        )
    elif webdataset:
        shards = _files(webdataset, frozenset((".tar",)))
        manifest = from_shards(shards, name or _stem(webdataset[0]), class_names=own_names)
    else:
        ctx.fail(ONE_SOURCE)
    if group_by is not None:
        manifest = with_groups(manifest, manifest.table.column("group").to_pylist(), f"--group-by {group_by}")
    if group_from is not None:
        below = folders or root or (tables[0].rpartition("/")[0] if table else "")
        manifest = with_groups_from(manifest, group_from, below)
    if test_share is not None or old is not None or "val" not in manifest.splits:
        # Test and validation rows are sampled from training images, and duplicates must stay in one split.
        manifest = mark_duplicates(manifest)
    differences = None
    if old is not None:
        differences = update_manifest(old, manifest, written_ns=written_ns, test_share=test_share, seed=seed)
        manifest = differences.manifest
    elif test_share is not None:
        manifest = hold_out_test_split(manifest, test_share, seed=seed)
    if test_groups is not None:
        manifest = hold_out_test_groups(manifest, test_groups)
    if imbalance_factor is not None:
        order = read_class_names(class_order) if class_order else None
        manifest = make_imbalanced(
            manifest, imbalance_factor, shape=tail_shape or "exponential", class_order=order, seed=seed
        )
    if tree_file is not None:
        manifest = replace(manifest, taxonomy=read_taxonomy(tree_file, manifest.class_names))
    manifest.write(output)
    print(summary(manifest))
    if differences is not None:
        print(f"\n{differences.describe()}")
    print(f"\nwritten to {output}; look for mistakes with: imbvlm manifest check {output}")
    return 0


def _check_groups(
    group_by: str | None,
    group_from: str | None,
    test_share: float | None,
    test_groups: list[str] | None,
    *,
    has_fields: bool,
) -> None:
    if group_by is not None and group_from is not None:
        raise ImbvlmError("Only one of --group-by and --group-from says what a group is. Leave one out.")
    if group_by is not None and not has_fields:
        raise ImbvlmError(
            f"--group-by must be a column of --table or a field of --inaturalist's images, got {group_by!r} without "
            "them. Use --group-from for a part of the path."
        )
    if test_groups is not None and group_by is None and group_from is None:
        raise ImbvlmError(
            f"--test-groups needs --group-by or --group-from, which say what a group is, got {test_groups[0]!r} alone. "
            "Add one of them."
        )
    if test_groups is not None and test_share is not None:
        raise ImbvlmError("Only one of --test-share and --test-groups says what the test split is. Leave one out.")


def show(
    manifest: ManifestPath,
    split_seed: SplitSeed = 0,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="write the curve of counts as SVG")] = None,
    as_json: Json = False,
) -> int:
    """Print a manifest's classes, counts, shot groups and splits."""
    from imbvlm.base import storage
    from imbvlm.data.manifest import Manifest
    from imbvlm.data.manifest_summary import summary, summary_dict

    storage.check_location(plot or "")
    images = Manifest.read(manifest)
    if as_json:
        print(json.dumps(summary_dict(images, split_seed=split_seed), indent=1))
    else:
        print(summary(images, split_seed=split_seed))
    if plot:
        # Imported here because it takes a second.
        from imbvlm.sweep.report.class_plots import class_sizes

        figure = class_sizes(images.class_stats().counts, images.name)
        storage.write_bytes(plot, figure.svg(alone=True).encode())
        if not as_json:
            print(f"\nplot written to {plot}")
    return 0


def check(
    manifest: ManifestPath,
    decode: Annotated[bool, typer.Option("--decode", help="read and decode every image")] = False,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="write every finding with all of its rows as CSV"),
    ] = None,
    as_json: Json = False,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="name near-duplicates by this encoder's features, and class names that are too long for its text "
            "tower; without one, those too long for openai_vit_b16",
        ),
    ] = None,
    features: Annotated[
        str, typer.Option(metavar="FOLDER", help="folder or s3:// URI for the features of --encoder")
    ] = "runs/features",
    write_groups: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="write the manifest with chains of near-duplicates as groups"),
    ] = None,
    split_seed: SplitSeed = 0,
) -> int:
    """Print a manifest's errors, oddities and a verdict. An error gives exit code 1."""
    from imbvlm.base import storage
    from imbvlm.data.manifest import Manifest
    from imbvlm.data.manifest_check import check_manifest

    def truncated(names: Sequence[str]) -> Sequence[str]:
        # Imported here, since the import costs seconds.
        from imbvlm.config.input_sections import EncoderConfig
        from imbvlm.models.encoders.encoder_registry import has_text, resolve_encoder
        from imbvlm.models.encoders.open_clip_text import OpenClipTokenizer
        from imbvlm.models.encoders.text_prompts import truncated_names

        config = EncoderConfig(name=encoder or "openai_vit_b16")
        return truncated_names(OpenClipTokenizer(resolve_encoder(config)), names, ["{}"]) if has_text(config) else ()

    storage.check_location(output or "")
    storage.check_location(write_groups or "")
    if write_groups and encoder is None:
        raise ImbvlmError("--write-groups needs --encoder, by whose features near-duplicates are found. Name one.")
    images = Manifest.read(manifest)
    report = check_manifest(images, decode_all=decode, split_seed=split_seed, truncated=truncated)
    if encoder is not None:
        duplicates = _near_duplicates(images, manifest, encoder, features, split_seed, is_quiet=as_json)
        report = report.with_findings(duplicates.findings(images))
        if write_groups:
            duplicates.grouped(images).write(write_groups)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    if output:
        storage.write_bytes(output, report.to_csv().encode("utf-8", "surrogateescape"))
        if not as_json:
            print(f"all of them by name in {output}")
    if write_groups and not as_json:
        print(f"the manifest with near-duplicates as groups is {write_groups}")
    return 0 if report.ok else 1


def _near_duplicates(
    manifest: Manifest, location: str, encoder: str, features: str, seed: int, *, is_quiet: bool
) -> NearDuplicates:
    # Imported here, since the import costs seconds.
    from imbvlm.base import storage
    from imbvlm.base.console import Console
    from imbvlm.inference.near_duplicates import find_near_duplicates

    storage.check_folder(features)
    console, log = Console(), None
    if storage.is_local(features):
        log = storage.local_path(features) / "near-duplicates.log"
    with console.redirect_output(log):
        return find_near_duplicates(
            manifest, location, encoder, features, seed=seed,
            report=lambda text: None if is_quiet else console.update_live(text),
        )  # fmt: skip


def _stem(path: str) -> str:
    return PurePosixPath(path.rstrip("/")).stem


def _pairs(values: Sequence[str], option: str, keys: Sequence[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    wrong = [value for value, (key, _, name) in zip(values, pairs, strict=True) if key not in keys or not name]
    if wrong:
        raise ImbvlmError(f"{option} must be {' or '.join(f'{key}=...' for key in keys)}, got {wrong[0]!r}.")
    return {key: name for key, _, name in pairs}


def _columns(names: str) -> list[str]:
    columns = [name.strip() for name in names.split(",")]
    if not all(columns):
        raise ImbvlmError(f"--taxonomy takes names of columns between commas, got {names!r}. Leave out empty ones.")
    return columns


def _files(locations: Sequence[str], suffixes: frozenset[str]) -> list[str]:
    """The given files, and the files of given folders by suffix."""
    from imbvlm.base import storage
    from imbvlm.data.files.file_listing import list_tree, printable_path

    paths = []
    for location in locations:
        if PurePosixPath(location).suffix.lower() in suffixes:
            paths.append(location)
        else:
            files = [file for file in list_tree(location) if PurePosixPath(file.path).suffix.lower() in suffixes]
            if not files:
                raise ImbvlmError(
                    f"{location} has no {', '.join(sorted(suffixes))} file. Name the files, or their folder."
                )
            broken = [printable_path(file.path) for file in files if file.num_bytes < 0]
            if broken:
                problem = f"{pluralize(len(broken), 'name')} that can't be read, each a broken link, a pipe or a device"
                raise ImbvlmError(f"{location} has {problem}: {join_limited(broken)}. Remove or repair them.")
            paths += [storage.join(location, file.path) for file in files]
    return paths
