// The end of what isa/avx2.h or isa/avx512.h began. GCC's pragma stays to the end of the file: that is where it makes
// the functions of templates.
#if defined(__clang__)
#pragma clang attribute pop
#endif
