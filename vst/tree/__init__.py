"""The stitch tree: its configuration, the encoder, stitches, fusion, files, and its models in full beside it."""
