"""A wheel that is built here runs a sweep where nothing else of the project is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from imbvlm.base.version import __version__
from tests.tools import release_check
from tests.tools.reference import FILES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_the_wheel_runs_the_quickstart_in_an_empty_environment(tmp_path: Path) -> None:
    index = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path / "index"), "packaging"]
    if subprocess.run(index, capture_output=True, check=False).returncode != 0:
        pytest.skip("no package index can be reached from here")
    folder = tmp_path / "release"
    assert release_check.main(["--folder", str(folder), "--tag", f"v{__version__}"]) == 0
    (sweep,) = (folder / "project" / "runs").glob("quickstart-*")
    assert {path.name for path in sweep.iterdir()} <= {name.rstrip("/") for name in FILES}
    (wheel,) = (folder / "dist").glob("*.whl")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "imbvlm/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"imbvlm", f"imbvlm-{__version__}.dist-info"}


def test_a_tag_of_another_version_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        release_check.main(["--folder", str(tmp_path / "release"), "--tag", "v99.0.0"])
    assert not (tmp_path / "release").exists()
