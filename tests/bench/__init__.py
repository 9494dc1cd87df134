"""What the running system can do, in figures beside the goals: `python -m tests.bench`. Nothing is asserted but that the work was done."""
