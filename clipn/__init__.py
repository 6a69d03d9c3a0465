"""CLIPN: teach CLIP to say no. Convention: a higher score always means in-distribution."""
