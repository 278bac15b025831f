"""How stitches are trained: what is matched, the loop, its processes and states, the report on held-out pictures."""
