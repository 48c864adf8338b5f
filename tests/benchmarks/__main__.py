"""What this project's speed is measured by: both sides in one run, one table.

    python -m tests.benchmarks [--all | --only SECTION ...] [--large] [--device cpu|cuda]

The sizes fit two quiet cores in a quarter of an hour, with --all in three quarters of an hour; --large takes those of a
server. RESULTS.md beside this file has what was measured, and when.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]
# Ray's workers unpickle functions of these files.
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

from table import HEADING, Options  # noqa: E402

# Each is a file beside this one with a function `lines`. What a sweep costs, in the order in which it runs:
TABLE = ("extraction", "epoch", "overhead", "packs", "growth", "store", "tokens", "search", "sweep")
# And what its defaults rest on:
MORE = (
    "strata",
    "attention",
    "choice",
    "quality",
    "beside",
    "demonstration",
    "precision",
    "views",
    "starts",
    "images",
    "centering",
    "labels",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.split("\n\n")[0])
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--all", action="store_true", help=f"also {', '.join(MORE)}")
    chosen.add_argument("--only", nargs="+", choices=TABLE + MORE, metavar="SECTION",
                        help=", ".join(TABLE + MORE))  # fmt: skip
    parser.add_argument("--large", action="store_true", help="sizes of a server")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=int, metavar="N", help="training images of the section sweep")
    parser.add_argument("--script-trials", type=int, default=2, metavar="N", choices=range(2, 17, 2),
                        help="how many of the 16 trials of a Ray Tune script are run (the section sweep)")  # fmt: skip
    parser.add_argument("--features", type=Path, metavar="FOLDER",
                        help="where choice and labels keep the encoder's outputs for the next time")  # fmt: skip
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(HEADING)
    missed = 0
    for name in arguments.only or (TABLE + MORE if arguments.all else TABLE):
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="imbvlm-bench-") as folder:
            options = Options(
                arguments.device,
                arguments.large,
                Path(folder),
                arguments.images,
                arguments.script_trials,
                arguments.features,
            )
            for line in importlib.import_module(name).lines(options):
                print(line.text(), flush=True)
                missed += line.holds is False
        print(f"-- {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
