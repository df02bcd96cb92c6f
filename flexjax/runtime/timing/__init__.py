"""Times what a machine does, one kind of work per module; `calibrate` makes a
record of it."""
