"""The tree inside a language model, as transformers knows it."""
