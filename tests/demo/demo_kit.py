"""Models of transformers that take every tensor they are given, and lack none."""


def load_strictly(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()
