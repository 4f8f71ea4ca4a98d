"""`kimi-llama bench`: pristine llama.cpp against ours, alternating in one run, and the machine's limit beside both."""
