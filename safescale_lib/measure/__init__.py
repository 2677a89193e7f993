"""What is measured, how surely, and when it counts: outcomes, claims, criteria, intervals, detection, cost."""

OUTCOME_MIME = "application/vnd.safescale.outcome+json"
"""Under this MIME type an outcome, or a list of them, stands as JSON in a notebook's outputs."""
