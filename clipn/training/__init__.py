"""The training loop: objectives, optimizer, run folder."""
