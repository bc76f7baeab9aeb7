"""Several stages in order, from one file: planned by content, finished ones skipped, each handed its ancestors."""
