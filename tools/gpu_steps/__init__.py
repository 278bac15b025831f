"""What ``tools/gpu.py`` runs: one module a step, each with ``run(work)``."""
