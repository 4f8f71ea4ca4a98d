// Included before every C++ source of a portable build (fast_compile.cmake). The libstdc++ of GCC 12 has a new version
// of this symbol, the only one in these libraries that older systems lack. The old version does the same.
#ifdef __linux__
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
#endif
