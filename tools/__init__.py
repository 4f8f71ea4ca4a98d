"""Maintainers' programs: releases, moving the pin, measurements, proofs, the site. README.md lists them."""
