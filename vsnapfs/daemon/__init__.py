"""The process that serves one volume, and how commands reach it.

Owns mounting, the control socket, signals, and the order of the end: whatever ends the mount, the
volume is closed cleanly. Leaves the tree to `fuse`, and everything a volume does to `volume`.

    server.py       serve (in place) and spawn (in the background)
    lifecycle.py    from an open volume to a clean close
    preflight.py    what must be true before a mount is tried; mount options
    process.py      the process itself: limits, memory, its log, errors in groups
    control.py      the protocol on control.sock, server side
    client.py       call(): through the socket, or directly under the same lock
    operations.py   the operations, the same on both ways
    mounts.py       the mount table, dead mounts, unmounting
    loops.py        loop devices on the replica
"""
