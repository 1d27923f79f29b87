"""Comparisons with the same networks in torch, which nothing else needs."""
