"""`python -m mixloom` is `mixloom`."""

from mixloom.cli.main import main

main()
