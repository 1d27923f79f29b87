"""The machinery of training; it knows no model and no task."""
