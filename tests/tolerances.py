"""Every tolerance of the suite with its derivation: tests import `TOL` and state no number."""

TOL: dict[str, float] = {}
