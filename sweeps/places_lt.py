"""Places-LT on GPUs: towers, methods, losses, temperatures and learning rates; one GPU a trial."""

from imbvlm.sweep.command import main
from imbvlm.sweep.spec import SweepSpec

# LIFT's recipe [Shi et al., ICML 2024] for this data set, tried first.
LIFT = {
    "encoder.name": "openai_vit_b16",
    "method": "adapter",
    "adapter.width": 8,
    "classifier.kind": "cosine",
    "classifier.temperature": 0.04,
    "classifier.init": "text",
    "loss.name": "logit_adjustment",
    "loss.tau": 1.0,
    "data.class_sampling": "instance_balanced",
    "optim.lr": 0.01,
    "optim.weight_decay": 5e-4,
    "optim.lr_schedule": "half_cosine",
    "optim.warmup_fraction": 0.0,
    "optim.nesterov": False,
    "train.clip_grad_norm": None,
    "train.num_epochs": 10,
}

spec = SweepSpec(
    name="places_lt",
    base={
        "data": {"manifest": "data/places_lt/manifest.parquet"},
        "encoder": {"name": "openai_vit_b16"},
        "optim": {"name": "sgd", "momentum": 0.9},
        "train": {"batch_size": 128},
    },
    space="places_lt",
    first_trials=[LIFT],
    num_trials=96,
    driver="ray_train",
    gpus_per_worker=1,
    cpus_per_worker=4,
    smoke={"num_trials": 4, "train.num_epochs": 1, "encoder.name": "openai_vit_b16", "refit_seeds": [0]},
)

if __name__ == "__main__":
    main(spec)
