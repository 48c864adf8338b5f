"""After training: chosen on validation alone, left alone where it isn't shown to help, applied to test and in use."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sweep_folder import sweep_spec, write_sweep
from tiny_data import CLASS_COUNTS, tiny_config, tiny_features
from towers import write_tower

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.trial_data import TrialData
from imbvlm.inference import predictor
from imbvlm.inference.model_folder import load, write_model
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.post_hoc_adjustment import ALPHAS, TAUS, PostHocAdjustment, adjust_logits, mix_logits
from imbvlm.models.classifier import ZeroShotClassifier
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.model_builder import build_model
from imbvlm.sweep.records.adjustment_selection import (
    LIKELIHOOD,
    NUM_BEST,
    POST_HOC_FILE,
    describe_post_hoc,
    logits_file,
    max_logit_files,
    prune_logits,
    read_adjustment,
    select_adjustments,
    write_post_hoc,
)
from imbvlm.sweep.records.refit_selection import Refit
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.trial_session import TrialSession, TrialSettings
from imbvlm.training.validation_logits import ValLogitsWriter, file_bytes

BASE = {"data": {"manifest": "m"}, "encoder": {"name": "tower"}}
COUNTS = np.array([400, 100, 30, 8, 0])
NUM_CLASSES, PER_CLASS = len(COUNTS), 40


def honest(seed: int = 0, signal: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that know nothing of the prior, and their targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(NUM_CLASSES).repeat(PER_CLASS)
    noise = torch.randn(len(targets), NUM_CLASSES, generator=generator)
    return signal * torch.nn.functional.one_hot(targets, NUM_CLASSES) + noise, targets


def write_logits(folder: Path, trial_id: str, targets: torch.Tensor, **logits: Any) -> None:
    path = Path(logits_file(str(folder), trial_id))
    path.parent.mkdir(parents=True, exist_ok=True)
    epochs = torch.tensor([3 if "best" in logits else 0, 5 if "last" in logits else 0])
    values = {name: value.half() for name, value in logits.items()}
    counts = {"class_counts": torch.tensor(COUNTS), "split_counts": torch.tensor(COUNTS)}
    save_file({**values, **counts, "targets": targets.int(), "epochs": epochs}, path)


def record(trial_id: str, method: str = "linear_probe", kind: str = "search", **sections: Any) -> TrialRecord:
    config = TrialConfig.from_tree({**BASE, "method": method, **sections})
    return TrialRecord(trial_id=trial_id, kind=kind, state="finished", config=config.to_tree())


def refit(trial_id: str = "t1", name: str = "winner", **fields: Any) -> Refit:
    trial = record(trial_id, **fields)
    return Refit(name, trial, trial.trial_config(), (0, 1))


@pytest.fixture
def log(tmp_path: Path) -> TrialLog:
    log = TrialLog(str(tmp_path))
    log.save(record("b1", "zero_shot", "baseline"))
    return log


def chosen(
    tmp_path: Path,
    log: TrialLog,
    source: Any = None,
    objective: str = "val/balanced_accuracy",
    select_by: str = "objective",
) -> Any:
    source = refit() if source is None else source
    spec = sweep_spec(objective=objective, select_by=select_by)
    return select_adjustments(str(tmp_path), [source], log, spec).get(source.name)


# --------------------------------------------------------------------------------------------------------- choosing


def test_a_model_that_follows_the_prior_gets_its_tau_and_a_temperature(tmp_path: Path, log: TrialLog) -> None:
    logits, targets = honest()
    biased = adjust_logits(logits, COUNTS, -1.0)
    write_logits(tmp_path, "t1", targets, best=torch.zeros_like(logits), last=biased)
    selection = chosen(tmp_path, log)
    assert [value for value, _ in selection.tau.candidates] == list(TAUS)
    assert selection.adjustment.tau == selection.tau.value
    assert selection.tau.value == pytest.approx(1.0, abs=0.4)
    assert selection.alpha is None, "there are no zero-shot logits"
    assert selection.calibration.loss_after < selection.calibration.loss_before
    assert selection.calibration.calibration_error_after < selection.calibration.calibration_error_before


def test_the_temperature_undoes_logits_that_are_too_large(tmp_path: Path, log: TrialLog) -> None:
    logits, targets = honest()
    selections = []
    for factor in (1, 5):
        write_logits(tmp_path, "t1", targets, last=factor * logits)
        selections.append(chosen(tmp_path, log))
    assert selections[0].adjustment.tau == selections[1].adjustment.tau == 0
    assert selections[1].adjustment.temperature == pytest.approx(5 * selections[0].adjustment.temperature, rel=0.02)


def test_a_temperature_that_few_rows_do_not_support_stays_at_1_and_the_line_says_why(
    tmp_path: Path, log: TrialLog
) -> None:
    """Two mistakes of a cosine classifier's large logits among fifteen rows would have asked for 20 or so."""
    targets = torch.arange(15) % NUM_CLASSES
    logits = 10.0 * torch.nn.functional.one_hot(targets, NUM_CLASSES)
    logits[:2] = 6 * logits[:2].roll(1, dims=1)
    write_logits(tmp_path, "t1", targets, last=logits)
    selection = chosen(tmp_path, log)
    assert selection.calibration.temperature > 10
    assert selection.adjustment.temperature == 1
    text = describe_post_hoc("winner", selection, [])
    assert "chosen on 15 rows of validation" in text
    assert "lowers the cross entropy and not the calibration error, so that it stays at 1; expected" in text
    error = f"{100 * selection.plain_error:.1f}"
    doubt = f"not calibrated: {NUM_CLASSES} classes with 1 to 3 validation images"
    assert text.endswith(f"{error} before and {error} after; {doubt}")


def test_a_gain_within_its_standard_error_is_not_taken(tmp_path: Path, log: TrialLog) -> None:
    """A model without bias: some tau is best by chance, and using it would be noise."""
    taken = []
    for seed in range(12):
        logits, targets = honest(seed)
        write_logits(tmp_path, "t1", targets, last=logits)
        selection = chosen(tmp_path, log)
        assert selection.tau.score >= dict(selection.tau.candidates)[0.0]
        assert (selection.adjustment.tau == 0) == (selection.tau.gain <= selection.tau.standard_error)
        taken.append(selection.adjustment.tau)
    assert taken.count(0.0) >= 9


def test_by_likelihood_tau_is_that_of_the_prior_and_its_gain_is_in_log_likelihood(
    tmp_path: Path, log: TrialLog
) -> None:
    logits, targets = honest()
    write_logits(tmp_path, "t1", targets, last=adjust_logits(logits, COUNTS, -1.0))
    write_logits(tmp_path, "b1", targets, best=honest(1)[0])
    selection = chosen(tmp_path, log, select_by="log_likelihood")
    assert selection.metric == LIKELIHOOD
    assert selection.adjustment.tau == pytest.approx(1.0, abs=0.15)
    assert selection.adjustment.alpha == pytest.approx(0.5, abs=0.15), "as much is known of either's noise"
    text = describe_post_hoc("winner", selection, [])
    assert re.search(r"tau of highest log-likelihood: tau \S+ gains 0\.\d{3} log-likelihood \(standard error 0\.", text)
    write_logits(tmp_path, "t1", targets, last=logits)
    assert chosen(tmp_path, log, select_by="log_likelihood").adjustment.tau == 0


def test_zero_shot_logits_are_mixed_in_where_they_know_more(tmp_path: Path, log: TrialLog) -> None:
    logits, targets = honest()
    blind = logits.clone()
    blind[:, 3:] = -9.0
    write_logits(tmp_path, "t1", targets, last=blind)
    write_logits(tmp_path, "b1", targets, best=honest(1)[0])
    selection = chosen(tmp_path, log)
    assert [value for value, _ in selection.alpha.candidates] == list(ALPHAS)
    assert selection.adjustment.alpha == selection.alpha.value > 0
    assert selection.alpha.score > selection.tau.score + 0.1


def test_zero_shot_logits_of_other_rows_or_of_a_tower_that_was_trained_are_not_mixed_in(
    tmp_path: Path, log: TrialLog
) -> None:
    logits, targets = honest()
    write_logits(tmp_path, "t1", targets, last=logits)
    write_logits(tmp_path, "b1", targets.flip(0), best=logits)
    assert chosen(tmp_path, log).alpha is None
    write_logits(tmp_path, "b1", targets, best=logits)
    assert chosen(tmp_path, log).alpha is not None
    assert chosen(tmp_path, log, refit(method="adapter")).alpha is None
    other_tower = refit(encoder={"name": "another"})
    assert chosen(tmp_path, log, other_tower).alpha is None


def test_it_is_chosen_by_the_sweeps_own_objective(tmp_path: Path, log: TrialLog) -> None:
    """Few-shot accuracy wants more adjustment than overall accuracy does."""
    logits, targets = honest(signal=1.0)
    rows = torch.cat([torch.where(targets == c)[0][: max(2, PER_CLASS >> (2 * c))] for c in range(NUM_CLASSES)])
    biased = adjust_logits(logits, COUNTS, -1.0)
    write_logits(tmp_path, "t1", targets[rows], last=biased[rows])
    overall = chosen(tmp_path, log, objective="val/top1_accuracy")
    few = chosen(tmp_path, log, objective="val/few_shot_accuracy")
    assert few.tau.value > overall.tau.value
    assert overall.metric == "top1_accuracy"
    predicted = adjust_logits(biased[rows].half(), COUNTS, overall.tau.value).argmax(dim=1)
    assert overall.tau.score == pytest.approx(float((predicted == targets[rows]).double().mean()))


def test_which_epochs_logits_a_refit_goes_by(tmp_path: Path, log: TrialLog) -> None:
    """A refit ends where its search's trial ended; a baseline's at its best epoch; a stopped trial has only that."""
    logits, targets = honest()
    biased = adjust_logits(logits, COUNTS, -1.0)
    write_logits(tmp_path, "t1", targets, best=logits, last=biased)
    assert chosen(tmp_path, log).tau.value > 0.5
    baseline = refit(kind="baseline", name="linear probe")
    assert chosen(tmp_path, log, baseline).tau.value < 0.5
    write_logits(tmp_path, "t1", targets, best=biased)
    assert chosen(tmp_path, log).tau.value > 0.5


def test_rows_without_logits_are_left_out(tmp_path: Path, log: TrialLog) -> None:
    logits, targets = honest()
    write_logits(tmp_path, "t1", targets, last=logits)
    whole = chosen(tmp_path, log)
    extended = torch.cat([logits, torch.full((3, NUM_CLASSES), torch.nan)])
    write_logits(tmp_path, "t1", torch.cat([targets, torch.zeros(3, dtype=torch.long)]), last=extended)
    assert chosen(tmp_path, log) == whole


def test_a_trial_without_logits_or_without_training_is_absent(tmp_path: Path, log: TrialLog) -> None:
    assert select_adjustments(str(tmp_path), [refit()], log, sweep_spec()) == {}
    logits, targets = honest()
    write_logits(tmp_path, "b1", targets, best=logits)
    zero_shot = refit("b1", "zero-shot", method="zero_shot", kind="baseline")
    assert select_adjustments(str(tmp_path), [zero_shot], log, sweep_spec()) == {}


def test_what_was_chosen_is_kept_with_all_that_was_tried(tmp_path: Path, log: TrialLog) -> None:
    logits, targets = honest()
    write_logits(tmp_path, "t1", targets, last=adjust_logits(logits, COUNTS, -1.0))
    write_logits(tmp_path, "b1", targets, best=logits)
    selection = chosen(tmp_path, log)
    write_post_hoc(str(tmp_path), {"winner": selection})
    assert read_adjustment(str(tmp_path), "winner") == selection.adjustment
    assert read_adjustment(str(tmp_path), "linear probe") is None
    assert read_adjustment(str(tmp_path / "nowhere"), "winner") is None
    written = json.loads((tmp_path / POST_HOC_FILE).read_text())["winner"]
    assert len(written["tau"]["tried"]) == len(TAUS)
    (tmp_path / POST_HOC_FILE).write_text("{")
    with pytest.raises(ImbvlmError, match=r"is damaged .* imbvlm sweep resume "):
        read_adjustment(str(tmp_path), "winner")


def test_the_lines_say_what_was_tried_what_it_gains_and_calibration_before_and_after(
    tmp_path: Path, log: TrialLog
) -> None:
    logits, targets = honest()
    write_logits(tmp_path, "t1", targets, last=adjust_logits(3 * logits, COUNTS, -3.0))
    selection = chosen(tmp_path, log)
    scored = []
    for seed, (before, after) in enumerate([(0.2, 0.04), (0.3, 0.06)]):
        trial = TrialRecord(trial_id=f"r{seed}", kind="refit", name="winner", config={})
        trial.epochs = [
            {"test/expected_calibration_error": before, "test_post_hoc/expected_calibration_error": after, "epoch": 1.0}
        ]
        scored.append(trial)
    text = describe_post_hoc("winner", selection, scored)
    assert "chosen on 200 rows of validation, winner" in text
    assert f"calibration: temperature {selection.calibration.temperature:.3g}; expected" in text
    assert f"tau of 31 values from -1 to 2: tau {selection.tau.value:g} gains" in text
    assert "points of balanced accuracy (standard error" in text
    assert "on test 25.0 before and 5.0 after" in text
    neutral = dataclasses.replace(selection, tau=dataclasses.replace(selection.tau, standard_error=1.0))
    assert "within its standard error 100.0, so that it stays at 0" in describe_post_hoc("winner", neutral, [])


def sweep_with_logits(tmp_path: Path, **fields: Any) -> tuple[str, TrialLog, SweepSpec]:
    """Of 24 trials and 2 baselines, each of which has left logits."""
    folder = write_sweep(tmp_path / "made", [120, 60, 30, 12, 5], refits=False, **fields)
    log = TrialLog.read(str(folder))
    (folder / "logits").mkdir()
    for trial_id in log.records:
        Path(logits_file(str(folder), trial_id)).write_bytes(b"logits")
    return str(folder), log, sweep_spec(**fields)


def with_logits(folder: str) -> set[str]:
    return {path.name.removesuffix(".safetensors") for path in Path(folder, "logits").iterdir()}


def test_of_ended_trials_the_baselines_and_the_best_few_keep_their_logits(tmp_path: Path) -> None:
    folder, log, spec = sweep_with_logits(tmp_path, select_by="objective")
    best = [record.trial_id for record in log.best(spec.objective)]
    # They go on, from what they have left.
    log.records[best[-1]].state, log.records[best[-2]].state, log.records[best[-3]].state = "running", "paused", "error"
    prune_logits(folder, log, spec)
    assert with_logits(folder) == {*best[:NUM_BEST], *best[-3:], "b00001", "b00002"}
    prune_logits(str(tmp_path / "nowhere"), log, spec)


def scale(record: TrialRecord, factor: float) -> None:
    name = "val/best_balanced_accuracy"
    record.epochs = [{**epoch, name: factor * epoch[name]} for epoch in record.epochs]


def test_logits_of_trials_that_are_refitted_or_run_again_stay(tmp_path: Path) -> None:
    """With fresh crops each method's best is refitted, and any of those with more seeds may be the winner."""
    folder, log, spec = sweep_with_logits(tmp_path, fresh_crops=True, confirm_trials=10, select_by="objective")
    best = list(log.best(spec.objective))
    second = next(record for record in best if record.config["method"] != best[0].config["method"])
    scale(second, 0.01)
    for record in best:
        if record.config["method"] == second.config["method"] and record is not second:
            scale(record, 0.001)
    prune_logits(folder, log, spec)
    assert len(with_logits(folder)) == 10 + 1 + 2
    assert second.trial_id in with_logits(folder)
    assert len(with_logits(folder)) <= max_logit_files(spec.resolve(), 0, 6)


def test_what_a_killed_writer_has_left_goes_when_no_trial_runs(tmp_path: Path) -> None:
    folder, log, spec = sweep_with_logits(tmp_path)
    begun = Path(folder, "logits", ".t00001.safetensors.x1y2")
    begun.write_bytes(b"log")
    prune_logits(folder, log, spec)
    assert begun.exists(), "a trial may be writing it"
    prune_logits(folder, log, spec, is_over=True)
    assert not begun.exists()


@pytest.mark.parametrize("has_groups", [False, True])
def test_a_file_takes_no_more_than_is_planned_for_it(tmp_path: Path, has_groups: bool) -> None:
    rows, classes = 500, 20
    val = SimpleNamespace(labels=np.zeros(rows, int), groups=np.arange(rows) if has_groups else None)
    stats = ClassStats.from_counts([9] * classes)
    data = SimpleNamespace(val=val, class_stats=stats, official=None)
    keeper = ValLogitsWriter.open(str(tmp_path / "l"), [data])
    keeper.keep(1, torch.zeros(rows, classes).half(), is_best=True, is_last=False)
    keeper.keep(2, torch.zeros(rows, classes).half(), is_best=False, is_last=True)
    header = 1000
    assert (tmp_path / "l").stat().st_size <= file_bytes(rows, classes, has_groups=has_groups) + header
    assert file_bytes(10**6, 1000) == 0, "so many are not kept"


# --------------------------------------------------------------------------------------------------- on the test split


def test_a_refit_scores_the_test_split_with_and_without_in_one_look(tmp_path: Path) -> None:
    features = tiny_features(tmp_path / "features")
    config = tiny_config("linear_probe")
    adjustment = PostHocAdjustment(tau=0.7, alpha=0.25, temperature=2.0)
    settings = TrialSettings(
        config=config,
        feature_set=features,
        objective="val/balanced_accuracy",
        score_test=True,
        model_folder=str(tmp_path / "model"),
        post_hoc=adjustment,
    )
    last = list(TrialSession(torch.device("cpu")).reports(settings))[-1].metrics
    plain = list(TrialSession(torch.device("cpu")).reports(dataclasses.replace(settings, post_hoc=None)))[-1].metrics
    assert {key: value for key, value in last.items() if key.startswith("test/")} == {
        key: value for key, value in plain.items() if key.startswith("test/")
    }
    assert not [key for key in plain if key.startswith("test_post_hoc/")]
    data = TrialData.open(config, features)
    test = TrialData.open_split(config, features, "test")
    index = np.arange(len(test))
    model = build_model(config, data.model_inputs, torch.device("cpu"))
    from imbvlm.training.checkpoint import load_model_tensors

    model.load_state_dict(load_model_tensors(str(tmp_path / "model")))
    with torch.no_grad():
        logits = model.eval()(test.batch("pooled", index, None).float())
        zero_shot = ZeroShotClassifier(data.class_embeddings, data.info.logit_scale)
        other = zero_shot(test.batch("image_embedding", index, None).float())
    expected = mix_logits(adjust_logits(logits, np.array(CLASS_COUNTS), 0.7), other, 0.25) / 2
    right = (expected.argmax(dim=1).numpy() == test.labels).mean()
    loss = torch.nn.functional.cross_entropy(expected, torch.from_numpy(test.labels))
    assert last["test_post_hoc/top1_accuracy"] == pytest.approx(right)
    assert last["test_post_hoc/loss"] == pytest.approx(float(loss), rel=1e-4)
    assert last["test_post_hoc/top1_accuracy"] != last["test/top1_accuracy"]
    assert "test_post_hoc/expected_calibration_error" in last
    assert "test_post_hoc/few_shot_accuracy" in last


# ------------------------------------------------------------------------------------------------------------- in use


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Encoder, TrialConfig, dict[str, torch.Tensor], torch.Tensor]:
    """A tower, a probe's configuration and weights on its pooled output, and some crops."""
    folder = tmp_path_factory.mktemp("tower")
    encoder = create_encoder(EncoderConfig(name=write_tower(folder, "vit")), EvalConfig())
    config = TrialConfig.from_tree(
        {**BASE, "method": "linear_probe", "encoder": {"name": encoder.info.name}, "classifier": {"kind": "linear"}}
    )
    torch.manual_seed(0)
    weights = {
        "classifier.weight": torch.randn(3, encoder.info.pooled_width),
        "classifier.bias": torch.zeros(3),
    }
    crops = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    return encoder, config, weights, crops


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_an_exported_models_probabilities_are_adjusted_and_its_logits_are_not(
    trained: tuple[Encoder, TrialConfig, dict[str, torch.Tensor], torch.Tensor], tmp_path: Path, alpha: float
) -> None:
    encoder, config, weights, crops = trained
    counts, embeddings = (90, 9, 1), torch.nn.functional.normalize(torch.randn(3, encoder.info.embedding_width), dim=1)
    step = predictor.LogitPostprocessor(PostHocAdjustment(1.2, alpha, 0.5), counts, embeddings if alpha else None)
    for name, post_hoc in (("plain", None), ("adjusted", step)):
        write_model(str(tmp_path / name), config, weights, encoder, ("a", "b", "c"), {}, post_hoc)
    plain, adjusted = (load(tmp_path / name, "cpu") for name in ("plain", "adjusted"))
    logits = plain.logits(crops)
    assert torch.equal(adjusted.logits(crops), logits)
    torch.testing.assert_close(plain.probabilities(crops), logits.softmax(dim=1))
    expected = adjust_logits(logits, np.array(counts), 1.2)
    if alpha:
        embedding = encoder.forward_images(crops).image_embedding.half().float()
        zero_shot = encoder.info.logit_scale * torch.nn.functional.normalize(embedding, dim=-1) @ embeddings.T
        expected = mix_logits(expected, zero_shot, alpha)
    torch.testing.assert_close(adjusted.probabilities(crops), (expected / 0.5).softmax(dim=1), atol=1e-5, rtol=1e-4)
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    (prediction,) = adjusted.predict([image], top=3)
    pixels = torch.from_numpy(encoder.preprocess.apply(image))[None]
    values, labels = adjusted.probabilities(pixels)[0].sort(descending=True)
    assert prediction.labels == tuple(labels.tolist())
    assert prediction.probabilities == pytest.approx(values.tolist(), abs=1e-6)
    description = json.loads((tmp_path / "adjusted" / "config.json").read_text())
    assert description["post_hoc"] == {"tau": 1.2, "alpha": alpha, "temperature": 0.5, "class_counts": [90, 9, 1]}


def test_a_temperature_alone_keeps_every_prediction() -> None:
    logits = torch.randn(9, 4)
    calibrated = PostHocAdjustment(temperature=3.0)
    torch.testing.assert_close(calibrated.apply(logits, torch.ones(4)), logits / 3)
    with pytest.raises(ImbvlmError, match="got none"):
        PostHocAdjustment(alpha=0.5).apply(logits, torch.ones(4))
