"""The heart: write path, read path, recovery points, the protection state machine."""

from ..diffarea.superblock import RecoveryPoint
from .handles import PointHandle, ReplicaHandle
from .volume import Volume

__all__ = ["PointHandle", "RecoveryPoint", "ReplicaHandle", "Volume"]
