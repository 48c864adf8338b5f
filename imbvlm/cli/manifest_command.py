"""`imbvlm manifest build`, `show` and `check`: options and output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import join_limited, pluralize
from imbvlm.data.duplicate_files import mark_duplicates
from imbvlm.data.files.file_listing import list_tree, printable_path
from imbvlm.data.imbalance import SHAPES, make_imbalanced
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_check import check_manifest
from imbvlm.data.manifest_schema import SPLITS
from imbvlm.data.manifest_summary import plot_svg, summary, summary_dict
from imbvlm.data.sources.benchmark_registry import BENCHMARKS, build_dataset
from imbvlm.data.sources.folders_and_lists import from_folders, from_lists
from imbvlm.data.sources.inaturalist import NAMES, RANKS, from_inaturalist
from imbvlm.data.sources.manifest_builder import read_class_names
from imbvlm.data.sources.table_files import from_table
from imbvlm.data.sources.webdataset import from_shards
from imbvlm.data.splits import hold_out_test_split

_TABLE_SUFFIXES = frozenset((".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"))


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `manifest build`: one source, then names, imbalance and output."""
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--dataset", choices=sorted(BENCHMARKS), help="a benchmark by name, its official files in --root")
    source("--folders", metavar="DIR", help="a folder per class, or train, val and test folders of them")
    source("--list", nargs="+", metavar="SPLIT=FILE", help="`path label` lists, such as train=train.txt")
    source("--table", nargs="+", metavar="FILE", help="CSV, TSV, JSON lines or Parquet files, or a folder of them")
    source("--inaturalist", nargs="+", metavar="SPLIT=FILE", help="iNaturalist's annotation JSON")
    source("--webdataset", nargs="+", metavar="TAR", help="tar shards, or a folder of them")
    option = parser.add_argument
    option("--root", default="", help="folder or s3:// prefix that relative image paths are below")
    option("--name", help="name of the data (default: the source's)")
    option("--class-names", metavar="FILE", help="one name a line, in the order of the class ids")
    option("--column", action="append", default=[], metavar="WHAT=NAME", help="a table's uri, label, split or bytes")
    option("--categories", metavar="FILE", help="iNaturalist's categories.json, with names and ranks")
    option("--rank", choices=RANKS, default="species", help="what iNaturalist's classes are")
    option("--names", choices=NAMES, default="scientific", help="iNaturalist's scientific or common names")
    option("--test-share", type=float, help="hold out this share of each class as the test split")
    option("--imbalance-factor", type=float, help="make balanced data long-tailed: largest class over smallest")
    option("--tail-shape", choices=SHAPES, help="how counts fall (default: exponential)")
    option("--class-order", metavar="FILE", help="class names from head to tail (default: random by --seed)")
    option("--seed", type=int, default=0, help="seed of the held-out rows, and of the tail's order and rows")
    option("-o", "--output", required=True, metavar="FILE", help="the manifest: a .parquet path or s3:// URI")


def build(options: argparse.Namespace) -> int:
    """Build a manifest, write it, print its summary; raises ImbvlmError."""
    storage.check_location(options.output)
    if options.imbalance_factor is None:
        given = [name for name in ("class_order", "tail_shape") if getattr(options, name) is not None]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise ImbvlmError(f"{option} needs --imbalance-factor, which makes a tail. Add one, or leave {option} out.")
    manifest = _source(options)
    if options.test_share is not None or "val" not in manifest.splits:
        # Test and validation rows are sampled from training images, and duplicates must stay in one split.
        manifest = mark_duplicates(manifest)
    if options.test_share is not None:
        manifest = hold_out_test_split(manifest, options.test_share, seed=options.seed)
    if options.imbalance_factor is not None:
        order = read_class_names(options.class_order) if options.class_order else None
        manifest = make_imbalanced(
            manifest,
            options.imbalance_factor,
            shape=options.tail_shape or SHAPES[0],
            class_order=order,
            seed=options.seed,
        )
    manifest.write(options.output)
    print(summary(manifest))
    print(f"\nwritten to {options.output}; look for mistakes with: imbvlm manifest check {options.output}")
    return 0


def _source(options: argparse.Namespace) -> Manifest:
    names = read_class_names(options.class_names) if options.class_names else None
    if options.dataset:
        return build_dataset(options.dataset, options.root)
    if options.folders:
        return from_folders(options.folders, options.name or _stem(options.folders), class_names=names)
    if options.list:
        lists = _by_split(options.list, "--list")
        return from_lists(lists, options.root, options.name or _stem(next(iter(lists.values()))), class_names=names)
    if options.table:
        tables = _files(options.table, _TABLE_SUFFIXES)
        columns = _pairs(options.column, "--column", ("uri", "label", "split", "bytes"))
        prefix = options.output.removesuffix(".parquet") + ".images"
        root = options.root or tables[0].rpartition("/")[0]
        name = options.name or _stem(options.table[0])
        return from_table(tables, root, name, columns=columns, class_names=names, pack_prefix=prefix)
    if options.inaturalist:
        return from_inaturalist(
            _by_split(options.inaturalist, "--inaturalist"),
            options.root,
            options.name or "inaturalist",
            categories=options.categories,
            rank=options.rank,
            names=options.names,
        )
    shards = _files(options.webdataset, frozenset((".tar",)))
    return from_shards(shards, options.name or _stem(options.webdataset[0]), class_names=names)


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `manifest show`."""
    parser.add_argument("manifest", help="path or s3:// URI of a manifest, or embedded:NAME")
    parser.add_argument("--split-seed", type=int, default=0, help="seed of the validation rows that are held out")
    parser.add_argument("--plot", metavar="FILE", help="write the curve of counts as SVG")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def show(options: argparse.Namespace) -> int:
    """Print a manifest's summary and write the plot of its counts."""
    storage.check_location(options.plot or "")
    manifest = Manifest.read(options.manifest)
    if options.json:
        print(json.dumps(summary_dict(manifest), indent=1))
    else:
        print(summary(manifest, split_seed=options.split_seed))
    if options.plot:
        storage.write_bytes(options.plot, plot_svg(manifest.class_stats().counts, manifest.name).encode())
        if not options.json:
            print(f"\nplot written to {options.plot}")
    return 0


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `manifest check`."""
    parser.add_argument("manifest", help="path or s3:// URI of a manifest, or embedded:NAME")
    parser.add_argument("--decode", action="store_true", help="read and decode every image")
    parser.add_argument("-o", "--output", metavar="FILE", help="write every finding with all of its rows as CSV")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument(
        "--encoder",
        default="openai_vit_b16",
        metavar="NAME",
        help="encoder whose text tower must hold the class names (default: openai_vit_b16, as most of them)",
    )
    parser.add_argument("--split-seed", type=int, default=0, help="seed of the validation rows that are held out")


def check(options: argparse.Namespace, truncated: Callable[[Sequence[str]], Sequence[str]] | None = None) -> int:
    """Print errors, oddities and a verdict; returns 1 if there is an error."""
    storage.check_location(options.output or "")
    report = check_manifest(
        Manifest.read(options.manifest), decode_all=options.decode, split_seed=options.split_seed, truncated=truncated
    )
    print(json.dumps(report.to_dict(), indent=1) if options.json else report)
    if options.output:
        storage.write_bytes(options.output, report.to_csv().encode("utf-8", "surrogateescape"))
        if not options.json:
            print(f"all of them by name in {options.output}")
    return 0 if report.ok else 1


def _stem(path: str) -> str:
    return PurePosixPath(path.rstrip("/")).stem


def _by_split(values: Sequence[str], option: str) -> dict[str, str]:
    return _pairs(values, option, SPLITS)


def _pairs(values: Sequence[str], option: str, keys: Sequence[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    wrong = [value for value, (key, _, name) in zip(values, pairs, strict=True) if key not in keys or not name]
    if wrong:
        raise ImbvlmError(f"{option} takes {' or '.join(f'{key}=...' for key in keys)}, got {wrong[0]!r}.")
    return {key: name for key, _, name in pairs}


def _files(locations: Sequence[str], suffixes: frozenset[str]) -> list[str]:
    """The given files, and the files of given folders by suffix."""
    paths = []
    for location in locations:
        if PurePosixPath(location).suffix.lower() in suffixes:
            paths.append(location)
        else:
            files = [file for file in list_tree(location) if PurePosixPath(file.path).suffix.lower() in suffixes]
            if not files:
                raise ImbvlmError(f"{location} has no {', '.join(sorted(suffixes))} file")
            broken = [printable_path(file.path) for file in files if file.num_bytes < 0]
            if broken:
                problem = f"{pluralize(len(broken), 'name')} that can't be read, each a broken link, a pipe or a device"
                raise ImbvlmError(f"{location} has {problem}: {join_limited(broken)}. Remove or repair them.")
            paths += [storage.join(location, file.path) for file in files]
    return paths
