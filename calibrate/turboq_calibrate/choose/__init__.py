"""Which candidate each of them takes within a budget."""
