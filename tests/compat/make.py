"""Make the sample files of version 0.1 that tests/test_compat.py reads: run once, with the code of commit 138099d.

    git worktree add ../v0.1 138099d
    PYTHONPATH=../v0.1 python tests/compat/make.py FOLDER
    tar -C FOLDER -cJf tests/compat/v0.1.tar.xz .

FOLDER holds two sweeps (a limit of trials has stopped the first, the second has `features.tail_views`), the first
sweep's features, and its exported model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

# The package is another commit's; the helpers are this one's.
sys.path[:0] = [
    str(Path(__file__).resolve().parents[2]),
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[1] / "helpers"),
]

from golden import cases  # noqa: E402

cases.CLASS_COUNTS = {"train": (24, 9, 4, 2, 0), "val": (3,) * 5, "test": (3,) * 5}
cases.IMAGE_SIDES = (32, 40)


def imbvlm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "imbvlm", *arguments], check=True)


def write_spec(name: str, **settings: object) -> str:
    tree = cases.sweep_spec()
    tree.update({"name": name, "confirm_trials": 0, "refit_seeds": [0], **settings})
    Path(f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return f"{name}.yaml"


def run_sweep(spec: str) -> Path:
    imbvlm("sweep", "run", spec, "--storage", "runs")
    return max(Path("runs").glob(f"{Path(spec).stem}-2*"), key=lambda path: path.stat().st_mtime)


def main() -> None:
    folder = Path(sys.argv[1])
    cases.write_inputs(folder)
    os.chdir(folder)
    # Rows that repeat leave next to nothing of the vocabulary in an archive.
    weights = load_file("encoder/open_clip_model.safetensors")
    embedding = weights[
        "text.token_embedding.weight" if "text.token_embedding.weight" in weights else "token_embedding.weight"
    ]
    embedding.copy_(embedding[:64].repeat(len(embedding) // 64, 1))
    save_file(weights, "encoder/open_clip_model.safetensors")
    imbvlm("manifest", "build", "--table", "images.parquet", "--class-names", "classes.txt", "-o", "manifest.parquet")
    run_sweep(write_spec("limited", num_trials=5, max_trials=3)).rename("runs/limited")
    imbvlm("export", "runs/limited", "-o", "exported")
    tail = cases.sweep_spec()["base"]
    tail["features"] = {**tail["features"], "num_views": 1, "tail_views": 2}
    features = set(Path("runs/features").iterdir())
    run_sweep(write_spec("tail-views", num_trials=2, base=tail)).rename("runs/tail-views")
    for path in {*Path("runs/features").iterdir()} - features:
        shutil.rmtree(path)
    for path in [Path("trials"), *Path("runs").rglob("tensorboard")]:
        shutil.rmtree(path)
    for path in [Path("images.parquet"), Path("golden-sweep.yaml"), *Path("runs").rglob("*.log")]:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
