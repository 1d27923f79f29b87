"""Scores, evaluators and the report page."""
