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
from features_script import Params, Probe, accuracy, search, suggest_head  # noqa: E402
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
    trunk, features, labels = model.visual.trunk, list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for batch, of_batch in DataLoader(Images(table, transform), batch_size=64, num_workers=1):
            features.append(trunk.forward_head(trunk.forward_features(batch), pre_logits=True))
            labels.append(of_batch)
    return torch.cat(features), torch.cat(labels)


def suggest(trial: optuna.Trial) -> Params:
    lr = trial.suggest_float("lr", 0.02, 0.5, log=True)
    return {**suggest_head(trial), "lr": lr, "weight_decay": 5e-4, "num_epochs": NUM_EPOCHS}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    table = pq.read_table(settings["manifest"])
    model = open_clip.create_model(f"local-dir:{settings['encoder']}").eval()
    preprocess = open_clip.get_model_preprocess_cfg(model)
    transform = v2.Compose([
        v2.Resize((SIZE, SIZE), interpolation=v2.InterpolationMode.BICUBIC), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess["mean"], preprocess["std"]),
    ])  # fmt: skip

    def of_split(name: str) -> tuple[Tensor, Tensor]:
        return compute(model, table.filter(pc.equal(table.column("split"), name)), transform)

    data = dict[str, Tensor]()
    for split in ("train", "val"):
        data[f"{split}_x"], data[f"{split}_y"] = of_split(split)
    trials, probes = list[dict[str, float]](), list[Probe]()

    def add(seen: float, probe: Probe) -> None:
        trials.append({"end": time.time() - BEGIN, "seen": seen})
        probes.append(probe)

    search(settings, data, suggest, add)
    seconds = time.time() - BEGIN
    x, y = of_split("test")
    for trial, probe in zip(trials, probes, strict=True):
        trial["true"] = accuracy(probe, x, y)
    Path(settings["out"]).write_text(json.dumps({"trials": trials, "seconds": seconds}))


if __name__ == "__main__":
    main()
