"""What `status` says about an open volume. Reads only."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..config import VolumePaths
from ..errors import Fault
from .administration import iso

if TYPE_CHECKING:
    from .volume import Volume


def status_of(volume: Volume) -> dict[str, Any]:
    """JSON-ready; sizes in bytes, times in ISO 8601 UTC."""
    core, protection, area = volume.core, volume.protection, volume.core.area
    saved = protection.saved
    path = VolumePaths(volume.directory, core.config).diff_area
    points = core.points
    return {
        "volume": core.name,
        "state": protection.state,
        "mountpoint": volume.mountpoint,
        "on_full": core.config.on_full,
        "fault": _fault(protection.fault),
        "consistent": None,  # Until consistency checks exist.
        "pid": os.getpid() if volume.mountpoint else None,
        "diff_area": {
            "path": str(path),
            "used": area.used if area and not area.is_unread else None,
            "allocated": area.allocated if area else None,
            "maximum": area.maximum if area else saved.maximum or None,
            "minimum": area.minimum_for_used if area and not area.is_unread else None,
            "growth": volume.room.status(),
        }
        | volume.onlookers.status("diff area"),
        "replica": {"path": str(core.replica.path), "size": core.size}
        | volume.onlookers.status("replica"),
        "unwatched": volume.onlookers.unwatched,
        "recovery_points": len(points) if area else None,
        "oldest": iso(points[0].created_ns) if points else None,
        "latest": iso(points[-1].created_ns) if points else None,
        "block_size": core.block_size,
        "durability": core.durability,
        "suspect_points": sum(p.number <= area.superblock.suspect for p in points) if area else 0,
        "write_buffer": volume.buffer.status(),
        "restoring": protection.restoring or bool(area and area.superblock.restoring),
        "operations": core.admin.to_json(),
        "trouble": protection.trouble or volume.policy.trouble,
        "would_fit": protection.would_fit() is None,
        "flush_failures": getattr(core.log, "flush_failures", 0),
        "warnings": list(volume.warnings),
    }


def _fault(fault: Fault | None) -> dict[str, Any] | None:
    if fault is None:
        return None
    data = fault.to_json()
    return data | {"time": iso(fault.time)}
