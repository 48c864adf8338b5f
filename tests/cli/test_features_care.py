"""`imbvlm features list` and `prune`: what is shown, and that only what nobody needs goes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_stores import append

from imbvlm.cli.app import main
from imbvlm.cli.features_care import prune
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import digest_of
from imbvlm.features.entry_index import entry_keys
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.known_files import record_files
from imbvlm.features.store_layout import StoreLayout
from imbvlm.features.stored_split import StoredSplit
from imbvlm.sweep.records.folder_lease import folder_lease

LAYOUT = StoreLayout(
    "a" * 24, "float16", {"tokens": (3, 4), "pooled": (4,)}, True, "tiny", {"image_size": 64, "resize": 1.0}
)
NUM_ROWS, NUM_VIEWS = 9, 2
IMAGES = [f"image {row}".encode() for row in range(NUM_ROWS)]
CONTENTS = np.frombuffer(b"".join(map(digest_of, IMAGES)), np.uint8).reshape(NUM_ROWS, 16)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Nine images in shards of four."""
    store = FeatureStore.create(str(tmp_path / "features" / LAYOUT.digest), LAYOUT)
    generator = np.random.default_rng(0)
    for output, shape in LAYOUT.shapes.items():
        values = generator.normal(size=(NUM_ROWS, NUM_VIEWS, *shape)).astype(np.float16)
        for start in range(0, NUM_ROWS, 4):
            append(store, output, CONTENTS[start : start + 4], values[start : start + 4])
    return store


@pytest.fixture(autouse=True)
def no_time_has_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imbvlm.cli.features_care.MIN_AGE_SECONDS", -10.0)


def write_manifest(path: Path, rows: list[int]) -> None:
    columns = {"bytes": [IMAGES[row] for row in rows], "label": [0] * len(rows), "split": ["train"] * len(rows)}
    Manifest.build(pa.table(columns), ["one"], "images").write(str(path))


def rows_in(store: FeatureStore) -> list[int]:
    positions = [store.index(output, full=True).find(entry_keys(CONTENTS, NUM_VIEWS)) for output in LAYOUT.shapes]
    return np.flatnonzero((np.stack(positions) >= 0).all(axis=(0, 2))).tolist()


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["features", *arguments])
    assert ended.value.code == 0


def test_stores_are_listed_with_what_they_hold_and_who_reads_them(
    store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.record_use("m.parquet", None)
    store.record_use("m.parquet", "runs/emoji-20261124-120000")
    run("list", str(Path(store.folder).parent), "--json")
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["encoder"] == "tiny"
    assert (listed["image_size"], listed["num_images"], listed["outputs"]) == (64, NUM_ROWS, ["tokens", "pooled"])
    assert listed["num_bytes"] == sum(path.stat().st_size for path in Path(store.folder).rglob("*.arrow"))
    assert listed["sweeps"] == ["runs/emoji-20261124-120000"]
    assert listed["last_used"] == store.uses()[-1].at
    run("list", store.folder)
    assert "emoji-20261124-120000" in capsys.readouterr().out


def test_images_without_a_manifest_are_shown_and_go_only_with_delete(
    store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    write_manifest(tmp_path / "data" / "deep" / "m.parquet", [0, 1, 2, 5])
    (tmp_path / "data" / "other.parquet").write_bytes((tmp_path / "data" / "deep" / "m.parquet").read_bytes())
    before = StoredSplit.open(store.write_split(CONTENTS[[0, 1, 2, 5]], NUM_VIEWS, ("tokens", "pooled")))
    expected = {output: before.gather(output, np.arange(4)).numpy() for output in LAYOUT.shapes}
    run("prune", str(tmp_path / "features"), "--manifests", str(tmp_path / "data"))
    printed = capsys.readouterr().out
    assert "5 images, 0.2 kB, to prune with --delete" in printed
    assert rows_in(store) == list(range(NUM_ROWS))
    run("prune", str(tmp_path / "features"), "--manifests", str(tmp_path / "data"), "--delete")
    assert "5 images, 0.2 kB, pruned" in capsys.readouterr().out
    assert rows_in(store) == [0, 1, 2, 5]
    after = StoredSplit.open(store.write_split(CONTENTS[[0, 1, 2, 5]], NUM_VIEWS, ("tokens", "pooled")))
    for output, values in expected.items():
        assert np.array_equal(after.gather(output, np.arange(4)).numpy(), values), "quantized rows keep their scale"
    run("prune", str(tmp_path / "features"), "--manifests", str(tmp_path / "data"), "--delete")
    assert "nothing to prune" in capsys.readouterr().out


def test_what_is_young_or_of_a_running_sweep_stays(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    write_manifest(tmp_path / "data" / "m.parquet", [0])
    sweep = tmp_path / "runs" / "sweep"
    sweep.mkdir(parents=True)
    store.record_use("m.parquet", str(sweep))

    def pruned() -> str:
        return prune(str(tmp_path / "features"), str(tmp_path / "data"), delete=True)[-1]

    with folder_lease(str(sweep), lambda text: None):
        assert f"is left alone, because {sweep} runs" in pruned()
    monkeypatch.setattr("imbvlm.cli.features_care.MIN_AGE_SECONDS", 86_400.0)
    assert "nothing to prune" in pruned()
    assert rows_in(store) == list(range(NUM_ROWS))
    monkeypatch.setattr("imbvlm.cli.features_care.MIN_AGE_SECONDS", -10.0)
    assert "8 images" in pruned()
    assert rows_in(store) == [0]


def test_files_that_are_out_of_reach_still_count(store: FeatureStore, tmp_path: Path) -> None:
    """A disk that isn't mounted must not cost its features."""
    uris = [f"/not/mounted/{row}.png" for row in range(3)]
    record_files(str(tmp_path / "features"), pa.chunked_array([pa.array(uris, pa.large_string())]),
                 np.full((3, 2), 5), CONTENTS[:3])  # fmt: skip
    (tmp_path / "data").mkdir()
    table = pa.table({"uri": uris, "label": [0] * 3, "split": ["train"] * 3})
    Manifest.build(table, ["one"], "away").write(str(tmp_path / "data" / "m.parquet"))
    prune(str(tmp_path / "features"), str(tmp_path / "data"), delete=True)
    assert rows_in(store) == [0, 1, 2]
