"""`python -m vsnapfs.daemon`: the background process that `server.spawn` starts. Not for people."""

from __future__ import annotations

import sys

from vsnapfs.daemon.server import child_main

if __name__ == "__main__":
    sys.exit(child_main(sys.argv[1:]))
