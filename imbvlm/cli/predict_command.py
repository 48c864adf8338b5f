"""`imbvlm predict`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from imbvlm.cli.options import add_command, positive, print_to_stderr

if TYPE_CHECKING:
    from imbvlm.inference.predictor import Prediction


def add_predict_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "predict",
        "Classify images with an exported model.",
        "imbvlm predict my-model photos/ --top 3 -o predictions.csv\n"
        "  imbvlm predict s3://my-bucket/my-model s3://my-bucket/photos -o s3://my-bucket/predictions.parquet",
    )
    parser.add_argument("model", help="an exported model: folder or s3:// URI")
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
    from imbvlm.base import storage
    from imbvlm.base.formatting import pluralize
    from imbvlm.inference.batch_prediction import MIN_RAY_IMAGES, find_images, limited_top, predictions
    from imbvlm.inference.prediction_files import check_out, write_json_lines, write_lines, write_predictions

    storage.check_location(options.model)
    if options.out:
        check_out(options.out)
    images = find_images(options.images, options.split)
    use_ray = options.ray if options.ray is not None else len(images) >= MIN_RAY_IMAGES
    top, num_bad = limited_top(options.model, options.top), 0

    def counted() -> Iterator[Prediction]:
        nonlocal num_bad
        for prediction in predictions(options.model, images, top, use_ray=use_ray, notify=print_to_stderr):
            num_bad += prediction.error is not None
            yield prediction

    if options.out:
        write_predictions(counted(), options.out, top)
        print(f"{pluralize(len(images), 'row')} written to {options.out}")
    else:
        write = write_json_lines if options.json else write_lines
        write(counted(), sys.stdout, top)
        sys.stdout.flush()
    if num_bad:
        where = "; the column error says why" if options.out else ""
        print_to_stderr(f"{num_bad:,} of {pluralize(len(images), 'image')} could not be read{where}")
    return int(num_bad == len(images))
