"""`imbvlm predict`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from imbvlm.cli.options import print_to_stderr

if TYPE_CHECKING:
    from imbvlm.inference.predictor import Prediction


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="an exported model: folder or s3:// URI")],
    locations: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="files, folders, manifests (.parquet) or s3:// prefixes")
    ],
    split: Annotated[
        Literal["train", "val", "test"] | None, typer.Option(help="a split of manifests; by default all images")
    ] = None,
    top: Annotated[
        int, typer.Option(metavar="N", min=1, help="number of classes for each image, the most probable first")
    ] = 5,
    only: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="text file of the possible classes, one a line, such as a region's species"),
    ] = None,
    roll_up: Annotated[
        float | None,
        typer.Option(
            metavar="PRECISION",
            help="also name the lowest rank of the taxonomy at which this share of names is right, such as 0.95",
        ),
    ] = None,
    accept: Annotated[
        float | None,
        typer.Option(
            metavar="PRECISION",
            help="add a decision: `accept` where so large a share of a class's predictions is right, else `review`",
        ),
    ] = None,
    sets: Annotated[
        float | None,
        typer.Option(
            metavar="COVERAGE", help="add the set of classes among which so large a share of images has its own"
        ),
    ] = None,
    prevalence: Annotated[
        str | None,
        typer.Option(
            metavar="training|even|FILE",
            help="how classes come in the images, for --accept and --sets: as in training, evenly, or by a CSV file of "
            "class and share; by default as in validation",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="a .csv, .parquet or .jsonl to write (also s3://) instead of printing"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per line")] = False,
    ray: Annotated[
        bool | None,
        typer.Option(
            "--ray/--no-ray",
            help="classify on every GPU or CPU of the cluster through Ray Data; by default from 5,000 images on",
        ),
    ] = None,
) -> int:
    """Classify images with an exported model."""
    from imbvlm.base import storage
    from imbvlm.base.formatting import pluralize
    from imbvlm.inference.batch_prediction import (
        MIN_RAY_IMAGES,
        PredictionOptions,
        check_options,
        find_images,
        predictions,
    )
    from imbvlm.inference.calibration_file import read_prevalence
    from imbvlm.inference.possible_classes import read_possible
    from imbvlm.inference.prediction_files import check_out, write_json_lines, write_lines, write_predictions

    storage.check_location(model)
    if out:
        check_out(out)
    possible = read_possible(only) if only is not None else ()
    shares = read_prevalence(prevalence) if prevalence is not None else None
    options = PredictionOptions(possible, roll_up, accept, sets, shares)
    images = find_images(locations, split)
    use_ray = ray if ray is not None else len(images) >= MIN_RAY_IMAGES
    (num_top, notes), num_bad = check_options(model, top, options), 0
    for note in notes:
        print_to_stderr(note)

    def counted() -> Iterator[Prediction]:
        nonlocal num_bad
        for prediction in predictions(model, images, num_top, use_ray=use_ray, notify=print_to_stderr, options=options):
            num_bad += prediction.error is not None
            yield prediction

    if out:
        write_predictions(counted(), out, num_top, options.columns)
        print(f"{pluralize(len(images), 'row')} written to {out}")
    else:
        write = write_json_lines if as_json else write_lines
        write(counted(), sys.stdout, num_top, options.columns)
        sys.stdout.flush()
    if num_bad:
        where = "; the column error says why" if out else ""
        print_to_stderr(f"{num_bad:,} of {pluralize(len(images), 'image')} could not be read{where}")
    return int(num_bad == len(images))
