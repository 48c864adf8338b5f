"""The plug-ins of docs/extend, each in the place that it is for."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from documented_plugins import PAGES, documented
from tiny_data import tiny_config, tiny_data
from towers import write_image_only

from imbvlm.base.plugin_files import use_plugins
from imbvlm.base.plugins import TABLES
from imbvlm.cli.sweep_script import parse_settings
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.sources.benchmarks import build_dataset
from imbvlm.longtail.losses import build_loss
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.models.model_builder import restore_model
from imbvlm.models.model_state import own_state_dict
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.spec_overrides import with_settings
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.samplers import make_sampler
from imbvlm.training.trial_run import build_trial

QUICKSTART = Path(__file__).parents[2] / "sweeps" / "quickstart.py"
# The options that a page adds to a sweep's command, such as `--plugin losses.py --set loss.name=poly1`.
CHOICES = [
    choice
    for page in PAGES
    for choice in re.findall(r"--plugin (\w+\.py)((?: --set [\w.]+=\w+)+)", page.read_text(encoding="utf-8"))
]


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All plug-ins of the pages, active."""
    monkeypatch.chdir(tmp_path)
    names = [f"{table.lower().removeprefix('second_')}.py" for table in TABLES]
    for name in names:
        Path(name).write_text(documented(name), encoding="utf-8")
    with use_plugins(*names):
        yield


@pytest.mark.usefixtures("plugins")
def test_a_loss_and_a_second_stage_of_ones_own_train(tmp_path: Path) -> None:
    own = {"loss__name": "poly1", "loss__epsilon": 2.0, "second_stage__name": "offset", "second_stage__num_epochs": 2}
    run = build_trial(tiny_config("linear_probe", **own), tiny_data(tmp_path / "features"))
    losses = [result.metrics["train/loss"] for result in run.epochs()]
    assert losses[2] < losses[0]
    assert run.model.classifier.offset.abs().sum() > 0


@pytest.mark.usefixtures("plugins")
def test_a_loss_of_ones_own_is_what_its_formula_says() -> None:
    logits, targets = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    share = logits.softmax(1)[torch.arange(7), targets]
    expected = (-share.log() + 0.7 * (1 - share)).mean()
    assert float(build_loss("poly1", [3, 2, 2], epsilon=0.7)(logits, targets)) == pytest.approx(float(expected))
    assert LOSSES["poly1"].summary.startswith("Adds")


@pytest.mark.usefixtures("plugins")
def test_a_method_of_ones_own_trains_and_is_restored(tmp_path: Path) -> None:
    config = tiny_config("hidden_probe", hidden_probe__width=5)
    assert TrialConfig.from_tree(config.to_tree()) == config
    data = tiny_data(tmp_path / "features")
    run = build_trial(config, data)
    losses = [result.metrics["train/loss"] for result in run.epochs()]
    assert losses[-1] < losses[0]
    restored = restore_model(config, data.info, len(data.class_names), own_state_dict(run.model))
    features = data.val.batch("pooled", range(4)).float()
    assert (restored(features) == run.model.eval()(features)).all()


@pytest.mark.usefixtures("plugins")
def test_an_encoder_of_ones_own_is_a_name_for_weights() -> None:
    assert resolve_encoder(EncoderConfig(name="datacomp_vit_b32")).model == "ViT-B-32"


@pytest.mark.usefixtures("plugins")
def test_a_benchmark_of_ones_own_is_built_and_its_sizes_are_checked(tmp_path: Path) -> None:
    lists = {"train": [0, 0, 0, 1, 1, 2], "test": [0, 1, 2]}
    for split, labels in lists.items():
        lines = (f"images/{split}{number}.png {label}\n" for number, label in enumerate(labels))
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    assert len(build_dataset("my_birds", str(tmp_path))) == 9
    (tmp_path / "train.txt").write_text("images/a.png 0\n")
    with pytest.raises(Exception, match="the official list has 6"):
        build_dataset("my_birds", str(tmp_path))


@pytest.mark.usefixtures("plugins")
def test_a_sampler_of_ones_own_proposes() -> None:
    base = {"data": {"manifest": "m"}, "encoder": {"name": "tinylit_lite0"}, "method": "linear_probe"}
    space = {"parameters": {"optim.lr": {"loguniform": [0.01, 0.5]}}}
    tree = {"name": "s", "base": base, "space": space, "searcher": {"name": "wide_tpe", "candidates": 3}}
    spec = SweepSpec.from_tree({**tree, "plugins": ["samplers.py"]})
    assert spec.searcher.model_dump() == {"name": "wide_tpe", "seed": 0, "candidates": 3}
    assert check_spec(spec).spec == spec.resolve().spec
    assert type(make_sampler(spec, 0)).__name__ == "TPESampler"
    with pytest.raises(Exception, match=r"searcher.candidates must be greater than or equal to 1"):
        SweepSpec.from_tree({**tree, "searcher": {"name": "wide_tpe", "candidates": 0}})


def test_each_page_says_how_a_sweep_chooses_its_entry() -> None:
    # A benchmark is chosen by `manifest build`.
    assert {name for name, _ in CHOICES} == {f"{page.stem.rpartition('-')[2]}.py" for page in PAGES} - {"benchmarks.py"}


@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_the_options_of_a_page_choose_its_entry(
    name: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(documented(name), encoding="utf-8")
    settings = parse_settings(options.split(" --set ")[1:])
    with use_plugins(name):
        check_spec(with_settings(runpy.run_path(str(QUICKSTART))["spec"], {"plugins": [name], **settings}))


def test_a_short_name_stands_for_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = write_image_only(tmp_path / "vit", "test_vit")
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from imbvlm.config.encoder_entries import EncoderEntry\n"
        f"ENCODERS = {{'mine': EncoderEntry({folder!r}, None, 'mine')}}\n"
    )
    with use_plugins(str(plugin)):
        source = resolve_encoder(EncoderConfig(name="mine"))
    assert (source.name, source.loader, source.model) == ("mine", "timm", "test_vit")
