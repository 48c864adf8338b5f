"""What is shown before a sweep: how its trials fall on the arms, what they would read, take and cost."""

from __future__ import annotations

from typing import Any

import pytest

from imbvlm.sweep.plan import describe_sweep
from imbvlm.sweep.spec import SweepSpec

BASE: dict[str, Any] = {
    "data": {"manifest": "embedded:fashion_mnist_lt"},
    "encoder": {"name": "tinylit_lite0", "image_size": 64},
    "method": "linear_probe",
}
SPACE = {
    "parameters": {
        "loss.name": {"choice": ["cross_entropy", "focal", "balanced_softmax"]},
        "data.class_sampling": {"choice": ["instance_balanced", "square_root"]},
        "optim.lr": {"loguniform": [0.01, 1.0]},
    }
}


def spec(**fields: Any) -> SweepSpec:
    return SweepSpec.from_tree({"name": "small", "base": BASE, "space": SPACE, **fields})


@pytest.mark.parametrize(
    ("num_trials", "says"),
    [
        (12, "6 of loss.name x data.class_sampling, 2 trials each"),
        (
            14,
            "14 isn't a multiple, so 2 have 3 trials and 4 have 2; num_trials 12 or 18 gives each the same",
        ),
        (4, "num_trials 4 isn't a multiple, so 4 have 1 trials and 2 have 0; num_trials 6 gives each the same"),
    ],
)
def test_trials_that_do_not_fall_evenly_on_the_arms_are_said(num_trials: int, says: str) -> None:
    text = describe_sweep(spec(num_trials=num_trials, stratify=["loss.name", "data.class_sampling"]))
    assert says in text
