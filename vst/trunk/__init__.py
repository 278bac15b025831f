"""Which model should be the trunk."""
