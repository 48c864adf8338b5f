"""Short names stand for what they say: sizes and licenses of the libraries' tables, and notes beside scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from open_clip.pretrained import get_pretrained_cfg as open_clip_cfg
from timm.models import get_pretrained_cfg

from imbvlm.config.encoder_entries import ENCODERS, NON_COMMERCIAL, encoder_terms, find_entry, score_notes
from imbvlm.config.input_sections import HF_HUB, EncoderConfig
from imbvlm.data.sources.benchmark_registry import BENCHMARKS
from imbvlm.models.encoders.encoder_factory import describe_encoder

ASKED = {
    "siglip2_vit_b16", "siglip2_vit_l16_256", "siglip2_vit_so400m", "pe_core_b16", "pe_core_l14_336", "dfn5b_vit_h14",
    "metaclip_vit_b16", "metaclip_vit_l14", "mobileclip2_s2", "mobileclip2_b", "bioclip", "bioclip2", "dinov2_vit_s14",
    "dinov2_vit_b14", "dinov3_vit_b16", "dinov3_vit_l16",
}  # fmt: skip
# timm's image towers of the same weights, whose table has a license.
TIMM_NAMES = {
    "siglip2_vit_b16": "vit_base_patch16_siglip_224.v2_webli",
    "siglip2_vit_l16_256": "vit_large_patch16_siglip_256.v2_webli",
    "siglip2_vit_so400m": "vit_so400m_patch14_siglip_224.v2_webli",
    "siglip_vit_b16": "vit_base_patch16_siglip_224.webli",
    "siglip_vit_l16_256": "vit_large_patch16_siglip_256.webli",
    "pe_core_b16": "vit_pe_core_base_patch16_224.fb",
    "pe_core_l14_336": "vit_pe_core_large_patch14_336.fb",
    "metaclip_vit_b16": "vit_base_patch16_clip_224.metaclip_2pt5b",
    "metaclip_vit_l14": "vit_large_patch14_clip_224.metaclip_2pt5b",
    "mobileclip2_s2": "fastvit_mci2.apple_mclip2_dfndr2b",
    "mobileclip2_b": "vit_base_mci_224.apple_mclip2_dfndr2b",
    "dinov2_vit_s14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vit_b14": "vit_base_patch14_dinov2.lvd142m",
    "dinov3_vit_b16": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_vit_l16": "vit_large_patch16_dinov3.lvd1689m",
}


def test_every_entry_says_what_a_user_must_know() -> None:
    assert ENCODERS.keys() >= ASKED
    for name, entry in ENCODERS.items():
        assert entry.license, name
        assert entry.pretraining, name
        assert entry.seen.keys() <= BENCHMARKS.keys(), name


@pytest.mark.parametrize("name", [name for name, entry in ENCODERS.items() if not entry.name.startswith(HF_HUB)])
def test_the_input_size_is_the_encoders_own(name: str) -> None:
    assert describe_encoder(EncoderConfig(name=name)).image_size == ENCODERS[name].image_size


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_the_license_is_that_of_timms_table(name: str) -> None:
    assert ENCODERS[name].license == get_pretrained_cfg(TIMM_NAMES[name]).license


def test_tags_exist() -> None:
    for name, entry in ENCODERS.items():
        if entry.tag is not None and entry.loader == "open_clip":
            assert open_clip_cfg(entry.model, entry.tag), name


def test_every_name_of_an_encoder_is_known(tmp_path: Path) -> None:
    for name, entry in ENCODERS.items():
        if entry.tag is not None or entry.name.startswith(HF_HUB):
            assert find_entry(entry.name) == find_entry(name) == entry
    assert find_entry("hf-hub:imageomics/bioclip-2@main") == ENCODERS["bioclip2"]
    for file in ("open_clip_config.json", "config.json"):
        folder = tmp_path / file
        folder.mkdir()
        (folder / file).write_text(json.dumps({"origin": {"name": "bioclip", "revision": "a" * 40}}))
        assert find_entry(f"local-dir:{folder}") == ENCODERS["bioclip"]
    for content in ("{", "[]", '{"origin": 7}', '{"origin": {"name": "local-dir:/x"}}', '{"origin": {"name": 7}}'):
        (folder / "config.json").write_text(content)
        assert find_entry(f"local-dir:{folder}") is None
    assert find_entry("local-dir:/nowhere") is find_entry("hf-hub:org/repo") is find_entry("ViT-B-32/laion2b") is None


def test_notes_are_on_what_was_seen_and_may_not_be_sold() -> None:
    names = ["openai_vit_b16", "bioclip", "metaclip_vit_b16", "bioclip"]
    assert score_notes(names, "inat2018") == [
        "bioclip was pretrained on TreeOfLife-10M, which has iNaturalist's images of 2021: its scores on inat2018 are "
        "too high to compare.",
        "metaclip_vit_b16 is licensed for non-commercial use only (cc-by-nc-4.0).",
    ]
    assert score_notes(["bioclip", "openai_vit_b16"], "places_lt") == []
    terms = encoder_terms(["bioclip", "metaclip_vit_b16", "local-dir:/nowhere", "openai_vit_b16"], "inat2018")
    assert terms.license == "mit, cc-by-nc-4.0"
    assert terms.notes == score_notes(["bioclip", "metaclip_vit_b16"], "inat2018")
    for name in ("timm:convnext_base.fb_in22k_ft_in1k_384", "dinov3_vit_b16", "timm:vit_base_patch14_dinov2.lvd142m"):
        (note,) = score_notes([name], "imagenet_lt")
        assert "ImageNet's training images: its scores on imagenet_lt are too high" in note
    assert {ENCODERS[name].license for name in ("dfn5b_vit_h14", "mobileclip2_s2")} <= NON_COMMERCIAL
