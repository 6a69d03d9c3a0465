"""Outputs of the frozen towers, computed once and kept on disk."""
