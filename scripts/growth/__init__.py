"""How the cost of a volume grows: what `scripts/bench-growth` runs. Start at `__main__`."""
