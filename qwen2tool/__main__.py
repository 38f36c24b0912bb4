"""`python -m qwen2tool`."""

from qwen2tool.cli import main

main()
