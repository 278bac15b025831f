"""Pictures: one to a tensor, many from wherever they lie, and probes that read labels off their features."""
