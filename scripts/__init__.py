"""Entry points: the `kimi-llama` command, the demo, the tests, measurements and training."""
