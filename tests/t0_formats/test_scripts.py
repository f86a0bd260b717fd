"""What the shell scripts share (scripts/lib.sh): on a bare machine they know what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def asked(programs: Path, what: str) -> subprocess.CompletedProcess[str]:
    """Run `what` after lib.sh, where nothing is installed but a shell."""
    for name in ("bash", "basename", "dirname", "readlink"):
        program = shutil.which(name)
        assert program
        (programs / name).symlink_to(program)
    # lib.sh adds the sbin directories itself.
    code = f". {ROOT}/scripts/lib.sh; PATH={programs}; python={sys.executable}; {what}"
    return subprocess.run(
        [programs / "bash", "-euo", "pipefail", "-c", code],
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_on_a_bare_machine_everything_is_missing(tmp_path: Path) -> None:
    """What the demo runs and what building takes, without a word of the shell's own."""
    result = asked(tmp_path, "missing_anything")
    assert result.stderr == ""
    assert result.returncode == 0
    wanted = {"fuse3", "fio", "e2fsprogs", "mount", "gcc", "pkg-config", "libfuse3-dev"}
    assert wanted <= set(result.stdout.split())


def test_what_cannot_be_found_out_ends_the_script(tmp_path: Path) -> None:
    """A mistake in the question is not taken for "nothing is missing"."""
    result = asked(tmp_path, 'ask() { "$no_such_name"; }; need_packages ask; echo on')
    assert result.returncode == 1
    assert "could not be found out" in result.stderr
    assert "on" not in result.stdout


def test_a_virtual_environment_elsewhere_is_left_alone(tmp_path: Path) -> None:
    """A `.venv` that is a link is never emptied: it may be another checkout's."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "pyvenv.cfg").touch()
    (tmp_path / "link").symlink_to(mine)
    programs = tmp_path / "programs"
    programs.mkdir()
    result = asked(programs, f"venv={tmp_path}/link; make_venv test")
    assert result.returncode == 1
    assert f"is a link to {mine}" in result.stderr
    assert list(mine.iterdir()) == [mine / "pyvenv.cfg"]
