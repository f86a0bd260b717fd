"""`scripts/bench-growth`: its volumes are real ones, and one run of it writes all it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import trio
from house import ROOT

SCRIPTS = ROOT / "scripts"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.parametrize("unclean", [False, True])
def test_a_synthetic_volume_is_a_volume(tmp_path: Path, *, unclean: bool) -> None:
    """Two groups of copies that nobody wrote one by one: verify finds every one in order, every
    point reads, and after an unclean stop the newest barrier's copies are checked and kept.
    """
    from growth.synthetic import forget_cache, make_volume, mark_unclean

    from vsnapfs.volume import Volume

    directory, block, copies = tmp_path / "volume", 4096, 2600
    make_volume(
        directory, preserved=copies, points=3, replica_size=3000 * block, block_size=block, room=50
    )
    if unclean:
        mark_unclean(directory)
    forget_cache(directory)

    async def look() -> None:
        volume = await Volume.open(directory)
        async with trio.open_nursery() as nursery:
            await nursery.start(volume.run)
            report = volume.account.opened.report
            assert report is not None
            assert report.unclean == unclean
            assert report.kept == (40 if unclean else 0)  # of the last barrier's 80 slots
            assert report.dropped == report.damaged == 0
            volume.check_invariants()
            area = volume.core.need_area()
            assert len(area.index) == area.slots.in_use == copies
            assert [point.number for point in volume.points] == [1, 2, 3]
            checked = await volume.verify()
            assert checked["ok"], checked["problems"][:3]
            assert checked["checked"]["preserved_blocks"] == copies
            blocks, epochs, _ = area.index.everything()
            assert len(set(blocks.tolist())) == copies
            assert set(epochs.tolist()) == {1, 2, 3}
            handle = volume.open_point(1)
            assert bytes(await handle.read(int(blocks[7]) * block, block)) == bytes(block)
            handle.close()
            await volume.close()

    trio.run(look)


@pytest.mark.slow
@pytest.mark.time_limit(400)
def test_one_run_writes_the_figures_the_page_and_the_charts(tmp_path: Path) -> None:
    """All parts are measured, every figure is one, the page shows every chart, nothing is left."""
    work, output = tmp_path / "work", tmp_path / "output"
    work.mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "growth", "--tiny", "--work", work, "--output", output],
        env=os.environ | {"PYTHONPATH": f"{SCRIPTS}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=390,
    )
    assert result.returncode == 0, result.stderr
    assert "to go)" in result.stderr
    assert list(work.iterdir()) == []
    record = json.loads((output / "growth.json").read_text())
    assert record["left_out"] == []
    assert [row["preserved"] for row in record["preserved"]] == [3000, 6000]
    for row in record["preserved"] + record["volume_size"]:
        for how in ("cold", "warm", "unclean"):
            assert row[how]["copies"] == row["preserved"]
            assert row[how]["wall"] > 0
            # 12 bytes a copy and one a slot, at least.
            assert 13 * row["preserved"] < row[how]["structures"] < row[how]["rss"]
            assert row[how]["rss"] <= row[how]["peak"]
        for parts in (row["create"], row["create_busy"]):
            assert parts["total"] > parts["replica"] > 0
            assert parts["total"] > parts["commit"] > 0
        assert row["create_busy"]["longest_write"] > 0
    assert [step["points"] for step in record["points"][0]["steps"]] == [1, 2, 4]
    assert all(step["delete"]["total"] > 0 for step in record["points"][0]["steps"])
    parts = record["writes"][0]["parts"]
    assert parts[-1]["copies"] == 400
    assert sum(part["grown"] for part in parts) > 0
    page = (output / "growth.md").read_text()
    charts = sorted(path.name for path in output.glob("*.svg"))
    assert len(charts) == 6
    for name in charts:
        assert f"({name})" in page
        chart = ET.parse(output / name).getroot()
        lines = chart.findall(f"{SVG}polyline")
        assert lines
        _, _, width, height = (float(number) for number in chart.attrib["viewBox"].split())
        for line in lines:
            for point in line.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 < x < width
                assert 0 < y < height
