"""The spec in a sweep's folder: an earlier version's sweep keeps the rules by which it began."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_folder import sweep_spec

from imbvlm.base.yaml_file import dump_yaml
from imbvlm.sweep.records.sweep_folder import read_spec


@pytest.mark.parametrize(
    ("missing", "rules"),
    [
        ((), (None, None, 5)),
        (("confirm_folds",), (None, None, None)),
        (("confirm_folds", "num_folds", "select_by"), (1, "objective", None)),
    ],
)
def test_a_sweep_that_began_without_a_rule_goes_on_without_it(
    tmp_path: Path, missing: tuple[str, ...], rules: tuple[int | str | None, ...]
) -> None:
    tree = {key: value for key, value in sweep_spec().to_tree().items() if key not in missing}
    (tmp_path / "sweep.yaml").write_text(dump_yaml(tree))
    spec = read_spec(str(tmp_path))
    assert (spec.num_folds, spec.select_by, spec.confirm_folds) == rules
