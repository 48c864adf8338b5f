"""The other side of `beside_quickstart`: the quickstart's job as one writes it in a hundred lines.

`python quickstart_script.py SETTINGS.json` computes features of training and validation images once, with all cores,
then searches heads by Optuna in this process. It writes `out`: each trial's end in seconds, its validation accuracy,
and its true accuracy, for which features are computed after the search.
"""

import time

BEGIN = time.time()

import io  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import open_clip  # noqa: E402
import optuna  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.compute as pc  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from features_script import Params, Probe, accuracy, fit  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

SIZE, NUM_EPOCHS = 128, 12


class Images(Dataset):  # type: ignore[type-arg]
    def __init__(self, table: pa.Table, transform: v2.Transform) -> None:
        self.contents, self.labels = table.column("bytes").to_pylist(), table.column("label").to_pylist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.open(io.BytesIO(self.contents[index])).convert("RGB")), self.labels[index]


def compute(model: torch.nn.Module, table: pa.Table, transform: v2.Transform) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    with torch.inference_mode():
        for pixels, of_batch in DataLoader(Images(table, transform), batch_size=64, num_workers=1):
            features.append(
                model.visual.trunk.forward_head(model.visual.trunk.forward_features(pixels), pre_logits=True)
            )
            labels.append(of_batch)
    return torch.cat(features).clone(), torch.cat(labels)


def suggest(trial: optuna.Trial) -> Params:
    params: Params = {"loss": trial.suggest_categorical(
        "loss", ["cross_entropy", "focal", "balanced_softmax", "logit_adjustment"])}  # fmt: skip
    if params["loss"] == "focal":
        params["gamma"] = trial.suggest_float("gamma", 0.5, 3.0)
    if params["loss"] == "logit_adjustment":
        params["tau"] = trial.suggest_float("tau", 0.5, 1.5)
    if trial.suggest_categorical("kind", ["linear", "cosine"]) == "cosine":
        params["temperature"] = trial.suggest_float("temperature", 0.015, 0.08, log=True)
    params["sampling"] = trial.suggest_categorical("sampling", ["instance_balanced", "square_root"])
    params["lr"] = trial.suggest_float("lr", 0.02, 0.5, log=True)
    return {**params, "weight_decay": 5e-4, "num_epochs": NUM_EPOCHS}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    table = pq.read_table(settings["manifest"])
    model = open_clip.create_model(f"local-dir:{settings['encoder']}").eval()
    mean, std = open_clip.get_model_preprocess_cfg(model)["mean"], open_clip.get_model_preprocess_cfg(model)["std"]
    transform = v2.Compose([
        v2.Resize((SIZE, SIZE), interpolation=v2.InterpolationMode.BICUBIC), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std),
    ])  # fmt: skip

    def of_split(name: str) -> tuple[Tensor, Tensor]:
        return compute(model, table.filter(pc.equal(table.column("split"), name)), transform)

    data = dict[str, Tensor]()
    for split in ("train", "val"):
        data[f"{split}_x"], data[f"{split}_y"] = of_split(split)
    trials, probes = [], list[Probe]()

    def objective(trial: optuna.Trial) -> float:
        def after_epoch(epoch: int, best: float) -> None:
            trial.report(best, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        seen, probe = fit(suggest(trial), data, after_epoch)
        trials.append({"end": time.time() - BEGIN, "seen": seen})
        probes.append(probe)
        return seen

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=settings["seed"]))
    study.optimize(objective, n_trials=settings["num_trials"])
    seconds = time.time() - BEGIN
    x, y = of_split("test")
    for trial, probe in zip(trials, probes, strict=True):
        trial["true"] = accuracy(probe, x, y, int(y.max()) + 1)
    Path(settings["out"]).write_text(json.dumps({"trials": trials, "seconds": seconds}))


if __name__ == "__main__":
    main()
