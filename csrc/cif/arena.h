// Memory that lives as long as one text: bump allocation, kept and reused from text to text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace catmllm::cif {

class Arena {
  public:
    // `n` bytes, uninitialised; valid until reset().
    char* allocate(std::size_t n) {
        while (current_ < chunks_.size()) {
            Chunk& chunk = chunks_[current_];
            if (chunk.size - chunk.used >= n) {
                char* p = chunk.data.get() + chunk.used;
                chunk.used += n;
                return p;
            }
            ++current_;
        }
        const std::size_t size = n > kChunk ? n : kChunk;
        chunks_.push_back(Chunk{std::make_unique<char[]>(size), size, n});
        current_ = chunks_.size() - 1;
        return chunks_.back().data.get();
    }

    // Room for n objects of a type that needs no destructor.
    template <class T>
    T* array(std::size_t n) {
        static_assert(std::is_trivially_destructible_v<T>);
        char* p = allocate(n * sizeof(T) + alignof(T));
        p += (alignof(T) - reinterpret_cast<std::uintptr_t>(p) % alignof(T)) % alignof(T);
        return reinterpret_cast<T*>(p);
    }

    // Forgets everything; memory above kKeep goes back to the system.
    void reset() {
        std::size_t total = 0;
        std::size_t keep = 0;
        for (Chunk& chunk : chunks_) {
            chunk.used = 0;
            total += chunk.size;
            if (total <= kKeep) ++keep;
        }
        chunks_.resize(keep);
        current_ = 0;
    }

  private:
    static constexpr std::size_t kChunk = std::size_t{1} << 16;
    static constexpr std::size_t kKeep = std::size_t{1} << 22;
    struct Chunk {
        std::unique_ptr<char[]> data;
        std::size_t size;
        std::size_t used;
    };
    std::vector<Chunk> chunks_;
    std::size_t current_ = 0;
};

}  // namespace catmllm::cif
