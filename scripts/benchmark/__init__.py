"""scripts/bench: vsnapfs beside its peers, measured by fio in one run on one file system.

cells.py says what is measured, aims.py against whom and with which aim, systems.py and peers.py how
each one is served, fio.py the one program that drives them all, run.py the order, machine.py what
is done to the machine and undone again, report.py and plots.py what is made of the figures.
"""
