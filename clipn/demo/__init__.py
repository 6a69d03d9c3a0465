"""The web page of `clipn demo`."""
