"""One module per suite: `TESTS` (what must be green first) and `measure(quick) -> list of rows`."""
