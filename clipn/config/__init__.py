"""The settings of a run: typed dataclasses, and the YAML loader."""
