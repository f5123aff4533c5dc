"""What a plan does to the model: quality, text it writes, reports."""
