"""What each unit of the cache costs: predicted from what was observed, measured by KL, compared."""
