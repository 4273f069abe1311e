"""The report: charts, page, model card."""
