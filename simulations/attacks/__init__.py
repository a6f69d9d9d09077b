"""Attacks on a study, to measure privacy and robustness beside what is promised. Each runs the study's own training path, on virtual sites."""
