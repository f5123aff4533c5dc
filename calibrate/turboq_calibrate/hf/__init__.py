"""What runs where torch and transformers are, by its path: beside nothing that it could shadow."""
