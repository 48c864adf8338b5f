"""The study of Wang et al. (IJCV 2023) as one sweep: a fixed list of configurations in parts, nothing is searched.

Softmax and six other losses, class-balanced sampling and four second stages on a decoder over a frozen encoder;
zero-shot, CoOp, a linear probe and full fine-tuning; encoders, pre-training sets, depths of the decoder, and the cost.
It runs in full on GPUs. Without one, and on the data in the package, it runs in small: the package's own encoder on
CPUs, a few epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

import typer

from imbvlm.base.errors import ImbvlmError
from imbvlm.cli.options import SweepOptions
from imbvlm.cli.sweep_script import run_command, run_function
from imbvlm.sweep.plan.sweep_plan import resources
from imbvlm.sweep.spec import SweepSpec
from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.studies import Part, Row, study_fields

EMBEDDED = "embedded:"
DEFAULT_MANIFEST = "embedded:fashion_mnist_lt"

LOSSES: Mapping[str, Params] = {
    "Softmax": {"loss.name": "cross_entropy"},
    "CBW": {"loss.name": "inverse_frequency"},
    "GRW": {"loss.name": "generalized_reweight"},
    "Focal": {"loss.name": "focal"},
    "LDAM": {"loss.name": "ldam"},
    "Balanced Softmax": {"loss.name": "balanced_softmax"},
    "LADE": {"loss.name": "lade"},
}
SOFTMAX = LOSSES["Softmax"]
# The twelve methods: the losses, class-balanced sampling, and what follows a first stage under softmax.
TWELVE: Mapping[str, Params] = {
    **LOSSES,
    "CBS": {**SOFTMAX, "data.class_sampling": "class_balanced"},
    "CRT": {**SOFTMAX, "second_stage.name": "classifier_retraining"},
    "LWS": {**SOFTMAX, "second_stage.name": "learnable_weight_scaling"},
    "DisAlign": {**SOFTMAX, "second_stage.name": "disalign"},
    "MARC": {**SOFTMAX, "second_stage.name": "marc"},
}
ZERO_SHOT: Params = {"method": "zero_shot"}
PROBE: Params = {"method": "linear_probe"}
DECODER: Params = {"method": "decoder"}
# As CoOp trains: fifty epochs at 0.002, half a cosine, the first epoch at a small rate.
COOP: Params = {
    "method": "prompt_tuning",
    "optim.lr": 0.002,
    "optim.nesterov": False,
    "optim.lr_schedule": "half_cosine",
    "optim.cosine_cycles": 0.5,
    "optim.warmup_fraction": 0.0,
    "optim.first_epoch_lr": 1e-5,
    "train.num_epochs": 50,
}
FINE_TUNING: Params = {"method": "fine_tuning", "optim.lr": 1e-3}
# Later methods: other losses, a classifier that normalizes, and training less than the whole image tower.
COSINE: Params = {"classifier.kind": "cosine", "classifier.temperature": 0.05, **LOSSES["Balanced Softmax"]}
SINCE: Mapping[str, Params] = {
    "Decoder, effective number": {**DECODER, "loss.name": "effective_number"},
    "Decoder, LDAM-DRW": {**DECODER, **LOSSES["LDAM"], "loss.reweight_from": 0.8},
    "Decoder, tau-normalization": {**DECODER, **SOFTMAX, "second_stage.name": "tau_normalization"},
    "Decoder, cosine": {**DECODER, **COSINE},
    "Linear probe, cosine": {**PROBE, **COSINE},
    "Bias tuning": {"method": "bias_tuning", "optim.lr": 0.01, **COSINE},
}
IN_VIT: Mapping[str, Params] = {
    "Adapters": {"method": "adapter", "optim.lr": 0.01, **COSINE},
    "LoRA": {"method": "lora", "optim.lr": 0.01, **COSINE},
}
ENCODERS = {"ViT-B/16": "openai_vit_b16", "ViT-L/14": "openai_vit_l14"}
PRETRAINING = {"OpenAI": "openai_vit_b16", "LAION-400M": "laion400m_vit_b16", "LAION-2B": "laion2b_vit_b16"}
DEPTHS = range(7)
PartName = StrEnum(
    "PartName", ["methods", "losses", "prompt_losses", "since", "towers", "pretraining", "depth", "cost"]
)
PARTS = tuple(PartName)

# CPUs of a trial on a GPU, where the machine has as many; its driver needs a part of one more.
CPUS_PER_GPU = 4
# The study's recipe: 8,192 steps of 256, on one GPU a trial.
LARGE: Mapping[str, Any] = {
    "base": {
        "encoder": {"name": "openai_vit_b16"},
        "decoder": {"depth": 3, "num_heads": 4, "mlp_ratio": 0.5, "input_norm": "none"},
        "classifier": {"kind": "linear"},
        "optim": {"name": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4, "cosine_cycles": 0.4375},
        "train": {"num_steps": 8192, "batch_size": 256, "clip_grad_norm": None},
    },
    "own": {},
    "driver": "ray_train",
    "gpus_per_worker": 1,
    "cpus_per_worker": CPUS_PER_GPU,
    "fresh_crops": True,
    "smoke": {"train.num_epochs": 1, "encoder.name": "openai_vit_b16", "refit_seeds": [0], "fresh_crops": False},
}
# The same in small, for two CPU cores.
SMALL: Mapping[str, Any] = {
    "base": {
        "encoder": {"name": "tinylit_lite0", "image_size": 96},
        "decoder": {"depth": 3, "width": 192},
        "classifier": {"kind": "linear"},
        "optim": {"name": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4},
        "train": {"num_epochs": 12, "batch_size": 128},
        "eval": {"resize": 1.0},
    },
    # A classifier alone takes larger steps. Training the encoder takes a minute an epoch, so these few epochs take
    # larger steps than thousands would: of 0.001, 0.005 and 0.02 the last does best on validation.
    "own": {
        "linear_probe": {"optim.lr": 0.3},
        "fine_tuning": {"optim.lr": 0.02, "train.num_epochs": 6},
        "bias_tuning": {"train.num_epochs": 6},
    },
    "driver": "in_process",
    # Fresh crops need the encoder in every epoch: hours on a CPU.
    "fresh_crops": False,
    "smoke": {"train.num_epochs": 1, "encoder.image_size": 64, "refit_seeds": [0]},
}


def study(
    names: Iterable[str], manifest: str = DEFAULT_MANIFEST, num_cpus: float | None = None, num_gpus: float = 1
) -> tuple[SweepSpec, list[str]]:
    """The sweep of some parts of PARTS on a data set and a machine, and sentences on what it leaves out."""
    is_embedded = manifest.startswith(EMBEDDED)
    is_small = is_embedded or not num_gpus
    setting = dict(SMALL if is_small else LARGE)
    if num_cpus is not None and not is_small:
        setting["cpus_per_worker"] = max(1, min(CPUS_PER_GPU, math.ceil(num_cpus / num_gpus) - 1))
    base = {"data": {"manifest": manifest}, **setting["base"]}
    # A sentence for each part that leaves something out.
    left_out: dict[str, str] = {}
    encoders, pretraining, since = ENCODERS, PRETRAINING, {**SINCE, **IN_VIT}
    if is_small:
        encoders, pretraining, since = {"TinyLiT": "tinylit_lite0"}, {}, SINCE
        why = "the data in the package has" if is_embedded else "there is no GPU, so that the study takes"
        left_out = {
            "towers": f"part towers leaves out {', '.join(ENCODERS)}: {why} the package's own encoder",
            "since": f"part since leaves out {', '.join(IN_VIT)}, which train in the blocks of a ViT",
            "pretraining": f"part pretraining leaves out {', '.join(PRETRAINING)}: {why} the package's own encoder",
        }
    methods = _methods()
    parts = {
        "methods": Part("methods", "Methods", methods),
        "losses": Part("losses", "A decoder under the twelve methods", _rows("decoder", DECODER, TWELVE)),
        "prompt_losses": Part("prompt_losses", "CoOp under the losses", _rows("coop", COOP, LOSSES)),
        "since": Part("since", "What came since", _rows("since", {}, since)),
        "towers": Part("towers", "Towers", _over_encoders(encoders)),
        "pretraining": Part("pretraining", "Pre-training sets", _over_encoders(pretraining)),
        "depth": Part("depth", "Depth of the decoder", _depths()),
        "cost": Part("cost", "Cost", methods, "cost"),
    }
    chosen = [_with_own(parts[name], setting["own"]) for name in PARTS if name in names and parts[name].rows]
    fields = {key: value for key, value in setting.items() if key not in ("base", "own")}
    spec = SweepSpec.from_tree(
        {
            "name": "paper",
            **study_fields(chosen, base),
            **fields,
            "trial_scheduler": {"name": "none"},
        }
    )
    notes = [sentence for part, sentence in left_out.items() if part in names]
    if is_small and not is_embedded:
        notes.insert(
            0,
            "there is no GPU: the study runs in small, with TinyLiT at 96 px for ViT-B/16, on CPUs (--dry-run --gpus N "
            "plans it in full)",
        )
    return spec, notes


def _with_own(part: Part, own: Mapping[str, Params]) -> Part:
    """The part with the options that methods set differently on this scale."""
    rows = [replace(row, draw={**row.draw, **own.get(row.draw["method"], {})}) for row in part.rows]
    return replace(part, rows=rows)


def _methods() -> list[Row]:
    return [
        Row("Zero-shot", "zero-shot", ZERO_SHOT),
        Row("CoOp", "coop-softmax", {**COOP, **SOFTMAX}),
        Row("CoOp, context per class", "coop-per-class", {**COOP, **SOFTMAX, "prompt_tuning.per_class": True}),
        Row("Linear probe", "linear-probe", {**PROBE, **SOFTMAX}),
        Row("Full fine-tuning", "fine-tuning", {**FINE_TUNING, **SOFTMAX}),
        Row("Decoder", "decoder-softmax", {**DECODER, **SOFTMAX}),
    ]


def _rows(name: str, method: Params, variants: Mapping[str, Params]) -> list[Row]:
    return [Row(label, f"{name}-{_slug(label)}", {**method, **draw}) for label, draw in variants.items()]


def _over_encoders(encoders: Mapping[str, str]) -> list[Row]:
    methods = {
        "zero-shot": ZERO_SHOT,
        "linear probe": {**PROBE, **SOFTMAX},
        "decoder": {**DECODER, **SOFTMAX},
        "decoder, Balanced Softmax": {**DECODER, **LOSSES["Balanced Softmax"]},
    }
    return [
        Row(f"{label}, {name}", f"{_slug(encoder)}-{_slug(name)}", {"encoder.name": encoder, **draw})
        for label, encoder in encoders.items()
        for name, draw in methods.items()
    ]


def _depths() -> list[Row]:
    return [
        Row(f"{depth} blocks", f"decoder-depth-{depth}", {**DECODER, **SOFTMAX, "decoder.depth": depth})
        for depth in DEPTHS
    ]


def _slug(text: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


spec, left_out = study(PARTS)


@dataclass(frozen=True, kw_only=True)
class PaperOptions(SweepOptions):
    """A sweep's options, and the parts."""

    part: Annotated[
        list[PartName] | None,
        typer.Option(metavar="PART", help=f"parts to run, of {', '.join(PARTS)}; by default all"),
    ] = None


def run(options: PaperOptions) -> int:
    """Run the chosen parts on this machine, in small where it has no GPU."""
    num_cpus, num_gpus = resources() if options.gpus is None else (None, options.gpus)
    spec, left_out = study(options.part or PARTS, options.manifest or DEFAULT_MANIFEST, num_cpus, num_gpus)
    print(*left_out, sep="\n", end="\n" if left_out else "")
    if not spec.study:
        raise ImbvlmError("nothing remains of the parts of --part. Name other parts, or give --manifest.")
    return run_command(spec, options)


if __name__ == "__main__":
    run_function(PaperOptions, run, __doc__)
