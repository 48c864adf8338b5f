"""Files that somebody else may have made: none of them runs code, writes outside its folder or exhausts memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from apart import apart_with_ray
from exported_model import write_model_folder
from listening import LOOPBACK
from safetensors.torch import load_file, save_file
from sweep_folder import write_sweep
from towers import write_tower

from imbvlm.assets import encoder_path
from imbvlm.base.errors import ImbvlmError
from imbvlm.cli.cluster_file_check import check_cluster_file
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.decoding import ImageError, decode, fetch
from imbvlm.data.manifest import Manifest, ManifestError, label_rows
from imbvlm.data.sources.table_files import from_table
from imbvlm.data.sources.webdataset import from_shards
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import StoreError, StoreLayout
from imbvlm.features.stored_split import StoredSplit
from imbvlm.inference.model_folder import load
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.models.encoders.open_clip_names import CONFIG_FILE
from imbvlm.sweep.records.adjustment_selection import read_adjustment
from imbvlm.sweep.records.provenance import provenance_changes
from imbvlm.sweep.records.sweep_folder import SweepState, sweeps_under
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.checkpoint import TrialState, load_checkpoint, load_model_tensors, save_checkpoint
from imbvlm.training.validation_logits import read_logits

CLASS_COUNTS = [200, 50, 8]


class Hostile:
    """What a pickle of it does when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.mark)!r}, 'w')",))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once hostile code has run."""
    return tmp_path / "ran"


@pytest.fixture(params=["pickle", "torch"])
def hostile(request: pytest.FixtureRequest, mark: Path) -> bytes:
    if request.param == "pickle":
        return pickle.dumps(Hostile(mark))
    stream = io.BytesIO()
    torch.save({"model": Hostile(mark)}, stream)
    return stream.getvalue()


def test_the_pickles_of_these_tests_do_run_code(hostile: bytes, mark: Path, tmp_path: Path) -> None:
    (tmp_path / "hostile.pt").write_bytes(hostile)
    try:
        pickle.loads(hostile)
    except pickle.UnpicklingError:
        torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert mark.exists()


def refused(read: Callable[..., Any], *arguments: object) -> None:
    """It raises our own error, or finds nothing."""
    with suppress(ImbvlmError, ValueError, OSError):
        assert read(*arguments) is None


def test_no_reader_of_results_models_and_state_unpickles(hostile: bytes, mark: Path, tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path / "checkpoint"), TrialState({"w": torch.ones(2)}, {"epoch": 1}))
    for path in (tmp_path / "checkpoint").iterdir():
        path.write_bytes(hostile)
    refused(load_checkpoint, str(tmp_path / "checkpoint"))
    for name in ("model.safetensors", "config.json", "store.json", "trials/t00001.json", "sweep.yaml", "post_hoc.json",
                 "provenance.json", "results.parquet", "logits.safetensors"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(hostile)
    folder = str(tmp_path)
    refused(load_model_tensors, folder)
    refused(load, folder)
    refused(FeatureStore.open, folder)
    refused(TrialLog.read, folder)
    refused(SweepState.read, folder)
    refused(read_adjustment, folder, "winner")
    refused(provenance_changes, folder, {"code": {}, "torch": "", "data": ""})
    refused(read_logits, str(tmp_path / "logits.safetensors"))
    refused(Manifest.read, str(tmp_path / "results.parquet"))
    refused(TrialConfig.from_yaml, tmp_path / "sweep.yaml")
    refused(SweepSpec.from_yaml, tmp_path / "sweep.yaml")
    assert not mark.exists()


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A folder with the description of a tower that somebody else may have made."""
    (tmp_path / "tower").mkdir()
    shutil.copy(encoder_path("tinylit-lite0") / CONFIG_FILE, tmp_path / "tower")
    return tmp_path / "tower"


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_weights_of_a_tower_are_not_unpickled(tower: Path, name: str, hostile: bytes, mark: Path) -> None:
    (tower / name).write_bytes(hostile)
    # As large as its weights would be, or nobody would look into it.
    os.truncate(tower / name, 2**28)
    with pytest.raises(ImbvlmError, match="can't load the encoder"):
        create_encoder(EncoderConfig(name=f"local-dir:{tower}", image_size=64), EvalConfig())
    assert not mark.exists()


def test_a_tower_whose_tokenizer_would_run_code_is_refused(tower: Path) -> None:
    description = json.loads((tower / CONFIG_FILE).read_text())
    for value in (True, "true"):
        description["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": value}
        (tower / CONFIG_FILE).write_text(json.dumps(description))
        with pytest.raises(ImbvlmError, match="sets trust_remote_code"):
            resolve_encoder(EncoderConfig(name=f"local-dir:{tower}"))


@pytest.mark.parametrize(
    ("side", "change", "sentence"),
    [
        ("text_cfg", {"layers": 10**9}, "asks for 1,000,000,000 layers; at most 1,000"),
        ("text_cfg", {"width": 10**6}, "its weights have 1,000,000 bytes; they don't belong together"),
        # The mask of its attention is no weight, and takes the square of it.
        ("text_cfg", {"context_length": 10**6}, "asks for 1,0.* numbers, and its weights have 1,000,000 bytes"),
        ("vision_cfg", {"image_size": 10**6}, "takes images of 1,000,000 px, and 1 to 2,048 can be used"),
    ],
)
def test_a_tower_that_asks_for_more_than_its_weights_hold_is_refused_before_it_is_built(
    tmp_path: Path, side: str, change: dict[str, int], sentence: str
) -> None:
    name = write_tower(tmp_path / "tower", "vit")
    file = tmp_path / "tower" / CONFIG_FILE
    description = json.loads(file.read_text())
    description["model_cfg"][side] |= change
    file.write_text(json.dumps(description))
    os.truncate(tmp_path / "tower" / "open_clip_model.safetensors", 10**6)
    for read in (describe_encoder, lambda config: create_encoder(config, EvalConfig())):
        with pytest.raises(ImbvlmError, match=sentence):
            read(EncoderConfig(name=name))


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        ("vision_cfg", {"head_width": 0}, "division"),
        ("vision_cfg", {"patch_size": 0}, "division"),
        ("vision_cfg", {"image_size": -32}, "takes images of -32 px"),
        ("preprocess_cfg", {"mean": [0.5]}, r"mean must be three numbers, got \[0\.5\]"),
        ("preprocess_cfg", {"std": "abc"}, "std must be three numbers, got 'abc'"),
        ("preprocess_cfg", {"std": [0.2, 0.0, 0.2]}, "std must be above 0"),
        ("preprocess_cfg", {"std": [float("inf")] * 3}, "std must be three numbers"),
    ],
)
def test_a_tower_whose_description_makes_no_sense_is_refused(
    tmp_path: Path, section: str, change: dict[str, Any], says: str
) -> None:
    name, path = write_tower(tmp_path / "tower", "vit"), tmp_path / "tower" / CONFIG_FILE
    description = json.loads(path.read_text())
    {**description, **description["model_cfg"]}[section].update(change)
    path.write_text(json.dumps(description))
    for attempt in (describe_encoder, lambda config: create_encoder(config, EvalConfig())):
        with pytest.raises(ImbvlmError, match=says):
            attempt(EncoderConfig(name=name))


@pytest.mark.parametrize("tensor", ["visual.trunk.bn1.running_var", "visual.head.proj.weight", "logit_scale"])
def test_a_tower_with_numbers_that_are_not_finite_is_refused(tmp_path: Path, tensor: str) -> None:
    """Also where a hostile folder of a model states the digests of just these weights."""
    folder = write_model_folder(tmp_path, "timm_efficientnet")
    path = folder / "tower" / "open_clip_model.safetensors"
    tensors = load_file(path)
    tensors[tensor].view(-1)[0] = float("nan")
    save_file(tensors, path)
    for attempt in (
        lambda: load(folder, "cpu"),
        lambda: create_encoder(EncoderConfig(name=f"local-dir:{folder / 'tower'}"), EvalConfig()),
    ):
        with pytest.raises(ImbvlmError, match=rf"has numbers that aren't finite in {tensor}, so that its outputs"):
            attempt()


def test_class_embeddings_of_another_encoder_are_refused(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    save_file({"class_embeddings": torch.zeros(3, 2)}, folder / "zero_shot.safetensors")
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**description, "digests": {}}))
    with pytest.raises(ImbvlmError, match=r"has 3 x 2 numbers, and there are 3 classes in 24 dimensions"):
        load(folder, "cpu")


def test_a_column_that_ray_data_would_unpickle_is_not_read(mark: Path, tmp_path: Path) -> None:
    """Parquet and Arrow files choose their columns' types, and Ray Data registers one whose values are pickles."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    def column(num_rows: int) -> pa.Array:
        return kind.wrap_array(pa.array([pickle.dumps(Hostile(mark))] * num_rows, kind.storage_type))

    kind = ArrowPythonObjectType()
    with suppress(TypeError):
        column(1).to_pylist()
    assert mark.exists()
    mark.unlink()
    plain = {"uri": ["a.png", "b.png"], "label": [0, 1], "split": ["train", "train"]}
    metadata = {b"imbvlm": json.dumps({"class_names": ["a", "b"]}).encode()}
    path = tmp_path / "hostile.parquet"
    for name in ("uri", "bytes", "label", "split", "content", "group"):
        pq.write_table(pa.table({**plain, name: column(2)}).replace_schema_metadata(metadata), path)
        for read in (Manifest.read, label_rows) if name != "bytes" else (Manifest.read,):
            with pytest.raises(ManifestError, match=f"the column '{name}' isn't read: .* may run code"):
                read(str(path))
    image = pa.StructArray.from_arrays([column(2), pa.array(["a", "b"])], ["bytes", "path"])
    pq.write_table(pa.table({"image": image, "label": [0, 1]}), path)
    with pytest.raises(ManifestError, match="the column 'image' isn't read"):
        from_table([str(path)], str(tmp_path), "hostile")
    store = FeatureStore.create(str(tmp_path / "store"), StoreLayout("0" * 24, "float32", {"pooled": (3,)}))
    values, contents = np.ones((2, 3), np.float32), np.arange(32, dtype=np.uint8).reshape(2, 16)
    shard = store.shard_path("pooled", store.append("pooled", contents, np.zeros(2, int), values, [None, "damaged"]))
    batch = pa.ipc.open_file(Path(shard).read_bytes()).get_batch(0)
    split = StoredSplit.open(store.write_split(contents, 1, ("pooled",)))
    assert split.quarantine[0].reason == "damaged"
    columns = [column(2) if name == "reason" else batch.column(name) for name in batch.schema.names]
    hostile = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
    with pa.ipc.new_file(shard, hostile.schema) as writer:
        writer.write_batch(hostile)
    with pytest.raises(StoreError, match="may run code"):
        split.gather("pooled", np.array([0]))
    assert store.damaged("pooled") == [Path(shard).name]
    (index,) = (tmp_path / "store" / "pooled").glob("*.index")
    pq.write_table(pa.table({"key": column(2), "shard": [0, 0], "entry": [0, 1], "reason": ["", ""]}), index)
    assert not len(FeatureStore.open(store.folder).index("pooled").keys)
    Path(split.path).write_bytes(b"")
    refused(StoredSplit.open, split.path)
    assert not mark.exists()


@pytest.mark.parametrize("read", [TrialConfig.from_yaml, SweepSpec.from_yaml, check_cluster_file])
def test_yaml_tags_run_nothing(read: Callable[..., Any], mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    for tag in ("object/apply:exec", "object/new:exec", "name:os.system"):
        path.write_text(f"name: !!python/{tag} [\"open('{mark}', 'w')\"]\n")
        with pytest.raises(ImbvlmError):
            read(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["hf-hub:org/repo", "hf_hub:org/repo", "local-dir:/elsewhere", "https://host/x", "a/b", "", 7]
)
def test_a_tower_in_a_folder_names_no_place_for_timm_to_fetch_it_from(tmp_path: Path, name: str | int) -> None:
    path = tmp_path / "tower" / CONFIG_FILE
    tower = write_tower(tmp_path / "tower", "timm_vit")
    description = json.loads(path.read_text())
    description["model_cfg"]["vision_cfg"]["timm_model_name"] = name
    path.write_text(json.dumps(description))
    with pytest.raises(ImbvlmError, match="has the plain name of an architecture of timm"):
        resolve_encoder(EncoderConfig(name=tower))


def test_a_model_folder_is_loaded_without_a_request_whatever_its_text_side_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text tower and a tokenizer of the hub aren't needed to classify images, so they aren't built."""
    folder = write_model_folder(tmp_path)
    path = folder / "tower" / CONFIG_FILE
    description = json.loads(path.read_text())
    hub = {"hf_model_name": "org/repo", "hf_tokenizer_name": "org/repo", "hf_proj_type": "mlp"}
    description["model_cfg"]["text_cfg"] = hub
    path.write_text(json.dumps(description))

    def asked(*given: Any, **named: Any) -> None:
        pytest.fail(f"a request was made: {given}")

    monkeypatch.setattr("socket.getaddrinfo", asked)
    monkeypatch.setattr("socket.socket.connect", asked)
    # As if it were installed: it would ask the hub for the model.
    monkeypatch.setattr("imbvlm.models.encoders.open_clip_text.require_transformers", lambda *given: None)
    monkeypatch.setattr("imbvlm.models.encoders.open_clip_encoder.require_transformers", lambda *given: None)
    monkeypatch.setattr("open_clip.hf_model.HFTextEncoder.__init__", asked)
    (found,) = load(folder, "cpu").predict([np.zeros((40, 40, 3), np.uint8)])
    assert found.error is None


def write_evil(path: Path, mark: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"open({str(mark)!r}, 'w')\n")
    return path.read_bytes()


@pytest.mark.parametrize("listed", ["evil.py", "../evil.py", "evil", 3])
def test_a_model_folder_does_not_run_the_plug_in_that_it_brings(tmp_path: Path, mark: Path, listed: str | int) -> None:
    folder = write_model_folder(tmp_path)
    code = write_evil(folder / "plugins" / "evil.py", mark)
    for name in ("evil.py", "plugins/evil/__init__.py", "../evil.py"):
        write_evil(folder / name, mark)
    path = folder / "config.json"
    description = json.loads(path.read_text())
    description["plugins"] = {str(listed): hashlib.sha256(code).hexdigest() if isinstance(listed, str) else listed}
    for method in ("linear_probe", "evil"):
        path.write_text(json.dumps({**description, "config": {**description["config"], "method": method}}))
        with pytest.raises(ImbvlmError, match=r"evil|no plug-in's name"):
            load(folder, "cpu")
    assert not mark.exists()


def test_a_sweeps_folder_does_not_run_the_plug_in_that_it_brings(tmp_path: Path, mark: Path) -> None:
    folder = write_sweep(tmp_path / "made", CLASS_COUNTS, num_trials=2)
    code = write_evil(folder / "plugins" / "evil.py", mark)
    spec = (folder / "sweep.yaml").read_text()
    (folder / "sweep.yaml").write_text(spec.replace("plugins: []", f"plugins: ['{folder / 'plugins' / 'evil.py'}']"))
    assert SweepState.read(str(folder)).spec.plugins == []
    assert SweepSpec.from_yaml(folder / "sweep.yaml").plugins == [str(folder / "plugins" / "evil.py")]
    origin = {"code": {}, "torch": "", "data": "", "plugins": {"evil.py": hashlib.sha256(code).hexdigest()}}
    (folder / "provenance.json").write_text(json.dumps(origin))
    with pytest.raises(ImbvlmError, match=r"needs the plug-in evil.py, and its code runs only where you name it"):
        SweepState.read(str(folder))
    assert [state.folder for state in sweeps_under(str(tmp_path))[0]] == [str(folder)]
    (folder / "provenance.json").write_text(json.dumps({**origin, "plugins": {"../plugins/evil.py": "0"}}))
    with pytest.raises(ImbvlmError, match=r"is no plug-in's name"):
        SweepState.read(str(folder))
    assert not mark.exists()


def test_a_description_nested_without_end_or_too_large_is_refused(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    for name in ("config.json", f"tower/{CONFIG_FILE}"):
        whole = (folder / name).read_bytes()
        for content in (b"[" * 200_000, b'{"format": 2, "config": ' + b"[" * 200_000):
            (folder / name).write_bytes(content)
            with pytest.raises(ImbvlmError, match="nested too deeply"):
                load(folder, "cpu")
        os.truncate(folder / name, 65_000_000)
        with pytest.raises(ImbvlmError, match=r"has 65\.0 MB, and at most 64\.0 MB are read"):
            load(folder, "cpu")
        (folder / name).write_bytes(whole)
    # Not as deep as Python can go, and deeper than a configuration is.
    description = json.loads(whole_description := (folder / "config.json").read_text())
    for key in ("config", "class_names", "post_hoc", "preprocess", "encoder", "digests"):
        deep = json.dumps({**description, key: 0}).replace(f'"{key}": 0', f'"{key}": {"[" * 900}{"]" * 900}')
        (folder / "config.json").write_text(deep)
        with pytest.raises(ImbvlmError):
            load(folder, "cpu")
    (folder / "config.json").write_text(whole_description)
    load(folder, "cpu")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "zero_shot.safetensors", f"tower/{CONFIG_FILE}",
             "tower/open_clip_model.safetensors"],
)  # fmt: skip
def test_a_pipe_or_a_device_in_the_place_of_a_models_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = write_model_folder(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ImbvlmError, match=f"{name}.* is (a pipe or a device|no file)"):
        load(folder, "cpu")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ImbvlmError, match=f"{name}.* is (a pipe or a device|no file)"):
        load(folder, "cpu")


def test_a_description_that_asks_for_more_than_its_weights_hold_takes_no_memory(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    description = json.loads((folder / "config.json").read_text())
    names = [f"class {number}" for number in range(100_000)]
    post_hoc = {**description["post_hoc"], "alpha": 0, "class_counts": [1] * len(names)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for change in (
        {"class_names": names, "post_hoc": None},
        {"class_names": names, "post_hoc": post_hoc},
        {"config": {**description["config"], "method": "decoder", "decoder": {"depth": 1, "width": 100_000}}},
    ):
        (folder / "config.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(ImbvlmError, match=r"the exported weights don't fit their configuration .* should be of"):
            load(folder, "cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize("read", [TrialConfig.from_yaml, SweepSpec.from_yaml, check_cluster_file])
@pytest.mark.parametrize("text", [LAUGHS, "a: &a [*a]\n", "[" * 100_000])
def test_yaml_that_grows_is_refused_at_once(read: Callable[..., Any], text: str, tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ImbvlmError):
        read(tmp_path / "bomb.yaml")


def test_a_record_and_an_index_name_no_file_outside_their_folder(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "made", CLASS_COUNTS, num_trials=2)
    record = json.loads((sweep / "trials" / "t00001.json").read_text())
    (sweep / "trials" / "t00001.json").write_text(json.dumps({**record, "trial_id": "../../outside"}))
    with pytest.raises(ImbvlmError, match="is the record of"):
        TrialLog.read(str(sweep))
    save_checkpoint(str(tmp_path / "checkpoint"), TrialState({"w": torch.ones(2)}, {"epoch": 1}))
    index = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    (tmp_path / "checkpoint" / "state.json").write_text(json.dumps({**index, "tensors_file": "../../secret"}))
    with pytest.raises(ImbvlmError, match="not one of its files"):
        load_checkpoint(str(tmp_path / "checkpoint"))


def bomb_png(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that would be width x height bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000, 9))


def test_an_image_bomb_is_a_bad_row_and_takes_no_memory() -> None:
    bombs = [bomb_png(100_000, 100_000), bomb_png(65_000, 40_000)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in bombs:
        with pytest.raises(ImageError):
            decode(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_a_row_that_names_a_device_a_pipe_or_a_vast_part_of_a_file_is_a_bad_row(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", "/dev/null", str(tmp_path / "pipe")):
        for uri in (path, f"file://{path}", f"{path}#bytes=0+1000"):
            with pytest.raises(ImageError, match="a device or a pipe, not a file"):
                fetch(uri, None)
    (tmp_path / "small").write_bytes(b"0123456789")
    for offset, length, found in ((3, 10**15, b"3456789"), (3, 10**30, b"3456789"), (10**30, 5, b"")):
        assert fetch(f"{tmp_path}/small#bytes={offset}+{length}", None) == found


def test_a_vast_label_in_a_small_tar_is_not_read(tmp_path: Path) -> None:
    path, member = tmp_path / "train.tar", tarfile.TarInfo("a.json")
    member.size = 10**12
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ManifestError, match=r"a\.json has 1,000,000,000,000 bytes, too many for a label"):
        from_shards([str(path)], "hostile")


def test_a_manifest_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    rows = 200_000
    same = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array(["x" * 100_000]))
    label, split = np.zeros(rows, np.int32), ["train"] * rows
    for kept in (True, False):
        path = tmp_path / f"{kept}.parquet"
        pq.write_table(pa.table({"uri": same, "label": label, "split": split}), path, store_schema=kept)
        assert path.stat().st_size < 1_000_000
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ManifestError, match=r"more than 1\.0 GB in memory"):
            Manifest.read(str(path))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3_000_000


LISTENING = """
import json
from listening import listening
from imbvlm.ray_runtime.connection import ray_session
with ray_session() as cluster:
    print(json.dumps([cluster.dashboard, listening()]))
"""


@pytest.mark.slow
def test_a_cluster_that_a_sweep_starts_listens_on_loopback_alone(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with apart_with_ray(tmp_path) as there:
        done = subprocess.run(
            there.command(sys.executable, "-c", LISTENING),
            env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": path},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dashboard, found = json.loads(done.stdout.splitlines()[-1])
    assert dashboard.startswith("http://127.0.0.1:")
    assert len(found) > 5
    assert [one for one in found if one[0] not in LOOPBACK] == []
