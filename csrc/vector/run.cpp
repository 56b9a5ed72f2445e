#include "run.h"

#include <cstdlib>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace catmllm::vector {

void run_tasks(int threads, std::int64_t tasks, void (*body)(void*, std::int64_t, int), void* context) {
    if (threads > tasks) threads = int(tasks);
    if (threads <= 1) {
        for (std::int64_t i = 0; i < tasks; ++i) body(context, i, 0);
        return;
    }
#ifdef _OPENMP
    // OpenMP, since torch's threads are OpenMP's too: a second pool would fight with the first one's waiting
    // threads.
    std::int64_t next = 0;
#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num();
        for (;;) {
            std::int64_t task;
#pragma omp atomic capture
            task = next++;
            if (task >= tasks) break;
            body(context, task, me);
        }
    }
#else
    for (std::int64_t i = 0; i < tasks; ++i) body(context, i, 0);
#endif
}

Memory::Memory(std::int64_t bytes)
    : begin_(static_cast<unsigned char*>(
          ::operator new(std::size_t(bytes), std::align_val_t(64), std::nothrow))),
      next_(begin_) {}

Memory::~Memory() { ::operator delete(begin_, std::align_val_t(64)); }

}  // namespace catmllm::vector
