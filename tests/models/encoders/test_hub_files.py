"""Encoders of the hub, from a small hub on loopback: what is fetched, what is cached, and what is refused, and how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, use_hub
from towers import write_tower

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.plugin_files import use_plugins
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.models.encoders.encoder_registry import has_text, resolve_encoder
from imbvlm.models.encoders.encoder_source import Origin
from imbvlm.models.encoders.hub_files import HubFile
from imbvlm.models.encoders.open_clip_text import tokenizer_folder

WEIGHTS = "open_clip_model.safetensors"
FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    for kind in ("vit", "timm_siglip", "image_only_vit"):
        write_tower(root / kind, kind)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with use_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def load(name: str) -> Encoder:
    return create_encoder(EncoderConfig(name=name), EvalConfig())


@pytest.mark.parametrize("kind", ["vit", "timm_siglip", "image_only_vit"])
def test_a_repository_is_the_encoder_of_its_files(hub: Hub, towers: dict[str, Path], kind: str) -> None:
    hub.add("org/repo", towers[kind])
    encoder, local = load("hf-hub:org/repo"), load(f"local-dir:{towers[kind]}")
    assert encoder.info.weights_fingerprint == local.info.weights_fingerprint
    assert encoder.preprocess == local.preprocess
    assert (encoder.info.name, encoder.info.revision, local.info.revision) == ("hf-hub:org/repo", FIRST, "")
    assert has_text(EncoderConfig(name="hf-hub:org/repo")) == (kind != "image_only_vit")
    crops = torch.randint(0, 256, (1, 3, *[encoder.info.image_size] * 2), dtype=torch.uint8)
    assert torch.equal(encoder.forward_images(crops).pooled, local.forward_images(crops).pooled)


def test_a_description_fetches_no_weights(hub: Hub, towers: dict[str, Path]) -> None:
    hub.add("org/repo", towers["vit"])
    assert describe_encoder(EncoderConfig(name="hf-hub:org/repo")).shapes["tokens"] == (17, 32)
    assert not any(WEIGHTS in request for request in hub.requests)
    state = resolve_encoder(EncoderConfig(name="hf-hub:org/repo")).weights_state()
    assert (state.present, state.address, state.problem, state.fix) == (False, f"{hub.endpoint}/org/repo", None, "")


def test_what_is_cached_is_used_without_a_request(
    hub: Hub, towers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/repo", towers["vit"])
    first = load("hf-hub:org/repo").info
    hub.requests.clear()
    assert load("hf-hub:org/repo").info == first
    assert hub.requests == []
    # What main was when it was fetched stays, also once it moves.
    hub.add("org/repo", towers["timm_siglip"], SECOND)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load("hf-hub:org/repo").info == first
    assert resolve_encoder(EncoderConfig(name="hf-hub:org/repo")).weights_state().present


def test_a_revision_is_what_it_was(hub: Hub, towers: dict[str, Path]) -> None:
    hub.add("org/repo", towers["vit"])
    hub.add("org/repo", towers["timm_siglip"], SECOND)
    main, earlier = load("hf-hub:org/repo").info, load(f"hf-hub:org/repo@{FIRST}").info
    assert (main.revision, earlier.revision) == (SECOND, FIRST)
    assert main.num_tokens != earlier.num_tokens
    with pytest.raises(ImbvlmError, match=r"open_clip_config\.json of org/repo at v9, .* has no such revision"):
        load("hf-hub:org/repo@v9")


@pytest.mark.parametrize("name", ["repo", "org/repo@", "org/repo@../x", "../x/y", "org/repo/file", "org/..", "/a/b"])
def test_a_name_that_is_no_repository_is_refused_without_a_request(hub: Hub, name: str) -> None:
    with pytest.raises(ImbvlmError, match=r"encoder\.name must be hf-hub:OWNER/REPO"):
        resolve_encoder(EncoderConfig(name=f"hf-hub:{name}"))
    assert hub.requests == []


def test_an_interrupted_download_goes_on_where_it_broke_off(hub: Hub, towers: dict[str, Path]) -> None:
    repository = hub.add("org/repo", towers["vit"])
    repository.cut_after = {WEIGHTS: 20_000}
    assert (
        load("hf-hub:org/repo").info.weights_fingerprint == load(f"local-dir:{towers['vit']}").info.weights_fingerprint
    )
    assert sum(request.startswith("GET") and WEIGHTS in request for request in hub.requests) == 2


def test_a_download_that_never_ends_leaves_nothing_that_is_used(
    hub: Hub, towers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    repository = hub.add("org/repo", towers["vit"])
    repository.cut_after, repository.cuts_all = {WEIGHTS: 0}, True
    with pytest.raises(ImbvlmError, match=rf"hf-hub:org/repo needs {WEIGHTS} of org/repo, and its download .* failed"):
        load("hf-hub:org/repo")
    assert not resolve_encoder(EncoderConfig(name="hf-hub:org/repo")).has_weights
    repository.cut_after = {}
    assert load("hf-hub:org/repo").info.revision == FIRST


def test_bytes_of_another_hash_are_removed(hub: Hub, towers: dict[str, Path]) -> None:
    repository = hub.add("org/repo", towers["vit"])
    repository.damaged = {WEIGHTS}
    for _ in range(2):
        with pytest.raises(ImbvlmError, match=r"have another hash than it states\. They were removed; try again"):
            load("hf-hub:org/repo")
    repository.damaged = set()
    assert load("hf-hub:org/repo").info.revision == FIRST


@pytest.mark.parametrize(
    ("gated", "token", "says"),
    [
        (True, None, r"is gated\. Accept its terms at .*/org/repo and give that account's token: `hf auth login`"),
        (True, "wrong", r"is gated\. .* with the account of the present token, or set HF_TOKEN to another"),
        (False, None, r"no such repository, or it is private\. .* ask for access and give that account's token"),
    ],
)
def test_a_repository_that_needs_a_token_says_so(
    hub: Hub, towers: dict[str, Path], monkeypatch: pytest.MonkeyPatch, gated: bool, token: str | None, says: str
) -> None:
    repository = hub.add("org/repo", towers["vit"])
    repository.token, repository.gated = "hf_right", gated
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ImbvlmError, match=says):
        load("hf-hub:org/repo")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert load("hf-hub:org/repo").info.revision == FIRST


def test_weights_that_are_no_safetensors_are_not_fetched(hub: Hub, towers: dict[str, Path]) -> None:
    files = hub.add("org/repo", towers["vit"]).commits[FIRST]
    files["open_clip_pytorch_model.bin"] = files.pop(WEIGHTS)
    with pytest.raises(ImbvlmError, match=r"no such file\. Files of other kinds aren't read, since they may run code"):
        load("hf-hub:org/repo")
    assert not any(request.startswith("GET") and ".bin" in request for request in hub.requests)


def test_a_repository_that_is_no_encoder_is_refused(hub: Hub, towers: dict[str, Path]) -> None:
    files = hub.add("org/repo", towers["vit"]).commits[FIRST]
    description = json.loads(files["open_clip_config.json"])
    description["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    files["open_clip_config.json"] = json.dumps(description).encode()
    with pytest.raises(ImbvlmError, match="sets trust_remote_code"):
        load("hf-hub:org/repo")
    hub.repositories["org/other"] = hub.repositories.pop("org/repo")
    files.clear()
    with pytest.raises(ImbvlmError, match=r"open_clip_config\.json or config\.json of org/other.*has no such file"):
        load("hf-hub:org/other")
    files["config.json"] = b'{"model_type": "bert"}'
    with pytest.raises(ImbvlmError, match=r"is not a timm model's description"):
        load("hf-hub:org/other")
    with pytest.raises(ImbvlmError, match=r"no such repository, or it is private\. Check the name at .*/org/none"):
        load("hf-hub:org/none")


def test_a_description_that_names_a_path_for_its_tokenizer_is_refused(hub: Hub, towers: dict[str, Path]) -> None:
    files = hub.add("org/repo", towers["vit"]).commits[FIRST]
    description = json.loads(files["open_clip_config.json"])
    description["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "/etc/tokenizer"
    files["open_clip_config.json"] = json.dumps(description).encode()
    with pytest.raises(ImbvlmError, match=r"'/etc/tokenizer', which is no repository of the hub"):
        load("hf-hub:org/repo")


def test_a_description_that_asks_for_more_than_its_weights_hold_is_refused(hub: Hub, towers: dict[str, Path]) -> None:
    files = hub.add("org/repo", towers["vit"]).commits[FIRST]
    description = json.loads(files["open_clip_config.json"])
    description["model_cfg"]["text_cfg"]["width"] = 10**6
    files["open_clip_config.json"] = json.dumps(description).encode()
    with pytest.raises(ImbvlmError, match="they don't belong together"):
        load("hf-hub:org/repo")


def test_a_tokenizer_of_the_hub_is_fetched_whole_and_once(hub: Hub, towers: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = {"tokenizer_config.json": b"{}", "tokenizer.json": b"{}", "spiece.model": b"x", "weights.bin": b"y"}
    for name, content in tokenizer.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    hub.add("timm/ViT-B-16-SigLIP2", tmp_path / "files")
    source = resolve_encoder(EncoderConfig(name="ViT-B-16-SigLIP2/webli"))
    folder = tokenizer_folder(source)
    assert folder is not None
    assert {path.name for path in folder.iterdir()} == {*tokenizer} - {"weights.bin"}
    hub.requests.clear()
    assert tokenizer_folder(source) == folder
    assert hub.requests == []


def test_offline_it_says_what_is_missing_and_how_to_get_it(
    hub: Hub, towers: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("org/repo", towers["vit"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    how = (
        r"Where there is a network run `imbvlm encoder fetch hf-hub:org/repo -o DIR`, copy DIR here, and set "
        rf"encoder\.name: local-dir:DIR\. Or copy models--org--repo of that machine's cache to {tmp_path}/cache "
    )
    with pytest.raises(ImbvlmError, match=rf"needs open_clip_config\.json or config\.json of org/repo, not .*{how}"):
        describe_encoder(EncoderConfig(name="hf-hub:org/repo"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    describe_encoder(EncoderConfig(name="hf-hub:org/repo"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    problem = resolve_encoder(EncoderConfig(name="hf-hub:org/repo")).weights_state().problem
    assert problem is not None
    assert f"needs {WEIGHTS} of org/repo@{FIRST}, not cached here" in problem
    assert f"{hub.endpoint}/org/repo was not asked, since HF_HUB_OFFLINE is set. Where" in problem
    assert hub.requests
    with pytest.raises(ImbvlmError) as raised:
        load("hf-hub:org/repo")
    assert str(raised.value) == problem


def test_a_short_name_of_a_plug_in_is_fetched_by_its_whole_name(
    hub: Hub, towers: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The machine that has a network lacks the plug-in."""
    hub.add("org/repo", towers["vit"])
    (tmp_path / "mine.py").write_text(
        "from imbvlm.config.encoder_entries import EncoderEntry\n"
        "ENCODERS = {'mine': EncoderEntry('hf-hub:org/repo', None, 'mine')}\n"
    )
    with use_plugins(str(tmp_path / "mine.py")):
        with monkeypatch.context() as offline:
            offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            with pytest.raises(ImbvlmError, match=r"mine needs .* run `imbvlm encoder fetch hf-hub:org/repo -o DIR`"):
                load("mine")
        load("mine").save(str(tmp_path / "out"))
    folder = resolve_encoder(EncoderConfig(name=f"local-dir:{tmp_path / 'out'}"))
    assert folder.origin == Origin("hf-hub:org/repo", FIRST)


def test_a_copied_cache_is_read_where_it_is_said_to_lie(
    hub: Hub, towers: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("org/repo", towers["vit"])
    first = load("hf-hub:org/repo").info
    shutil.copytree(tmp_path / "cache" / "models--org--repo", tmp_path / "other" / "models--org--repo", symlinks=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load("hf-hub:org/repo").info == first


def test_a_server_that_is_gone_is_told_from_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ImbvlmError, match=r"http://127\.0\.0\.1:9/org/repo doesn't answer \(.*refused.*\)"):
        HubFile("org/repo", ("model.safetensors",)).fetch("an encoder")
