"""The edges of a service's process, seen from outside: where it asks the database, the bus, the disk, another process or another service for
something, or is told something. No code of the services knows of it.

A crossing of an edge has a name, `EDGE, CALLER: MOMENT`, that finds itself: what is called and what it is about, who calls it (the innermost public
function of ours, and the task that it runs in), and whether it is about to be or has been. `control` is how a test makes a process record what it
crosses, or kill itself at a crossing; `tests/faults/start/sitecustomize.py` is how a process that `penstock up` starts comes to be watched.
"""
