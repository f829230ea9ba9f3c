"""A data set told on one page: the tables of clips and samples become a self-contained HTML file. Knows no Ray."""

from valley_ray.data.report.page import document, write_document, write_report

__all__ = ["document", "write_document", "write_report"]
