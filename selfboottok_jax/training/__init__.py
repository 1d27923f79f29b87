"""The machinery of training, independent of any model or task."""
