"""`python -m server` is `hope`."""

from server.cli import main

main()
