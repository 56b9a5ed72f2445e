#include "scan.h"

#include <cstring>

#include "characters.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CATMLLM_X86 1
#include <immintrin.h>
#endif

namespace catmllm::cif {
namespace {

struct Found {
    std::uint64_t hash = 0;
    std::uint64_t semicolon = 0;
    std::uint64_t high = 0;
};

void portable_words(const unsigned char* p, std::size_t words, std::uint64_t* space, std::uint64_t* d,
                    std::uint64_t* special, Found& found) {
    for (std::size_t w = 0; w < words; ++w, p += 64) {
        std::uint64_t spaces = 0;
        std::uint64_t ds = 0;
        std::uint64_t specials = 0;
        for (int i = 0; i < 64; ++i) {
            const unsigned char c = p[i];
            spaces |= static_cast<std::uint64_t>(is_space(c)) << i;
            ds |= static_cast<std::uint64_t>(c == 'd') << i;
            const bool is_special = c == '_' || c == 'l' || c == '\'' || c == '"' || c == ';';
            specials |= static_cast<std::uint64_t>(is_special) << i;
            found.hash |= c == '#';
            found.semicolon |= c == ';';
            found.high |= c >> 7;
        }
        space[w] = spaces;
        d[w] = ds;
        special[w] = specials;
    }
}

#ifdef CATMLLM_X86
// White space is 9..13, 28..31 and 32; unsigned ranges by saturating subtraction and minimum.
void sse2_words(const unsigned char* p, std::size_t words, std::uint64_t* space, std::uint64_t* d,
                std::uint64_t* special, Found& found) {
    __m128i high = _mm_setzero_si128();
    __m128i hash = high;
    __m128i semicolon = high;
    for (std::size_t w = 0; w < words; ++w, p += 64) {
        std::uint64_t spaces = 0;
        std::uint64_t ds = 0;
        std::uint64_t specials = 0;
        for (int k = 0; k < 4; ++k) {
            const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * k));
            const __m128i tab = _mm_sub_epi8(x, _mm_set1_epi8(9));
            const __m128i separator = _mm_sub_epi8(x, _mm_set1_epi8(28));
            const __m128i is_tab = _mm_cmpeq_epi8(_mm_min_epu8(tab, _mm_set1_epi8(4)), tab);
            const __m128i is_separator = _mm_cmpeq_epi8(_mm_min_epu8(separator, _mm_set1_epi8(4)), separator);
            spaces |= static_cast<std::uint64_t>(
                          static_cast<unsigned>(_mm_movemask_epi8(_mm_or_si128(is_tab, is_separator))))
                      << (16 * k);
            ds |= static_cast<std::uint64_t>(
                      static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_set1_epi8('d')))))
                  << (16 * k);
            high = _mm_or_si128(high, x);
            hash = _mm_or_si128(hash, _mm_cmpeq_epi8(x, _mm_set1_epi8('#')));
            const __m128i field = _mm_cmpeq_epi8(x, _mm_set1_epi8(';'));
            semicolon = _mm_or_si128(semicolon, field);
            const __m128i quote =
                _mm_or_si128(_mm_cmpeq_epi8(x, _mm_set1_epi8('\'')), _mm_cmpeq_epi8(x, _mm_set1_epi8('"')));
            const __m128i word =
                _mm_or_si128(_mm_cmpeq_epi8(x, _mm_set1_epi8('_')), _mm_cmpeq_epi8(x, _mm_set1_epi8('l')));
            const __m128i any = _mm_or_si128(field, _mm_or_si128(quote, word));
            specials |= static_cast<std::uint64_t>(static_cast<unsigned>(_mm_movemask_epi8(any))) << (16 * k);
        }
        space[w] = spaces;
        d[w] = ds;
        special[w] = specials;
    }
    found.high |= static_cast<unsigned>(_mm_movemask_epi8(high));
    found.hash |= static_cast<unsigned>(_mm_movemask_epi8(hash));
    found.semicolon |= static_cast<unsigned>(_mm_movemask_epi8(semicolon));
}

__attribute__((target("avx2"))) void avx2_words(const unsigned char* p, std::size_t words,
                                                std::uint64_t* space, std::uint64_t* d,
                                                std::uint64_t* special, Found& found) {
    __m256i high = _mm256_setzero_si256();
    __m256i hash = high;
    __m256i semicolon = high;
    for (std::size_t w = 0; w < words; ++w, p += 64) {
        std::uint64_t spaces = 0;
        std::uint64_t ds = 0;
        std::uint64_t specials = 0;
        for (int k = 0; k < 2; ++k) {
            const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * k));
            const __m256i tab = _mm256_sub_epi8(x, _mm256_set1_epi8(9));
            const __m256i separator = _mm256_sub_epi8(x, _mm256_set1_epi8(28));
            const __m256i is_tab = _mm256_cmpeq_epi8(_mm256_min_epu8(tab, _mm256_set1_epi8(4)), tab);
            const __m256i is_separator =
                _mm256_cmpeq_epi8(_mm256_min_epu8(separator, _mm256_set1_epi8(4)), separator);
            spaces |= static_cast<std::uint64_t>(
                          static_cast<unsigned>(_mm256_movemask_epi8(_mm256_or_si256(is_tab, is_separator))))
                      << (32 * k);
            ds |= static_cast<std::uint64_t>(static_cast<unsigned>(
                      _mm256_movemask_epi8(_mm256_cmpeq_epi8(x, _mm256_set1_epi8('d')))))
                  << (32 * k);
            high = _mm256_or_si256(high, x);
            hash = _mm256_or_si256(hash, _mm256_cmpeq_epi8(x, _mm256_set1_epi8('#')));
            const __m256i field = _mm256_cmpeq_epi8(x, _mm256_set1_epi8(';'));
            semicolon = _mm256_or_si256(semicolon, field);
            const __m256i quote = _mm256_or_si256(_mm256_cmpeq_epi8(x, _mm256_set1_epi8('\'')),
                                                  _mm256_cmpeq_epi8(x, _mm256_set1_epi8('"')));
            const __m256i word = _mm256_or_si256(_mm256_cmpeq_epi8(x, _mm256_set1_epi8('_')),
                                                 _mm256_cmpeq_epi8(x, _mm256_set1_epi8('l')));
            const __m256i any = _mm256_or_si256(field, _mm256_or_si256(quote, word));
            specials |= static_cast<std::uint64_t>(static_cast<unsigned>(_mm256_movemask_epi8(any)))
                        << (32 * k);
        }
        space[w] = spaces;
        d[w] = ds;
        special[w] = specials;
    }
    found.high |= static_cast<unsigned>(_mm256_movemask_epi8(high));
    found.hash |= static_cast<unsigned>(_mm256_movemask_epi8(hash));
    found.semicolon |= static_cast<unsigned>(_mm256_movemask_epi8(semicolon));
}

__attribute__((target("avx512f,avx512bw"))) void avx512_words(const unsigned char* p, std::size_t words,
                                                              std::uint64_t* space, std::uint64_t* d,
                                                              std::uint64_t* special, Found& found) {
    for (std::size_t w = 0; w < words; ++w, p += 64) {
        const __m512i x = _mm512_loadu_si512(p);
        const __mmask64 tab =
            _mm512_cmple_epu8_mask(_mm512_sub_epi8(x, _mm512_set1_epi8(9)), _mm512_set1_epi8(4));
        const __mmask64 separator =
            _mm512_cmple_epu8_mask(_mm512_sub_epi8(x, _mm512_set1_epi8(28)), _mm512_set1_epi8(4));
        space[w] = tab | separator;
        d[w] = _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8('d'));
        found.high |= _mm512_movepi8_mask(x);
        found.hash |= _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8('#'));
        const __mmask64 field = _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8(';'));
        found.semicolon |= field;
        special[w] = field | _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8('_')) |
                     _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8('l')) |
                     _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8('\'')) |
                     _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8('"'));
    }
}
#endif

using Words = void (*)(const unsigned char*, std::size_t, std::uint64_t*, std::uint64_t*, std::uint64_t*,
                       Found&);

struct Choice {
    Words words;
    const char* name;
};

// The instruction sets of this machine, the widest first.
const std::vector<Choice>& choices() {
    static const std::vector<Choice> known = [] {
        std::vector<Choice> found;
#ifdef CATMLLM_X86
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
            found.push_back({avx512_words, "avx512"});
        if (__builtin_cpu_supports("avx2")) found.push_back({avx2_words, "avx2"});
        found.push_back({sse2_words, "sse2"});
#endif
        found.push_back({portable_words, "portable"});
        return found;
    }();
    return known;
}

void scan_with(Words words, const char* text, std::size_t size, ScanMasks& masks) {
    const auto* p = reinterpret_cast<const unsigned char*>(text);
    const std::size_t whole = size / 64;
    masks.space.resize(whole + 2);
    masks.d_starts.resize(whole + 2);
    Found found;
    masks.special.resize(whole + 2);
    words(p, whole, masks.space.data(), masks.d_starts.data(), masks.special.data(), found);
    unsigned char tail[64];
    std::memset(tail, ' ', sizeof tail);
    if (size > whole * 64) std::memcpy(tail, p + whole * 64, size - whole * 64);
    words(tail, 1, masks.space.data() + whole, masks.d_starts.data() + whole, masks.special.data() + whole,
          found);
    masks.space[whole + 1] = ~std::uint64_t{0};
    masks.d_starts[whole + 1] = 0;
    masks.special[whole + 1] = 0;
    std::uint64_t carry = 1;
    for (std::size_t w = 0; w <= whole; ++w) {
        const std::uint64_t behind = masks.space[w] << 1 | carry;
        carry = masks.space[w] >> 63;
        masks.d_starts[w] &= behind;
    }
    masks.has_hash = found.hash != 0;
    masks.has_semicolon = found.semicolon != 0;
    masks.has_high = found.high != 0;
    if (masks.has_high) {  // white space beyond ASCII lets a block begin too
        for (std::size_t i = 1; i < size; ++i)
            if (p[i] == 'd' && p[i - 1] == kUnicodeSpace)
                masks.d_starts[i / 64] |= std::uint64_t{1} << (i % 64);
    }
}

}  // namespace

const char* scan_level() { return choices().front().name; }

void scan(const char* text, std::size_t size, ScanMasks& masks) {
    static const Words words = choices().front().words;
    scan_with(words, text, size, masks);
}

bool scan_by(const char* level, const char* text, std::size_t size, ScanMasks& masks) {
    for (const Choice& choice : choices()) {
        if (std::strcmp(choice.name, level) != 0) continue;
        scan_with(choice.words, text, size, masks);
        return true;
    }
    return false;
}

}  // namespace catmllm::cif
