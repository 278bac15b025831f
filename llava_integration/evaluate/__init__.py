"""Evaluation through lmms-eval, and sweeps over many towers."""
