"""Recipes that recorded searches have shown to be good on data of many classes, for a sweep to try first."""

from __future__ import annotations

from imbvlm.sweep.spec.search_space import Params

_COSINE_PROBE: Params = {
    "encoder.name": "openai_vit_b16",
    "method": "linear_probe",
    "classifier.kind": "cosine",
    "classifier.init": "text",
}

# The three that together come nearest to the best of 12 recorded tables of 50 to 1,000 classes, rounded
# (docs/results.md, "Searches"). The tables' probes started from random weights, had other encoders, and were at their
# best with the most epochs of their space.
PROBES: tuple[Params, ...] = (
    {
        **_COSINE_PROBE,
        "classifier.temperature": 0.024,
        "loss.name": "logit_adjustment",
        "loss.tau": 1.2,
        "data.class_sampling": "square_root",
        "optim.lr": 0.17,
        "optim.weight_decay": 4e-4,
    },
    {
        **_COSINE_PROBE,
        "classifier.temperature": 0.02,
        "loss.name": "ldam",
        "loss.max_margin": 0.78,
        "data.class_sampling": "square_root",
        "optim.lr": 0.12,
        "optim.weight_decay": 2e-5,
    },
    {
        **_COSINE_PROBE,
        "classifier.temperature": 0.03,
        "loss.name": "balanced_softmax",
        "data.class_sampling": "instance_balanced",
        "optim.lr": 0.1,
        "optim.weight_decay": 3e-5,
    },
)
