// Which of the matrix kernels this processor can run.
extern "C" int features() {
    int found = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
    found |= 4;
#ifdef __AVX512BF16__
    found |= 1;
#endif
#ifdef __AVX512VNNI__
    found |= 2;
#endif
#endif
    return found;
}
