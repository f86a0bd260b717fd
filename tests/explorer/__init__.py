"""The crash explorer: power fails at every step of very many workloads, and nothing is lost.

In the spirit of SQLite's crash VFS and of ALICE. `images` builds what a power failure can leave on
the simulated disk, `expected` states what may be found there, `account` runs operations on a
volume and knows what must be there, `workloads` says which operations in which order, `judge`
opens an image and compares, `search` drives it all in several processes, `mutants` and
`ring_mutants` are engines broken on purpose. What a SIGKILL leaves is looked at, too, ring
included, and `ways_out` adds other trouble to it. Run by `scripts/crash-explore` and by t1
`test_crash_explorer`.

Replica, diff area and state file are simulated: their pwrite, sync, fallocate and truncate. The
engine renames and unlinks nothing in them; volume.toml and the making of a volume are outside (t1
`test_crash_explorer` stops a real creation between its steps).
"""
