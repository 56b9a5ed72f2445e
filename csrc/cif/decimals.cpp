#include "decimals.h"

#include <cstring>
#include <limits>

#include "number.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CATMLLM_X86 1
#include <immintrin.h>
#endif

namespace catmllm::cif {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

void portable(const Token* token, std::size_t stride, std::size_t n, double* out, std::size_t out_stride) {
    for (std::size_t i = 0; i < n; ++i, token += stride, out += out_stride) {
        double value = 0;
        const bool read = token->plain && plain_decimal(token->data, token->data + token->size, value);
        *out = read ? value : kNan;
    }
}

#ifdef CATMLLM_X86
// By number of characters: the bytes that belong to a token whose end is the end of the 16; by place of the
// point: how the bytes before it move up.
struct Tables {
    alignas(16) std::uint8_t own[17][16];
    alignas(16) std::uint8_t squeeze[17][16];
    alignas(32) std::uint8_t zeros[32];
    alignas(32) std::uint8_t point_less_zero[32];
    alignas(32) std::uint8_t nines[32];
    alignas(16) double signs[4][2] = {{0.0, 0.0}, {-0.0, 0.0}, {0.0, -0.0}, {-0.0, -0.0}};
    double powers[17];
    Tables() {
        for (int size = 0; size <= 16; ++size)
            for (int i = 0; i < 16; ++i) own[size][i] = i >= 16 - size ? 0xFF : 0;
        own[1][15] = 0x7F;  // a point alone is no point
        for (int point = 0; point <= 16; ++point)
            for (int i = 0; i < 16; ++i)
                squeeze[point][i] = static_cast<std::uint8_t>(point == 16 || i > point ? i
                                                              : i > 0                  ? i - 1
                                                                                       : 0x80);
        std::memset(zeros, '0', sizeof zeros);
        std::memset(point_less_zero, '.' - '0', sizeof point_less_zero);
        std::memset(nines, 9, sizeof nines);
        double power = 1;  // powers[point]: of ten, by the digits behind a point at that place
        for (int point = 15; point >= 0; --point, power *= 10) powers[point] = power;
        powers[16] = 1;
    }
};
const Tables kTables;

__attribute__((target("avx2"))) inline __m256i bytes(const std::uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}

__attribute__((target("avx2"))) inline __m256i two(const void* low, const void* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low))),
                                   _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
}

// Two tokens at a time, each in half of a vector that ends where the token ends; of 16 characters all may be
// digits, which are too many.
__attribute__((target("avx2"))) void avx2(const Token* token, std::size_t stride, std::size_t n, double* out,
                                          std::size_t out_stride) {
    const __m256i tens = _mm256_set1_epi16(10 | 1 << 8);
    const __m256i hundreds = _mm256_set1_epi32(100 | 1 << 16);
    const __m256i ten_thousands = _mm256_set1_epi32(10000 | 1 << 16);
    const __m256d weights = _mm256_set_pd(1, 1e8, 1, 1e8);
    std::size_t i = 0;
    for (; i + 1 < n; i += 2, token += 2 * stride, out += 2 * out_stride) {
        const Token& a = token[0];
        const Token& b = token[stride];
        const std::size_t minus_a = a.data[0] == '-';
        const std::size_t minus_b = b.data[0] == '-';
        const std::size_t size_a = a.size - minus_a;
        const std::size_t size_b = b.size - minus_b;
        if (a.plain && b.plain && size_a - 1 < 15 && size_b - 1 < 15) {
            __m256i x = two(a.data + a.size - 16, b.data + b.size - 16);
            x = _mm256_and_si256(_mm256_sub_epi8(x, bytes(kTables.zeros)),
                                 two(kTables.own[size_a], kTables.own[size_b]));
            const __m256i points = _mm256_cmpeq_epi8(x, bytes(kTables.point_less_zero));
            const std::uint64_t bits = static_cast<unsigned>(_mm256_movemask_epi8(points));
            const int point_a = __builtin_ctzll(bits | 1u << 16) & 31;
            const int point_b = __builtin_ctzll(bits >> 16 | 1u << 16) & 31;
            // A second point is no digit and shows below.
            x = _mm256_shuffle_epi8(x, two(kTables.squeeze[point_a], kTables.squeeze[point_b]));
            const __m256i digits = _mm256_cmpeq_epi8(_mm256_min_epu8(x, bytes(kTables.nines)), x);
            x = _mm256_madd_epi16(_mm256_maddubs_epi16(x, tens), hundreds);
            x = _mm256_madd_epi16(_mm256_packus_epi32(x, x), ten_thousands);
            // Eight digits a number: a's head and tail, b's head and tail; together they are below 2^53.
            const __m128i eights =
                _mm_unpacklo_epi64(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
            const __m256d parts = _mm256_mul_pd(_mm256_cvtepi32_pd(eights), weights);
            const __m128d whole = _mm_hadd_pd(_mm256_castpd256_pd128(parts), _mm256_extractf128_pd(parts, 1));
            const __m128d powers =
                _mm_loadh_pd(_mm_load_sd(&kTables.powers[point_a]), &kTables.powers[point_b]);
            const __m128d signs = _mm_load_pd(kTables.signs[minus_a + 2 * minus_b]);
            const __m128d values = _mm_xor_pd(_mm_div_pd(whole, powers), signs);
            _mm_storel_pd(out, values);
            _mm_storeh_pd(out + out_stride, values);
            if (_mm256_movemask_epi8(digits) == -1) continue;
        }
        portable(token, stride, 2, out, out_stride);
    }
    if (i < n) portable(token, stride, 1, out, out_stride);
}
#endif

using Read = void (*)(const Token*, std::size_t, std::size_t, double*, std::size_t);

Read choose() {
#ifdef CATMLLM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) return avx2;
#endif
    return portable;
}

}  // namespace

void plain_decimals(const Token* tokens, std::size_t stride, std::size_t n, double* out,
                    std::size_t out_stride) {
    static const Read read = choose();
    read(tokens, stride, n, out, out_stride);
}

}  // namespace catmllm::cif
