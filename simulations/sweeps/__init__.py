"""Sweeps: one study over a grid of settings, a cell a run, in parallel; killed and resumed, the table is the same to the bit."""
