"""The fixture of the tests on real mounts: see `mounted_rig`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mounted_rig import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Makes volumes, devices and file systems; all is gone again after the test."""
    machine = Machine(tmp_path)
    try:
        yield machine
    finally:
        machine.close()
