"""`kimi-llama bench`: A/B runs of upstream and patched llama.cpp, compared with the roofline of the machine."""
