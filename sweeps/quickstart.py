"""The main job in small: Fashion-MNIST with a long tail, an image-text model of 21 MB, two CPU cores, three minutes."""

from imbvlm import run_script
from imbvlm.sweep.spec import SweepSpec

RECIPE = {
    "classifier.kind": "cosine",
    "classifier.temperature": 0.05,
    "loss.name": "balanced_softmax",
    "data.class_sampling": "instance_balanced",
    "optim.lr": 0.05,
}

spec = SweepSpec(
    name="quickstart",
    base={
        "data": {"manifest": "embedded:fashion_mnist_lt"},
        "encoder": {"name": "tinylit_lite0"},
        # At the encoder's own width of 1,280 a decoder takes minutes on two cores; at 192 it is as accurate.
        "decoder": {"width": 192},
        "train": {"num_epochs": 12, "batch_size": 128},
        # These photos fill their frame: a center crop would cut sleeves and heels off.
        "eval": {"resize": 1.0},
    },
    space="quickstart",
    num_trials=30,
    # Proven recipes come first, as the large sweeps pin their published ones.
    first_trials=[
        {**RECIPE, "method": "linear_probe", "encoder.image_size": 64},
        {**RECIPE, "method": "linear_probe", "encoder.image_size": 128},
        {**RECIPE, "method": "decoder", "decoder.depth": 1, "encoder.image_size": 128},
    ],
    confirm_trials=3,
    # Its few minutes leave none for folds beside 500 validation images.
    confirm_folds=None,
    # Two sizes see two different things: their blend is worth a second pass.
    blend={"max_passes": 2},
    smoke={"confirm_trials": 0, "num_trials": 8, "encoder.image_size": 64, "train.num_epochs": 6, "refit_seeds": [0]},
)

if __name__ == "__main__":
    run_script(spec)
