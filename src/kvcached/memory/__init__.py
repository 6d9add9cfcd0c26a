"""Physical memory: the backends, and torch views over their addresses."""
