"""What made things that the package carries; beside the package, not in it."""
