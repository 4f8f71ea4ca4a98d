"""Entry points: the commands (commands.py), `kimi-llama`, the demo, the tests, measurements and training."""
