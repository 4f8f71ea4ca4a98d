"""The llama.cpp engine: the pinned archive, its build, wheel and doctor."""
