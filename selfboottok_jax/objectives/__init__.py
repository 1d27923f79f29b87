"""Training losses: pure functions of arrays, float32 or wider throughout."""
