"""Who is in an exported model, with what share of the weights, and what its passes cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from blend_members import blend, member, single
from tiny_images import TinyImages

from imbvlm.inference.model_folder import read_record
from imbvlm.inference.pass_summary import member_table, pass_milliseconds


def test_members_their_weights_and_the_milliseconds_of_their_passes(tmp_path: Path) -> None:
    problem = TinyImages(tmp_path / "problem")
    problem.tower = "tinylit_lite0"
    probe = member(problem, "linear_probe", 3, encoder__image_size=64)
    means = member(problem, "class_means", 1, encoder__image_size=96, eval__tte="five_crop")
    model = blend(tmp_path / "blend", [probe, means])
    small, large = pass_milliseconds(model, num_images=8)
    # Five crops of twice the pixels take eleven times as long on a machine that does nothing else.
    assert 0 < small < large
    rows = member_table(read_record(str(tmp_path / "blend")), [small, large])
    assert rows[0] == ["member", "weight (%)", "method", "pass", "encoder", "pixels", "crops", "ms an image"]
    assert rows[1][:-1] == ["linear_probe-3", "75.0", "linear_probe", "1", "tinylit_lite0", "64", "1"]
    assert rows[2][:-1] == ["class_means-1", "25.0", "class_means", "2", "tinylit_lite0", "96", "5"]
    assert float(rows[2][-1]) == pytest.approx(large, abs=0.05)
    alone = single(tmp_path / "single", probe)
    assert len(pass_milliseconds(alone, num_images=2)) == 1
    record = read_record(str(tmp_path / "single"))
    assert record.inputs == alone.inputs
    assert member_table(record)[1:] == [["linear_probe", "100.0", "linear_probe", "1", "tinylit_lite0", "64", "1"]]
