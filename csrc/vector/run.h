// What the kernels need of the machine: threads and memory. Kept out of their own files, which are compiled
// for one instruction set and must not instantiate anything of the standard library that other code shares.
#pragma once
#include <cstdint>

namespace catmllm::vector {

// body(context, task, thread) for every task, dynamically over the threads; returns when all are done.
void run_tasks(int threads, std::int64_t tasks, void (*body)(void*, std::int64_t, int), void* context);

template <class F>
void in_parallel(int threads, std::int64_t tasks, F f) {
    run_tasks(
        threads, tasks, [](void* p, std::int64_t task, int thread) { (*static_cast<F*>(p))(task, thread); },
        &f);
}

// One block of memory, aligned to a cache line, handed out in pieces; null where there is not enough.
class Memory {
  public:
    explicit Memory(std::int64_t bytes);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    explicit operator bool() const { return begin_ != nullptr; }

    template <class T>
    T* take(std::int64_t n) {
        T* p = reinterpret_cast<T*>(next_);
        next_ += size<T>(n);
        return p;
    }
    template <class T>
    static std::int64_t size(std::int64_t n) {
        return (n * std::int64_t(sizeof(T)) + 63) / 64 * 64;
    }

  private:
    unsigned char *begin_, *next_;
};

}  // namespace catmllm::vector
