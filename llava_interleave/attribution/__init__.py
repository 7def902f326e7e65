"""Attribution: which image an answer used, and where in it."""
