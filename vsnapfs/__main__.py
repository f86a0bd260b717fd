"""`python -m vsnapfs` is the `vsnapfs` command."""

from __future__ import annotations

from vsnapfs.cli import main

if __name__ == "__main__":
    main()
