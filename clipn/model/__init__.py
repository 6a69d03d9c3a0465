"""The frozen base CLIP, the no tower, the zero-shot head, and their checkpoints."""
