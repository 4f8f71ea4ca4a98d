#pragma once

// Included before the rewritten text of a .metal file: the Metal standard library, and the language's keywords.

#include "atomic.h"
#include "kernel.h"
#include "math.h"
#include "simdgroup.h"

// No address spaces in C++; `constant` memory is read-only.
#define kernel [[maybe_unused]] static
#define device
#define constant const
#define thread
#define threadgroup
