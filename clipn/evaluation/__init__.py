"""Checkpoints on image sets: scores, metrics, decisions."""
