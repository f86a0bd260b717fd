"""The process that serves one volume, and how commands reach it.

Owns mounting, the control socket, signals, and the order of the end: whatever ends the mount, the
volume is closed cleanly. Leaves the tree to `fuse`, and everything a volume does to `volume`.

    server.py       serve (in place) and spawn (in the background)
    lifecycle.py    from an open volume to a clean close
    preflight.py    what must be true before a mount is tried; mount options
    process.py      the process itself: limits, memory, its log, errors in groups
    control.py      the protocol on control.sock, server side
    listening.py    the file of that socket
    accepting.py    lets clients in, without free descriptors, too
    clients.py      how many clients there may be, and who gives way to whom
    jobs.py         an operation under way: when it begins, and who may still give it up
    standby.py      answers on the socket while the host hangs under the server's own thread
    client.py       call(): through the socket, or directly under the same lock
    talk.py         one request through the socket: the client's half of the protocol
    interruption.py Ctrl-C while a command waits, and what it is told
    operations.py   the operations, the same on both ways
    mounts.py       the mount table, dead mounts, unmounting
    loops.py        loop devices on the replica
"""
