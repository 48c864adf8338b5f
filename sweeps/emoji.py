"""Emoji of 68 classes with a natural tail, which come with the package: heads on a small encoder, on two CPU cores."""

from imbvlm import run_script
from imbvlm.sweep.spec import SweepSpec

spec = SweepSpec(
    name="emoji",
    base={
        "data": {"manifest": "embedded:emoji_lt"},
        "encoder": {"name": "tinylit_lite0"},
        "method": "linear_probe",
        "train": {"num_epochs": 40, "batch_size": 128},
        # Emoji fill their frame, as the quickstart's photos do.
        "eval": {"resize": 1.0},
    },
    space={
        "parameters": {
            "encoder.image_size": {"choice": [64, 128]},
            "classifier.kind": {"choice": ["linear", "cosine"]},
            "classifier.temperature": {"loguniform": [0.015, 0.08], "when": {"classifier.kind": "cosine"}},
            "classifier.init": {"choice": ["random", "text"], "when": {"classifier.kind": "cosine"}},
            "loss.name": {"choice": ["cross_entropy", "balanced_softmax", "logit_adjustment"]},
            "loss.tau": {"uniform": [0.5, 1.5], "when": {"loss.name": "logit_adjustment"}},
            "optim.lr": {"loguniform": [0.02, 0.5]},
        }
    },
    num_trials=24,
    smoke={"num_trials": 4, "encoder.image_size": 64, "train.num_epochs": 3, "num_folds": 2, "refit_seeds": [0]},
)

if __name__ == "__main__":
    run_script(spec)
