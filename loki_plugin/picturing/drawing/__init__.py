"""Arrays to matplotlib figures: pure functions, which know nothing of the package."""
