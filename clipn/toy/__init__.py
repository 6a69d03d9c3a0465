"""The built-in world of drawn images, and the photos beside it."""
