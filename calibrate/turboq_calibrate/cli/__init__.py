"""The `turboq` command: one file per subcommand, nothing but flags and calls of the library."""
