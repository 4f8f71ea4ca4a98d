#pragma once

#include "cuda_runtime.h"  // all of it
