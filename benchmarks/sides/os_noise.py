"""Wardround's simulation with noise from the operating system, as a hospital draws it: such sites are trained one after another."""

from ours import main

if __name__ == "__main__":
    main("os_noise", "auto", "os")
