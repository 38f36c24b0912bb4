from qwen2tool.cli import main

main()
