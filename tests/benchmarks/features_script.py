"""The other sides of `beside`: probes on features in memory, as one writes them in a hundred lines.

`python features_script.py SETTINGS.json` searches by Optuna in this process, tries a grid in it, or runs Ray Tune with
Optuna and ASHA, as `side` says. It writes `out`: each trial's end in seconds, its validation and its true accuracy.
"""

import time

BEGIN = time.time()

import itertools  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import optuna  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

BATCH = 128
Data = dict[str, Tensor]
Params = dict[str, Any]


class Probe(nn.Module):
    def __init__(self, width: int, num_classes: int, temperature: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, width) * 0.01)
        self.bias = nn.Parameter(torch.zeros(num_classes)) if temperature is None else None
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        if self.temperature is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1)) / self.temperature


def loss_of(params: Params, counts: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    log_prior = (counts / counts.sum()).log()
    shift = {"balanced_softmax": 1.0, "logit_adjustment": params.get("tau", 1.0)}.get(params["loss"], 0.0)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if params["loss"] == "focal":
            losses = F.cross_entropy(logits, labels, reduction="none")
            return ((1 - torch.exp(-losses)) ** params["gamma"] * losses).mean()
        return F.cross_entropy(logits + shift * log_prior, labels)

    return loss


def accuracy(model: Probe, x: Tensor, y: Tensor) -> float:
    num_classes = len(model.weight)
    with torch.inference_mode():
        right = (model(x).argmax(1) == y).float()
    of_class = torch.zeros(num_classes).index_add_(0, y, right) / torch.bincount(y, minlength=num_classes)
    return float(of_class.mean())


def train(params: Params, data: Data, after_epoch: Callable[[int, float], None]) -> tuple[float, float]:
    """Best validation accuracy, and the true accuracy at the end."""
    best, model = fit(params, data, after_epoch)
    return best, accuracy(model, data["test_x"], data["test_y"])


def fit(params: Params, data: Data, after_epoch: Callable[[int, float], None]) -> tuple[float, Probe]:
    """Best validation accuracy, and the trained probe."""
    torch.manual_seed(0)
    x, y = data["train_x"], data["train_y"]
    counts = torch.bincount(y).float()
    model = Probe(x.shape[1], len(counts), params.get("temperature"))
    loss_function, num_epochs, best = loss_of(params, counts), params["num_epochs"], 0.0
    optimizer = torch.optim.SGD(model.parameters(), params["lr"], 0.9, weight_decay=params["weight_decay"])
    num_steps = num_epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for epoch in range(1, num_epochs + 1):
        if params["sampling"] == "square_root":
            order = torch.multinomial(counts[y] ** -0.5, len(x), replacement=True)
        else:
            order = torch.randperm(len(x))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            loss_function(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
        best = max(best, accuracy(model, data["val_x"], data["val_y"]))
        after_epoch(epoch, best)
    return best, model


def suggest_head(trial: optuna.Trial) -> Params:
    """All but the optimizer's parameters and the length."""
    params: Params = {"loss": trial.suggest_categorical(
        "loss", ["cross_entropy", "focal", "balanced_softmax", "logit_adjustment"])}  # fmt: skip
    if params["loss"] == "focal":
        params["gamma"] = trial.suggest_float("gamma", 0.5, 3.0)
    if params["loss"] == "logit_adjustment":
        params["tau"] = trial.suggest_float("tau", 0.5, 1.5)
    if trial.suggest_categorical("kind", ["linear", "cosine"]) == "cosine":
        params["temperature"] = trial.suggest_float("temperature", 0.015, 0.08, log=True)
    params["sampling"] = trial.suggest_categorical("sampling", ["instance_balanced", "square_root"])
    return params


def suggest(trial: optuna.Trial) -> Params:
    params = suggest_head(trial)
    params["lr"] = trial.suggest_float("lr", 2e-3, 0.5, log=True)
    params["weight_decay"] = trial.suggest_float("weight_decay", 1e-5, 2e-3, log=True)
    params["num_epochs"] = trial.suggest_categorical("num_epochs", [5, 10])
    return params


def grid() -> list[Params]:
    """Each loss, classifier, sampling and five rates, as one who has no searcher tries them: 80 configurations."""
    heads: list[Params] = [{}, {"temperature": 0.03}]
    losses: list[Params] = [{"loss": "cross_entropy"}, {"loss": "focal", "gamma": 2.0}, {"loss": "balanced_softmax"},
                            {"loss": "logit_adjustment", "tau": 1.0}]  # fmt: skip
    return [
        {**loss, **head, "sampling": sampling, "lr": lr, "weight_decay": 1e-4, "num_epochs": 10}
        for loss, head, sampling, lr in itertools.product(
            losses, heads, ("instance_balanced", "square_root"), (0.005, 0.015, 0.05, 0.15, 0.5)
        )
    ]


def load(path: str) -> Data:
    with np.load(path) as file:
        return {
            name: torch.from_numpy(file[name]).float() if name.endswith("x") else torch.from_numpy(file[name]).long()
            for name in file.files
        }


def search(
    settings: dict[str, Any],
    data: Data,
    suggest: Callable[[optuna.Trial], Params],
    add: Callable[[float, Probe], None],
) -> None:
    """Search by Optuna; `add` gets the validation accuracy and the probe of each trial that is not pruned."""

    def objective(trial: optuna.Trial) -> float:
        def after_epoch(epoch: int, best: float) -> None:
            trial.report(best, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        seen, probe = fit(suggest(trial), data, after_epoch)
        add(seen, probe)
        return seen

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=settings["seed"]))
    study.optimize(objective, n_trials=settings["num_trials"])


def by_ray_tune(settings: dict[str, Any], data: Data, add: Callable[[float, float], None]) -> None:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    def run(config: Params, data: Data) -> None:
        torch.set_num_threads(1)
        seen, true = train(config, data, lambda epoch, best: tune.report({"seen": best, "epoch": epoch}))
        tune.report({"seen": seen, "true": true, "ended": time.time()})

    search = OptunaSearch(suggest_for_tune, metric="seen", mode="max", seed=settings["seed"])
    tuner = tune.Tuner(
        tune.with_parameters(run, data=data),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=ASHAScheduler(metric="seen", mode="max", max_t=11),
            num_samples=settings["num_trials"],
            max_concurrent_trials=2,
        ),
        run_config=tune.RunConfig(storage_path=settings["folder"], verbose=0),
    )
    for result in tuner.fit():
        if "true" in (result.metrics or {}):
            add(result.metrics["seen"], result.metrics["true"], result.metrics["ended"])


def suggest_for_tune(trial: optuna.Trial) -> Params:
    """Ray Tune takes the values that were suggested, and constants from what is returned."""
    params = suggest(trial)
    return {key: value for key, value in params.items() if key not in trial.params}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    data, trials = load(settings["features"]), []

    def add(seen: float, true: float, ended: float | None = None) -> None:
        trials.append({"end": (ended or time.time()) - BEGIN, "seen": seen, "true": true})

    if settings["side"] == "optuna":
        search(settings, data, suggest, lambda seen, probe: add(seen, accuracy(probe, data["test_x"], data["test_y"])))
    elif settings["side"] == "grid":
        for params in grid():
            add(*train(params, data, lambda epoch, best: None))
    else:
        by_ray_tune(settings, data, add)
    Path(settings["out"]).write_text(json.dumps({"trials": trials, "seconds": time.time() - BEGIN}))


if __name__ == "__main__":
    main()
