"""Server optimizers, one algorithm a file, and the strategy over Flower's hooks that they are part of."""
