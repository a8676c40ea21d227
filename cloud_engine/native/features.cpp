// Which of the matrix kernels this processor can run.
extern "C" int features() {
    int found = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
    found |= 1;
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
    found |= 2;
#endif
    return found;
}
