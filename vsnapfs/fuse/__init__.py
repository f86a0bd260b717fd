"""The mounted tree of one volume: names, inodes, and errnos.

Owns everything that pyfuse3 sees. Promises that no exception but FUSEError leaves a handler, that
an inode number never stands for two recovery points, and that what `ls` shows is what the volume
holds at that moment. Knows no block arithmetic: reading and writing is the volume's business, and
mounting, signals and the control socket are the daemon's.

    tree.py        which names exist, and their inode numbers (plain Python)
    live.py        the contents of status.json and events.log
    translate.py   the one place where an exception becomes an errno
    operations.py  the request handlers
    loop.py        how requests are fetched: polling before parking
    kernel.py      the kernel's limits for the mount
    session.py     pyfuse3's global session: mount, loop, end
"""

from __future__ import annotations

from vsnapfs.fuse.operations import VolumeOperations
from vsnapfs.fuse.session import Session, mount_options

__all__ = ["Session", "VolumeOperations", "mount_options"]
