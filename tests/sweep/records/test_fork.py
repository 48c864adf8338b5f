"""Going on after a change: refused with what has changed, or forked with exactly the trials that are still valid."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from sweep_folder import SPACE, sweep_spec, write_sweep
from tiny_data import tiny_info
from tiny_images import image_manifest

import imbvlm
from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import with_column
from imbvlm.sweep.records.adjustment_selection import logits_file
from imbvlm.sweep.records.earlier_sweeps import select_fork_trials, write_fork
from imbvlm.sweep.records.provenance import (
    check_class_texts,
    check_encoder_weights,
    inputs_used,
    provenance,
    provenance_changes,
    write_provenance,
)
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.spec.sweep_spec import SweepSpec

CLASS_COUNTS = [200, 50, 8]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_sweep(tmp_path_factory.mktemp("source") / "made", CLASS_COUNTS))


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.read("embedded:fashion_mnist_lt")


def fork(source: str, spec: SweepSpec, changes: Sequence[str] = ()) -> tuple[set[str], Any]:
    chosen = select_fork_trials(source, spec.resolve(), list(changes))
    return {record.trial_id for record, _ in chosen.retained if record.kind == "search"}, chosen.rejected


def ids(source: str, **wanted: Any) -> set[str]:
    """Search trials whose draw has these values."""
    return {
        record.trial_id
        for record in TrialLog.read(source).of("search")
        if all(record.draw.get(key) == value for key, value in wanted.items())
    }


def test_a_larger_budget_keeps_every_trial(source: str) -> None:
    kept, _ = fork(source, sweep_spec(num_trials=48))
    assert kept == ids(source)


def test_a_choice_that_is_gone_takes_its_trials_along_and_no_other(source: str) -> None:
    parameters = {**SPACE["parameters"], "loss.name": {"choice": ["balanced_softmax", "focal"]}}
    kept, left = fork(source, sweep_spec(space={"parameters": parameters}))
    assert kept == ids(source, **{"loss.name": "balanced_softmax"})
    assert left["the space no longer has it"] == len(ids(source, **{"loss.name": "cross_entropy"}))


def test_another_base_keeps_none(source: str) -> None:
    spec = sweep_spec()
    base = {**spec.base, "train": {"num_epochs": 13}}
    kept, left = fork(source, sweep_spec(base=base))
    assert not kept
    assert left["the base gives it another configuration"] == 24


def test_another_scheduler_keeps_what_ran_to_its_end(source: str) -> None:
    states = Counter(record.state for record in TrialLog.read(source).of("search"))
    assert states["stopped"]
    kept, left = fork(source, sweep_spec(trial_scheduler={"name": "none"}))
    assert len(kept) == states["finished"]
    assert left["stopped by another rule"] == states["stopped"]


def test_other_code_keeps_nothing_and_says_so(source: str) -> None:
    kept, left = fork(source, sweep_spec(), ["imbvlm/longtail/losses.py has changed"])
    assert not kept
    assert set(left) == {"imbvlm/longtail/losses.py has changed"}


def test_a_fork_begins_with_records_and_logits_and_leaves_the_test_split_unread(source: str, tmp_path: Path) -> None:
    spec = sweep_spec(num_trials=48)
    Path(logits_file(source, "t00001")).parent.mkdir(exist_ok=True)
    Path(logits_file(source, "t00001")).write_bytes(b"logits")
    write_fork(select_fork_trials(source, spec.resolve(), []), source, str(tmp_path))
    log, before = TrialLog.read(str(tmp_path)), TrialLog.read(source)
    assert {key: log.records[key] for key in ids(source)} == {key: before.records[key] for key in ids(source)}
    assert not log.of("refit")
    assert Path(logits_file(str(tmp_path), "t00001")).read_bytes() == b"logits"


def test_changed_code_torch_and_data_are_named(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = provenance(manifest)
    write_provenance(str(tmp_path), found)
    assert provenance_changes(str(tmp_path), provenance(manifest)) == []
    assert "longtail/losses.py" in found["code"]
    assert "sweep/report/report_writer.py" not in found["code"]
    # Of a version that asked for more: only what has a part counts.
    write_provenance(str(tmp_path), {**found, "code": {**found["code"], "inference/batch_prediction.py": "0"}})
    assert provenance_changes(str(tmp_path), found) == []
    changed = json.loads(json.dumps(found))
    changed["code"]["longtail/losses.py"] = "0"
    del changed["code"]["longtail/metrics.py"]
    changed["torch"] = "1.0"
    changed["data"] = provenance(manifest.take(manifest.rows_of("train")))["data"]
    assert provenance_changes(str(tmp_path), changed) == [
        "imbvlm/longtail/losses.py has changed",
        "imbvlm/longtail/metrics.py is gone",
        f"torch was {found['torch']} and is 1.0",
        "the manifest's rows, labels, splits or groups have changed",
    ]
    (tmp_path / "package" / "longtail").mkdir(parents=True)
    (tmp_path / "package" / "longtail/losses.py").write_text("")
    monkeypatch.setattr(imbvlm, "__file__", str(tmp_path / "package" / "__init__.py"))
    assert "imbvlm/longtail/losses.py has changed" in provenance_changes(str(tmp_path), provenance(manifest))


def test_image_files_that_have_changed_are_said_and_moved_ones_are_the_same(tmp_path: Path) -> None:
    place = tmp_path / "images"
    manifest = Manifest.read(image_manifest(place, files=True))
    write_provenance(str(tmp_path), provenance(manifest))
    place.rename(tmp_path / "moved")
    assert provenance_changes(str(tmp_path), provenance(manifest)) == ["image files are gone, or have changed in size"]
    uris = [uri.replace(str(place), str(tmp_path / "moved")) for uri in manifest.table["uri"].to_pylist()]
    moved = dataclasses.replace(manifest, table=with_column(manifest.table, "uri", pa.array(uris)))
    assert provenance_changes(str(tmp_path), provenance(moved)) == []
    with open(tmp_path / "moved" / "0.png", "ab") as stream:
        stream.write(b"0")
    assert len(provenance_changes(str(tmp_path), provenance(moved))) == 1
    # Begun by a version that didn't look at them.
    write_provenance(str(tmp_path), {key: value for key, value in provenance(manifest).items() if key != "files"})
    assert provenance_changes(str(tmp_path), provenance(moved)) == []


def test_a_tower_with_other_weights_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    write_provenance(str(tmp_path), provenance(manifest))
    encoder, info = EncoderConfig(name="local-dir:mine"), tiny_info()
    check_encoder_weights(str(tmp_path), encoder, info)
    check_encoder_weights(str(tmp_path), encoder, info)
    check_encoder_weights(str(tmp_path), EncoderConfig(name="local-dir:another"), info)
    with pytest.raises(ConfigError, match="weights of the encoder local-dir:mine are not those that the sweep began"):
        check_encoder_weights(str(tmp_path), encoder, dataclasses.replace(info, weights_fingerprint="other"))
    assert inputs_used(str(tmp_path))["towers"] == dict.fromkeys(("local-dir:mine", "local-dir:another"), "tiny")
    published, of_hub = EncoderConfig(name="hf-hub:org/repo"), dataclasses.replace(info, revision="abc")
    check_encoder_weights(str(tmp_path), published, of_hub)
    assert inputs_used(str(tmp_path))["revisions"] == {"hf-hub:org/repo": "abc"}
    moved = dataclasses.replace(of_hub, weights_fingerprint="other", revision="def")
    with pytest.raises(ConfigError, match="not those that the sweep began with: revision abc of the hub"):
        check_encoder_weights(str(tmp_path), published, moved)
    assert provenance_changes(str(tmp_path), provenance(manifest)) == []


def test_other_class_texts_are_refused(tmp_path: Path, manifest: Manifest) -> None:
    write_provenance(str(tmp_path), provenance(manifest))
    path = tmp_path / "texts.json"
    path.write_text('{"ant": ["an insect"]}')
    tree = {"method": "zero_shot", "data": {"manifest": "m.parquet"}, "encoder": {"name": "tinylit_lite0"}}
    config = TrialConfig.from_tree({**tree, "prompts": {"texts": str(path)}})
    check_class_texts(str(tmp_path), config)
    path.write_text('{"ant": ["a bee"]}')
    for keep in (True, False):
        with pytest.raises(ConfigError, match="is not the file of class texts that the sweep began with"):
            check_class_texts(str(tmp_path), config, keep=keep)
    assert [*inputs_used(str(tmp_path))["texts"]] == [str(path)]
    assert provenance_changes(str(tmp_path), provenance(manifest)) == []


def test_a_damaged_or_missing_file_is_said(tmp_path: Path, manifest: Manifest) -> None:
    found = provenance(manifest)
    (change,) = provenance_changes(str(tmp_path), found)
    assert "provenance.json is gone" in change
    (tmp_path / "provenance.json").write_text("{")
    with pytest.raises(ImbvlmError, match="is damaged"):
        provenance_changes(str(tmp_path), found)
