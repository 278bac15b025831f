"""Trees for other runtimes."""
