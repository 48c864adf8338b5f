"""LIFT's recipes (Shi et al., ICML 2024) as one sweep for each of its data sets: a fixed list, nothing is searched.

The recipe with B/16 and L/14 and LIFT+'s, the steps of its ablation, and its losses. Adapters train inside a ViT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from imbvlm.cli.options import SweepOptions
from imbvlm.cli.sweep_script import run_command, run_function
from imbvlm.sweep.spec import SweepSpec
from imbvlm.sweep.spec.published_recipes import LIFT, LIFT_PLUS
from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.studies import Part, Row, study_fields

# Epochs of LIFT and of LIFT+; the width of the adapters follows from the number of classes.
EPOCHS = {"imagenet_lt": (10, 5), "places_lt": (10, 5), "inat2018": (20, 15)}
DEFAULT = "imagenet_lt"
Recipe = StrEnum("Recipe", [*EPOCHS])
PartName = StrEnum("PartName", ["recipe", "ablation", "losses", "cost"])
PARTS = tuple(PartName)
ENCODERS = {"B/16": "openai_vit_b16", "L/14": "openai_vit_l14"}
# A 24 GB card holds a batch of L/14 in four parts; the numbers stay the same.
IN_PARTS: Params = {"memory.accumulation": 4}
LOSSES: Mapping[str, Params] = {
    "CE": {"loss.name": "cross_entropy"},
    "Focal": {"loss.name": "focal"},
    "LDAM": {"loss.name": "ldam"},
    "CB": {"loss.name": "effective_number"},
    "GRW": {"loss.name": "generalized_reweight", "loss.exponent": 1.0},
    "LADE": {"loss.name": "lade"},
    "LA": {"loss.name": "logit_adjustment", "loss.tau": 1.0},
}
# The classifier alone, on fresh crops through the frozen encoder.
CLASSIFIER: Params = {"method": "linear_probe", "features.store": False}


def study(names: Iterable[str], recipe: str = DEFAULT, manifest: str | None = None) -> SweepSpec:
    """The sweep of some parts of PARTS by a data set's recipe."""
    epochs, epochs_plus = EPOCHS[recipe]
    lift: Params = {**LIFT, "train.num_epochs": epochs}
    plus: Params = {**LIFT_PLUS, "train.num_epochs": epochs_plus}
    at_random: Params = {**lift, "classifier.init": "random"}
    both = [
        Row(f"{label}, {model}", f"{name}-{model.lower().replace('/', '')}", {**draw, "encoder.name": encoder, **more})
        for label, name, draw in (("LIFT", "lift", lift), ("LIFT+", "lift-plus", plus))
        for (model, encoder), more in zip(ENCODERS.items(), ({}, IN_PARTS), strict=True)
    ]
    parts = {
        "recipe": Part("recipe", "LIFT and LIFT+", both),
        "ablation": Part(
            "ablation",
            "What each step gives",
            [
                Row("Classifier", "classifier", {**_under(at_random, "CE"), **CLASSIFIER}),
                Row("+ adapters", "adapters-ce", _under(at_random, "CE")),
                Row("+ logit adjustment", "adapters-la", at_random),
                Row("+ start from text", "lift-b16", lift),
            ],
        ),
        "losses": Part(
            "losses",
            "LIFT under the losses",
            [Row(label, f"lift-{label.lower()}", _under(lift, label)) for label in LOSSES],
        ),
        "cost": Part("cost", "Cost", both, "cost"),
    }
    base = {
        "data": {"manifest": manifest or f"data/{recipe}/manifest.parquet"},
        "encoder": {"name": "openai_vit_b16"},
        "optim": {"name": "sgd", "momentum": 0.9},
        "train": {"batch_size": 128},
        # In addition to one crop: LIFT publishes both.
        "eval": {"tte": "five_crop"},
    }
    return SweepSpec.from_tree(
        {
            "name": f"lift_{recipe}",
            **study_fields([parts[name] for name in PARTS if name in names], base),
            "trial_scheduler": {"name": "none"},
            "driver": "ray_train",
            "gpus_per_worker": 1,
            "cpus_per_worker": 4,
            "smoke": {"train.num_epochs": 1, "encoder.name": "openai_vit_b16", "refit_seeds": [0]},
        }
    )


def _under(draw: Params, loss: str) -> Params:
    """The recipe with another loss, without the options of its own."""
    return {**{key: value for key, value in draw.items() if not key.startswith("loss.")}, **LOSSES[loss]}


spec = study(PARTS)


@dataclass(frozen=True, kw_only=True)
class LiftOptions(SweepOptions):
    """A sweep's options, the data set and the parts."""

    recipe: Annotated[Recipe, typer.Option(help="the data set whose recipe is run")] = Recipe[DEFAULT]
    part: Annotated[
        list[PartName] | None,
        typer.Option(metavar="PART", help=f"parts to run, of {', '.join(PARTS)}; by default all"),
    ] = None


def run(options: LiftOptions) -> int:
    """Run the chosen parts."""
    return run_command(study(options.part or PARTS, options.recipe, options.manifest), options)


if __name__ == "__main__":
    run_function(LiftOptions, run, __doc__)
