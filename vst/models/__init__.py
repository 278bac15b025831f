"""One vision foundation model: what is known of it, its blocks, and where its weights come from."""
