"""Places-LT on GPUs: encoders, methods, losses, temperatures and learning rates; one GPU a trial."""

from imbvlm import run_script
from imbvlm.sweep.spec import SweepSpec
from imbvlm.sweep.spec.learned_recipes import PROBES
from imbvlm.sweep.spec.published_recipes import LIFT

spec = SweepSpec(
    name="places_lt",
    base={
        "data": {"manifest": "data/places_lt/manifest.parquet"},
        "encoder": {"name": "openai_vit_b16"},
        "optim": {"name": "sgd", "momentum": 0.9},
        "train": {"batch_size": 128},
    },
    space="places_lt",
    # Probes read stored features, LIFT's recipe trains in the encoder.
    first_trials=[
        *({**probe, "train.num_epochs": 30} for probe in PROBES),
        {**LIFT, "adapter.width": 8, "train.num_epochs": 10},
    ],
    num_trials=96,
    gpus_per_worker=1,
    cpus_per_worker=4,
    confirm_trials=3,
    smoke={
        "confirm_trials": 0,
        "num_trials": 4,
        "train.num_epochs": 1,
        "encoder.name": "openai_vit_b16",
        "refit_seeds": [0],
    },
)

if __name__ == "__main__":
    run_script(spec)
