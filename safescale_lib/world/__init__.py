"""The one toy world every chapter shares: pure data generation, seeded, harmless by construction."""
