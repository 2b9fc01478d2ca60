"""`fastssl bench CONFIG`: the ladder from bytes to a training step, its rows, peers and verdict."""
