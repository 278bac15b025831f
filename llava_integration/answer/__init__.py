"""Questions about pictures, a model's answers, and how good they are."""
