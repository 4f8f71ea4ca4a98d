"""The torch reference, the llama.cpp runner, metrics and reports of `validate-kimi`."""

import os

# By default, idle OpenMP threads of torch and llama.cpp spin. On a busy machine this can turn a second of work into
# minutes. The variable is read when torch or llama.cpp is loaded, so it is set before either is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
