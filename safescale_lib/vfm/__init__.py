"""Chapter 2: vision foundation models."""
