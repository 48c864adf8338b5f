"""The golden cases cover every registered method, loss and second stage; the numbers: `python -m tests.golden`."""

from golden.cases import covered

from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.config.second_stage_registry import SECOND_STAGES


def test_every_method_loss_and_second_stage_has_a_golden_case() -> None:
    assert covered() == {
        "methods": frozenset(METHODS),
        "losses": frozenset(LOSSES),
        "second_stages": frozenset(SECOND_STAGES),
    }
