"""Wardround's simulation with its sites one after another."""

from ours import main

if __name__ == "__main__":
    main("sequential", "sequential")
