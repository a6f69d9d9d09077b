"""The report of a run: one self-contained HTML file, made from the files of the run's folder."""

from wardround.report.page import write_report

__all__ = ["write_report"]
