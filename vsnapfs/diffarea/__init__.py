"""The diff area: on-disk format, allocation and growth, index, recovery scan, verify."""
