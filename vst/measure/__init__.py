"""What a tree costs: on paper, and measured on the machine at hand."""
