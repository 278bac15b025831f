"""The offline demo of LLaVA on a tree: a small language model, a published set of questions, and scenes of emoji."""
