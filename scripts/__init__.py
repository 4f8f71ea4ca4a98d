"""Entry points: the three commands (commands.py), `kimi-llama`, the demo, the tests, lint and the environment."""
