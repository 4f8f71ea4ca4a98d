"""What the emulators share: C++ headers in emulator/, and the tokens of their rewriters."""

from pathlib import Path

INCLUDE = Path(__file__).parent  # for #include "emulator/…"
