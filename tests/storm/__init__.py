"""A volume's life at random: clients at the same time, many openings, every kind of end.

Owns the search that `t1_model/test_storm.py` runs, and `scripts/search` beside others. A `Storm` is
made from its seed alone and can be repeated by it: a volume, and several lives of the process that
serves it. In each life writers, readers and administrators work at the same time; it ends by
SIGKILL, by a power failure, by closing (with clients at work or without), or goes on. Three things
can be added, each for itself or together:

* failures: an operation on one of the files fails, once, some times or for good;
* rot: between two lives a copy of something that exists twice is overwritten;
* old copies: between two lives the state file, the diff area or all files are put back.

Some volumes have durability "process". There a power failure, or a failed sync of the diff area,
may spoil the points there were: those are suspect, an event says so, and all others stay exact.

The model (`account`) keeps of each cell of the replica what may lie there, and what may be left
there by a power failure; of each point the time between its question and its answer. A point must
be what the cells were at one instant of that time, and stay it. After each life the volume is
opened and compared with that, verified, and brought online.

Time is simulated: it passes when nothing else can happen. What hangs, hangs at once.
"""

from .life import Storm

__all__ = ["Storm"]
