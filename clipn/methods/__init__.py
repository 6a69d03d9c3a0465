"""OOD methods beside the logit scores in clipn.scores."""
