"""Probability paths, samplers and guidance; no network inside.

Everywhere here t = 0 is data and t = 1 is noise. The velocity of a path is
dx_t/dt, so that sampling walks from t = 1 down to t = 0 with negative steps.
"""
