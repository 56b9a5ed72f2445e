#include "decimals.h"

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
// By number of characters: the bytes that belong to a token whose end is the end of the 16; by place of the point:
// how the bytes before it move up.
struct Tables {
    alignas(16) std::uint8_t own[17][16];
    alignas(16) std::uint8_t squeeze[17][16];
    double powers[17];
    Tables() {
        for (int size = 0; size <= 16; ++size)
            for (int i = 0; i < 16; ++i) own[size][i] = i >= 16 - size ? 0xFF : 0;
        for (int point = 0; point <= 16; ++point)
            for (int i = 0; i < 16; ++i)
                squeeze[point][i] = static_cast<std::uint8_t>(point == 16 || i > point ? i : i > 0 ? i - 1 : 0x80);
        double power = 1;  // powers[point]: of ten, by the digits behind a point at that place
        for (int point = 15; point >= 0; --point, power *= 10) powers[point] = power;
        powers[16] = 1;
    }
};
const Tables kTables;

// The characters as one vector that ends where the token ends.
__attribute__((target("avx2"))) void avx2(const Token* token, std::size_t stride, std::size_t n, double* out,
                                          std::size_t out_stride) {
    const __m128i zeros = _mm_set1_epi8('0');
    const __m128i point_less_zero = _mm_set1_epi8('.' - '0');
    const __m128i nine = _mm_set1_epi8(9);
    const __m128i tens = _mm_set1_epi16(10 | 1 << 8);
    const __m128i hundreds = _mm_set1_epi32(100 | 1 << 16);
    const __m128i ten_thousands = _mm_set1_epi32(10000 | 1 << 16);
    for (std::size_t i = 0; i < n; ++i, token += stride, out += out_stride) {
        *out = kNan;
        if (!token->plain) continue;
        const bool negative = token->data[0] == '-';
        const std::size_t size = token->size - negative;
        if (size - 1 > 15) continue;
        __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(token->data + token->size - 16));
        x = _mm_and_si128(_mm_sub_epi8(x, zeros),
                          _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.own[size])));
        const auto points = static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(x, point_less_zero)));
        const unsigned point = static_cast<unsigned>(__builtin_ctz(points | 1u << 16));
        // A second point is no digit and shows below.
        x = _mm_shuffle_epi8(x, _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.squeeze[point])));
        const int good = _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_min_epu8(x, nine), x));
        if (good != 0xFFFF || size == (points == 0 ? 16 : 1)) continue;  // 16 digits, or a point alone
        x = _mm_madd_epi16(_mm_maddubs_epi16(x, tens), hundreds);
        x = _mm_madd_epi16(_mm_packus_epi32(x, x), ten_thousands);
        const auto halves = static_cast<std::uint64_t>(_mm_cvtsi128_si64(x));
        const std::uint64_t mantissa = (halves & 0xFFFFFFFF) * 100'000'000 + (halves >> 32);
        const double value = static_cast<double>(static_cast<std::int64_t>(mantissa)) / kTables.powers[point];
        *out = negative ? -value : value;
    }
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

void plain_decimals(const Token* tokens, std::size_t stride, std::size_t n, double* out, std::size_t out_stride) {
    static const Read read = choose();
    read(tokens, stride, n, out, out_stride);
}

}  // namespace catmllm::cif
